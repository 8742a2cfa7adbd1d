"""Standardising, principal components and coordinates in the span of the training rows, for features larger than memory."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import scipy.linalg
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, MappedBlocks, is_blocks
from featurepipe.heads.moments import Moments, gram_of, moments_of


class BlockScaler(StandardScaler):  # type: ignore[misc]
    """scikit-learn's ``StandardScaler``, which also takes ``Blocks``: fitted in one pass, applied as they are read.

    The mean and variance of blocks are joined as Chan, Golub & LeVeque (1983) do, in float64; but for rounding they do not depend
    on the blocks.

    Args:
        with_mean: Centre the columns.
        with_std: Divide them by their standard deviation; constant columns by 1.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Attributes:
        mean_: (D,) float64.
        var_: (D,) float64.
        scale_: (D,) float64, what columns are divided by.
        n_features_in_: D.
    """

    def __init__(self, *, with_mean: bool = True, with_std: bool = True, memory: int | str | None = None) -> None:
        super().__init__(with_mean=with_mean, with_std=with_std)
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Learns mean and scale.

        Args:
            X: (n, D) array or ``Blocks``.
            y: Ignored.
            sample_weight: (n,) weights; None for one each.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        if not is_blocks(X):
            super().fit(X, y, sample_weight)
            return self
        self._reset()
        weights = None if sample_weight is None else np.asarray(sample_weight, np.float64)
        moments = moments_of(X, weights, dtype=np.float64, memory=self.memory)
        rows, self.n_features_in_ = X.shape
        self.n_samples_seen_ = rows if weights is None else moments.weight
        self.mean_ = moments.mean if self.with_mean or self.with_std else None
        self.var_ = moments.variance if self.with_std else None
        self.scale_ = _scale(moments) if self.with_std else None
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Returns (n, D) standardised features: of ``Blocks`` a view that standardises what is read, of an array an array."""
        if not is_blocks(X):
            return super().transform(X, copy=copy)
        check_is_fitted(self)
        width = self.n_features_in_
        if X.shape[1] != width:
            raise UsageError(f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {width} features")
        mean = self.mean_ if self.with_mean and self.mean_ is not None else np.zeros(width)
        scale = self.scale_ if self.scale_ is not None else np.ones(width)
        return MappedBlocks(X, _Standardise(mean, scale), width)


def _scale(moments: Moments) -> Array:
    """Standard deviations; 1 for columns whose variance is only the rounding of their values, as scikit-learn has it."""
    least = np.finfo(np.float64).eps
    bound = moments.weight * least * moments.variance + (moments.weight * least * moments.mean) ** 2
    return np.where(moments.variance <= bound, 1.0, np.sqrt(moments.variance))


class _Standardise:
    """Centres and divides a block, in the block's dtype."""

    def __init__(self, mean: Array, scale: Array) -> None:
        self.mean, self.scale = mean, scale

    def __call__(self, block: Array) -> Array:
        centred: Array = block - self.mean.astype(block.dtype)
        centred /= self.scale.astype(block.dtype)
        return centred


_LENGTH = 1e-5  # added to a row's length


class UnitRows(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Divides each row by its Euclidean length plus 1e-5, of arrays and, as they are read, of ``Blocks``.

    Attributes:
        n_features_in_: D.
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learns the width alone.

        Args:
            X: (n, D) array or ``Blocks``.
            y: Ignored.
        """
        del y
        if is_blocks(X):
            self.n_features_in_ = X.shape[1]
        else:
            validate_data(self, X)
        return self

    def transform(self, X: Any) -> Any:
        """Returns (n, D) features: of ``Blocks`` a view that divides what is read, of an array an array."""
        check_is_fitted(self)
        width = self.n_features_in_
        if not is_blocks(X):
            return _unit(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))
        if X.shape[1] != width:
            raise UsageError(f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {width} features")
        return MappedBlocks(X, _unit, width)


def _unit(block: Array) -> Array:
    return np.asarray(block / (np.linalg.norm(block, axis=1, keepdims=True) + np.asarray(_LENGTH, block.dtype)))


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
