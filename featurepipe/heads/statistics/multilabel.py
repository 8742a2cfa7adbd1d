"""How good scores of several labels are: average precision by the rules of PASCAL VOC, AUC and F1, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, stdtrit

from featurepipe.display import first_names, table
from featurepipe.errors import UsageError
from featurepipe.heads.statistics.intervals import LEVEL, Limits, proportion, units_of, with_limits

_LEAST_SIDE = 5  # images of each side below which resampling says nothing of a label
_MOST_UNITS = 20_000  # images or groups that are resampled; of more, the spread is that of a sample, scaled
_CHUNK = 4_000_000  # multiplicities of images drawn at once

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int64]
Measure = Callable[[Floats, Floats], Floats]

PER_LABEL = ("ap", "ap_11_point", "auc", "f1")
"""What is measured of each label."""

OVERALL = {"map": "ap", "map_11_point": "ap_11_point", "auc": "auc", "macro_f1": "f1"}
"""What is measured of all labels together, and of which measure it is the mean; ``micro_f1`` besides."""


def label_table(
    scores: npt.ArrayLike,
    truth: npt.ArrayLike,
    names: Sequence[str],
    *,
    thresholds: float | npt.ArrayLike = 0.0,
    groups: npt.ArrayLike | None = None,
    ids: Sequence[str] | npt.NDArray[Any] | None = None,
    probabilities: npt.ArrayLike | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    mistakes: int = 20,
    plots: bool = True,
) -> dict[str, Any]:
    """Scores several labels of each image, with 95 % intervals; entries that are unknown are left out label by label.

    - ``ap``: the area under the interpolated precision-recall curve, the rule of PASCAL VOC since 2010 (``VOCap`` of the devkit
      of VOC2012): ``sum_i((r_i - r_{i-1}) * max_{j >= i}(p_j))``. ``map`` is its mean over the labels.
    - ``ap_11_point``: the rule of VOC2007, the mean over r = 0, 0.1, ..., 1 of the best precision at a recall of at least r,
      which is compared exactly, in whole images. ``map_11_point`` is its mean.
    - ``auc``: the area under the ROC curve, ties counted half; ``auc`` of all is the mean.
    - ``f1`` of "score above the threshold": ``2 tp / (2 tp + fp + fn)``. ``macro_f1`` is its mean, ``micro_f1`` that of the
      summed counts.

    Images with equal scores enter a curve together, where the devkit takes them in the order of the file. A label without a
    known positive or without a known negative has no measure, and no part in the means; it is in ``unmeasured``.

    Intervals come from resampled images, or whole groups where these are given, the same for all labels (Davison & Hinkley 1997,
    "Bootstrap methods and their application"): Student's interval of the measure's log-odds, less their bias, and at least the
    exact binomial one of as many images as the variance is worth. Simulated with 60 to 400 images of which 10 to 50 % have a
    label, it covers the true average precision in 93 or more of 100 test sets, plain quantiles in 76 to 93. Of more than 20,000
    units so many are drawn and resampled, and the deviation is scaled by the root of the share. A label has no interval below
    5 images of either side.

    Args:
        scores: (n, K), the higher the more likely.
        truth: (n, K): 1 present, 0 absent, NaN unknown.
        names: Of the K labels.
        thresholds: One, or (K,): scores above are predictions.
        groups: (n,) of whatever kind: images with equal values belong together; a missing one is a group of its own.
        ids: (n,) names of the images; by default their positions.
        probabilities: (n, K) that the scores stand for, by which mistakes are ranked; by default ``scores``, where these lie
            within 0 and 1, else mistakes are ranked by how far their scores are from the thresholds.
        bootstrap: Resamples; 0 for no intervals.
        seed: Of the resamples.
        mistakes: How many of the most confident mistakes to list, at most three of one label while others have some.
        plots: Whether to give ``curves``, too.

    Returns:
        JSON values: ``images``, ``groups`` (their number, or null), ``known`` (entries), ``map``, ``map_11_point``, ``auc``,
        ``macro_f1`` and ``micro_f1``, each ``{"value", "low", "high"}`` with a ``"reason"`` where one is null; ``per_label``
        with ``label``, ``positive``, ``negative``, ``unknown``, ``predicted`` (known images above the threshold),
        ``threshold``, ``precision``, ``recall`` and the measures; ``unmeasured``; ``bootstrap``; ``mistakes`` (``count``, and
        ``most_confident``: ``id``, ``label``, whether it is ``present`` and ``predicted``, and the ``probability`` of what was
        predicted, or null); ``curves``, precision over recall of the labels with the worst, middle and best ``ap``.

    Raises:
        UsageError: There is no image, shapes do not fit, a score is not finite, or a label neither 0, 1 nor NaN.
    """
    if bootstrap < 0:
        raise UsageError(f"bootstrap={bootstrap} must be 0 (no intervals) or more; 1000 is usual")
    given, positive, known = _checked(scores, truth, names)
    above = given > _thresholds(thresholds, len(names))
    units = units_of(groups, len(given))
    labels = _Labels(given, positive, known, above)
    values = {name: each[0] for name, each in labels.measures(np.ones((1, len(given)))).items()}
    drawn = labels.limits(units, draws=bootstrap, seed=seed) if bootstrap and int(units.max()) else {}
    unmeasured = ~(labels.positives.astype(bool) & labels.negatives.astype(bool))
    found: dict[str, Any] = {
        "images": len(given),
        "groups": None if groups is None else int(units.max()) + 1,
        "known": int(known.sum()),
    }
    for name in (*OVERALL, "micro_f1"):
        found[name] = with_limits(values[name], drawn.get(name))
        if np.isnan(values[name]):
            found[name]["reason"] = "no label has known images of both sides"
        elif bootstrap and name not in drawn:
            found[name]["reason"] = "no interval: there is one image, or one group"
    found["per_label"] = [_of_label(k, str(name), labels, values, drawn, bootstrap) for k, name in enumerate(names)]
    for entry, threshold in zip(found["per_label"], _thresholds(thresholds, len(names)), strict=True):
        entry["threshold"] = float(threshold)
    found["unmeasured"] = [str(name) for name, lacks in zip(names, unmeasured, strict=True) if lacks]
    found["bootstrap"] = {"resamples": bootstrap, "seed": seed, "level": LEVEL}
    if ids is not None and len(ids) != len(given):
        raise UsageError(f"there are {len(given)} images, but {len(ids)} ids")
    likely = None if probabilities is None else np.asarray(probabilities, np.float64)
    if likely is None and given.min() >= 0 and given.max() <= 1:
        likely = given
    distance = np.abs(given - _thresholds(thresholds, len(names))) if likely is None else None
    found["mistakes"] = _mistakes(labels, likely, distance, names, ids, mistakes)
    if plots:
        found["curves"] = _curves_of(labels, names, values["label_ap"])
    return found


_OF_ONE_LABEL = 3  # mistakes that are listed before those of other labels
_CURVES, _POINTS = 6, 100  # labels whose curves are kept, and points of each at most


def _mistakes(
    labels: _Labels, likely: Floats | None, distance: Floats | None, names: Sequence[str], ids: Any, most: int
) -> dict[str, Any]:
    """The mistakes that were made with the greatest confidence."""
    rows, places = np.nonzero(labels.known & (labels.above != labels.positive))
    said = labels.above[rows, places]
    if likely is None:
        sure = np.asarray(distance)[rows, places]
    else:
        sure = np.where(said, likely[rows, places], 1 - likely[rows, places])
    order = np.argsort(-sure, kind="stable")
    taken = np.zeros(len(names), np.int64)
    first: list[int] = []
    later: list[int] = []
    for number in order:
        place = places[number]
        taken[place] += 1
        (first if taken[place] <= _OF_ONE_LABEL else later).append(int(number))
        if len(first) >= most:
            break
    shown = sorted((first + later)[:most], key=lambda number: -sure[number])
    return {
        "count": len(rows),
        "most_confident": [
            {
                "id": str(rows[number] if ids is None else ids[rows[number]]),
                "label": str(names[places[number]]),
                "present": not bool(said[number]),
                "predicted": bool(said[number]),
                "probability": None if likely is None else float(sure[number]),
            }
            for number in shown
        ],
    }


def _curves_of(labels: _Labels, names: Sequence[str], precisions: Floats) -> list[dict[str, Any]]:
    """Precision over recall of some labels, spread over their average precisions, the worst first."""
    known = np.flatnonzero(~np.isnan(precisions))
    order = known[np.argsort(precisions[known], kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(_CURVES, len(order))).round().astype(np.int64))]
    found = []
    for k in chosen:
        rows = np.flatnonzero(labels.known[:, k])
        (hits,), (misses,) = _Curve(labels.scores[rows, k], labels.positive[rows, k]).counts(np.ones((1, len(rows))))
        last = int((hits == hits[-1]).argmax())  # below, precision only falls
        some = np.unique(np.linspace(0, last, min(_POINTS, last + 1)).round().astype(np.int64))
        found.append(
            {
                "label": str(names[k]),
                "ap": float(precisions[k]),
                "positive": int(hits[-1]),
                "images": len(rows),
                "recall": (hits / hits[-1])[some].tolist(),
                "precision": (hits / (hits + misses))[some].tolist(),
            }
        )
    return found


def average_precisions(scores: npt.ArrayLike, truth: npt.ArrayLike, *, points_11: bool = False) -> Floats:
    """Average precision of each label, unknown entries left out; see ``label_table``.

    Args:
        scores: (n, K).
        truth: (n, K): 1 present, 0 absent, NaN unknown.
        points_11: By the 11-point rule of VOC2007 instead of the area of VOC2012.

    Returns:
        (K,) from 0 to 1; NaN for a label without known positives or without known negatives, or whose scores are NaN.

    Example:
        >>> average_precisions([[0.9], [0.8], [0.7], [0.6]], [[1], [0], [1], [0]]).round(3)
        array([0.833])
    """
    given, known_truth = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    rule = eleven_points if points_11 else interpolated_area
    found = np.full(given.shape[1], np.nan)
    for k in range(given.shape[1]):
        rows = ~np.isnan(known_truth[:, k])
        own = known_truth[rows, k] == 1
        if own.any() and not own.all() and not np.isnan(given[rows, k]).any():
            curve = _Curve(given[rows, k], own)
            found[k] = rule(*curve.counts(np.ones((1, len(own)))))[0]
    return found


def map_contributions(scores: npt.ArrayLike, truth: npt.ArrayLike) -> Floats:
    """Each image's contribution to the mean average precision; their mean is it.

    The influence function of the measure (see ``featurepipe.heads.statistics.comparison``): with p_m the best precision at or
    below a positive image's threshold, reached at threshold m, the AP of P positives is ``sum(p_m) / P``, and the derivative by
    the weight of an image of score s is ``(positive * (p_m - AP) + sum((positive - p_m) / n_m)) / P``, the sum over the positives
    whose m lies at or below s; n_m is the number of images down to it. An image of which a label is unknown has no influence on
    its AP.

    Args:
        scores: (n, K), the higher the more likely.
        truth: (n, K): 1 present, 0 absent, NaN unknown.

    Returns:
        (n,) float64; NaN if no label has known images of both sides.
    """
    given, wanted = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    total, values = np.zeros(len(given)), []
    for k in range(given.shape[1]):
        rows = np.flatnonzero(~np.isnan(wanted[:, k]))
        own = wanted[rows, k] == 1
        if own.any() and not own.all():
            value, slopes = _area_and_slopes(_Curve(given[rows, k], own))
            values.append(value)
            total[rows] += slopes
    if not values:
        return np.full(len(given), np.nan)
    return np.asarray(np.mean(values) + len(given) * total / len(values))


def _area_and_slopes(curve: _Curve) -> tuple[float, Floats]:
    """The area under one interpolated curve, and its derivatives by the weights of the images, in their own order."""
    (hits,), (misses,) = curve.counts(np.ones((1, len(curve.order))))
    down = hits + misses
    best = _best_precision(hits[None], misses[None])[0]
    thresholds = np.arange(len(down))
    reached = np.where(hits / down >= best, thresholds, len(down))
    reached = np.minimum.accumulate(reached[::-1])[::-1]  # where the best precision at or below is reached
    gained = np.diff(hits, prepend=0.0)
    area = float(gained @ best) / float(hits[-1])
    times = np.bincount(reached, gained, len(down)) / down
    above = np.cumsum(times[::-1])[::-1]
    above_precise = np.cumsum((times * best)[::-1])[::-1]
    at = np.searchsorted(curve.ends, np.arange(len(curve.order)))  # of each image in the curve's order its threshold
    slopes = np.empty(len(curve.order))
    slopes[curve.order] = (curve.positive * (best[at] - area) + curve.positive * above[at] - above_precise[at]) / hits[
        -1
    ]
    return area, slopes


def interpolated_area(hits: Floats, misses: Floats) -> Floats:
    """The area under the interpolated precision-recall curve, the rule of VOC2012.

    Args:
        hits: (m, T) positives at or above each of T descending thresholds, the last below all scores.
        misses: (m, T) negatives.

    Returns:
        (m,), NaN where there are no positives.
    """
    best, total = _best_precision(hits, misses), hits[:, -1]
    gained = np.diff(hits, axis=1, prepend=0)
    return _divided((gained * best).sum(axis=1), total)


def eleven_points(hits: Floats, misses: Floats) -> Floats:
    """The mean of the best precision at recalls of at least 0, 0.1, ..., 1, the rule of VOC2007; see ``interpolated_area``."""
    best, total = _best_precision(hits, misses), hits[:, -1]
    rows = np.arange(len(hits))
    found = np.zeros(len(hits))
    for tenths in range(11):
        first = (10 * hits >= tenths * total[:, None]).argmax(axis=1)  # the whole list has all
        found += best[rows, first]
    return np.where(total > 0, found / 11, np.nan)  # a sum of elevenths can exceed 1


def roc_area(hits: Floats, misses: Floats) -> Floats:
    """The area under the ROC curve, NaN where a side is missing; see ``interpolated_area``."""
    before = np.concatenate([np.zeros((len(hits), 1)), hits[:, :-1]], axis=1)
    area = (np.diff(misses, axis=1, prepend=0) * (before + hits) / 2).sum(axis=1)
    return _divided(area, hits[:, -1] * misses[:, -1])


_RULES: Mapping[str, Measure] = {"ap": interpolated_area, "ap_11_point": eleven_points, "auc": roc_area}


def _best_precision(hits: Floats, misses: Floats) -> Floats:
    """The best precision at each threshold or a lower one."""
    whole = hits + misses
    precision = np.divide(hits, whole, out=np.zeros(hits.shape), where=whole > 0)
    return np.asarray(np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1])


def _divided(part: Floats, whole: Floats) -> Floats:
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0))


class _Curve:
    """One label's images in the order of their scores, so that resamples need sums alone."""

    def __init__(self, scores: Floats, positive: Mask) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ordered = scores[self.order]
        self.ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of images with equal scores the last
        self.positive = positive[self.order]

    def counts(self, times: Floats) -> tuple[Floats, Floats]:
        """Positives and negatives down to each distinct score, both (m, T), of (m, n) multiplicities of the images."""
        ordered = times[:, self.order]
        every = np.cumsum(ordered, axis=1)[:, self.ends]
        hits = np.cumsum(ordered * self.positive, axis=1)[:, self.ends]
        return hits, every - hits


