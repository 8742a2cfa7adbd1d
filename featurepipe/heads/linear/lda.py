"""Linear discriminant analysis, exact, from one pass over features of any size."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np
import scipy.linalg
from sklearn.base import BaseEstimator

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, iterate
from featurepipe.heads.calibration import log_softmax, two_columns
from featurepipe.heads.inputs import (
    BlockClassifier,
    Codes,
    Floats,
    TrainingData,
    labels_from,
    linear_scores,
    training_data,
)
from featurepipe.heads.moments import Gram, gram_of
from featurepipe.heads.row_shards import row_shards_of
from featurepipe.heads.sampling import SomeRows


class BlockLinearDiscriminantAnalysis(BlockClassifier, BaseEstimator):  # type: ignore[misc]
    """Gaussian classes with one common covariance: ``LinearDiscriminantAnalysis(solver="lsqr")`` for blocks.

    Scores are ``x' S^-1 m_k - m_k' S^-1 m_k / 2 + log(prior_k)``, with class means m and the common covariance S, shrunk to
    ``(1 - shrinkage) S + shrinkage * trace(S) / D * I``. All that is needed of the data is each class's mean and the scatter
    within classes (Fisher 1936; Hastie, Tibshirani & Friedman, "The Elements of Statistical Learning", section 4.3), and one
    streamed pass gives both exactly. ``"auto"`` shrinks each class's standardised covariance after Ledoit & Wolf (2004, "A
    well-conditioned estimator for large-dimensional covariance matrices"), as scikit-learn does, and takes two passes, class by
    class.

    Args:
        shrinkage: None, ``"auto"`` or a number from 0 to 1: the share of the covariance that is replaced by the mean
            variance times the identity.
        priors: (K,) class probabilities in the order of ``classes_``; None for those of the training rows.
        memory: What the blocks alive at one time may take (bytes or "512MB"); a few times 8 * D * D bytes are extra.

    Attributes:
        classes_: (K,) labels.
        priors_: (K,) class probabilities.
        means_: (K, D) float64.
        covariance_: (D, D) float64, within classes, shrunk.
        coef_: (K, D) float64; (1, D) for two classes.
        intercept_: (K,) or (1,) float64.
        n_features_in_: D.
    """

    def __init__(
        self, shrinkage: float | str | None = None, *, priors: Any = None, memory: int | str | None = None
    ) -> None:
        self.shrinkage = shrinkage
        self.priors = priors
        self.memory = memory

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fits in one pass, or two for ``shrinkage="auto"``.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None takes those of a ``FeatureSet``.

        Raises:
            UsageError: One class only, a value that is not finite, or a wrong shrinkage or prior.
        """
        _check_shrinkage(self.shrinkage)
        data = training_data(self, X, y)
        self.classes_ = data.classes
        counts = np.bincount(data.codes, minlength=len(data.classes))
        if counts.sum() == len(counts):
            raise UsageError(
                f"{len(counts)} rows of {len(counts)} classes: the number of samples must be more than the number of "
                "classes, for the covariance within classes"
            )
        self.priors_ = _priors(self.priors, counts)
        if self.shrinkage == "auto":
            self.means_, self.covariance_ = _ledoit_wolf(data, self.priors_, self.memory)
        else:
            weights = None if self.priors is None else (self.priors_ / counts)[data.codes]
            gram = gram_of(data.blocks, data.codes, len(data.classes), weights, memory=self.memory)
            self.means_ = gram.class_means
            self.covariance_ = _shrunk(_within(gram), 0.0 if self.shrinkage is None else float(self.shrinkage))
        coef = scipy.linalg.lstsq(self.covariance_, self.means_.T, check_finite=False)[0].T
        intercept = np.log(self.priors_) - 0.5 * np.einsum("kd,kd->k", self.means_, coef)
        if len(data.classes) == 2:
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        self.coef_, self.intercept_ = coef, intercept
        return self

    def decision_function(self, X: Any) -> Array:
        """Returns log posterior probabilities up to a constant per row: (n, K); (n,) log odds for two classes."""
        return linear_scores(self, X, memory=self.memory)

    def predict(self, X: Any) -> Array:
        """Returns (n,) labels."""
        return labels_from(self.decision_function(X), self.classes_)

    def predict_log_proba(self, X: Any) -> Floats:
        """Returns (n, K) log posterior probabilities, in the order of ``classes_``."""
        return log_softmax(two_columns(self.decision_function(X)))

    def predict_proba(self, X: Any) -> Floats:
        """Returns (n, K) posterior probabilities, in the order of ``classes_``."""
        return np.asarray(np.exp(self.predict_log_proba(X)))


