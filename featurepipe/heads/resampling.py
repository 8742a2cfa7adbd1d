"""Bootstrap resamples as counts: how often each image was drawn, never a copied row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

_CHUNK = 4096  # images whose counts in all resamples are held at once
_RESAMPLES = 1000  # held at once; 4,096 x 1,000 counts are 33 MB

Array = npt.NDArray[np.float64]


Contributions = Callable[[slice], csr_array]
"""Returns what each image of a slice adds to the sums: sparse, (images, width)."""


def plain_sums(contributions: Contributions, rows: int) -> Array:
    """Sums what each image contributes, chunk by chunk: (width,) float64."""
    total: Array = np.sum([contributions(chunk).sum(axis=0) for chunk in _chunks(rows)], axis=0)
    return total


def bootstrap_sums(contributions: Contributions, rows: int, width: int, *, resamples: int, seed: int) -> Array:
    """Sums what each image contributes, over bootstrap resamples of the images (Efron and Tibshirani, 1993).

    A resample draws ``rows`` images with replacement; all that a sum needs of it is how often each image was drawn,
    which is multinomial. The counts are drawn chunk by chunk (first how many fall into each chunk, then which), so
    memory does not grow with the number of images.

    Args:
        contributions: Of the images.
        rows: Number of images.
        width: Number of sums.
        resamples: How many to draw.
        seed: Of the draws.

    Returns:
        (resamples, width) float64.
    """
    rng = np.random.default_rng(seed)
    chunks = _chunks(rows)
    sizes = np.array([chunk.stop - chunk.start for chunk in chunks])
    sums = np.zeros((resamples, width))
    for first in range(0, resamples, _RESAMPLES):
        batch = sums[first : first + _RESAMPLES]
        drawn = rng.multinomial(rows, sizes / rows, size=len(batch))
        for chunk, size, draws in zip(chunks, sizes, drawn.T, strict=True):
            counts = np.empty((len(batch), size))
            for row, number in enumerate(draws):
                counts[row] = _counts(rng, int(size), int(number))
            batch += (contributions(chunk).T @ counts.T).T
    return sums


def resampled_counts(rows: int, *, resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yields how often each of ``rows`` images was drawn, one resample at a time."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield _counts(rng, rows, rows)


def interval(values: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Returns the percentile interval of resampled values, NaN left out; None if nothing is left.

    Example:
        >>> interval(np.arange(101.0), level=0.5)
        (25.0, 75.0)
    """
    finite = values[~np.isnan(values)]
    if not len(finite):
        return None
    tail = 50 * (1 - level)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, rows)) for start in range(0, rows, _CHUNK)]


def _counts(rng: np.random.Generator, size: int, draws: int) -> npt.NDArray[np.int64]:
    return np.bincount(rng.integers(size, size=draws), minlength=size)
