"""Objectives, gradients and curvature of many linear problems, in one pass over the features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from featurepipe.display import bytes_of
from featurepipe.heads.blocks import (
    BLOCK_BYTES,
    Blocks,
    MappedBlocks,
    iterate,
    one_blas_thread,
    rows_per_block,
    working_dtype,
)
from featurepipe.heads.devices import BLOCK_BYTES as DEVICE_BLOCK_BYTES
from featurepipe.heads.devices import HOST, Device, device_of, on_device
from featurepipe.heads.inputs import FiniteBlocks
from featurepipe.heads.linear.joint import DTYPE as JOINT_DTYPE
from featurepipe.heads.linear.joint import JointPreconditioner, joint_bytes, pairs_of, passes_worth
from featurepipe.heads.linear.losses import (
    WIDEST,
    CholeskyPreconditioner,
    DiagonalPreconditioner,
    Loss,
    Measured,
    Penalty,
    RotatedDiagonals,
    SubspacePreconditioner,
    share_of,
)
from featurepipe.heads.linear.optimisers import Evaluate, Evaluation, Precondition
from featurepipe.heads.linear.row_sums import Linear, Products, Sums, Values
from featurepipe.heads.moments import moments_of
from featurepipe.heads.row_shards import RowShards, row_shards_of

Array = npt.NDArray[Any]

_CENTRE_FROM = 30  # |mean| / deviation from which float32 products of uncentred columns lose too many digits
_SMALL_BYTES = 32 << 20  # features that take no more as float64 are computed in it, whatever they are
_ROWS_PER_DIRECTION = 8  # that principal directions are found from
_ROWS_OF_DIAGONALS = 2048  # that diagonals are measured on: to a few hundredths, which a preconditioner does not feel
_ALONE_WIDTH = 2048  # up to which the principal directions take one thread a few seconds
_ALONE_VALUES = 1 << 18  # of points that are rotated
_LEAST_PATIENCE = {  # iterations; with all classes' curvature passes are in float64, slower than those in float32
    np.dtype(np.float32): 250,
    np.dtype(np.float64): 30,
}
_CURVATURE_BYTES = 3 << 30  # for preconditioners where the user has set no limit


@dataclass(frozen=True)
class FitProblem:
    """One objective: ``C * sum(weight * loss) + |W|^2 / 2 + intercept_penalty * |b|^2 / 2``.

    Attributes:
        fold: Which row weights.
        C: Of the objective.
        target: The positive class, or the label, of a loss of two classes.
    """

    fold: int
    C: float
    target: int = 1


@dataclass(frozen=True)
class Prepared:
    """Features as the passes read them.

    Attributes:
        shards: The features, centred if ``centred``, where they are, in memory if they fit.
        dtype: To compute in.
        mean: (D,) about which the problems are posed, in that dtype; zeros without an intercept.
        centred: Whether the features have it subtracted, or the pass must.
        variance: (D,) float64, of the columns about that mean; None where nobody has looked.
        device: Where they are multiplied.
    """

    shards: RowShards
    dtype: np.dtype[Any]
    mean: Array
    centred: bool
    variance: Array | None = None
    device: Device = HOST


def prepare(source: Blocks, *, intercept: bool, memory: int | str | None) -> Prepared:
    """Reads the features once: checks that they are finite, finds their means, and keeps them if they fit.

    Raises:
        ValueError: A feature is NaN or infinite.
    """
    small = 8 * source.shape[0] * source.shape[1] <= _SMALL_BYTES
    dtype = np.dtype(np.float64) if small else working_dtype(source.dtype)
    once = source.source if isinstance(source, FiniteBlocks) else source  # looked at once is enough
    there = on_device(once)
    moments = moments_of(source if there is None else there, memory=memory)
    source = once if there is None else there
    mean = (moments.mean if intercept else np.zeros_like(moments.mean)).astype(dtype)
    centred = intercept and dtype == np.float32 and bool((mean**2 > _CENTRE_FROM**2 * moments.variance).any())
    blocks: Blocks = MappedBlocks(source, partial(_less, mean=mean), len(mean), dtype) if centred else source
    variance = moments.variance + (moments.mean - mean) ** 2
    return Prepared(row_shards_of(blocks).kept(dtype, memory), dtype, mean, centred, variance, device_of(blocks))


def curvature_bytes(memory: int | None) -> int:
    """What the second derivatives of all problems may take together."""
    return _CURVATURE_BYTES if memory is None else memory // 2


def matrix_bytes(prepared: Prepared) -> int:
    """What one problem's second derivative takes while it is measured: the old, the new, and rows for it."""
    return 3 * (len(prepared.mean) + 1) ** 2 * prepared.dtype.itemsize


