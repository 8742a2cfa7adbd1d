"""Images as columns: id, label, split, key, and roles such as group and target; what a row of features is of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from featurepipe.annotations import (
    NAN,
    split_asked,
    texts_of,
    whole_numbers,
)
from featurepipe.errors import UsageError, unknown
from featurepipe.store.keys import Keys, count_distinct

UNUSED = b"unused columns"
"""Metadata of a view's table: JSON of `LabelledImages.unused_columns`."""


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """n images in order, as columns; the part of a ``FeatureSet`` that knows nothing of features.

    Attributes:
        table: ``id``, ``label``, ``split`` of each image, text; a label or split may be null. With roles
            (`featurepipe.store.roles`) also ``group``, text, ``weight``, float64, and ``target``: float64, null where it is not
            known, or (K,) float32 for several labels.
        keys: (n, 32) uint8, the SHA-256 of each image.
    """

    table: pa.Table
    keys: Keys

    @property
    def ids(self) -> npt.NDArray[np.object_]:
        """(n,) ids, text."""
        return _objects(self.table["id"])

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """(n,) labels, text or None."""
        return _shared_objects(self.table["label"])

    @property
    def splits(self) -> npt.NDArray[np.object_]:
        """(n,) splits, text or None."""
        return _shared_objects(self.table["split"])

    @property
    def groups(self) -> npt.NDArray[np.object_] | None:
        """(n,) groups, text or None; None if images have no groups.

        For scikit-learn's ``groups=`` take ``units()``, which also keeps copies of an image together.
        """
        return _shared_objects(self.table["group"]) if "group" in self.table.column_names else None

    @property
    def group_column(self) -> str:
        """What the groups are called, such as ``patient``; empty where they have no name that lasts, or there are none."""
        if "group" not in self.table.column_names:
            return ""
        return str((self.table.schema.field("group").metadata or {}).get(b"column", b""), "utf-8")

    @property
    def weights(self) -> npt.NDArray[np.float64] | None:
        """(n,) weights of the images; None if they have none."""
        return np.asarray(self.table["weight"].to_numpy()) if "weight" in self.table.column_names else None

    @property
    def targets(self) -> npt.NDArray[Any] | None:
        """(n,) float64 numbers to estimate, NaN where it is not known; or (n, K) float32 for several labels: 1, 0, or NaN.

        None if images have classes only.
        """
        if "target" not in self.table.column_names:
            return None
        column = self.table["target"].combine_chunks()
        if not self.target_names:
            return np.asarray(column.to_numpy(zero_copy_only=False))
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, len(self.target_names))

    @property
    def target_names(self) -> tuple[str, ...]:
        """The K names of several labels, in the order of the columns of ``targets``; none for numbers and classes."""
        if "target" not in self.table.column_names:
            return ()
        return tuple(json.loads((self.table.schema.field("target").metadata or {}).get(b"names", b"[]")))

    @property
    def unused_columns(self) -> dict[str, list[str]]:
        """Columns without a role, of the ``labels`` file and of the ``manifest``, if roles were joined; without empty lists."""
        found: dict[str, list[str]] = json.loads((self.table.schema.metadata or {}).get(UNUSED, b"{}"))
        return found

    @property
    def classes(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted(pc.unique(self.table["label"].drop_null()).to_pylist())

    @property
    def unlabelled(self) -> int:
        """Images without a label, or without a target where they have targets."""
        return int(np.count_nonzero(~self._is_labelled()))

    def _is_labelled(self) -> npt.NDArray[np.bool_]:
        if self.target_names:
            return np.asarray(~np.isnan(np.asarray(self.targets)).all(axis=1))
        column = "target" if "target" in self.table.column_names else "label"
        return np.asarray(self.table[column].is_valid().to_numpy())

    @property
    def duplicates(self) -> int:
        """Rows whose image is also that of an earlier row."""
        return len(self.keys) - count_distinct(self.keys)

    @property
    def keys64(self) -> npt.NDArray[np.uint64]:
        """(n,) uint64, the first 8 bytes of each key, little endian; a strided view of ``keys``, without a copy."""
        return self.keys.view("<u8")[:, 0]

    def units(self) -> npt.NDArray[np.uint64]:
        """(n,) what must stay on one side of a split: equal for copies of an image, and for images of one group.

        Without groups it is ``keys64``. Images without a group are each for themselves. A copy of an image in another group
        joins the two groups.
        """
        if "group" not in self.table.column_names:
            return self.keys64
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        _, image = np.unique(self.keys64, return_inverse=True)
        group = pc.fill_null(self.table["group"].combine_chunks().dictionary_encode().indices.cast(pa.int64()), -1)
        group = np.asarray(group.to_numpy())
        rows = np.flatnonzero(group >= 0)
        count = int(image.max(initial=-1)) + 1
        size = count + int(group.max(initial=-1)) + 1
        edges = coo_array((np.ones(len(rows), np.bool_), (image[rows], count + group[rows])), shape=(size, size))
        _, part = connected_components(edges, directed=False)
        return np.asarray(part[image], np.uint64)

    def codes(self, classes: Sequence[str] | npt.NDArray[np.object_ | np.str_] | None = None) -> npt.NDArray[np.int64]:
        """Returns the labels as numbers.

        Args:
            classes: What the numbers count; by default ``.classes``.

        Returns:
            (n,) int64 positions in ``classes``; -1 where there is no label, or one that is not among them.
        """
        known = self.classes if classes is None else [str(name) for name in classes]
        return _places(self.table["label"], known)

    def labels_of_rows(self, rows: slice) -> npt.NDArray[np.object_]:
        """(m,) labels of some consecutive rows, text or None."""
        return _objects(self.table["label"][rows])

    def split_names(self) -> list[str]:
        """The splits that rows have, sorted."""
        return sorted(pc.unique(self.table["split"].drop_null()).to_pylist())

    def mask(
        self, *, split: str | None = None, labelled: bool = False, classes: Sequence[str] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Tells which rows are of a split, labelled, and of some classes; (n,) bool.

        Raises:
            UsageError: No row is of that split, or of one of the classes.
        """
        keep = np.ones(len(self.keys), np.bool_)
        if split is not None:
            there = self.split_names()
            keep &= _places(self.table["split"], [split_asked(split, there)]) >= 0
            if not keep.any():
                raise unknown_split(split, there)
        if labelled:
            keep &= self._is_labelled()
        if classes is not None:
            strangers = sorted(set(classes) - set(self.classes))
            if strangers:
                raise unknown("class", strangers[0], self.classes)
            keep &= self.codes(classes) >= 0
        return keep


def unknown_split(split: str, splits: list[str], where: str = "") -> UsageError:
    """Builds the error for a split that is not among ``splits``, which may be none."""
    if splits:
        return unknown("split", split, splits, where=where)
    inside = f" in {where}" if where else ""
    return UsageError(
        f"unknown split {split!r}{inside}: this dataset has no splits; leave split out, or put train/ and test/ above "
        "the class folders"
    )


ROLES = ("group", "weight", "target", "split")
"""What a column of ``FeatureSet.with_column`` may be."""


def role_column(
    role: str, values: pa.Array | pa.ChunkedArray | npt.NDArray[Any], names: Sequence[str] = ()
) -> tuple[pa.Array, dict[str, str]]:
    """A column of a role as a view's table has it, checked, and the metadata of its field; see ``FeatureSet.with_column``.

    Raises:
        UsageError: There is no such role, or a value cannot be one of it.
    """
    if role not in ROLES:
        raise (
            UsageError("labels are joined by their ids: use with_labels")
            if role == "label"
            else unknown("role", role, ROLES)
        )
    if names or (isinstance(values, np.ndarray) and values.ndim > 1):
        if role != "target":
            raise UsageError(f"several values of {role} for each image; give one, (n,)")
        return _several_labels(np.asarray(values), names), {"names": json.dumps(list(map(str, names)))}
    if role in ("group", "split"):
        try:
            made = texts_of(
                values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, from_pandas=True)
            )
        except (pa.ArrowException, UnicodeError, OverflowError):  # of several kinds
            made = texts_of(np.asarray(values).tolist())
        made = made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made
        if role == "group":
            return group_names(made), {}
        return pc.if_else(pc.equal(made, ""), pa.scalar(None, pa.string()), made), {}
    try:
        numbers = pa.array(values, from_pandas=True) if isinstance(values, np.ndarray) else values
        numbers = numbers.cast(pa.float64())
    except pa.ArrowException as error:
        raise UsageError(f"values of {role} are numbers; {error}") from error
    numbers = numbers.combine_chunks() if isinstance(numbers, pa.ChunkedArray) else numbers
    return _checked_numbers(role, numbers), {}


def _checked_numbers(role: str, numbers: pa.Array) -> pa.Array:
    """Numbers of a role, null where one is not known.

    Raises:
        UsageError: One is infinite; or a weight is missing or below 0, or all are 0.
    """
    row = pc.index(pc.fill_null(pc.is_finite(numbers), fill_value=True), value=False).as_py()
    if role == "weight" and row < 0:
        row = pc.index(pc.fill_null(pc.greater_equal(numbers, 0), fill_value=False), value=False).as_py()
    if row >= 0:
        least = (
            "; every image needs a finite one from 0"
            if role == "weight"
            else "; give finite numbers, NaN where none is known"
        )
        raise UsageError(f"the {role} of row {row} is {numbers[row].as_py()}{least}")
    if role == "weight" and len(numbers) and pc.max(numbers).as_py() == 0:
        raise UsageError("all weights are 0: no image would count; give some of them more")
    return numbers


def _several_labels(values: npt.NDArray[Any], names: Sequence[str]) -> pa.Array:
    """(n, K) several labels as an Arrow array of lists.

    Raises:
        UsageError: They are not K columns of 1, 0 and NaN with K distinct names.
    """
    if values.ndim != 2 or not names or values.shape[1] != len(names) or len(set(names)) < len(names):
        raise UsageError(
            f"several labels are (n, K) values and K distinct names; these are of shape {values.shape}, with {len(names)} names"
        )
    try:
        known = np.ascontiguousarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"several labels are 1, 0, or NaN where it is not known; {error}") from error
    wrong = np.argwhere(~(np.isnan(known) | (known == 0) | (known == 1)))
    if len(wrong):
        row, column = wrong[0]
        raise UsageError(
            f"row {row} has {known[row, column]:g} for {names[column]!r}; several labels are 1, 0, or NaN where it is not known"
        )
    return pa.FixedSizeListArray.from_arrays(pa.array(known.ravel()), len(names))


def group_names(texts: pa.Array) -> pa.Array:
    """Names of groups without blanks around them, null for none; 1.0 is the patient 1, as a table program writes it."""
    texts = pc.utf8_trim_whitespace(texts)
    texts = pc.if_else(pc.is_in(texts, value_set=pa.array(["", *NAN])), pa.scalar(None, pa.string()), texts)
    return whole_numbers(texts)[0]


def _places(column: pa.ChunkedArray, values: Sequence[str]) -> npt.NDArray[np.int64]:
    found = pc.fill_null(pc.index_in(column, value_set=pa.array(values, pa.string())), -1)
    return np.asarray(found.to_numpy(), np.int64)


def _objects(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    result = np.empty(len(column), object)
    result[:] = column.to_pylist()
    return result


def _shared_objects(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    """The same, with one Python object for each distinct text: many times faster for labels, and smaller in a pickle."""
    distinct = pc.unique(column.drop_null()).to_pylist()
    return np.array([*distinct, None], object)[_places(column, distinct)]
