"""Nearest neighbours and nearest centroids on features of any size."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from featurepipe.display import bytes_of
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, iterate, targets_of, working_dtype
from featurepipe.heads.inputs import (
    BlockClassifier,
    Codes,
    Floats,
    TrainingData,
    labels_from,
    map_rows,
    prediction_blocks,
    regression_data,
    training_data,
)
from featurepipe.heads.row_shards import row_shards_of


class BlockNeighbours(KNeighborsClassifier):  # type: ignore[misc]
    """``KNeighborsClassifier`` by brute force that predicts on blocks, and says so if its rows cannot be kept.

    It keeps every training row (as float32 where they are float16 or float32), so ``fit`` refuses more of them than
    ``memory`` holds; predictions stream. Distances are matrix products (scikit-learn's brute force), the fastest way in the
    hundreds of dimensions that features have.

    Args:
        n_neighbors: How many vote.
        weights: ``"uniform"``, ``"distance"`` or a function of distances, as in scikit-learn.
        metric: A metric that scikit-learn's brute force knows.
        p: Power of the Minkowski metric.
        n_jobs: Threads, as in scikit-learn.
        memory: What the kept rows, and the blocks predicted on, may take each (bytes or "2GB"); None for no bound.

    Attributes:
        classes_: (K,) labels.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        weights: Any = "uniform",
        metric: Any = "minkowski",
        p: float = 2,
        n_jobs: int | None = None,
        memory: int | str | None = None,
    ) -> None:
        super().__init__(n_neighbors, weights=weights, algorithm="brute", metric=metric, p=p, n_jobs=n_jobs)
        self.memory = memory

    def fit(self, X: Any, y: Any = None) -> Self:
        """Keeps the rows.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None takes those of a ``FeatureSet``.

        Raises:
            UsageError: The rows do not fit into ``memory``, one class only, or a value is not finite.
        """
        data = training_data(self, X, y)
        kept = rows_kept(data.blocks, self.memory, "knn", "logistic, centroid")
        super().fit(kept, data.classes[data.codes])
        return self

    def predict(self, X: Any) -> Array:
        """Returns (n,) labels."""
        return map_rows(prediction_blocks(self, X), partial(KNeighborsClassifier.predict, self), memory=self.memory)

    def predict_proba(self, X: Any) -> Array:
        """Returns (n, K): the share of the neighbours in each class."""
        shares = partial(KNeighborsClassifier.predict_proba, self)
        return map_rows(prediction_blocks(self, X), shares, memory=self.memory)

    def __sklearn_tags__(self) -> Any:
        """Says that features are dense and each row has one label."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        tags.target_tags.multi_output = False
        tags.classifier_tags.multi_label = False
        return tags


class BlockNeighboursRegressor(KNeighborsRegressor):  # type: ignore[misc]
    """``KNeighborsRegressor`` by brute force: the mean number of the nearest training rows; see ``BlockNeighbours``.

    Args:
        n_neighbors: How many are averaged.
        weights: ``"uniform"``, ``"distance"`` or a function of distances, as in scikit-learn.
        metric: A metric that scikit-learn's brute force knows.
        p: Power of the Minkowski metric.
        n_jobs: Threads, as in scikit-learn.
        memory: What the kept rows, and the blocks predicted on, may take each (bytes or "2GB"); None for no bound.

    Attributes:
        n_features_in_: D.
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        weights: Any = "uniform",
        metric: Any = "minkowski",
        p: float = 2,
        n_jobs: int | None = None,
        memory: int | str | None = None,
    ) -> None:
        super().__init__(n_neighbors, weights=weights, algorithm="brute", metric=metric, p=p, n_jobs=n_jobs)
        self.memory = memory

    def fit(self, X: Any, y: Any = None) -> Self:
        """Keeps the rows.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) numbers; None takes the targets of a ``FeatureSet``.

        Raises:
            UsageError: The rows do not fit into ``memory``, a target is missing, infinite or no number, all are the same, or a
                feature is not finite.
        """
        data = regression_data(self, X, y)
        super().fit(rows_kept(data.blocks, self.memory, "knn", "ridge, xgboost"), data.targets)
        return self

    def predict(self, X: Any) -> Array:
        """Returns (n,) numbers."""
        return map_rows(prediction_blocks(self, X), partial(KNeighborsRegressor.predict, self), memory=self.memory)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns R2; see ``BlockRegressor.score``."""
        return float(super().score(X, targets_of(X, y), sample_weight))

    def __sklearn_tags__(self) -> Any:
        """Says that features are dense and each row has one number."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        tags.target_tags.multi_output = False
        return tags


