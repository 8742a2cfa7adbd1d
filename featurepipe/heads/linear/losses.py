"""Losses of linear classifiers, for several problems at once, and curvature measured on few rows, as preconditioners.

Scores come as (P, K, m): problems, columns a problem, rows of the block. Rows lie innermost, so that sums over the few
columns run over whole vectors. They may be NumPy's or a device's (``heads.devices``), and so is what comes of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.linalg import get_lapack_funcs

from featurepipe.heads.blocks import RowThreads, one_blas_thread
from featurepipe.heads.devices import HOST, Device, namespace_of

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.integer[Any]]


class Loss(Protocol):
    """A convex loss of the scores; what the solver must know of it.

    Attributes:
        refresh: Iterations after which its curvature is measured anew.
        growth: Factor by which that number grows each time.
        trusted: How near the optimum curvature is believed further on; see ``OptimiserSettings``.
        redundant: Whether adding the same to all columns changes nothing; then the best columns sum to zero.
    """

    refresh: int
    growth: float
    trusted: float
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

    refresh, growth, trusted, redundant = 5, 1.5, 1e-3, True

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:  # noqa: ARG002
        """See ``Loss``."""
        xp = namespace_of(scores)
        rows = xp.arange(scores.shape[2], device=scores.device)
        scores -= xp.amax(scores, axis=1, keepdims=True)
        own = scores[:, codes, rows]
        xp.exp(scores, out=scores)
        total = xp.sum(scores, axis=1)
        values = _weighted_sums(xp.log(total) - own, weights)
        scores *= (weights / total)[:, None, :]
        scores[:, codes, rows] -= weights
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:  # noqa: ARG002
        """See ``Loss``; p (1 - p)."""
        likely = softmax(scores)
        curvature: Array = likely * (1 - likely) * weights
        return curvature

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:  # noqa: ARG002
        """See ``Loss``."""
        likely = softmax(scores)
        changes -= (likely * changes).sum(axis=-2, keepdims=True)
        changes *= likely
        changes *= weights[:, None, :]

    def start(self, class_weights: Array) -> Array:
        """See ``Loss``; logarithms of the class frequencies."""
        logarithms = np.log(class_weights / class_weights.sum())
        return np.asarray(logarithms - logarithms.mean())


class BinomialLoss:
    """The logistic loss of one column: the class ``target`` against the other, or the label ``target``."""

    refresh, growth, trusted, redundant = 5, 1.5, 1e-3, False

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:
        """See ``Loss``."""
        xp, zero = namespace_of(scores), _zero(scores)
        against = _signs(codes, targets, scores)
        xp.negative(against, out=against)
        amiss = scores[:, 0] * against  # minus the margin
        odds = xp.exp(-xp.abs(amiss))  # at most 1: nothing overflows
        losses = xp.log1p(odds)
        losses += xp.maximum(amiss, zero)
        values = _weighted_sums(losses, weights)
        odds += 1
        xp.minimum(amiss, zero, out=amiss)
        xp.exp(amiss, out=amiss)
        amiss /= odds
        amiss *= against
        xp.multiply(amiss, weights, out=scores[:, 0])
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:  # noqa: ARG002
        """See ``Loss``; p (1 - p)."""
        xp = namespace_of(scores)
        odds = xp.exp(-xp.abs(scores))
        curvature: Array = odds / xp.square(1 + odds) * weights
        return curvature

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:  # noqa: ARG002
        """See ``Loss``."""
        changes *= self.curvature(scores, codes, weights[:, None, :], 0)

    def start(self, class_weights: Array) -> Array:
        """See ``Loss``; the logarithm of the odds."""
        return np.asarray(np.log(class_weights[1:] / class_weights[:1]))


class SquaredHingeLoss:
    """The squared hinge ``max(0, 1 - sign * score) ** 2`` of one column: a class against all others, or a label."""

    refresh, growth, trusted, redundant = 2, 1.0, 0.0, False

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:
        """See ``Loss``."""
        xp, zero = namespace_of(scores), _zero(scores)
        sign = _signs(codes, targets, scores)
        short = xp.maximum(1 - sign * scores[:, 0], zero)
        weighted = short * weights
        values = _weighted_sums(short, weighted)
        weighted *= -2
        xp.multiply(weighted, sign, out=scores[:, 0])
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:
        """See ``Loss``; 2 for rows inside the margin, else 0 (the generalised second derivative)."""
        sign = _signs(codes, target, scores)
        curvature: Array = (sign * scores < 1) * (2 * weights)
        return curvature

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:
        """See ``Loss``."""
        sign = _signs(codes, targets, scores)
        changes *= (sign[:, None, :] * scores < 1) * (2 * weights[:, None, :])

    def start(self, class_weights: Array) -> Array:  # noqa: ARG002
        """See ``Loss``."""
        return np.zeros(1)


def _signs(codes: Codes, targets: Codes | int, like: Array) -> Array:
    """1 for rows of the problem's class, or that have its label where codes are (L, m); -1 for others; (P, m), or (m,) of one."""
    xp = namespace_of(like)
    wanted = targets if isinstance(targets, int | np.integer) else targets[:, None]
    positive = codes == wanted if codes.ndim == 1 else codes[targets] > 0
    signs: Array = xp.asarray(positive, dtype=like.dtype)
    signs *= 2
    signs -= 1
    return signs