@dataclass(frozen=True)
class _Labels:
    """Scores and truth of all labels: (n, K) each.

    Attributes:
        scores: The higher the more likely.
        positive: Known to be present.
        known: Known at all.
        above: Predicted.
    """

    scores: Floats
    positive: Mask
    known: Mask
    above: Mask

    @property
    def positives(self) -> Codes:
        """(K,) known images that have each label."""
        return np.asarray(self.positive.sum(axis=0))

    @property
    def negatives(self) -> Codes:
        """(K,) known images that have it not."""
        return np.asarray((self.known & ~self.positive).sum(axis=0))

    def measures(self, times: Floats) -> dict[str, Floats]:
        """Each measure of (m, n) multiplicities of the images: (m, K) for labels, (m,) overall."""
        labels = self.scores.shape[1]
        found = {name: np.full((len(times), labels), np.nan) for name in PER_LABEL}
        for k, (curve, rows) in enumerate(self._curves()):
            if curve is not None:
                counts = curve.counts(times[:, rows])
                for name, rule in _RULES.items():
                    found[name][:, k] = rule(*counts)
        hits = times @ (self.positive & self.above).astype(times.dtype)
        had = times @ self.positive.astype(times.dtype)
        said = times @ (self.known & self.above).astype(times.dtype)
        both = (self.positives > 0) & (self.negatives > 0)
        found["f1"] = np.where(both, _divided(2 * hits, had + said), np.nan)
        overall = {name: _mean(found[own]) for name, own in OVERALL.items()}
        micro = _divided(2 * hits.sum(axis=1), had.sum(axis=1) + said.sum(axis=1))
        return {**{f"label_{name}": each for name, each in found.items()}, **overall, "micro_f1": micro}

    def _curves(self) -> Iterator[tuple[_Curve | None, Codes]]:
        for k in range(self.scores.shape[1]):
            rows = np.flatnonzero(self.known[:, k])
            own = self.positive[rows, k]
            yield (_Curve(self.scores[rows, k], own) if own.any() and not own.all() else None), rows

    def chosen(self, rows: Codes) -> _Labels:
        """Those of some images."""
        return _Labels(self.scores[rows], self.positive[rows], self.known[rows], self.above[rows])

    def limits(self, units: Codes, *, draws: int, seed: int) -> dict[str, Any]:
        """Limits of each measure by name: a pair overall, and for labels (K, 2), NaN where there are none."""
        rng, count, scale = np.random.default_rng(seed), int(units.max()) + 1, 1.0
        sample, every = self, units
        if count > _MOST_UNITS:
            rows = np.flatnonzero(np.isin(units, rng.choice(count, _MOST_UNITS, replace=False)))
            scale = float(np.sqrt(_MOST_UNITS / count))
            sample, units = self.chosen(rows), np.unique(units[rows], return_inverse=True)[1].reshape(-1)
            count = _MOST_UNITS
        drawn: dict[str, list[Floats]] = {}
        step = max(1, _CHUNK // len(units))
        for first in range(0, draws, step):
            each = rng.multinomial(count, np.full(count, 1 / count), size=min(step, draws - first))
            for name, values in sample.measures(each[:, units].astype(np.float64)).items():
                drawn.setdefault(name, []).append(values)
        whole, here = (one.measures(np.ones((1, len(one.scores)))) for one in (self, sample))
        sides = self._sides(every)
        reach = -float(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - LEVEL) / 2))
        found: dict[str, Any] = {}
        for name, parts in drawn.items():
            spread = _Spread(np.concatenate(parts), here[name][0], reach, scale, len(self.scores))
            if whole[name].ndim == 1:
                found[name] = spread.limits(float(whole[name][0]), None, min(int(sides.sum()), int(every.max()) + 1))
                continue
            limits = np.full((whole[name].shape[1], 2), np.nan)
            for k in np.flatnonzero(np.minimum(self.positives, self.negatives) >= _LEAST_SIDE):
                limits[k] = spread.limits(float(whole[name][0, k]), int(k), int(sides[k])) or (np.nan, np.nan)
            found[name] = limits
        return {name: limits for name, limits in found.items() if limits is not None}

    def _sides(self, units: Codes) -> Codes:
        """(K,) of how many units the smaller side of each label is."""
        pairs = zip(self.positive.T, (self.known & ~self.positive).T, strict=True)
        return np.array([min(len(np.unique(units[one])), len(np.unique(units[other]))) for one, other in pairs])


