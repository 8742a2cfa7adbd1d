"""From a head's scores to probabilities that can be believed: temperature scaling, and the error that is left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import logsumexp
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import SVC

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, iterate
from featurepipe.heads.label_calibration import LabelSigmoids, fit_sigmoids, label_thresholds
from featurepipe.heads.moments import refuse_non_finite
from featurepipe.heads.neighbours import centroid_scores
from featurepipe.heads.row_shards import concatenated, row_shards_of
from featurepipe.heads.statistics.aims import Wish

Floats = npt.NDArray[np.float64]
_LEAST = float(np.log(np.finfo(np.float64).tiny))  # stands for the logarithm of a probability of zero
_RANGE = 1e4  # times and divided by the scores' own spread, where the temperature is looked for


def class_scores(head: Any, features: Blocks | Array, *, memory: int | str | None = None) -> Floats:
    """What a head says of each class, as one matrix whatever the family.

    - A head whose decision values are log-odds (logistic, lda, xgboost): log-probabilities.
    - linear-svm, rbf-svm, ridge: decision values, one class against the rest; for two classes minus and plus half the margin, so
      that their difference is the margin.
    - centroid: ``x . c - |c|^2 / 2``, which orders classes as the distance to their centroid c does.
    - knn: the log of the neighbours' shares, with one neighbour more that is split evenly between all classes, so that a
      class without neighbours is improbable and not impossible.
    - Any other estimator: its log-probabilities (zero taken as the smallest float), else its decision values.

    The largest is the class that the head predicts.

    Args:
        head: A fitted classifier or pipeline.
        features: (n, D) array or ``Blocks``; read block by block.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Returns:
        (n, K) float64, columns in the order of ``head.classes_``.

    Raises:
        UsageError: The head offers neither probabilities nor decision values, or one for each pair of classes; or a
            feature is NaN or infinite.
    """
    steps = getattr(head, "steps", None)
    last = steps[-1][1] if steps else head
    before = head[:-1] if steps and len(steps) > 1 else None
    return concatenated(row_shards_of(features).map(partial(_share_scores, before=before, last=last, memory=memory)))


def predicted_numbers(head: Any, features: Blocks | Array, *, memory: int | str | None = None) -> Floats:
    """What a head for numbers predicts, in memory that does not grow with the rows but for the result.

    Args:
        head: A fitted regressor or pipeline.
        features: (n, D) array or ``Blocks``; read block by block, where they are.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Returns:
        (n,) float64.

    Raises:
        UsageError: A feature is NaN or infinite.
    """
    return concatenated(row_shards_of(features).map(partial(_share_numbers, head=head, memory=memory)))


def label_scores(head: Any, features: Blocks | Array, *, memory: int | str | None = None) -> Floats:
    """The scores (n, K) of a head for several labels, positive where it predicts a label; see ``predicted_numbers``."""
    return concatenated(row_shards_of(features).map(partial(_share_labels, head=head, memory=memory)))


def _share_labels(blocks: Blocks, *, head: Any, memory: int | str | None) -> Floats:
    scores = np.empty((blocks.shape[0], len(head.classes_)))
    for place, block in iterate(blocks, memory=memory):
        refuse_non_finite(block)
        scores[place] = head.decision_function(block)
    return scores


def calibrated_labels(
    scores: Floats,
    truth: Floats,
    names: Sequence[str],
    wish: Wish,
    *,
    sigmoids: bool = True,
    margin: bool = False,
    groups: Any = None,
) -> dict[str, Any]:
    """Sigmoids (`label_calibration.fit_sigmoids`) and thresholds (`label_calibration.label_thresholds`) of several labels.

    Args:
        scores: (n, K), of images that the head was not trained on.
        truth: (n, K): 1 present, 0 absent, NaN unknown.
        names: Of the K labels.
        wish: What each threshold is to reach.
        sigmoids: Whether to fit any; without, scores stay as the head's log-odds.
        margin: Whether the lower 95 % limit is to reach it.
        groups: (n,) what images belong together; None if each is by itself.

    Returns:
        JSON values: ``slopes``, ``offsets``, what ``label_thresholds`` returns, and ``uncalibrated``, the labels that have no
        sigmoid, for lack of images of a side.
    """
    fitted = fit_sigmoids(scores, truth) if sigmoids else LabelSigmoids.of_heads_own(len(names))
    return {
        "slopes": fitted.slopes.tolist(),
        "offsets": fitted.offsets.tolist(),
        **label_thresholds(scores, truth, names, fitted, wish, margin=margin, groups=groups),
        "uncalibrated": [str(name) for name, has in zip(names, fitted.fitted, strict=True) if not has],
    }


def _share_numbers(blocks: Blocks, *, head: Any, memory: int | str | None) -> Floats:
    numbers = np.empty(blocks.shape[0])
    for place, block in iterate(blocks, memory=memory):
        refuse_non_finite(block)
        numbers[place] = head.predict(block)
    return numbers


def _share_scores(blocks: Blocks, *, before: Any, last: Any, memory: int | str | None) -> Floats:
    scores = np.empty((blocks.shape[0], len(last.classes_)))
    for place, block in iterate(blocks, memory=memory):
        refuse_non_finite(block)
        scores[place] = _scores(last, block if before is None else before.transform(block))
    return scores


def probabilities(scores: npt.NDArray[np.floating[Any]], temperature: float = 1.0) -> Floats:
    """Returns the softmax of ``scores / temperature``: (n, K) float64, rows that sum to 1."""
    return np.asarray(np.exp(log_softmax(np.asarray(scores, np.float64) / temperature)))


def log_softmax(scores: npt.NDArray[np.floating[Any]]) -> Floats:
    """Returns the logarithm of each row's softmax, (n, K) float64."""
    values = np.asarray(scores, np.float64)
    return np.asarray(values - logsumexp(values, axis=1, keepdims=True))


