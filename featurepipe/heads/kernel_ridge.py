"""Kernel ridge regression with a Gaussian kernel, exact."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np
import scipy.linalg
from sklearn.base import BaseEstimator
from sklearn.metrics.pairwise import rbf_kernel

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array
from featurepipe.heads.inputs import BlockRegressor, Floats, map_rows, prediction_blocks, regression_data
from featurepipe.heads.kernel import KERNEL_BYTES, check_gamma, gamma_of, gaussian
from featurepipe.heads.neighbours import rows_kept
from featurepipe.sizes import bytes_of


class BlockKernelRidge(BlockRegressor, BaseEstimator):  # type: ignore[misc]
    """Least squares in the space of the kernel ``exp(-gamma |x - z|^2)`` with an L2 penalty.

    Minimises ``sum_i(w_i * (f(x_i) - (y_i - m))^2) + alpha * |f|^2``, where m is the (weighted) mean of the targets, which is
    added to the predictions, and ``|f|`` the norm in the kernel's space (Saunders, Gammerman & Vovk 1998, "Ridge regression
    learning algorithm in dual variables"). It is scikit-learn's ``KernelRidge`` of the centred targets.

    The kernel matrix of all training rows is held twice (16 n^2 bytes: 6.4 GB for 20,000 rows) and solved in n^3 / 3 steps, so
    more than ``exact_rows`` rows are refused. It predicts by matrix products on arrays and ``Blocks``.

    Args:
        alpha: Strength of the penalty, > 0.
        gamma: ``"scale"`` for 1 / (D * variance of all values), ``"auto"`` for 1 / D, or a positive number.
        gamma_factor: What that is multiplied by; searches vary this, as the best gamma moves with the scale.
        exact_rows: Most rows.
        memory: What the kernel matrices may take, and kernel values alive at one time in prediction (bytes or "2GB"). The
            training rows are extra.

    Attributes:
        gamma_: The number used.
        points_: (n, D) training rows with weight.
        dual_coef_: (n,) float64.
        intercept_: float, m.
        n_features_in_: D.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        gamma: float | str = "scale",
        gamma_factor: float = 1.0,
        exact_rows: int = 20_000,
        memory: int | str | None = None,
    ) -> None:
        self.alpha = alpha
        self.gamma = gamma
        self.gamma_factor = gamma_factor
        self.exact_rows = exact_rows
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Solves ``(K + alpha / w) a = y - m``.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) numbers; None takes the targets of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: More than ``exact_rows`` rows or than ``memory`` holds, a target that is missing, infinite or no number,
                the same number in every row, a feature that is not finite, or a wrong parameter.
        """
        for name in ("alpha", "gamma_factor"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)!r} must be positive")
        check_gamma(self.gamma)
        data = regression_data(self, X, y, sample_weight=sample_weight)
        count = data.blocks.shape[0]
        if count > self.exact_rows:
            raise UsageError(
                f"kernel-ridge solves for all training rows at once, and {count:,} are more than exact_rows={self.exact_rows:,}: "
                "train on fewer rows, or take ridge or xgboost, which stream them"
            )
        if self.memory is not None and 16 * count**2 > bytes_of(self.memory):
            raise UsageError(
                f"kernel-ridge on {count:,} rows holds kernel matrices of {16 * count**2 / 1e6:,.0f} MB, more than the memory "
                f"allowed ({self.memory}); allow more, train on fewer rows, or take ridge or xgboost"
            )
        self.gamma_ = self.gamma_factor * gamma_of(self.gamma, data.blocks, self.memory)
        rows = rows_kept(data.blocks, None, "kernel-ridge", "ridge, xgboost")
        self.intercept_ = data.mean
        centred, weights = data.targets - data.mean, data.weights
        if weights is not None:
            rows, centred, weights = (array[weights > 0] for array in (rows, centred, weights))
        system = gaussian(rows.astype(np.float64, copy=False), self.gamma_)
        np.einsum("ii->i", system)[:] += self.alpha if weights is None else self.alpha / weights
        self.points_ = rows
        self.dual_coef_ = scipy.linalg.solve(system, centred, assume_a="pos", overwrite_a=True, check_finite=False)
        return self

    def predict(self, X: Any) -> Floats:
        """Returns (n,) float64 numbers."""
        blocks = prediction_blocks(self, X)
        budget = KERNEL_BYTES if self.memory is None else bytes_of(self.memory) // 2
        rows = max(16, min(8192, budget // (16 * len(self.points_))))
        work = partial(_numbers, points=self.points_, weights=self.dual_coef_, gamma=self.gamma_)
        return map_rows(blocks, work, rows=rows, dtype=np.float64) + self.intercept_


def _numbers(block: Array, *, points: Array, weights: Floats, gamma: float) -> Floats:
    return np.asarray(rbf_kernel(block, points.astype(np.float64, copy=False), gamma=gamma) @ weights)