def _zero(like: Array) -> Array:
    """() where an array is, of its dtype, as PyTorch's `maximum` takes no number."""
    zero: Array = namespace_of(like).zeros((), dtype=like.dtype, device=like.device)
    return zero


def _weighted_sums(values: Array, weights: Array) -> Array:
    """(P,) float64 sums of (P, m) values, weighted by (P, m) or (1, m)."""
    xp = namespace_of(values)
    sums: Array
    if xp is np:
        sums = np.einsum("pm,pm->p", values, weights, dtype=np.float64)
    else:
        sums = xp.sum(values * weights, axis=1, dtype=xp.float64)
    return sums


def softmax(scores: Array) -> Array:
    """Probabilities over the columns, the last axis but one."""
    xp = namespace_of(scores)
    likely = xp.exp(scores - xp.amax(scores, axis=-2, keepdims=True))
    probabilities: Array = likely / xp.sum(likely, axis=-2, keepdims=True)
    return probabilities


_TOGETHER = 4  # vectors from which products of matrices take less time than reading these again for each
_MANY_VALUES = 1 << 20  # of gradients that are multiplied with one matrix: 1,000 classes of 1,280 values
_ALONE_WIDTH = 2048  # of a matrix up to which threads that share its factorisation wait longer than they work
WIDEST = 4096  # values a row up to which whole matrices are measured; above it their diagonals
_ROWS_PER_VALUE = 4  # rows measured for each value a row: enough for a matrix that is close enough
_LEAST_ROWS = 4096
_ROTATED_AT_ONCE = 512  # rows
_MOMENTS = 3
_LEAST_REACH = 0.5
_SINGULAR = 1e-6  # least eigenvalue of a matrix of unit diagonal that is inverted


