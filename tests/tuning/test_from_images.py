"""Tuning all layers from images: it learns, goes on to the same bits after a kill, and leaves a bundle like any other."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import featurepipe as fp
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.tail import Trunk
from featurepipe.backbones.weights import LIKE, tuned_from
from featurepipe.errors import DiskFull, UsageError
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.tuning import from_images, loop
from featurepipe.tuning.augmentation import Augmentation, random_crop
from featurepipe.tuning.finetune import finetune
from featurepipe.tuning.from_images import bytes_of_one
from featurepipe.tuning.options import TuneOptions

SIDE = 32
PREPROCESSING = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3)


class Small(nn.Module):
    """Two convolutions with BatchNorm, and dropout."""

    preprocessing = PREPROCESSING

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.layer2(self.layer1(images))).flatten(1))


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """The module whose factory makes the network."""
    module = ModuleType("small_networks")
    module.build = Small
    sys.modules["small_networks"] = module
    yield
    del sys.modules["small_networks"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of three classes, told apart by their colour; every four are of one camera."""
    folder = tmp_path_factory.mktemp("bands")
    random = np.random.default_rng(0)
    lines = ["id,label,camera,height,tags"]
    for number in range(60):
        kind = number % 3
        pixels = random.integers(0, 80, (SIDE, SIDE, 3), np.uint8)
        pixels[..., kind] += 90
        path = folder / "piles" / f"band{kind}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        tags = "low|wide" if kind == 2 else ["high", "wide"][kind]
        lines.append(f"band{kind}/{number}.png,band{kind},camera{number // 4},{kind * 2.0},{tags}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory) -> Path:
    """A bundle of a network from scratch, whose weights are what others start from."""
    out = tmp_path_factory.mktemp("scratch") / "bundle"
    record = finetune(images / "piles", from_node="images", backbone="small_networks:build", weights="none", out=out,
                      epochs=12, batch_size=8, rate=1e-2, silent=True)  # fmt: skip
    assert record["tuning"]["scratch"]
    return out


@pytest.fixture(scope="module")
def store(images, pretrained, tmp_path_factory) -> Path:
    """The bottleneck of that network."""
    path = tmp_path_factory.mktemp("features") / "store"
    fp.extract(images / "piles", path, dataset="bands", backbone="small_networks:build",
               weights=str(pretrained / "weights.safetensors"), precision="fp32", silent=True)  # fmt: skip
    return path


@pytest.fixture
def again(pretrained) -> dict[str, Any]:
    """Arguments of a short tuning from these weights."""
    return {"from_node": "images", "weights": pretrained / "weights.safetensors", "trust_code": True, "epochs": 2,
            "batch_size": 8, "silent": True}  # fmt: skip


def weights_of(bundle: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(read_bundle(bundle).weights_file)


def test_a_network_from_scratch_learns_and_its_statistics_too(images, pretrained, tmp_path) -> None:
    bundle = read_bundle(pretrained)
    tuning = bundle.training["tuning"]
    history = tuning["runs"][0]["history"]
    assert min(entry["loss"] for entry in history[1:]) < history[0]["loss"] - 0.1
    assert bundle.metrics["test"]["accuracy"]["value"] == 1.0
    assert (tuning["mixes"], tuning["batch_norm"]) == ({"1": tuning["mixes"]["1"]}, "train")
    assert tuning["schedule"]["lowest_rate"] == 1.0
    fresh = fp.load_backbone("small_networks:build", "none").state()
    held = weights_of(pretrained)
    changed = {name for name, value in held.items() if not torch.equal(value, fresh[name])}
    assert changed == {name for name in held if not name.startswith("fc.")}
    told = fp.predict(pretrained, images / "piles", to=tmp_path / "p.csv", silent=True, trust_code=True)
    assert told["counts"]["predicted"] == 60
    with (tmp_path / "p.csv").open(newline="") as file:
        right = [row[1] == row[0].split("/")[0] for row in list(csv.reader(file))[1:]]
    assert np.mean(right) > 0.9


def test_the_weights_of_a_tuned_network_give_its_features(images, pretrained, store) -> None:
    measured = fp.evaluate(pretrained, store, silent=True)
    assert measured["metrics"]["accuracy"]["value"] == 1.0


def test_frozen_statistics_stay_and_the_head_comes_first(store, again, pretrained, tmp_path) -> None:
    record = finetune(store, out=tmp_path / "b", **again)
    before, after = weights_of(pretrained), weights_of(tmp_path / "b")
    assert record["tuning"]["mix"] >= 0
    norms = [name for name in before if "running" in name or "num_batches" in name]
    assert norms
    assert all(torch.equal(before[name], after[name]) for name in norms)
    assert record["tuning"]["batch_norm"] == "frozen"
    assert record["tuning"]["runs"][0]["history"][0]["score"] == 1.0  # the exact head, before a step was made
    assert record["tuning"]["augmentation"]["horizontal_flip"] == 0


def test_statistics_are_trained_on_request(store, again, pretrained, tmp_path) -> None:
    record = finetune(store, out=tmp_path / "b", batch_norm="train", augment="none", interpolate=False, **again)
    if record["tuning"]["mix"] == 0:  # then the frozen network was kept, so look at the run
        assert record["tuning"]["batch_norm"] == "train"
        return
    before, after = weights_of(pretrained), weights_of(tmp_path / "b")
    assert not torch.equal(before["layer1.1.running_mean"], after["layer1.1.running_mean"])


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "mixup"), [(1, None), (8, 0.4)])
def test_a_killed_run_goes_on_to_the_same_bits(steps, mixup, images, tmp_path, monkeypatch) -> None:
    asked: dict[str, Any] = {"from_node": "images", "backbone": "small_networks:build", "weights": "none", "epochs": 3,
                             "batch_size": 8, "augment": "crop,flip", "mixup": mixup, "silent": True}  # fmt: skip
    finetune(images / "piles", tmp_path / "features", out=tmp_path / "whole", **asked)
    done: list[int] = []

    def learn(run: Any, *args: Any, original: Callable[..., float] = loop.TuningRun.learn) -> float:
        done.append(1)
        if len(done) > steps:
            raise KeyboardInterrupt  # as a kill does, it leaves the last checkpoint alone
        return original(run, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop.TuningRun, "learn", learn)
        patched.setattr(loop, "SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            finetune(images / "piles", tmp_path / "features", out=tmp_path / "parts", **asked)
    assert (tmp_path / "parts.tuning" / "run-0.pt").is_file()
    finetune(images / "piles", tmp_path / "features", out=tmp_path / "parts", **asked)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "parts.tuning").exists()


