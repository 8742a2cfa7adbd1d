"""Keys of images, and what a space knows by them, derived from its parts: which columns, which files, and which were rejected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from featurepipe.errors import CorruptPart, UsageError
from featurepipe.partitions import (
    Rows,
    bucket_count,
    bucketed,
    coded,
    filtered,
    index_in,
    is_large,
    partitions,
    release,
    stored,
    take,
    zeros,
)
from featurepipe.store.atomic import append_lines, read_lines
from featurepipe.store.documents import REJECT_LINE, first_fault
from featurepipe.store.parts import PartInfo, numbers_of, read_array, read_ids

Keys = npt.NDArray[np.uint8]
KEY_BYTES = 32


def as_keys(keys: npt.NDArray[Any] | Sequence[bytes]) -> Keys:
    """Returns keys as a C-contiguous (n, 32) uint8 array; also takes a sequence of 32-byte strings.

    Raises:
        UsageError: They have another shape or dtype.
    """
    if isinstance(keys, np.ndarray):
        array = np.ascontiguousarray(keys)
    else:
        items = list(keys)
        if any(len(item) != KEY_BYTES for item in items):
            raise UsageError("keys must have 32 bytes each (SHA-256)")
        array = np.frombuffer(b"".join(items), np.uint8).reshape(-1, KEY_BYTES)
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != KEY_BYTES:
        raise UsageError(f"keys must be an (n, 32) uint8 array, not {array.shape} {array.dtype}")
    return array


def keys_to_arrow(keys: Keys) -> pa.Array:
    """Returns (n, 32) uint8 as an Arrow array of 32-byte values, without a copy."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(as_keys(keys))])


def keys_from_arrow(column: pa.ChunkedArray) -> Keys:
    """Returns a column of 32-byte values, none of them null, as (n, 32) uint8 to read only; no copy if it is in one piece."""
    chunks = []
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1] or b"", np.uint8)
        chunks.append(values[chunk.offset * KEY_BYTES : (chunk.offset + len(chunk)) * KEY_BYTES].reshape(-1, KEY_BYTES))
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *chunks])


_BLOCK = 65_536  # keys looked up at a time: bounded memory, and neighbours among them share what the cache holds
_RUN = 256  # keys compared at a time where they follow each other
_TRIES = 16  # searches for the next run that found none of so many keys: then the rest is searched at once
_MANY = 8  # an eighth of the rows: then it pays to look first whether all of them are different
_SMALL_ROWS = 2**32


