"""Nodes: order, shapes, cost, blocks, the channel axis; networks that cannot be traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from featurepipe.backbones import load_backbone
from featurepipe.backbones.nodes import _channel_axis, bottleneck, measure_trace, run_hooked, trace
from tests.backbones.conftest import backbone_of


def test_lenets_nodes_by_hand() -> None:
    nodes = load_backbone("lenet5", "none").nodes()
    assert [(info.name, info.shape, info.width) for info in nodes] == [
        ("c1.0", (6, 28, 28), 6),
        ("c1.1", (6, 28, 28), 6),
        ("s2", (6, 14, 14), 6),
        ("c3.0", (16, 10, 10), 16),
        ("c3.1", (16, 10, 10), 16),
        ("s4", (16, 5, 5), 16),
        ("flatten", (400,), 400),
        ("c5.0", (120,), 120),
        ("c5.1", (120,), 120),
        ("f6.0", (84,), 84),
        ("f6.1", (84,), 84),
        ("output", (10,), 10),
    ]
    operations = [6 * 28 * 28 * 25, 16 * 10 * 10 * 6 * 25, 400 * 120, 120 * 84, 84 * 10]
    total = sum(operations)
    costs = {info.name: info.cost for info in nodes}
    assert costs["s2"] == pytest.approx(operations[0] / total)
    assert costs["s4"] == pytest.approx(sum(operations[:2]) / total)
    assert costs["f6.1"] == pytest.approx(1 - operations[4] / total)
    assert costs["output"] == 1.0
    assert {info.name: info.blocks for info in nodes if info.blocks} == {
        "c1.1": ("c1",),
        "c3.1": ("c3",),
        "c5.1": ("c5",),
        "f6.1": ("f6",),
    }


class Mixed(nn.Module):
    """Layers whose shapes we find ourselves beside others: grouped, dilated, padded and transposed convolutions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.pad = nn.ZeroPad2d((1, 2, 0, 3))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.norm = nn.GroupNorm(2, 6)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.embedding = nn.Parameter(torch.zeros(1, 16, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.first(x).relu_())
        x = torch.cat([x, x * 2], dim=1)[:, :8]
        x = self.pool(self.norm(self.up(self.pad(x))))
        x = x.flatten(2).transpose(1, 2) + self.embedding
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(x).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_costs_and_shapes_are_those_of_pytorchs_own_counter(device: str, request: pytest.FixtureRequest) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = Mixed().eval().to(device)
    fast = torch.backends.mha.get_fastpath_enabled()
    request.addfinalizer(lambda: torch.backends.mha.set_fastpath_enabled(fast))
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, which the counter does not know
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(3, 3, 20, 24, device=device))
    total = counter.get_total_flops()
    first, grouped = 2 * 3 * 8 * 10 * 20 * (3 * 3 * 5), 2 * 3 * 8 * 10 * 20 * (2 * 9)
    infos = {info.name: info for info in measure_trace(trace(network), (3, 20, 24))}  # type: ignore[arg-type]
    assert infos["first"].shape == (8, 10, 20)
    assert infos["pad"].shape == (8, 13, 23)
    assert infos["up"].shape == (6, 26, 46)
    assert infos["last"].shape == (16, 5)
    assert infos["first"].cost == pytest.approx(first / total)
    assert infos["grouped"].cost == pytest.approx((first + grouped) / total)
    assert infos["add_1"].cost == pytest.approx(1 - 2 * 3 * 16 * 6 * 5 / total)


def test_resnet50s_stages_are_blocks_that_end_at_the_last_relu() -> None:
    backbone = backbone_of("resnet50")
    info = backbone.node("layer4")
    assert info.name == "layer4.2.relu_2"
    assert info.blocks == ("layer4", "layer4.2")
    assert (info.shape, info.width) == ((2048, 7, 7), 2048)
    # 4.089 billion multiplications and additions in all, 2,048 x 1,000 of them in the classifier.
    assert 1 - info.cost == pytest.approx(2_048_000 / 4.089e9, rel=1e-3)
    costs = [info.cost for info in backbone.nodes()]
    assert costs == sorted(costs)


def test_torchvisions_own_names_are_all_known() -> None:
    from torchvision.models.feature_extraction import get_graph_node_names

    for name in ("resnet18", "mobilenet_v3_small", "squeezenet1_1"):
        backbone = load_backbone(name, "none")
        known = {info.name for info in backbone.nodes()} | {b for info in backbone.nodes() for b in info.blocks}
        _, names = get_graph_node_names(backbone.module, suppress_diff_warning=True)
        assert set(names) - {"x"} <= known


@pytest.mark.parametrize(
    ("name", "node", "axis", "width"),
    [
        ("swin_t", "features.1", 3, 96),
        ("swin_t", "permute", 1, 768),
        ("convnext_tiny", "features.1", 1, 96),
        ("convnext_tiny", "features.1.0.block.3", 3, 384),
        ("vit_b_16", "encoder", 2, 768),
        ("vit_b_16", "conv_proj", 1, 768),
        ("resnet18", "layer2", 1, 128),
        pytest.param("densenet121", "flatten", 1, 1024, marks=pytest.mark.slow),
    ],
)
def test_the_channel_axis_is_found(name: str, node: str, axis: int, width: int) -> None:
    backbone = backbone_of(name)
    info = backbone.node(node)
    assert backbone.channel_axis(node) == axis
    assert info.width == width
    assert info.channels_last == (axis == 3)


