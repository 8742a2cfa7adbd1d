"""Variance of a mean accuracy: over folds that share training images, over images and seeds that are crossed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from featurepipe.errors import UsageError
from featurepipe.heads.intervals import LEVEL, proportion

EQUAL = 1e-12
"""Differences below are rounding: the same accuracy summed in another order."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """Variance of a mean over images and seeds, its degrees of freedom, and the number of independent images."""

    variance: float
    freedom: float
    groups: int


def of_folds(cells: Floats, test_to_train: float) -> tuple[float, float | None]:
    """The mean and its corrected variance; None for one cell."""
    if not test_to_train >= 0:
        raise UsageError(f"test_to_train={test_to_train} must be images tested over images trained on, such as 0.25")
    value = float(cells.mean())
    if len(cells) < 2:
        return value, None
    if np.ptp(cells) <= EQUAL:
        return value, 0.0
    return value, float(cells.var(ddof=1)) * (1 / len(cells) + test_to_train)


def of_images(values: Floats, groups: npt.ArrayLike | None) -> tuple[float, Sampling | None]:
    """The mean of (k, n) values, and how it varies with images and seeds; None for one group."""
    value = float(values.mean())
    sums = _group_sums(values - value, groups) / values.shape[1]
    seeds, count = sums.shape
    if count < 2:
        return value, None
    of_group, of_seed = sums.mean(axis=0), sums.sum(axis=1)
    images = count / (count - 1) * float((of_group**2).sum())
    between = 0.0
    if seeds > 1:
        cells = sums - of_group - (of_seed / count)[:, None]
        both = count / ((count - 1) * (seeds - 1) * seeds) * float((cells**2).sum())
        between = max(0.0, float((of_seed**2).sum()) / (seeds * (seeds - 1)) - both)
    variance = images + between
    if variance <= EQUAL**2:
        return value, Sampling(0.0, count - 1, count)
    parts = images**2 / (count - 1) + (between**2 / (seeds - 1) if between else 0.0)
    return value, Sampling(variance, variance**2 / parts, count)


def _group_sums(values: Floats, groups: npt.ArrayLike | None) -> Floats:
    """Sums of (k, n) values over groups of images, (k, G)."""
    if groups is None:
        return values
    keys = np.asarray(groups)
    if keys.ndim not in {1, 2} or len(keys) != values.shape[1]:
        raise UsageError(f"groups must be one for each of the {values.shape[1]} images, they have shape {keys.shape}")
    distinct, codes = np.unique(keys, return_inverse=True, axis=0 if keys.ndim == 2 else None)
    return np.stack([np.bincount(codes.reshape(-1), row, len(distinct)) for row in values])


def limits(value: float, sampling: Sampling) -> tuple[float, float]:
    """The exact binomial interval for as many images as give the variance (Korn & Graubard 1998)."""
    spread = value * (1 - value)
    if sampling.variance > 0:
        return proportion(value, spread / sampling.variance, sampling.freedom)
    if spread < EQUAL:  # all right or all wrong: nothing shows how alike images are but that they are groups
        return proportion(value, sampling.groups, sampling.freedom)
    return value, value


def quantile(freedom: float) -> float:
    """Student's quantile for a two-sided interval."""
    return float(stdtrit(freedom, (1 + LEVEL) / 2))
