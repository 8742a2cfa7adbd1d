"""A comparison of routes with everything settled: who is tested, and which images train for each size and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featurepipe.display import counted
from featurepipe.errors import Message, Option, UsageError
from featurepipe.layer_depth.folds import LEFT_OUT, Codes, Fold, Positions, settle_elsewhere, with_choices
from featurepipe.layer_depth.sources import Extracted
from featurepipe.layer_depth.study import PRETRAINED, Protocol, Study, learnable, with_roles_elsewhere
from featurepipe.store import FeatureSet
from featurepipe.store.options import RoleOptions
from featurepipe.store.roles import with_roles
from featurepipe.training.splits import TEST_FOLDS, hold_out_test, refuse_groups_across
from featurepipe.transfer_routes.options import ALL, RoutesOptions

VERSION = 1
"""Goes up when the same settings would measure something else."""


@dataclass(frozen=True)
class DrawSize:
    """How many images train.

    Attributes:
        name: images of each class, or ``all``.
        images: that train, the mean over seeds.
        per_class: the mean over classes.
    """

    name: int | str
    images: float
    per_class: float

    @property
    def text(self) -> str:
        """In words."""
        return f"all ({self.per_class:,.0f} a class)" if self.name == ALL else f"{self.name:,} a class"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"size": self.name, "images": self.images, "per_class": self.per_class, "text": self.text}


@dataclass(frozen=True)
class RoutesStudy:
    """What is compared on what.

    Attributes:
        every: images, columns and truth of all images, and those of another source; its fold has every training image.
        draws: the fold of each size and seed; all have the same test images.
        sizes: ascending; the last one is what the user has, where that is asked for.
        division: how images were divided into those that train and those that are tested, in words.
        bins: how many kinds of images a draw has as many of.
    """

    every: Study
    draws: Mapping[tuple[int | str, int], Fold]
    sizes: Sequence[DrawSize]
    division: str
    bins: int

    def of(self, size: int | str) -> Study:
        """The same with the folds of one size, one for each seed."""
        folds = [fold for (own, _), fold in self.draws.items() if own == size]
        return replace(self.every, folds=folds)

    @property
    def test(self) -> Positions:
        """Rows that are tested."""
        return self.every.folds[0].test

    @property
    def pool(self) -> Positions:
        """Rows from which those that train are drawn."""
        return self.every.folds[0].train

    @property
    def per(self) -> str:
        """What a size counts the images of."""
        return PER[self.every.protocol.target_type]

    @property
    def text(self) -> str:
        """How it was measured, in words."""
        seeds, kind = self.every.protocol.seeds, self.every.protocol.target_type
        return (
            f"{self.division}. Every route is tested on the same {len(self.test):,} images. For each size, images are drawn "
            f"{'once' if seeds == 1 else f'{seeds} times'} from the other {len(self.pool):,}, as many {PER_LONG[kind]} "
            "where it has them, whole groups together where there are groups, copies of an image together; a larger draw holds "
            "the smaller one of its seed. A fifth of a draw is set aside to choose parameters and when to stop."
        )


PER = {"multiclass": "class", "multilabel": "label", "continuous": "tenth of the numbers"}
PER_LONG = {
    "multiclass": "of each class",
    "multilabel": "of each label (an image counts for the rarest label that it has)",
    "continuous": "of each tenth of the numbers",
}


def settle_routes(found: Extracted, options: RoutesOptions, labels: Any, say: Callable[[str], None]) -> RoutesStudy:
    """Settles images, test images and draws.

    Args:
        found: where the columns are.
        options: what is asked for.
        labels: labels to use instead of the dataset's, or None.
        say: told what the labels label, what of them is not used, and which sizes are larger than what there is.

    Raises:
        UsageError: the labels cannot be learned from, a size leaves no image to choose by, or the other source has no image of a
            known class.
    """
    store, dataset, shifted = found.store, found.dataset, found.shifted_dataset
    snapshots = {name: store.snapshot_ids(name)[-1] for name in (dataset, shifted) if name is not None}
    families = ("ridge",) if options.target_type == "continuous" else ("logistic",)
    protocol = Protocol(families, None, options.seeds, options.target_type)

    def view(name: str) -> FeatureSet:
        return store.features(name, found.columns[0].column, found.spaces[PRETRAINED], snapshot=snapshots[name])

    roles = RoleOptions.of(options)
    every = with_roles(store, view(dataset), labels, roles, say, snapshot=snapshots[dataset])
    rows = np.flatnonzero(every.mask(labelled=True))
    images, codes, classes = learnable(every.take(rows), say)
    known = images.mask(labelled=True)  # of the labels that are left
    rows, images, codes = rows[known], images.take(known), codes[known]
    pool, test, division = _divided(images, codes, options)
    fold = Fold(0, 0, pool, pool[:0], test)
    elsewhere = None
    if shifted is not None:
        there = with_roles_elsewhere(store, view(shifted), labels, roles, images, snapshots[shifted], say)
        elsewhere = settle_elsewhere(shifted, there, dataset, images, classes, [fold])
    left_out = {
        "unlabelled": every.unlabelled + int((~known).sum()),
        "rejected": every.rejected,
        "in_no_draw": len(images) - len(pool) - len(test),
        **(elsewhere.left_out if elsewhere else dict.fromkeys(LEFT_OUT, 0)),
    }
    study = Study(
        store,
        dataset,
        elsewhere,
        found.spaces,
        found.columns,
        protocol,
        classes,
        [fold],
        rows,
        images,
        left_out,
        snapshots,
    )
    truth = study.truth
    if options.target_type != "multiclass":
        contributions = protocol.measure.contributions(np.zeros(truth[test].shape), truth[test])
        if np.isnan(contributions).any():
            raise UsageError(
                f"the {len(test):,} test images of dataset {dataset} have no label on both sides, or one and the same "
                "number; give more images"
            )
    sizes = _sizes(codes[pool], options.sizes, PER[options.target_type], say)
    draws = {
        (size, seed): _draw(images, codes, pool, test, size, seed, dataset)
        for size in sizes
        for seed in range(options.seeds)
    }
    bins = len(np.unique(codes[pool]))
    return RoutesStudy(study, draws, [_told(size, draws, bins) for size in sizes], division, bins)


def _divided(images: FeatureSet, codes: Codes, options: RoutesOptions) -> tuple[Positions, Positions, str]:
    """Rows that may train, rows that are tested, and how they were divided."""
    rows, splits = np.arange(len(images)), images.splits
    if (splits == "test").any():
        test, pool = np.flatnonzero(splits == "test"), np.flatnonzero(splits != "test")
        refuse_groups_across(images, {"train": pool, "test": test})
        copies = np.isin(images.keys64[pool], images.keys64[test])
        pool, text = pool[~copies], "Tested are images of the dataset's split test"
        text += f"; {counted(int(copies.sum()), 'copied image')} of them do not train" if copies.any() else ""
    else:
        pool, test = hold_out_test(images, codes, rows, seed=0)
        what = "image" if images.groups is None else "image, by group,"
        text = f"The dataset has no split test: every {TEST_FOLDS}th {what} is held out"
    if options.target_type == "multiclass":
        test = test[np.isin(codes[test], codes[pool])]
    if options.test_images is not None and len(test) > options.test_images:
        parts = -(-len(test) // options.test_images)
        test = np.sort(
            _ranked(images, codes, test, seed=0, per_class=-(-options.test_images // len(np.unique(codes[test]))))
        )
        text += f"; {len(test):,} of them, about every {parts}th, drawn by class"
    if not len(test) or len(np.unique(codes[pool])) < 2:
        raise UsageError(
            f"{len(images):,} labelled images of dataset {images.origin.dataset} are too few: they leave no image to test, or "
            "fewer than two classes to learn; give more images"
        )
    return pool, test, text


def _ranked(images: FeatureSet, codes: Codes, rows: Positions, *, seed: int, per_class: int | None) -> Positions:
    """Some rows of each class: those of whole groups, or else images, in an order that a seed draws; all without a number."""
    if per_class is None:
        return rows
    rng = np.random.default_rng(seed)
    _, unit = np.unique(images.units()[rows], return_inverse=True)
    rank = rng.permutation(int(unit.max(initial=0)) + 1)[unit]
    order = np.lexsort((rng.permutation(len(rows)), rank, codes[rows]))
    ordered = codes[rows][order]
    place = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
    return np.sort(rows[order[place < per_class]])


def _sizes(codes: Codes, asked: Sequence[int | str], per: str, say: Callable[[str], None]) -> list[int | str]:
    """The sizes that are smaller than what there is, ascending, then ``all``."""
    largest = int(np.bincount(codes).max())
    numbers = sorted(size for size in asked if isinstance(size, int))
    kept = [size for size in numbers if size < largest]
    if left := [f"{size:,}" for size in numbers if size >= largest]:
        say(f"sizes {', '.join(left)} are all images: no {per} has more than {largest:,} that train")
    has_all = ALL in asked or len(kept) < len(numbers)
    return [*kept, *([ALL] if has_all else [])]


def _draw(
    images: FeatureSet, codes: Codes, pool: Positions, test: Positions, size: int | str, seed: int, dataset: str
) -> Fold:
    rows = _ranked(images, codes, pool, seed=seed, per_class=None if size == ALL else int(size))
    fold = with_choices(images, codes, rows, test, seed, 0, 0)
    if not len(fold.choose) or len(np.unique(codes[fold.fit])) < 2:
        raise UsageError(
            Message(
                f"{len(rows):,} training images of dataset {dataset} leave no image to choose parameters by, or fewer than two "
                "classes to learn from; give more images, or larger ", Option("sizes", size),
            )
        )  # fmt: skip
    return fold


def _told(size: int | str, draws: Mapping[tuple[int | str, int], Fold], bins: int) -> DrawSize:
    images = float(np.mean([len(fold.train) for (own, _), fold in draws.items() if own == size]))
    return DrawSize(size, images, images / bins)
