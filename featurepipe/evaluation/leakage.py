"""Copies of images where they should not be: trained on and tested on, in two splits, or under two labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from featurepipe.heads.bundle.bundle import Bundle
    from featurepipe.store.views import FeatureSet

EXAMPLES = 5
"""Images shown of each kind of leak."""
_IDS = 10

Positions = npt.NDArray[np.int64]


def report(features: FeatureSet) -> dict[str, Any]:
    """Finds images whose copies lie in several of the user's own splits, or carry different labels.

    Copies have equal bytes; they are told by the first 8 bytes of their SHA-256, which match by chance for any two of a
    million images with a probability of 3e-8. Rows without a split or a label count on no side.

    Args:
        features: All rows of a dataset.

    Returns:
        JSON values. ``copies``: rows whose image is also that of an earlier row. ``across_splits``: ``images`` (distinct
        ones) and ``rows`` concerned, ``pairs`` (each two splits with the number of images in both), ``examples``.
        ``label_conflicts``: ``images``, ``rows``, ``examples``. An example is a list of ``{"id", "split", "label"}``, the
        first row of the image on each side. Where images have groups, ``groups_across_splits``: ``groups``, and ``examples``,
        each ``{"group", "splits"}``.
    """
    _, image, counts = np.unique(features.keys64, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[image] > 1)  # the few that matter
    copied = features.take(rows)
    image = image[rows]
    splits, split_names = numbered(copied.table["split"])
    labels, _ = numbered(copied.table["label"])
    split_rows, label_rows = on_several_sides(image, splits), on_several_sides(image, labels)
    return {
        **_groups_across(features),
        "copies": len(features) - len(counts),
        "across_splits": {
            **_found(copied, image, splits, split_rows),
            "pairs": _pairs(image[split_rows], splits[split_rows], split_names),
        },
        "label_conflicts": _found(copied, image, labels, label_rows),
    }


def _groups_across(features: FeatureSet) -> dict[str, Any]:
    """Groups that are in several splits, if the images have groups."""
    if features.groups is None:
        return {}
    groups, names = numbered(features.table["group"])
    splits, split_names = numbered(features.table["split"])
    rows = np.flatnonzero(groups >= 0)
    across = rows[on_several_sides(groups[rows], splits[rows])]
    found = np.unique(groups[across])
    of_each = {group: np.unique(splits[across[groups[across] == group]]) for group in found[:EXAMPLES]}
    examples = [
        {"group": names[one], "splits": [split_names[side] for side in sides]} for one, sides in of_each.items()
    ]
    return {"groups_across_splits": {"groups": len(found), "examples": examples}}


def trained_on(
    features: FeatureSet, seen: npt.NDArray[np.uint64], correct: npt.NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Finds the images that a head was trained on among those it is evaluated on.

    Args:
        features: The n evaluated rows.
        seen: First 8 bytes (little-endian) of the keys of the images that the head was trained on, in any order.
        correct: (n,) whether the head is right.

    Returns:
        JSON values: ``images``, their ``share``, the first ``ids``, and, given ``correct``, ``accuracy_with`` and
        ``accuracy_without`` them (null where no image is left).
    """
    known = np.isin(features.keys64, seen)
    first = features.take(np.flatnonzero(known)[:_IDS])
    found: dict[str, Any] = {
        "images": int(known.sum()),
        "share": float(known.mean()) if len(known) else 0.0,
        "ids": [str(name) for name in first.ids],
    }
    if correct is not None:
        others = correct[~known]
        found["accuracy_with"] = float(correct.mean()) if len(correct) else None
        found["accuracy_without"] = float(others.mean()) if len(others) else None
    return found


def trained_groups(features: FeatureSet, bundle: Bundle) -> pa.Array | None:
    """Finds the groups of a dataset that a head was trained on.

    They are those with an image that it was trained on, or a copy of one, with the groups that such copies join to them; and
    those that are called as one of the bundle's in a column of the same name, whose trained images may be elsewhere by now.

    Args:
        features: All rows of the dataset, with their groups.
        bundle: Of the head.

    Returns:
        Their names, text; None if the images have no groups.
    """
    if features.groups is None:
        return None
    group = features.table["group"].combine_chunks()
    known = bundle.was_trained_on(features.keys64)
    names = pc.unique(group.drop_null())
    ours = names.filter(pa.array(bundle.was_trained_on_groups(names.to_pylist(), features.group_column)))
    if len(ours):
        known |= pc.is_in(group, value_set=ours).to_numpy(zero_copy_only=False)
    if not known.any():
        return group[:0]
    units = features.units()
    return pc.unique(group.filter(pa.array(np.isin(units, units[known]))).drop_null())