def test_numbers_several_labels_and_groups_are_learned_from_images(images, store, again, tmp_path) -> None:
    table = images / "table.csv"
    number = finetune(store, out=tmp_path / "n", labels=table, target="height", group="camera", **again)
    assert number["tuning"]["measure"] == "R2"
    assert number["test"]["r2"]["value"] > 0.5
    bundle = read_bundle(tmp_path / "n")
    assert bundle.groups is not None
    labels = finetune(store, out=tmp_path / "l", labels=table, multilabel="tags", **again)
    assert labels["tuning"]["measure"] == "mAP"
    assert read_bundle(tmp_path / "l").classes == ("high", "low", "wide")


def test_groups_stay_on_one_side(images, store, again, tmp_path, monkeypatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(from_images, "tune_and_publish", lambda works, *_, **__: seen.extend(works) or {"bundle": ""})
    finetune(store, out=tmp_path / "b", labels=images / "table.csv", label="label", group="camera", **again)
    task = seen[0].task
    cameras = [
        set(task.features.groups[rows]) for rows in (task.division.train, task.division.validation, task.division.test)
    ]
    assert not cameras[0] & cameras[1]
    assert not (cameras[0] | cameras[1]) & cameras[2]


def test_mixed_images_are_learned_from_whatever_the_answers(images, store, again, tmp_path) -> None:
    plain = finetune(store, out=tmp_path / "plain", **again)["tuning"]
    mixed = finetune(store, out=tmp_path / "mixed", mixup=1.0, label_smoothing=0.1, **again)["tuning"]
    assert mixed["softened"] == "mixup of 1, label smoothing of 0.1"
    first, other = (tuning["runs"][0]["history"] for tuning in (plain, mixed))
    assert first[0]["loss"] == other[0]["loss"]  # images that choose are as they are, and so are their answers
    assert other[1]["train_loss"] > first[1]["train_loss"]
    table = images / "table.csv"
    for kind in ({"target": "height"}, {"multilabel": "tags"}):
        assert finetune(store, out=tmp_path / "b", labels=table, mixup=0.4, **kind, **again)["tuning"]["softened"]


def test_only_the_images_of_ids_count(store, again, tmp_path) -> None:
    ids = [f"band{number % 3}/{number}.png" for number in range(45)]
    record = finetune(store, out=tmp_path / "b", ids=ids, **again, dry_run=True)
    assert sum(record["counts"][name] for name in ("train", "validation", "test")) == 45
    with pytest.raises(UsageError, match=r"1 id of ids is of no image of bands, such as 'x.png'"):
        finetune(store, out=tmp_path / "b", ids=["x.png"], **again)


def test_an_image_that_changed_or_went_is_left_out_and_said(images, again, tmp_path, capsys) -> None:
    import shutil

    moving = tmp_path / "piles"
    shutil.copytree(images / "piles", moving)
    fp.extract(moving, tmp_path / "store", backbone="small_networks:build", weights=str(again["weights"]), silent=True)
    (moving / "band0" / "0.png").unlink()
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(moving / "band1" / "1.png")
    record = finetune(tmp_path / "store", out=tmp_path / "b", **{**again, "silent": False})
    said = capsys.readouterr().err
    assert "1 image of piles is not in" in said
    assert sum(record["counts"][name] for name in ("train", "validation", "test")) in (58, 59)
    assert record["tuning"]["unreadable"] == 1
    shutil.rmtree(moving)
    with pytest.raises(UsageError, match=r"piles, which cannot be opened now .*give the images as the source.*store="):
        finetune(tmp_path / "store", out=tmp_path / "b", **again)


def test_what_cannot_be_is_refused_before_anything_is_done(images, store, again, tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"augment='crop' is of images.*from_node='images'"):
        finetune(store, from_node="layer1", out=tmp_path / "b", augment="crop", silent=True)
    with pytest.raises(UsageError, match="unknown augment 'mirror'; choices: none, crop, flip"):
        finetune(store, out=tmp_path / "b", augment="mirror", **again)
    with pytest.raises(UsageError, match=r"too few to set validation images aside|fewer than 2 images to learn from"):
        finetune(store, out=tmp_path / "b", ids=["band0/0.png", "band1/1.png", "band0/3.png"], **again)
    monkeypatch.setattr(from_images, "available_memory", lambda: 700_000)
    with pytest.raises(UsageError, match=r"a step of 512 images takes about .*batch_size="):
        finetune(store, out=tmp_path / "b", **{**again, "batch_size": 512})
    monkeypatch.setattr(from_images.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskFull, match=r"checkpoints and weights of .* take up to"):
        finetune(store, out=tmp_path / "b", **again)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(UsageError, match=r"needs Lightning Fabric; run: pip install 'featurepipe\[tune\]'"):
        finetune(store, out=tmp_path / "b", **again)
    assert not (tmp_path / "b").exists()


def test_a_loss_that_is_no_number_names_a_lower_rate(store, again, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"not a number in epoch 1.*rate="):
        finetune(store, out=tmp_path / "b", **again, rate=1e30)


def test_a_dry_run_tells_the_time_and_writes_nothing(images, store, again, tmp_path, cli) -> None:
    told = finetune(
        images / "piles", out=tmp_path / "b", backbone="lenet5", **{**again, "weights": "none"}, dry_run=True
    )
    assert told["tuning"]["seconds_per_1000_images"] > 0
    assert list(tmp_path.iterdir()) == []
    finished = cli("finetune", images / "piles", "--from", "images", "--backbone", "lenet5", "--weights", "none", "--out",
                   tmp_path / "b", "--augment", "crop,flip", "--dry-run")  # fmt: skip
    assert finished.code == 0
    assert (
        "all of lenet5, from scratch: 60,856 weights in 4 blocks, from images (crops of 35% to 100% and flips"
        in finished.out
    )
    assert list(tmp_path.iterdir()) == []


def test_augmentation_follows_from_seed_epoch_and_row_and_is_off_in_evaluation(images) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 50), np.uint8))
    augment = Augmentation.of("crop,flip", PREPROCESSING)
    first = augment(pixels, 3, (0, 1))
    assert first.shape == (3, SIDE, SIDE)
    assert torch.equal(first, augment(pixels, 3, (0, 1)))
    assert not any(
        torch.equal(first, augment(pixels, row, draw)) for row, draw in ((4, (0, 1)), (3, (0, 2)), (3, (1, 1)))
    )
    plain = PREPROCESSING.resize_crop(pixels)
    flips = [Augmentation.of("flip", PREPROCESSING)(pixels, row, (0, 0)) for row in range(20)]
    mirrored = sum(torch.equal(image, plain.flip(2)) for image in flips)
    assert 4 <= mirrored <= 16
    assert mirrored + sum(torch.equal(image, plain) for image in flips) == 20
    assert torch.equal(Augmentation.of("none", PREPROCESSING)(pixels, 3, (0, 1)), plain)


