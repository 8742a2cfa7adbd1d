"""The fast forward gives the plain forward's values, whatever it fuses, and whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from featurepipe.backbones import Column, load_backbone
from featurepipe.backbones.engine import (
    BATCH_TOLERANCE,
    WORST_COSINE,
    Engine,
    HookedNetwork,
    PrecisionChoice,
    choose_precision,
    worst_cosine,
)
from featurepipe.backbones.fusion import FusedConv, FusedConvAdd, can_fuse_onednn

fused = pytest.mark.skipif(not can_fuse_onednn(torch.float32), reason="this build has no oneDNN fusion")


def images(backbone, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *backbone.preprocessing.input_shape), dtype=torch.uint8, generator=generator)


def plain(backbone, nodes, batch):
    """A forward of the untouched module; outputs are cloned when they are made, before anything can overwrite them."""
    kept = {}
    hooks = [
        backbone.module.get_submodule(node).register_forward_hook(
            lambda _m, _i, output, node=node: kept.__setitem__(node, output.clone())
        )
        for node in nodes
    ]
    with torch.inference_mode():
        backbone.module(backbone.preprocessing.normalise(batch))
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        # Right before and right after a residual addition, in the middle of a conv-norm-relu, and what is added.
        ("resnet18", ["layer1.0.conv2", "layer1.0.bn2", "layer1.0", "layer2.0.downsample", "layer2.0.bn1", "layer4"]),
        ("mobilenet_v2", ["features.3.conv.2", "features.3", "features.4"]),
        ("googlenet", ["inception3a.branch1", "inception3a", "maxpool3"]),
        ("squeezenet1_1", ["features.3", "features.3.expand3x3", "features.12"]),
    ],
)
def test_fp32_equals_a_plain_forward_at_nodes_that_fusion_touches(name, nodes):
    backbone = load_backbone(name, "none")
    batch = images(backbone, 2)
    expected = plain(backbone, nodes, batch)
    found = Engine(backbone, [Column(node, "flatten") for node in nodes])(batch)
    for node in nodes:
        value = expected[node].flatten(1).numpy()
        np.testing.assert_allclose(
            found[f"{node}:flatten"], value, atol=1e-5 * np.abs(value).max(), rtol=1e-4, err_msg=node
        )


@fused
def test_fusion_leaves_no_batch_norm_and_no_lonely_addition():
    backbone = load_backbone("resnet18", "none")
    engine = Engine(backbone, backbone.columns(["bottleneck"]))
    kinds = [type(module) for module in engine._network.modules()]
    assert kinds.count(FusedConv) - kinds.count(FusedConvAdd) == 20 - 8  # each FusedConvAdd holds one FusedConv
    assert kinds.count(FusedConvAdd) == 8
    assert nn.BatchNorm2d not in kinds
    assert nn.ReLU not in kinds


def test_the_network_stops_at_the_deepest_node():
    backbone = load_backbone("resnet18", "none")
    names = dict(Engine(backbone, [Column("layer2", "gap")])._network.named_modules())
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("resnet18", "fp32"),
        ("efficientnet_lite0", "fp32"),
        ("resnet18", "bf16"),
        pytest.param("efficientnet_lite0", "bf16", marks=pytest.mark.slow),  # 24 s where the processor has no bf16
    ],
)
def test_features_do_not_depend_on_the_batch_beyond_the_stated_tolerance(name, precision):
    backbone = load_backbone(name, "DEFAULT" if name == "efficientnet_lite0" else "none")
    columns = backbone.columns(["bottleneck"])
    batch = images(backbone, 5)
    whole = Engine(backbone, columns, precision=precision, batch_size=16)(batch)
    alone = Engine(backbone, columns, precision=precision, batch_size=16)
    (column,) = whole
    singles = np.concatenate([alone(batch[i : i + 1])[column] for i in range(len(batch))])
    assert 1 - worst_cosine(whole[column], singles) <= BATCH_TOLERANCE[precision]


def test_equal_batches_give_equal_bits_in_any_stream():
    backbone = load_backbone("resnet18", "none")
    engine = Engine(backbone, backbone.columns(["bottleneck"]), batch_size=4)
    batch = images(backbone, 4)
    (first, *others) = [pending.result()["flatten:gap"] for pending in [engine.submit(batch) for _ in range(6)]]
    assert all(np.array_equal(first, other) for other in others)


def test_a_batch_larger_than_asked_is_cut_and_comes_back_in_order():
    backbone = load_backbone("lenet5", "none")
    columns = backbone.columns(["bottleneck"])
    batch = images(backbone, 11)
    found = Engine(backbone, columns, batch_size=4)(batch)
    expected = Engine(backbone, columns, batch_size=16)(batch)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_streams_leave_the_callers_threads_as_they_were():
    before = torch.get_num_threads()
    Engine(load_backbone("lenet5", "none"), [Column("c1", "gap")])(images(load_backbone("lenet5", "none"), 2))
    assert torch.get_num_threads() == before


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.late = nn.Conv2d(4, 5, 3)
        self.calls = 0

    def forward(self, x):
        x = self.conv(x)
        if x.sum() > 0:  # FX cannot follow this
            x = x + 0
        x = self.act(x)
        self.calls += 1
        return self.late(x)


def test_hooks_keep_the_value_from_before_an_inplace_activation_and_stop_early():
    torch.manual_seed(0)
    module = Untraceable().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = module.conv(x)
        found = HookedNetwork(module, ["conv"])(x)
    assert torch.equal(found["conv"], expected)
    assert module.calls == 0


def test_untraceable_networks_of_timm_agree_with_their_own_forward():
    timm = pytest.importorskip("timm")
    backbone = load_backbone("timm/tf_efficientnet_lite0", "none")
    assert not backbone.traceable
    batch = images(backbone, 3)
    nodes = ["blocks.2", "blocks.6"]
    expected = plain(backbone, nodes, batch)
    engine = Engine(backbone, [Column(node, "gap") for node in nodes], batch_size=1)  # three streams' worth at once
    found = engine(batch)
    for node in nodes:
        np.testing.assert_allclose(found[f"{node}:gap"], expected[node].mean((2, 3)).numpy(), rtol=1e-3, atol=1e-5)
    assert timm is not None


@pytest.mark.slow
def test_precision_is_kept_only_where_it_agrees(monkeypatch):
    from featurepipe.backbones import engine as precision

    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    lite = load_backbone("efficientnet_lite0")
    columns = lite.columns(["bottleneck"])
    refused, fallback = choose_precision(lite, columns, [images(lite, 3)], "cpu", enough=3)
    assert (refused.precision, fallback.precision, refused.tried) == ("fp32", "fp32", "bf16")
    assert refused.worst_cosine < WORST_COSINE
    assert "not kept" in refused.reason
    monkeypatch.setattr(precision, "DEMANDED_COSINE", refused.worst_cosine)
    kept, engine = choose_precision(lite, columns, [images(lite, 3)], "cpu", enough=3)
    assert (kept.precision, engine.precision, kept.images) == ("bf16", "bf16", 3)


def test_without_a_faster_precision_or_an_image_fp32_is_taken(monkeypatch):
    from featurepipe.backbones import engine as precision

    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    lenet = load_backbone("lenet5", "none")
    assert choose_precision(lenet, lenet.columns([]), [images(lenet, 4)], "cpu") == (PrecisionChoice("fp32"), None)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert choose_precision(lenet, lenet.columns([]), [], "cpu")[0].precision == "fp32"


def test_worst_cosine_by_hand():
    a = np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    b = np.array([[1.0, 1.0], [0.0, 0.0], [3.0, 4.0]])
    assert worst_cosine(a, b) == pytest.approx(2**-0.5)
    assert worst_cosine(a[1:], b[1:]) == 1.0
    assert worst_cosine(np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]])) == -1.0
    assert worst_cosine(np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]])) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_fp16_agrees_with_the_cpu_and_many_batches_in_flight_stay_apart():
    backbone = load_backbone("resnet18", "none")
    columns = backbone.columns(["layer2", "bottleneck"])
    batches = [images(backbone, 8, seed) for seed in range(6)]
    gpu = Engine(backbone, columns, precision="fp16", device="cuda", batch_size=8)
    cpu = Engine(backbone, columns)
    pending = [gpu.submit(batch) for batch in batches]
    for batch, found in zip(batches, pending, strict=True):
        expected, values = cpu(batch), found.result()
        assert all(worst_cosine(expected[name], values[name]) > 0.999 for name in expected)


class SharedOperand(nn.Module):
    """Two additions overlap: the second one's convolution reads what the first one would overwrite."""

    def __init__(self):
        super().__init__()
        self.c0, self.c1, self.c2 = (nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(3))

    def forward(self, x):
        a = self.c0(x)
        other = self.c2(torch.relu(a))
        x2 = other + self.c1(other)
        late = self.c2(x2)
        y = x2 + a
        z = late + torch.relu(y)
        return torch.cat([y, x2, z, other + z], 1)


class Overlapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.c0, self.c1 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        other = torch.relu(x)
        a = self.c0(x)
        x2 = x + self.c1(other)
        return torch.cat([other + a, x2], 1)


@fused
@pytest.mark.parametrize("kind", [SharedOperand, Overlapping])
def test_no_fused_addition_overwrites_what_is_still_to_be_read(kind):
    from torch import fx

    from featurepipe.backbones.fusion import fuse_onednn

    torch.manual_seed(1)
    module = kind().eval()
    x = torch.randn(3, 3, 12, 12)
    with torch.inference_mode():
        expected = module(x)
        graph = fx.symbolic_trace(module)
        fuse_onednn(graph, torch.zeros(1, 3, 12, 12), batch_size=3)
        torch.testing.assert_close(graph(x), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(graph(x), expected, atol=1e-5, rtol=1e-4)


class Stateful(nn.Module):
    """Keeps an activation on itself, as users' networks may."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        self.skip = self.first(x)
        if self.skip.sum() > 1e9:  # FX cannot follow this
            return self.skip
        return self.last(self.skip) + self.skip


def test_batches_of_an_untraceable_network_do_not_mix(monkeypatch):
    lenet = load_backbone("lenet5", "none")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 1), Stateful()).eval()
    monkeypatch.setattr(lenet, "module", module)
    monkeypatch.setattr(lenet, "graph", lambda _names: None)
    monkeypatch.setattr(lenet, "channel_axis", lambda _node: 1)
    engine = Engine(lenet, [Column("1", "gap")], batch_size=2)
    batches = [images(lenet, 2, seed) for seed in range(24)]
    together = [pending.result() for pending in [engine.submit(batch) for batch in batches]]
    with torch.inference_mode():
        for batch, found in zip(batches, together, strict=True):
            expected = module(lenet.preprocessing.normalise(batch)).mean((2, 3)).numpy()
            np.testing.assert_allclose(found["1:gap"], expected, atol=1e-5)
