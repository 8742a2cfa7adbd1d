"""Stages: the few outputs of a network that stand for its depth, and the pooling that makes them comparable.

``--node auto`` of the layer-depth benchmark means `Backbone.stages`. One rule finds them in any network:

1. A *block* is a module with several layers in it, a *layer* a module that holds a weight matrix or a kernel of its own.
2. The network is split into the blocks directly inside it, and the largest of these is split again, until there are
   four, or three of which none holds over half of the layers. A block that computes something of its own, such as a
   residual block, is not split, unless it is the shell around many.
3. Networks without such blocks (AlexNet, VGG, LeNet) are cut at their layers, and of these the pooled ones, the last
   map and the hidden fully connected ones count.
4. Of more than twelve the last of each run of equal shapes counts, or every n-th where shapes hardly change.
5. The bottleneck comes last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from featurepipe.backbones.nodes import NodeInfo
from featurepipe.errors import UsageError

FEWEST, MOST = 3, 12  # stages before the bottleneck
_IDLE = (nn.Identity, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)  # change nothing where the shape stays as it is


def stages(network: nn.Module, nodes: Sequence[NodeInfo], bottleneck: NodeInfo) -> tuple[str, ...]:
    """Names the outputs of a network's blocks in execution order, the bottleneck last.

    Args:
        network: The network; its parameters need no values.
        nodes: Its nodes in execution order.
        bottleneck: The one of them that feeds the classifier.

    Returns:
        4 to 13 names, fewer where the network has fewer layers. Blocks go by their module's name (``layer4``).
    """
    below = _Below(network, nodes, bottleneck)
    found = _found(network, below)
    found = _thinned(found, [below[name].shape for name in found])
    return (*(below.widened(name, found) for name in found), bottleneck.name)


def blocks(network: nn.Module, nodes: Sequence[NodeInfo], bottleneck: NodeInfo) -> tuple[str, ...]:
    """Names the outputs of all of a network's blocks in execution order, the bottleneck last; takes what `stages` takes.

    Where `stages` stops at four, modules that only hold several blocks are split on, as the layers of a ResNet are into its
    residual blocks; and none is left out, however many there are.
    """
    below = _Below(network, nodes, bottleneck)
    found = _split_shells(_found(network, below), below, dict(network.named_modules()))
    return (*(below.widened(name, found) for name in found), bottleneck.name)


def _split_shells(names: Sequence[str], below: _Below, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names, but for a module that only holds several blocks those of its blocks."""
    found = []
    for name in names:
        module = modules.get(name)
        is_shell = module is not None and _is_shell(module, FEWEST)
        inner = below.main_path(f"{name}.{child}" for child in _inner_blocks(module)) if module and is_shell else []
        found += _split_shells(inner, below, modules) if len(inner) > 1 else [name]
    return found


def _found(network: nn.Module, below: _Below) -> list[str]:
    found: list[str] = []
    for breadth in (FEWEST, 2):
        if len(found) < FEWEST:
            found = _candidates(network, below, breadth)
    return found


