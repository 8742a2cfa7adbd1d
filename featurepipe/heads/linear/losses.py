"""Losses of linear classifiers, for several problems at once, and curvature measured on few rows, as preconditioners.

Scores come as (P, K, m): problems, columns a problem, rows of the block. Rows lie innermost, so that sums over the few
columns run over whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.linalg import get_lapack_funcs

from featurepipe.heads.blocks import RowThreads

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.integer[Any]]


class Loss(Protocol):
    """A convex loss of the scores; what the solver must know of it.

    Attributes:
        refresh: Iterations after which its curvature is measured anew.
        growth: Factor by which that number grows each time.
        redundant: Whether adding the same to all columns changes nothing; then the best columns sum to zero.
    """

    refresh: int
    growth: float
    redundant: bool

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:
        """Sums the loss and overwrites the scores by its derivatives.

        Args:
            scores: (P, K, m); overwritten by the weighted derivatives by the scores.
            codes: (m,) class number of each row; or for losses of two classes (L, m), whether each of L labels is positive.
            weights: (P, m) weight of each row in each problem, or (1, m) where all have the same.
            targets: (P,) which class, or which label, is the positive one, for losses of two classes.

        Returns:
            (P,) weighted sums, float64.
        """

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:
        """Returns the second derivatives (K, m) of one problem's loss by each score alone; scores are (K, m)."""

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:
        """Overwrites changes of the scores by the changes of the weighted derivatives that go with them, to first order.

        Args:
            scores: (P, K, m).
            changes: (P, K, m); overwritten.
            codes: As for ``residuals``.
            weights: As for ``residuals``.
            targets: As for ``residuals``.
        """

    def start(self, class_weights: Array) -> Array:
        """Returns the (K,) intercepts that are best while all coefficients are zero, or near; one entry a class."""


class SoftmaxLoss:
    """Minus the logarithm of the softmax probability of the row's class; K columns are K classes."""

    refresh, growth, redundant = 5, 1.5, True

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:  # noqa: ARG002
        """See ``Loss``."""
        rows = np.arange(scores.shape[2])
        scores -= scores.max(axis=1, keepdims=True)
        own = scores[:, codes, rows]
        np.exp(scores, out=scores)
        total = scores.sum(axis=1)
        values: Array = np.einsum("pm,pm->p", np.log(total) - own, weights, dtype=np.float64)
        scores *= (weights / total)[:, None, :]
        scores[:, codes, rows] -= weights
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:  # noqa: ARG002
        """See ``Loss``; p (1 - p)."""
        likely = _softmax(scores)
        return np.asarray(likely * (1 - likely) * weights)

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:  # noqa: ARG002
        """See ``Loss``."""
        likely = _softmax(scores)
        changes -= (likely * changes).sum(axis=-2, keepdims=True)
        changes *= likely
        changes *= weights[:, None, :]

    def start(self, class_weights: Array) -> Array:
        """See ``Loss``; logarithms of the class frequencies."""
        logarithms = np.log(class_weights / class_weights.sum())
        return np.asarray(logarithms - logarithms.mean())


class BinomialLoss:
    """The logistic loss of one column: the class ``target`` against the other, or the label ``target``."""

    refresh, growth, redundant = 5, 1.5, False

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:
        """See ``Loss``."""
        against = _sign(codes, targets, scores.dtype)
        np.negative(against, out=against)
        amiss = scores[:, 0] * against  # minus the margin
        odds = np.exp(-np.abs(amiss))  # at most 1: nothing overflows
        losses = np.log1p(odds)
        losses += np.maximum(amiss, 0)
        values: Array = np.einsum("pm,pm->p", losses, weights, dtype=np.float64)
        odds += 1
        np.minimum(amiss, 0, out=amiss)
        np.exp(amiss, out=amiss)
        amiss /= odds
        amiss *= against
        np.multiply(amiss, weights, out=scores[:, 0])
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:  # noqa: ARG002
        """See ``Loss``; p (1 - p)."""
        odds = np.exp(-np.abs(scores))
        return np.asarray(odds / np.square(1 + odds) * weights)

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:  # noqa: ARG002
        """See ``Loss``."""
        changes *= self.curvature(scores, codes, weights[:, None, :], 0)

    def start(self, class_weights: Array) -> Array:
        """See ``Loss``; the logarithm of the odds."""
        return np.asarray(np.log(class_weights[1:] / class_weights[:1]))


