"""Who trains, who chooses and who is tested, for every seed and fold; copies of one image stay together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.folds import fold_numbers

if TYPE_CHECKING:
    from featurepipe.store import FeatureSet

Positions = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int64]

CHOOSING = 5
"""One in so many training images chooses the regularisation; so many times at most, with others each time."""

ENOUGH_TO_CHOOSE = 500
"""Images that choose: where one part of the training images has fewer, further parts choose, too, until they have. Of two heads
that differ on one image of twenty, the difference of the accuracies on so many images is a percentage point uncertain."""


@dataclass(frozen=True)
class Fold:
    """Positions of rows; no image, nor a copy of it, is in two of them.

    Attributes:
        seed: of the shuffle.
        number: which fold of that seed.
        fit: rows that heads are fitted on while parameters are compared.
        choose: rows that parameters are compared on; both together are the rows of the last fit.
        test: rows that the accuracy is measured on.
        others: further divisions of the same rows into ``fit`` and ``choose``; an accuracy is compared over all that choose.
    """

    seed: int
    number: int
    fit: Positions
    choose: Positions
    test: Positions
    others: tuple[tuple[Positions, Positions], ...] = ()

    @property
    def choices(self) -> tuple[tuple[Positions, Positions], ...]:
        """Every division into rows that fit and rows that choose."""
        return ((self.fit, self.choose), *self.others)

    @property
    def train(self) -> Positions:
        """Rows of the last fit, in order."""
        return np.union1d(self.fit, self.choose)

    @property
    def test_share(self) -> float:
        """Test images for each training image: how much folds overlap."""
        return len(self.test) / (len(self.fit) + len(self.choose))


def cross_validation(features: FeatureSet, codes: Codes, *, folds: int, seeds: int) -> list[Fold]:
    """Every labelled image is tested once for each seed, by class and by key as evenly as can be; the only one of a class trains.

    Args:
        features: n labelled rows.
        codes: (n,) class numbers.
        folds: of each seed, at least 2.
        seeds: how many times all is dealt anew.

    Raises:
        UsageError: there are too few images.
    """
    every = np.arange(len(codes))
    found = []
    for seed in range(seeds):
        dealt = fold_numbers(features.keys64, codes, folds=folds, seed=seed)
        for number in range(folds):
            test = every[dealt == number]
            found.append(_fold(features, codes, every[dealt != number], test, seed, number, number))
    return found


def own_split(features: FeatureSet, codes: Codes, *, seeds: int) -> list[Fold]:
    """The dataset's own splits: fitted on ``train``, tested on ``test``; ``val`` chooses, else a part of ``train`` by seed.

    Training images that are copies of test images take no part, nor do test images of classes that no training image has.

    Raises:
        UsageError: the dataset has no split ``train`` or ``test``, or one of them is too small.
    """
    splits = features.splits
    train, val, test = (np.flatnonzero(splits == name) for name in ("train", "val", "test"))
    if not len(train) or not len(test):
        there = ", ".join(sorted({str(name) for name in splits})) or "none"
        raise UsageError(
            f"dataset {features.origin.dataset} needs labelled images in the splits train and test for --split "
            f"(it has: {there}); leave --split out to cross-validate"
        )
    keys = features.keys64
    train = train[~np.isin(keys[train], keys[test])]
    val = val[~np.isin(keys[val], keys[np.union1d(train, test)])]
    test = test[np.isin(codes[test], codes[np.union1d(train, val)])]
    if not len(val):
        return [_fold(features, codes, train, test, seed, 0, 0) for seed in range(seeds)]
    return [_checked(Fold(seed, 0, train, val, test), codes) for seed in range(seeds)]


def _fold(
    features: FeatureSet, codes: Codes, train: Positions, test: Positions, seed: int, number: int, draw: int
) -> Fold:
    dealt = fold_numbers(features.keys64[train], codes[train], folds=CHOOSING, seed=1000 * (seed + 1) + draw)
    parts = min(CHOOSING, -(-ENOUGH_TO_CHOOSE // max(1, int((dealt == 0).sum()))))
    (fit, choose), *others = ((train[dealt != part], train[dealt == part]) for part in range(parts))
    usable = tuple((rest, part) for rest, part in others if len(part) and len(np.unique(codes[rest])) > 1)
    return _checked(Fold(seed, number, fit, choose, test, usable), codes)


def _checked(fold: Fold, codes: Codes) -> Fold:
    if not len(fold.choose) or not len(fold.test) or len(np.unique(codes[fold.fit])) < 2:
        raise UsageError(
            f"{len(codes):,} labelled images of {len(np.unique(codes))} classes are too few for such folds: one of them leaves "
            "no image to choose by, to test, or fewer than two classes to learn; give more images or fewer --folds"
        )
    return fold