@dataclass(frozen=True)
class SortedKeys:
    """Keys in the order given, and the order of their first 8 bytes: 44 bytes a row, 60 while they are sorted.

    They are sorted when that is first needed: a snapshot's keys mostly follow each other as those of the parts do.

    Attributes:
        keys: (n, 32) uint8, as given; they are kept, and must not be changed afterwards.
    """

    keys: Keys

    @property
    def nbytes(self) -> int:
        """Memory held once the keys are sorted, in bytes."""
        return self.keys.nbytes + len(self.keys) * (8 + self._row_type.itemsize)

    @property
    def _row_type(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint32 if len(self.keys) < _SMALL_ROWS else np.uint64)

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.unsignedinteger]]:
        """Sorted first 8 bytes as numbers, and the row of each."""
        if is_large(len(self.keys)):
            return self._sorted_in_buckets()
        prefixes = prefixes_of(self.keys)
        order = np.argsort(prefixes, kind="stable")  # stable: of several copies the first one is found
        return prefixes[order], order.astype(self._row_type)

    def _sorted_in_buckets(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.unsignedinteger]]:
        """The same in files: one range of numbers after the other, each sorted alone."""
        count, stop = len(self.keys), 0
        ascending, rows = zeros((count,), np.uint64), zeros((count,), self._row_type)
        pieces = ((np.arange(part.start, part.stop), prefixes_of(self.keys[part])) for part in partitions(count))
        for some, prefixes in bucketed(pieces, count, bucket_count(count)):
            order = np.argsort(prefixes, kind="stable")
            place = slice(stop, stop + len(some))
            ascending[place], rows[place], stop = prefixes[order], some[order], stop + len(some)
        return ascending, rows

    @cached_property
    def _are_different(self) -> bool:
        if is_large(len(self.keys)):
            ascending, _ = self._sorted
            pairs = (ascending[part.start : part.stop + 1] for part in partitions(len(ascending)))
            return not any((some[1:] == some[:-1]).any() for some in pairs)
        prefixes = np.sort(prefixes_of(self.keys))  # a fifth of the time that their order takes
        return not (prefixes[1:] == prefixes[:-1]).any()

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Returns the first row that holds each key, all 32 bytes compared; -1 where none does."""
        found = np.empty(len(keys), np.int64)
        is_much = len(keys) * _MANY >= len(self.keys) or is_large(_MANY * len(keys))
        has_runs = is_much and self._are_different
        likely = 0
        for start in range(0, len(keys), _BLOCK):
            block = keys[start : start + _BLOCK]
            rows = self._find_run(block, likely) if has_runs else self._find_block(block)
            found[start : start + _BLOCK] = rows
            likely = int(rows[-1]) + 1
        return found

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tells which keys are held."""
        return self.find(keys) >= 0

    def _find_run(self, keys: Keys, likely: int) -> npt.NDArray[np.int64]:
        """As ``_find_block``, much faster where keys follow each other as those held do, as a snapshot's mostly do.

        Only if all that are held are different: else a row that has the key need not be the first.

        Args:
            keys: To be found.
            likely: The row that may have the first of them.
        """
        found = np.full(len(keys), -1, np.int64)
        at, width, tries = 0, _RUN, _TRIES
        while at < len(keys) and tries:
            wanted = keys[at : at + width]
            is_there = likely < len(self.keys) and bool((self.keys[likely] == wanted[0]).all())
            row = likely if is_there else int(self._find_block(wanted[:1])[0])
            tries -= not is_there
            if row < 0:
                at += 1
                continue
            held = _words(self.keys[row : row + len(wanted)])
            same = (held == _words(wanted[: len(held)])).all(axis=1)
            run = len(same) if same.all() else int(np.argmin(same))
            found[at : at + run] = np.arange(row, row + run)
            at, likely, tries = at + run, row + run, tries + run // _RUN
            width = 2 * width if run == len(wanted) else _RUN
        if at < len(keys):
            found[at:] = self._find_block(keys[at:])
        return found

    def _find_block(self, keys: Keys) -> npt.NDArray[np.int64]:
        ascending, order = self._sorted
        prefixes = prefixes_of(keys)
        open_ = np.argsort(prefixes)  # searched in order, neighbours need the same pages: five times as fast
        position = np.searchsorted(ascending, prefixes[open_])
        held, wanted = _words(self.keys), _words(keys)
        found = np.full(len(keys), -1, np.int64)
        while len(open_):
            inside = position < len(ascending)
            inside[inside] = ascending[position[inside]] == prefixes[open_[inside]]
            open_, position = open_[inside], position[inside]
            row = order[position]
            equal = (held[row] == wanted[open_]).all(axis=1)
            found[open_[equal]] = row[equal]
            open_, position = open_[~equal], position[~equal] + 1  # same first 8 bytes, another key: try the next row
        return found


def count_distinct(keys: Keys) -> int:
    """Counts how many different keys there are, in a third of the memory that hashing them takes."""
    return len(different(keys)[0])


