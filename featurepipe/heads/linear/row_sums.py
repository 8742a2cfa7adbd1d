"""What one pass computes of a share of the rows, at the place where they are: the sums that objectives are made of.

An order says what is wanted and travels to the rows; called with a share's features, class codes and row weights, it returns sums
that are added up. Penalties and preconditioners are not of the rows: ``heads.passes`` adds them where the fit runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.heads.blocks import Array, Blocks, iterate
from featurepipe.heads.linear.losses import Loss, Measured, RotatedDiagonals

Codes = npt.NDArray[np.integer[Any]]


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

    def __getstate__(self) -> dict[str, Any]:
        """As it travels: of symmetric matrices one half."""
        return {**vars(self), "curvature": [None if one is None else _half(one) for one in self.curvature]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.curvature = [None if one is None else _whole(one) for one in self.curvature]

    def add(self, derivatives: Array, block: Array) -> None:
        """Adds derivatives by the scores (P, K, m) of a block (m, D)."""
        flat = derivatives.reshape(len(self.totals), -1)
        self.products += flat @ block
        self.totals += flat.sum(axis=1, dtype=np.float64)


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
class Order:
    """What every order of a pass says.

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

    def _nothing(self, curvature: list[Array | None]) -> Sums:
        problems, columns = self.at.shape[0], len(self.at.coefficients)
        width = self.at.coefficients.shape[1]
        return Sums(np.zeros(problems), np.zeros((columns, width)), np.zeros(columns), curvature)


@dataclass(frozen=True)
class Values(Order):
    """Asks for losses and gradients, and for the curvature of some problems.

    Attributes:
        measures: For each problem what makes a ``Measured``, or None.
        together: Makes ``RotatedDiagonals`` for the curvature of so many problems, instead of a ``Measured`` for each.
    """

    measures: list[Callable[[], Measured] | None]
    together: Callable[[int], RotatedDiagonals] | None = None

    def __call__(self, blocks: Blocks, codes: Codes, weights: Array) -> Sums:
        """Sums over a share: (m, D) blocks, (m,) or (L, m) codes and (F, m) weights."""
        asked = [number for number, measure in enumerate(self.measures) if measure is not None]
        together = self.together(len(asked)) if self.together is not None and asked else None
        measured = [None if measure is None or together else measure() for measure in self.measures]
        sums = self._nothing([])
        for place, block in iterate(blocks, rows=self.rows, dtype=self.dtype):
            scores, own, classes = self.at.scores(block), weights[self.folds, place], codes[..., place]

            def amounts(number: int, scores: Array = scores, own: Array = own, classes: Codes = classes) -> Array:
                return self.loss.curvature(scores[number], classes, own[number], self.targets[number])

            if together is not None:
                together.add(block, np.concatenate([amounts(number) for number in asked]))
            for number, into in enumerate(measured):
                if into is not None:
                    found = amounts(number)
                    into.add(block, found if len(into.sums) > 1 else found.mean(axis=0, keepdims=True))
            sums.losses += self.loss.residuals(scores, classes, own, self.targets)
            sums.add(scores, block)
        sums.curvature = [None if into is None else into.finish() for into in measured]
        if together is not None:
            for number, found in zip(asked, together.finish(), strict=True):
                sums.curvature[number] = found
        return sums


@dataclass(frozen=True)
class Products(Order):
    """Asks for second derivatives times directions, which come as the sums' products and totals.

    Attributes:
        towards: The directions, as changes of where the problems stand.
    """

    towards: Linear

    def __call__(self, blocks: Blocks, codes: Codes, weights: Array) -> Sums:
        """Sums over a share; see ``Values``."""
        sums = self._nothing([None] * self.at.shape[0])
        for place, block in iterate(blocks, rows=self.rows, dtype=self.dtype):
            scores, changes = self.at.scores(block), self.towards.scores(block)
            self.loss.bend(scores, changes, codes[..., place], weights[self.folds, place], self.targets)
            sums.add(changes, block)
        return sums
