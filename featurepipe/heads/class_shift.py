"""Whether a head gives its classes to new images in the same shares as before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.monte_carlo import sequential_p_value

_BY_CHANCE = 200  # tables behind the mean total variation

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


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