def bounded_pooling(info: NodeInfo, max_width: int) -> str:
    """Names the pooling that keeps most cells of a node's output within ``max_width`` values.

    So layers of unlike sizes are compared at about one width, 9,000 for instance, after the protocol of VISSL (Goyal,
    Mahajan, Gupta and Misra, "Scaling and Benchmarking Self-Supervised Visual Representation Learning", ICCV 2019).

    Args:
        info: The node.
        max_width: The most values of a feature.

    Returns:
        For maps ``avgKxK`` with the largest K that fits, no larger than the map; for tokens ``flatten`` where it fits.
        ``gap`` otherwise, and where even ``gap`` is wider; vectors pass through it as they are.

    Raises:
        UsageError: ``max_width`` is no positive number.
    """
    if max_width < 1:
        raise UsageError(f"max_width {max_width} must be a number from 1, such as 9000")
    if len(info.shape) == 3:
        side = min(math.isqrt(max_width // info.width), *_positions(info))
        return f"avg{side}x{side}" if side > 1 else "gap"
    return "flatten" if len(info.shape) == 2 and math.prod(info.shape) <= max_width else "gap"


class _Below:
    """The nodes of a network below its bottleneck, by their own names and by those of the modules that end there."""

    def __init__(self, network: nn.Module, nodes: Sequence[NodeInfo], bottleneck: NodeInfo) -> None:
        self._modules = dict(network.named_modules())
        self._bottleneck = bottleneck
        self._nodes = nodes[: nodes.index(bottleneck)]
        self._depth = {name: i for i, info in enumerate(self._nodes) for name in (*info.blocks, info.name)}
        self._last_map = max((i for i, info in enumerate(self._nodes) if not _is_vector(info)), default=-1)

    def __contains__(self, name: str) -> bool:
        """Whether this is a value that differs from the bottleneck in shape, or in what was computed for it."""
        return name in self._depth and not _alike(self[name], self._bottleneck)

    def __getitem__(self, name: str) -> NodeInfo:
        return self._nodes[self._depth[name]]

    def outside(self, blocks: Iterable[str]) -> list[NodeInfo]:
        """The nodes outside of blocks, and the last one of each block; none that repeats the value before it."""
        ends = {self._depth[block] for block in blocks if block in self._depth}
        inside = tuple(f"{block}." for block in blocks)
        kept: list[NodeInfo] = []
        for i, info in enumerate(self._nodes):
            hidden = info.name.startswith(inside) or (kept and self._repeats(info, kept[-1]))
            if i in ends or not hidden:
                kept.append(info)
        return kept

    def _repeats(self, info: NodeInfo, before: NodeInfo) -> bool:
        """Whether this is the value before it, under the name of a container or of a layer that changes nothing."""
        is_container = before.name.startswith(f"{info.name}.")
        return _alike(info, before) and (is_container or isinstance(self._modules.get(info.name), _IDLE))

    def main_path(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are here and no side branches, by depth."""
        usable = {self._depth[name]: name for name in names if name in self and not self.is_side_branch(name)}
        return [name for _, name in sorted(usable.items())]

    def is_side_branch(self, name: str) -> bool:
        """Whether this is a vector although maps follow: an auxiliary classifier, or a gate."""
        return name in self._depth and self._depth[name] < self._last_map and _is_vector(self[name])

    def widened(self, name: str, found: Iterable[str]) -> str:
        """The outermost module that ends with this value and has no other stage in it."""
        widest, others = name, [other for other in found if other != name]
        while parent := widest.rpartition(".")[0]:
            has_others = any(other.startswith(f"{parent}.") for other in others)
            if has_others or parent not in self or not _alike(self[name], self[parent]):
                break
            widest = parent
        return widest


def _candidates(network: nn.Module, below: _Below, breadth: int) -> list[str]:
    """The ends of the blocks, or where these are too few the outputs of all layers outside of them."""
    blocks = _split(network, below, breadth)
    found = below.main_path(blocks)
    if len(found) >= FEWEST:
        return found
    pieces = list(_pieces(below.outside(blocks)))
    landmarks = below.main_path(_landmarks(pieces))
    return landmarks if len(landmarks) >= FEWEST else below.main_path(_output(piece).name for piece in pieces)


def _split(network: nn.Module, below: _Below, breadth: int) -> list[str]:
    """The names of the blocks that a network falls into; some may lie beyond the bottleneck.

    A block that computes something of its own is split if it is made of ``breadth`` others or more.
    """
    blocks = _inner_blocks(network)
    whole: set[str] = set()  # those that cannot be split
    while rest := [name for name in blocks if name not in whole]:
        largest = max(rest, key=lambda name: _layers(blocks[name]))
        count = len(below.main_path(blocks))
        if count > FEWEST or (count == FEWEST and 2 * _layers(blocks[largest]) <= _layers(network)):
            break
        if _is_shell(blocks[largest], breadth) and not below.is_side_branch(largest):
            inner = _inner_blocks(blocks.pop(largest))
            blocks.update({f"{largest}.{name}": block for name, block in inner.items()})
        else:
            whole.add(largest)
    return list(blocks)


def _inner_blocks(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if _layers(child) > 1}


def _layers(module: nn.Module) -> int:
    """The number of modules that hold a matrix or a kernel; normalisations hold only vectors."""
    return sum(any(p.ndim > 1 for p in part.parameters(recurse=False)) for part in module.modules())


def _is_shell(module: nn.Module, breadth: int) -> bool:
    """Whether a module only keeps others together, or has too many blocks in it to be one."""
    computes_nothing = type(module).forward in (nn.Sequential.forward, nn.Module.forward)
    return computes_nothing or _breadth(module) >= breadth


def _breadth(module: nn.Module) -> int:
    inner = _inner_blocks(module).values()
    return max(len(inner), sum(_breadth(block) for block in inner))


def _pieces(nodes: Sequence[NodeInfo]) -> Iterator[list[NodeInfo]]:
    """Cuts a network into its layers: each node that takes arithmetic of note, with all that follow up to the next."""
    piece: list[NodeInfo] = []
    done = 0.0
    for info in nodes:
        if info.cost > done and piece:
            yield piece
            piece = []
        if info.cost > 0:
            piece.append(info)
        done = info.cost
    if piece:
        yield piece


def _landmarks(pieces: Sequence[list[NodeInfo]]) -> list[str]:
    """The outputs of the layers that are pooled or fully connected, and the last map."""
    maps = [_output(piece) for piece in pieces if not _is_vector(_output(piece))]
    return [
        _output(piece).name
        for piece in pieces
        if _is_vector(_output(piece)) or _pooled(piece) is not None or _output(piece) is maps[-1]
    ]


def _output(piece: list[NodeInfo]) -> NodeInfo:
    """What a layer hands on: its value after activation and pooling, but before it is averaged over all positions."""
    if _is_vector(piece[0]):
        return piece[-1]
    pooled = _pooled(piece)
    if pooled is None:
        return [info for info in piece if not _is_vector(info)][-1]
    return [info for info in piece if info.shape == pooled.shape][-1]


def _pooled(piece: list[NodeInfo]) -> NodeInfo | None:
    """The first map of a layer that is smaller than the layer's own, if any."""
    size = math.prod(_positions(piece[0]))
    return next((info for info in piece if 1 < math.prod(_positions(info)) < size), None)


def _thinned(names: list[str], shapes: list[tuple[int, ...]]) -> list[str]:
    if len(names) <= MOST:
        return names
    ends = [name for i, name in enumerate(names) if i + 1 == len(names) or shapes[i] != shapes[i + 1]]
    chosen = ends if len(ends) > FEWEST else names
    if len(chosen) <= MOST:
        return chosen
    return [chosen[(i + 1) * len(chosen) // MOST - 1] for i in range(MOST)]


def _positions(info: NodeInfo) -> list[int]:
    return [size for axis, size in enumerate(info.shape, 1) if axis != info.channel_axis]


def _is_vector(info: NodeInfo) -> bool:
    return math.prod(_positions(info)) == 1


def _alike(one: NodeInfo, other: NodeInfo) -> bool:
    """Whether two values differ by activations and the like at most."""
    return one.shape == other.shape and one.cost == other.cost