def two_columns(scores: Array) -> Floats:
    """Spreads (n,) margins of two classes to (n, 2), minus and plus half of each; leaves (n, K) as it is.

    The softmax of the two is the logistic function of the margin.
    """
    values = np.asarray(scores, np.float64)
    return values if values.ndim == 2 else np.stack([-values / 2, values / 2], axis=1)


def fit_temperature(scores: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.integer[Any]]) -> float:
    """Finds the temperature that makes held-out labels most probable.

    Temperature scaling is from Guo et al. 2017, "On calibration of modern neural networks". The mean negative
    log-likelihood is convex in 1 / T, so its slope is zero once at most: a root found between bounds on log T, 1e4 times
    below and above the scores' own spread. Each label counts as right but for one part in n + 2, shared out over all
    classes (as Platt 1999 does for two): n images that are all right say no more than that errors are about as rare as that, and
    never that the next one is certain.

    Args:
        scores: (n, K) as from ``class_scores``, of images that the head was not trained on.
        codes: (n,) column of each image's class.

    Returns:
        T > 0; 1.0 if nothing is gained over it.

    Raises:
        UsageError: There are no rows, or the lengths differ.
    """
    values, own = _checked(scores, codes)
    values = values - own[:, None]  # the true class at zero
    spread = float(np.abs(values).mean())
    if spread == 0:
        return 1.0

    doubt = float(values.mean()) / (len(values) + 2)

    def slope(log_temperature: float) -> float:
        """Of the mean negative log-likelihood along 1 / T."""
        return float((probabilities(values, np.exp(log_temperature)) * values).sum(axis=1).mean() - doubt)

    low, high = np.log(spread / _RANGE), np.log(spread * _RANGE)
    if slope(low) <= 0:
        best = low
    elif slope(high) >= 0:
        best = high
    else:
        best = brentq(slope, low, high, xtol=1e-12, rtol=1e-12)
    found = float(np.exp(best))
    return found if negative_log_likelihood(scores, codes, found) < negative_log_likelihood(scores, codes) else 1.0


