"""Backbones by name: random controls, columns, identity, every message."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from featurepipe.backbones import Column, load_backbone
from featurepipe.errors import UsageError
from tests.backbones.conftest import backbone_of


def test_random_controls_are_reproducible_by_seed_and_leave_torchs_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    backbones = [load_backbone("lenet5", "none", seed=seed) for seed in (4, 4, 5)]
    hashes = [backbone.weights_sha256 for backbone in backbones]
    assert torch.equal(torch.rand(3), expected)
    assert hashes[0] == hashes[1] != hashes[2]
    assert backbones[0].is_random
    assert backbones[0].weights == "random (seed 4)"
    assert backbones[0].description()["random"] is True
    assert backbones[0].description()["seed"] == 4


def test_a_random_torchvision_network_is_what_torchvision_makes_of_the_seed() -> None:
    from torchvision.models import resnet18

    backbone = load_backbone("resnet18", "none", seed=9)
    torch.manual_seed(9)
    images = torch.randn(1, 3, 64, 64)
    torch.manual_seed(9)
    assert torch.equal(backbone.module(images), resnet18().eval()(images))


def test_columns() -> None:
    backbone = backbone_of("resnet50")
    assert backbone.columns(["layer4", "bottleneck", "layer1.0.relu_2:max2x2", "layer4:gap", "layer1.0:map"]) == [
        Column("layer4", "gap"),
        Column("flatten", "gap"),
        Column("layer1.0.relu_2", "max2x2"),
        Column("layer1.0", "map"),
    ]
    assert backbone.columns([]) == [Column("flatten", "gap")]
    assert backbone.feature_shape(Column("layer4", "avg2x2")) == (8192,)
    assert backbone.feature_shape(Column("layer1.0", "map")) == (256, 56, 56)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("layer5", "unknown node 'layer5' in resnet50; nearest: layer"),
        ("layer5", "See: featurepipe nodes resnet50"),
        ("layer4:mean", "unknown pooling 'mean'; choices: gap, gmp, gem"),
        ("bottleneck:avg2x2", "needs a map"),
        ("x", "unknown node 'x'"),
        ("", "names no node"),
    ],
)
def test_columns_that_are_wrong(requested: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        backbone_of("resnet50").columns([requested])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet51", "DEFAULT", "unknown backbone 'resnet51'; nearest: resnet50"),
        ("resnet51", "DEFAULT", "See: featurepipe backbones"),
        ("efficientnet_lite", "DEFAULT", "efficientnet_lite0"),
        ("resnet50", "IMAGENET1K_V3", "unknown weights 'IMAGENET1K_V3' in resnet50; nearest: IMAGENET1K_V2"),
        ("efficientnet_lite0", "V2", "unknown weights 'V2' in efficientnet_lite0; choices: IMAGENET1K, DEFAULT, none"),
        ("lenet5", "DEFAULT", "use weights='none' and a seed for a random network, or weights='FILE.pth'"),
    ],
)
def test_names_that_are_wrong(name: str, weights: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_backbone(name, weights)
    assert message in str(caught.value)


def test_a_graph_of_unknown_nodes_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown node 'c9' in lenet5; nearest: c"):
        load_backbone("lenet5", "none").graph(["c9"])


def test_seeds_that_torch_cannot_take() -> None:
    with pytest.raises(UsageError, match=r"seed 99999999999999999999999 is out of range; .* to 18446744073709551615"):
        load_backbone("lenet5", "none", seed=99999999999999999999999)
    largest = load_backbone("lenet5", "none", seed=2**64 - 1).weights_sha256
    assert largest == load_backbone("lenet5", "none", seed=-1).weights_sha256  # torch wraps negative seeds around
    assert load_backbone("lenet5", "none", seed=-(2**63)).weights_sha256 != largest
    with pytest.raises(UsageError, match="out of range"):
        load_backbone("lenet5", "none", seed=-(2**63) - 1)


def test_identity_is_json_and_tells_backbones_apart(lite0) -> None:
    identity = lite0.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["architecture"] == "featurepipe/efficientnet_lite0"
    assert identity["preprocessing"]["crop"] == [224, 224]
    assert len(identity["weights_sha256"]) == 64
    assert load_backbone("lenet5", "none").identity() != load_backbone("lenet5", "none", seed=1).identity()


def test_default_stands_for_the_best_weights_and_each_name_for_itself() -> None:
    assert load_backbone("resnet50").weights == "IMAGENET1K_V2"
    assert load_backbone("resnet50", "IMAGENET1K_V1").weights == "IMAGENET1K_V1"
    assert load_backbone("resnet50").preprocessing.resize == 232
    assert load_backbone("resnet50", "IMAGENET1K_V1").preprocessing.resize == 256
    assert load_backbone("resnet50", "none").preprocessing.resize == 232


def test_a_vit_has_the_image_size_of_its_weights() -> None:
    large = load_backbone("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")
    assert large.preprocessing.crop == (384, 384)
    assert large.node("encoder").shape == (577, 768)
    assert load_backbone("vit_b_16").node("encoder").shape == (197, 768)


def test_importing_the_package_does_not_load_torch() -> None:
    code = (
        "import sys, featurepipe.backbones as b; assert 'torch' not in sys.modules; "
        "b.Column, b.parse_column('layer4:max2x2'), b.Preprocessing; assert 'torch' not in sys.modules; "
        "b.pool; assert sorted(b.__all__) == sorted(b._HOMES)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_in_the_package_are_attribute_errors() -> None:
    import featurepipe.backbones

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = featurepipe.backbones.nonsense