def test_random_crops_lie_inside_and_have_the_asked_area_and_shape() -> None:
    random = np.random.default_rng(0)
    for height, width in ((40, 50), (7, 400), (400, 7), (1, 1)):
        for _ in range(50):
            top, left, tall, wide = random_crop(height, width, random)
            assert 0 <= top <= height - tall
            assert 0 <= left <= width - wide
            assert tall >= 1
            assert wide >= 1
    shares = [np.prod(random_crop(200, 200, random)[2:]) / 40_000 for _ in range(300)]
    assert 0.34 < min(shares) < 0.42
    assert 0.9 < max(shares) <= 1.0


@pytest.mark.parametrize(
    ("name", "weights"), [("small_networks:build", "none"), ("resnet18", "none"), ("lenet5", "none")]
)
def test_the_trunk_gives_the_networks_own_features(name, weights) -> None:
    backbone = fp.load_backbone(name, weights)
    trunk = Trunk(backbone)
    (column,) = backbone.columns([])
    shape = backbone.preprocessing.input_shape
    pixels = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = backbone.graph([column.node])(backbone.preprocessing.normalise(pixels))[column.node]
        wanted = fp.backbones.pool(found, column.pooling, channel_axis=backbone.channel_axis(column.node)).flatten(1)
        assert torch.allclose(trunk(pixels), wanted, atol=1e-5)
    classifier = {"small_networks:build": "fc.", "resnet18": "fc.", "lenet5": "output."}[name]
    names = {name for block in trunk.blocks().values() for name in block}
    assert names == {name for name, _ in backbone.module.named_parameters() if not name.startswith(classifier)}
    assert bytes_of_one(trunk) > 4 * np.prod(shape)