def joint_at_once(prepared: Prepared, loss: Loss, shape: tuple[int, ...], memory: int | None) -> int:
    """Of how many problems the second derivatives of all classes together may be had at one time; 0 if of none.

    Args:
        prepared: The features.
        loss: Of the problems.
        shape: Of one's point.
        memory: Bytes that the fit may take; None for no limit.
    """
    needed = joint_bytes(*shape) if loss.redundant and len(prepared.mean) <= WIDEST else None
    return 0 if needed is None else curvature_bytes(memory) // needed


def patience_of(prepared: Prepared, shape: tuple[int, ...]) -> int:
    """After how many iterations of L-BFGS the whole second derivative pays: at least those that cost as much as its factor."""
    worth = passes_worth(*shape, rows=max(1, prepared.shards.rows))
    return int(max(worth, _LEAST_PATIENCE[prepared.dtype]))


def curvature_worth(prepared: Prepared) -> float:
    """How many passes of a problem cost as much as to measure the curvature of each of its columns, in operations."""
    rows, width = max(1, prepared.shards.rows), len(prepared.mean)
    measured = share_of(rows, width) * rows
    return float((measured + 4 / 3 * width) * width / (4 * rows))


def _less(block: Array, *, mean: Array) -> Array:
    return np.asarray(block - mean)


