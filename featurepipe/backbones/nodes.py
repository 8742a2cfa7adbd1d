"""The nodes of a network: its traced graph, and their shapes and costs, measured by running it once on images without values.

Names are those of ``torchvision.models.feature_extraction``. Three building blocks that torchvision treats as leaves
(``Conv2dNormActivation``, ``SqueezeExcitation``, ``MLP``) are traced into, so that their insides can be kept and fused
too; their own names still work, as block names.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.models.feature_extraction import NodePathTracer
from torchvision.ops import MLP, Conv2dNormActivation, SqueezeExcitation

M = TypeVar("M", bound=nn.Module)
_TRACED_INTO = (Conv2dNormActivation, SqueezeExcitation, MLP)
_IN_PLACE_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_IN_PLACE_METHODS = {
    name: name[:-1]
    for name in ("add_", "sub_", "mul_", "div_", "relu_", "clamp_", "sigmoid_", "tanh_", "neg_", "exp_", "masked_fill_")
}
_SUMS: tuple[Any, ...] = (operator.add, torch.add, "add")


@dataclass(frozen=True)
class Trace:
    """A traced network: its graph and the name of every node in it, in execution order."""

    module: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]

    def extractor(self, wanted: Mapping[str, str]) -> fx.GraphModule:
        """Returns a module that maps images to ``{key: output}`` and computes nothing beyond the deepest node.

        Args:
            wanted: For each key of the result, the name of the node.

        Raises:
            KeyError: A name is not in the network (``Backbone.graph`` says so in better words).
        """
        copies: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.graph_copy(self.graph, copies)
        by_name = {name: node for node, name in self.names.items()}
        graph.output({key: copies[by_name[name]] for key, name in wanted.items()})
        _without_inplace(graph)
        _remove_unused(graph)
        extractor = fx.GraphModule(self.module, graph, type(self.module).__name__)
        return freeze(extractor)

    def above(self, node: str, out: str | Sequence[str]) -> fx.GraphModule | None:
        """Returns a module that maps the output of ``node`` to that of ``out``, of several nodes by name.

        None if that takes more from below than this output.

        Raises:
            KeyError: A name is not in the network.
        """
        copies: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.graph_copy(self.graph, copies)
        by_name = {name: copies[found] for found, name in self.names.items() if found in copies}
        cut = by_name[node]
        graph.output(by_name[out] if isinstance(out, str) else {name: by_name[name] for name in out})
        _without_inplace(graph)
        with graph.inserting_before(cut):
            given = graph.placeholder("activations")
        cut.replace_all_uses_with(given)
        _remove_unused(graph)
        for image in [found for found in graph.nodes if found.op == "placeholder" and found is not given]:
            if image.users:
                return None
            graph.erase_node(image)
        return fx.GraphModule(self.module, graph, type(self.module).__name__)


def trace(module: nn.Module) -> Trace | None:
    """Traces a network in eval mode; None if ``torch.fx`` cannot (its control flow depends on values, for instance)."""
    tracer = NodePathTracer(
        autowrap_modules=(math, torchvision.ops),
        leaf_modules=[leaf for leaf in _operator_modules() if leaf not in _TRACED_INTO],
    )
    try:
        with attributes_kept(module):
            graph = tracer.trace(module)
    except (
        fx.proxy.TraceError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        LookupError,
        AssertionError,
    ):
        # A proxy stands for the image here, so whatever the network does with its values may fail in any of these ways.
        return None
    names = {node: tracer.node_to_qualname[node] for node in graph.nodes if node in tracer.node_to_qualname}
    return Trace(module, graph, {node: name for node, name in names.items() if node.op != "output"})


def is_faithful(found: Trace, images: Tensor, expected: Any) -> bool:
    """Whether the traced network computes for ``images`` (N, C, H, W) what the network itself does, ``expected``.

    Tracing follows one path only, and does not see that ``y += 1`` changes other names of ``y``, too. Networks that we
    have not tested ourselves are tried; the module must have values.
    """
    with torch.inference_mode():
        given = fx.GraphModule(found.module, found.graph)(images)
    if not isinstance(expected, Tensor) or not isinstance(given, Tensor):
        return False
    return expected.shape == given.shape and torch.allclose(expected, given, rtol=1e-4, atol=1e-5, equal_nan=True)


def _operator_modules() -> list[type[nn.Module]]:
    """The module classes of ``torchvision.ops``, which torchvision's own feature extraction does not look into."""
    classes = [value for _, value in inspect.getmembers(torchvision.ops, inspect.isclass)]
    return [value for value in classes if issubclass(value, nn.Module)]