class OneSize(nn.Module):
    """Channels last, for images of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)
        self.norm = nn.LayerNorm(5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        torch._assert(x.shape[2] == 8, "takes 32 pixels a side")
        return self.fc(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))


def test_the_channel_axis_of_a_network_that_takes_one_size_only() -> None:
    found = trace(OneSize().eval())
    assert found is not None
    infos = {info.name: info for info in measure_trace(found, (3, 32, 32))}
    axes = {"conv": (1, 5), "permute": (3, 5), "norm": (3, 5), "mean": (1, 5)}
    assert {name: (infos[name].channel_axis, infos[name].width) for name in axes} == axes


@pytest.mark.parametrize(
    ("shape", "larger", "axis"),
    [
        ((3, 56, 56, 96), (3, 56, 56, 96), 3),  # channels last, no larger image
        ((3, 96, 56, 56), (3, 96, 56, 56), 1),
        ((3, 56, 56, 56), (3, 56, 56, 56), 1),  # nothing tells
        ((3, 56, 56, 96), (3, 56, 72, 112), 1),  # a larger image tells: it is 56 channels of a wide map
        ((3, 7, 7, 12), (3, 9, 9, 12), 3),
        ((3, 49, 96), (3, 49, 96), 2),
        ((3, 96, 49), (3, 96, 81), 1),
        ((3, 10), (3, 10), 1),
    ],
)
def test_the_axis_that_stays_as_it_is(shape: tuple[int, ...], larger: tuple[int, ...], axis: int) -> None:
    assert _channel_axis(shape, larger) == axis


def test_values_without_one_row_per_image_are_no_nodes() -> None:
    """Swin's attention works on windows, several to an image."""
    shapes = {info.name: info.shape for info in backbone_of("swin_t").nodes()}
    assert all(len(shape) in (1, 2, 3) for shape in shapes.values())
    assert not any(name.endswith("attn.softmax") for name in shapes)


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


class SubclassedHead(Headless):
    def __init__(self) -> None:
        super().__init__()

        class OwnLinear(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(x, self.weight, self.bias)

        self.drop = nn.Dropout()
        self.fc = OwnLinear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(super().forward(x)))


class Distilled(Headless):
    """Two classifiers, whose outputs are averaged; or a gate, or a sum with something else."""

    def __init__(self, last: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.head, self.head_dist = nn.Linear(4, 2), nn.Linear(4, 2)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x).relu()
        return self.last(self.head(x), self.head_dist(x))


def test_of_several_classifiers_the_input_of_the_first() -> None:
    for last in (lambda one, other: (one + other) / 2, lambda one, other: torch.add(one, 0.5 * other)):
        found = trace(Distilled(last).eval())
        assert found is not None
        assert bottleneck(found) == "relu"
    gated = trace(Distilled(lambda one, other: one * other.sigmoid()).eval())
    assert gated is not None
    assert bottleneck(gated) == "mul"  # what comes out is no sum of classes' scores
    shortcut = trace(Distilled(lambda one, _other: one + one.relu()).eval())
    assert shortcut is not None
    assert bottleneck(shortcut) == "relu"


class Untraceable(Headless):
    """Decides by value, and runs one activation twice and its normalisation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        if x.shape[0] * x.sum() < 0:
            x = -x
        x = self.pool(self.act(self.norm(x)))
        return self.fc(x.flatten(1))


def test_a_network_without_a_classifier_ends_in_its_bottleneck() -> None:
    found = trace(Headless().eval())
    assert found is not None
    assert bottleneck(found) == "mean"


def test_a_classifier_that_is_a_subclass_of_linear() -> None:
    found = trace(SubclassedHead().eval())
    assert found is not None
    assert bottleneck(found) == "drop"
    assert measure_trace(found, (3, 8, 8))[-1].name == "fc.linear"


def test_an_untraceable_network_has_modules_for_nodes() -> None:
    module = Untraceable().eval()
    assert trace(module) is None
    run = run_hooked(module, (3, 8, 8))
    # The activation runs twice, so its name would not say which time is meant.
    assert [info.name for info in run.nodes] == ["conv", "norm", "pool", "fc"]
    assert run.bottleneck == "pool"
    assert run.nodes[0].shape == (4, 8, 8)
    assert run.nodes[-1].cost == 1.0
    assert not module.conv._forward_hooks


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = y.mul_(2)
        nn.functional.relu(y, inplace=True)
        return y * z


def test_overwritten_values_stay_what_they_were_and_later_readers_see_the_change() -> None:
    module = Overwriting().eval()
    found = trace(module)
    assert found is not None
    images = torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        conv = module.conv(images)
        kept = found.extractor({name: name for name in ("conv", "mul_", "relu", "mul")})(images)
        expected = module(images)
    assert torch.equal(kept["conv"], conv)
    assert torch.equal(kept["mul_"], conv * 2)
    assert torch.equal(kept["relu"], (conv * 2).relu())
    assert torch.equal(kept["mul"], expected)