class Measured:
    """Sums of ``h * outer(x, x)`` over rows, one for each weighting h; x has a one appended for the intercept.

    Off the diagonal only some rows are used, taken with a frequency proportional to h and to how far out they lie, and
    weighted by its inverse: where most rows are fitted well, most of the curvature is that of a few, and that of a column which
    is nearly constant comes from the few rows where it is not (leverage scores: Drineas, Mahoney & Muthukrishnan 2006; here by
    the columns' variances alone). The choice is systematic, not random, so a fit repeats exactly. What the diagonals of all
    rows have beyond those of the chosen is added: a direction of which no chosen row tells would look as if it did not bend.

    Args:
        count: Weightings.
        mean: (D,) of the rows; its dtype is that of the sums.
        centre: Subtract it.
        intercept: Append a one.
        share: Rows to use of all there are, a fraction.
        diagonal: Sum the diagonals alone.
        variance: (D,) of the columns about the mean; without, all rows are taken to lie equally far out.
    """

    def __init__(
        self,
        count: int,
        mean: Array,
        *,
        centre: bool,
        intercept: bool,
        share: float,
        diagonal: bool,
        variance: Array | None = None,
    ) -> None:
        size = len(mean) + intercept
        self.sums = np.zeros((count, size) if diagonal else (count, size, size), mean.dtype)
        self._mean = mean if centre else np.zeros_like(mean)
        self._reach = None if variance is None else _reach(variance, mean.dtype)
        self._intercept, self._share = intercept, share
        self._waiting: list[list[Array]] = [[] for _ in range(count)]
        self._passed = [0.5] * count
        self._diagonals = np.zeros((count, size)) if share < 1 and not diagonal else None

    @property
    def samples(self) -> bool:
        """Whether matrices are measured, and not on all rows."""
        return self._diagonals is not None

    def squares(self, block: Array, device: Device = HOST) -> Array:
        """Squared distances (m, D) of the rows of a block (m, D) from the mean, where the block is."""
        away: Array = block - device.put(self._mean)
        device.namespace.square(away, out=away)
        return away

    def far_out(self, squares: Array, device: Device = HOST) -> Array:
        """How far out rows lie, (m,), by their squares: on average 1, at least a half, so that no row is passed over."""
        if self._reach is None:
            return np.ones(len(squares), self.sums.dtype)
        return device.get(_LEAST_REACH + (1 - _LEAST_REACH) * (squares @ device.put(self._reach, squares.dtype)))

    def add(
        self,
        number: int,
        block: Array,
        curvature: Array,
        far_out: Array,
        diagonal: Array | None = None,
        device: Device = HOST,
    ) -> None:
        """Adds the rows of a block (m, D) to one of the sums; other threads may add to others.

        Args:
            number: Which sum.
            block: (m, D) rows.
            curvature: (m,) their weights h.
            far_out: (m,) what ``far_out`` says of them.
            diagonal: (D,) of the sum over all of these rows, if it ``samples``.
            device: Where the block is; all else is NumPy's.
        """
        if self._diagonals is not None and diagonal is not None:
            self._diagonals[number, : len(diagonal)] += diagonal
            if self._intercept:
                self._diagonals[number, -1] += curvature.sum(dtype=np.float64)
        rows, weights, self._passed[number] = _choose(curvature * far_out, self._share, self._passed[number])
        weights = weights / far_out[rows]
        chosen = np.empty((len(rows), self.sums.shape[-1]), self.sums.dtype)
        chosen[:, : block.shape[1]] = device.take(block, rows) - self._mean
        if self._intercept:
            chosen[:, -1] = 1
        chosen *= np.sqrt(weights)[:, None].astype(chosen.dtype)
        self._waiting[number].append(chosen)
        if self.sums.ndim == 2 or sum(map(len, self._waiting[number])) >= self.sums.shape[-1]:
            self._multiply(number)

    def finish(self, threads: RowThreads) -> Array:
        """Returns the sums, (K, size, size) or (K, size)."""
        threads.each(self._multiply, range(len(self.sums)))
        if self._diagonals is not None:
            for matrix, whole in zip(self.sums, self._diagonals, strict=True):
                diagonal = np.einsum("ii->i", matrix)  # a view
                diagonal += np.maximum(0, whole - diagonal).astype(matrix.dtype)
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
    features' principal components. To rotate a row once for all problems costs little beside a matrix for each of them. The
    diagonals are followed by the moments that ``SubspacePreconditioner`` takes, which are of all rows.

    Args:
        count: Weightings.
        mean: (D,) of the rows.
        basis: (D, D) orthogonal, of the same dtype.
        centre: Subtract the mean.
        intercept: Append a one.
        share: Rows to use of all there are, a fraction.
    """

    def __init__(self, count: int, mean: Array, basis: Array, *, centre: bool, intercept: bool, share: float) -> None:
        self.sums = np.zeros((count, len(mean) + intercept + _MOMENTS))
        self._mean = mean if centre else np.zeros_like(mean)
        self._basis, self._intercept, self._share = basis, intercept, share
        self._waiting: list[tuple[Array, Array]] = []
        self._passed = 0.5

    @staticmethod
    def moments(curvature: Array, scores: Array) -> Array:
        """The (K, 3) sums of h, h s and h s * s over a block's rows, for (K, m) curvature h and scores s."""
        first = curvature * scores
        sums = [curvature.sum(axis=1, dtype=np.float64), first.sum(axis=1, dtype=np.float64)]
        return np.stack([*sums, np.einsum("km,km->k", first, scores, dtype=np.float64)], axis=1)

    def add(self, block: Array, curvature: Array, moments: Array, device: Device = HOST) -> None:
        """Adds the rows of a block (m, D) on a device, weighted by ``curvature`` (K, m), and their moments."""
        self.sums[:, -_MOMENTS:] += moments
        totals = moments[:, 0]
        relative = (1 / np.where(totals > 0, totals, np.inf)).astype(curvature.dtype) @ curvature
        rows, weights, self._passed = _choose(relative, self._share, self._passed)
        self._waiting.append((device.take(block, rows) - self._mean, curvature[:, rows] * (weights / relative[rows])))
        if sum(len(rows) for rows, _ in self._waiting) >= _ROTATED_AT_ONCE:
            self._rotate()

    def _rotate(self) -> None:
        """Rotates the rows that wait: few blocks' together, since each product reads the whole basis."""
        rotated = np.concatenate([rows for rows, _ in self._waiting]) @ self._basis
        amounts = np.concatenate([amounts for _, amounts in self._waiting], axis=1).astype(rotated.dtype, copy=False)
        self._waiting.clear()
        np.square(rotated, out=rotated)
        self.sums[:, : rotated.shape[1]] += amounts @ rotated

    def finish(self) -> list[Array]:
        """Returns the diagonals and moments, (1, size + 3) for each weighting."""
        if self._waiting:
            self._rotate()
        if self._intercept:
            self.sums[:, -_MOMENTS - 1] = self.sums[:, -_MOMENTS]
        return [row[None] for row in self.sums]


