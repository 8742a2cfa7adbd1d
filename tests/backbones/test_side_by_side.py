"""Networks side by side: each sees and computes what it does alone."""

from __future__ import annotations

import functools

import pytest
import torch
from PIL import Image

import featurepipe as fp
from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine
from featurepipe.backbones.side_by_side import SideBySidePreprocessing
from featurepipe.backbones.tail import Trunk, cuts
from featurepipe.errors import UsageError
from featurepipe.prediction.own_classes import OwnClassifier

NAMES = ("efficientnet_lite0", "efficientnet_lite1")


@pytest.fixture(scope="module")
def both() -> fp.backbones.Backbone:
    return load_backbone("+".join(NAMES))


@functools.cache
def one(name: str) -> fp.backbones.Backbone:
    """A network by itself, loaded and traced once."""
    return load_backbone(name)


def features(backbone, images, *nodes):
    columns = backbone.columns(nodes)
    found = Engine(backbone, columns, precision="fp32")(
        torch.stack([backbone.preprocessing.resize_crop(i) for i in images])
    )
    return [torch.from_numpy(found[str(column)]) for column in columns]


@pytest.mark.slow
def test_each_network_gives_the_features_that_it_gives_alone(both, photos) -> None:
    images = photos[:2]
    together = features(both, images, "bottleneck", *(f"{name}.blocks.5" for name in NAMES))
    for place, name in enumerate(NAMES):
        alone = features(one(name), images, "bottleneck", "blocks.5")
        assert torch.allclose(together[0][:, 1280 * place : 1280 * (place + 1)], alone[0], atol=1e-4)
        assert torch.allclose(together[1 + place], alone[1], atol=1e-4)
    assert together[0].shape == (2, 2560)


def test_the_output_is_the_mean_of_all_logits_and_the_classes_are_theirs(both, photos) -> None:
    def logits(backbone):
        p = backbone.preprocessing
        with torch.inference_mode():
            return backbone.module(p.normalise(torch.stack([p.resize_crop(photo) for photo in photos[:2]])))

    wanted = torch.stack([logits(one(name)) for name in NAMES]).mean(0)
    assert torch.allclose(logits(both), wanted, atol=1e-3)
    assert OwnClassifier.of_network(both).classes == one(NAMES[0]).classes


def test_all_blocks_are_those_of_each_and_the_space_says_how_images_are_seen(both) -> None:
    columns = [str(column) for column in both.columns(["all"])]
    alone = [[str(column) for column in one(name).columns(["all"])] for name in NAMES]
    wanted = [f"{name}.{column}" for name, own in zip(NAMES, alone, strict=True) for column in own[:-1]]
    assert columns[:-1] == wanted
    assert columns[-1] == str(both.columns(["bottleneck"])[0])
    assert len(both.stages()) == sum(len(one(name).stages()) - 1 for name in NAMES) + 1
    parts = [one(name).preprocessing.as_dict() for name in NAMES]
    assert both.identity()["preprocessing"] == {"side_by_side": parts}
    assert both.preprocessing.input_shape == (3, 240, 464)
    assert isinstance(both.preprocessing, SideBySidePreprocessing)


def test_they_are_not_tuned_and_others_do_not_stand_side_by_side(both) -> None:
    assert cuts(both) == []
    with pytest.raises(UsageError, match="not tuned together: tune one of them, with backbone='efficientnet_lite0'"):
        Trunk(both)
    for name in ("efficientnet_lite0+resnet18", "efficientnet_lite0+efficientnet_lite0", "efficientnet_lite0+"):
        with pytest.raises(UsageError, match="different ones of efficientnet_lite0, efficientnet_lite1"):
            load_backbone(name)


@pytest.mark.slow
def test_a_bundle_on_both_predicts_on_images(tmp_path) -> None:
    root = tmp_path / "pictures"
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 120, (64, 48, 3), generator=generator, dtype=torch.uint8).numpy()
        pixels[:, :, number % 2] += 100
        path = root / ("red", "green")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)

        Image.fromarray(pixels).save(path)
    fp.extract(root, tmp_path / "store", dataset="d", backbone="+".join(NAMES), nodes=["all"], silent=True)
    fp.train(tmp_path / "store", nodes="all", select="auto", out=tmp_path / "b", silent=True)
    found = fp.predict(tmp_path / "b", root, tmp_path / "p.csv", silent=True)
    assert found["counts"]["predicted"] == 24
    rows = [line.replace('"', "").split(",")[:2] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert sum(row[0].startswith(row[1]) for row in rows) >= 22