class _Spread:
    """Resampled values of a measure, and the intervals that they make."""

    def __init__(self, drawn: Floats, here: Floats, reach: float, scale: float, images: int) -> None:
        """Stores them.

        Args:
            drawn: (m,) or (m, K) values of the resamples.
            here: () or (K,) the value of the images that were resampled.
            reach: How many deviations the interval reaches.
            scale: What the deviation of all images is, of that of the images resampled.
            images: How many there are.
        """
        self.drawn, self.here, self.reach, self.scale, self.edge = drawn, here, reach, scale, 1 / (images + 2)

    def limits(self, value: float, label: int | None, units: int) -> Limits | None:
        """The interval about a value, of a label if it is given; None without a value.

        The log-odds of a measure are nearer to normal than the measure, and an average precision is too high by about as much
        as its resamples are above it: the interval is that of the log-odds less their bias. Close to 1 resamples hardly vary, so
        it is widened to the exact binomial interval of as many images as their variance says, at most three times the units
        of the smaller side.
        """
        drawn = self.drawn if label is None else self.drawn[:, label]
        here = float(self.here if label is None else self.here[label])
        drawn = drawn[~np.isnan(drawn)]
        if np.isnan(value) or np.isnan(here) or not len(drawn) or not units:
            return None
        odds = logit(np.clip(drawn, self.edge, 1 - self.edge))
        middle, at = (float(logit(np.clip(one, self.edge, 1 - self.edge))) for one in (value, here))
        bias, deviation = self.scale**2 * (float(odds.mean()) - at), self.scale * float(odds.std())
        low, high = (float(expit(middle - bias + side * self.reach * deviation)) for side in (-1, 1))
        inner, variance = (value * units + 1) / (units + 2), self.scale**2 * float(drawn.var())
        worth = min(3.0 * units, inner * (1 - inner) / variance) if variance > 0 else float(units)
        exact = proportion(value, worth, max(2.0, units - 1.0)) if variance > 0 else proportion(value, units)
        if variance == 0:
            return exact
        return min(low, exact[0], value), max(high, exact[1], value)