class Passes:
    """Evaluates the objectives of problems on the same features.

    A point is (K, D + 1), or (K, D) without an intercept: coefficients, and the intercept of the centred features.
    """

    def __init__(
        self,
        prepared: Prepared,
        codes: npt.NDArray[np.integer[Any]],
        weights: Array,
        problems: Sequence[FitProblem],
        loss: Loss,
        *,
        intercept: bool,
        intercept_penalty: float,
        memory: int | str | None,
        basis: Array | None = None,
    ) -> None:
        """Stores what the passes need.

        Args:
            prepared: (n, D) features.
            codes: (n,) class numbers, or (L, n) of zeros and ones for L labels; sent to the rows once, as the weights are.
            weights: (F, n) row weights of each fold, zero for rows outside it.
            problems: What to minimise.
            loss: Of all problems.
            intercept: Whether there is one.
            intercept_penalty: Factor of half its square in the objective.
            memory: Limit for blocks and preconditioners, in bytes or as text; None for none.
            basis: (D, D) orthogonal; points are then coefficients in it, which changes no objective, and curvature is measured
                as diagonals there, for all problems together.
        """
        self.prepared, self.problems, self.loss = prepared, problems, loss
        self.rows = prepared.shards.beside(codes, np.asarray(weights, prepared.dtype))
        self.intercept, self.intercept_penalty = intercept, intercept_penalty
        limits = [limit for limit in (memory, self.rows.memory) if limit is not None]
        self.memory = min(map(bytes_of, limits), default=None)
        self.basis = basis
        mean = prepared.mean.astype(np.float64)
        self._mean = mean if basis is None else mean @ basis
        self.count = 0

    def __call__(self, numbers: list[int], requests: list[Evaluate]) -> list[Evaluation]:
        """Evaluates problems, given by their numbers, at the points asked for; in one pass, or two if some ask for products."""
        evaluations: dict[int, Evaluation] = {}
        for ask, wanted in ((self._values, False), (self._products, True)):
            places = [place for place, request in enumerate(requests) if (request.along is not None) == wanted]
            if places:
                self.count += 1
                problems = [self.problems[numbers[place]] for place in places]
                evaluations |= zip(places, ask(problems, [requests[place] for place in places]), strict=True)
        return [evaluations[place] for place in range(len(requests))]

    def _values(self, problems: list[FitProblem], requests: list[Evaluate]) -> list[Evaluation]:
        """Objectives and gradients, and curvature where it is asked for."""
        measures = [self._measure(request) for request in requests]
        together = None if self.basis is None else self._together
        pairs = any(map(self._is_joint, requests))
        classes = len(requests[0].point)
        order = self._order(problems, requests, 1 + (classes - 1) / 2 if pairs else 1)  # beside scores, a number a pair
        sums = self.rows.reduce(Values(**order, measures=measures, together=together, pairs=pairs))
        found = zip(problems, requests, sums.losses, self._gradients(sums, requests), sums.curvature, strict=True)
        return [self._evaluation(problem, asked, *parts) for problem, asked, *parts in found]

    def _products(self, problems: list[FitProblem], requests: list[Evaluate]) -> list[Evaluation]:
        """Second derivatives times directions."""
        along = np.stack([request.along for request in requests if request.along is not None])
        sums = self.rows.reduce(Products(**self._order(problems, requests, 2), towards=self._linear(along)))
        products = self._gradients(sums, requests)
        for problem, direction, product in zip(problems, along, products, strict=True):
            self._penalise(problem, direction, product)
        return [Evaluation(np.nan, product) for product in products]

    def _order(self, problems: list[FitProblem], requests: list[Evaluate], kinds: float = 1) -> dict[str, Any]:
        """What the rows are told of problems and where they stand, if they make so many numbers for each score."""
        points = np.stack([request.point for request in requests])
        return {
            "loss": self.loss,
            "at": self._linear(points),
            "folds": np.array([problem.fold for problem in problems]),
            "targets": np.array([problem.target for problem in problems]),
            "rows": self._block_rows(int(kinds * points.shape[0] * points.shape[1])),
            "dtype": self.prepared.dtype,
        }

    def _linear(self, points: Array) -> Linear:
        """What makes scores of blocks at these points, in the dtype of the features."""
        dtype, width = self.prepared.dtype, len(self.prepared.mean)
        posed = points[:, :, :width].reshape(-1, width)
        coefficients = (posed if self.basis is None else _rotated(posed, self.basis.T)).astype(dtype)
        bias = points[:, :, width].ravel() if self.intercept else np.zeros(len(coefficients))
        if not self.prepared.centred:
            bias = bias - coefficients.astype(np.float64) @ self.prepared.mean
        return Linear(coefficients, bias.astype(dtype)[:, None], points.shape[:2])

    def _gradients(self, sums: Sums, requests: list[Evaluate]) -> Array:
        """Sums over the rows as derivatives by the points, which are posed about the mean."""
        by_coefficient = sums.products
        if not self.prepared.centred:
            by_coefficient = by_coefficient - sums.totals[:, None] * self.prepared.mean
        if self.basis is not None:
            by_coefficient = _rotated(by_coefficient, self.basis)
        gradients = np.column_stack([by_coefficient, sums.totals]) if self.intercept else by_coefficient
        return gradients.reshape(len(requests), *requests[0].point.shape)

    def _evaluation(
        self, problem: FitProblem, asked: Evaluate, value: float, gradient: Array, curvature: Array | None
    ) -> Evaluation:
        """Adds the penalties."""
        penalty = self._penalise(problem, asked.point, gradient)
        value = float(problem.C * value + penalty)
        bound = 0.0
        if self.loss.redundant:  # the fits that stop by it
            bound = float(np.square(gradient[:, : len(self._mean)]).sum()) / 2  # the penalty's second derivative is 1
        if curvature is None:
            return Evaluation(value, gradient, bound=bound)
        joint = self._is_joint(asked)
        solve = self._preconditioner(problem, asked.point, curvature, joint=joint)
        return Evaluation(value, gradient, solve, bound)

    def _penalise(self, problem: FitProblem, point: Array, gradient: Array) -> float:
        """Multiplies a gradient by C and adds the penalties'; returns the penalties at the point."""
        width, mean = len(self._mean), self._mean
        coefficients = point[:, :width]
        penalty = np.vdot(coefficients, coefficients) / 2
        gradient *= problem.C
        gradient[:, :width] += coefficients
        if self.intercept and self.intercept_penalty:
            bias = point[:, width] - coefficients @ mean
            pull = self.intercept_penalty * bias
            penalty += np.vdot(pull, bias) / 2
            gradient[:, :width] -= pull[:, None] * mean
            gradient[:, width] += pull
        if self.loss.redundant:
            gradient -= gradient.mean(axis=0)
        return float(penalty)

    def _preconditioner(self, problem: FitProblem, point: Array, curvature: Array, *, joint: bool) -> Precondition:
        """The inverse of curvature and penalty."""
        mean = self._mean
        penalty = Penalty(np.ones(len(mean)), mean, 0.0)
        if self.intercept:
            penalty = Penalty(np.append(penalty.ridge, 0), np.append(-mean, 1), self.intercept_penalty)
        if self.basis is not None:
            return SubspacePreconditioner(curvature, problem.C, penalty, point)
        if joint:
            return JointPreconditioner(curvature, problem.C, penalty, len(point))
        kind = DiagonalPreconditioner if curvature.ndim == 2 else CholeskyPreconditioner
        solve: Precondition = kind(
            np.require(curvature, requirements="W"), problem.C, penalty
        )  # what came may be read-only
        return _zero_sum(solve) if self.loss.redundant else solve

    def _is_joint(self, request: Evaluate) -> bool:
        """Whether the curvature of all classes together is asked for and may be had."""
        if request.curvature != "joint":
            return False
        fit = joint_at_once(self.prepared, self.loss, request.point.shape, self.memory)
        return len(self.problems) <= fit

    def _measure(self, request: Evaluate) -> Callable[[], Measured] | None:
        """How to sum the curvature that a request asks for, as much of it as memory allows."""
        if not request.curvature:
            return None
        width, mean, joint = len(self.prepared.mean), self.prepared.mean, self._is_joint(request)
        allowed, matrix = curvature_bytes(self.memory), len(self.problems) * matrix_bytes(self.prepared)
        columns = 1 if request.curvature == "shared" else len(request.point)
        columns = columns if columns * matrix <= allowed else 1
        return partial(
            Measured,
            len(pairs_of(len(request.point))[0]) if joint else columns,
            mean.astype(JOINT_DTYPE) if joint else mean,
            centre=not self.prepared.centred,
            intercept=self.intercept,
            share=share_of(self.rows.rows, width),
            diagonal=not joint and (width > WIDEST or matrix > allowed),
            variance=self.prepared.variance,
        )

    @property
    def _together(self) -> Callable[[int], RotatedDiagonals]:
        """How to sum the curvature of several problems in the basis that they share."""
        dtype = self.prepared.dtype
        return partial(
            RotatedDiagonals,
            mean=self.prepared.mean,
            basis=np.asarray(self.basis, dtype),
            centre=not self.prepared.centred,
            intercept=self.intercept,
            share=min(1.0, _ROWS_OF_DIAGONALS / max(1, self.rows.rows)),
        )

    def _block_rows(self, columns: int) -> int:
        """Rows of a block: its scores take memory too."""
        limit = None if self.memory is None else self.memory // 4
        values = len(self.prepared.mean) + 4 * columns
        most = BLOCK_BYTES if self.prepared.device.is_host else DEVICE_BLOCK_BYTES
        return rows_per_block(values, self.prepared.dtype, limit, most=most)


