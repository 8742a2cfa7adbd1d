"""Two-sample tests of what a head predicts: whether classes, labels or numbers are as frequent among new images as before.

Images of one group, such as the patient that they are of, are no independent draws: where groups are given, whole groups are
permuted between the sides, as many on each as there are (Ernst 2004, "Permutation Methods: A Basis for Exact Inference"; of
clusters, Gail et al. 1996, "On Design Considerations and Randomization-Based Inference for Community Intervention Trials").
The level is exact for groups of any sizes, as long as they come independently of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit
from scipy.stats import false_discovery_control, fisher_exact, wasserstein_distance

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.intervals import LEVEL, GroupSums, Limits, proportion, units_of
from featurepipe.heads.statistics.intervals import limits as group_limits
from featurepipe.heads.statistics.two_sample import sequential_p_value

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]

_CELLS = 4_000_000  # rows times deals that are held at once


def _deals(
    groups: tuple[int, int], count: int, width: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.bool_]]:
    """Deals groups to both sides, as many to each as there are.

    Args:
        groups: Of the reference, and new ones.
        count: Deals.
        width: Values that each takes while it is judged.
        rng: Draws them.

    Yields:
        (b, groups) whether each is on the new side; ``count`` rows in all.
    """
    first, step = np.arange(sum(groups)) >= groups[0], max(1, _CELLS // max(width, 1))
    for start in range(0, count, step):
        yield rng.permuted(np.repeat(first[None], min(step, count - start), axis=0), axis=1)


_BY_CHANCE = 200  # tables behind the mean total variation

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassShift:
    """How two sets of predicted classes compare.

    Attributes:
        p_value: Permutation p-value of Pearson's chi-square statistic; images, or whole groups, change sides.
        total_variation: The part of the images that would need another class for the shares to be equal, 0 to 1.
        by_chance: What the total variation is on average where nothing has changed but the images.
    """

    p_value: float
    total_variation: float
    by_chance: float


def class_shift(
    reference: npt.ArrayLike, new: npt.ArrayLike, *, permutations: int = 9_999, seed: int = 0
) -> ClassShift:
    """Tests whether two counts of classes could be of the same shares.

    The statistic is Pearson's chi-square of the table of both counts. Its p-value is not the chi-square distribution's,
    which fails for small counts, but by Monte Carlo: tables with the same margins, as permuting the images between
    the sides gives them (Hope 1968, "A Simplified Monte Carlo Significance Test Procedure"). So the level is exact for any
    counts. Of counts by group whole groups are permuted; the shares are still those of images.

    Args:
        reference: (K,) images of each class; or (G, K), those of each group.
        new: The same of the new images.
        permutations: The most tables drawn; the least p-value is one over one more.
        seed: Of the draws.

    Raises:
        UsageError: The counts are not of the same classes, or a side has no image.

    Example:
        >>> found = class_shift([50, 50, 0], [10, 5, 5])
        >>> found.p_value < 0.01, found.total_variation
        (True, 0.25)
    """
    sides = [np.asarray(side, np.int64) for side in (reference, new)]
    both = [np.atleast_2d(side) for side in sides]
    if (
        sides[0].ndim != sides[1].ndim
        or any(side.ndim != 2 or not side.any() or side.min() < 0 for side in both)
        or both[0].shape[1] != both[1].shape[1]
    ):
        raise UsageError(
            f"class counts must be of the same classes and of an image or more, not {reference!r} and {new!r}"
        )
    counts = np.concatenate(both)
    used = counts.sum(axis=0) > 0
    counts, after = counts[:, used], both[1].sum(axis=0)[used]
    totals = counts.sum(axis=0)
    groups, rng = (len(both[0]), len(both[1])), np.random.default_rng(seed)

    def draw(tables: int) -> Counts:
        """(tables, K) counts of the new side."""
        if sides[0].ndim == 2:
            dealt = _deals(groups, tables, len(counts), rng)
            return np.concatenate([(deal @ counts.astype(np.float64)).astype(np.int64) for deal in dealt])
        drawn: Counts = rng.multivariate_hypergeometric(totals, int(after.sum()), size=tables, method="marginals")
        return drawn

    return ClassShift(
        p_value=sequential_p_value(
            float(_chi_square(after[None], totals)[0]), lambda tables: _chi_square(draw(tables), totals), permutations
        ),
        total_variation=float(_total_variation(after[None], totals)[0]),
        by_chance=float(_total_variation(draw(_BY_CHANCE), totals).mean()),
    )


def _chi_square(new: Counts, totals: Counts) -> Floats:
    """(b,) Pearson's statistic of (b, K) counts of the new side."""
    share = new.sum(axis=1, keepdims=True) / totals.sum()
    statistic: Floats = ((new - share * totals) ** 2 / totals).sum(axis=1) / (share * (1 - share))[:, 0]
    return statistic