def _mean(values: Floats) -> Floats:
    """The mean over the labels that have a value; NaN where none has."""
    defined = ~np.isnan(values)
    return _divided(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))


def _of_label(
    k: int, name: str, labels: _Labels, values: Mapping[str, Any], drawn: Mapping[str, Any], bootstrap: int
) -> dict[str, Any]:
    positive, negative = int(labels.positives[k]), int(labels.negatives[k])
    predicted = int((labels.known & labels.above)[:, k].sum())
    hits = int((labels.positive & labels.above)[:, k].sum())
    entry: dict[str, Any] = {
        "label": name,
        "positive": positive,
        "negative": negative,
        "unknown": len(labels.scores) - positive - negative,
        "predicted": predicted,
        "precision": hits / predicted if predicted else None,
        "recall": hits / positive if positive else None,
    }
    for measure in PER_LABEL:
        value = float(values[f"label_{measure}"][k])
        limits = drawn[f"label_{measure}"][k] if f"label_{measure}" in drawn else (np.nan, np.nan)
        entry[measure] = with_limits(value, None if np.isnan(limits[0]) else (float(limits[0]), float(limits[1])))
        if np.isnan(value):
            entry[measure]["reason"] = f"no known {'positive' if not positive else 'negative'} image"
        elif bootstrap and entry[measure]["low"] is None:
            entry[measure]["reason"] = f"no interval: fewer than {_LEAST_SIDE} images of a side"
    return entry


