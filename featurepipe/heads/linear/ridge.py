"""Ridge classification (of several labels, too) and regression, exact, from one pass over features; linear SVR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.linalg
from sklearn.base import BaseEstimator
from sklearn.svm import LinearSVR

from featurepipe.display import bytes_of
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, iterate
from featurepipe.heads.inputs import (
    BlockClassifier,
    BlockRegressor,
    Floats,
    labels_from,
    linear_scores,
    regression_data,
    training_data,
)
from featurepipe.heads.label_matrix import LinearScores, per_label
from featurepipe.heads.linear.passes import curvature_bytes
from featurepipe.heads.moments import gram_of, moments_of
from featurepipe.heads.neighbours import rows_kept
from featurepipe.heads.row_shards import row_shards_of


class BlockRidgeClassifier(BlockClassifier, BaseEstimator):  # type: ignore[misc]
    """Least squares on targets of +1 and -1 with an L2 penalty, the intercept free: ``RidgeClassifier`` for blocks.

    Minimises for each class ``sum_i(w_i * (f(x_i) - s_i)^2) + alpha * |w|^2``, where s is 1 for rows of the class and -1 for
    others. The normal equations need only the D x D scatter and the class means (Hoerl & Kennard 1970, "Ridge regression"), so
    one streamed pass gives the exact optimum for any number of rows. The result is that of scikit-learn's ``RidgeClassifier``
    to rounding; where the equations are singular (``alpha=0`` and dependent columns), it is the smallest solution, as there.

    Args:
        alpha: Strength of the penalty, >= 0.
        class_weight: None, ``"balanced"`` or a dict from label to weight.
        memory: What the blocks alive at one time may take (bytes or "512MB"); 8 * D * D bytes for the scatter are extra.

    Attributes:
        classes_: (K,) labels.
        coef_: (K, D) float64; (1, D) for two classes.
        intercept_: (K,) or (1,) float64.
        n_features_in_: D.
    """

    def __init__(self, alpha: float = 1.0, *, class_weight: Any = None, memory: int | str | None = None) -> None:
        self.alpha = alpha
        self.class_weight = class_weight
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fits in one pass.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None takes those of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: One class only, a value that is not finite, or a negative alpha.
        """
        _check_alpha(self.alpha)
        data = training_data(self, X, y, sample_weight=sample_weight, class_weight=self.class_weight)
        self.classes_ = data.classes
        gram = gram_of(data.blocks, data.codes, len(data.classes), data.weights, memory=self.memory)
        # sum of weight * (x - mean) * target, of targets that are +1 for the class and -1 for the others
        moments = 2 * gram.class_weights[:, None] * (gram.class_means - gram.mean)
        targets = 2 * gram.class_weights / gram.weight - 1
        if len(data.classes) == 2:
            moments, targets = moments[1:], targets[1:]
        self.coef_ = solve_normal(gram.scatter, self.alpha, moments)
        self.intercept_ = targets - self.coef_ @ gram.mean
        return self

    def decision_function(self, X: Any) -> Array:
        """Returns the fitted targets: (n, K), or (n,) for two classes, positive for the second."""
        return linear_scores(self, X, memory=self.memory)

    def predict(self, X: Any) -> Array:
        """Returns (n,) labels."""
        return labels_from(self.decision_function(X), self.classes_)


