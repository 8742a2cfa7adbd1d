"""Prediction intervals of numbers that hold the truth as often as they say, whatever the head: split conformal prediction."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.regression import units_of


def conformal_half_width(
    predicted: npt.ArrayLike, truth: npt.ArrayLike, *, level: float = 0.9, groups: npt.ArrayLike | None = None
) -> float | None:
    """Returns half the width of intervals around predictions that hold a new image's number with probability ``level``.

    Of n held-out images, from which the head has learned nothing, it is the ``ceil((n + 1) * level)``-th smallest absolute
    residual. If the new image comes from where these do, ``predicted - h <= true <= predicted + h`` holds with at least this
    probability, for any head and any n (Vovk, Gammerman & Shafer 2005, "Algorithmic learning in a random world"; Lei et al.
    2018, "Distribution-free predictive inference for regression"). The width is the same for every image.

    Of grouped images each group counts as one, its images sharing its weight ("pooled" intervals of Dunn, Wasserman & Ramdas
    2022, "Distribution-free prediction sets for two-layer hierarchical models"), so that the interval is for an image of a new
    group.

    Args:
        predicted: (n,) numbers.
        truth: (n,) numbers.
        level: Between 0 and 1.
        groups: (n,) of whatever kind: images with equal values belong together.

    Returns:
        In the target's unit; None where there are too few images (or groups) for the level: 9 are the fewest for 0.9.

    Raises:
        UsageError: The level is not between 0 and 1, or shapes do not fit.

    Example:
        >>> conformal_half_width(range(9), [0, 1, 2, 3, 4, 5, 6, 7, 5])
        3.0
    """
    if not 0 < level < 1:
        raise UsageError(f"level={level!r} must be between 0 and 1; 0.9 is usual")
    residuals = np.abs(np.asarray(predicted, np.float64) - np.asarray(truth, np.float64))
    if residuals.ndim != 1:
        raise UsageError(f"residuals of shape {residuals.shape}: give one prediction and one number an image")
    units = units_of(groups, len(residuals))
    sizes = np.bincount(units)
    order = np.argsort(residuals, kind="stable")
    weights = np.cumsum(1 / sizes[units[order]])
    needed = (len(sizes) + 1) * level
    needed = math.ceil(needed - 1e-9) if len(sizes) == len(residuals) else needed
    if not len(residuals) or needed > len(sizes):
        return None
    place = min(int(np.searchsorted(weights, needed - 1e-9)), len(residuals) - 1)
    return float(residuals[order][place])


def least_units(level: float) -> int:
    """Images (or groups) that an interval of a level needs at least."""
    return math.ceil(level / (1 - level) - 1e-9)