def _thresholds(given: float | npt.ArrayLike, labels: int) -> Floats:
    found = np.asarray(given, np.float64)
    if found.shape not in ((), (labels,)):
        raise UsageError(
            f"thresholds of shape {found.shape} for {labels} labels: give one number, or one for each label"
        )
    return np.broadcast_to(found, labels)


def _checked(scores: npt.ArrayLike, truth: npt.ArrayLike, names: Sequence[str]) -> tuple[Floats, Mask, Mask]:
    given, wanted = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    if wanted.ndim != 2 or given.shape != wanted.shape or wanted.shape[1] != len(names):
        raise UsageError(
            f"scores of shape {given.shape} and labels of shape {wanted.shape} for {len(names)} names: give both as "
            "(images, labels)"
        )
    if not len(wanted):
        raise UsageError("there is no labelled image to score")
    if not np.isfinite(given).all():
        bad = np.flatnonzero(~np.isfinite(given).all(axis=1))
        raise UsageError(f"the scores of {len(bad)} images are not all finite, first row {bad[0]}")
    known = ~np.isnan(wanted)
    if not np.isin(wanted[known], (0, 1)).all():
        raise UsageError("labels to score with must be 1 (present), 0 (absent) or NaN (unknown)")
    return given, wanted == 1, known