def _total_variation(new: Counts, totals: Counts) -> Floats:
    """(b,) half the sum of the differences between the shares of both sides."""
    reference = totals - new
    shares = [side / side.sum(axis=1, keepdims=True) for side in (reference, new)]
    variation: Floats = np.abs(shares[0] - shares[1]).sum(axis=1) / 2
    return variation


@dataclass(frozen=True)
class LabelShift:
    """How the rates of several labels compare.

    Attributes:
        p_value: Of the hypothesis that no label's rate has changed (Simes).
        p_values: (K,) the p-value of each label, without groups Fisher's exact one; NaN where both sides have it on no image,
            or on all.
        adjusted: (K,) the same after Benjamini & Hochberg, so that of the labels below q a share of q at most is unchanged,
            on average; the least of them is ``p_value``.
        reference: (K,) rates of the reference, 0 to 1.
        new: (K,) rates of the new images.
        reference_limits: K intervals of ``reference``.
        new_limits: K intervals of ``new``.
        change_limits: K intervals of ``new - reference``.
    """

    p_value: float
    p_values: Floats
    adjusted: Floats
    reference: Floats
    new: Floats
    reference_limits: list[Limits]
    new_limits: list[Limits]
    change_limits: list[Limits]


def label_shift(
    reference: npt.ArrayLike,
    new: npt.ArrayLike,
    images: tuple[npt.ArrayLike, npt.ArrayLike],
    *,
    permutations: int = 9_999,
    seed: int = 0,
) -> LabelShift:
    """Tests whether each of several labels is as frequent among new images as in the reference, and all of them together.

    A label's test is Fisher's exact one, two-sided, whose level holds for any counts. Over the labels the rates of false
    discoveries are those of Benjamini & Hochberg 1995 ("Controlling the False Discovery Rate"), and the p-value of the whole
    is that of Simes 1986 ("An Improved Bonferroni Procedure for Multiple Tests of Significance"), the least of
    ``K * p_(i) / i``. Both hold for labels that are independent or depend on each other positively, and in practice for
    others. A label that no image has, or all have, on both sides cannot differ, and is not one of the K tests: given how many
    images have it in all, that is known before the test, so that leaving it out changes no level.

    Of counts by group, a label's test is a permutation test instead: whole groups change sides, and the statistic is the
    difference of the rates.

    Rates have Clopper & Pearson's intervals, by group for as many independent images as their variance over groups is worth
    (`featurepipe.heads.statistics.intervals`); that of their difference is made of both (Newcombe 1998, "Interval estimation
    for the difference between independent proportions", method 10, with exact limits). Each holds 95 % by itself.

    Args:
        reference: (K,) images of the reference with each label; or (G, K), those of each group.
        new: The same of the new images.
        images: How many images the reference has, and how many are new; or (G,), how many each group has.
        permutations: How many deals of groups; the least p-value of a label is one over one more.
        seed: Of the deals.

    Raises:
        UsageError: The counts are not of the same labels, a side has no image, or a count is none of its images.

    Example:
        >>> found = label_shift([50, 10], [50, 40], (100, 100))
        >>> found.adjusted.round(4).tolist(), round(found.p_value, 4)
        ([1.0, 0.0], 0.0)
    """
    both = [np.asarray(side, np.int64) for side in (reference, new)]
    sizes = [np.asarray(side, np.int64) for side in images]
    if (
        both[0].ndim != both[1].ndim
        or both[0].shape[-1:] != both[1].shape[-1:]
        or any(side.ndim not in (1, 2) or side.shape[:-1] != size.shape for side, size in zip(both, sizes, strict=True))
        or any(size.sum() < 1 for size in sizes)
    ):
        raise UsageError(
            f"label counts must be of the same labels and of an image or more, not {reference!r} and {new!r} of {images}"
        )
    if any((side < 0).any() or (side > size[..., None]).any() for side, size in zip(both, sizes, strict=True)):
        raise UsageError(f"a label is on 0 images at least and on {images} at most, not {reference!r} and {new!r}")
    in_groups, count = both[0].ndim == 2, [int(size.sum()) for size in sizes]
    sums = [side.sum(axis=0) for side in both] if in_groups else both
    total = sums[0] + sums[1]
    varied = np.flatnonzero((total > 0) & (total < sum(count)))
    p_values, adjusted = np.full((2, len(total)), np.nan)
    if in_groups:
        by_group = np.concatenate(both)[:, varied]
        p_values[varied] = _p_values_of_rates(by_group, sizes, permutations, np.random.default_rng(seed))
    else:
        p_values[varied] = [
            fisher_exact([[side[k], n - side[k]] for side, n in zip(sums, count, strict=True)]).pvalue for k in varied
        ]
    p_values = np.clip(p_values, _LEAST, 1.0)  # far from the reference a p-value is less than any float
    adjusted[varied] = false_discovery_control(p_values[varied]) if len(varied) else []
    rates = [side / n for side, n in zip(sums, count, strict=True)]
    limits = [_rate_limits(*side) for side in zip(both, sizes, strict=True)]
    return LabelShift(
        p_value=float(adjusted[varied].min()) if len(varied) else 1.0,
        p_values=p_values,
        adjusted=adjusted,
        reference=rates[0],
        new=rates[1],
        reference_limits=limits[0],
        new_limits=limits[1],
        change_limits=[_difference(*pair) for pair in zip(*rates, *limits, strict=True)],
    )


