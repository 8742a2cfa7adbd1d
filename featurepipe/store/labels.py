"""Labels by id, read and checked, and images with id, label, split and key: what a row of features is of."""

from __future__ import annotations

import codecs
import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from featurepipe.annotations import (
    NAN,
    PATHS,
    column_named,
    duplicate,
    label_text,
    path_column,
    read_csv,
    split_asked,
    texts_of,
    whole_numbers,
)
from featurepipe.errors import UsageError, unknown
from featurepipe.store.keys import Keys, count_distinct

_SUFFIXES = (".csv", ".parquet", ".jsonl")
_EXACT = 2.0**53  # whole floats below it are whole numbers
_NEEDED = ("id", "label", *PATHS)
UNUSED = b"unused columns"
"""Metadata of a view's table: JSON of `LabelledImages.unused_columns`."""


@dataclass(frozen=True)
class LabelTable:
    """Labels by id.

    Attributes:
        ids: (m,) text, none missing; an id that occurs again has the same label again.
        labels: (m,) text, null for unlabelled.
        distinct: How many ids there are, each counted once.
        name: What errors call it.
        ignored: Its columns that are neither.
        notes: What was guessed of the labels.
    """

    ids: pa.Array
    labels: pa.Array
    distinct: int
    name: str
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def told(self) -> list[str]:
        """What is to be said of it: guesses, and columns that are not used."""
        return [*self.notes, *([f"ignored columns: {', '.join(self.ignored)}"] if self.ignored else [])]


LabelSource: TypeAlias = "Mapping[Any, Any] | pa.Table | str | os.PathLike[str] | LabelTable | ColumnTable"


def read_labels(source: LabelSource) -> LabelTable:
    """Reads labels; see ``FeatureSet.with_labels``.

    Raises:
        UsageError: It is nothing that holds labels, a label is NaN or no class, or an id has two labels.
    """
    return source if isinstance(source, LabelTable) else read_columns(source).labels()


@dataclass(frozen=True)
class ColumnTable:
    """All columns of a file or table of labels, by the ids of images.

    Attributes:
        ids: (m,) text.
        columns: Their names, without that of the ids.
        name: What errors call it.
    """

    ids: pa.Array
    columns: tuple[str, ...]
    name: str
    _labels: Callable[[str], LabelTable]
    _values: Callable[[str], pa.Array | pa.ChunkedArray | list[Any]]

    def labels(self, column: str | None = None) -> LabelTable:
        """The classes in a column, by default ``label``, checked."""
        return self._labels(column or "label")

    def texts(self, column: str, *, several: bool = False) -> pa.Array:
        """(m,) a column as text, null where it is empty.

        Args:
            column: Its name.
            several: Whether an id may be there several times, with different values.

        Raises:
            UsageError: An id is there several times, with different values.
        """
        texts = texts_of(self._values(column))
        texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
        if not several and pc.count_distinct(self.ids).as_py() < len(self.ids):
            _refuse_contradictions(self.ids, texts, self.name, column)
        return texts


def read_columns(source: LabelSource) -> ColumnTable:  # noqa: PLR0911 - one for each kind
    """Reads a table of labels with all its columns; the sources are those of `read_labels`.

    Raises:
        UsageError: It is nothing that holds labels, or has no column of ids.
    """
    if isinstance(source, ColumnTable):
        return source
    if isinstance(source, LabelTable):
        return ColumnTable(source.ids, ("label",), source.name, lambda _: source, lambda _: source.labels)
    if isinstance(source, Mapping):
        ids, values, name = list(map(str, source)), list(source.values()), "the mapping"
        made = pa.array(ids, pa.string())
        return ColumnTable(made, ("label",), name, lambda _: _checked(made, values, name), lambda _: values)
    if isinstance(source, pa.Table):
        return _of_table(source, "the table")
    if isinstance(source, str | os.PathLike):
        return _of_file(Path(source))
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas, which need not be installed
        return _of_table(pa.Table.from_pandas(source, preserve_index=False), "the table")
    if hasattr(source, "to_dict"):
        return read_columns(source.to_dict())
    raise UsageError(
        f"labels come as a mapping (id -> label), a pyarrow table, or the path of a {', '.join(_SUFFIXES)} file with the "
        f"columns id and label, or a pandas DataFrame with them, not as {type(source).__name__}"
    )