class SquaredHingeLoss:
    """The squared hinge ``max(0, 1 - sign * score) ** 2`` of one column: a class against all others, or a label."""

    refresh, growth, redundant = 2, 1.0, False

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:
        """See ``Loss``."""
        sign = _sign(codes, targets, scores.dtype)
        short = np.maximum(1 - sign * scores[:, 0], 0)
        weighted = short * weights
        values: Array = np.einsum("pm,pm->p", short, weighted, dtype=np.float64)
        weighted *= -2
        np.multiply(weighted, sign, out=scores[:, 0])
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:
        """See ``Loss``; 2 for rows inside the margin, else 0 (the generalised second derivative)."""
        sign = _sign(codes, np.array([target]), scores.dtype)[0]
        return np.asarray((sign * scores < 1) * (2 * weights))

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:
        """See ``Loss``."""
        sign = _sign(codes, targets, scores.dtype)
        changes *= (sign[:, None, :] * scores < 1) * (2 * weights[:, None, :])

    def start(self, class_weights: Array) -> Array:  # noqa: ARG002
        """See ``Loss``."""
        return np.zeros(1)


def _sign(codes: Codes, targets: Codes, dtype: np.dtype[Any]) -> Array:
    """Returns (P, m): 1 for rows of the problem's class, or that have its label where codes are (L, m); -1 for others."""
    signs = (codes == targets[:, None] if codes.ndim == 1 else codes[targets] > 0).astype(dtype)
    signs *= 2
    signs -= 1
    return np.asarray(signs)


def _softmax(scores: Array) -> Array:
    """Probabilities over the columns, the last axis but one."""
    likely = np.exp(scores - scores.max(axis=-2, keepdims=True))
    return np.asarray(likely / likely.sum(axis=-2, keepdims=True))


WIDEST = 4096  # values a row up to which whole matrices are measured; above it their diagonals
_ROWS_PER_VALUE = 4  # rows measured for each value a row: enough for a matrix that is close enough
_LEAST_ROWS = 4096


class Measured:
    """Sums of ``h * outer(x, x)`` over rows, one for each weighting h; x has a one appended for the intercept.

    Only some rows are used, taken with a frequency proportional to h and weighted by its inverse: where most rows are
    fitted well, most of the curvature is that of a few. The choice is systematic, not random, so a fit repeats exactly.

    Args:
        count: Weightings.
        mean: (D,) of the rows; its dtype is that of the sums.
        centre: Subtract it.
        intercept: Append a one.
        share: Rows to use of all there are, a fraction.
        diagonal: Sum the diagonals alone.
    """

    def __init__(self, count: int, mean: Array, *, centre: bool, intercept: bool, share: float, diagonal: bool) -> None:
        size = len(mean) + intercept
        self.sums = np.zeros((count, size) if diagonal else (count, size, size), mean.dtype)
        self._mean = mean if centre else np.zeros_like(mean)
        self._intercept, self._share = intercept, share
        self._waiting: list[list[Array]] = [[] for _ in range(count)]

    def add(self, number: int, block: Array, curvature: Array) -> None:
        """Adds the rows of a block (m, D) to one of the sums, weighted by ``curvature`` (m,); other threads may add to others."""
        rows, weights = _choose(curvature, self._share)
        chosen = np.empty((len(rows), self.sums.shape[-1]), block.dtype)
        chosen[:, : block.shape[1]] = block[rows] - self._mean
        if self._intercept:
            chosen[:, -1] = 1
        chosen *= np.sqrt(weights)[:, None].astype(block.dtype)
        self._waiting[number].append(chosen)
        if self.sums.ndim == 2 or sum(map(len, self._waiting[number])) >= self.sums.shape[-1]:
            self._multiply(number)

    def finish(self, threads: RowThreads) -> Array:
        """Returns the sums, (K, size, size) or (K, size)."""
        threads.each(self._multiply, range(len(self.sums)))
        return self.sums

    def _multiply(self, number: int) -> None:
        """Multiplies the rows that wait: few blocks' together, since each product writes a whole matrix."""
        if not self._waiting[number]:
            return
        rows = np.concatenate(self._waiting[number])
        self._waiting[number].clear()
        self.sums[number] += np.einsum("ij,ij->j", rows, rows) if self.sums.ndim == 2 else rows.T @ rows


class RotatedDiagonals:
    """Diagonals of ``sum_i(h_i * outer(z_i, z_i))`` in a basis that several weightings h share; z is the rotated row.

    Where problems differ in their targets alone, the second derivatives of all are nearly diagonal in the directions of the
    features' principal components. To rotate a row once for all problems costs little beside a matrix for each of them.

    Args:
        count: Weightings.
        mean: (D,) of the rows.
        basis: (D, D) orthogonal, of the same dtype.
        centre: Subtract the mean.
        intercept: Append a one.
        share: Rows to use of all there are, a fraction.
    """

    def __init__(self, count: int, mean: Array, basis: Array, *, centre: bool, intercept: bool, share: float) -> None:
        self.sums = np.zeros((count, len(mean) + intercept))
        self._mean = mean if centre else np.zeros_like(mean)
        self._basis, self._intercept, self._share = basis, intercept, share

    def add(self, block: Array, curvature: Array) -> None:
        """Adds the rows of a block (m, D), weighted by ``curvature`` (K, m)."""
        totals = curvature.sum(axis=1, dtype=np.float64)
        relative = (curvature / np.where(totals > 0, totals, 1)[:, None]).sum(axis=0)
        rows, weights = _choose(relative, self._share)
        if not len(rows):
            return
        amounts = curvature[:, rows] * (weights / relative[rows])
        rotated = (block[rows] - self._mean) @ self._basis
        np.square(rotated, out=rotated)
        width = len(self._mean)
        self.sums[:, :width] += amounts.astype(block.dtype) @ rotated
        if self._intercept:
            self.sums[:, width] += amounts.sum(axis=1)

    def finish(self) -> list[Array]:
        """Returns the diagonals, (1, size) for each weighting."""
        return [row[None] for row in self.sums]