def different(keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first row of each different key (d,), ascending, and for every row (n,) the first that has its key."""
    first = SortedKeys(keys).find(keys)
    return np.flatnonzero(first == np.arange(len(first))), first


def prefixes_of(keys: Keys) -> npt.NDArray[np.uint64]:
    """Returns the first 8 bytes of each key as a number; which order they have does not matter."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


def _words(keys: Keys) -> npt.NDArray[np.uint64]:
    return as_keys(keys).view(np.uint64).reshape(-1, KEY_BYTES // 8)


OnDamage = Callable[[PartInfo, CorruptPart], None]
_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of all parts that have the same of the columns asked for."""

    sorted_keys: SortedKeys
    numbers: _Rows
    starts: _Rows

    def find(self, keys: Keys) -> tuple[_Rows, _Rows]:
        """Returns for each key the number of its part and the row there, of the first committed copy; -1 without one."""
        found = self.sorted_keys.find(keys)
        part, row = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        at = np.flatnonzero(found >= 0)
        place = np.searchsorted(self.starts, found[at], side="right") - 1
        part[at], row[at] = self.numbers[place], found[at] - self.starts[place]
        return part, row


class KeyIndex:
    """Keys that have all of some columns, and where each column of a key lies.

    Holds 44 bytes a row, and 60 while it is built.

    Args:
        columns: The columns asked for; none means any part counts, whatever its columns.
        parts: The parts, the first committed first.
        on_damage: Told of each part whose keys are damaged, and which is taken to hold nothing.

    Attributes:
        columns: The columns asked for.
        parts: The parts that have any of them.

    Raises:
        CorruptPart: The keys of a part are damaged, and there is no ``on_damage``.
    """

    def __init__(
        self, columns: Iterable[str] = (), parts: Iterable[PartInfo] = (), on_damage: OnDamage | None = None
    ) -> None:
        self.columns = tuple(dict.fromkeys(columns))
        self.parts: list[PartInfo] = []
        numbers: dict[frozenset[str], list[int]] = {}
        for part in parts:
            held = frozenset(self.columns).intersection(part.columns)
            if held or not self.columns:
                numbers.setdefault(held, []).append(len(self.parts))
                self.parts.append(part)
        self._groups = {held: self._group(alike, on_damage) for held, alike in numbers.items()}

    def _group(self, numbers: Sequence[int], on_damage: OnDamage | None) -> _Group:
        # One array made for all of them at once: gathered and joined, keys would be in memory twice.
        rows = sum(self.parts[number].rows for number in numbers)
        keys = zeros((rows, KEY_BYTES), np.uint8)
        starts, stop = [], 0
        for part in (self.parts[number] for number in numbers):
            starts.append(stop)
            try:
                keys[stop : stop + part.rows] = read_array(part, "key")
            except CorruptPart as error:
                if on_damage is None:
                    raise
                on_damage(part, error)
            else:
                stop += part.rows
            release()
        return _Group(SortedKeys(keys[:stop]), np.array(numbers, np.int64), np.array(starts, np.int64))

    def __len__(self) -> int:
        """Rows held, copies included."""
        return sum(len(group.sorted_keys.keys) for group in self._groups.values())

    @property
    def nbytes(self) -> int:
        """Memory held by the index, in bytes."""
        return sum(group.sorted_keys.nbytes for group in self._groups.values())

    def contains(self, keys: npt.NDArray[Any] | Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Tells for each key of (n, 32) uint8 whether all columns are there, in one part or in several."""
        wanted = as_keys(keys)
        result = np.ones(len(wanted), np.bool_)
        for columns in [frozenset([column]) for column in self.columns] or [frozenset[str]()]:
            held = np.zeros(len(wanted), np.bool_)
            for group in self._with(columns):
                held |= group.sorted_keys.contains(wanted)
            result &= held
        return result

    def locate(
        self, keys: npt.NDArray[Any] | Sequence[bytes], column: str | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Finds the row of each key.

        Args:
            keys: (n, 32) uint8.
            column: Which column's row; ``None`` asks for a row that has all of this index's columns.

        Returns:
            Number of the part in ``self.parts``, row in that part, and whether the key was found (else both are -1).

        Raises:
            UsageError: ``column`` is not one of this index's.
        """
        if column is not None and column not in self.columns:
            raise UsageError(f"this index was built for {list(self.columns)}, not for {column!r}")
        return self.search(as_keys(keys), frozenset(self.columns if column is None else [column]))

    def search(
        self, keys: Keys, wanted: frozenset[str]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Finds for each key the first committed row that has all ``wanted`` columns; returns as ``locate``."""
        part, row = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        for group in self._with(wanted):
            number, place = group.find(keys)
            first = (number >= 0) & ((part < 0) | (number < part))  # the first committed copy wins
            part[first], row[first] = number[first], place[first]
        return part, row, part >= 0

    def _with(self, columns: frozenset[str]) -> list[_Group]:
        return [group for held, group in self._groups.items() if columns <= held]


KNOWN_FILES = pa.schema([("id", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("key", pa.binary(32))])
_ROWS_AT_ONCE = 1 << 18


def known_files(
    parts: Sequence[PartInfo],
    rejects: pa.Table,
    ids: pa.ChunkedArray | None,
    on_damage: Callable[[PartInfo, CorruptPart], None],
) -> pa.Table:
    """Lists files; see ``Space.known_files``.

    Args:
        parts: Where to look, the first committed first.
        rejects: Also known, and later than all parts.
        ids: Only files with one of these ids; None for all.
        on_damage: Told of each part that is damaged, and whose files then are not known.
    """
    if ids is not None and is_large(len(ids)):
        files = stored((batch for table in _of_parts(parts, on_damage) for batch in table.to_batches()), KNOWN_FILES)
        files = pa.concat_tables([files, rejects.select(KNOWN_FILES.names).filter(rejects["key"].is_valid())])
        return _last_of_each(filtered(files, index_in(files["id"], ids) >= 0))
    found = [KNOWN_FILES.empty_table()]
    waiting: list[pa.Table] = []
    for table in _of_parts(parts, on_damage):
        waiting.append(table)
        if sum(map(len, waiting)) >= max(_ROWS_AT_ONCE, 0 if ids is None else len(ids)):
            found.append(_chosen(waiting, ids))
            waiting = []
    rejected = rejects.select(KNOWN_FILES.names).filter(rejects["key"].is_valid())
    return _last_of_each(pa.concat_tables([*found, _chosen([*waiting, rejected], ids)]))


def _of_parts(parts: Sequence[PartInfo], on_damage: Callable[[PartInfo, CorruptPart], None]) -> Iterator[pa.Table]:
    for part in parts:
        try:
            yield pa.table(
                [
                    read_ids(part),
                    numbers_of(read_array(part, "size")),
                    numbers_of(read_array(part, "mtime_ns")),
                    keys_to_arrow(read_array(part, "key")),
                ],
                schema=KNOWN_FILES,
            )
        except CorruptPart as error:
            on_damage(part, error)


def _chosen(tables: Sequence[pa.Table], ids: pa.ChunkedArray | None) -> pa.Table:
    """The rows with one of the ids; of many tables at once, since each look-up starts by hashing all the ids."""
    table = pa.concat_tables(tables)
    return table if ids is None else table.filter(pc.is_in(table["id"], value_set=ids))


def _last_of_each(files: pa.Table) -> pa.Table:
    if not is_large(len(files)):
        return files.take(_last_rows(files, np.arange(len(files))).sort())
    is_last = zeros((len(files),), np.bool_)
    for rows, _ in bucketed(coded(files["id"]), len(files), bucket_count(len(files))):
        is_last[_last_rows(take(files, rows), rows).to_numpy()] = True
    return filtered(files, is_last)


def _last_rows(files: pa.Table, rows: Rows) -> pa.ChunkedArray:
    """Of the numbers of some rows, the last of each (id, size, mtime_ns)."""
    numbered = files.append_column("row", numbers_of(rows))
    return numbered.group_by(["id", "size", "mtime_ns"]).aggregate([("row", "max")])["row_max"]


REJECTS = pa.schema(
    [
        ("key", pa.binary(32)),
        ("id", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),
        ("run_id", pa.string()),
    ]
)


def append_rejects(path: Path, rows: Iterable[Mapping[str, Any]], *, dataset: str = "") -> None:
    """Appends rejects as whole lines, synced.

    Args:
        path: ``rejects.jsonl`` of a space.
        rows: ``key`` (32 bytes, or None if the image could not be read), ``id``, ``size``, ``mtime_ns``, ``reason``,
            ``run_id``.
        dataset: Name of the dataset they belong to.

    Raises:
        DiskFull: No space is left.
        StoreError: The file is a link.
    """
    lines = "".join(_line(row, dataset) for row in rows).encode("ascii")
    if lines:
        append_lines(path, lines)


def _line(row: Mapping[str, Any], dataset: str) -> str:
    key = row.get("key")
    record = {
        "key": None if key is None else bytes(key).hex(),
        "id": row["id"],
        "size": int(row["size"]),
        "mtime_ns": int(row["mtime_ns"]),
        "reason": row["reason"].encode("utf-8", "replace").decode("utf-8"),  # file names may hide in it
        "run_id": row["run_id"],
        "dataset": dataset,
    }
    return json.dumps(record) + "\n"


def read_rejects(path: Path, *, dataset: str | None = None, first: bool = False) -> pa.Table:
    """Reads rejects, the latest of each (id, key); lines that are no rejects, torn by a kill or otherwise, are passed over.

    Args:
        path: ``rejects.jsonl``; may be missing.
        dataset: Only those of this dataset.
        first: The first of each (id, key) instead, whose run is the one that found it.
    """
    latest: dict[tuple[str, bytes | None], dict[str, Any]] = {}
    for record in _records(path):
        if dataset is None or record.get("dataset", "") == dataset:
            place = (record["id"], record["key"])
            if first and place in latest:
                continue
            latest.pop(place, None)
            latest[place] = record
    return pa.Table.from_pylist(list(latest.values()), schema=REJECTS)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines that are rejects; others are passed over, see `faulty_lines`."""
    return (record for _, line in read_lines(path) if (record := reject_of(line)) is not None)


def reject_of(line: bytes) -> dict[str, Any] | None:
    """What a line of rejects says, its key as bytes; None if it is no reject."""
    try:
        record: Any = REJECT_LINE.validate_json(line)
    except ValidationError:
        return None
    record["key"] = None if record["key"] is None else bytes.fromhex(record["key"])
    return dict(record)


def faulty_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yields the number of each line that readers pass over, what is wrong with it, and whether a kill may have torn it."""
    for number, line in read_lines(path):
        try:
            REJECT_LINE.validate_json(line)
        except ValidationError as error:
            fault = first_fault(error)
            yield number, fault, fault.startswith("Invalid JSON")
