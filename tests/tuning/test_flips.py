"""Activations of mirrored images: those of mirrored files, a feature space of their own, and half of what a tail learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import featurepipe as fp
from featurepipe.backbones.engine import Engine
from featurepipe.errors import DiskFull, UsageError
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.store import describe
from featurepipe.summary import info_text
from featurepipe.tuning import activations
from featurepipe.tuning.activations import Activations
from featurepipe.tuning.finetune import finetune

CUT, MAP = "s2", "s2:map"
NETWORK: dict[str, Any] = {"backbone": "lenet5", "weights": "none", "silent": True}
EXACT: dict[str, Any] = {"dtype": "float32", "precision": "fp32"}
"""On every processor: some compute in bfloat16 by themselves."""
IMAGES = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of digits, larger than the network's input and not square, and the same files mirrored."""
    folder, found = tmp_path_factory.mktemp("flips"), load_digits()
    of_two = np.flatnonzero(np.isin(found.target, (2, 7)))[:IMAGES]
    for number in of_two.tolist():
        image = Image.fromarray((found.images[number] * 15).astype(np.uint8)).resize((45, 52))
        for name, each in (("piles", image), ("mirrored", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
            path = folder / name / str(found.target[number]) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            each.save(path)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> fp.FeatureStore:
    """Activations of both sides, in float32."""
    store = fp.FeatureStore(folder / "store")
    fp.extract(folder / "piles", store, dataset="digits", nodes=[MAP, "bottleneck"], **EXACT, **NETWORK)
    fp.extract(folder / "piles", store, dataset="digits", nodes=[MAP], mirrored=True, **NETWORK)
    return store


def test_mirrored_activations_are_those_of_mirrored_files_and_of_the_trunk(folder, store) -> None:
    plain, mirrored = sorted(store.spaces(), key=lambda space: "mirrored" in space.fields)
    assert mirrored.fields == {**plain.fields, "mirrored": True}  # in float32, as the one beside it
    found = store.features("digits", node=MAP, backbone=mirrored.fingerprint)
    fp.extract(folder / "mirrored", folder / "other", nodes=[MAP], **EXACT, **NETWORK)
    wanted = fp.FeatureStore(folder / "other").features("mirrored", node=MAP)
    assert list(found.ids) == list(wanted.ids)
    np.testing.assert_array_equal(found.read(np.float32), wanted.read(np.float32))
    backbone = fp.load_backbone("lenet5", "none")
    pixels = torch.from_numpy(np.asarray(Image.open(folder / "piles" / found.ids[0]))[None].copy())
    inputs = backbone.preprocessing.resize_crop(pixels.flip(-1))[None]
    engine = Engine(backbone, backbone.columns([MAP]), precision="fp32", device="cpu", batch_size=16)
    np.testing.assert_allclose(found.read(np.float32)[0], next(iter(engine(inputs).values()))[0].ravel(), atol=1e-5)
    own = store.features("digits", node=MAP)  # a space of mirrored images is asked for by its own name
    assert own.space_fingerprint == store.space("lenet5").fingerprint == plain.fingerprint
    assert not np.allclose(own.read(np.float32), found.read(np.float32))
    again = fp.extract(folder / "piles", store, dataset="digits", nodes=[MAP], mirrored=True, **NETWORK)
    assert again["counts"]["computed"] == 0
    assert f"feature space {mirrored.name} of mirrored images" in info_text(describe(store))


def test_half_of_the_rows_of_a_batch_are_mirrored_and_none_of_those_that_score(store) -> None:
    spaces = {"mirrored" in space.fields: space.fingerprint for space in store.spaces()}
    plain, mirrored = (store.features("digits", node=MAP, backbone=spaces[side]) for side in (False, True))
    sides, rows = [torch.from_numpy(each.read(np.float32)) for each in (plain, mirrored)], np.arange(len(plain))
    for memory in (None, 1):  # held, and read step by step
        examples = Activations(plain, rows, memory, mirrored=mirrored)
        assert examples.bytes == 2 * plain.shape[0] * plain.shape[1] * 4
        ((values, _),) = examples.batches([rows])
        assert torch.equal(values, sides[0])
        drawn = {}
        for draw in ((0, 0), (0, 1)):
            ((values, _),) = examples.batches([rows], draw)
            flips = np.array([np.random.default_rng([*draw, row]).random() < 0.5 for row in rows])
            assert torch.equal(values, torch.where(torch.from_numpy(flips)[:, None], sides[1], sides[0]))
            drawn[draw] = flips
        assert 0.3 < drawn[0, 0].mean() < 0.7
        assert not np.array_equal(drawn[0, 0], drawn[0, 1])


@pytest.mark.slow
def test_a_tail_learns_from_both_sides_from_a_store_and_from_images_alike(folder, store, tmp_path, monkeypatch) -> None:
    fast: dict[str, Any] = {"from_node": CUT, "epochs": 2, "rate": 3e-3, "silent": True}
    found = finetune(store, out=tmp_path / "b", augment="flip", **fast)
    assert found["tuning"]["mirrored"]
    assert read_bundle(tmp_path / "b").space.get("mirrored") is None  # the bundle is for images as they are
    without = finetune(store, out=tmp_path / "w", **fast)
    assert without["tuning"]["runs"][0]["history"][0] | {"seconds": 0} == found["tuning"]["runs"][0]["history"][0] | {
        "seconds": 0
    }
    assert without["tuning"]["runs"][0]["history"][1]["loss"] != found["tuning"]["runs"][0]["history"][1]["loss"]
    asked: dict[str, Any] = {
        **NETWORK,
        **fast,
        "augment": "flip",
        "out": tmp_path / "c",
        "extraction": EXACT,
    }
    planned = finetune(folder / "piles", **asked, dry_run=True)
    assert planned["extraction"]["bytes"] == IMAGES * 4 * (2 * 6 * 14 * 14 + 84)
    assert f"{IMAGES} of them mirrored are to be extracted" in planned["extraction"]["text"]
    with monkeypatch.context() as full:
        full.setattr(activations.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(DiskFull, match=r"take 779\.5 kB"):
            finetune(folder / "piles", **asked)
    other = finetune(folder / "piles", **asked)
    losses = [[entry["loss"] for entry in each["tuning"]["runs"][0]["history"]] for each in (found, other)]
    assert losses[0] == losses[1]


def test_a_space_of_mirrored_images_is_tuned_only_beside_the_other(store, tmp_path) -> None:
    name = next(space.name for space in store.spaces() if "mirrored" in space.fields)
    with pytest.raises(UsageError, match=rf"{name} is of mirrored images.*augment='flip'"):
        finetune(store, backbone=name, from_node=CUT, out=tmp_path / "b", silent=True)


def test_missing_mirrored_activations_name_the_command_and_crops_are_refused(folder, tmp_path) -> None:
    fp.extract(folder / "piles", tmp_path / "s", nodes=[MAP, "bottleneck"], **NETWORK)
    with pytest.raises(UsageError) as found:
        finetune(tmp_path / "s", from_node=CUT, augment="flip", out=tmp_path / "b", silent=True)
    assert str(found.value).endswith(
        f"has no s2:map of them. Add them with: featurepipe extract {folder / 'piles'} --store {tmp_path / 's'} --dataset piles "
        "--backbone lenet5 --weights none --seed 0 --node s2:map --mirrored"
    )
    for augment in ("crop", "crop,flip"):
        with pytest.raises(UsageError, match=r"is of images, not of stored activations.*flip"):
            finetune(tmp_path / "s", from_node=CUT, augment=augment, out=tmp_path / "b", silent=True)
