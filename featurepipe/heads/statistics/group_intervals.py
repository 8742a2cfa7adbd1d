"""Intervals of a test set whose images come in groups, such as patients: images of a group are alike, and count for fewer.

Whole groups are resampled (the bootstrap of clusters, Davison & Hinkley 1997, section 3.8) to estimate the variance of each
measure; of the AUC the variance is that of the groups' summed influences (Obuchowski 1997, "Nonparametric analysis of clustered
ROC curve data"). The variance, to which half a group all right and half a group all wrong are added, so that few
mistakes do not look certain, says how many independent images the measure is as certain as. The interval is the exact binomial
one of so many (Korn & Graubard 1998), with the degrees of freedom of the groups. Where nothing varies, a group is one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.special import stdtrit

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.intervals import LEVEL, Limits, proportion

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
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
