"""The whole second derivative of a softmax problem, all classes together, as a preconditioner: measured by pairs of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import get_lapack_funcs

from featurepipe.heads.blocks import one_blas_thread
from featurepipe.heads.linear.losses import Penalty

Array = npt.NDArray[Any]

DTYPE = np.dtype(np.float32)
"""Of what is measured and factorised: it steers conjugate gradients, whose products are exact."""

_MOST_UNKNOWNS = 16_384  # of a system that is factorised: 1 GB, and a minute on one core
_MOST_CLASSES = 30  # 435 pairs: each costs a tenth of a millisecond for every piece of the rows


def pairs_of(classes: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The first and the second class of each pair."""
    first, second = np.triu_indices(classes, 1)
    return first, second


def pair_curvature(likely: Array, weights: Array) -> Array:
    """How much a row's loss bends between two classes: ``p_k p_l``, weighted; (pairs, m) of (K, m) probabilities."""
    first, second = pairs_of(len(likely))
    curvature: Array = likely[first] * likely[second] * weights
    return curvature


def joint_bytes(classes: int, size: int) -> int | None:
    """What one problem's second derivative takes while it is measured: the old, the new, and its pairs; None if it is too large.

    Args:
        classes: K.
        size: Coefficients and intercept of one class.
    """
    unknowns = (classes - 1) * size
    if unknowns > _MOST_UNKNOWNS or classes > _MOST_CLASSES:
        return None
    return DTYPE.itemsize * (2 * unknowns**2 + (len(pairs_of(classes)[0]) + 1) * size**2)


def passes_worth(classes: int, size: int, *, rows: int) -> float:
    """How many passes cost as much as to factorise one problem's second derivative once, in operations.

    Args:
        classes: K.
        size: Coefficients and intercept of one class.
        rows: Of a pass.
    """
    return float(((classes - 1) * size) ** 3 / 3 / (4 * rows * classes * size))


class JointPreconditioner:
    """Solves with ``C * sum_i(h_i * x_i x_i') + penalty`` where h_i is the (K, K) second derivative of a row's softmax loss.

    ``diag(p) - p p'`` is the sum over pairs of classes k and l of ``p_k p_l (e_k - e_l)(e_k - e_l)'``, a graph's Laplacian. So
    a matrix for each pair says all, rows of each pair can be sampled by themselves (few rows waver between two given
    classes), and what comes out is positive definite however they are. The classes' own blocks alone, which
    ``CholeskyPreconditioner`` takes, know that a class may win or lose, but not that two classes which are mistaken for one
    another may do so together: along such directions they promise hundreds of times too little.

    Columns sum to zero. The last class is eliminated, for which the penalty of the others becomes that of
    ``sum_kl (d_kl - 1 / K) w_k w_l``.
    """

    def __init__(self, sums: Array, C: float, penalty: Penalty, classes: int) -> None:
        """Factorises.

        Args:
            sums: (pairs, size, size) ``sum_i(p_k p_l x x')``, pairs in the order of ``pairs_of``.
            C: Of the objective.
            penalty: Of one class's coefficients.
            classes: K.
        """
        size = sums.shape[1]
        self._classes, self._size = classes, size
        matrix = _laplacian(sums, classes)
        matrix *= DTYPE.type(C)
        for row in range(classes - 1):
            for column in range(classes - 1):
                _add_penalty(_block(matrix, row, column, size), penalty, (row == column) - 1 / classes)
        diagonal = np.diagonal(matrix).astype(np.float64)
        self._scales = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))  # to a diagonal of ones
        scales = self._scales.astype(DTYPE)
        matrix *= scales[:, None]
        matrix *= scales
        with one_blas_thread.lifted():
            self._factor = _factor(matrix)

    def __call__(self, gradient: Array) -> Array:
        """Returns the (..., K, size) solutions, float64, for gradients whose columns sum to zero."""
        [solve] = get_lapack_funcs(("potrs",), (self._factor,))
        scaled = gradient[..., :-1, :].reshape(-1, len(self._scales)) * self._scales
        with one_blas_thread.lifted():
            solved, _ = solve(self._factor, scaled.T.astype(DTYPE), lower=False)
        found = np.zeros(gradient.shape)
        found[..., :-1, :] = (solved.T * self._scales).reshape(*gradient.shape[:-2], self._classes - 1, self._size)
        return np.asarray(found - found.mean(axis=-2, keepdims=True))


def _laplacian(sums: Array, classes: int) -> Array:
    """((K - 1) * size, (K - 1) * size) of the pairs' matrices, without the last class."""
    size = sums.shape[1]
    matrix = np.zeros(((classes - 1) * size, (classes - 1) * size), DTYPE)
    for first, second, found in zip(*pairs_of(classes), sums, strict=True):
        _block(matrix, first, first, size)[:] += found
        if second < classes - 1:
            _block(matrix, second, second, size)[:] += found
            _block(matrix, first, second, size)[:] -= found
            _block(matrix, second, first, size)[:] -= found
    return matrix


def _block(matrix: Array, row: int, column: int, size: int) -> Array:
    return matrix[row * size : (row + 1) * size, column * size : (column + 1) * size]


def _add_penalty(block: Array, penalty: Penalty, factor: float) -> None:
    block[np.diag_indices_from(block)] += (factor * penalty.ridge).astype(DTYPE)
    if penalty.pull:
        block += (factor * penalty.pull * np.outer(penalty.lever, penalty.lever)).astype(DTYPE)


def _factor(matrix: Array) -> Array:
    """The upper Cholesky factor of a symmetric matrix whose diagonal is to be ones; overwrites it."""
    [factorise] = get_lapack_funcs(("potrf",), (matrix,))
    diagonal = np.diag_indices_from(matrix)
    for jitter in (10 * np.finfo(DTYPE).eps, 1e-5, 1e-3, 1e-1):
        matrix[diagonal] = 1 + jitter
        factor, failed = factorise(matrix.T, lower=False, clean=False, overwrite_a=True)  # transposed, it is not copied
        if not failed:
            return np.asarray(factor)
        for row in range(len(matrix)):  # one triangle is overwritten, the other has still what it was
            matrix[row, :row] = matrix[:row, row]
    return np.asarray(np.eye(len(matrix), dtype=DTYPE))