def gains_clearly(
    scores: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.integer[Any]], temperature: float
) -> bool:
    """Whether a temperature makes labels more probable by more than a standard error, over no temperature at all.

    Args:
        scores: (n, K).
        codes: (n,) column of each image's class.
        temperature: What the scores are divided by.

    Returns:
        False for a single row, which tells no standard error.
    """
    values, _ = _checked(scores, codes)
    places = np.arange(len(values)), codes
    gains = log_softmax(values / temperature)[places] - log_softmax(values)[places]
    return len(gains) > 1 and bool(gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains)))


def negative_log_likelihood(
    scores: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.integer[Any]], temperature: float = 1.0
) -> float:
    """Returns the mean negative log-likelihood of the true classes, in nats.

    Args:
        scores: (n, K).
        codes: (n,) column of each image's class.
        temperature: What the scores are divided by.
    """
    values, _ = _checked(scores, codes)
    return float(-log_softmax(values / temperature)[np.arange(len(values)), codes].mean())


def expected_calibration_error(
    probabilities: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.integer[Any]], bins: int = 15
) -> float:
    """How far confidence is from accuracy.

    After Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning". Images are sorted into
    ``bins`` equal intervals, open below, by the probability of the predicted class; the result is the mean over images of
    ``|accuracy - mean confidence|`` of their bin.

    Args:
        probabilities: (n, K), rows that sum to 1.
        codes: (n,) column of each image's class.
        bins: Number of intervals of [0, 1].

    Returns:
        Between 0 (confidence is right in every bin) and 1.

    Raises:
        UsageError: There are no rows, the lengths differ, or there is no bin.
    """
    values, _ = _checked(probabilities, codes)
    if bins < 1:
        raise UsageError(f"bins={bins} must be 1 or more")
    confidence, right = values.max(axis=1), values.argmax(axis=1) == codes
    number = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(number, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def _scores(head: Any, block: Array) -> Floats:
    values = _family_scores(head, block)
    if values.shape[1] != len(head.classes_) or getattr(head, "decision_function_shape", "ovr") == "ovo":
        raise UsageError(
            f"{type(head).__name__} gives one value for each pair of classes, not for each of its {len(head.classes_)} "
            "classes; make it with decision_function_shape='ovr'"
        )
    return values


def _family_scores(head: Any, block: Array) -> Floats:
    if isinstance(head, LogisticRegression | LinearDiscriminantAnalysis) and getattr(head, "solver", "") != "liblinear":
        return log_softmax(two_columns(head.decision_function(block)))  # their own logarithms end at zero probability
    if isinstance(head, NearestCentroid):
        return two_columns(centroid_scores(block, head.centroids_))  # its own probabilities contradict its predictions
    if isinstance(head, KNeighborsClassifier):
        shares = np.asarray(head.predict_proba(block), np.float64)
        return np.asarray(np.log((shares * head.n_neighbors + 1 / shares.shape[1]) / (head.n_neighbors + 1)))
    if hasattr(head, "predict_log_proba") and not isinstance(head, SVC):
        with np.errstate(divide="ignore"):
            return np.maximum(np.asarray(head.predict_log_proba(block), np.float64), _LEAST)
    if hasattr(head, "decision_function"):
        return two_columns(head.decision_function(block))
    raise UsageError(
        f"{type(head).__name__} has neither predict_log_proba nor decision_function: it gives no score for each class"
    )


def _checked(scores: Any, codes: Any) -> tuple[Floats, Floats]:
    """The scores, and that of the true class of each row."""
    values, numbers = np.asarray(scores, np.float64), np.asarray(codes)
    if values.ndim != 2 or not len(values) or numbers.shape != values.shape[:1]:
        raise UsageError(
            f"scores of shape {values.shape} and classes of shape {numbers.shape}: give (n, K) scores and (n,) columns, "
            "n at least 1"
        )
    if numbers.min() < 0 or numbers.max() >= values.shape[1]:
        raise UsageError(f"classes from {numbers.min()} to {numbers.max()} are not columns of {values.shape[1]} scores")
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        raise UsageError(f"{len(bad)} rows of scores are not finite, the first is row {bad[0]}")
    return values, values[np.arange(len(values)), numbers]
