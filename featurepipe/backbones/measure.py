"""Shapes and costs of a network's nodes, measured by running it once on images without values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from featurepipe.backbones.nodes import Trace, attributes_kept

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
    device = next(iter(found.module.parameters()), torch.empty(0)).device
    with torch.inference_mode(), runner.counter:
        runner.run(torch.zeros(_BATCH, *input_shape, device=device))
    return {found.names[node]: value for node, value in runner.seen.items()}


class _Counting(fx.Interpreter):
    """Runs a graph node by node and notes the shape and the operations so far."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.counter = FlopCounterMode(display=False)
        self.seen: dict[fx.Node, _Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if (
            n.op not in ("placeholder", "get_attr", "output")
            and isinstance(result, Tensor)
            and result.is_floating_point()
        ):
            self.seen[n] = _Seen(tuple(result.shape), self.counter.get_total_flops())
        return result


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
    counter = FlopCounterMode(display=False)
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
