"""Two-sample tests: whether two sets of features, or of predicted classes, labels or numbers, are of one distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit
from scipy.stats import false_discovery_control, fisher_exact, ks_2samp, wasserstein_distance

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, as_blocks, read_as
from featurepipe.heads.gram import refuse_non_finite
from featurepipe.heads.statistics.intervals import LEVEL, Limits, one_vs_rest, proportion

_STOP = 100  # draws at least as extreme as the data after which the p-value is known to a tenth of itself
_BATCH = 500
_EQUAL = 1e-6  # relative: two statistics that differ by less differ by rounding


def sequential_p_value(observed: float, draw: Callable[[int], npt.NDArray[np.floating]], most: int) -> float:
    """Counts how often chance gives what was observed, or more, and stops as soon as it has done so often enough.

    Besag & Clifford 1991, "Sequential Monte Carlo p-values": if the h-th such draw is the l-th of all, ``h / l`` is a
    p-value whose level is exact, like ``(1 + how many) / (1 + draws)`` after all of them.

    Args:
        observed: The statistic of the data; large ones count.
        draw: Returns the statistics (n,) of n draws under the hypothesis, independent of all before.
        most: Draws at most.
    """
    least = observed - _EQUAL * abs(observed)
    exceeding = done = 0
    while done < most:
        batch = min(_BATCH, most - done)
        at = done + 1 + np.flatnonzero(draw(batch) >= least)
        if exceeding + len(at) >= _STOP:
            return _STOP / float(at[_STOP - exceeding - 1])
        exceeding, done = exceeding + len(at), done + batch
    return (1 + exceeding) / (1 + most)


ROWS = 1024
"""Rows of a side that are compared at most."""

_GROUPS = 256  # of rows on a side, which change sides together
_BANDWIDTHS = 5
_NEIGHBOURS = 5

Single = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """How two sets of features compare.

    Attributes:
        p_value: How often rows dealt anew to the two sides lie as far apart as they do.
        effect: How far the mean moved: the distance between the means, in root mean square distances of a reference row
            from the reference's mean, with every feature scaled to the same spread and what sampling alone adds taken
            off. Where the reference does not vary, in those of both sides together.
        auc: How often a new row looks more like other new rows, and less like the reference, than a reference row does;
            rows are judged by rows of the other half. 0.5 is chance, 1 tells them all apart.
        reference: Rows of the reference that were compared.
        new: Positions of the new rows that were compared.
        farthest: (m,) positions of new rows, those that lie farthest from their nearest reference rows first.
        typical: (m,) positions of new rows, those most like new and least like reference rows first.
    """

    p_value: float
    effect: float
    auc: float
    reference: int
    new: Positions
    farthest: Positions
    typical: Positions


def two_sample(
    reference: Blocks | Array,
    new: Blocks | Array,
    *,
    rows: int = ROWS,
    permutations: int = 9_999,
    shown: int = 10,
    seed: int = 0,
) -> Comparison:
    """Tests whether two sets of features could be samples of one distribution, and says how far apart they lie.

    The statistic is the unbiased squared maximum mean discrepancy (Gretton et al. 2012, "A Kernel Two-Sample Test") of
    Gaussian kernels with five bandwidths, which reach from half the 5 % quantile of the distances between rows to twice
    the 95 % quantile. Each is divided by the size of its centred kernel matrix, to which its deviation under dealing is
    proportional, and the greatest counts: adapting over kernels without splitting the data, as in Schrab et al. 2023 ("MMD
    Aggregated Two-Sample Test") and Biggs et al. 2023 ("MMD-FUSE"). Every feature is scaled to one variance first.
    Scales, bandwidths and sizes are those of both sides together, which dealing does not change, so that the level
    is exact for any number of rows and features.

    Rows change sides in up to 256 groups a side (Domingo-Enrich et al. 2025, "Cheap Permutation Testing"): the level stays
    exact, the power almost the same, and a deal is a product with a matrix of at most 512 x 512. Dealing ends early where
    the p-value is not small (Besag & Clifford 1991, "Sequential Monte Carlo p-values").

    What is exact assumes rows that are drawn independently: count copies once, and expect low p-values where images come in
    series, such as frames of a film.

    Memory: ``2 * rows * (12 * D + 32 * rows)`` bytes at most, for all n: 120 MB for 2,048 values, 290 MB for 9,000.

    Args:
        reference: (n, D) features, an array or ``Blocks``.
        new: (m, D) features.
        rows: The most rows of a side to use; of more, so many are drawn.
        permutations: The most deals; the least p-value is one over one more.
        shown: Length of ``farthest`` and ``typical`` at most.
        seed: Of the draws and deals.

    Raises:
        UsageError: A side has fewer than 2 rows, the widths differ, or a number is too small.
        ValueError: A feature is NaN or infinite.
    """
    sides = as_blocks(reference), as_blocks(new)
    _check(sides, rows, permutations)
    rng = np.random.default_rng(seed)
    group = _group_size([side.shape[0] for side in sides], rows)
    drawn = [_draw(side.shape[0], group, rng) for side in sides]
    pooled = _scaled(np.concatenate([_read(side, at) for side, at in zip(sides, drawn, strict=True)]))
    squared, first = _squared_distances(pooled), len(drawn[0])
    bandwidths = _squared_bandwidths(squared)
    likeness = _held_out_likeness(squared, first, bandwidths)
    is_new = np.arange(len(pooled)) >= first
    best = np.argsort(-likeness[first:], kind="stable")[:shown]
    return Comparison(
        p_value=_p_value(squared, bandwidths, group, first // group, permutations, rng),
        effect=_effect(pooled, first),
        auc=float(one_vs_rest(np.column_stack([-likeness, likeness]), is_new.astype(np.int64)).values[1]),
        reference=first,
        new=drawn[1],
        farthest=drawn[1][_farthest(squared[first:, :first])[:shown]],
        typical=drawn[1][best],
    )


def _check(sides: tuple[Blocks, Blocks], rows: int, permutations: int) -> None:
    counts, widths = [side.shape[0] for side in sides], [side.shape[1] for side in sides]
    if widths[0] != widths[1]:
        raise UsageError(f"features of {widths[0]} and of {widths[1]} values cannot be compared; give the same column")
    if min(counts) < 2:
        raise UsageError(f"two sets of features are compared from 2 rows each; these have {counts[0]} and {counts[1]}")
    if rows < 2 or permutations < 1:
        raise UsageError(f"rows={rows} must be 2 or more, permutations={permutations} 1 or more")


def _group_size(counts: list[int], rows: int) -> int:
    """Rows of a group, for which the smaller side still has groups enough."""
    return -(-min(*counts, rows) // _GROUPS)


def _draw(count: int, group: int, rng: np.random.Generator) -> Positions:
    """Positions of whole groups of rows, in random order, so that groups are random as well."""
    return rng.choice(count, min(count // group, _GROUPS) * group, replace=False).astype(np.int64)


def _read(side: Blocks, positions: Positions) -> Single:
    rows: Single = read_as(side, np.float32, positions)
    refuse_non_finite(rows)
    return rows


def _scaled(pooled: Single) -> Single:
    """Gives every feature mean 0 and variance 1 over both sides, in place; constant ones become 0."""
    rounding = 1e-6 * np.maximum(pooled.max(axis=0), -pooled.min(axis=0))
    pooled -= pooled.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation = np.sqrt(np.einsum("ij,ij->j", pooled, pooled, dtype=np.float64) / len(pooled))
    deviation[deviation <= rounding] = np.inf
    pooled /= deviation.astype(np.float32)
    return pooled


def _squared_distances(rows: Single) -> Single:
    norms = np.einsum("ij,ij->i", rows, rows)
    squared: Single = rows @ rows.T
    squared *= -2
    squared += norms[:, None]
    squared += norms
    np.maximum(squared, 0, out=squared)
    np.fill_diagonal(squared, 0)
    return squared


def _squared_bandwidths(squared: Single) -> Floats:
    """(k,) ascending, from the distances that are not 0; none if all rows are equal."""
    apart = squared[np.triu_indices(len(squared), 1)]
    apart = apart[apart > 0]
    if not len(apart):
        return np.empty(0)
    low, high = np.quantile(apart, [0.05, 0.95])
    return np.geomspace(low / 4, 4 * high, _BANDWIDTHS)


def _kernel(squared: Single, squared_bandwidth: float) -> Single:
    kernel: Single = squared * np.float32(-0.5 / squared_bandwidth)
    np.exp(kernel, out=kernel)
    return kernel


def _p_value(
    squared: Single, bandwidths: Floats, group: int, first: int, permutations: int, rng: np.random.Generator
) -> float:
    """Deals the groups, of which the ``first`` ones are the reference, anew."""
    matrices = [_deal_matrix(_kernel(squared, bandwidth), group) for bandwidth in bandwidths]
    stacked = np.array([matrix for matrix in matrices if matrix is not None], np.float32)
    if not len(stacked):
        return 1.0  # nothing tells one row from another
    side = np.zeros((1, stacked.shape[1]), np.float32)
    side[:, :first] = 1

    def statistics(sides: Single) -> Single:
        """The greatest discrepancy of each deal (b, groups); up to a factor that is the same for all."""
        dealt = sides.T
        greatest: Single = np.einsum("kgb,gb->kb", stacked @ dealt, dealt).max(axis=0)
        return greatest

    return sequential_p_value(
        float(statistics(side)[0]),
        lambda count: statistics(rng.permuted(np.repeat(side, count, axis=0), axis=1)),
        permutations,
    )


def _deal_matrix(kernel: Single, group: int) -> Floats | None:
    """What the discrepancy of a deal is a quadratic form of: group means, U-centred, over their own size; None if all 0.

    With a diagonal of 0 and rows that sum to 0 ("U-centred": Szekely & Rizzo 2014), the unbiased discrepancy between any
    dealing of the groups, the means within both sides less twice the mean across, is proportional to the sum within
    one side: what lies within the other, and across, follows from it.
    """
    groups = len(kernel) // group
    means = kernel.reshape(groups, group, groups, group).mean(axis=(1, 3), dtype=np.float64)
    np.fill_diagonal(means, 0)
    sums = means.sum(axis=1)
    centred: Floats = means - (sums[:, None] + sums) / (groups - 2) + sums.sum() / ((groups - 1) * (groups - 2))
    np.fill_diagonal(centred, 0)
    size = np.linalg.norm(centred)
    return centred / size if size > groups * np.finfo(np.float32).eps else None


def _effect(pooled: Single, first: int) -> float:
    """The distance between the means in the reference's spread; see ``Comparison``."""
    sides = pooled[:first], pooled[first:]
    variances = [float(side.var(axis=0, ddof=1, dtype=np.float64).sum()) for side in sides]
    spread = variances[0] or float(pooled.var(axis=0, dtype=np.float64).sum())
    if not spread:
        return 0.0
    apart = np.subtract(*(side.mean(axis=0, dtype=np.float64) for side in sides))
    by_sampling = sum(variance / len(side) for variance, side in zip(variances, sides, strict=True))
    return float(np.sqrt(max(0.0, float(apart @ apart) - by_sampling) / spread))


def _held_out_likeness(squared: Single, first: int, bandwidths: Floats) -> Floats:
    """(n,) how much more each row is like the new rows than like the reference rows of the half that it is not in.

    It is the test's witness function (Gretton et al. 2012) at the middle bandwidth.
    """
    if not len(bandwidths):
        return np.zeros(len(squared))
    kernel = _kernel(squared, float(bandwidths[_BANDWIDTHS // 2]))
    likeness = np.empty(len(squared))
    is_new = np.arange(len(squared)) >= first
    half = np.arange(len(squared)) % 2 == 0  # rows are in random order; either half has rows of both sides
    for judged, judges in ((half, ~half), (~half, half)):
        new, reference = (kernel[np.ix_(judged, judges & side)].mean(axis=1) for side in (is_new, ~is_new))
        likeness[judged] = new - reference
    return likeness


def _farthest(squared: Single) -> Positions:
    """Rows of (m, n) squared distances, those whose nearest columns are farthest first."""
    nearest = min(_NEIGHBOURS, squared.shape[1])
    distance = np.sqrt(np.partition(squared, nearest - 1, axis=1)[:, :nearest]).mean(axis=1)
    return np.argsort(-distance, kind="stable")


_BY_CHANCE = 200  # tables behind the mean total variation

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassShift:
    """How two sets of predicted classes compare.

    Attributes:
        p_value: How often as many images dealt anew to both sides have shares as different as these.
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
    which fails for small counts, but by Monte Carlo: tables with the same margins, as dealing the images anew to both
    sides gives them (Hope 1968, "A Simplified Monte Carlo Significance Test Procedure"). So the level is exact for any
    counts.

    Args:
        reference: (K,) images of each class.
        new: (K,) the same of the new images.
        permutations: The most tables drawn; the least p-value is one over one more.
        seed: Of the draws.

    Raises:
        UsageError: The counts are not of the same classes, or a side has no image.

    Example:
        >>> found = class_shift([50, 50, 0], [10, 5, 5])
        >>> found.p_value < 0.01, found.total_variation
        (True, 0.25)
    """
    both = (
        np.asarray([reference, new], np.int64) if np.shape(reference) == np.shape(new) else np.empty((2, 0), np.int64)
    )
    if both.ndim != 2 or not both.sum(axis=1).all() or both.min() < 0:
        raise UsageError(
            f"class counts must be of the same classes and of an image or more, not {reference!r} and {new!r}"
        )
    both = both[:, both.sum(axis=0) > 0]
    totals, count = both.sum(axis=0), int(both[1].sum())
    rng = np.random.default_rng(seed)

    def draw(tables: int) -> Counts:
        """(tables, K) counts of the new side."""
        drawn: Counts = rng.multivariate_hypergeometric(totals, count, size=tables, method="marginals")
        return drawn

    return ClassShift(
        p_value=sequential_p_value(
            float(_chi_square(both[1:], totals)[0]), lambda tables: _chi_square(draw(tables), totals), permutations
        ),
        total_variation=float(_total_variation(both[1:], totals)[0]),
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
        p_values: (K,) Fisher's exact p-value of each label; NaN where both sides have it on no image, or on all.
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


def label_shift(reference: npt.ArrayLike, new: npt.ArrayLike, images: tuple[int, int]) -> LabelShift:
    """Tests whether each of several labels is as frequent among new images as in the reference, and all of them together.

    A label's test is Fisher's exact one, two-sided, whose level holds for any counts. Over the labels the rates of false
    discoveries are those of Benjamini & Hochberg 1995 ("Controlling the False Discovery Rate"), and the p-value of the whole
    is that of Simes 1986 ("An Improved Bonferroni Procedure for Multiple Tests of Significance"), the least of
    ``K * p_(i) / i``. Both hold for labels that are independent or depend on each other positively, and in practice for
    others. A label that no image has, or all have, on both sides cannot differ, and is not one of the K tests: given how many
    images have it in all, that is known before the test, so that leaving it out changes no level.

    Rates have Clopper & Pearson's intervals; that of their difference is made of both (Newcombe 1998, "Interval estimation
    for the difference between independent proportions", method 10, with exact limits). Each holds 95 % by itself.

    Args:
        reference: (K,) images of the reference with each label.
        new: (K,) the same of the new images.
        images: How many images the reference has, and how many are new.

    Raises:
        UsageError: The counts are not of the same labels, a side has no image, or a count is none of its images.

    Example:
        >>> found = label_shift([50, 10], [50, 40], (100, 100))
        >>> found.adjusted.round(4).tolist(), round(found.p_value, 4)
        ([1.0, 0.0], 0.0)
    """
    both = [np.asarray(side, np.int64) for side in (reference, new)]
    if both[0].shape != both[1].shape or both[0].ndim != 1 or min(images) < 1:
        raise UsageError(
            f"label counts must be of the same labels and of an image or more, not {reference!r} and {new!r} of {images}"
        )
    if any(len(side) and (side.min() < 0 or side.max() > count) for side, count in zip(both, images, strict=True)):
        raise UsageError(f"a label is on 0 images at least and on {images} at most, not {reference!r} and {new!r}")
    total = both[0] + both[1]
    varied = np.flatnonzero((total > 0) & (total < sum(images)))
    p_values, adjusted = np.full((2, len(total)), np.nan)
    p_values[varied] = [
        fisher_exact([[side[k], count - side[k]] for side, count in zip(both, images, strict=True)]).pvalue
        for k in varied
    ]
    p_values = np.clip(p_values, _LEAST, 1.0)  # far from the reference a p-value is less than any float
    adjusted[varied] = false_discovery_control(p_values[varied]) if len(varied) else []
    rates = [side / count for side, count in zip(both, images, strict=True)]
    limits = [[proportion(float(rate), count) for rate in side] for side, count in zip(rates, images, strict=True)]
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


_LEAST = float(np.finfo(np.float64).tiny)


def _difference(reference: float, new: float, reference_limits: Limits, new_limits: Limits) -> Limits:
    """The interval of ``new - reference``: distances that each alone would make are squared and added."""
    below = np.hypot(new - new_limits[0], reference_limits[1] - reference)
    above = np.hypot(new_limits[1] - new, reference - reference_limits[0])
    change = new - reference
    return max(-1.0, float(change - below)), min(1.0, float(change + above))


_EXACT = (
    1_000_000  # pairs of rows up to which the KS statistic's exact distribution takes less than a tenth of a second
)


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
        change_limits: Its interval (Welch 1947), which holds 95 % where the means are about normally distributed.
    """

    p_value: float
    ks: float
    wasserstein: float
    effect: float
    change: float
    change_limits: Limits


def number_shift(reference: npt.ArrayLike, new: npt.ArrayLike) -> NumberShift:
    """Tests whether two sets of predicted numbers could be samples of one distribution, and says how far they lie apart.

    The p-value of the Kolmogorov-Smirnov test is exact up to a million pairs of rows and asymptotic beyond. Where predictions
    are equal to each other, as a nearest neighbour's often are, it is too large rather than too small.

    Args:
        reference: (n,) numbers.
        new: (m,) numbers.

    Raises:
        UsageError: A side has fewer than 2 numbers, or one is NaN or infinite.

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
    few = len(sides[0]) * len(sides[1]) <= _EXACT
    tested = ks_2samp(*sides, method="exact" if few else "asymp")
    moved = float(wasserstein_distance(*sides))
    spread = float(sides[0].std(ddof=1)) or float(np.concatenate(sides).std())
    change = float(sides[1].mean() - sides[0].mean())
    parts = [float(side.var(ddof=1)) / len(side) for side in sides]
    reach = 0.0
    if sum(parts):
        freedom = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
        reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * sum(parts) ** 0.5
    return NumberShift(
        p_value=float(np.clip(tested.pvalue, _LEAST, 1.0)),
        ks=float(tested.statistic),
        wasserstein=moved,
        effect=moved / spread if moved else 0.0,
        change=change,
        change_limits=(change - reach, change + reach),
    )
