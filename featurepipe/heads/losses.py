"""Losses of linear classifiers on scores, for several problems at once, each with its own row weights.

Scores come as (P, K, m): problems, columns a problem, rows of the block. Rows lie innermost, so that sums over the few
columns run over whole vectors.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import expit

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
            codes: (m,) class number of each row.
            weights: (P, m) weight of each row in each problem.
            targets: (P,) which class is the positive one, for losses of two classes.

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
    """The logistic loss of one column: the class ``target`` against the other."""

    refresh, growth, redundant = 5, 1.5, False

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:
        """See ``Loss``."""
        score, positive = scores[:, 0], codes == targets[:, None]
        losses = np.logaddexp(0, np.where(positive, -score, score))
        values: Array = np.einsum("pm,pm->p", losses, weights, dtype=np.float64)
        scores[:, 0] = weights * (expit(score) - positive)
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:  # noqa: ARG002
        """See ``Loss``; p (1 - p)."""
        return np.asarray(expit(scores) * expit(-scores) * weights)

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:  # noqa: ARG002
        """See ``Loss``."""
        changes *= expit(scores) * expit(-scores) * weights[:, None, :]

    def start(self, class_weights: Array) -> Array:
        """See ``Loss``; the logarithm of the odds."""
        return np.asarray(np.log(class_weights[1:] / class_weights[:1]))


class SquaredHingeLoss:
    """The squared hinge ``max(0, 1 - sign * score) ** 2`` of one column: the class ``target`` against all others."""

    refresh, growth, redundant = 2, 1.0, False

    def residuals(self, scores: Array, codes: Codes, weights: Array, targets: Codes) -> Array:
        """See ``Loss``."""
        sign = np.where(codes == targets[:, None], 1, -1).astype(scores.dtype)
        short = np.maximum(1 - sign * scores[:, 0], 0)
        weighted = short * weights
        values: Array = np.einsum("pm,pm->p", short, weighted, dtype=np.float64)
        scores[:, 0] = -2 * sign * weighted
        return values

    def curvature(self, scores: Array, codes: Codes, weights: Array, target: int) -> Array:
        """See ``Loss``; 2 for rows inside the margin, else 0 (the generalised second derivative)."""
        sign = np.where(codes == target, 1, -1)
        return np.asarray((sign * scores < 1) * (2 * weights))

    def bend(self, scores: Array, changes: Array, codes: Codes, weights: Array, targets: Codes) -> None:
        """See ``Loss``."""
        sign = np.where(codes == targets[:, None], 1, -1)
        changes *= (sign[:, None, :] * scores < 1) * (2 * weights[:, None, :])

    def start(self, class_weights: Array) -> Array:  # noqa: ARG002
        """See ``Loss``."""
        return np.zeros(1)


def _softmax(scores: Array) -> Array:
    """Probabilities over the columns, the last axis but one."""
    likely = np.exp(scores - scores.max(axis=-2, keepdims=True))
    return np.asarray(likely / likely.sum(axis=-2, keepdims=True))