class BlockRidge(BlockRegressor, BaseEstimator):  # type: ignore[misc]
    """Least squares with an L2 penalty, the intercept free: scikit-learn's ``Ridge`` for blocks.

    Minimises ``sum_i(w_i * (x_i . b + c - y_i)^2) + alpha * |b|^2``. The normal equations
    ``(S + alpha * I) b = sum_i(w_i * (x_i - mean) * y_i)`` need only the scatter S and D products with the target (Hoerl &
    Kennard 1970, "Ridge regression"), which one streamed pass sums, so that the result is exact for any number of rows and is
    ``Ridge``'s to rounding. Where the equations are singular, it is the smallest solution.

    Args:
        alpha: Strength of the penalty, >= 0.
        memory: What the blocks alive at one time may take (bytes or "512MB"); 8 * D * D bytes for the scatter are extra.

    Attributes:
        coef_: (D,) float64.
        intercept_: float.
        n_features_in_: D.
    """

    def __init__(self, alpha: float = 1.0, *, memory: int | str | None = None) -> None:
        self.alpha = alpha
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fits in one pass.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) numbers; None takes the targets of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: A target that is missing, infinite or no number, the same number in every row, a feature that is not
                finite, or a negative alpha.
        """
        _check_alpha(self.alpha)
        data = regression_data(self, X, y, sample_weight=sample_weight)
        centred = data.targets - data.mean
        gram = gram_of(data.blocks, None, 0, data.weights, targets=centred[None], memory=self.memory)
        self.coef_ = solve_normal(gram.scatter, self.alpha, gram.target_products)[0]
        self.intercept_ = float(data.mean - self.coef_ @ gram.mean)
        return self

    def predict(self, X: Any) -> Array:
        """Returns (n,) float64 numbers."""
        return linear_scores(self, X, memory=self.memory, dtype=np.float64)


def _check_alpha(alpha: float) -> None:
    if not alpha >= 0:
        raise UsageError(f"alpha={alpha!r} must be 0 or more")


def solve_normal(scatter: Floats, alpha: float, moments: Floats) -> Floats:
    """Solves ``(scatter + alpha * I) b = m`` for each row m of (K, D) moments; the smallest solution where it is singular."""
    system = scatter + alpha * np.eye(len(scatter))
    try:
        factor = scipy.linalg.cho_factor(system, check_finite=False)
        diagonal = np.abs(np.diagonal(factor[0]))
        if diagonal.min() > 1e-7 * diagonal.max():
            return np.asarray(scipy.linalg.cho_solve(factor, moments.T, check_finite=False).T)
    except scipy.linalg.LinAlgError:
        pass
    values, vectors = scipy.linalg.eigh(system, check_finite=False)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    inverse = np.where(kept, 1 / np.where(kept, values, 1), 0)
    return np.asarray((moments @ vectors * inverse) @ vectors.T)


class BlockLinearSVR(BlockRegressor, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's ``LinearSVR`` of the standardised target, in memory; it predicts on arrays and ``Blocks``.

    Minimises ``C * sum_i(w_i * max(0, |x_i . b + c - z_i| - epsilon)^2) + (|b|^2 + c^2) / 2``, where z is the target less its
    (weighted) mean, divided by its (weighted) standard deviation: so C and epsilon mean the same for ages and for prices, and
    the penalty on the intercept, which liblinear has (Fan et al. 2008), does no harm. Coefficients are given in the target's
    own unit. The squared loss is solved in the primal (Ho & Lin 2012, "Large-scale linear support vector regression"), which
    converges in seconds where the dual of the absolute loss does not.

    Args:
        C: Inverse strength of the penalty, > 0.
        epsilon: Errors that cost nothing, in standard deviations of the target.
        tol: Of liblinear's stopping rule.
        max_iter: Most iterations.
        memory: What the training rows may take (bytes or "2GB"); None for no bound.

    Attributes:
        coef_: (D,) float64.
        intercept_: float.
        n_iter_: Iterations.
        n_features_in_: D.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        epsilon: float = 0.1,
        tol: float = 1e-4,
        max_iter: int = 10_000,
        memory: int | str | None = None,
    ) -> None:
        self.C = C
        self.epsilon = epsilon
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Reads all rows and fits.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) numbers; None takes the targets of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: A target that is missing, infinite or no number, the same number in every row, a feature that is not
                finite, more rows than ``memory`` holds, or a wrong parameter.
        """
        if not self.C > 0 or not self.epsilon >= 0:
            raise UsageError(f"C={self.C!r} must be positive and epsilon={self.epsilon!r} must be 0 or more")
        data = regression_data(self, X, y, sample_weight=sample_weight)
        rows = rows_kept(data.blocks, self.memory, "linear-svm of a number", "ridge, xgboost")
        spread = float(np.sqrt(np.average((data.targets - data.mean) ** 2, weights=data.weights)))
        settings = {name: value for name, value in self.get_params().items() if name != "memory"}
        machine = LinearSVR(loss="squared_epsilon_insensitive", dual=False, **settings).fit(
            rows, (data.targets - data.mean) / spread, data.weights
        )
        self.coef_ = spread * np.asarray(machine.coef_, np.float64).reshape(-1)
        self.intercept_ = spread * float(np.ravel(machine.intercept_)[0]) + data.mean
        self.n_iter_ = machine.n_iter_
        return self

    def predict(self, X: Any) -> Array:
        """Returns (n,) float64 numbers."""
        return linear_scores(self, X, memory=self.memory, dtype=np.float64)


