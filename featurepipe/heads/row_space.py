"""Features as coordinates in the span of the training rows: fewer numbers, the same inner products."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

Array = npt.NDArray[Any]


class RowSpace(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Rotates (n, D) features into the span of the rows it was fitted on, which has at most n dimensions.

    Where D is larger than n, whatever depends on features only by inner products or distances to those rows is learned there
    as well as in D dimensions: the optimum of an L2-penalised linear model lies in their span (the representer theorem of
    Kimeldorf and Wahba, 1971), and what another row has outside of it adds the same to its distance from each of them.

    The rows' own mean is not subtracted: standardise first.

    Attributes:
        components_: (D, r) float64, orthonormal columns; r is the rank of the rows.
    """

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002 - as scikit-learn calls it
        """Finds the span from the rows' (n, n) inner products."""
        rows = np.asarray(X, np.float64)
        values, vectors = np.linalg.eigh(rows @ rows.T)
        kept = values > values[-1] * len(rows) * np.finfo(np.float64).eps
        self.components_ = rows.T @ (vectors[:, kept] / np.sqrt(values[kept]))
        self.n_features_in_ = rows.shape[1]
        return self

    def transform(self, X: Any) -> Array:
        """Returns the (n, r) coordinates, float64."""
        return np.asarray(np.asarray(X, np.float64) @ self.components_)
