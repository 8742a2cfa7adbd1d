"""Who trains, who chooses and who is tested, for every seed and fold, images of another source among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from featurepipe.errors import Message, Option, UsageError
from featurepipe.training.splits import dealt, refuse_groups_across

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
        counted: (m,) which images of the other source its heads may be tested on; None where there is none.
    """

    seed: int
    number: int
    fit: Positions
    choose: Positions
    test: Positions
    others: tuple[tuple[Positions, Positions], ...] = ()
    counted: npt.NDArray[np.bool_] | None = None

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
        seeds: how many times images are dealt to folds.

    Raises:
        UsageError: there are too few images.
    """
    every = np.arange(len(codes))
    found = []
    for seed in range(seeds):
        fold_of = dealt(features, codes, every, folds=folds, seed=seed)
        for number in range(folds):
            test = every[fold_of == number]
            found.append(_fold(features, codes, every[fold_of != number], test, seed, number, number))
    return found


def own_split(features: FeatureSet, codes: Codes, *, seeds: int, classes: bool = True) -> list[Fold]:
    """The dataset's own splits: fitted on ``train``, tested on ``test``; ``val`` chooses, else a part of ``train`` by seed.

    Training images that are copies of test images take no part, nor do test images of classes that no training image has.

    Args:
        features: n labelled rows.
        codes: (n,) class numbers, or others by which rows are dealt evenly.
        seeds: how many times a part of ``train`` is set aside.
        classes: whether the numbers are classes to be told apart.

    Raises:
        UsageError: the dataset has no split ``train`` or ``test``, or one of them is too small.
    """
    splits = features.splits
    train, val, test = (np.flatnonzero(splits == name) for name in ("train", "val", "test"))
    if not len(train) or not len(test):
        there = ", ".join(sorted({str(name) for name in splits})) or "none"
        raise UsageError(
            Message(
                f"dataset {features.origin.dataset} needs labelled images in the splits train and test for ",
                Option("split"),
                f" (it has: {there}); leave ",
                Option("split"),
                " out to cross-validate",
            )
        )
    refuse_groups_across(features, {"train": train, "val": val, "test": test})
    keys = features.keys64
    train = train[~np.isin(keys[train], keys[test])]
    val = val[~np.isin(keys[val], keys[np.union1d(train, test)])]
    if classes:
        test = test[np.isin(codes[test], codes[np.union1d(train, val)])]
    if not len(val):
        return [_fold(features, codes, train, test, seed, 0, 0) for seed in range(seeds)]
    return [_checked(Fold(seed, 0, train, val, test), codes) for seed in range(seeds)]


def _fold(
    features: FeatureSet, codes: Codes, train: Positions, test: Positions, seed: int, number: int, draw: int
) -> Fold:
    return _checked(with_choices(features, codes, train, test, seed, number, draw), codes)


def with_choices(
    features: FeatureSet, codes: Codes, train: Positions, test: Positions, seed: int, number: int, draw: int
) -> Fold:
    """Sets images aside to choose by: a fifth of those that train, by class, copies and groups together; several in turn if few.

    Args:
        features: n rows.
        codes: (n,) class numbers, or others by which rows are dealt evenly.
        train: rows to divide.
        test: rows that take no part.
        seed: of the fold.
        number: of the fold.
        draw: tells draws of one seed apart.

    Returns:
        The fold; its ``fit`` or ``choose`` may be empty, where the rows are too few.
    """
    fold_of = dealt(features, codes, train, folds=CHOOSING, seed=1000 * (seed + 1) + draw)
    parts = min(CHOOSING, -(-ENOUGH_TO_CHOOSE // max(1, int((fold_of == 0).sum()))))
    (fit, choose), *others = ((train[fold_of != part], train[fold_of == part]) for part in range(parts))
    usable = tuple((rest, part) for rest, part in others if len(part) and len(np.unique(codes[rest])) > 1)
    return Fold(seed, number, fit, choose, test, usable)


def _checked(fold: Fold, codes: Codes) -> Fold:
    if not len(fold.choose) or not len(fold.test) or len(np.unique(codes[fold.fit])) < 2:
        raise UsageError(
            Message(
                f"{len(codes):,} labelled images of {len(np.unique(codes))} classes are too few for such folds: one of them "
                "leaves no image to choose by, to test, or fewer than two classes to learn; give more images or fewer ",
                Option("folds"),
            )
        )
    return fold


LEFT_OUT = ("shifted_of_other_classes", "shifted_in_both", "shifted_twins_that_train")
"""Why images of the other source take no part: of no class here, or without a known label or number; the same image is here; its
twin, or images of its group, train every head."""


@dataclass(frozen=True)
class Elsewhere:
    """The images of another source that are tested.

    An image's *twin* is the image of the same id (and class) among those that are compared on, such as the same emoji in
    another style. A head that has learned from it knows more than it would of a stranger, so that it does not count. The same
    holds of images of its group, if both sources have a group of that name.

    Attributes:
        dataset: their name in the store.
        rows: (m,) positions in that dataset.
        images: those images, as a view of the first column.
        unseen: (folds, m) whether a fold's head has not learned from the image's twin or group; for each seed there is one.
        twins: how many have a twin.
        grouped: how many are of a group that is here, too.
        left_out: images that take no part, and why.
    """

    dataset: str
    rows: Positions
    images: FeatureSet
    unseen: npt.NDArray[np.bool_]
    twins: int
    grouped: int
    left_out: Mapping[str, int]

    def testers(self, folds: Sequence[Fold]) -> Positions:
        """(m,) which fold of the first seed to ask about each image: one whose head has not seen its twin, else in turns."""
        first = [number for number, fold in enumerate(folds) if fold.seed == folds[0].seed]
        order = (np.arange(len(first))[:, None] - np.arange(len(self.rows))) % len(first)  # how long until its turn
        order[~self.unseen[first]] = len(first)
        chosen: Positions = np.array(first)[order.argmin(axis=0)]
        return chosen


def settle_elsewhere(
    dataset: str, others: FeatureSet, here: str, images: FeatureSet, classes: Sequence[str], folds: Sequence[Fold]
) -> Elsewhere:
    """Settles which images of another source are tested.

    Args:
        dataset: the other source's name.
        others: its images; with targets if those here have them, in the same columns.
        here: name of the dataset that is compared on.
        images: its images.
        classes: their classes.
        folds: positions among them.

    Raises:
        UsageError: no image is left.
    """
    if images.targets is None:
        known, wanted = others.codes(classes) >= 0, f"is of a class of {here}"
    else:
        known, wanted = others.mask(labelled=True), "has a label or number that is known"
    same = known & np.isin(others.keys64, images.keys64)
    rows = np.flatnonzero(known & ~same)
    if not len(rows):
        raise UsageError(
            f"none of the {len(others):,} images of {dataset} {wanted} without being in it; there: "
            f"{', '.join(others.classes[:5]) or 'no label'}; here: {', '.join(images.classes[:5]) or 'no label'}"
        )
    found = others.take(rows)
    twins, shared = _twins(found, images), _shared_groups(found, images)
    learned = [{int(code) for code in np.unique(shared.here[fold.train]) if code >= 0} for fold in folds]
    unseen = np.stack(
        [
            ~np.isin(twins, fold.train) & ~np.isin(shared.there, sorted(names))
            for fold, names in zip(folds, learned, strict=True)
        ]
    )
    seeds = np.array([fold.seed for fold in folds])
    tested = np.all([unseen[seeds == seed].any(axis=0) for seed in np.unique(seeds)], axis=0)
    if not tested.any():
        of = "id, or the group," if (shared.there >= 0).any() else "id"
        raise UsageError(
            Message(
                f"all {len(rows):,} images of {dataset} have the {of} of an image of {here} that every head learns "
                "from; compare by cross-validation (leave ",
                Option("split"),
                " out), where each is tested by heads that do not",
            )
        )
    return Elsewhere(
        dataset,
        rows[tested],
        found.take(tested),
        unseen[:, tested],
        int((twins[tested] >= 0).sum()),
        int((shared.there[tested] >= 0).sum()),
        dict(zip(LEFT_OUT, (int(those.sum()) for those in (~known, same, ~tested)), strict=True)),
    )


def _twins(others: FeatureSet, images: FeatureSet) -> Positions:
    """For each image of the other source the position of its twin, -1 where it has none."""
    if images.targets is not None:
        of_id = {name: place for place, name in enumerate(images.ids)}
        return np.array([of_id.get(name, -1) for name in others.ids], np.int64)
    places = {pair: place for place, pair in enumerate(zip(images.ids, images.labels, strict=True))}
    found = [places.get(pair, -1) for pair in zip(others.ids, others.labels, strict=True)]
    return np.array(found, np.int64)


class _SharedGroups(NamedTuple):
    """Numbers of the groups that both sources have, -1 for images of no such group: of the images here, and of those there."""

    here: Positions
    there: Positions


def _shared_groups(others: FeatureSet, images: FeatureSet) -> _SharedGroups:
    own, theirs = images.groups, others.groups
    if own is None or theirs is None:
        return _SharedGroups(np.full(len(images), -1), np.full(len(others), -1))
    both = sorted({name for name in own if name is not None} & set(theirs))
    number = {name: place for place, name in enumerate(both)}
    here, there = (np.array([number.get(name, -1) for name in names], np.int64) for names in (own, theirs))
    return _SharedGroups(here, there)
