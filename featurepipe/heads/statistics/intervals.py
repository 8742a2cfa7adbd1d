"""Confidence intervals for measures of a test set that hold their level for few images, many classes, groups, and near 0 and 1.

Most are one idea: estimate the measure's variance, see how many independent images would give it, and take the exact
binomial interval for so many (Korn & Graubard 1998, "Confidence intervals for proportions with small expected number of
positive counts estimated from survey data"; for plain proportions that is Clopper & Pearson 1934). Resampling the images
would give intervals without width where every image is right, and too narrow ones where classes have few images.
``benchmarks/interval_coverage.py`` simulates the coverage of each; its figures are in ``docs/intervals.md``.

Whole groups are resampled (the bootstrap of clusters, Davison & Hinkley 1997, section 3.8) to estimate the variance of each
measure; of the AUC the variance is that of the groups' summed influences (Obuchowski 1997, "Nonparametric analysis of clustered
ROC curve data"). The variance, to which half a group all right and half a group all wrong are added, so that few
mistakes do not look certain, says how many independent images the measure is as certain as. The interval is the exact binomial
one of so many (Korn & Graubard 1998), with the degrees of freedom of the groups. Where nothing varies, a group is one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.special import betaincinv, stdtrit

from featurepipe.errors import UsageError

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OneVsRest:
    """The AUC of every class against the rest.

    Attributes:
        values: (K,) AUC, NaN for a class without images or without images of others.
        influence: (n,) what one more copy of an image adds to the mean AUC, to first order, scaled so that the squares sum to
            the mean's variance.
    """

    values: Array
    influence: Array

    @property
    def macro(self) -> float:
        """The mean over the classes that have an AUC; NaN if none has."""
        defined = self.values[~np.isnan(self.values)]
        return float(defined.mean()) if len(defined) else float("nan")


def one_vs_rest(probabilities: npt.NDArray[np.floating], codes: Codes) -> OneVsRest:
    """Ranks the images once per class; ties count half (Mann and Whitney).

    The influence of an image is its structural component (DeLong, DeLong and Clarke-Pearson, 1988): for an image of
    the class the share of others below it, for another image the share of the class above it, both less their mean. The only
    image of a class has no mean but itself, so that of all classes is taken.

    Args:
        probabilities: (n, K).
        codes: (n,) position of the true class.
    """
    n, classes = probabilities.shape
    values, influence = np.full(classes, np.nan), np.zeros(n)
    support = np.bincount(codes, minlength=classes)
    defined = np.flatnonzero((support > 0) & (support < n))
    single = np.full(n, np.nan)  # of the only image of a class
    for k in defined:
        order, start, stop = _ranked(_scores(probabilities, int(k)))
        own = codes == k
        sorted_own = own[order]
        below = _middle(np.cumsum(~sorted_own), start[own], stop[own]) / (n - support[k])
        above = 1 - _middle(np.cumsum(sorted_own), start[~own], stop[~own]) / support[k]
        values[k] = below.mean()
        if support[k] > 1:
            unbiased = np.sqrt(support[k] / (support[k] - 1))
            influence[own] += unbiased * (below - values[k]) / (support[k] * len(defined))
        else:
            single[own] = values[k] / len(defined)
        influence[~own] += (above - values[k]) / ((n - support[k]) * len(defined))
    alone = ~np.isnan(single)
    influence[alone] += single[alone] - values[defined].mean() / len(defined) if alone.any() else 0.0
    return OneVsRest(values, influence)


def _scores(probabilities: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.floating]:
    """What ranks class ``k``; of two classes both are ranked by the second's probability, as scikit-learn does."""
    if probabilities.shape[1] == 2:
        return probabilities[:, 1] if k == 1 else -probabilities[:, 1]
    return probabilities[:, k]