def _p_values_of_rates(counts: Counts, sizes: list[Counts], permutations: int, rng: np.random.Generator) -> Floats:
    """(K,) permutation p-values of the differences of rates, by groups, whose (G, K) counts are given."""
    whole = np.concatenate(sizes).astype(np.float64)
    table, totals, every = counts.astype(np.float64), counts.sum(axis=0), whole.sum()

    def apart(new: npt.NDArray[np.bool_]) -> Floats:
        images = (new @ whole)[:, None]
        hits = new @ table
        return np.asarray(np.abs(hits / images - (totals - hits) / (every - images)))

    groups = (len(sizes[0]), len(sizes[1]))
    seen = apart((np.arange(sum(groups)) >= groups[0])[None])
    least = seen[0] * (1 - 1e-9)  # of two that are equal, one may be less by rounding
    exceeding = np.zeros(counts.shape[1])
    for deal in _deals(groups, permutations, len(counts) + counts.shape[1], rng):
        exceeding += (apart(deal) >= least).sum(axis=0)
    return (1 + exceeding) / (1 + permutations)


def _rate_limits(counts: Counts, images: Counts) -> list[Limits]:
    """The interval of each label's rate, of images or of groups."""
    if counts.ndim == 1:
        return [proportion(float(count / images), int(images)) for count in counts]
    n, groups = int(images.sum()), len(images)
    rates = counts.sum(axis=0) / n
    rest = counts - rates * images[:, None]
    variances = (rest**2).sum(axis=0) * groups / (groups - 1) / n**2
    return [group_limits(float(rate), float(one), n, groups) for rate, one in zip(rates, variances, strict=True)]


