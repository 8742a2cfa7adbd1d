"""Rewrites of a traced network that make its forward faster and keep its values.

Two passes over a `torch.fx` graph without in-place operations (as `Backbone.graph` gives it), each of which leaves every
requested node's value as it was:

1. `fold_batch_norm`: a BatchNorm is folded into the convolution before it (Jacob et al. 2018, section 3.2), unless the
   unfolded value is itself requested;
2. `fuse_onednn`: convolution, addition and activation become one oneDNN call with weights packed beforehand, the fusions
   that TorchInductor makes on CPUs with ``freezing``. Doing them directly costs milliseconds instead of the 7 to 22
   seconds that compilation takes, so even a job of ten images gains (figures in docs/decisions/fused-convolutions.md).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_ADDITIONS = (operator.add, torch.add)


def fold_batch_norm(network: fx.GraphModule) -> None:
    """Folds each BatchNorm2d whose input comes from a convolution that nothing else reads."""
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for before, conv, node, norm in _normed_convolutions(network.graph, dict(network.named_modules())):
        if calls[before.target] > 1:
            continue  # one convolution called twice keeps its own weights
        _replace(network, str(before.target), fuse_conv_bn_eval(conv, norm))
        node.replace_all_uses_with(before)
        network.graph.erase_node(node)
    network.graph.lint()
    network.recompile()


def _normed_convolutions(
    graph: fx.Graph, modules: dict[str, nn.Module]
) -> list[tuple[fx.Node, nn.Conv2d, fx.Node, nn.BatchNorm2d]]:
    """Each convolution whose output a BatchNorm with kept statistics alone reads: its node, itself, the norm's node, the norm."""
    found = []
    for node in graph.nodes:
        norm = _module(modules, node, nn.BatchNorm2d)
        before = node.args[0] if norm is not None and isinstance(node.args[0], fx.Node) else None
        conv = _module(modules, before, nn.Conv2d) if before is not None else None
        if before is not None and conv is not None and len(before.users) == 1 and norm.track_running_stats:
            found.append((before, conv, node, norm))
    return found


def with_folded_norms(network: fx.GraphModule) -> fx.GraphModule:
    """Returns a graph over the same parameters in which a convolution and the frozen BatchNorm after it are one convolution.

    Its weights are computed anew at each call, so that gradients reach those of both layers, and differ by rounding alone: a
    step of EfficientNet's tail takes 0.83 of the time, and keeps one activation less of each pair.
    """
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    out = graph.graph_copy(network.graph, copies)
    graph.output(out)
    for before, conv, node, norm in _normed_convolutions(graph, dict(network.named_modules())):
        if conv.padding_mode != "zeros" or norm.training or not norm.affine:
            continue
        with graph.inserting_before(node):
            weight, bias = (
                graph.get_attr(f"{before.target}.{name}") if getattr(conv, name) is not None else None
                for name in ("weight", "bias")
            )
            values = [graph.get_attr(f"{node.target}.{name}") for name in _NORM]
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            folded = graph.call_function(_folded_conv, (before.args[0], weight, bias, *values, norm.eps, geometry))
        node.replace_all_uses_with(folded)
        graph.erase_node(node)
        graph.erase_node(before)
    graph.lint()
    return fx.GraphModule(network, graph, type(network).__name__)


_NORM = ("weight", "bias", "running_mean", "running_var")


def _folded_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    geometry: tuple[Any, ...],
) -> torch.Tensor:
    """BatchNorm with kept statistics of a convolution of x (N, C, H, W), as one convolution."""
    factor = scale * (variance + eps).rsqrt()
    offset = shift - mean * factor if bias is None else shift + (bias - mean) * factor
    return nn.functional.conv2d(x, weight * factor[:, None, None, None], offset, *geometry)