def _without_inplace(graph: fx.Graph) -> None:
    """Makes in-place calls ordinary ones, so that a kept output is not overwritten by what follows it.

    Whoever reads the overwritten value later gets the new one, as in the original network.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
            node.target = _IN_PLACE_OPERATORS[node.target]
        elif node.op == "call_method" and node.target in _IN_PLACE_METHODS:
            node.target = _IN_PLACE_METHODS[node.target]
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        else:
            continue
        overwritten = node.args[0]
        if isinstance(overwritten, fx.Node):
            later = _after(node)
            overwritten.replace_all_uses_with(node, later.__contains__)


def _after(node: fx.Node) -> set[fx.Node]:
    """The nodes that run after ``node``; not the output, which keeps values as they were when they were made."""
    nodes = list(node.graph.nodes)
    return {later for later in nodes[nodes.index(node) + 1 :] if later.op != "output"}


def _remove_unused(graph: fx.Graph) -> None:
    """Removes what no kept output needs, checks on sizes included; ``eliminate_dead_code`` alone keeps assertions."""
    for node in reversed(graph.nodes):
        if node.op not in ("output", "placeholder") and not node.users and node.target is not operator.setitem:
            graph.erase_node(node)


def bottleneck(found: Trace) -> str:
    """Names the node whose output feeds the final classifier.

    The classifier is the last Linear layer (or 1 x 1 convolution, as in SqueezeNet) between which and the network's
    output only layers without parameters lie. Of several whose outputs are added (distilled networks such as LeViT have two)
    it is the first. A network without one gives its own output's node.
    """
    output = _last_value(found)
    if output is None:
        return ""
    classifier = _classifier(found, output)
    if classifier is None:
        return found.names[output]
    source = classifier.args[0]
    return found.names[source] if isinstance(source, fx.Node) and source in found.names else found.names[classifier]


def _classifier(found: Trace, output: fx.Node, *, may_be_sum: bool = True) -> fx.Node | None:
    """The layer that an output comes from through layers without parameters alone, or None."""
    modules = dict(found.module.named_modules())
    node = output
    while node in found.names:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if _classifies(node, layer):
            return node
        inputs = node.all_input_nodes
        if may_be_sum and len(inputs) == 2 and node.target in _SUMS:
            both = [_classifier(found, one, may_be_sum=False) for one in inputs]
            return both[0] if None not in both else None
        if len(inputs) != 1 or (layer is not None and any(True for _ in layer.parameters())):
            return None
        node = inputs[0]
    return None


def _classifies(node: fx.Node, layer: nn.Module | None) -> bool:
    if node.op == "call_function":  # a subclass of Linear, which the tracer looks into
        return node.target is nn.functional.linear
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def _last_value(found: Trace) -> fx.Node | None:
    """The node that makes the network's (first) output."""
    outputs = [node for node in found.graph.nodes if node.op == "output"]
    candidates = [node for node in outputs[0].all_input_nodes if node in found.names] if outputs else []
    return candidates[0] if candidates else None


def tensors_below(found: Trace, node: str, names: Iterable[str]) -> set[str]:
    """Those of the ``names`` of a network's tensors from which the output of ``node`` is computed."""
    waiting = [value for value, name in found.names.items() if name == node]
    waiting += [value for value in found.graph.nodes if value.target is operator.setitem]
    seen: set[fx.Node] = set()
    while waiting:
        value = waiting.pop()
        seen.add(value)
        waiting += [given for given in value.all_input_nodes if given not in seen]
    used = {str(value.target) for value in seen if value.op in ("call_module", "get_attr")}
    return {name for name in names if name in used or any(name.startswith(f"{target}.") for target in used)}


def freeze(module: M) -> M:
    """Freezes a network: eval mode, no gradients, and no layer overwrites its input.

    Every layer is put into eval mode, also those that a ``train()`` of the network's own leaves out.
    """
    module.eval()
    for layer in module.modules():
        layer.training = False
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False  # type: ignore[assignment]
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.requires_grad:  # weight_norm's product, which could not be copied
                vars(layer)[name] = value.detach()
    for parameter in module.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
    return module


