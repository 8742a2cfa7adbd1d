"""Labels by id, read and checked, and images with id, label, split and key: what a row of features is of."""

from __future__ import annotations

import codecs
import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
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
    whole_numbers,
)
from featurepipe.errors import UsageError, unknown
from featurepipe.store.keys import Keys, count_distinct

_SUFFIXES = (".csv", ".parquet", ".jsonl")
_EXACT = 2.0**53  # whole floats below it are whole numbers
_NEEDED = ("id", "label", *PATHS)


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


LabelSource: TypeAlias = Mapping[Any, Any] | pa.Table | str | os.PathLike[str] | LabelTable


def read_labels(source: LabelSource) -> LabelTable:
    """Reads labels; see ``FeatureSet.with_labels``.

    Raises:
        UsageError: It is nothing that holds labels, a label is NaN or no class, or an id has two labels.
    """
    if isinstance(source, LabelTable):
        return source
    if isinstance(source, Mapping):
        return _checked(list(map(str, source)), list(source.values()), "the mapping")
    if isinstance(source, pa.Table):
        return _of_table(source, "the table")
    if isinstance(source, str | os.PathLike):
        return _of_file(Path(source))
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas, which need not be installed
        return _of_table(pa.Table.from_pandas(source, preserve_index=False), "the table")
    if hasattr(source, "to_dict"):
        return read_labels(source.to_dict())
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
    place = pc.index_in(ids, value_set=table.ids)
    if len(ids) and place.null_count == len(ids):
        if not len(table.ids):
            raise UsageError(f"{table.name} holds no labels; it needs the id of each labelled image, and its label")
        raise UsageError(
            f"none of the {len(table.ids)} ids in {table.name} is an id of these features: there {table.ids[0].as_py()!r}, "
            f"here {ids[0].as_py()!r}; write them as features.ids shows them"
        )
    strangers = table.ids.filter(pc.invert(pc.is_in(table.ids, value_set=pc.unique(ids))))
    labels = table.labels.take(place)
    return labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels, pc.count_distinct(
        strangers
    ).as_py()


def _of_file(path: Path) -> LabelTable:
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


def _of_lines(path: Path) -> LabelTable:
    # Python's json, not Arrow's: there a label that is a number in one line and text in the next is an error.
    ids, labels, ignored = [], [], dict[str, None]()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path.name}: line {number} is not JSON: {error}") from error
            id_, label = _id_and_label(list(row)) if isinstance(row, dict) else (None, None)
            if id_ is None or label is None or row[id_] is None:
                raise UsageError(f"{path.name}: line {number} is no object with an `id` (or a `path`) and a `label`")
            ids.append(str(row[id_]))
            labels.append(row[label])
            ignored |= dict.fromkeys(name for name in row if name not in {id_, label})
    return replace(_checked(ids, labels, path.name), ignored=tuple(ignored))


def _id_and_label(names: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns of ids and of labels: ``id``, else that of paths; ``label`` in any case."""
    id_ = "id" if "id" in names else path_column(names) or column_named("id", names)
    return id_, column_named("label", names)


def _lacks(column: str, names: Sequence[str], where: str) -> UsageError:
    hint = str(unknown("column", column, names)).partition("; ")[2]
    near = f"; {hint}" if hint.startswith("nearest") else ""
    return UsageError(
        f"{where}: no column `{column}` among {', '.join(names) or 'none'}{near}. Labels take two columns: `id` (or `path`, "
        "`file`, `filename`, `image`), as the dataset has the images' ids, and `label`"
    )


def _of_table(table: pa.Table, name: str, *, has_types: bool = True) -> LabelTable:
    names = table.column_names
    column, label = _id_and_label(names)
    used = [used for used in (column, label) if used is not None]
    if (twice := duplicate(names, used)) is not None:
        raise UsageError(f"{name}: column {twice!r} is there {names.count(twice)} times; leave one")
    if label is None:
        raise _lacks("label", names, name)
    if column is None:
        raise _lacks("id", names, name)
    if table[column].null_count:
        row = pc.index(pc.is_null(table[column]), value=True).as_py()
        raise UsageError(f"{name}: row {row + 1} has no {column}; every row needs one")
    ids = _plain(table[column]).cast(pa.string()).combine_chunks()
    labels = _plain(table[label])
    notes: tuple[str, ...] = ()
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type) or pa.types.is_integer(labels.type):
        texts = pc.utf8_trim_whitespace(labels.cast(pa.string()))
        if not has_types:
            texts, said = whole_numbers(texts)
            notes = (said,) if said else ()
        found = _checked_text(ids, texts.combine_chunks(), name)
    else:
        found = _checked(ids, labels.to_pylist(), name)
    return replace(found, ignored=tuple(other for other in names if other not in used), notes=notes)


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
        _refuse_contradictions(ids, labels, name)
    return LabelTable(ids, labels, distinct, name)


def _refuse_contradictions(ids: pa.Array, labels: pa.Array, name: str) -> None:
    pairs = pa.table({"id": ids, "label": labels}).group_by(["id", "label"], use_threads=False).aggregate([])
    counted = pairs.group_by("id", use_threads=False).aggregate([("label", "count", pc.CountOptions(mode="all"))])
    twice = counted.filter(pc.greater(counted["label_count"], 1))["id"]
    if len(twice):
        first = twice[0].as_py()
        given = [str(label) for label in pairs.filter(pc.equal(pairs["id"], first))["label"].to_pylist()]
        raise UsageError(
            f"{name}: {len(twice)} ids have several labels; {first!r} has {' and '.join(given)}: an image has one label"
        )


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """n images in order, as columns; the part of a ``FeatureSet`` that knows nothing of features.

    Attributes:
        table: ``id``, ``label``, ``split`` of each image, text; a label or split may be null.
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
    def classes(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted(pc.unique(self.table["label"].drop_null()).to_pylist())

    @property
    def unlabelled(self) -> int:
        """Images without a label."""
        return int(self.table["label"].null_count)

    @property
    def duplicates(self) -> int:
        """Rows whose image is also that of an earlier row."""
        return len(self.keys) - count_distinct(self.keys)

    @property
    def keys64(self) -> npt.NDArray[np.uint64]:
        """(n,) uint64, the first 8 bytes of each key, little endian; a strided view of ``keys``, without a copy."""
        return self.keys.view("<u8")[:, 0]

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
            keep &= self.table["label"].is_valid().to_numpy()
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
