"""Principal components of features that may be larger than memory, from one pass."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import scipy.linalg
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, MappedBlocks, is_blocks
from featurepipe.heads.gram import gram_of


class BlockPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Principal component analysis of arrays or ``Blocks``, exactly: the eigenvectors of the covariance matrix.

    The covariance comes from one streamed pass in float64 (``gram.gram_of``), which needs 8 D^2 bytes. The components
    are those of scikit-learn's ``PCA(svd_solver="covariance_eigh")``, with the same signs.

    Args:
        n_components: How many components to keep; below 1, as many as explain this share of the variance; None for all.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Attributes:
        components_: (P, D) float64, orthonormal rows, in the order of the variance they explain.
        explained_variance_: (P,) float64, with n - 1 in the denominator.
        explained_variance_ratio_: (P,) float64, shares of the whole variance.
        mean_: (D,) float64.
        n_components_: P.
        n_features_in_: D.
    """

    whiten = False

    def __init__(self, n_components: float | None = None, *, memory: int | str | None = None) -> None:
        self.n_components = n_components
        self.memory = memory

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        """Learns the components.

        Args:
            X: (n, D) array or ``Blocks``.
            y: Ignored.

        Raises:
            UsageError: ``n_components`` is more than there are, or no number.
            ValueError: A value is NaN or infinite.
        """
        if not is_blocks(X):
            X = validate_data(self, X, dtype=[np.float64, np.float32, np.float16], ensure_min_samples=2)
        rows, width = X.shape
        most = min(rows, width)
        _check(self.n_components, most)
        gram = gram_of(X, memory=self.memory)
        values, vectors = scipy.linalg.eigh(gram.scatter / (rows - 1), check_finite=False)
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1].T
        shares = values / values.sum() if values.sum() else np.zeros_like(values)
        kept = most if self.n_components is None else int(self.n_components)
        if self.n_components is not None and self.n_components < 1:
            kept = min(int(np.searchsorted(np.cumsum(shares), self.n_components, side="right")) + 1, most)
        largest = np.abs(vectors).argmax(axis=1)
        vectors = vectors * np.sign(vectors[np.arange(width), largest])[:, None]  # as scikit-learn's svd_flip
        self.components_ = np.ascontiguousarray(vectors[:kept])
        self.explained_variance_, self.explained_variance_ratio_ = values[:kept], shares[:kept]
        self.mean_ = gram.mean
        self.n_components_, self.n_features_in_ = kept, width
        return self

    def transform(self, X: Any) -> Any:
        """Returns the (n, P) coordinates: of ``Blocks`` a view that projects what is read, of an array an array."""
        check_is_fitted(self)
        project = _Project(self.mean_, self.components_)
        if not is_blocks(X):
            return project(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))
        if X.shape[1] != self.n_features_in_:
            raise UsageError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features"
            )
        return MappedBlocks(X, project, self.n_components_)

    @property
    def _n_features_out(self) -> int:
        """Read by scikit-learn to name the columns."""
        return int(self.n_components_)


class _Project:
    """Centres a block and projects it, in the block's dtype."""

    def __init__(self, mean: Array, components: Array) -> None:
        self.mean, self.components = mean, components

    def __call__(self, block: Array) -> Array:
        return np.asarray((block - self.mean.astype(block.dtype)) @ self.components.astype(block.dtype).T)


def _check(components: float | None, most: int) -> None:
    if components is None:
        return
    if not 0 < components <= most or (components > 1 and components != int(components)):
        raise UsageError(
            f"n_components={components!r} must be a whole number from 1 to {most}, the smaller of rows and values, or a "
            "share of the variance below 1"
        )
