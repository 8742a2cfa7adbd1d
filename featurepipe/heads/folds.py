"""Dealing images to folds so that copies of one image stay together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