def _reach(variance: Array, dtype: np.dtype[Any]) -> Array:
    """(D,) factors of a row's squared distances from the mean: their sum is 1 on average."""
    varies = variance > 0
    shares = np.where(varies, 1 / np.where(varies, variance, 1), 0) / max(1, np.count_nonzero(varies))
    return np.asarray(shares, dtype)


def share_of(rows: int, width: int) -> float:
    """Which fraction of the rows to measure."""
    return min(1.0, max(_LEAST_ROWS, _ROWS_PER_VALUE * width) / max(1, rows))


def _choose(amounts: Array, share: float, passed: float) -> tuple[Array, Array, float]:
    """Returns rows, about ``share`` of all, as frequent as their amounts, and what each stands for.

    What is left over of a row (``passed``, 0.5 at first) comes last; it is handed in with the next rows.
    """
    total = float(amounts.sum(dtype=np.float64))
    if total * float(np.finfo(amounts.dtype).max) <= share * len(amounts):  # nothing, or too little for its inverse
        return np.empty(0, np.intp), amounts[:0], passed
    frequency = np.minimum(1, amounts * (share * len(amounts) / total)) if share < 1 else (amounts > 0).astype(float)
    up_to = passed + np.cumsum(frequency, dtype=np.float64)
    rows = np.flatnonzero(np.diff(np.floor(up_to), prepend=np.floor(passed)))
    return rows, amounts[rows] / frequency[rows], float(up_to[-1] % 1)


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
    """Solves with one positive definite matrix for each row of (K, size) gradients, or one for all rows.

    Kept as inverses of Cholesky factors: their product is positive definite however they are rounded, and a product
    with them is several times as fast as a substitution.
    """

    def __init__(self, sums: Array, C: float, penalty: Penalty) -> None:
        """Factorises ``C * sums + penalty``; overwrites the (K, size, size) sums."""
        diagonals = C * np.diagonal(sums, axis1=1, axis2=2).astype(np.float64) + penalty.diagonal
        self._scales = 1 / np.sqrt(np.where(diagonals > 0, diagonals, 1))  # to a diagonal of ones
        alone = sums.shape[-1] <= _ALONE_WIDTH  # LAPACK holds Python's lock: threads of ours would wait for each other
        with one_blas_thread if alone else one_blas_thread.lifted():
            for matrix, scale in zip(sums, self._scales, strict=True):
                _scale_and_add(matrix, C, scale, penalty)
                _invert_factor(matrix)
        self._inverses = sums

    def __call__(self, gradient: Array) -> Array:
        """Returns the (..., K, size) solutions, float64."""
        scaled = (gradient * self._scales).astype(self._inverses.dtype)
        if len(self._inverses) == 1:
            flat = scaled.reshape(-1, scaled.shape[-1])
            with one_blas_thread.lifted() if flat.size > _MANY_VALUES else nullcontext():
                solved = (flat @ self._inverses[0].T) @ self._inverses[0]
        else:
            vectors = scaled.reshape(-1, *scaled.shape[-2:])
            together = [vectors] if len(vectors) >= _TOGETHER else vectors[:, None]
            solved = np.concatenate([self._solved(some) for some in together])
        return np.asarray(solved.reshape(gradient.shape).astype(np.float64) * self._scales)

    def _solved(self, vectors: Array) -> Array:
        """With a matrix for each row, of (v, K, size) scaled vectors."""
        half = np.matmul(self._inverses, np.ascontiguousarray(vectors.transpose(1, 2, 0)))
        return np.asarray(np.matmul(self._inverses.transpose(0, 2, 1), half).transpose(2, 0, 1))