def in_groups(features: FeatureSet, names: pa.Array | None) -> npt.NDArray[np.bool_]:
    """Tells which rows are of some groups, (n,)."""
    if names is None or features.groups is None:
        return np.zeros(len(features), np.bool_)
    return np.asarray(
        pc.is_in(features.table["group"].combine_chunks(), value_set=names).to_numpy(zero_copy_only=False)
    )


def of_trained_groups(
    features: FeatureSet,
    seen: npt.NDArray[np.uint64],
    names: pa.Array | None,
    correct: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any] | None:
    """Finds the images that a head was not trained on, but on others of their group, among those it is evaluated on.

    Args:
        features: The n evaluated rows.
        seen: As in ``trained_on``.
        names: Of groups that the head was trained on; None if images have no groups.
        correct: (n,) whether the head is right.

    Returns:
        JSON values: ``images``, their ``share``, ``groups`` (how many), the first ``examples``, and, given ``correct``,
        ``accuracy_with`` and ``accuracy_without`` all images of trained groups. None if images have no groups.
    """
    if names is None:
        return None
    trained = np.isin(features.keys64, seen)
    concerned = in_groups(features, names)
    others = concerned & ~trained
    found = sorted(pc.unique(features.table["group"].combine_chunks().filter(pa.array(others))).to_pylist())
    result: dict[str, Any] = {
        "images": int(others.sum()),
        "share": float(others.mean()) if len(others) else 0.0,
        "groups": len(found),
        "examples": found[:_IDS],
    }
    if correct is not None:
        rest = correct[~(concerned | trained)]
        result["accuracy_with"] = float(correct.mean()) if len(correct) else None
        result["accuracy_without"] = float(rest.mean()) if len(rest) else None
    return result


def numbered(column: pa.ChunkedArray) -> tuple[Positions, list[str]]:
    """Returns numbers for names (n,), -1 for null, and the names in the order of the numbers, which is theirs."""
    names = sorted(pc.unique(column.drop_null()).to_pylist())
    codes = pc.index_in(column, value_set=pa.array(names, pa.string()))
    return codes.fill_null(-1).to_numpy().astype(np.int64), names


def on_several_sides(image: Positions, codes: Positions) -> Positions:
    """Finds what lies on several sides, such as splits or labels.

    Args:
        image: (n,) number of each row's image, or of the group that it is in.
        codes: (n,) number of its side; -1 for none.

    Returns:
        The first row of each image on each of its sides, for images with more than one, ascending.
    """
    rows = np.flatnonzero(codes >= 0)
    _, first = np.unique(image[rows] * (codes.max(initial=0) + 1) + codes[rows], return_index=True)
    rows = np.sort(rows[first])
    _, number, sides = np.unique(image[rows], return_inverse=True, return_counts=True)
    return rows[sides[number] > 1]


def _found(copied: FeatureSet, image: Positions, codes: Positions, sides: Positions) -> dict[str, Any]:
    concerned = np.isin(image, image[sides]) & (codes >= 0)
    firsts = np.sort(np.unique(image[sides], return_index=True)[1])[:EXAMPLES]
    return {
        "images": len(np.unique(image[sides])),
        "rows": int(concerned.sum()),
        "examples": [_example(copied, sides[image[sides] == image[sides[first]]]) for first in firsts],
    }


def _example(copied: FeatureSet, rows: Positions) -> list[dict[str, Any]]:
    shown = copied.take(rows)
    columns = zip(shown.ids, shown.splits, shown.labels, strict=True)
    return [{"id": str(name), "split": split, "label": label} for name, split, label in columns]


def _pairs(image: Positions, splits: Positions, names: list[str]) -> list[dict[str, Any]]:
    """How many images each two splits share; ``image`` and ``splits`` hold each pair of them once."""
    _, number = np.unique(image, return_inverse=True)
    member = np.zeros((number.max(initial=-1) + 1, len(names)), np.int64)
    member[number, splits] = 1
    shared = np.triu(member.T @ member, 1)
    return [{"splits": [names[a], names[b]], "images": int(shared[a, b])} for a, b in np.argwhere(shared)]
