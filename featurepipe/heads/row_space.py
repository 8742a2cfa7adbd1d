"""Features as coordinates in the span of the training rows: fewer numbers, the same distances to them."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from featurepipe.heads.blocks import Array


class RowSpace(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Rotates (n, D) features into the span of the rows it was fitted on, and one direction more for all that lies outside.

    Where D is larger than n, whatever depends on features only by inner products or distances to those rows is learned there
    as well as in D dimensions: the optimum of an L2-penalised linear model lies in their span (the representer theorem of
    Kimeldorf and Wahba, 1971). The last coordinate, 0 for those rows, is how far a row lies outside of the span: it keeps the
    distances that kernels and votes weighted by distance are made of.

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
        """Returns the (n, r + 1) coordinates, float64: those in the span, and the distance from it."""
        rows = np.asarray(X, np.float64)
        inside = rows @ self.components_
        outside = np.linalg.norm(rows - inside @ self.components_.T, axis=1)
        return np.column_stack([inside, outside])