class MultilabelRidge(LinearScores):
    """Least squares on +1 and -1 with an L2 penalty for several labels of each row, exact, from arrays or ``Blocks``.

    Minimises for each label k ``sum_i(w_i * (f_k(x_i) - s_ik)^2) + alpha_k * |w_k|^2`` over the rows where the label is known,
    where s is 1 for rows that have it and -1 for others; the intercept is free. Labels that are known for the same rows share
    one scatter; that of others is the scatter of all rows less that of the unknown ones, or the sum over the known ones,
    whichever are fewer. All are summed in the same pass, or in as many as ``memory`` asks for. Where nothing is unknown the
    result is that of scikit-learn's ``RidgeClassifier`` to rounding.

    Args:
        alpha: Strength of the penalty, >= 0: a number, or (K,) one for each label.
        class_weight: None, "balanced" (for each label, rows that have it weigh as much as those that do not), or a dict of
            factors for 0 and 1.
        label_names: (K,); by default the columns of a data frame, those of the features, or numbers from 0.
        one_sided: What to do with a label that every known row has, or none: "error", or "drop" to leave it out with a
            warning.
        memory: What blocks, and the 8 * D * D bytes of each scatter, may take (bytes or "512MB"); one scatter always.

    Attributes:
        classes_: (K,) names of the labels.
        coef_: (K, D) float64.
        intercept_: (K,).
        dropped_labels_: Names of the labels left out.
        n_features_in_: D.
    """

    def __init__(
        self,
        alpha: Any = 1.0,
        *,
        class_weight: Any = None,
        label_names: Sequence[str] | None = None,
        one_sided: str = "error",
        memory: int | str | None = None,
    ) -> None:
        self.alpha = alpha
        self.class_weight = class_weight
        self.label_names = label_names
        self.one_sided = one_sided
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fits all labels.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n, K) labels: 1 present, 0 absent, NaN unknown; None takes those of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: Features or labels that cannot be learned from, or a negative alpha.
        """
        data = self._learn(X, y, sample_weight)
        alphas = per_label("alpha", self.alpha, data.kept, least=0.0)
        weights = data.row_weights(self.class_weight)
        patterns, pattern = np.unique(weights, axis=0, return_inverse=True)
        pattern = np.broadcast_to(pattern.reshape(-1), len(data.names))
        mean = moments_of(data.blocks, memory=self.memory).mean
        signs = np.where(data.positive > 0, 1, -1).astype(np.int8)
        width = len(mean)
        allowed = curvature_bytes(None if self.memory is None else bytes_of(self.memory))
        step = max(1, allowed // (8 * (width + 1) ** 2) - 1)
        self.coef_, self.intercept_ = np.zeros((len(data.names), width)), np.zeros(len(data.names))
        for first in range(0, len(patterns), step):
            chosen = patterns[first : first + step]
            members = [np.flatnonzero(pattern == first + number) for number in range(len(chosen))]
            shards = row_shards_of(data.blocks).beside(chosen, signs)
            sums = shards.reduce(partial(_normal_sums, members=members, mean=mean, memory=self.memory))
            for scatter, labels, moments in zip(sums.scatters, members, sums.moments, strict=True):
                for label, moment in zip(labels, moments, strict=True):
                    self._place(int(label), scatter, moment, float(alphas[label]), mean)
        return self

    def _place(self, label: int, scatter: Floats, moment: Floats, alpha: float, mean: Floats) -> None:
        """Solves a label's normal equations, posed about ``mean``, with a one appended to each row."""
        weight, own = scatter[-1, -1], scatter[-1, :-1] / scatter[-1, -1]
        within = scatter[:-1, :-1] - weight * np.outer(own, own)
        self.coef_[label] = solve_normal(within, alpha, (moment[:-1] - own * moment[-1])[None])[0]
        self.intercept_[label] = moment[-1] / weight - self.coef_[label] @ (mean + own)


@dataclass
class _NormalSums:
    """Of each pattern of row weights the scatter (D + 1, D + 1), and (L, D + 1) moments of its L labels."""

    scatters: list[Floats]
    moments: list[Floats]

    def __add__(self, other: _NormalSums) -> _NormalSums:
        return _NormalSums(
            [mine + theirs for mine, theirs in zip(self.scatters, other.scatters, strict=True)],
            [mine + theirs for mine, theirs in zip(self.moments, other.moments, strict=True)],
        )


def _normal_sums(
    blocks: Blocks,
    weights: Floats,
    signs: npt.NDArray[np.int8],
    *,
    members: Sequence[npt.NDArray[np.int64]],
    mean: Floats,
    memory: int | str | None,
) -> _NormalSums:
    """Sums over a shard's rows, about ``mean``; (P, m) weights and (K, m) signs."""
    size = blocks.shape[1] + 1
    scatters = [np.zeros((size, size)) for _ in weights]
    moments = [np.zeros((len(labels), size)) for labels in members]
    for place, block in iterate(blocks, memory=memory, dtype=np.float64):
        rows = np.ones((len(block), size))
        rows[:, :-1] = block - mean
        everything: Floats | None = None
        for number, labels in enumerate(members):
            own = weights[number, place]
            moments[number] += (own * signs[labels, place]) @ rows
            level = own.max(initial=0.0)
            others = np.flatnonzero(own != level)
            if len(others) < np.count_nonzero(own):  # fewer differ from the common weight than there are
                everything = rows.T @ rows if everything is None else everything
                few, factors = rows[others], own[others] - level
                scatters[number] += level * everything + few.T @ (factors[:, None] * few)
            else:
                used = np.flatnonzero(own)
                scatters[number] += rows[used].T @ (own[used, None] * rows[used])
    return _NormalSums(scatters, moments)