class DiagonalPreconditioner:
    """Divides a (K, size) gradient by the (K, size) or (1, size) diagonals of the second derivatives."""

    def __init__(self, sums: Array, C: float, penalty: Penalty) -> None:
        diagonals = C * sums.astype(np.float64) + penalty.diagonal
        self._diagonals = np.where(diagonals > 0, diagonals, 1)

    def __call__(self, gradient: Array) -> Array:
        """Returns the (..., K, size) quotients, float64."""
        return np.asarray(gradient / self._diagonals)


class SubspacePreconditioner:
    """Diagonals, corrected in the plane of the coefficients and the intercept.

    Along the coefficients the curvature h of a loss varies most. If rows were normal, ``sum(h z z')`` would be a multiple of
    their scatter plus a matrix of rank two, of the scatter times the coefficients and the intercept (Stein 1981, "Estimation
    of the mean of a multivariate normal distribution": E[h z] and E[h z z'] by the derivatives of h). The matrix here agrees
    with the second derivative in that plane and with the diagonals in what is conjugate to it; it is positive definite. For
    a rare label, whose coefficients and intercept go together, it saves half of the iterations.
    """

    def __init__(self, sums: Array, C: float, penalty: Penalty, point: Array) -> None:
        """Takes the (1, size + 3) sums of ``RotatedDiagonals`` at a point (1, size)."""
        diagonal = C * sums[0, :-_MOMENTS] + penalty.diagonal
        self._diagonal = np.where(diagonal > 0, diagonal, 1)
        plane, inner = _plane(point[0], len(penalty.lever) - int(np.count_nonzero(penalty.ridge)), sums[0, -_MOMENTS:])
        exact = C * inner + (plane * penalty.ridge) @ plane.T
        exact += penalty.pull * np.outer(plane @ penalty.lever, plane @ penalty.lever)
        rough = (plane * self._diagonal) @ plane.T
        fine = all(np.linalg.eigvalsh(_unit(one))[0] > _SINGULAR for one in (exact, rough)) if len(plane) else False
        self._plane = plane if fine else plane[:0]
        self._change = np.linalg.inv(exact) - np.linalg.inv(rough) if fine else np.zeros((0, 0))

    def __call__(self, gradient: Array) -> Array:
        """Returns the (..., 1, size) solutions, float64."""
        return np.asarray(gradient / self._diagonal + (gradient @ self._plane.T) @ self._change @ self._plane)


def _plane(point: Array, intercepts: int, moments: Array) -> tuple[Array, Array]:
    """The directions of the coefficients and of the intercept, if there are some, and the second derivative in their plane."""
    width = len(point) - intercepts
    bias = point[width] if intercepts else 0.0
    zeroth, first, second = moments
    along = first - bias * zeroth  # of h t, where t is the score without the intercept
    square = second - 2 * bias * first + bias**2 * zeroth
    inner = np.array([[square, along], [along, zeroth]])
    plane = np.zeros((2, len(point)))
    plane[0, :width] = point[:width]
    plane[1, width:] = 1
    used = np.flatnonzero(np.abs(plane).sum(axis=1) * np.diagonal(inner) > 0)
    return plane[used], inner[np.ix_(used, used)]


def _unit(matrix: Array) -> Array:
    """A matrix scaled to a diagonal of ones; of one that has none of its own, nothing that is finite."""
    scales = np.sqrt(np.maximum(np.diagonal(matrix), 1e-300))
    return np.asarray(matrix / np.outer(scales, scales))


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
