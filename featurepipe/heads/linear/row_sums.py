"""Losses, gradients and curvature of linear heads, summed over a row shard: what one pass over the rows computes.

A `PassWork` travels to the shards; called with a shard's features, class codes and row weights, it returns sums, which are added
up over shards. Blocks on a device (``heads.devices``) are summed there, one at a time. Penalties and preconditioners are not of
the rows: ``heads.linear.passes`` adds them where the fit runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.heads.blocks import Array, Blocks, RowThreads, pieces
from featurepipe.heads.devices import Device, OnDevice, device_of, namespace_of
from featurepipe.heads.linear.joint import pair_curvature
from featurepipe.heads.linear.losses import Loss, Measured, RotatedDiagonals, softmax

Codes = npt.NDArray[np.integer[Any]]
Piece = tuple[slice, Array]

_PIECE_ROWS = 1024  # at least, so that their sums take little time beside their products
_PIECE_FLOPS = 1 << 27  # some milliseconds: more than it takes to hand a piece to a thread
_WORTH_FLOPS = 1 << 29  # of a pass that threads are started for
_PARTIAL_BYTES = 32 << 20  # that the sums of pieces may take while they wait to be added


@dataclass(frozen=True)
class Linear:
    """Coefficients (P * K, D) and biases (P * K, 1) of P problems, K columns each.

    Attributes:
        shape: (P, K).
    """

    coefficients: Array
    bias: Array
    shape: tuple[int, ...]

    def scores(self, block: Array) -> Array:
        """Scores (P, K, m) of a block (m, D)."""
        flat = self.coefficients @ block.T
        flat += self.bias
        return flat.reshape(*self.shape, -1)

    def on(self, device: Device) -> Linear:
        """The same where blocks are."""
        return Linear(device.put(self.coefficients), device.put(self.bias), self.shape)


@dataclass
class Sums:
    """Sums over rows for P problems with K columns each.

    Attributes:
        losses: (P,) weighted losses.
        products: (P * K, D) derivatives by the scores, times the row.
        totals: (P * K,) derivatives by the scores.
        curvature: For each problem the sums of ``curvature.Measured``, or None if not asked for.
    """

    losses: Array
    products: Array
    totals: Array
    curvature: list[Array | None]

    def __add__(self, other: Sums) -> Sums:
        """The sums over both's rows."""
        pairs = zip(self.curvature, other.curvature, strict=True)
        return Sums(
            self.losses + other.losses,
            self.products + other.products,
            self.totals + other.totals,
            [None if mine is None or theirs is None else mine + theirs for mine, theirs in pairs],
        )

    def fetched(self, device: Device) -> Sums:
        """The same as NumPy's arrays."""
        return Sums(device.get(self.losses), device.get(self.products), device.get(self.totals), self.curvature)

    def __getstate__(self) -> dict[str, Any]:
        """As it travels: of symmetric matrices one half."""
        return {**vars(self), "curvature": [None if one is None else _half(one) for one in self.curvature]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.curvature = [None if one is None else _whole(one) for one in self.curvature]


def _half(sums: Array) -> Array:
    """Of (K, size, size) symmetric matrices the lower triangles (K, size * (size + 1) / 2, 1); of diagonals all."""
    return sums if sums.ndim == 2 else sums[:, np.tri(sums.shape[1], dtype=bool), None]


def _whole(sums: Array) -> Array:
    """What ``_half`` was made of."""
    if sums.ndim == 2:
        return sums
    size = (math.isqrt(1 + 8 * sums.shape[1]) - 1) // 2
    lower = np.tri(size, dtype=bool)
    whole = np.empty((len(sums), size, size), sums.dtype)
    for matrix, triangle in zip(whole, sums[:, :, 0], strict=True):
        matrix[lower] = triangle
        matrix.T[lower] = triangle
    return whole


@dataclass(frozen=True)
class PassWork:
    """What every work of a pass needs to know.

    Attributes:
        loss: Of all problems.
        at: Where each problem stands.
        folds: (P,) which row weights each problem has.
        targets: (P,) which class is the positive one, for losses of two classes.
        rows: Of a block.
        dtype: To compute in.
    """

    loss: Loss
    at: Linear
    folds: Array
    targets: Array
    rows: int
    dtype: np.dtype[Any]

    def _nothing(self, curvature: list[Array | None], device: Device) -> Sums:
        problems, columns = self.at.shape[0], len(self.at.coefficients)
        width = self.at.coefficients.shape[1]
        return Sums(device.zeros(problems), device.zeros(columns, width), device.zeros(columns), curvature)

    def _weights(self, weights: Array, rows: slice) -> Array:
        """(P, m) weights of some rows, or (1, m) where all problems have the same."""
        folds = self.folds[:1] if (self.folds == self.folds[0]).all() else self.folds
        return np.asarray(weights[folds, rows])

    def _threads(self, blocks: Blocks) -> RowThreads:
        """Threads for pieces, where there is enough to do and the sums of several fit beside each other."""
        columns, width = self.at.coefficients.shape
        if isinstance(blocks, OnDevice):
            return RowThreads(wanted=False, products=True)
        threads = RowThreads(wanted=4 * blocks.shape[0] * columns * width >= _WORTH_FLOPS)
        if (threads.count + 2) * columns * width * self.dtype.itemsize > _PARTIAL_BYTES:
            return RowThreads(wanted=False, products=True)
        return threads

    def _pieces(self, blocks: Blocks) -> Iterator[Piece]:
        if isinstance(blocks, OnDevice):
            return blocks.pieces(self.rows, self.dtype)
        most = max(_PIECE_ROWS, _PIECE_FLOPS // (4 * len(self.at.coefficients) * blocks.shape[1]))
        return pieces(blocks, most, rows=self.rows, dtype=self.dtype)

    def _beside(self, device: Device, rows: slice, codes: Codes, weights: Array) -> tuple[Codes, Array]:
        """Class numbers and weights of some rows, where their block is."""
        some = codes[..., rows]
        return device.put(some, None if device.is_host else np.int64), device.put(self._weights(weights, rows))


def _products(derivatives: Array, block: Array) -> tuple[Array, Array]:
    """Derivatives by the scores (P, K, m) times the rows of a block (m, D), and their sums: (P * K, D) and (P * K,)."""
    flat, xp = derivatives.reshape(-1, len(block)), namespace_of(block)
    return flat @ block, xp.sum(flat, axis=1, dtype=xp.float64)


@dataclass(frozen=True)
class Values(PassWork):
    """Sums losses and gradients, and the curvature of some problems.

    Attributes:
        measures: For each problem what makes a ``Measured``, or None.
        together: Makes ``RotatedDiagonals`` for the curvature of so many problems, instead of a ``Measured`` for each.
        pairs: Whether curvature is that of pairs of classes, for ``JointPreconditioner``, and not that of classes.
    """

    measures: list[Callable[[], Measured] | None]
    together: Callable[[int], RotatedDiagonals] | None = None
    pairs: bool = False

    def __call__(self, blocks: Blocks, codes: Codes, weights: Array) -> Sums:
        """Sums over a shard: (m, D) blocks, (m,) or (L, m) codes and (F, m) weights."""
        device = device_of(blocks)
        at, targets = self.at.on(device), device.put(self.targets)
        asked = [number for number, measure in enumerate(self.measures) if measure is not None]
        together = self.together(len(asked)) if self.together is not None and asked else None
        measured = [None if measure is None or together else measure() for measure in self.measures]
        sums = self._nothing([], device)

        def piece_of(piece: Piece) -> tuple[Array, Array, Array, list[Array], Array | None]:
            rows, block = piece
            scores = at.scores(block)
            classes, own = self._beside(device, rows, codes, weights)
            amounts = [
                pair_curvature(softmax(scores[number]), own[number % len(own)])
                if self.pairs
                else self.loss.curvature(scores[number], classes, own[number % len(own)], self.targets[number])
                for number in asked
            ]
            moments = None
            if together is not None:
                amounts = [device.get(some) for some in amounts]
                moments = together.moments(np.concatenate(amounts), device.get(scores[asked, 0]))
            losses = self.loss.residuals(scores, classes, own, targets)
            return losses, *_products(scores, block), amounts, moments

        with self._threads(blocks) as threads:
            for (_, block), found in threads.map(piece_of, self._pieces(blocks)):
                losses, products, totals, amounts, moments = found
                sums.losses += losses
                sums.products += products
                sums.totals += totals
                if together is not None and moments is not None:
                    together.add(block, np.concatenate(amounts), moments, device)
                else:
                    _measure(threads, [measured[number] for number in asked], block, amounts, device)
            sums.curvature = [None if into is None else into.finish(threads) for into in measured]
            for number, diagonal in zip(asked, together.finish() if together else [], strict=together is not None):
                sums.curvature[number] = diagonal
        return sums.fetched(device)


def _measure(
    threads: RowThreads, measured: list[Measured | None], block: Array, amounts: list[Array], device: Device
) -> None:
    """Adds the rows of a block to each problem's curvature: which of them is decided here, all else where the block is."""
    jobs = []
    for into, found in zip(measured, amounts, strict=True):
        if into is not None:
            rows = found if len(into.sums) > 1 else found.mean(axis=0, keepdims=True)
            jobs += [(into, number, row) for number, row in enumerate(rows)]
    if jobs:
        first = jobs[0][0]  # all have the same columns
        squares = first.squares(block, device)
        far_out = first.far_out(squares, device)
        weights = device.namespace.stack([row for *_, row in jobs])
        diagonals = device.get(device.put(weights, squares.dtype) @ squares) if first.samples else [None] * len(jobs)
        rows = zip(device.get(weights), diagonals, strict=True)
        parts = [(into, number, *each) for (into, number, _), each in zip(jobs, rows, strict=True)]
        threads.each(lambda part: part[0].add(part[1], block, part[2], far_out, part[3], device), parts)


@dataclass(frozen=True)
class Products(PassWork):
    """Sums second derivatives times directions, which come as the sums' products and totals.

    Attributes:
        towards: The directions, as changes of where the problems stand.
    """

    towards: Linear

    def __call__(self, blocks: Blocks, codes: Codes, weights: Array) -> Sums:
        """Sums over a shard; see ``Values``."""
        device = device_of(blocks)
        at, towards, targets = self.at.on(device), self.towards.on(device), device.put(self.targets)
        sums = self._nothing([None] * self.at.shape[0], device)

        def piece_of(piece: Piece) -> tuple[Array, Array]:
            rows, block = piece
            scores, changes = at.scores(block), towards.scores(block)
            self.loss.bend(scores, changes, *self._beside(device, rows, codes, weights), targets)
            return _products(changes, block)

        with self._threads(blocks) as threads:
            for _, (products, totals) in threads.map(piece_of, self._pieces(blocks)):
                sums.products += products
                sums.totals += totals
        return sums.fetched(device)
