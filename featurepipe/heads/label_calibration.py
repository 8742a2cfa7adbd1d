"""Thresholds and probabilities of several labels, from images that the head was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.aims import Wish
from featurepipe.heads.statistics.intervals import calibration_error
from featurepipe.heads.statistics.screening import choose_threshold, rates

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
AIMS = ("f1", "recall", "precision")
_ITERATIONS = 100


@dataclass(frozen=True)
class LabelThresholds:
    """Thresholds (K,): scores above them are predictions; and whether each reaches what was wanted, (K,)."""

    values: Floats
    reached: Mask


def choose_thresholds(
    scores: npt.ArrayLike, truth: npt.ArrayLike, *, aim: str = "f1", at_least: float | None = None
) -> LabelThresholds:
    """Chooses a threshold for each label on validation images, half-way between two scores; unknown entries are left out.

    Args:
        scores: (n, K).
        truth: (n, K): 1 present, 0 absent, NaN unknown.
        aim: ``"f1"``: the largest F1; ``"recall"``: the highest threshold whose recall is at least ``at_least``;
            ``"precision"``: the threshold with the most recall whose precision is at least that.
        at_least: For recall and precision, above 0 and at most 1.

    Returns:
        Thresholds. A label without known positives or negatives keeps 0, and one that cannot reach the precision takes the
        threshold of its best precision; both are not ``reached``.

    Raises:
        UsageError: An unknown aim, or a share that is not between 0 and 1.
    """
    if aim not in AIMS:
        raise UsageError(f"aim={aim!r} of thresholds: choices are {', '.join(AIMS)}")
    if (aim == "f1") != (at_least is None) or (at_least is not None and not 0 < at_least <= 1):
        raise UsageError(
            f"at_least={at_least!r} with aim={aim!r}: a wanted recall or precision lies above 0 and is at most 1; F1 takes none"
        )
    given, wanted = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    values, reached = np.zeros(given.shape[1]), np.zeros(given.shape[1], np.bool_)
    for k in range(given.shape[1]):
        rows = ~np.isnan(wanted[:, k])
        own = wanted[rows, k] == 1
        if own.any() and not own.all():
            values[k], reached[k] = _threshold(given[rows, k], own, aim, at_least or 0.0)
    return LabelThresholds(values, reached)


FEW = 5
"""Validation images of a side below which a label's threshold is not chosen, but is where its probability is a half."""


def label_thresholds(
    scores: npt.ArrayLike,
    truth: npt.ArrayLike,
    names: Sequence[str],
    sigmoids: LabelSigmoids,
    wish: Wish,
    *,
    margin: bool = False,
    groups: Any = None,
) -> dict[str, Any]:
    """Chooses a threshold for each label on validation images, and says what it reaches there; unknown entries are left out.

    Args:
        scores: (n, K), of images that the head was not trained on.
        truth: (n, K): 1 present, 0 absent, NaN unknown.
        names: Of the K labels.
        sigmoids: That make probabilities of the scores.
        wish: What each is to reach; of f1 as ``choose_thresholds``, of others as ``screening.choose_threshold``.
        margin: Whether the lower 95 % limit of a recall or precision is to reach it, and not the value alone.
        groups: (n,) what images belong together, None for an image by itself; None if each is.

    Returns:
        JSON values: ``thresholds``, of scores, above which a label is predicted; ``rule`` and ``margin``; ``few``, the labels
        with fewer than 5 images of a side, whose threshold is where the probability is a half; ``unreached``, those where the
        wish cannot be met; and of each label, ``per_label``: ``label``, ``threshold``, ``reached``, ``reason`` (why not, else
        empty), and what ``screening.rates`` says of the known images.
    """
    given, wanted = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    largest_f1 = choose_thresholds(given, wanted).values
    found: list[dict[str, Any]] = []
    few, unreached = [], []
    for k, name in enumerate(map(str, names)):
        known = ~np.isnan(wanted[:, k])
        own, positive = given[known, k], wanted[known, k] == 1
        members = None if groups is None else np.asarray(groups, dtype=object)[known]
        threshold, reason = float(largest_f1[k]), ""
        if min(int(positive.sum()), int((~positive).sum())) < FEW:
            few.append(name)
            threshold = sigmoids.half(k)
            reason = f"{int(positive.sum())} validation images with it and {int((~positive).sum())} without are too few"
        elif wish.aim != "f1":
            choice = choose_threshold(own, positive, wish, margin=margin, groups=members)
            threshold, reason = (
                float(np.nextafter(choice.threshold, -np.inf)),
                choice.reason,
            )  # from which on, not above
            unreached += [] if choice.reached else [name]
        entry = {"label": name, "threshold": threshold, "reached": not reason, "reason": reason}
        found.append(entry | (rates(own > threshold, positive, groups=members) if len(own) else {}))
    return {
        "thresholds": [entry["threshold"] for entry in found],
        "rule": wish.text,
        "margin": margin,
        "few": few,
        "unreached": unreached,
        "per_label": found,
    }


