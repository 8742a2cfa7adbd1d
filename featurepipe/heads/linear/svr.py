"""Linear support vector regression of a number in any unit."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.svm import LinearSVR

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array
from featurepipe.heads.inputs import BlockRegressor, linear_scores, regression_data
from featurepipe.heads.neighbours import rows_kept


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