def share_of(rows: int, width: int) -> float:
    """Which fraction of the rows to measure."""
    return min(1.0, max(_LEAST_ROWS, _ROWS_PER_VALUE * width) / max(1, rows))


def _choose(amounts: Array, share: float) -> tuple[Array, Array]:
    """Returns rows, about ``share`` of all, as frequent as their amounts, and what each stands for."""
    total = float(amounts.sum(dtype=np.float64))
    if total <= 0:
        return np.empty(0, np.intp), amounts[:0]
    frequency = np.minimum(1, amounts * (share * len(amounts) / total)) if share < 1 else (amounts > 0).astype(float)
    passed = np.floor(np.cumsum(frequency, dtype=np.float64) + 0.5)
    rows = np.flatnonzero(np.diff(passed, prepend=0.0))
    return rows, amounts[rows] / frequency[rows]


@dataclass(frozen=True)
class Penalty:
    """A penalty's second derivative for one column of coefficients: ``diag(ridge) + pull * outer(lever, lever)``."""

    ridge: Array
    lever: Array
    pull: float

    @property
    def diagonal(self) -> Array:
        """(size,) diagonal."""
        return np.asarray(self.ridge + self.pull * self.lever**2)


class CholeskyPreconditioner:
    """Solves with one positive definite matrix for each row of a (K, size) gradient, or one for all rows.

    Kept as inverses of Cholesky factors: their product is positive definite however they are rounded, and a product
    with them is several times as fast as a substitution.
    """

    def __init__(self, sums: Array, C: float, penalty: Penalty) -> None:
        """Factorises ``C * sums + penalty``; overwrites the (K, size, size) sums."""
        diagonals = C * np.diagonal(sums, axis1=1, axis2=2).astype(np.float64) + penalty.diagonal
        self._scales = 1 / np.sqrt(np.where(diagonals > 0, diagonals, 1))  # to a diagonal of ones
        for matrix, scale in zip(sums, self._scales, strict=True):
            _scale_and_add(matrix, C, scale, penalty)
            _invert_factor(matrix)
        self._inverses = sums

    def __call__(self, gradient: Array) -> Array:
        """Returns the (K, size) solutions, float64."""
        scaled = (gradient * self._scales).astype(self._inverses.dtype)
        if len(self._inverses) == 1:
            solved = (scaled @ self._inverses[0].T) @ self._inverses[0]
        else:
            half = np.matmul(self._inverses, scaled[:, :, None])
            solved = np.matmul(self._inverses.transpose(0, 2, 1), half)[:, :, 0]
        return np.asarray(solved.astype(np.float64) * self._scales)


class DiagonalPreconditioner:
    """Divides a (K, size) gradient by the (K, size) or (1, size) diagonals of the second derivatives."""

    def __init__(self, sums: Array, C: float, penalty: Penalty) -> None:
        diagonals = C * sums.astype(np.float64) + penalty.diagonal
        self._diagonals = np.where(diagonals > 0, diagonals, 1)

    def __call__(self, gradient: Array) -> Array:
        """Returns the quotients, float64."""
        return np.asarray(gradient / self._diagonals)


def _scale_and_add(matrix: Array, C: float, scale: Array, penalty: Penalty) -> None:
    """Overwrites a matrix by ``scale * (C * matrix + penalty) * scale``, but for what the ridge adds to the diagonal."""
    matrix *= (C * scale[:, None]).astype(matrix.dtype)
    matrix *= scale.astype(matrix.dtype)
    if penalty.pull:
        lever = (np.sqrt(penalty.pull) * scale * penalty.lever).astype(matrix.dtype)
        matrix += np.outer(lever, lever)


def _invert_factor(matrix: Array) -> None:
    """Overwrites a symmetric matrix, whose diagonal is to be ones, by the inverse of its lower Cholesky factor."""
    factorise, invert = get_lapack_funcs(("potrf", "trtri"), (matrix,))
    for jitter in (10 * np.finfo(matrix.dtype).eps, 1e-5, 1e-3, 1e-1):
        matrix[np.diag_indices_from(matrix)] = 1 + jitter
        upper, failed = factorise(matrix.T, lower=False, clean=True)  # transposed views are what LAPACK takes as it is
        if not failed:
            inverse, _ = invert(upper, lower=False, overwrite_c=True)
            matrix[:] = inverse.T
            return
    matrix[:] = np.eye(len(matrix))