def frozen_copy(module: M) -> M:
    """Copies a network and freezes the copy: ``copy.deepcopy`` puts torchvision's ``DualGraphModule`` into training mode."""
    return freeze(copy.deepcopy(module))


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns a network without ``torch.compile`` and without the several GPUs of DataParallel, also inside of it.

    A compiled network computes the same, but its insides cannot be seen; DataParallel wants GPUs, where we are on the CPU.
    """
    while _is_compiled(module):
        module = module.get_submodule("_orig_mod")
    for layer in module.modules():
        if layer._compiled_call_impl is not None:  # noqa: SLF001
            layer._compiled_call_impl = None  # noqa: SLF001
        if isinstance(layer, nn.DataParallel):
            layer.device_ids = []
        for name, child in layer.named_children():
            if _is_compiled(child):
                setattr(layer, name, uncompiled(child))
    return module


def _is_compiled(module: nn.Module) -> bool:
    # By name: importing the class takes as long as importing torch.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules  # noqa: SLF001


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Takes back what a forward inside writes on the network's layers, such as a cache of attention biases.

    While ``torch.fx`` traces, such a cache (LeViT, EfficientFormer) fills with values that stand for nothing outside of
    that trace; after a real forward it holds values of one dtype and device, which a copy in another could not use.
    Constants that the tracer hangs on the network stay.
    """
    layers = [layer for layer in module.modules() if not isinstance(layer, torch.jit.ScriptModule)]
    before = [(layer, dict(vars(layer))) for layer in layers]
    containers = [
        (value, copy.copy(value)) for _, kept in before for value in kept.values() if type(value) in (dict, list, set)
    ]
    try:
        yield
    finally:
        for layer, kept in before:
            constants = {name: value for name, value in vars(layer).items() if name.startswith("_tensor_constant")}
            vars(layer).clear()
            vars(layer).update({**kept, **constants})
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


_BATCH = 3  # an unlikely size for any other axis to have by accident in front
_LARGER_BY = 64  # pixels added to see which axes follow the image's size: all strides in use divide it


@dataclass(frozen=True)
class NodeInfo:
    """One output inside a backbone.

    Attributes:
        name: The node's name; ``depth`` is its position in the list.
        shape: Shape for one image, such as (2048, 7, 7).
        width: Number of values after ``gap``.
        cost: Share of the whole forward's floating-point operations that is done once this node is, 0 to 1.
        blocks: Modules that end with this node, outermost first; their names may be used for it.
        channel_axis: Axis of the channels, counted with the batch as axis 0.
    """

    name: str
    shape: tuple[int, ...]
    width: int
    cost: float
    blocks: tuple[str, ...] = ()
    channel_axis: int = 1

    @property
    def channels_last(self) -> bool:
        """Whether this is a map whose channels come last, (N, H, W, C), as in torchvision's Swin."""
        return len(self.shape) == 3 and self.channel_axis == 3


class _Seen(NamedTuple):
    """One value seen in a forward: its shape with the batch axis, and the operations done up to and including it."""

    shape: tuple[int, ...]
    operations: int


def measure_trace(found: Trace, input_shape: tuple[int, int, int]) -> list[NodeInfo]:
    """Measures every node of a traced network that gives one row per image.

    Args:
        found: A trace; its parameters should be on the meta device, or the forward is really computed.
        input_shape: (channels, height, width) of the images.

    Returns:
        The nodes in execution order. Values that are no floating tensors, or whose first axis is not the batch (such as
        the windows inside a Swin block), are left out, as nobody could store them by image.
    """
    seen = _run_graph(found, input_shape)
    larger = (input_shape[0], input_shape[1] + _LARGER_BY, input_shape[2] + _LARGER_BY)
    try:
        other = _run_graph(found, larger)
    except (AssertionError, RuntimeError, ValueError):
        other = {}  # transformers with position embeddings take one image size only
    return _infos(seen, other)


def _infos(seen: dict[str, _Seen], other: dict[str, _Seen]) -> list[NodeInfo]:
    names = list(seen)
    total = max((value.operations for value in seen.values()), default=0) or 1
    blocks = _ending_blocks(names)
    infos = []
    for name, (shape, operations) in seen.items():
        if len(shape) not in (2, 3, 4) or shape[0] != _BATCH:
            continue
        axis = _channel_axis(shape, other[name].shape if name in other else shape)
        infos.append(NodeInfo(name, shape[1:], shape[axis], operations / total, blocks.get(name, ()), axis))
    return infos


