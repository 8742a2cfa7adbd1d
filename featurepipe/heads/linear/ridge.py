"""Ridge classification and regression, exact, from one pass over features of any size; linear support vector regression."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import scipy.linalg
from sklearn.base import BaseEstimator
from sklearn.svm import LinearSVR

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array
from featurepipe.heads.gram import gram_of
from featurepipe.heads.inputs import (
    BlockClassifier,
    BlockRegressor,
    Floats,
    labels_from,
    linear_scores,
    regression_data,
    training_data,
)
from featurepipe.heads.neighbours import rows_kept


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
