"""Which rows train, which ones choose and calibrate, and which ones are kept for the test: copies never land on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.annotations import split_asked
from featurepipe.display import counted, has
from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.heads.blocks import iterate
from featurepipe.heads.sampling import fold_numbers, group_fold_numbers, larger_classes_first
from featurepipe.heads.statistics.intervals import units_of

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet

Positions = npt.NDArray[np.int64]
Fold = tuple[Positions, Positions]

TEST_FOLDS = 5
"""One in so many images is held out for the test where the dataset has no splits."""
VALIDATION_FOLDS = 10
"""At least one in so many training images chooses and calibrates where there is no ``val`` split."""
FEWEST_FOLDS = 3
"""At most one in so many training images is set aside, where prediction intervals need as many."""
CROSSED_FOLDS = 5
"""Folds in which few training images all calibrate several labels."""
MOST_CROSSED = 5_000
"""Training images up to which they do: of more, the part set aside has enough that have a label."""
MOST_VALIDATION = 10_000
"""Images that validation takes at most from the training images: more would not sharpen one number."""


@dataclass(frozen=True)
class Division:
    """Positions of rows in a feature set.

    Attributes:
        train: rows to fit on; the validation rows are not among them.
        validation: rows that choose parameters and calibrate.
        test: rows that nothing is chosen by; may be empty.
        is_carved: whether the validation rows were taken from the training rows, so that the last fit may have them back.
        text: how it was done, for people.
        is_crossed: whether all training rows calibrate, each scored by a head that was fitted on other folds.
    """

    train: Positions
    validation: Positions
    test: Positions
    is_carved: bool
    text: str
    is_crossed: bool = False

    @property
    def final(self) -> Positions:
        """Rows that the last fit is made on, in order."""
        return np.union1d(self.train, self.validation) if self.is_carved else self.train

    def groups(self, names: npt.NDArray[np.object_]) -> dict[str, int]:
        """How many groups are on each side: ``train`` (the last fit's), ``validation`` (of these, if it is carved), ``test``.

        Args:
            names: (n,) group of each row, None for an image by itself, which does not count.
        """
        sides = {"train": self.final, "validation": self.validation, "test": self.test}
        return {side: len({name for name in names[rows] if name is not None}) for side, rows in sides.items()}


def divide(
    features: FeatureSet,
    codes: npt.NDArray[np.int64],
    *,
    split: str | None,
    seed: int,
    validate: bool,
    least: int = 0,
    crossed: bool = False,
    column: str | None = None,
) -> Division:
    """Divides the labelled rows of a dataset.

    The dataset's own splits are taken as they are: ``train`` to fit, ``val`` to choose and calibrate, ``test`` kept away.
    Without splits a fifth of the images is held out, and without ``val`` a tenth of the training images (10,000 at most) is
    set aside, more of few if ``least`` asks for it; both by class, and by key, so that copies of one image stay together.

    Args:
        features: n rows.
        codes: (n,) class numbers, -1 where a row has no label.
        split: the split to train on; None for ``train``, or for what is not held out where there are no splits.
        seed: of the draw.
        validate: whether validation rows are needed.
        least: validation images, or groups of them, to set aside at least, if a third of the training images has as many.
        crossed: whether few training images are all to calibrate, out of fold, unless there is a split ``val``.
        column: the column that the splits are of, if one was asked for.

    Raises:
        UsageError: the split does not exist or has no labelled row.
    """
    names = sorted({name for name in features.splits if name is not None})
    if names:
        train, own, test, text = _own_splits(features, codes, names, split_asked(split or "train", names))
        whose = "the dataset's own splits" if column is None else f"the splits of column {column}"
        text = f"{whose} ({', '.join(names)}), {text}"
    elif split is not None:
        what = f"unknown split {split!r}: dataset {features.origin.dataset} has no splits; leave "
        raise UsageError(Message(what, Option("split"), " out"))
    else:
        train, test = hold_out_test(features, codes, np.flatnonzero(codes >= 0), seed=seed)
        own = test[:0]
        what = "image" if features.groups is None else "image, by group,"
        text = f"no splits in the dataset: every {TEST_FOLDS}th {what} held out for the test (seed {seed})"
    if len(own) or not validate:
        return _told(features, Division(train, own, test, is_carved=False, text=text))
    crossed = crossed and len(train) <= MOST_CROSSED
    how = f"all {len(train):,} training images calibrate, in {CROSSED_FOLDS} folds"
    train, carved = _set_aside(features, codes, train, least=least, seed=seed + 1)
    how = how if crossed else f"{len(carved):,} training images set aside to calibrate"
    return _told(features, Division(train, carved, test, is_carved=True, text=f"{text}; {how}", is_crossed=crossed))


def learned_rows(features: FeatureSet, split: str | None) -> npt.NDArray[np.bool_]:
    """(n,) whether a row is of the split to train on; all are where the dataset has no splits, and some are held out later."""
    names = features.split_names()
    if not names:
        return np.ones(len(features), np.bool_)
    return np.asarray(features.splits == split_asked(split or "train", names), np.bool_)


def small_classes(
    features: FeatureSet, codes: npt.NDArray[np.int64], split: str | None, *, least: int
) -> dict[str, int]:
    """The classes of fewer than ``least`` images of `learned_rows`, and how many each has; none of those that have none.

    Args:
        features: n rows.
        codes: (n,) numbers of their classes in ``features.classes``.
        split: the split to train on, or None.
        least: images from which on a class is learned.

    Raises:
        UsageError: Without these there are not two classes to learn.
    """
    learned = learned_rows(features, split)
    counts = {name: count for name, count in class_counts(codes[learned], features.classes).items() if count}
    few = {name: count for name, count in counts.items() if count < least}
    if few and len(counts) - len(few) < 2:
        name = next(iter(few))
        first = int(np.flatnonzero(learned & (codes == features.classes.index(name)))[0])
        raise UsageError(
            Message(
                f"{len(few)} of {len(counts)} classes {has(len(few))} fewer than {least} images to learn from, such as {name!r} "
                f"with {few[name]} (id {features.ids[first]}), and a head needs two classes or more; give more images, or accept "
                "them with ",
                Option("min_class_size", min(few.values())),
            )
        )
    return few


def _set_aside(
    features: FeatureSet, codes: npt.NDArray[np.int64], rows: Positions, *, least: int, seed: int
) -> tuple[Positions, Positions]:
    """Splits ``rows`` into those to train on and a tenth to validate; of few more, until ``least`` of them validate."""
    usual = max(VALIDATION_FOLDS, -(-len(rows) // MOST_VALIDATION))
    for folds in range(usual, FEWEST_FOLDS - 1, -1):
        train, carved = hold_out(features, codes, rows, folds=folds, seed=seed)
        if count_units(features, carved) >= least:
            return train, carved
    return hold_out(features, codes, rows, folds=usual, seed=seed)


def count_units(features: FeatureSet, rows: Positions) -> int:
    """How many images some rows are; if images have groups, how many groups, each image without one being one."""
    groups = features.take(rows).groups
    return len(rows) if groups is None else len(np.unique(units_of(groups, len(rows))))


def _told(features: FeatureSet, division: Division) -> Division:
    """The division whose text says how many groups are on each side, if images have groups."""
    if features.groups is None:
        return division
    counts = division.groups(features.groups)
    chosen_by = f"{counts['validation']:,}"
    aside = f" ({chosen_by} of these to calibrate)" if division.is_carved and not division.is_crossed else ""
    beside = f", {chosen_by} to choose by" if not division.is_carved and counts["validation"] else ""
    sides = f"{counted(counts['train'], 'group')} to train on{aside}{beside}, {counts['test']:,} to test"
    return replace(division, text=f"{division.text}; {sides}")


def _own_splits(
    features: FeatureSet, codes: npt.NDArray[np.int64], names: list[str], wanted: str
) -> tuple[Positions, Positions, Positions, str]:
    """Labelled rows of the split to train on, of ``val`` and of ``test``, and which is trained on."""
    if wanted not in names:
        raise unknown("split", wanted, names, where=f"dataset {features.origin.dataset}", see="featurepipe info STORE")
    splits = features.splits
    train, own, test = (np.flatnonzero((codes >= 0) & (splits == name)) for name in (wanted, "val", "test"))
    if not len(train):
        raise UsageError(
            Message(
                f"split {wanted} of dataset {features.origin.dataset} has no labelled image to train on; give labels with ",
                Option("labels", "FILE"),
                ", or choose another with ",
                Option("split"),
                f": {', '.join(names)}",
            )
        )
    refuse_groups_across(features, {wanted: train, "val": own, "test": test} if wanted == "train" else {})
    none = train[:0]
    return train, none if wanted == "val" else own, none if wanted == "test" else test, f"trained on {wanted}"


def dealt(
    features: FeatureSet, codes: npt.NDArray[np.int64], rows: Positions, *, folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """Deals some rows to folds by class; copies of an image, and images of a group, go to one fold; (m,) fold numbers."""
    if features.groups is None:
        return fold_numbers(features.keys64[rows], codes[rows], folds=folds, seed=seed)
    return group_fold_numbers(features.units()[rows], codes[rows], folds=folds, seed=seed)


def refuse_groups_across(features: FeatureSet, sides: Mapping[str, Positions]) -> None:
    """Refuses a dataset's own splits if a group has images on both sides of them.

    Raises:
        UsageError: Names how many do, the first, and what to do.
    """
    if features.groups is None:
        return
    groups = features.groups
    for (one, rows), (other, others) in combinations(sides.items(), 2):
        both = sorted(
            {name for name in groups[rows] if name is not None} & {name for name in groups[others] if name is not None}
        )
        if both:
            raise UsageError(
                Message(
                    f"{counted(len(both), 'group')} of dataset {features.origin.dataset} {has(len(both))} images in both splits, "
                    f"{one} and {other}, such as {both[0]!r}: what is learned of it would be tested on it. Mend the splits; "
                    "have new ones made by group with ",
                    Option("split_column", "none"),
                    "; or take every image for itself with ",
                    Option("group", "none"),
                )
            )


def hold_out(
    features: FeatureSet, codes: npt.NDArray[np.int64], rows: Positions, *, folds: int, seed: int
) -> tuple[Positions, Positions]:
    """Splits ``rows`` into the rest and one fold of ``folds``."""
    fold = dealt(features, codes, rows, folds=folds, seed=seed)
    return rows[fold != 0], rows[fold == 0]


def hold_out_test(
    features: FeatureSet, codes: npt.NDArray[np.int64], rows: Positions, *, seed: int
) -> tuple[Positions, Positions]:
    """Splits ``rows`` into those to train on and every fifth for the test; without groups small classes give theirs last."""
    fold = dealt(features, codes, rows, folds=TEST_FOLDS, seed=seed)
    if features.groups is None:
        fold = larger_classes_first(fold, features.keys64[rows], codes[rows])
    return rows[fold != 0], rows[fold == 0]


def folds_of(
    features: FeatureSet, codes: npt.NDArray[np.int64], rows: Positions, *, folds: int, seed: int
) -> Sequence[Fold]:
    """Cross-validation folds of ``rows``: (training positions, validation positions) each, as positions in ``features``."""
    number = dealt(features, codes, rows, folds=folds, seed=seed)
    return [(rows[number != fold], rows[number == fold]) for fold in range(folds)]


BINS = 10
"""Quantile bins by which numbers are dealt evenly."""


def quantile_bins(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The quantile bin of each number, (n,) from 0: classes by which folds hold small and large numbers evenly.

    Equal numbers are in one bin, and bins without one are left out.
    """
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, numbers, side="left"), return_inverse=True)[1].astype(np.int64)