def can_fuse_onednn(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch and this CPU have the fused convolution for ``dtype``."""
    if not torch.backends.mkldnn.is_available() or not hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        return False
    if dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def fuse_onednn(network: fx.GraphModule, image: torch.Tensor, batch_size: int) -> None:
    """Fuses convolution (+ activation) and convolution + addition (+ activation) into single oneDNN calls.

    Args:
        network: a graph whose parameters already have their final dtype; changed in place.
        image: one image (1, C, H, W) of that dtype, to find the shapes to pack weights for.
        batch_size: the usual number of images in a batch; others still work.
    """
    with torch.inference_mode():  # one image takes less than to load what finds shapes without values
        _NotesShapes(network).run(image)
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        conv = _module(modules, node, nn.Conv2d)
        if conv is None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        activation = _following_activation(modules, node)
        attribute = ("none", [], "") if activation is None else _activation(modules, activation)
        shape = [batch_size, *node.args[0].meta["shape"][1:]]
        fused = FusedConv(conv, shape, attribute or ("none", [], ""))
        node.target = _unique(network, str(node.target), fused)
        if activation is not None:
            activation.replace_all_uses_with(node)
            network.graph.erase_node(activation)
    _fuse_additions(network)
    network.graph.lint()
    network.delete_all_unused_submodules()
    network.recompile()


class _NotesShapes(fx.Interpreter):
    """Runs a graph and notes each tensor's shape at its node; ``ShapeProp`` would copy the whole network first."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


class FusedConv(nn.Module):
    """A convolution and the activation after it, as one oneDNN call on channels-last tensors."""

    def __init__(self, conv: nn.Conv2d, input_shape: list[int], activation: tuple[str, list[float], str]) -> None:
        super().__init__()
        self.geometry = (_pair(conv.padding), _pair(conv.stride), _pair(conv.dilation), conv.groups)
        packed = conv.weight.detach().to_mkldnn()
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # noqa: SLF001
        self.weight: torch.Tensor = pack(packed, *self.geometry, input_shape)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolves and activates x (N, C, H, W)."""
        x = x.contiguous(memory_format=torch.channels_last)
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(  # noqa: SLF001
            x, self.weight, self.bias, *self.geometry, *self.activation
        )
        return result


class FusedConvAdd(nn.Module):
    """A convolution added onto another value, in that value's memory, and the ReLU after it."""

    def __init__(self, conv: FusedConv, *, relu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.relu = "relu" if relu else None

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Convolves x and adds the result onto ``other``, which is overwritten."""
        conv = self.conv
        x = x.contiguous(memory_format=torch.channels_last)
        other = other.contiguous(memory_format=torch.channels_last)
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            other, x, conv.weight, conv.bias, *conv.geometry, "add", 1.0, self.relu, [], None
        )
        return result


def _fuse_additions(network: fx.GraphModule) -> None:
    modules = dict(network.named_modules())
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    for addition in list(network.graph.nodes):
        if addition.op != "call_function" or addition.target not in _ADDITIONS or addition.kwargs:
            continue
        conv, other = _conv_and_other(modules, addition, order)
        if conv is None or other is None:
            continue
        activation = _following_activation(modules, addition)
        relu = activation is not None and (_activation(modules, activation) or ("",))[0] == "relu"
        last = activation if relu and activation is not None else addition
        fused = FusedConvAdd(modules[str(conv.target)], relu=relu)
        name = _unique(network, str(conv.target), fused)
        with network.graph.inserting_before(conv):
            call = network.graph.call_module(name, (conv.args[0], other))
        call.meta, modules[name], order[call] = dict(addition.meta), fused, order[conv]
        last.replace_all_uses_with(call)
        for dead in dict.fromkeys((last, addition, conv)):
            network.graph.erase_node(dead)


def _conv_and_other(
    modules: dict[str, nn.Module], addition: fx.Node, order: dict[fx.Node, int]
) -> tuple[fx.Node | None, fx.Node | None]:
    """A convolution that can add its result onto the other operand at once, in that operand's memory; or (None, None).

    The fused call takes the convolution's place, so nothing but ``other`` is read later or earlier than before. That is safe if

    - the convolution feeds the addition alone, has no activation of its own, and does not read ``other`` itself;
    - ``other`` exists by then, and everything else that reads it has done so;
    - neither ``other`` nor anything made of it shares its memory with another value.
    """
    a, b = addition.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or _shape(a) != _shape(b) or a is b:
        return None, None
    for conv, other in ((a, b), (b, a)):
        fused = _module(modules, conv, FusedConv)
        if fused is None or fused.activation[0] != "none" or len(conv.users) > 1 or conv.args[0] is other:
            continue
        readers = [user for user in other.users if user is not addition]
        done = all(order[node] < order[conv] for node in (other, *readers))
        if done and all(_owns_memory(modules, node) for node in (other, *readers)):
            return conv, other
    return None, None


def _owns_memory(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """Whether a node's result surely is not a view of its input (as Identity, Dropout and Flatten may return)."""
    if node.op == "call_module":
        return type(modules[str(node.target)]) in (*_ALLOCATING, *_ACTIVATIONS)
    return node.op == "call_function" and node.target in (*_ADDITIONS, operator.mul, torch.cat, nn.functional.relu)


def _following_activation(modules: dict[str, nn.Module], node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and _activation(modules, users[0]) is not None else None


def _activation(modules: dict[str, nn.Module], node: fx.Node) -> tuple[str, list[float], str] | None:
    """OneDNN's name, scalars and algorithm for an activation node; None for anything else."""
    if node.op == "call_function" and node.target in (nn.functional.relu, torch.relu):
        return "relu", [], ""
    if node.op != "call_module":
        return None
    module = modules.get(str(node.target))
    make: Callable[[Any], tuple[str, list[float], str]] | None = _ACTIVATIONS.get(type(module))  # type: ignore[arg-type]
    return make(module) if make else None


_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], tuple[str, list[float], str]]] = {
    nn.ReLU: lambda _: ("relu", [], ""),
    nn.ReLU6: lambda _: ("hardtanh", [0.0, 6.0], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.Sigmoid: lambda _: ("sigmoid", [], ""),
    nn.LeakyReLU: lambda m: ("leaky_relu", [m.negative_slope], ""),
}


_ALLOCATING = (FusedConv, FusedConvAdd, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)


def _module(modules: dict[str, nn.Module], node: fx.Node, kind: type[nn.Module]) -> Any:
    """The module of ``kind`` that a node calls; None where hooks, such as weight_norm's, make it compute something else."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if type(module) is not kind or module._forward_pre_hooks or module._forward_hooks:  # noqa: SLF001
        return None
    return module


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    return node.meta.get("shape")


def _replace(network: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def _unique(network: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Adds ``module`` beside ``name`` under a name that is still free."""
    parent = network.get_submodule(name.rpartition(".")[0])
    leaf = f"{name.rpartition('.')[2]}_fused"
    while hasattr(parent, leaf):
        leaf += "_"
    parent.add_module(leaf, module)
    return f"{name.rpartition('.')[0]}.{leaf}".lstrip(".")


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value]
