"""Pooling: one activation per image becomes one vector per image; and columns, ``node:pooling``, as values.

``gap`` averages over positions, ``gmp`` takes the maximum, ``gem`` is the generalised mean with p = 3 (Radenović,
Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019), ``avgKxK`` and ``maxKxK`` keep
a grid of cells, ``flatten`` keeps every position, ``map`` keeps the activation's own axes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from featurepipe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


POOLINGS = ("gap", "gmp", "gem", "avgKxK", "maxKxK", "flatten", "map")
GEM_POWER = 3.0
GEM_FLOOR = 1e-6  # the paper clamps activations here, so that roots and powers of negatives never arise
_GRID = re.compile(r"(avg|max)([1-9]\d*)x([1-9]\d*)")


def check_pooling(pooling: str) -> str:
    """Returns ``pooling`` if it is one of the known poolings.

    Raises:
        UsageError: It is not; the message lists the choices.
    """
    if pooling in ("gap", "gmp", "gem", "flatten", "map"):
        return pooling
    grid = grid_of(pooling)
    if grid is not None:
        return pooling
    raise UsageError(
        f"unknown pooling {pooling!r}; choices: {', '.join(POOLINGS)} (K a whole number from 1, such as avg2x2). "
        "Write NODE:POOLING, for instance layer4:gap"
    )


def grid_of(pooling: str) -> tuple[str, int, int] | None:
    """Returns ``("avg" or "max", rows, columns)`` for a grid pooling, None for any other.

    Example:
        >>> grid_of("max3x2"), grid_of("gap")
        (('max', 3, 2), None)
    """
    match = _GRID.fullmatch(pooling)
    return (match[1], int(match[2]), int(match[3])) if match else None


def pooled_shape(shape: Sequence[int], pooling: str, channel_axis: int | None = None) -> tuple[int, ...]:
    """Says what shape one image's feature has, without computing anything.

    Args:
        shape: Shape of the activation without the batch axis.
        pooling: A pooling.
        channel_axis: As for ``pool``, counted with the batch axis.

    Raises:
        UsageError: The pooling is unknown or does not suit an activation of this shape.
    """
    check_pooling(pooling)
    _check_suits(len(shape) + 1, pooling)
    axis = _channel_axis(len(shape) + 1, channel_axis) - 1
    channels, positions = shape[axis], [size for i, size in enumerate(shape) if i != axis]
    if pooling == "map":
        return (channels, *positions) if len(shape) == 3 else tuple(shape)
    if pooling == "flatten":
        width = 1
        for size in shape:
            width *= size
        return (width,)
    grid = grid_of(pooling)
    return (channels * grid[1] * grid[2],) if grid else (channels,)


def pool(features: Tensor, pooling: str, *, channel_axis: int | None = None) -> Tensor:
    """Pools a batch of activations.

    Args:
        features: Activations of N images: maps (N, C, H, W) or (N, H, W, C), tokens (N, T, D), or vectors (N, D); any
            floating dtype, any device.
        pooling: ``gap``, ``gmp``, ``gem``, ``avgKxK``, ``maxKxK``, ``flatten`` or ``map``.
        channel_axis: The axis that holds channels; by default 1 for maps and the last one for tokens.

    Returns:
        float32 (N, D) on the same device; sums are taken in float32 whatever the input's dtype. Vectors pass through
        every pooling but the grids unchanged. Grids and ``flatten`` of maps order their values channel by channel, then
        row by row. ``map`` is the exception in shape: maps give (N, C, H, W), however the network orders its axes, and
        tokens (N, T, D).

    Raises:
        UsageError: The pooling is unknown, or a grid is asked of something that is not a map.
    """
    check_pooling(pooling)
    _check_suits(features.ndim, pooling)
    if features.ndim == 2:
        return features.float()
    axis = _channel_axis(features.ndim, channel_axis)
    if pooling in ("gap", "gmp", "gem"):
        return _pool_positions(features, pooling, tuple(i for i in range(1, features.ndim) if i != axis))
    maps = (features.movedim(axis, 1) if features.ndim == 4 else features).float()
    grid = grid_of(pooling)
    if grid is not None:
        return _pool_grid(maps, *grid)
    return maps.contiguous() if pooling == "map" else maps.flatten(1)


def _pool_positions(features: Tensor, pooling: str, positions: tuple[int, ...]) -> Tensor:
    import torch

    if pooling == "gap":
        return features.mean(positions, dtype=torch.float32)
    if pooling == "gmp":
        return features.amax(positions).float()
    return features.float().clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(positions).pow(1 / GEM_POWER)


def _pool_grid(maps: Tensor, kind: str, rows: int, columns: int) -> Tensor:
    from torch.nn import functional

    cells = functional.adaptive_avg_pool2d if kind == "avg" else functional.adaptive_max_pool2d
    pooled: Tensor = cells(maps, (rows, columns))
    return pooled.flatten(1)


def _channel_axis(ndim: int, channel_axis: int | None) -> int:
    """The channels' axis, counted from the front with the batch as axis 0."""
    default = {2: 1, 3: 2, 4: 1}[ndim]
    return default if channel_axis is None else channel_axis % ndim


def _check_suits(ndim: int, pooling: str) -> None:
    if ndim not in (2, 3, 4):
        raise UsageError(
            f"an activation with {ndim} axes cannot be pooled; choose one that gives (N, D), (N, T, D) or (N, C, H, W)"
        )
    if grid_of(pooling) is not None and ndim != 4:
        what = "vectors (N, D)" if ndim == 2 else "tokens (N, T, D)"
        raise UsageError(
            f"pooling {pooling!r} needs a map (N, C, H, W), but this node gives {what}; use gap or flatten"
        )


DEFAULT_POOLING = "gap"


class Column(NamedTuple):
    """One kept feature: a node of a backbone and the pooling applied to its output.

    Example:
        >>> str(Column("layer4", "gap"))
        'layer4:gap'
    """

    node: str
    pooling: str

    def __str__(self) -> str:
        return f"{self.node}:{self.pooling}"


def parse_column(text: str) -> Column:
    """Reads ``node`` or ``node:pooling``; the pooling is ``gap`` when left out.

    Whether the node exists is for the backbone to say (``Backbone.columns``).

    Raises:
        UsageError: The node is empty or the pooling unknown.

    Example:
        >>> parse_column("layer3"), parse_column("layer3:avg2x2")
        (Column(node='layer3', pooling='gap'), Column(node='layer3', pooling='avg2x2'))
    """
    node, separator, pooling = text.strip().partition(":")
    if not node:
        raise UsageError(
            f"column {text!r} names no node; write NODE or NODE:POOLING, for instance bottleneck or layer4:gap"
        )
    return Column(node, check_pooling(pooling) if separator else DEFAULT_POOLING)
