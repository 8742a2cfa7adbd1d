"""Which rows: the same seeded sample of images from every set of features, and folds that keep copies of an image together."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks

Positions = npt.NDArray[np.int64]


class SomeRows:
    """Some rows of blocks, as ``Blocks``; nothing is read until it is asked for.

    Args:
        source: (n, D) features.
        positions: (m,) row numbers in ``source``.
    """

    def __init__(self, source: Blocks, positions: Positions) -> None:
        self.source, self.positions = source, positions

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        return len(self.positions), self.source.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The source's dtype."""
        return self.source.dtype

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Returns some of the rows."""
        return self.source.read(dtype, rows=self.positions if rows is None else self.positions[rows])


def sampled_positions(count: int, rows: int | None, seed: int = 0) -> Positions | None:
    """Draws ``rows`` of ``count`` rows without replacement, in ascending order; None where all of them are wanted.

    Args:
        count: Rows there are.
        rows: The most to draw; None for all.
        seed: Of the draw: it depends on nothing else, so that every set of features gives the same images.

    Raises:
        UsageError: ``rows`` is less than 1.

    Example:
        >>> sampled_positions(10, 3), sampled_positions(3, 10)
        (array([5, 6, 9]), None)
    """
    if rows is not None and rows < 1:
        raise UsageError(f"rows={rows} must be 1 or more, or None for all")
    if rows is None or rows >= count:
        return None
    return np.sort(np.random.default_rng(seed).choice(count, rows, replace=False)).astype(np.int64)


ALWAYS_TRAIN = -1
"""The fold of an image that no fold may take away: the only one of its class."""


def fold_numbers(
    keys: npt.NDArray[np.uint64], codes: npt.NDArray[np.int64], *, folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """Deals images to folds: by class as evenly as can be, copies together, classes with a single image always to training.

    Args:
        keys: (n,) what tells images apart.
        codes: (n,) class numbers.
        folds: how many folds, at least 2.
        seed: of the shuffle.

    Returns:
        (n,) fold of each row, from 0 to ``folds`` - 1, or `ALWAYS_TRAIN`.

    Example:
        >>> fold_numbers(np.array([7, 7, 8, 9], np.uint64), np.array([0, 0, 0, 1]), folds=2, seed=0)
        array([ 1,  1,  0, -1])
    """
    _, first, image = np.unique(keys, return_index=True, return_inverse=True)
    image = image.reshape(-1)
    classes = codes[first]  # of copies with different labels, that of the first
    order = np.lexsort((np.random.default_rng(seed).permutation(len(first)), classes))
    dealt = np.empty(len(first), np.int64)
    dealt[order] = np.arange(len(first)) % folds  # running on over classes keeps the folds equally large
    singles = np.bincount(classes, minlength=int(classes.max(initial=0)) + 1)[classes] == 1
    dealt[singles] = ALWAYS_TRAIN
    return dealt[image]
