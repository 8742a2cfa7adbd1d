"""Which rows of a dataset are scored: the split, the labels, and the classes that the head knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.annotations import split_asked
from featurepipe.errors import Message, Option, UsageError

if TYPE_CHECKING:
    from featurepipe.heads.bundle.bundle import Bundle
    from featurepipe.store.views import FeatureSet

DEFAULT_SPLIT, EVERY_SPLIT = "test", "all"
_NAMED = 10


@dataclass(frozen=True)
class Chosen:
    """What is scored.

    Attributes:
        features: The n rows, each with a label that the head knows.
        codes: (n,) position of each label in the bundle's classes.
        split: Name of the split; None if rows of all splits are there.
        scope: The same in words.
        images: Usable images of the split.
        unlabelled: Those among them without a label.
        unknown: Labels that the head does not know, with the number of images left out for it.
    """

    features: FeatureSet
    codes: npt.NDArray[np.int64]
    split: str | None
    scope: str
    images: int
    unlabelled: int
    unknown: dict[str, int]


def choose_rows(
    bundle: Bundle, features: FeatureSet, split: str | None, *, ignore_unknown_classes: bool = False
) -> Chosen:
    """Chooses the rows to score.

    Args:
        bundle: Whose head is scored.
        features: All rows of the dataset.
        split: Its name, or ``all`` for every row; by default ``test`` if the dataset has it, else the images that the
            head was not trained on, or if there are none every image.
        ignore_unknown_classes: Leave out images of classes that the head does not know.

    Raises:
        UsageError: There is no such split, no labelled image in it, or a label that the head does not know.
    """
    candidates, name, scope = _of_split(bundle, features, split)
    if candidates.unlabelled == len(candidates):
        raise UsageError(
            Message(
                f"none of the {len(candidates):,} images of {scope} has a label; name a file with the columns id and label: ",
                Option("labels", "FILE.csv"),
            )
        )
    labels = candidates.table["label"]
    codes = candidates.codes(bundle.classes)
    unknown = _unknown(labels.filter(pa.array(codes < 0)).drop_null())
    known = np.flatnonzero(codes >= 0)
    if unknown and not (ignore_unknown_classes and len(known)):
        raise UsageError(_unknown_text(bundle, unknown, scope, some_known=bool(len(known))))
    return Chosen(
        features=candidates.take(known),
        codes=codes[known],
        split=name,
        scope=scope,
        images=len(candidates),
        unlabelled=candidates.unlabelled,
        unknown=unknown,
    )


def _of_split(bundle: Bundle, features: FeatureSet, split: str | None) -> tuple[FeatureSet, str | None, str]:
    splits = features.splits
    wanted = split_asked(split or DEFAULT_SPLIT, features.split_names())
    if (splits == wanted).any() or split not in {None, EVERY_SPLIT}:
        return features.select(split=wanted), wanted, f"split {wanted}"
    if split is None:
        new = ~np.isin(features.keys64, bundle.seen)
        if new.any() and not new.all():
            return features.take(new), None, "the images that the head was not trained on (there is no split test)"
    return features, None, "all images" if split else "all images (there is no split test)"


def _unknown(labels: pa.ChunkedArray) -> dict[str, int]:
    """Label to number of images, the most frequent first."""
    counts = {str(pair["values"]): int(pair["counts"]) for pair in labels.value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _unknown_text(bundle: Bundle, unknown: dict[str, int], scope: str, *, some_known: bool) -> Message:
    named = _listed([f"{label!r} ({count:,})" for label, count in unknown.items()])
    known = _listed([repr(str(name)) for name in bundle.classes])
    leave = ("leave these images out with ", Option("ignore_unknown_classes", value=True), ", ") if some_known else ()
    own = bundle.training.get("labels")
    hint = f" (the bundle was trained with labels of its own: {own})" if own else ""
    return Message(
        f"in {scope}, {sum(unknown.values()):,} have labels that the bundle does not know: {named}; it knows {known}{hint}. "
        "Correct the labels (",
        Option("labels", "FILE.csv"),
        "), ",
        *leave,
        "or train a bundle that knows them",
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
