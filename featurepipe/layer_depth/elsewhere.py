"""Images of another source that heads are tested on, too: which of them, and by which heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError

if TYPE_CHECKING:
    from featurepipe.layer_depth.folds import Fold
    from featurepipe.store import FeatureSet

Positions = npt.NDArray[np.int64]

LEFT_OUT = ("shifted_of_other_classes", "shifted_in_both", "shifted_twins_that_train")
"""Why images of the other source take no part: of no class here; the same image is here; its twin trains every head."""


@dataclass(frozen=True)
class Elsewhere:
    """The images of another source that are tested.

    An image's *twin* is the image of the same id and class among those that are compared on, such as the same emoji in
    another style. A head that has learned from it knows more than it would of a stranger, so that it does not count.

    Attributes:
        dataset: their name in the store.
        rows: (m,) positions in that dataset.
        images: those images, as a view of the first column.
        unseen: (folds, m) whether a fold's head has not learned from the image's twin; for each seed there is one.
        twins: how many have a twin.
        left_out: images that take no part, and why.
    """

    dataset: str
    rows: Positions
    images: FeatureSet
    unseen: npt.NDArray[np.bool_]
    twins: int
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
        others: its images.
        here: name of the dataset that is compared on.
        images: its images.
        classes: their classes.
        folds: positions among them.

    Raises:
        UsageError: no image is left.
    """
    known = others.codes(classes) >= 0
    same = known & np.isin(others.keys64, images.keys64)
    rows = np.flatnonzero(known & ~same)
    if not len(rows):
        raise UsageError(
            f"none of the {len(others):,} images of {dataset} is of a class of {here} without being in it; there: "
            f"{', '.join(others.classes[:5]) or 'no label'}; here: {', '.join(classes[:5])}"
        )
    twins = _twins(others.take(rows), images)
    unseen = np.stack([~np.isin(twins, fold.train) for fold in folds])
    seeds = np.array([fold.seed for fold in folds])
    tested = np.all([unseen[seeds == seed].any(axis=0) for seed in np.unique(seeds)], axis=0)
    if not tested.any():
        raise UsageError(
            f"all {len(rows):,} images of {dataset} have the id of an image of {here} that every head learns from; compare by "
            "cross-validation (leave --split out), where each is tested by heads that do not"
        )
    return Elsewhere(
        dataset,
        rows[tested],
        others.take(rows[tested]),
        unseen[:, tested],
        int((twins[tested] >= 0).sum()),
        dict(zip(LEFT_OUT, (int(those.sum()) for those in (~known, same, ~tested)), strict=True)),
    )


def _twins(others: FeatureSet, images: FeatureSet) -> Positions:
    """For each image of the other source the position of its twin, -1 where it has none."""
    places = {pair: place for place, pair in enumerate(zip(images.ids, images.labels, strict=True))}
    found = [places.get(pair, -1) for pair in zip(others.ids, others.labels, strict=True)]
    return np.array(found, np.int64)