def _channel_axis(shape: tuple[int, ...], larger: tuple[int, ...]) -> int:
    """The one axis that stays as it is when the image grows; where that does not tell, the odd one out of a square map's.

    Networks that take one image size only (timm's Swin and VOLO, which are channels-last) are no larger the second time.
    """
    unchanged = [axis for axis in range(1, len(shape)) if len(larger) == len(shape) and shape[axis] == larger[axis]]
    if len(unchanged) == 1:
        return unchanged[0]
    if len(shape) == 4 and shape[1] == shape[2] != shape[3]:
        return 3
    return {2: 1, 3: 2, 4: 1}[len(shape)]


def _ending_blocks(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each node, the enclosing modules whose last node it is, outermost first."""
    taken = set(names)
    last: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        last.update({".".join(parts[:depth]): name for depth in range(1, len(parts))})
    blocks: dict[str, tuple[str, ...]] = {}
    for block in sorted(last, key=lambda block: block.count(".")):
        if block not in taken:
            blocks[last[block]] = (*blocks.get(last[block], ()), block)
    return blocks


def _run_graph(found: Trace, input_shape: tuple[int, int, int]) -> dict[str, _Seen]:
    runner = _Counting(fx.GraphModule(found.module, found.graph))
    with torch.inference_mode():
        runner.run(_zeros((_BATCH, *input_shape)))
    return {found.names[node]: value for node, value in runner.seen.items()}


_SAME_SHAPE = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Dropout,
)  # fmt: skip
"""Layers whose output has the shape of their input, without an operation that is counted; a subclass may do anything."""


_FREE_LAYERS = (
    nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, nn.Upsample, nn.Softmax,
)  # fmt: skip
_FREE_FUNCTIONS = frozenset({
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.neg, operator.eq,
    operator.getitem, getattr, len, int, torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.stack, torch.flatten,
    torch.reshape, torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze, torch.chunk, torch.split, torch.mean,
    torch.sum,
    functional.avg_pool2d, functional.max_pool2d, functional.adaptive_avg_pool2d, functional.pad, functional.softmax,
    functional.normalize,
})  # fmt: skip
_FREE_METHODS = frozenset({
    "add", "chunk", "contiguous", "dim", "expand", "flatten", "mean", "mul", "permute", "reshape", "size", "softmax", "split",
    "squeeze", "sum", "transpose", "unbind", "unsqueeze", "view",
})  # fmt: skip
"""What multiplies no matrices, so that nothing is counted: layers, functions and methods. All take zeros that share one place."""
_SAME_SHAPE_FUNCTIONS = frozenset({
    functional.relu, functional.relu6, functional.silu, functional.gelu, functional.hardswish, functional.hardsigmoid,
    functional.dropout, torch.relu, torch.sigmoid, torch.tanh,
})  # fmt: skip


def _zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take the memory of one."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return fx.node.map_aggregate(values, lambda value: change(value) if isinstance(value, Tensor) else value)


def _with_values(value: Tensor) -> Tensor:
    return _zeros(value.shape, value.dtype) if value.is_meta else value


def _flop_counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode  # loads triton where it is, which takes half a second

    return FlopCounterMode(display=False)


class _Counting(fx.Interpreter):
    """Runs a graph node by node, on zeros, and notes the shape and the operations so far.

    The parameters have no values, so that a matrix or a convolution only gives zeros in the right shape; what has none is
    run. What is neither known to be free nor one of the commonest layers is run without values under PyTorch's counter. All of
    it could be; but without values PyTorch loads ``torch._dynamo`` and sympy at the first sum, which takes 3 s.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # which would load the compiler to describe where it was
        is_empty = any(parameter.is_meta for parameter in module.parameters())
        self._zeros = partial(torch.zeros, device="meta" if is_empty else "cpu")
        self.operations = 0
        self.seen: dict[fx.Node, _Seen] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter or a buffer."""
        return _mapped(super().get_attr(target, args, kwargs), _with_values)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Runs a layer."""
        layer = self.fetch_attr(target)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            if type(layer) in _SAME_SHAPE:
                return args[0]
            if (shape := _shape_after(layer, tuple(args[0].shape))) is not None:
                self.operations += 2 * math.prod(shape) * layer.weight[0].numel()
                return _zeros(shape, args[0].dtype)
        return self._run(super().call_module, target, args, kwargs, is_free=type(layer) in _FREE_LAYERS)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Runs a function."""
        if target in _SAME_SHAPE_FUNCTIONS and isinstance(args[0], Tensor):
            return args[0]
        return self._run(super().call_function, target, args, kwargs, is_free=target in _FREE_FUNCTIONS)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Runs a method."""
        return self._run(super().call_method, target, args, kwargs, is_free=target in _FREE_METHODS)

    def _run(self, call: Callable[..., Any], target: Any, args: Any, kwargs: Any, *, is_free: bool) -> Any:
        if is_free:
            return call(target, args, kwargs)
        args, kwargs = _mapped((args, kwargs), lambda value: self._zeros(value.shape, dtype=value.dtype))
        with _flop_counter() as counter:
            result = call(target, args, kwargs)
        self.operations += counter.get_total_flops()
        return _mapped(result, _with_values)

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node."""
        result = super().run_node(n)
        if (
            n.op not in ("placeholder", "get_attr", "output")
            and isinstance(result, Tensor)
            and result.is_floating_point()
        ):
            self.seen[n] = _Seen(tuple(result.shape), self.operations)
        return result


def _shape_after(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """What a matrix or a convolution makes of a shape; None of other layers.

    Raises:
        RuntimeError: The shape does not suit, as PyTorch would say.
    """
    if type(layer) is nn.Linear:
        if shape[-1] != layer.in_features:
            raise RuntimeError(f"{layer} does not take {shape}")
        return (*shape[:-1], layer.out_features)
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str) or len(shape) != 4:
        return None
    sides = zip(shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    found = [(side + 2 * pad - apart * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, pad, apart in sides]
    if shape[1] != layer.in_channels or min(found) < 1:
        raise RuntimeError(f"{layer} does not take {shape}")
    return (shape[0], layer.out_channels, *found)


class HookedRun(NamedTuple):
    """What one forward of a network that cannot be traced has shown."""

    nodes: list[NodeInfo]
    bottleneck: str


class _Finished(NamedTuple):
    """One call of a module, as its forward hook saw it."""

    name: str
    module: nn.Module
    given: Any
    output: Any
    operations: int


def run_hooked(module: nn.Module, input_shape: tuple[int, int, int]) -> HookedRun:
    """Measures the modules of a network that cannot be traced, in the order in which they finish.

    Modules that run more than once in a forward are left out, as their name would not say which time is meant.
    """
    finished = _finished_modules(module, input_shape)
    calls = Counter(call.name for call in finished)
    seen = {
        call.name: _Seen(tuple(call.output.shape), call.operations)
        for call in finished
        if calls[call.name] == 1 and isinstance(call.output, Tensor) and call.output.is_floating_point()
    }
    # No blocks: a module that is not seen itself is never called, or called twice, so a hook could not keep its output.
    infos = [replace(info, blocks=()) for info in _infos(seen, {})]
    return HookedRun(infos, _hooked_bottleneck(finished, {info.name for info in infos}))


def _finished_modules(module: nn.Module, input_shape: tuple[int, int, int]) -> list[_Finished]:
    counter = _flop_counter()
    finished: list[_Finished] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda layer, given, output: finished.append(
            _Finished(name, layer, given, output, counter.get_total_flops())
        )

    handles = [layer.register_forward_hook(hook(name)) for name, layer in module.named_modules() if name]
    parameter = next(module.parameters(), torch.empty(0))
    images = torch.zeros(_BATCH, *input_shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.inference_mode(), counter, attributes_kept(module):
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return finished


def _hooked_bottleneck(finished: list[_Finished], usable: set[str]) -> str:
    """Names the module whose output feeds the last Linear layer, or the last module if there is no such layer.

    Best is the last module that hands the Linear its very input, if only through a view; else the last one before it.
    """
    linears = [i for i, call in enumerate(finished) if isinstance(call.module, nn.Linear)]
    before = finished[: linears[-1]] if linears else finished
    before = [call for call in before if call.name in usable]
    if not before:
        return ""
    wanted = _memory(finished[linears[-1]].given[0]) if linears else None
    feeding = [call.name for call in before if _memory(call.output) == wanted]
    return feeding[-1] if feeding else before[-1].name


def _memory(value: Any) -> int | None:
    """Identifies a tensor's storage, which its views share, also where it has no values."""
    return int(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None  # noqa: SLF001