_LEAST = float(np.finfo(np.float64).tiny)


def _difference(reference: float, new: float, reference_limits: Limits, new_limits: Limits) -> Limits:
    """The interval of ``new - reference``: distances that each alone would make are squared and added."""
    below = np.hypot(new - new_limits[0], reference_limits[1] - reference)
    above = np.hypot(new_limits[1] - new, reference - reference_limits[0])
    change = new - reference
    return max(-1.0, float(change - below)), min(1.0, float(change + above))


_WIDE = 4_096  # states of a walk, past which those of no weight are left out
_WEIGHTLESS = 1e-30


@dataclass(frozen=True)
class NumberShift:
    """How two sets of predicted numbers compare.

    Attributes:
        p_value: Of the two-sample Kolmogorov-Smirnov test.
        ks: Its statistic, the greatest distance between both empirical distribution functions, 0 to 1.
        wasserstein: The mean way that a prediction would have to move for both distributions to be equal, in the number's
            unit.
        effect: The same in standard deviations of the reference; of both sides together where the reference has none.
        change: The difference of the means, new less reference, in the number's unit.
        change_limits: Its interval (Welch 1947; of groups, by their summed deviations), which holds 95 % where the means are
            about normally distributed.
    """

    p_value: float
    ks: float
    wasserstein: float
    effect: float
    change: float
    change_limits: Limits


def number_shift(
    reference: npt.ArrayLike,
    new: npt.ArrayLike,
    *,
    groups: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    permutations: int = 9_999,
    seed: int = 0,
) -> NumberShift:
    """Tests whether two sets of predicted numbers could be samples of one distribution, and says how far they lie apart.

    The p-value of the Kolmogorov-Smirnov test is exact, given which numbers are equal to each other, as a nearest neighbour's
    often are: of all ways to deal these numbers to both sides, the share whose statistic is as large (Schroeer & Trenkler 1995,
    "Exact and randomization distributions of Kolmogorov-Smirnov tests two or three samples"). Of groups, whole ones are permuted,
    by Monte Carlo.

    Args:
        reference: (n,) numbers.
        new: (m,) numbers.
        groups: (n,) and (m,) of whatever kind: images of a side with equal values belong together, a missing one is a group of
            its own. None if each is.
        permutations: The most deals of groups.
        seed: Of the deals.

    Raises:
        UsageError: A side has fewer than 2 numbers, or than 2 groups, or one is NaN or infinite.

    Example:
        >>> found = number_shift(range(100), range(50, 150))
        >>> found.ks, found.wasserstein, found.change, found.p_value < 1e-9
        (0.5, 50.0, 50.0, True)
    """
    sides = [np.asarray(side, np.float64) for side in (reference, new)]
    if any(side.ndim != 1 or len(side) < 2 for side in sides):
        raise UsageError(
            f"numbers are compared from 2 each; these have the shapes {sides[0].shape} and {sides[1].shape}"
        )
    unusable = [int((~np.isfinite(side)).sum()) for side in sides]
    if any(unusable):
        raise UsageError(
            f"{unusable[0]:,} of {len(sides[0]):,} numbers of the reference and {unusable[1]:,} of {len(sides[1]):,} new ones "
            "are NaN or infinite; compare finite ones"
        )
    units = [units_of(None if groups is None else groups[k], len(side)) for k, side in enumerate(sides)]
    if any(int(unit.max()) == 0 for unit in units):
        raise UsageError("numbers are compared from 2 groups each; one side has a single one")
    steps = _Steps(*sides)
    observed = steps.distance
    if groups is None:
        p_value = _ks_p_value(steps)
    else:
        rng = np.random.default_rng(seed)
        p_value = sequential_p_value(
            observed, lambda count: _permuted_distances(steps, units, count, rng), permutations
        )
    moved = float(wasserstein_distance(*sides))
    spread = float(sides[0].std(ddof=1)) or float(np.concatenate(sides).std())
    change = float(sides[1].mean() - sides[0].mean())
    deviations = [GroupSums(unit).total(side - side.mean()) for side, unit in zip(sides, units, strict=True)]
    parts = [
        float((one**2).sum()) * len(one) / (len(one) - 1) / len(side) ** 2
        for one, side in zip(deviations, sides, strict=True)
    ]
    reach = 0.0
    if sum(parts):
        freedom = sum(parts) ** 2 / sum(part**2 / (len(one) - 1) for part, one in zip(parts, deviations, strict=True))
        reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * sum(parts) ** 0.5
    return NumberShift(
        p_value=float(np.clip(p_value, _LEAST, 1.0)),
        ks=observed,
        wasserstein=moved,
        effect=moved / spread if moved else 0.0,
        change=change,
        change_limits=(change - reach, change + reach),
    )