def join_labels(ids: pa.ChunkedArray, table: LabelTable) -> tuple[pa.Array, int]:
    """Finds the label of each id.

    Returns:
        (n,) labels, null where the table has none, and how many of the table's ids are not among ``ids``.

    Raises:
        UsageError: Not one id is among ``ids``.
    """
    place = places_of(ids, table)
    strangers = table.ids.filter(pc.invert(pc.is_in(table.ids, value_set=pc.unique(ids))))
    labels = table.labels.take(place)
    return labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels, pc.count_distinct(
        strangers
    ).as_py()


def places_of(ids: pa.ChunkedArray, table: LabelTable | ColumnTable) -> pa.ChunkedArray:
    """The row of each id in a table, null where it is not there.

    Raises:
        UsageError: Not one id is there.
    """
    place = pc.index_in(ids, value_set=table.ids)
    if len(ids) and place.null_count == len(ids):
        if not len(table.ids):
            raise UsageError(f"{table.name} holds no labels; it needs the id of each labelled image, and its label")
        raise UsageError(
            f"none of the {len(table.ids)} ids in {table.name} is an id of these features: there {table.ids[0].as_py()!r}, "
            f"here {ids[0].as_py()!r}; write them as features.ids shows them"
        )
    return place


def _of_file(path: Path) -> ColumnTable:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(f"cannot read labels from {path}: the file name must end in {', '.join(_SUFFIXES)}")
    try:
        if suffix == ".jsonl":
            return _of_lines(path)
        if suffix == ".csv":
            return _of_table(_csv(path), path.name, has_types=False)
        return _of_table(pa.parquet.read_table(path), path.name)
    except OSError as error:
        raise UsageError(f"cannot read labels from {path}: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeError, csv.Error) as error:
        raise UsageError(f"cannot read labels from {path}: {error}") from error


def _csv(path: Path) -> pa.Table:
    # Labels such as 007 stay as written; only an empty field is null: a class may well be called "NA" or "null".
    with path.open("rb") as file:
        table = read_csv(file, _NEEDED)
        columns: list[list[str | None]] = [[] for _ in table.names]
        for _, fields in table.rows:
            for column, field in zip(columns, fields, strict=True):
                column.append(field)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], table.names)


def _of_lines(path: Path) -> ColumnTable:
    # Python's json, not Arrow's: there a label that is a number in one line and text in the next is an error.
    ids: list[str] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path.name}: line {number} is not JSON: {error}") from error
            id_ = _id_column(list(row)) if isinstance(row, dict) else None
            if id_ is None or row[id_] is None:
                raise UsageError(f"{path.name}: line {number} is no object with an `id` (or a `path`) and a `label`")
            ids.append(str(row[id_]))
            rows.append((number, row))
            columns |= dict.fromkeys(name for name in row if name != id_)
    made = pa.array(ids, pa.string())

    def labels(column: str) -> LabelTable:
        named = [column_named(column, list(row)) for _, row in rows]
        if None in named:
            number = rows[named.index(None)][0]
            raise UsageError(f"{path.name}: line {number} is no object with an `id` (or a `path`) and a `{column}`")
        values = [row[str(name)] for (_, row), name in zip(rows, named, strict=True)]
        return replace(_checked(made, values, path.name), ignored=tuple(name for name in columns if name not in named))

    return ColumnTable(made, tuple(columns), path.name, labels, lambda column: [row.get(column) for _, row in rows])


def _id_column(names: Sequence[str]) -> str | None:
    """The column of ids: ``id``, else that of paths."""
    return "id" if "id" in names else path_column(names) or column_named("id", names)


def _lacks(column: str, names: Sequence[str], where: str) -> UsageError:
    hint = str(unknown("column", column, names)).partition("; ")[2]
    near = f"; {hint}" if hint.startswith("nearest") else ""
    return UsageError(
        f"{where}: no column `{column}` among {', '.join(names) or 'none'}{near}. Labels take two columns: `id` (or `path`, "
        f"`file`, `filename`, `image`), as the dataset has the images' ids, and `{column if column != 'id' else 'label'}`"
    )