def principal_basis(prepared: Prepared, memory: int | str | None = None) -> Array:
    """Returns the (D, D) principal directions of some of the rows, evenly spaced: a basis, orthogonal in float64."""
    count, width = prepared.shards.rows, len(prepared.mean)
    step = max(1, count // (_ROWS_PER_DIRECTION * width))
    centre = None if prepared.centred else prepared.mean
    scatter = prepared.shards.reduce(
        partial(_scatter, step=step, centre=centre, dtype=prepared.dtype, memory=memory, width=width)
    )
    with one_blas_thread if width <= _ALONE_WIDTH else nullcontext():
        return np.asarray(scipy.linalg.eigh(scatter, overwrite_a=True, check_finite=False)[1])


def _rotated(points: Array, basis: Array) -> Array:
    """Points in a basis, in one thread where that takes milliseconds."""
    with one_blas_thread if len(points) * len(basis) <= _ALONE_VALUES else one_blas_thread.lifted():
        return np.asarray(points @ basis)


def _scatter(
    blocks: Blocks, *, step: int, centre: Array | None, dtype: np.dtype[Any], memory: int | str | None, width: int
) -> Array:
    """Sums ``outer(x, x)`` of every so manieth row of a shard."""
    total = np.zeros((width, width))
    for _, block in iterate(blocks, memory=memory, dtype=dtype):
        rows = block[::step] if centre is None else block[::step] - centre
        total += rows.T @ rows
    return total


def _zero_sum(solve: Precondition) -> Precondition:
    """Keeps columns summing to zero: along that direction only the penalty has curvature, which no single column's shows."""

    def solve_within(gradient: Array) -> Array:
        solved = solve(gradient)
        return np.asarray(solved - solved.mean(axis=-2, keepdims=True))

    return solve_within
