"""Two classes, one of which is looked for: curves with bands, rates at a threshold, and the choice of that threshold.

Scores are probabilities, or anything that is higher the more likely the class; an image is called positive where its score is
at least the threshold. Where images come in groups, such as patients, each share is as certain as that of so many independent
images as its variance over whole groups is worth (``heads.statistics.intervals``); else limits are exact binomial ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.display import table
from featurepipe.errors import UsageError
from featurepipe.heads.statistics import intervals
from featurepipe.heads.statistics import intervals as group_intervals
from featurepipe.heads.statistics.aims import Wish
from featurepipe.heads.statistics.intervals import Limits, OneVsRest, one_vs_rest, units_of

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int64]
Groups = Sequence[str | None] | npt.NDArray[np.object_] | None

POINTS = 200
"""Points of a curve that is drawn."""
BINS = 10
"""Bins of a reliability diagram, with as many images each."""
_ROUNDING = 1e-6  # of a score, by which features that were computed on another machine may change it


@dataclass(frozen=True)
class Curve:
    """A curve over descending thresholds with its pointwise 95 % band.

    Attributes:
        x: (T,) false-positive rate of a ROC curve, recall of a precision-recall curve; ascending.
        y: (T,) recall, or precision.
        thresholds: (T,) scores at or above which images are called positive; infinite where none is.
        low: (T,) limits of ``y`` at this ``x``, NaN where nothing is known.
        high: (T,).
    """

    x: Floats
    y: Floats
    thresholds: Floats
    low: Floats
    high: Floats

    def as_dict(self) -> dict[str, list[float | None]]:
        """Plain JSON values; null for what is no number."""
        named = vars(self).items()
        return {name: [float(v) if np.isfinite(v) else None for v in values] for name, values in named}


def roc(scores: npt.ArrayLike, positive: npt.ArrayLike, *, groups: Groups = None, points: int | None = POINTS) -> Curve:
    """The ROC curve: recall (sensitivity) over the false-positive rate (1 less specificity).

    With ``points=None`` it is ``sklearn.metrics.roc_curve(drop_intermediate=False)``. The band is that of the recall at a given
    false-positive rate. Two things are uncertain there: the recall at a threshold, and which threshold has that rate. The
    distances that each alone would make are squared and added (Newcombe 1998; Zou & Donner 2008, "Construction of confidence
    limits about effect measures", MOVER): those of the recall's own limits, and those to the curve's recall at the rate's.

    Args:
        scores: (n,).
        positive: (n,) whether an image is of the class looked for.
        groups: (n,) what images belong together, None for an image by itself; None if each is.
        points: The most points to return, evenly spread along the curve; None for one at each distinct score.

    Raises:
        UsageError: A side has no image, or shapes do not fit.
    """
    images = _Images.of(scores, positive, groups)
    at, hits, alarms = images.cumulated(points)
    recall, rate = hits / images.positives, alarms / images.negatives
    own = np.array([images.share(images.positive, images.scores >= t) for t in at])
    sideways = np.array([images.share(~images.positive, images.scores >= t) for t in at])
    every = images.cumulated(None)
    whole_rate, whole_recall = every[2] / images.negatives, every[1] / images.positives
    moved = np.interp(sideways, whole_rate, whole_recall)
    low = recall - np.hypot(recall - own[:, 0], np.maximum(0, recall - moved[:, 0]))
    high = recall + np.hypot(own[:, 1] - recall, np.maximum(0, moved[:, 1] - recall))
    return Curve(rate, recall, at, np.maximum(0, low), np.minimum(1, high))


def precision_recall(
    scores: npt.ArrayLike, positive: npt.ArrayLike, *, groups: Groups = None, points: int | None = POINTS
) -> Curve:
    """The precision-recall curve, from the highest threshold on.

    With ``points=None`` it is ``sklearn.metrics.precision_recall_curve`` in the reverse order; its first point, recall 0 and
    precision 1 by convention, has no band. The band is that of the precision at a given recall, which three things make
    uncertain: the false-positive rate at a threshold, which threshold has that recall, and how frequent the class is. Their
    distances are squared and added as in ``roc``.

    Args:
        scores: (n,).
        positive: (n,) whether an image is of the class looked for.
        groups: (n,) what images belong together, None for an image by itself; None if each is.
        points: The most points to return; None for one at each distinct score.

    Raises:
        UsageError: A side has no image, or shapes do not fit.
    """
    images = _Images.of(scores, positive, groups)
    at, hits, alarms = images.cumulated(points)
    recall, rate = hits / images.positives, alarms / images.negatives
    share = images.positives / len(images.scores)
    every = images.cumulated(None)
    whole_rate, whole_recall = every[2] / images.negatives, every[1] / images.positives
    rates = np.array([images.share(~images.positive, images.scores >= t) for t in at])
    recalls = np.array([images.share(images.positive, images.scores >= t) for t in at])
    shares = images.share(np.ones(len(images.scores), np.bool_), images.positive)

    def precision(recall: Floats, rate: Floats, share: float) -> Floats:
        found, wrong = share * recall, (1 - share) * rate
        return np.asarray(np.divide(found, found + wrong, out=np.ones(len(found)), where=found + wrong > 0))

    middle = precision(recall, rate, share)
    moved = [np.interp(recalls[:, side], whole_recall, whole_rate) for side in (0, 1)]
    worse = (
        precision(recall, rates[:, 1], share),
        precision(recall, moved[1], share),
        precision(recall, rate, shares[0]),
    )
    better = (
        precision(recall, rates[:, 0], share),
        precision(recall, moved[0], share),
        precision(recall, rate, shares[1]),
    )
    low = middle - np.sqrt(sum(np.maximum(0, middle - one) ** 2 for one in worse))
    high = middle + np.sqrt(sum(np.maximum(0, one - middle) ** 2 for one in better))
    undefined = hits + alarms == 0
    low, high = np.where(undefined, np.nan, np.maximum(0, low)), np.where(undefined, np.nan, np.minimum(1, high))
    return Curve(recall, middle, at, low, high)


def rates(called: npt.ArrayLike, positive: npt.ArrayLike, *, groups: Groups = None) -> dict[str, Any]:
    """Sensitivity, specificity, positive and negative predictive value of yes or no, each with its 95 % interval.

    Args:
        called: (n,) whether an image is called positive.
        positive: (n,) whether it is.
        groups: (n,) what images belong together, None for an image by itself; None if each is.

    Returns:
        JSON values: ``sensitivity`` (recall), ``specificity``, ``ppv`` (precision) and ``npv``, each ``{"value", "low", "high",
        "images"}``, with a ``"reason"`` where there is no image to tell; and the counts ``true_positives``, ``false_negatives``,
        ``false_positives``, ``true_negatives``.

    Raises:
        UsageError: There is no image, or shapes do not fit.
    """
    said, truth = np.asarray(called, np.bool_), np.asarray(positive, np.bool_)
    images = _Images(said.astype(np.float64), truth, _numbers(groups, said, truth))
    shares = {
        "sensitivity": (truth, said, "no image is positive"),
        "specificity": (~truth, ~said, "no image is negative"),
        "ppv": (said, truth, "no image is called positive"),
        "npv": (~said, ~truth, "no image is called negative"),
    }
    found: dict[str, Any] = {}
    for name, (of, hit, reason) in shares.items():
        count = int(of.sum())
        low, high = images.share(of, hit) if count else (None, None)
        value = float(hit[of].mean()) if count else None
        found[name] = {"value": value, "low": low, "high": high, "images": count} | (
            {} if count else {"reason": reason}
        )
    return found | {
        "true_positives": int((truth & said).sum()),
        "false_negatives": int((truth & ~said).sum()),
        "false_positives": int((~truth & said).sum()),
        "true_negatives": int((~truth & ~said).sum()),
    }


def areas(scores: npt.ArrayLike, positive: npt.ArrayLike, *, groups: Groups = None) -> dict[str, Any]:
    """The area under the ROC curve and the average precision, each with its 95 % interval.

    The values are those of scikit-learn's ``roc_auc_score`` and ``average_precision_score``. Variances are those of the
    images' (or groups') influences: what one more copy of an image adds, to first order (of the AUC DeLong's). The intervals are
    the exact binomial ones of as many images as that is worth.

    Args:
        scores: (n,).
        positive: (n,) whether an image is of the class looked for.
        groups: (n,) what images belong together, None for an image by itself; None if each is.

    Returns:
        ``auc`` and ``average_precision``, each ``{"value", "low", "high"}``.

    Raises:
        UsageError: A side has no image, or shapes do not fit.
    """
    images = _Images.of(scores, positive, groups)
    ranked = one_vs_rest(np.stack([-images.scores, images.scores], axis=1), images.positive.astype(np.int64))
    low, high = images.auc_limits(ranked)
    return {
        "auc": {"value": float(ranked.values[1]), "low": low, "high": high},
        "average_precision": images.area(*images.average_precision()),
    }


def reliability(
    probabilities: npt.ArrayLike, positive: npt.ArrayLike, *, groups: Groups = None, bins: int = BINS
) -> list[dict[str, Any]]:
    """A reliability diagram's values: how often images of about one probability are positive.

    Args:
        probabilities: (n,) of the class looked for.
        positive: (n,) whether an image is of it.
        groups: (n,) what images belong together, None for an image by itself; None if each is.
        bins: Of about equally many images each; images of one probability stay together, so there may be fewer.

    Returns:
        For each bin ``images``, ``probability`` (their mean), ``from`` and ``to`` (the least and the largest), ``observed``
        (the share that is positive) and its 95 % interval ``low``, ``high``.

    Raises:
        UsageError: There is no image, or shapes do not fit.
    """
    given, truth = np.asarray(probabilities, np.float64), np.asarray(positive, np.bool_)
    images = _Images(given, truth, _numbers(groups, given, truth))
    order = np.sort(given)
    edges = np.unique(order[(np.arange(1, bins) * len(order)) // bins]) if bins > 1 else order[:0]
    places = np.searchsorted(edges, given, side="right")
    found = []
    for place in np.unique(places):
        own = places == place
        low, high = images.share(own, truth)
        found.append(
            {
                "images": int(own.sum()),
                "probability": float(given[own].mean()),
                "from": float(given[own].min()),
                "to": float(given[own].max()),
                "observed": float(truth[own].mean()),
                "low": low,
                "high": high,
            }
        )
    return found


HALF = 0.5
"""The threshold where none was chosen."""


def screening_table(
    scores: npt.ArrayLike,
    positive: npt.ArrayLike,
    called: npt.ArrayLike,
    *,
    threshold: float,
    groups: Groups = None,
    curves: bool = True,
) -> dict[str, Any]:
    """All that is measured of one class that is looked for.

    Args:
        scores: (n,) probabilities of the class.
        positive: (n,) whether an image is of it.
        called: (n,) whether it is called so, which is what ``score >= threshold`` says but for ties.
        threshold: From which score on.
        groups: (n,) what images belong together, None for an image by itself; None if each is.
        curves: Whether to give curves and the reliability diagram, too.

    Returns:
        JSON values: ``images``, ``positives``, ``threshold``, what ``rates`` and, where there are images of both sides, ``areas``
        say, and with ``curves`` the ``roc`` and ``precision_recall`` (`Curve`) and ``reliability``.

    Raises:
        UsageError: There is no image, or shapes do not fit.
    """
    truth = np.asarray(positive, np.bool_)
    found: dict[str, Any] = {"images": len(truth), "positives": int(truth.sum()), "threshold": float(threshold)}
    found |= rates(called, truth, groups=groups)
    if truth.any() and not truth.all():
        found |= areas(scores, truth, groups=groups)
        if curves:
            found["roc"] = roc(scores, truth, groups=groups).as_dict()
            found["precision_recall"] = precision_recall(scores, truth, groups=groups).as_dict()
    if curves:
        found["reliability"] = reliability(scores, truth, groups=groups)
    return found


_TITLES = {
    "sensitivity": "sensitivity (recall)",
    "specificity": "specificity",
    "ppv": "PPV (precision)",
    "npv": "NPV",
    "auc": "AUC",
    "average_precision": "average precision",
}


def screening_text(found: Mapping[str, Any]) -> str:
    """A table of rates and areas with their intervals, and how many images there were.

    Args:
        found: What ``screening_table`` returned.
    """
    rows = []
    for name, title in _TITLES.items():
        one = found.get(name)
        if one is None:
            continue
        value = "-" if one["value"] is None else f"{one['value']:.4f}"
        limits = one.get("reason", "") if one["low"] is None else f"{one['low']:.4f} to {one['high']:.4f}"
        rows.append([title, value, limits, f"{one['images']:,}" if "images" in one else ""])
    counts = (
        f"{found['true_positives']:,} found, {found['false_negatives']:,} missed; "
        f"{found['false_positives']:,} false alarms, {found['true_negatives']:,} rightly passed"
    )
    return f"{table(['measure', 'value', '95 % interval', 'images'], rows)}\n{counts}"


@dataclass(frozen=True)
class Choice:
    """A threshold, and what it reaches on the images by which it was chosen.

    Attributes:
        threshold: Scores at or above it are called positive.
        reached: Whether the wish is met there.
        rates: What ``rates`` says of these images.
        reason: Why the wish is not met, and what was taken instead; empty if it is met.
    """

    threshold: float
    reached: bool
    rates: dict[str, Any]
    reason: str = ""


def choose_threshold(
    scores: npt.ArrayLike, positive: npt.ArrayLike, wish: Wish, *, margin: bool = False, groups: Groups = None
) -> Choice:
    """Chooses the threshold that meets a wish on images that the head was not trained on.

    - recall: the highest threshold whose recall is at least what is wanted;
    - precision: the threshold with the most recall whose precision is at least that;
    - cost: the threshold with the least ``cost of a miss * misses + cost of a false alarm * false alarms``; of equals the one
      with the fewest misses;
    - f1: the threshold with the largest F1; of equals the highest.

    A threshold lies a millionth below a score, if no other score is nearer than twice that: the images' own scores may come
    out that much different elsewhere.

    Args:
        scores: (n,).
        positive: (n,) whether an image is of the class looked for.
        wish: What is wanted.
        margin: Whether the lower 95 % limit of the recall or precision is to reach it, and not the value alone.
        groups: (n,) what images belong together, None for an image by itself; None if each is.

    Returns:
        The threshold. Where the wish cannot be met: of recall (with a margin) the highest threshold that finds all, of precision
        that of the largest precision or limit; ``reason`` says so.

    Raises:
        UsageError: A side has no image, shapes do not fit, or a cost or F1 is to have a margin.
    """
    if margin and not wish.has_margin:
        what = "a cost" if wish.aim == "cost" else "the largest F1"
        raise UsageError(f"{what} has no margin: only a wanted recall or precision has one", option="threshold_margin")
    images = _Images.of(scores, positive, groups)
    at, hits, alarms = images.cumulated(None)
    reached, reason = True, ""
    if wish.aim == "cost":
        costs = wish.least * (images.positives - hits) + alarms
        place = int(np.flatnonzero(costs <= costs.min() * (1 + 1e-12))[-1])
    elif wish.aim == "f1":
        place = int((2 * hits / (hits + alarms + images.positives)).argmax())
    else:
        at, hits, alarms = at[1:], hits[1:], alarms[1:]
        is_recall = wish.aim == "recall"
        value = hits / (images.positives if is_recall else hits + alarms)
        good = value >= wish.least - 1e-12
        limits = value
        if margin:
            limits = np.zeros(len(at))
            # Where the value is too small its limit is, too. From the threshold on that would be taken first.
            for k in np.flatnonzero(good)[:: 1 if is_recall else -1]:
                called = images.scores >= at[k]
                of, hit = (images.positive, called) if is_recall else (called, images.positive)
                limits[k] = images.share(of, hit)[0]
                if limits[k] >= wish.least:
                    break
            good = limits >= wish.least
        found = np.flatnonzero(good)
        if len(found):
            place = int(found[0 if is_recall else -1])
        else:
            best = value if not limits.any() else limits
            place, reached = int(best.argmax()), False
            what = f"the lower 95 % limit of the {wish.aim}" if margin else f"the {wish.aim}"
            reason = (
                f"{wish.text} cannot be reached on {images.positives:,} positive and {images.negatives:,} other images: {what} "
                f"is at most {best[place]:.4f}; the threshold is the one with that"
            )
    threshold = _between(at, place, images.scores)
    called = images.scores >= threshold
    return Choice(threshold, reached, rates(called, images.positive, groups=groups), reason)


def _between(at: Floats, place: int, scores: Floats) -> float:
    """A threshold that parts the images as ``at[place]`` does, but not at an image's own score."""
    upper = float(at[place])
    if not np.isfinite(upper):
        return float(np.nextafter(scores.max(), np.inf))  # nothing is called positive
    near = upper - _ROUNDING * abs(upper)
    return max(near, (upper + float(at[place + 1])) / 2) if place + 1 < len(at) else near


def _numbers(groups: Groups, scores: npt.NDArray[Any], positive: Mask) -> Codes | None:
    if scores.ndim != 1 or scores.shape != positive.shape or not len(scores):
        raise UsageError(
            f"scores of shape {scores.shape} and truth of shape {positive.shape}: give one of each for every image, at least one"
        )
    return None if groups is None else units_of(groups, len(scores))


@dataclass(frozen=True)
class _Images:
    """Scores, truth and groups of images, (n,) each."""

    scores: Floats
    positive: Mask
    groups: Codes | None

    @classmethod
    def of(cls, scores: npt.ArrayLike, positive: npt.ArrayLike, groups: Groups) -> _Images:
        given, truth = np.asarray(scores, np.float64), np.asarray(positive, np.bool_)
        numbers = _numbers(groups, given, truth)
        if not np.isfinite(given).all():
            raise UsageError(f"the score of image {int(np.flatnonzero(~np.isfinite(given))[0])} is no finite number")
        if truth.all() or not truth.any():
            raise UsageError(f"all {len(truth):,} images are {'' if truth.all() else 'not '}of the class looked for")
        return cls(given, truth, numbers)

    @property
    def positives(self) -> int:
        return int(self.positive.sum())

    @property
    def negatives(self) -> int:
        return len(self.positive) - self.positives

    def cumulated(self, points: int | None) -> tuple[Floats, Floats, Floats]:
        """Thresholds from infinity down, and positives and negatives at or above each; about ``points`` of them at most."""
        order = np.argsort(-self.scores, kind="stable")
        ordered = self.scores[order]
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        hits = np.concatenate([[0.0], np.cumsum(self.positive[order])[ends]])
        said = np.concatenate([[0.0], ends + 1.0])
        at = np.concatenate([[np.inf], ordered[ends]])
        if points is not None and len(at) > points:
            # Evenly along the curve, which moves by a positive's or a negative's share with each image.
            length = hits / self.positives + (said - hits) / self.negatives
            kept = np.unique(np.searchsorted(length, np.linspace(0, 2 - 1e-9, points)))
            at, hits, said = at[kept], hits[kept], said[kept]
        return at, hits, said - hits

    def share(self, of: Mask, hit: Mask) -> Limits:
        """The interval of which share of the images ``of`` is ``hit``."""
        count = int(of.sum())
        value = float(hit[of].mean())
        if self.groups is None:
            return intervals.proportion(value, count)
        rest = np.where(of, hit - value, 0.0)
        groups = int(np.count_nonzero(np.bincount(self.groups[of])))
        if groups < 2:
            return 0.0, 1.0  # of one group nothing can be said of others
        totals = np.bincount(self.groups, rest)
        variance = float((totals**2).sum()) * groups / (groups - 1) / count**2
        return group_intervals.limits(value, variance, count, groups)

    def auc_limits(self, ranked: OneVsRest) -> Limits:
        """The interval of the AUC, the same as ``heads.statistics.metrics.score_table`` gives for two classes."""
        if self.groups is None:
            return intervals.macro_auc(ranked, np.array([self.negatives, self.positives]))
        groups = int(self.groups.max()) + 1
        variance = float((np.bincount(self.groups, ranked.influence) ** 2).sum()) * groups / (groups - 1)
        return group_intervals.limits(ranked.macro, variance, 6.0 * min(self.positives, self.negatives), groups)

    def area(self, value: float, influence: Floats) -> dict[str, float]:
        """A measure with the interval that its influences give."""
        fewer = min(self.positives, self.negatives)
        most = 3.0 * fewer
        if self.groups is None:
            variance = float((influence**2).sum())
            inner = (value * 2 * fewer + 1) / (2 * fewer + 2)
            images = min(most, inner * (1 - inner) / variance) if variance > 0 else fewer
            low, high = intervals.proportion(value, images, max(2.0, fewer - 1))
        else:
            count = min(len(np.unique(self.groups[self.positive])), len(np.unique(self.groups[~self.positive])))
            count = max(2, count)
            variance = float((np.bincount(self.groups, influence) ** 2).sum()) * count / (count - 1)
            low, high = group_intervals.limits(value, variance, most, count)
        return {"value": value, "low": low, "high": high}

    def average_precision(self) -> tuple[float, Floats]:
        """The average precision, and (n,) the influence of each image on it.

        It is the mean over positives of the precision at their scores, ``h / a`` of ``a`` images there, ``h`` of them positive.
        One more copy of an image adds its own term, and to the terms at or below its score ``y / a - h / a**2``.
        """
        at, hits, alarms = (values[1:] for values in self.cumulated(None))
        above = hits + alarms
        precision = hits / above
        gained = np.diff(hits, prepend=0)
        value = float((gained * precision).sum() / self.positives)
        place = np.searchsorted(-at, -self.scores)
        own = np.cumsum((gained / above)[::-1])[::-1]
        every = np.cumsum((gained * hits / above**2)[::-1])[::-1]
        term = np.where(self.positive, precision[place] - value + own[place], 0.0) - every[place]
        return value, np.asarray(term / self.positives)
