"""Which columns are compared: the network's stages, each pooled to about the same number of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from featurepipe.errors import UsageError

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone, Column
    from featurepipe.backbones.measure import NodeInfo
    from featurepipe.store import Space

AUTO = "auto"


@dataclass(frozen=True)
class DepthColumn:
    """A column and its place in the network.

    Attributes:
        column: ``node:pooling``.
        node: the node, as asked for.
        pooling: of its output.
        depth: position of the node in execution order.
        cost: share of the forward's operations done once the node is, 0 to 1.
        width: values per image.
    """

    column: str
    node: str
    pooling: str
    depth: int
    cost: float
    width: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def choose_columns(
    backbone: Backbone, nodes: str | Sequence[str], pooling: Sequence[str] | None, max_width: int
) -> list[DepthColumn]:
    """The columns to compare, in execution order.

    Args:
        backbone: the network; needs no weights.
        nodes: ``auto`` for its stages, or nodes, each ``NODE`` or ``NODE:POOLING``.
        pooling: poolings of nodes named without one; None for the one that keeps most cells within ``max_width`` values.
        max_width: values per image that a column may have at most, unless its gap alone has more.

    Raises:
        UsageError: a node or pooling is unknown, or nothing is left to compare.
    """
    from featurepipe.backbones.stages import bounded_pooling

    asked = [nodes] if isinstance(nodes, str) else list(nodes)
    names = [name for node in asked for name in (backbone.stages() if node == AUTO else [node])]
    requested = []
    for name in names:
        if ":" in name:
            requested.append(name)
            continue
        info = backbone.node(backbone.bottleneck if name == "bottleneck" else name)
        own = [bounded_pooling(info, max_width)] if pooling is None else _suiting(pooling, info)
        requested += [f"{name}:{kind}" for kind in own]
    written = [name for name in names if ":" in name]
    as_written = {str(column) for column in backbone.columns(written)} if written else set()
    placed = [_placed(backbone, column) for column in backbone.columns(requested)] if requested else []
    found = list({(c.depth, c.pooling): c for c in placed}.values())  # a node may have several names
    too_wide = [c for c in found if c.width > max_width and str(c.column) in as_written]
    if too_wide:
        raise UsageError(
            f"{too_wide[0].column} has {too_wide[0].width:,} values an image, more than --max-width {max_width:,} allows; "
            "allow more, or name a coarser pooling"
        )
    kept = [c for c in found if c.width <= max_width or (pooling is None and c.pooling == "gap")]
    if len(kept) < 2:
        wide = ", ".join(f"{column.column} ({column.width:,})" for column in found)
        have = f"{len(kept)} of {wide} {'is' if len(kept) == 1 else 'are'} at most --max-width {max_width:,} wide"
        raise UsageError(
            f"a comparison needs two columns or more, and {have if found else 'no node has such a pooling'}; name more nodes or "
            "allow more values"
        )
    return sorted(kept, key=lambda column: (column.depth, column.width, column.column))


def columns_of_space(backbone: Backbone, space: Space, max_width: int) -> list[str]:
    """The columns that a store already holds, for a comparison that extracts nothing."""
    held: Mapping[str, Any] = space.columns()
    return [str(column) for column in backbone.columns(list(held)) if held[str(column)].width <= max_width]


def _suiting(pooling: Sequence[str], info: NodeInfo) -> list[str]:
    """The poolings that a node can have: a vector has only one form, tokens no grid, a map of 3 x 3 no grid of 4 x 4."""
    from featurepipe.backbones.pooling import grid_of

    if len(info.shape) == 1:
        return ["gap"]
    sides = [size for axis, size in enumerate(info.shape, 1) if axis != info.channel_axis]
    fitting = []
    for kind in pooling:
        grid = grid_of(kind)
        if grid is None or (len(sides) == 2 and grid[1] <= sides[0] and grid[2] <= sides[1]):
            fitting.append(kind)
    return fitting


def _placed(backbone: Backbone, column: Column) -> DepthColumn:
    info = backbone.node(column.node)
    order = [node.name for node in backbone.nodes()]
    width = 1
    for size in backbone.feature_shape(column):
        width *= size
    return DepthColumn(str(column), column.node, column.pooling, order.index(info.name), info.cost, width)