def _ranked(
    scores: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The ascending order, and for every image where its group of equal scores starts and stops in that order."""
    order = np.argsort(scores)
    ordered = scores[order]
    firsts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(firsts, len(scores)))
    start, stop = np.empty_like(order), np.empty_like(order)
    start[order], stop[order] = np.repeat(firsts, sizes), np.repeat(firsts + sizes, sizes)
    return order, start, stop


def _middle(sums: npt.NDArray[np.int64], start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64]) -> Array:
    """What cumulative ``sums`` hold before each group of ties, and half of what the group adds."""
    padded = np.concatenate([[0], sums])
    middle: Array = (padded[start] + padded[stop]) / 2
    return middle


LEVEL = 0.95
"""Nominal coverage of every interval."""

_SQUARED_QUANTILE = 3.841458820694124  # of the standard normal distribution, two-sided
_PSEUDO = (
    2.0  # images of each kind that a smoothed estimate adds, as Agresti & Coull 1998 add two successes and two failures
)
Limits = tuple[float, float]


def with_limits(value: float, limits: Limits | None) -> dict[str, Any]:
    """A measure as JSON values: ``value``, None if it is not defined, and its interval ``low``, ``high``, None if it has none."""
    low, high = limits or (None, None)
    return {"value": None if np.isnan(value) else float(value), "low": low, "high": high}


def proportion(value: float, images: float, freedom: float | None = None) -> Limits:
    """Returns the exact binomial interval of a proportion that is as certain as that of so many independent images.

    Args:
        value: From 0 to 1.
        images: Effective number of independent images, > 0; need not be whole.
        freedom: Degrees of freedom of the variance that ``images`` was derived from; None for a plain count.

    Example:
        >>> [round(limit, 3) for limit in proportion(1.0, 24)]
        [0.858, 1.0]
    """
    if freedom is not None:
        images *= _SQUARED_QUANTILE / float(stdtrit(freedom, (1 + LEVEL) / 2)) ** 2
    hits, tail = value * images, (1 - LEVEL) / 2
    low = float(betaincinv(hits, images - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, images - hits, 1 - tail)) if hits < images else 1.0
    return min(value, low), max(value, high)


def balanced_accuracy(hits: Codes, support: Codes) -> Limits:
    """Returns the interval of the mean recall over the classes that have images.

    The wider one, at each end, of two. One takes the sum of the recalls' variances, each shrunk towards the common accuracy by
    two pseudo-images, so that a class with one image, which is all right or all wrong, does not count as certain. The other
    squares and adds the distances of each class's own exact limits (Newcombe 1998, "Interval estimation for the difference
    between independent proportions"), so that few images of one class are not taken to be as good as many of another.

    Args:
        hits: (K,) images of each class that were right.
        support: (K,) images of each class.
    """
    hits, support = hits[support > 0], support[support > 0]
    common = (hits.sum() + _PSEUDO) / (support.sum() + 2 * _PSEUDO)
    shrunk = (hits + _PSEUDO * common) / (support + _PSEUDO)
    variance = float((shrunk * (1 - shrunk) / support).sum()) / len(hits) ** 2
    middle = float(shrunk.mean())
    recall = hits / support
    value = float(recall.mean())
    pooled = proportion(value, middle * (1 - middle) / variance)
    own = np.array([proportion(float(part), float(count)) for part, count in zip(recall, support, strict=True)])
    below, above = np.sqrt(((own - recall[:, None]) ** 2).sum(axis=0)) / len(hits)
    return max(0.0, min(pooled[0], value - float(below))), min(1.0, max(pooled[1], value + float(above)))


def least_images(classes: int) -> int:
    """Images of each class below which a macro F1 has no interval: its bias over its error grows by root classes / images."""
    return max(3, classes // 10)


def macro_f1(codes: Codes, predicted: Codes, classes: int) -> Limits | None:
    """Returns the interval of the mean F1 over the classes that are true or predicted; None where one of them has too few images.

    The variance is that of the images' influences (the delta method), with each class's F1 shrunk towards a half by two
    pseudo-counts, so that a class whose few images are all right does not count as certain.

    Args:
        codes: (n,) position of the true class.
        predicted: (n,) position of the predicted class.
        classes: Number of classes.
    """
    n = len(codes)
    support = np.bincount(codes, minlength=classes)
    counts = support + np.bincount(predicted, minlength=classes)
    if support[counts > 0].min() < least_images(int((counts > 0).sum())):
        return None
    right = (codes == predicted).astype(np.int64)
    hits = np.bincount(codes[codes == predicted], minlength=classes)
    defined = int((counts > 0).sum())
    whole = np.maximum(counts, 1)
    f1 = 2 * hits / whole
    shrunk = (2 * hits + _PSEUDO / 2) / (whole + _PSEUDO)
    influence = (
        2 * right / whole[codes] - shrunk[codes] / whole[codes] - shrunk[predicted] / whole[predicted]
    ) / defined
    value = float(f1.sum() / defined)
    inner = float(np.clip(value, 1 / (n + 2), 1 - 1 / (n + 2)))
    variance = float((influence**2).sum()) * n / max(n - defined, n / 2)  # each class's ratio is fitted to its images
    return proportion(value, min(float(n), inner * (1 - inner) / variance) if variance > 0 else float(n))


def macro_auc(ranked: OneVsRest, support: Codes) -> Limits:
    """Returns the interval of the mean AUC of each class against the rest, from the images' influences.

    After DeLong, DeLong & Clarke-Pearson 1988 ("Comparing the areas under two or more correlated receiver operating
    characteristic curves"); the influence of a class's only image is its distance from the mean of all classes.

    Args:
        ranked: What ``one_vs_rest`` returned.
        support: (K,) images of each class.
    """
    n = int(support.sum())
    fewer = np.minimum(support, n - support)[~np.isnan(ranked.values)]
    groups = len(fewer) ** 2 / float((1 / fewer).sum())  # of equal size, as uncertain as classes of these sizes
    inner = (ranked.macro * groups + 1) / (groups + 2)
    variance = float((ranked.influence**2).sum())
    images = min(3 * groups, inner * (1 - inner) / variance) if variance > 0 else groups
    return proportion(ranked.macro, images, max(2.0, groups - 1))


def calibration_error(gaps: Array, hits: Codes, counts: Codes, *, draws: int, seed: int) -> Limits:
    """Returns the interval of an expected calibration error over bins of confidence.

    The error of an estimated sum of absolute gaps is at most the sum of the absolute errors of the gaps. That sum's 95 %
    quantile is simulated, bin by bin, from smoothed shares of right images (Jeffreys' half an image of each kind), and taken
    off and added. So the interval holds at least its level, and holds the value, which is biased upwards, inside.

    Args:
        gaps: (B,) sums of confidence less hits.
        hits: (B,) images that were right.
        counts: (B,) images.
        draws: How many to simulate.
        seed: Of the draws.
    """
    n = int(counts.sum())
    used = counts > 0
    count, confidence = counts[used], (gaps[used] + hits[used]) / counts[used]
    accuracy = (hits[used] + 0.5) / (count + 1)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, count / n, size=draws)
    right = rng.binomial(drawn, accuracy)
    errors = np.abs(drawn * confidence - right - count * (confidence - accuracy)).sum(axis=1) / n
    reach = float(np.quantile(errors, LEVEL))
    value = float(np.abs(gaps).sum()) / n
    return max(0.0, value - reach), min(1.0, value + reach)


def log_loss(losses: Array, right: npt.NDArray[np.bool_], confidence: Array) -> Limits:
    """Returns Student's interval of the mean loss after two pseudo-images of each kind, right and wrong.

    A sample without a single mistake says little about what a mistake costs: a wrong pseudo-image has the mean loss of the
    wrong ones or, if there are none, what the images would lose on average if another class were theirs.

    Args:
        losses: (n,) minus the logarithm of the true class's probability.
        right: (n,) whether that class was predicted.
        confidence: (n,) probability of the predicted class.
    """
    n, value = len(losses), float(losses.mean())
    smallest = np.finfo(np.float64).eps
    wrong = losses[~right].mean() if not right.all() else -np.log(np.clip(1 - confidence, smallest, 1)).mean()
    good = losses[right].mean() if right.any() else losses.min()
    total = n + 2 * _PSEUDO
    mean = float(losses.sum() + _PSEUDO * (wrong + good)) / total
    squares = float(((losses - mean) ** 2).sum() + _PSEUDO * ((wrong - mean) ** 2 + (good - mean) ** 2))
    reach = float(stdtrit(max(1, n - 1), (1 + LEVEL) / 2)) * float(np.sqrt(squares / n / max(1, n - 1)))
    return max(0.0, min(mean - reach, value)), max(mean + reach, value)


Measures = Callable[[Mapping[str, Array]], Mapping[str, Array]]
_CHUNK = 10_000_000  # multiplicities drawn at once


def units_of(groups: npt.ArrayLike | Sequence[str | None] | npt.NDArray[np.object_] | None, images: int) -> Codes:
    """The number of each image's group, (n,) from 0; without groups, and where one is missing, an image is its own.

    Raises:
        UsageError: There is not one entry for each image.
    """
    if groups is None:
        return np.arange(images)
    named = np.asarray(groups, dtype=object)
    if named.shape != (images,):
        raise UsageError(
            f"there are {images} images, but {len(named)} groups: groups must be one for each of the {images} images"
        )
    numbers: dict[Any, int] = {}
    codes = np.empty(images, np.int64)
    for place, name in enumerate(named):
        alone = name is None or name != name  # NaN  # noqa: PLR0124
        codes[place] = numbers.setdefault((place,) if alone else name, len(numbers))
    return codes


class GroupSums:
    """Sums over each group's images, so that a resample of groups is one product.

    Args:
        groups: (n,) number of each image's group.
    """

    def __init__(self, groups: Codes) -> None:
        self._groups, self.count = groups, int(groups.max()) + 1

    def by_column(self, columns: Codes, width: int, weights: Array | None = None) -> csr_array:
        """(G, width) how many of a group's images have each column, or the sum of their weights."""
        data = np.ones(len(columns)) if weights is None else weights
        return csr_array((data, (self._groups, columns)), shape=(self.count, width))

    def total(self, values: Array) -> Array:
        """(G,) the sum of each group's values."""
        return np.bincount(self._groups, values, self.count).astype(np.float64)

    def variances(
        self, sums: Mapping[str, csr_array], measures: Measures, *, draws: int, seed: int
    ) -> dict[str, float]:
        """The variance of each measure over resamples of the groups.

        Args:
            sums: (G, width) sums by group, by name.
            measures: Makes (m,) values of each measure from (m, width) sums over m resamples.
            draws: How many resamples.
            seed: Of the draws.
        """
        rng, chunk = np.random.default_rng(seed), max(1, _CHUNK // self.count)
        found: dict[str, list[Array]] = {}
        for start in range(0, draws, chunk):
            # Ten times as fast as `rng.multinomial`, which draws a binomial number for each group.
            drawn = (rng.integers(self.count, size=self.count) for _ in range(min(chunk, draws - start)))
            times = np.stack([np.bincount(one, minlength=self.count) for one in drawn], axis=1).astype(np.float64)
            resampled = {name: np.asarray(table.T @ times).T for name, table in sums.items()}
            for name, values in measures(resampled).items():
                found.setdefault(name, []).append(values)
        unbiased = self.count / (self.count - 1)
        return {name: float(np.nanvar(np.concatenate(values))) * unbiased for name, values in found.items()}


def limits(value: float, variance: float, images: float, groups: int) -> Limits:
    """The interval of a measure from 0 to 1.

    Args:
        value: Of the measure.
        variance: Of the measure, over groups.
        images: How many there are: none counts for more than one.
        groups: How many there are.
    """
    inner = (value * groups + 1) / (groups + 2)
    most = float(images if variance > 0 else groups)
    variance += (
        (inner**2 + (1 - inner) ** 2) / 2 / (groups + 1) ** 2
    )  # half a group that is all right, half one all wrong
    return proportion(value, min(most, inner * (1 - inner) / variance), groups - 1)


def mean_limits(values: Array, sums: GroupSums) -> Limits:
    """Student's interval of the mean of values that are at least 0, by the ratio estimator over groups."""
    sizes, totals = sums.total(np.ones(len(values))), sums.total(values)
    mean = float(values.mean())
    rest = totals - mean * sizes
    variance = float((rest**2).sum()) * sums.count / (sums.count - 1) / len(values) ** 2
    reach = float(stdtrit(sums.count - 1, (1 + LEVEL) / 2)) * variance**0.5
    return max(0.0, mean - reach), mean + reach