def test_a_network_from_scratch_drops_and_counts_only_while_it_learns() -> None:
    trunk = Trunk(fp.load_backbone("small_networks:build", "none"))
    pixels = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    outputs = []
    for draw in ((0, 0, 1), (0, 0, 1), (0, 0, 2)):
        with trunk.learning(draw):
            outputs.append(trunk(pixels).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    counted = trunk.statistics()["layer1.1.num_batches_tracked"].item()
    assert counted == 3
    trunk(pixels)
    assert trunk.statistics()["layer1.1.num_batches_tracked"].item() == counted
    frozen = Trunk(fp.load_backbone("small_networks:build", "none"), "frozen")
    assert frozen.statistics() == {}


def test_a_weights_file_says_which_weights_it_was_tuned_from(tmp_path) -> None:
    from safetensors.torch import save_file

    from featurepipe.backbones import load_backbone

    plain = load_backbone("resnet50", "none")
    names = {name: value.clone() for name, value in plain.state().items()}
    save_file(names, tmp_path / "tuned.safetensors", {LIKE: "IMAGENET1K_V1"})
    save_file(names, tmp_path / "plain.safetensors")
    assert tuned_from(tmp_path / "tuned.safetensors") == "IMAGENET1K_V1"
    tuned = load_backbone("resnet50", str(tmp_path / "tuned.safetensors"))
    assert tuned.like == "IMAGENET1K_V1"
    assert tuned.preprocessing == load_backbone("resnet50", "IMAGENET1K_V1").preprocessing
    other = load_backbone("resnet50", str(tmp_path / "plain.safetensors"))
    assert other.like is None
    assert other.preprocessing == load_backbone("resnet50").preprocessing != tuned.preprocessing
    assert tuned.weights_sha256 == other.weights_sha256


def test_schedules_have_their_own_defaults_from_scratch() -> None:
    tail = TuneOptions(from_node="s2").schedule(1000)
    assert (tail.epochs, tail.rate, tail.lowest_rate, tail.batch_size, tail.patience) == (10, 1e-3, 0.1, 64, 3)
    images = TuneOptions(from_node="images")
    assert images.schedule(1000).batch_size == 32
    scratch = images.schedule(1000, is_scratch=True)
    assert (scratch.epochs, scratch.rate, scratch.lowest_rate, scratch.patience) == (63, 1e-3, 1.0, 15)
    assert images.schedule(50, is_scratch=True).epochs == 300
    assert images.schedule(60_000, is_scratch=True).epochs == 60
    assert TuneOptions(from_node="images", epochs=4, weight_decay=0.0).schedule(50, is_scratch=True).weight_decay == 0