def _threshold(scores: Floats, positive: Mask, aim: str, least: float) -> tuple[float, bool]:
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    hits, said = np.cumsum(positive[order])[ends], ends + 1.0
    precision, recall = hits / said, hits / hits[-1]
    if aim == "f1":
        place, reached = int((2 * hits / (said + hits[-1])).argmax()), True
    elif aim == "recall":
        place, reached = int((recall >= least).argmax()), True
    else:
        good = np.flatnonzero(precision >= least)
        place, reached = (int(good[-1]), True) if len(good) else (int(precision.argmax()), False)
    upper = float(ordered[ends[place]])
    lower = float(ordered[ends[place] + 1]) if place + 1 < len(ends) else upper - max(1.0, abs(upper))
    middle = (upper + lower) / 2
    return (middle if lower <= middle < upper else lower), reached


@dataclass(frozen=True)
class LabelSigmoids:
    """Probabilities of labels as ``1 / (1 + exp(-(slope * score + offset)))``; (K,) each.

    Attributes:
        slopes: The inverse of each label's temperature.
        offsets: Log-odds at a score of zero.
        fitted: Labels that had images of both sides to fit to; others keep slope 1 and offset 0.
    """

    slopes: Floats
    offsets: Floats
    fitted: Mask

    @classmethod
    def of_heads_own(cls, labels: int) -> Self:
        """Those of so many labels that leave scores as the log-odds that they may be."""
        return cls(np.ones(labels), np.zeros(labels), np.zeros(labels, np.bool_))

    def half(self, label: int) -> float:
        """The score at which a label's probability is a half; 0 where no score makes it larger."""
        slope, offset = float(self.slopes[label]), float(self.offsets[label])
        return -offset / slope if slope > 0 else 0.0

    def probabilities(self, scores: npt.ArrayLike) -> Floats:
        """Returns (n, K) probabilities of (n, K) scores."""
        return np.asarray(expit(np.asarray(scores, np.float64) * self.slopes + self.offsets))


def fit_sigmoids(scores: npt.ArrayLike, truth: npt.ArrayLike) -> LabelSigmoids:
    """Fits a sigmoid for each label to held-out images; unknown entries are left out.

    Platt 1999, "Probabilistic outputs for support vector machines": slope and offset minimise the cross-entropy to targets of
    ``(n+ + 1) / (n+ + 2)`` for the n+ positive images and ``1 / (n- + 2)`` for the n- others, so that labels that are told apart
    without a mistake do not become certain. The objective is convex and smooth; Newton's method with halved steps (Lin, Lin
    & Weng 2007, "A note on Platt's probabilistic outputs").

    Args:
        scores: (n, K), of images that the head was not trained on.
        truth: (n, K): 1 present, 0 absent, NaN unknown.
    """
    given, wanted = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    labels = given.shape[1]
    slopes, offsets, fitted = np.ones(labels), np.zeros(labels), np.zeros(labels, np.bool_)
    for k in range(labels):
        rows = ~np.isnan(wanted[:, k])
        own = wanted[rows, k] == 1
        if own.any() and not own.all():
            slopes[k], offsets[k] = _sigmoid(given[rows, k], own)
            fitted[k] = True
    return LabelSigmoids(slopes, offsets, fitted)


