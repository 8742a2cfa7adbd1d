"""Which rows: the same seeded sample of images from every set of features, and folds that keep copies of an image together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, SameShape

Positions = npt.NDArray[np.int64]


class SomeRows(SameShape):
    """Some rows of blocks, as ``Blocks``; nothing is read until it is asked for.

    Args:
        source: (n, D) features.
        positions: (m,) row numbers in ``source``.
    """

    def __init__(self, source: Blocks, positions: Positions) -> None:
        self.source: Blocks = source
        self.positions = positions

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        return len(self.positions), self.source.shape[1]

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


def larger_classes_first(
    dealt: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64], codes: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Folds as `fold_numbers` deals them, but for fold 0: a class that has none of it takes that of the smallest class that has.

    Classes of as many images as there are folds, or more, have one in every fold, and theirs stay as they are.

    Args:
        dealt: (n,) what `fold_numbers` returned.
        keys: (n,) what tells images apart.
        codes: (n,) class numbers.

    Returns:
        (n,) fold of each row; as many images are in each fold as before.

    Example:
        >>> keys, codes = np.arange(6, dtype=np.uint64), np.array([0, 0, 1, 1, 1, 1])
        >>> larger_classes_first(np.array([0, 1, 2, 3, 4, 1]), keys, codes)
        array([1, 1, 2, 3, 4, 0])
    """
    _, first, image = np.unique(keys, return_index=True, return_inverse=True)
    fold, classes = dealt[first], codes[first]
    sizes = np.bincount(classes)
    held = np.bincount(classes[fold == 0], minlength=len(sizes))
    lacking = [kind for kind in np.argsort(-sizes, kind="stable") if sizes[kind] > 1 and not held[kind]]
    having = [kind for kind in np.argsort(sizes, kind="stable") if held[kind]]
    for larger, smaller in zip(lacking, having, strict=False):
        if sizes[smaller] >= sizes[larger]:
            break
        inside = np.flatnonzero(classes == larger)
        taker = inside[np.argmin(fold[inside])]
        giver = np.flatnonzero((classes == smaller) & (fold == 0))[0]
        fold[[taker, giver]] = fold[[giver, taker]]
    return np.asarray(fold[image.reshape(-1)])


def group_fold_numbers(
    units: npt.NDArray[np.uint64], codes: npt.NDArray[np.int64], *, folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """Deals groups of images to folds, as evenly by class as whole groups allow; a class of one group always trains.

    Groups come in the order of their size, the largest first, and each goes where its classes are rarest so far. The idea is that
    of scikit-learn's ``StratifiedGroupKFold``, which takes minutes for a hundred thousand groups. The folds that hold the
    most even part of each class have the lowest numbers, so that one fold that is held out is not that of a group which is
    larger than a fold.

    Args:
        units: (n,) what tells groups apart.
        codes: (n,) class numbers.
        folds: How many folds, at least 2.
        seed: Of the order among groups of one size.

    Returns:
        (n,) fold of each row, from 0 to ``folds`` - 1, or `ALWAYS_TRAIN`.

    Example:
        >>> group_fold_numbers(np.array([7, 7, 8, 8, 9, 9], np.uint64), np.array([0, 0, 0, 0, 1, 1]), folds=2, seed=0)
        array([ 1,  1,  0,  0, -1, -1])
    """
    _, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
    pairs, counts = np.unique(unit * (codes.max(initial=0) + 1) + codes, return_counts=True)
    owner, kind = np.divmod(pairs, codes.max(initial=0) + 1)
    starts = np.searchsorted(owner, np.arange(len(sizes) + 1))
    weight = counts / np.bincount(codes)[kind]  # the share of its class that a group has
    filled = np.zeros((folds, int(codes.max(initial=0)) + 1))
    totals = np.zeros(folds)
    dealt = np.empty(len(sizes), np.int64)
    for group in np.lexsort((np.random.default_rng(seed).permutation(len(sizes)), -sizes)):
        own = slice(starts[group], starts[group + 1])
        crowded = filled[:, kind[own]] @ weight[own]
        fold = int(np.lexsort((totals, crowded))[0])
        dealt[group] = fold
        filled[fold, kind[own]] += weight[own]
        totals[fold] += sizes[group]
    alone = np.bincount(kind, minlength=filled.shape[1]) == 1
    trains = np.unique(owner[alone[kind]])
    for group in trains:
        filled[dealt[group], kind[starts[group] : starts[group + 1]]] -= weight[starts[group] : starts[group + 1]]
        totals[dealt[group]] -= sizes[group]
    uneven = np.abs(filled[:, ~alone] - 1 / folds).sum(axis=1).round(9)  # equal folds keep their order
    place = np.empty(folds, np.int64)
    place[np.lexsort((uneven, totals == 0))] = np.arange(folds)
    dealt = place[dealt]
    dealt[trains] = ALWAYS_TRAIN
    return np.asarray(dealt[unit])