TITLES: Mapping[str, str] = {
    "map": "mean average precision",
    "map_11_point": "mean average precision, 11 points",
    "auc": "AUC, mean of the labels",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
}


def labels_text(metrics: Mapping[str, Any], most: int = 30) -> str:
    """A table of measures with their intervals, and of the labels, those of the lowest average precision first.

    Args:
        metrics: What ``label_table`` returns.
        most: Labels to show.
    """
    rows, reasons = [], []
    for name, title in TITLES.items():
        found = metrics[name]
        if found["value"] is None:
            reasons.append(f"{title}: none, {found['reason']}")
            continue
        limits = found.get("reason", "") if found["low"] is None else f"{found['low']:.4f} to {found['high']:.4f}"
        rows.append([title, f"{found['value']:.4f}", limits])
    interval = "95 % interval" if any(row[2] for row in rows) else ""
    measured = [entry for entry in metrics["per_label"] if entry["ap"]["value"] is not None]
    measured.sort(key=lambda entry: entry["ap"]["value"])
    titles = {"ap": "AP", "auc": "AUC", "f1": "F1"}
    if all("ece" in entry for entry in measured):
        titles["ece"] = "calibration error"
    each = [
        [entry["label"], str(entry["positive"]), str(entry["negative"]), str(entry["unknown"])]
        + [_shown(entry[name]) for name in titles]
        for entry in measured[:most]
    ]
    parts = [table(["measure", "value", interval], rows), *reasons]
    if each:
        parts += ["", table(["label", "with", "without", "unknown", *titles.values()], each)]
    if len(measured) > most:
        more = len(measured) - most
        parts.append(f"and {more} more {'label' if more == 1 else 'labels'}")
    parts += _reasons_text(measured[:most], titles)
    if metrics["unmeasured"]:
        parts.append(unmeasured_text(metrics["unmeasured"]))
    return "\n".join(parts)


def _reasons_text(entries: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Why intervals are missing: a line for each reason, with the measures and labels that it holds for."""
    lacking: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for entry in entries:
        found = {name: entry[name]["reason"] for name in titles if entry[name].get("reason")}
        for reason in dict.fromkeys(found.values()):
            names = tuple(titles[name] for name in found if found[name] == reason)
            lacking.setdefault((reason, names), []).append(entry["label"])
    return [
        f"{' and '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)} of "
        f"{'all these labels' if len(labels) == len(entries) > 1 else first_names(labels, _NAMED)}: {reason}"
        for (reason, names), labels in lacking.items()
    ]


_NAMED = 10


def unmeasured_text(names: Sequence[str]) -> str:
    """Names the labels that no measure says anything about."""
    labels = "label" if len(names) == 1 else "labels"
    return f"{labels} without test images of both sides, not measured: {first_names(names, _NAMED)}"


def _shown(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "-"
    return f"{entry['value']:.3f}" + ("" if entry["low"] is None else f" ({entry['low']:.3f} to {entry['high']:.3f})")
