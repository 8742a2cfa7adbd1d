"""Stages: the outputs that stand for a network's depth, and the grid that brings them to one width."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from featurepipe.backbones import Column, NodeInfo, bounded_pooling, load_backbone, pool
from featurepipe.backbones.families import classification_names
from featurepipe.backbones.nodes import bottleneck, freeze, measure_trace, run_hooked, trace
from featurepipe.backbones.pooling import pooled_shape
from featurepipe.backbones.stages import stages
from featurepipe.errors import UsageError
from tests.backbones.conftest import backbone_of

STAGES = {
    "alexnet": ["features.2", "features.5", "features.12", "classifier.3", "classifier.5"],
    "vgg16": [*(f"features.{i}" for i in (4, 9, 16, 23, 30)), "classifier.2", "classifier.5"],
    "vgg19": [*(f"features.{i}" for i in (4, 9, 18, 27, 36)), "classifier.2", "classifier.5"],
    "googlenet": [*(f"inception{i}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")), "dropout"],
    "inception_v3": [
        *(f"Mixed_{i}" for i in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")),
        "flatten",
    ],
    "resnet18": ["layer1", "layer2", "layer3", "layer4", "flatten"],
    "resnet50": ["layer1", "layer2", "layer3", "layer4", "flatten"],
    "resnet101": ["layer1", "layer2", "layer3", "layer4", "flatten"],
    "lenet5": ["s2", "s4", "c5", "f6.1"],
    "efficientnet_lite0": [*(f"blocks.{i}" for i in (0, 2, 4, 7, 10, 14, 15)), "flatten"],
    "densenet121": [*(f"features.denseblock{i}" for i in (1, 2, 3, 4)), "flatten"],
    "vit_b_16": [*(f"encoder.layers.encoder_layer_{i}" for i in range(12)), "getitem_5"],
    "vit_l_32": [*(f"encoder.layers.encoder_layer_{i}" for i in range(1, 24, 2)), "getitem_5"],
    "swin_t": ["features.1", "features.3", "features.5", "features.7", "flatten"],
    "mobilenet_v3_large": [*(f"features.{i}" for i in (1, 3, 6, 10, 12, 15)), "classifier.2"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7", "classifier.1"],
    "shufflenet_v2_x1_0": ["stage2", "stage3", "stage4", "mean"],
    # The last fire module is the classifier's input, so it is listed once, as the bottleneck.
    "squeezenet1_1": [*(f"features.{i}" for i in (3, 4, 6, 7, 9, 10, 11)), "classifier.0"],
}


@pytest.mark.parametrize(("name", "first", "last", "count"), [
    ("resnet18", "layer1.0:avg4x4", "layer4.1:avg4x4", 9),
    ("resnet50", "layer1.0:avg4x4", "layer4.2:avg2x2", 17),  # of 2,048 channels a grid of 2 x 2 is at most 9,000 values
    ("efficientnet_lite0", "blocks.0:avg4x4", "blocks.15:avg4x4", 17),
    ("lenet5", "s2:avg4x4", "c5:gap", 4),
])  # fmt: skip
def test_all_are_the_outputs_of_every_block_pooled_to_a_bounded_width(name, first, last, count):
    found = [str(column) for column in backbone_of(name).columns(["all"])]
    assert (found[0], found[-2], len(found)) == (first, last, count)
    assert found[-1] == str(backbone_of(name).columns(["bottleneck"])[0])
    assert backbone_of(name).columns(["bottleneck", "all"])[0].node == found[-1].partition(":")[0]


LONG = ("vgg19", "inception_v3", "resnet101", "densenet121", "vit_l_32")
"""Those of ``STAGES`` that take some 4 s each; others are of their family, or have as many kinds of blocks."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in STAGES])
def test_the_stages_of_well_known_networks(name: str) -> None:
    assert backbone_of(name).stages() == tuple(STAGES[name])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", ["layer1", "layer2", "layer3", "layer4", "global_pool.flatten"]),
        ("tf_efficientnet_lite0", [*(f"blocks.{i}" for i in range(7)), "global_pool"]),  # hooked, as are the next
        ("mobilevit_xxs", [*(f"stages.{i}" for i in range(5)), "head.drop"]),
        pytest.param("vgg11", [*(f"features.{i}" for i in (2, 5, 10, 15, 20)), "head.drop"], marks=pytest.mark.slow),
        pytest.param("levit_128s", ["stem", *(f"stages.{i}" for i in range(3)), "head.drop"], marks=pytest.mark.slow),
        pytest.param(
            "swin_tiny_patch4_window7_224", [*(f"layers.{i}" for i in range(4)), "head.drop"], marks=pytest.mark.slow
        ),
        pytest.param(
            "volo_d1_224",
            ["patch_embed", *(f"network.{i}" for i in (0, 2, 3, 4)), "post_network", "head_drop"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "efficientformer_l1", ["stem", *(f"stages.{i}" for i in range(4)), "head_drop"], marks=pytest.mark.slow
        ),
        # The stem and the last convolution are blocks themselves; the four stages lie together in a third.
        pytest.param(
            "fastvit_t8",
            ["stem", *(f"stages.{i}" for i in range(4)), "final_conv", "head.drop"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_stages_of_timms_networks(name: str, expected: list[str]) -> None:
    pytest.importorskip("timm")
    assert load_backbone(f"timm/{name}", "none").stages() == tuple(expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in STAGES and name not in LONG else [pytest.mark.slow])
        for name in classification_names()
    ],
)
def test_the_stages_of_any_network_are_columns_in_order_of_depth(name: str) -> None:
    backbone = backbone_of(name)
    found = backbone.stages()
    assert [column.node for column in backbone.columns(found)] == list(found)
    infos = [backbone.node(stage) for stage in found]
    depths = [backbone.nodes().index(info) for info in infos]
    assert depths == sorted(set(depths))
    assert found[-1] == backbone.bottleneck
    assert 4 <= len(found) <= 13
    assert len({(info.shape, info.cost) for info in infos}) == len(found)  # no value twice
    assert infos[-2].cost > 0.6  # and the network's end is not left out


# Networks of users


def _layer(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()
    )


class Residual(nn.Module):
    """Two layers and a shortcut; its output is made by no module of its own."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(_layer(width_in, width_out, stride), _layer(width_out, width_out))
        self.shortcut = nn.Conv2d(width_in, width_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Trunk(nn.Module):
    def __init__(self, *parts: nn.Module, untraceable: bool = False) -> None:
        super().__init__()
        self.stem = _layer(3, 4)
        self.parts = nn.ModuleList(parts)
        self.untraceable = untraceable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.untraceable and x.sum() > 1e9:
            return x
        for part in self.parts:
            x = part(x)
        return x


class Net(nn.Module):
    def __init__(self, trunk: nn.Module, width: int, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.neck = neck or nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.pool(self.neck(self.trunk(x))).flatten(1)))


def stages_of(network: nn.Module, size: int = 32) -> list[str]:
    """The stages, whether the network can be traced or not; the bottleneck is checked and left out."""
    freeze(network)
    found = trace(network)
    if found is None:
        nodes, end = run_hooked(network, (3, size, size))
    else:
        nodes, end = measure_trace(found, (3, size, size)), bottleneck(found)
    *before, last = stages(network, nodes, next(info for info in nodes if info.name == end))
    assert last == end
    return before


@pytest.mark.parametrize("untraceable", [False, True])
def test_blocks_inside_a_users_shell(untraceable: bool) -> None:
    parts = [Residual(4, 4), Residual(4, 8, 2), nn.MaxPool2d(2), Residual(8, 16)]
    neck = nn.Sequential(_layer(16, 16), _layer(16, 8))
    network = Net(Trunk(*parts, untraceable=untraceable), 8, neck)
    assert (trace(network) is None) == untraceable
    assert stages_of(network) == ["trunk.parts.0", "trunk.parts.1", "trunk.parts.3", "neck"]


@pytest.mark.parametrize("untraceable", [False, True])
def test_one_large_group_is_looked_into_though_there_are_three(untraceable: bool) -> None:
    body = nn.Sequential(Residual(8, 8), Residual(8, 16, 2), Residual(16, 16), Residual(16, 16))
    parts = [nn.Sequential(_layer(4, 8), _layer(8, 8)), body, nn.Sequential(_layer(16, 16), _layer(16, 8))]
    found = stages_of(Net(Trunk(*parts, untraceable=untraceable), 8))
    assert found == ["trunk.parts.0", *(f"trunk.parts.1.{i}" for i in range(4)), "trunk.parts.2"]


@pytest.mark.parametrize("untraceable", [False, True])
def test_a_block_with_a_shortcut_stays_whole_however_few_there_are(untraceable: bool) -> None:
    trunk = Trunk(nn.MaxPool2d(2), Residual(4, 8), Residual(8, 8, 2), untraceable=untraceable)
    assert stages_of(Net(trunk, 8)) == ["trunk.parts.0", "trunk.parts.1", "trunk.parts.2"]


@pytest.mark.parametrize("untraceable", [False, True])
def test_of_many_blocks_the_last_of_each_shape(untraceable: bool) -> None:
    shapes = [(4, 4)] * 4 + [(4, 6)] + [(6, 6)] * 4 + [(6, 8)] * 1 + [(8, 8)] * 3 + [(8, 10)]
    trunk = Trunk(nn.Sequential(*(Residual(*widths) for widths in shapes)), untraceable=untraceable)
    assert stages_of(Net(trunk, 10), size=8) == [f"trunk.parts.0.{i}" for i in (3, 8, 12, 13)]


def test_of_many_blocks_of_like_shape_every_nth_and_the_last() -> None:
    shapes = [(4, 4)] * 8 + [(4, 5)] + [(5, 5)] * 17
    trunk = Trunk(*(Residual(*widths) for widths in shapes))
    expected = [1, 3, 5, 7, 9, 12, 14, 16, 18, 20, 22, 25]
    assert stages_of(Net(trunk, 5), size=8) == [f"trunk.parts.{i}" for i in expected]


def test_layers_of_a_plain_network_after_activation() -> None:
    plain = nn.Sequential(_layer(3, 4), _layer(4, 4, 2), _layer(4, 8, 2), _layer(8, 8))
    assert stages_of(Net(plain, 8)) == ["trunk.0", "trunk.1", "trunk.2", "trunk.3"]


@pytest.mark.parametrize("activation_first", [False, True])
def test_pools_and_hidden_layers_of_a_plain_network(activation_first: bool) -> None:
    def layer(width_in: int, width_out: int) -> list[nn.Module]:
        after = [nn.ReLU(), nn.MaxPool2d(2)] if activation_first else [nn.MaxPool2d(2), nn.ReLU()]
        return [nn.Conv2d(width_in, width_out, 3, padding=1), *after]

    maps = [*layer(3, 4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), *layer(4, 8), *layer(8, 8)]
    flat = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU()]
    network = nn.Sequential(*maps, *flat, nn.Linear(7, 2))
    assert stages_of(network) == ["2", "7", "10", "14"]


class WithAuxiliary(nn.Module):
    """Blocks or plain layers, with a classifier at the side that also runs when it is not needed."""

    def __init__(self, *parts: nn.Module, side_after: int, untraceable: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.side_after, self.untraceable = side_after, untraceable
        head = [nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.side = nn.Sequential(*head, nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, part in enumerate(self.parts):
            x = part(x)
            if i == self.side_after:
                logits = self.side(x)
        if self.untraceable and logits.sum() > 1e9:
            return logits
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("untraceable", [False, True])
def test_auxiliary_classifiers_never_count(untraceable: bool) -> None:
    blocks = WithAuxiliary(Residual(3, 4), Residual(4, 4, 2), Residual(4, 4), side_after=0, untraceable=untraceable)
    plain = WithAuxiliary(_layer(3, 4), _layer(4, 4, 2), _layer(4, 4), side_after=1, untraceable=untraceable)
    assert (trace(freeze(blocks)) is None) == untraceable
    # A hooked network has no node for the mean: its bottleneck is the last module.
    assert stages_of(blocks) == ["parts.0", "parts.1", "parts.2"][: 2 if untraceable else 3]
    assert stages_of(plain) == ["parts.0", "parts.1", "parts.2"][: 2 if untraceable else 3]


def test_the_smallest_networks_have_what_there_is() -> None:
    assert stages_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)), size=8) == ["1"]
    assert stages_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), size=8) == []


def test_a_network_of_the_users_needs_its_weights_for_nothing_here(tmp_path, monkeypatch) -> None:
    (tmp_path / "net_with_stages.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3), nn.ReLU(), nn.Conv2d(o, o, 3), nn.ReLU())\n"
        "    net = nn.Sequential(block(3, 4), block(4, 5), block(5, 6), nn.Flatten(), nn.Linear(24, 2))\n"
        "    net.preprocessing = dict(resize=14, crop=(14, 14), mean=(0.5,) * 3, std=(0.5,) * 3)\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = load_backbone("net_with_stages:make")
    assert backbone.stages() == ("0", "1", "2", "3")
    assert backbone.columns(backbone.stages()) == [Column(str(i), "gap") for i in range(4)]
    assert "module" not in vars(backbone)
    sys.modules.pop("net_with_stages")


# The pooling that bounds the width


@pytest.mark.parametrize(
    ("shape", "axis", "max_width", "pooling"),
    [
        ((64, 27, 27), 1, 9000, "avg11x11"),  # 121 * 64 = 7,744; 144 * 64 = 9,216
        ((256, 14, 14), 1, 9216, "avg6x6"),  # 36 * 256 is 9,216 itself
        ((256, 14, 14), 1, 9215, "avg5x5"),
        ((2048, 7, 7), 1, 9000, "avg2x2"),
        ((16, 5, 9), 1, 9000, "avg5x5"),  # no more rows than there are
        ((16, 9, 5), 1, 9000, "avg5x5"),
        ((7, 7, 768), 3, 9000, "avg3x3"),  # channels last
        ((2520, 7, 7), 1, 9000, "gap"),  # 2 x 2 cells would be 10,080
        ((7392, 12, 12), 1, 5000, "gap"),  # nothing is narrower
        ((512, 1, 1), 1, 9000, "gap"),
        ((4096,), 1, 9000, "gap"),
        ((4096,), 1, 100, "gap"),
        ((197, 768), 2, 9000, "gap"),
        ((16, 384), 2, 9000, "flatten"),
        ((16, 384), 2, 6143, "gap"),
    ],
)
def test_as_many_cells_as_fit(shape: tuple[int, ...], axis: int, max_width: int, pooling: str) -> None:
    info = NodeInfo("node", shape, shape[axis - 1], 0.5, channel_axis=axis)
    assert bounded_pooling(info, max_width) == pooling
    width = pooled_shape(shape, pooling, axis)[0]
    assert width <= max_width or width == info.width
    assert pool(torch.zeros(2, *shape), pooling, channel_axis=axis).shape == (2, width)


@pytest.mark.parametrize("max_width", [0, -3])
def test_a_width_that_holds_nothing(max_width: int) -> None:
    info = NodeInfo("node", (8, 4, 4), 8, 0.5)
    with pytest.raises(UsageError, match=f"max_width {max_width} must be a number from 1"):
        bounded_pooling(info, max_width)


@pytest.mark.parametrize(("cells", "size"), [(4, 7), (5, 14), (11, 27), (23, 112), (7, 7)])
def test_grids_that_do_not_divide_the_map(cells: int, size: int) -> None:
    """Adaptive pooling: cell i covers rows floor(i H / K) to ceil((i + 1) H / K), so that neighbours may share a row."""
    maps = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    spans = [slice(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
    expected = [[[c[rows, columns].mean() for rows in spans for columns in spans] for c in image] for image in maps]
    pooled = pool(maps, f"avg{cells}x{cells}")
    np.testing.assert_allclose(pooled, np.array(expected).reshape(2, -1), atol=1e-6)
    covered = np.zeros(size, int)
    for span in spans:
        covered[span] += 1
    assert set(covered) <= {1, 2}