def _of_table(table: pa.Table, name: str, *, has_types: bool = True) -> ColumnTable:
    names = table.column_names
    column = _id_column(names)
    if column is None:
        raise _lacks("id", names, name)
    _refuse_twice(names, column, name)
    if table[column].null_count:
        row = pc.index(pc.is_null(table[column]), value=True).as_py()
        raise UsageError(f"{name}: row {row + 1} has no {column}; every row needs one")
    ids = _plain(table[column]).cast(pa.string()).combine_chunks()
    others = tuple(other for other in names if other != column)

    def labels(wanted: str) -> LabelTable:
        label = column_named(wanted, others)
        if label is None:
            raise _lacks(wanted, names, name)
        _refuse_twice(names, label, name)
        found = _labels_of(ids, _plain(table[label]), name, has_types=has_types)
        return replace(found, ignored=tuple(other for other in others if other != label))

    def values(wanted: str) -> pa.ChunkedArray:
        _refuse_twice(names, wanted, name)
        return _plain(table[wanted])

    return ColumnTable(ids, others, name, labels, values)


def _refuse_twice(names: Sequence[str], column: str, name: str) -> None:
    if (twice := duplicate(names, [column])) is not None:
        raise UsageError(f"{name}: column {twice!r} is there {names.count(twice)} times; leave one")


def _labels_of(ids: pa.Array, labels: pa.ChunkedArray, name: str, *, has_types: bool) -> LabelTable:
    if not (
        pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type) or pa.types.is_integer(labels.type)
    ):
        return _checked(ids, labels.to_pylist(), name)
    texts, said = pc.utf8_trim_whitespace(labels.cast(pa.string())), ""
    if not has_types:
        texts, said = whole_numbers(texts)
    return replace(_checked_text(ids, texts.combine_chunks(), name), notes=(said,) if said else ())


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _checked(ids: Sequence[str] | pa.Array, labels: Sequence[Any], name: str) -> LabelTable:
    ids = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
    texts: list[str | None] = []
    for row, label in enumerate(labels):
        text, wrong = _text_of(label)
        if wrong:
            raise UsageError(_wrong_label(name, ids[row].as_py(), row, wrong))
        texts.append(text)
    return _checked_text(ids, pa.array(texts, pa.string()), name)


def _text_of(label: Any) -> tuple[str | None, str]:
    """The label as text (None: unlabelled), and what is wrong with it, if anything."""
    value = label.item() if isinstance(label, np.generic) else label
    if isinstance(value, bytes):
        return None, "a bytes"
    if isinstance(value, float) and not math.isnan(value) and not (value.is_integer() and abs(value) < _EXACT):
        return None, f"the number {value!r}"
    return label_text(value)


def _wrong_label(name: str, image: str, row: int, wrong: str) -> str:
    nan = "; if the image has no label, leave it empty (None)" if wrong == "NaN" or wrong in map(repr, NAN) else ""
    return f"{name}: the label of {image!r} (row {row + 1}) is {wrong}; labels are text or whole numbers{nan}"


def _checked_text(ids: pa.Array, texts: pa.Array, name: str) -> LabelTable:
    row = pc.index(pc.is_in(texts, value_set=pa.array(NAN)), value=True).as_py()
    if row >= 0:
        raise UsageError(_wrong_label(name, ids[row].as_py(), row, repr(texts[row].as_py())))
    labels = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    distinct = pc.count_distinct(ids).as_py()
    if distinct < len(ids):
        _refuse_contradictions(ids, labels, name, "label")
    return LabelTable(ids, labels, distinct, name)


def _refuse_contradictions(ids: pa.Array, values: pa.Array, name: str, column: str) -> None:
    pairs = pa.table({"id": ids, "value": values}).group_by(["id", "value"], use_threads=False).aggregate([])
    counted = pairs.group_by("id", use_threads=False).aggregate([("value", "count", pc.CountOptions(mode="all"))])
    twice = counted.filter(pc.greater(counted["value_count"], 1))["id"]
    if len(twice):
        first = twice[0].as_py()
        given = [str(value) for value in pairs.filter(pc.equal(pairs["id"], first))["value"].to_pylist()]
        one = "an image has one label" if column == "label" else f"an image has one {column}"
        raise UsageError(
            f"{name}: {len(twice)} ids have several {'labels' if column == 'label' else f'values of {column}'}; {first!r} has "
            f"{' and '.join(given)}: {one}"
        )


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