def rows_kept(blocks: Blocks, memory: int | str | None, name: str, others: str) -> Array:
    """Reads all rows for an estimator that keeps them in memory, float32 where they are float16 or float32.

    Args:
        blocks: (n, D) features.
        memory: What the rows may take (bytes or "2GB"); None for no bound.
        name: The head's, for the error.
        others: Heads that keep no rows.

    Raises:
        UsageError: They take more than ``memory``.
    """
    dtype = working_dtype(blocks.dtype)
    count, width = blocks.shape
    needed = count * width * dtype.itemsize
    if memory is not None and needed > bytes_of(memory):
        raise UsageError(
            f"{name} keeps its training rows: {count} x {width} values take {needed / 1e6:.0f} MB, more than the memory "
            f"allowed ({memory}); allow more, train on fewer rows or with pca=, or take a head that keeps none "
            f"({others}, ...)"
        )
    return blocks.read(dtype)


class BlockCentroid(BlockClassifier, BaseEstimator):  # type: ignore[misc]
    """The class whose mean is nearest: ``NearestCentroid`` (Euclidean) for blocks.

    Two passes: means, then variances within classes if means are to be shrunken (Tibshirani et al. 2002, "Diagnosis of
    multiple cancer types by shrunken centroids of gene expression").

    Args:
        shrink_threshold: By how many standard errors each mean is moved towards the common one; None for not at all.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Attributes:
        classes_: (K,) labels.
        centroids_: (K, D) float64.
        n_features_in_: D.
    """

    def __init__(self, shrink_threshold: float | None = None, *, memory: int | str | None = None) -> None:
        self.shrink_threshold = shrink_threshold
        self.memory = memory

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fits in one pass, or two with ``shrink_threshold``.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None takes those of a ``FeatureSet``.

        Raises:
            UsageError: One class only, a value that is not finite, or a threshold that is not positive.
        """
        if self.shrink_threshold is not None and not self.shrink_threshold > 0:
            raise UsageError(f"shrink_threshold={self.shrink_threshold!r} must be positive, or None")
        data = training_data(self, X, y)
        self.classes_ = data.classes
        self.centroids_ = _class_means(data, self.memory)
        if self.shrink_threshold is not None:
            self.centroids_ = _shrunken(data, self.centroids_, self.shrink_threshold, self.memory)
        return self

    def decision_function(self, X: Any) -> Floats:
        """Returns ``x . c - |c|^2 / 2`` for each centroid c, (n, K); for two classes the difference, (n,).

        It is minus half the squared distance, up to a term that is the same for all classes.
        """
        blocks = prediction_blocks(self, X)
        return map_rows(blocks, partial(centroid_scores, centroids=self.centroids_), memory=self.memory)

    def predict(self, X: Any) -> Array:
        """Returns (n,) labels."""
        return labels_from(self.decision_function(X), self.classes_)


def centroid_scores(block: Array, centroids: Floats) -> Floats:
    """Returns ``x . c - |c|^2 / 2`` for each of (K, D) centroids: (m, K), or the difference (m,) for two."""
    scores = np.asarray(block @ centroids.T - 0.5 * np.einsum("kd,kd->k", centroids, centroids))
    return scores[:, 1] - scores[:, 0] if len(centroids) == 2 else scores


def _class_means(data: TrainingData, memory: int | str | None) -> Floats:
    counts = np.bincount(data.codes, minlength=len(data.classes))
    work = partial(_class_sums, classes=len(data.classes), memory=memory)
    return np.asarray(row_shards_of(data.blocks).beside(data.codes).reduce(work) / counts[:, None])


def _class_sums(blocks: Blocks, codes: Codes, *, classes: int, memory: int | str | None) -> Floats:
    """Sums of the rows of each class, (K, D) float64, in a shard."""
    sums = np.zeros((classes, blocks.shape[1]))
    for place, block in iterate(blocks, memory=memory, dtype=np.float64):
        members = np.zeros((classes, len(block)))
        members[codes[place], np.arange(len(block))] = 1
        sums += members @ block
    return sums


def _shrunken(data: TrainingData, means: Floats, threshold: float, memory: int | str | None) -> Floats:
    """Soft-thresholds the distance of each mean from the common one, in standard errors plus their median."""
    counts = np.bincount(data.codes, minlength=len(means))
    total = len(data.codes)
    work = partial(_squares, means=means, memory=memory)
    squares = row_shards_of(data.blocks).beside(data.codes).reduce(work)
    deviation = np.sqrt(squares / max(1, total - len(means)))
    common = counts @ means / total
    errors = np.sqrt(1 / counts - 1 / total)[:, None] * (deviation + np.median(deviation))
    offsets = means - common
    return np.asarray(common + np.sign(offsets) * np.maximum(np.abs(offsets) - threshold * errors, 0))


def _squares(blocks: Blocks, codes: Codes, *, means: Floats, memory: int | str | None) -> Floats:
    """Squared distances from the class means, summed column by column, in a shard."""
    squares = np.zeros(means.shape[1])
    for place, block in iterate(blocks, memory=memory, dtype=np.float64):
        squares += ((block - means[codes[place]]) ** 2).sum(axis=0)
    return squares
