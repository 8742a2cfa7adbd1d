"""Labels by id, and other columns of a table of them, read and checked."""

from __future__ import annotations

import codecs
import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
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
    texts_of,
    whole_numbers,
)
from featurepipe.display import counted, restored
from featurepipe.errors import UsageError, unknown

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
        way = _way_to_match(_distinct(ids), _distinct(table.ids)) or "write them as the dataset has them"
        raise UsageError(
            f"none of the {len(table.ids):,} ids in {table.name} is an id of these features: there {table.ids[0].as_py()!r}, "
            f"here {ids[0].as_py()!r}; {way}"
        )
    return place


_EXPLAINED = 0.9
"""The share of ids that must match if an advice is taken."""


def _distinct(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    found = pc.unique(ids)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _way_to_match(here: pa.Array, there: pa.Array) -> str:
    """How the ids of a file become those of features, if only folders in front of all or suffixes differ; else empty."""
    least = _EXPLAINED * min(len(here), len(there))
    sides = ((there, here, "leave out", "leave out the suffixes"), (here, there, "write", "write the suffixes as well"))
    for longer, shorter, what, of_suffixes in sides:
        for folders in _common_folders(longer):
            if _among(pc.utf8_slice_codeunits(longer, len(folders)), shorter) >= least:
                return f"{what} {folders!r} in front of them"
        if _among(pc.replace_substring_regex(longer, r"\.[^./]+$", ""), shorter) >= least:
            return of_suffixes
    return ""


def _common_folders(ids: pa.Array) -> list[str]:
    """What all ids begin with, up to the end of each folder: the first, the first two and so on."""
    ends = pc.min_max(ids).as_py()
    first, last = (ends[end].split("/")[:-1] for end in ("min", "max"))
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return list(accumulate(f"{folder}/" for folder, _ in shared))


def _among(ids: pa.Array, others: pa.Array) -> int:
    return pc.sum(pc.is_in(ids, value_set=others)).as_py() or 0


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
                column.append(None if field is None else restored(field))
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
    takes = "It takes" if column == "id" else "Labels take two columns:"
    further = "" if column == "id" else f", and `{column}`"
    return UsageError(
        f"{where}: no column `{column}` among {', '.join(names) or 'none'}{near}. {takes} `id` (or `path`, "
        f"`file`, `filename`, `image`), as the dataset has the images' ids{further}"
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
    sizes = pairs.group_by("id", use_threads=False).aggregate([("value", "count", pc.CountOptions(mode="all"))])
    twice = sizes.filter(pc.greater(sizes["value_count"], 1))["id"]
    if len(twice):
        first = twice[0].as_py()
        given = [str(value) for value in pairs.filter(pc.equal(pairs["id"], first))["value"].to_pylist()]
        what, one = ("labels", "label") if column == "label" else (f"values of {column}", column)
        raise UsageError(
            f"{name}: {counted(len(twice), 'id', 'has', 'have')} several {what}; {first!r} has {' and '.join(given)}: "
            f"an image has one {one}"
        )