class _Steps:
    """Both sides as one ascending row, in which equal numbers are one step.

    Attributes:
        counts: Of the reference, and new ones.
        order: Ascending positions in the concatenation of both.
        ends: (T,) how many numbers each step and all before it hold.
        apart: The statistic times both counts, a whole number.
    """

    def __init__(self, reference: Floats, new: Floats) -> None:
        self.counts = len(reference), len(new)
        pooled = np.concatenate([reference, new])
        self.order = np.argsort(pooled, kind="stable")
        ordered = pooled[self.order]
        self.ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) + 1
        below = np.cumsum(self.order >= len(reference))[self.ends - 1]
        self.apart = int(np.abs(below * len(reference) - (self.ends - below) * len(new)).max())

    @property
    def distance(self) -> float:
        """The Kolmogorov-Smirnov statistic."""
        return self.apart / (self.counts[0] * self.counts[1])


def _ks_p_value(steps: _Steps) -> float:
    """Sums the ways to deal numbers that reach the statistic at the end of a step, by how many of the smaller side came so far.

    What is added is the probability of reaching it there for the first time, so that a small p-value is no difference of
    two large numbers. Of more than 4,096 states those below 1e-30 are taken to reach it, too.
    """
    if steps.apart == 0:
        return 1.0
    small, large = sorted(steps.counts)
    size, reached = small + large, 0.0
    weight, low = np.ones(1), 0  # of states low, low + 1, ...: how many of the smaller side came
    for start, end in pairwise([0, *steps.ends.tolist()]):
        for done in range(start, end):
            came = np.arange(low, low + len(weight))
            grown = np.zeros(len(weight) + 1)
            grown[1:] = weight * (small - came) / (size - done)
            grown[:-1] += weight * (large - done + came) / (size - done)
            weight = grown
            if low + len(weight) - 1 > small:
                weight = weight[:-1]
        came = np.arange(low, low + len(weight))
        out = np.abs(came * large - (end - came) * small) >= steps.apart
        if len(weight) > _WIDE:
            out |= weight < _WEIGHTLESS
        reached += float(weight[out].sum())
        left = np.flatnonzero(~out & (weight > 0))
        if not len(left):
            break
        weight, low = np.where(out, 0, weight)[left[0] : left[-1] + 1], low + int(left[0])
    return reached


def _permuted_distances(steps: _Steps, units: list[Counts], count: int, rng: np.random.Generator) -> Floats:
    """(count,) statistics of permutations of groups between the sides."""
    groups = int(units[0].max()) + 1, int(units[1].max()) + 1
    owner = np.concatenate([units[0], units[1] + groups[0]])[steps.order]
    found = []
    for deal in _deals(groups, count, len(owner), rng):
        new = np.cumsum(deal[:, owner], axis=1)[:, steps.ends - 1]
        images = new[:, -1:]
        found.append(np.abs(new / images - (steps.ends - new) / (len(owner) - images)).max(axis=1))
    return np.concatenate(found)