def _check_shrinkage(shrinkage: float | str | None) -> None:
    if shrinkage is None or shrinkage == "auto":
        return
    if isinstance(shrinkage, str) or not 0 <= shrinkage <= 1:
        raise UsageError(f"shrinkage={shrinkage!r} must be None, 'auto' or a number from 0 to 1")


def _priors(priors: Any, counts: Codes) -> Floats:
    if priors is None:
        return np.asarray(counts / counts.sum(), np.float64)
    given = np.asarray(priors, np.float64)
    if given.shape != counts.shape or not (given > 0).all() or not np.isclose(given.sum(), 1):
        raise UsageError(
            f"priors must be {len(counts)} positive numbers that sum to 1, one for each class, not {priors!r}"
        )
    return np.asarray(given / given.sum())


def _within(gram: Gram) -> Floats:
    """The covariance within classes: the total scatter less that between the class means."""
    offsets = (gram.class_means - gram.mean) * np.sqrt(gram.class_weights)[:, None]
    return np.asarray((gram.scatter - offsets.T @ offsets) / gram.weight)


def _shrunk(covariance: Floats, share: float) -> Floats:
    shrunk: Floats = (1 - share) * covariance
    shrunk[np.diag_indices_from(shrunk)] += share * np.trace(covariance) / len(covariance)
    return shrunk


def _ledoit_wolf(data: TrainingData, priors: Floats, memory: int | str | None) -> tuple[Floats, Floats]:
    width = data.blocks.shape[1]
    means, covariance = np.zeros((len(priors), width)), np.zeros((width, width))
    rows = row_shards_of(data.blocks).beside(data.codes)
    for code, prior in enumerate(priors):
        gram = rows.reduce(partial(_gram_of_class, code=code, memory=memory))
        means[code] = gram.mean
        scale = np.sqrt(gram.variance)
        scale[scale < 10 * np.finfo(np.float64).eps * np.maximum(1, np.abs(gram.mean))] = 1
        own = gram.scatter / gram.weight / np.outer(scale, scale)
        fourth = rows.reduce(partial(_fourth_powers, code=code, mean=gram.mean, scale=scale, memory=memory))
        share = _ledoit_wolf_share(own, fourth, gram.weight)
        covariance += prior * _shrunk(own, share) * np.outer(scale, scale)
    return means, covariance


def _gram_of_class(blocks: Blocks, codes: Codes, *, code: int, memory: int | str | None) -> Gram:
    return gram_of(SomeRows(blocks, np.flatnonzero(codes == code)), memory=memory)


def _fourth_powers(
    blocks: Blocks, codes: Codes, *, code: int, mean: Floats, scale: Floats, memory: int | str | None
) -> float:
    """The standardised rows' norms to the fourth, summed over a shard's rows of one class."""
    rows = iterate(SomeRows(blocks, np.flatnonzero(codes == code)), memory=memory, dtype=np.float64)
    return sum(float(((((block - mean) / scale) ** 2).sum(axis=1) ** 2).sum()) for _, block in rows)


def _ledoit_wolf_share(covariance: Floats, fourth: float, count: float) -> float:
    """The optimal share of the identity, from the fourth moments of the standardised rows (their lemma 3.3 and 3.4)."""
    width = len(covariance)
    squared = float((covariance**2).sum())
    noise = (fourth / count - squared) / (width * count)
    distance = (squared - np.trace(covariance) ** 2 / width) / width
    return 0.0 if noise <= 0 or distance <= 0 else float(min(1.0, noise / distance))