def rarest_labels(targets: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
    """The rarest label that each row has, (n,); K for none: classes by which folds hold every label about evenly.

    Args:
        targets: (n, K): 1 present, 0 absent, NaN unknown.
    """
    present = targets == 1
    order = np.argsort(present.sum(axis=0), kind="stable")
    first = present[:, order].argmax(axis=1)
    return np.asarray(np.where(present.any(axis=1), order[first], targets.shape[1]), np.int64)


def class_counts(codes: npt.NDArray[np.int64], classes: Sequence[str]) -> dict[str, Any]:
    """How many rows each class has."""
    counts = np.bincount(codes[codes >= 0], minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True)}


NEAR_SHARE = 0.1
"""The share of test images with a look-alike among the training images from which it is said.

Of EfficientNet-Lite0's last features 0.1 % have one in Fashion-MNIST (12,000 images) and 8 % in emoji (3,769, families
that differ by a head among them).
"""
_NEAR_MEDIAN = 1 / 15  # of the median distance, as `duplicates --near auto` takes it
_NEAR_SAMPLE = 500  # test images looked at
_NEAR_PRODUCTS = 20_000_000_000  # beyond which nothing is looked at: a second or so
_NEAR_WIDTH = 64  # values below which near is no sign of a copy


def near_training(features: FeatureSet, train: Positions, test: Positions, *, seed: int) -> dict[str, Any] | None:
    """Looks how many test images have a near copy among the training images; of many test images some at random.

    Args:
        features: n rows.
        train: positions of the training rows.
        test: positions of the test rows.
        seed: of the choice.

    Returns:
        ``images`` that were looked at, the ``share`` of them within ``distance`` (of cosines) of a training image; None where
        there are none, too few values to tell, or too many to compare in a second.
    """
    rng = np.random.default_rng(seed)
    some = np.sort(rng.choice(test, min(len(test), _NEAR_SAMPLE), replace=False))
    width = features.shape[1]
    if len(some) < 2 or width < _NEAR_WIDTH or len(some) * len(train) * width > _NEAR_PRODUCTS:
        return None
    asked = _directions(features.read(np.float32, rows=some))
    distance = max(_NEAR_MEDIAN * float(np.median(1 - (asked @ asked.T)[np.triu_indices(len(some), 1)])), 1e-4)
    nearest = np.full(len(some), -1, np.float32)
    for _, block in iterate(features.take(train), dtype=np.float32):
        nearest = np.maximum(nearest, (asked @ _directions(block).T).max(axis=1))
    return {"images": len(some), "share": float((1 - nearest <= distance).mean()), "distance": distance}


def _directions(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)