def label_calibration_errors(
    probabilities: npt.ArrayLike,
    truth: npt.ArrayLike,
    *,
    in_groups: bool = False,
    bins: int = 15,
    draws: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How far each label's probability is from how often it is present, with 95 % intervals; unknown entries are left out.

    The expected calibration error of Naeini et al. 2015 ("Obtaining well calibrated probabilities using Bayesian binning") of the
    probability that the label is present: the mean over images of ``|share present - mean probability|`` of their bin.

    Args:
        probabilities: (n, K).
        truth: (n, K): 1 present, 0 absent, NaN unknown.
        in_groups: Whether images come in groups, for which no interval is known that holds.
        bins: Number of equal intervals of [0, 1], open below.
        draws: Behind each interval (`heads.statistics.intervals.calibration_error`); 0 for none.
        seed: Of the draws.

    Returns:
        K times ``value``, from 0 (right in every bin) to 1, null where nothing is known, ``low`` and ``high``, with a ``reason``
        where one is null.
    """
    given, wanted = np.asarray(probabilities, np.float64), np.asarray(truth, np.float64)
    found: list[dict[str, Any]] = []
    for k in range(given.shape[1]):
        known = ~np.isnan(wanted[:, k])
        entry: dict[str, Any] = {"value": None, "low": None, "high": None}
        found.append(entry)
        if not known.any():
            entry["reason"] = "nothing is known of any image"
            continue
        likely, own = given[known, k], wanted[known, k]
        number = np.clip(np.ceil(likely * bins).astype(np.int64) - 1, 0, bins - 1)
        gaps = np.bincount(number, likely - own, bins).astype(np.float64)
        entry["value"] = min(1.0, float(np.abs(gaps).sum()) / len(likely))
        if in_groups:
            entry["reason"] = "no interval: none is known that holds for groups"
        elif draws:
            hits, counts = np.bincount(number, own, bins).astype(np.int64), np.bincount(number, minlength=bins)
            entry["low"], entry["high"] = calibration_error(gaps, hits, counts, draws=draws, seed=seed)
    return found


def _sigmoid(scores: Floats, positive: Mask) -> tuple[float, float]:
    """Slope and offset of one label, worked out on standardised scores."""
    with_, without = int(positive.sum()), int((~positive).sum())
    target = np.where(positive, (with_ + 1) / (with_ + 2), 1 / (without + 2))
    middle, spread = float(scores.mean()), float(scores.std())
    design = np.stack([(scores - middle) / (spread or 1.0), np.ones(len(scores))])
    point = np.array([0.0, np.log((with_ + 1) / (without + 1))])

    def loss(at: Floats) -> float:
        values = at @ design
        return float((np.logaddexp(0, values) - target * values).sum())

    value = loss(point)
    for _ in range(_ITERATIONS):
        likely = expit(point @ design)
        gradient = design @ (likely - target)
        second = (design * (likely * (1 - likely))) @ design.T + 1e-12 * len(scores) * np.eye(2)
        direction = -np.linalg.solve(second, gradient)
        step, slope = 1.0, float(gradient @ direction)
        while step > 1e-10 and loss(point + step * direction) > value + 1e-4 * step * slope:
            step /= 2
        point = point + step * direction
        before, value = value, loss(point)
        if before - value <= 1e-12 * abs(value):
            break
    if not spread:
        return 1.0, float(point[1] - middle)
    return float(point[0] / spread), float(point[1] - point[0] * middle / spread)
