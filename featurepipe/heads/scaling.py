"""Standardising features that may be larger than memory."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, MappedBlocks, is_blocks
from featurepipe.heads.gram import Moments, moments_of


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
