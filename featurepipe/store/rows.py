"""Rows of one or several columns, scattered over parts: where they lie, and how they are read."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from featurepipe.errors import CorruptPart, StoreError, StoreMoved
from featurepipe.store.atomic import open_file
from featurepipe.store.parts import PartInfo, fault_of

_BLOCK = 1 << 15  # values at once: their indices and the table stay in the processor's second cache


def copy_into(out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """Does ``out[...] = values`` for arrays of one shape, bit for bit as NumPy does.

    NumPy converts float16 one value at a time unless it was compiled for newer processors than its wheels are (4.6 ns a
    value where this takes 0.8). There are only 65,536 of them, so they are looked up in a table instead, which neither
    rounds nor depends on how the processor treats subnormal numbers.

    Args:
        out: (n, D), any strides.
        values: (n, D).
    """
    if values.dtype != np.float16 or out.dtype not in (np.float32, np.float64) or values.ndim != 2 or not values.size:
        out[...] = values
        return
    table = _table(out.dtype)
    rows = max(1, _BLOCK // values.shape[1])
    for start in range(0, len(values), rows):
        numbers = values[start : start + rows].view(np.uint16)
        np.take(table, numbers, out=out[start : start + rows], mode="wrap")  # no number is out of range


@functools.cache
def _table(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the values
        table = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(dtype)
    table.flags.writeable = False
    return table


BLOCK_BYTES = 1 << 20  # read at once when the rows are converted or picked out on the way


@dataclass(frozen=True, slots=True)
class PartColumn:
    """One column of one part, as plain values."""

    path: str
    offset: int
    dtype: str
    rows: int
    nbytes: int
    crc32: int


def open_part(part: PartColumn) -> int:
    """Opens a part for reading; returns the descriptor.

    Raises:
        StoreMoved: It is gone.
    """
    try:
        return open_file(Path(part.path))
    except OSError as error:
        raise gone(part) from error


def read_into(descriptor: int, block: npt.NDArray[Any], offset: int, part: PartColumn) -> None:
    """Fills a contiguous array with the bytes at ``offset``.

    Raises:
        StoreMoved: The part is shorter than it was.
    """
    content = memoryview(block.reshape(-1).view(np.uint8))
    while content:
        count = os.preadv(descriptor, [content], offset)
        if count == 0:
            raise gone(part)
        content, offset = content[count:], offset + count


def gone(part: PartColumn) -> StoreMoved:
    """Builds the error for a part that is not there any more."""
    return StoreMoved(
        f"part {part.path} is gone or shorter than it was; if the store was compacted meanwhile, open the features "
        "again with store.features(...), else run: featurepipe verify STORE"
    )


_DENSE = 8  # one row in so many is wanted: reading all of them beats touching the pages one by one
_FEW_ROWS = 64  # of a part, far from each other: read one by one
_OPEN_MAPS = 64  # each keeps a file descriptor
_MAPPED_BYTES = 64 << 20  # of mapped files in memory: the system would keep every page ever touched
_FAULT_BYTES = 64 << 10  # the system maps this much around each page touched

Array = npt.NDArray[Any]


class PartMaps:
    """Mapped parts, opened when asked for; a pickle of it holds none.

    Mapped pages count as memory of the process for as long as the map lives, so the maps are dropped whenever about
    64 MB may have been touched, and made anew.
    """

    def __init__(self) -> None:
        self._maps: dict[PartColumn, Array] = {}
        self._touched = 0

    def __reduce__(self) -> tuple[type[PartMaps], tuple[()]]:
        return PartMaps, ()

    def __len__(self) -> int:
        return len(self._maps)

    def fetch(self, part: PartColumn, rows: Array, out: Array) -> None:
        """Fills ``out`` (m, D) with some rows of a part, in any order.

        Raises:
            StoreError: The part is gone.
        """
        if len(rows) <= _FEW_ROWS and part not in self._maps:
            _read_each(part, rows, out)
            return
        width = out.shape[1]
        cost = np.dtype(part.dtype).itemsize * width + _FAULT_BYTES
        step = max(1, _MAPPED_BYTES // cost)
        for start in range(0, len(rows), step):
            chosen, target = rows[start : start + step], out[start : start + step]
            mapped = self._map(part, width)
            if out.dtype == mapped.dtype:
                np.take(mapped, chosen, axis=0, out=target, mode="clip")  # "raise" would fill a copy first
            else:
                copy_into(target, mapped[chosen])
            self._count(len(chosen) * cost)

    def _count(self, touched: int) -> None:
        self._touched += touched
        if self._touched > _MAPPED_BYTES and sum(mapped.nbytes for mapped in list(self._maps.values())) > _MAPPED_BYTES:
            self._maps.clear()
            self._touched = 0

    def _map(self, part: PartColumn, width: int) -> Array:
        mapped = self._maps.get(part)
        if mapped is None:
            try:
                with os.fdopen(open_part(part), "rb") as file:
                    mapped = np.memmap(file, part.dtype, "r", part.offset, (part.rows, width)).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise gone(part) from error
            for oldest in list(self._maps)[: max(0, len(self._maps) - _OPEN_MAPS + 1)]:
                self._maps.pop(oldest, None)  # another thread may have been here
            self._maps[part] = mapped
        return mapped


def _read_each(part: PartColumn, rows: Array, out: Array) -> None:
    """Reads rows one by one: 3 us each, where to touch a page of a new map takes ten times as long."""
    found = np.empty(out.shape, part.dtype)
    descriptor = open_part(part)
    try:
        row_bytes = found.dtype.itemsize * out.shape[1]
        for place, row in enumerate(rows.tolist()):
            read_into(descriptor, found[place : place + 1], part.offset + row * row_bytes, part)
    finally:
        os.close(descriptor)
    copy_into(out, found)


def gather(part: PartColumn, rows: Array, out: Array, maps: PartMaps) -> None:
    """Fills ``out`` (m, D) with some rows of a part, in any order.

    Raises:
        StoreError: The part is gone or shorter than it was.
    """
    if len(rows) * _DENSE < int(rows.max()) - int(rows.min()):
        maps.fetch(part, rows, out)
        return
    if (rows[1:] >= rows[:-1]).all():
        _gather_ascending(part, rows, out, maps)
        return
    order = np.argsort(rows, kind="stable")
    found = np.empty(out.shape, out.dtype)
    _gather_ascending(part, rows[order], found, maps)
    out[order] = found


def _gather_ascending(part: PartColumn, rows: Array, out: Array, maps: PartMaps) -> None:
    """Cuts the file into windows, and reads as a whole those of which many rows are wanted."""
    window_rows = max(1, BLOCK_BYTES // (out.shape[1] * np.dtype(part.dtype).itemsize))
    starts = _change(rows // window_rows)
    stops = np.append(starts[1:], len(rows))
    dense = (stops - starts) * _DENSE >= min(window_rows, part.rows)
    edges = np.append(_change(dense), len(dense))
    for first, last in itertools.pairwise(edges.tolist()):
        stretch = slice(int(starts[first]), int(stops[last - 1]))
        if dense[first]:
            _read_windows(part, rows[stretch], out[stretch], starts[first:last] - stretch.start)
        else:
            maps.fetch(part, rows[stretch], out[stretch])


def _read_windows(part: PartColumn, rows: Array, out: Array, starts: Array) -> None:
    row_bytes = out.shape[1] * np.dtype(part.dtype).itemsize
    descriptor = open_part(part)
    try:
        for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
            first, last = int(rows[start]), int(rows[stop - 1])
            block = np.empty((last - first + 1, out.shape[1]), part.dtype)
            read_into(descriptor, block, part.offset + first * row_bytes, part)
            copy_into(out[start:stop], block[rows[start:stop] - first])
    finally:
        os.close(descriptor)


def _change(values: Array) -> Array:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))


_RUN_ROWS = 64  # consecutive rows in the file from which they are read straight into their place


@dataclass
class ColumnRows:
    """n rows of one column; holds paths and row numbers, maps files when asked, and pickles without the maps.

    Attributes:
        column: Its name.
        width: Values a row.
        parts: The part columns concerned.
        part: (n,) number in ``parts`` of each row.
        row: (n,) row in that part.
    """

    column: str
    width: int
    parts: tuple[PartColumn, ...]
    part: npt.NDArray[np.uint32]
    row: npt.NDArray[np.uint32]
    _maps: PartMaps = field(default_factory=PartMaps, repr=False, compare=False)

    @classmethod
    def of(cls, column: str, parts: Sequence[PartInfo], part: Array, row: Array, *, width: int) -> Self:
        """Builds the view from what ``KeyIndex.locate`` returned; keeps only the parts that are used."""
        used, renumbered = _used(part, len(parts))
        columns = []
        for number in used:
            info = parts[number].columns[column]
            if info.shape[1] != width:
                raise StoreError(f"parts of {column} differ in width ({info.shape[1]} and {width}): featurepipe verify")
            path = os.path.abspath(parts[number].path)  # workers may stand in another folder  # noqa: PTH100
            columns.append(PartColumn(path, info.offset, info.dtype, parts[number].rows, info.nbytes, info.crc32))
        return cls(column, width, tuple(columns), renumbered, row.astype(np.uint32))

    def __len__(self) -> int:
        return len(self.row)

    def __getstate__(self) -> dict[str, Any]:
        used, renumbered = _used(self.part, len(self.parts))
        parts = tuple(self.parts[number] for number in used)
        places = _packed(renumbered, self.row)
        return {"column": self.column, "width": self.width, "parts": parts, "places": places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        part, row = _unpacked(*state["places"])
        self.__init__(state["column"], state["width"], state["parts"], part, row)  # type: ignore[misc]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds all parts' values exactly."""
        names = {part.dtype for part in self.parts} or {"<f4"}
        return np.result_type(*(np.dtype(name) for name in names)).newbyteorder("=")

    def take(self, positions: Array | slice) -> ColumnRows:
        """Returns the view of some of the rows (positions, a boolean mask, or a slice)."""
        chosen = self.part[positions], self.row[positions]
        return ColumnRows(self.column, self.width, self.parts, *chosen, self._maps)  # mapping anew costs page faults

    def check(self) -> None:
        """Reads this column of every part concerned, compares the checksums, and looks for values that are not finite.

        Raises:
            CorruptPart: The bytes of a part are not what was committed, or hold NaN or infinity.
            StoreError: A part is gone.
        """
        for number in np.unique(self.part):
            part = self.parts[number]
            descriptor = open_part(part)
            try:
                fault = fault_of(descriptor, part, finite=True)
            finally:
                os.close(descriptor)
            if fault:
                path = Path(part.path)
                raise CorruptPart(
                    f"part {path.stem}: {self.column} is damaged: {fault}; "
                    f"run: featurepipe verify {path.parents[3]}, then extract again"
                )

    def read(self, dtype: npt.DTypeLike | None = None, *, out: Array | None = None) -> Array:
        """Fetches all rows in order.

        Args:
            dtype: Of the result; by default that of the store.
            out: (n, D) array to fill, of any strides; by default a new one of ``dtype``.

        Returns:
            (n, D) array: ``out``, or one newly allocated.

        Raises:
            StoreError: A part is gone or shorter than it was.
        """
        if out is None:
            out = np.empty((len(self), self.width), self.dtype if dtype is None else dtype)
        for start, stop, neighbours in self._runs():
            if neighbours:
                self._read_run(self.parts[int(self.part[start])], int(self.row[start]), out[start:stop])
            else:
                self._gather(self.part[start:stop], self.row[start:stop], out[start:stop])
        return out

    def _runs(self) -> list[tuple[int, int, bool]]:
        """Cuts the rows into long runs of neighbours in one file (true), and the scattered stretches between them."""
        if not len(self):
            return []
        starts = _run_starts(self.part, self.row)
        stops = np.append(starts[1:], len(self))
        long = stops - starts >= min(_RUN_ROWS, len(self))
        edges = np.unique(np.concatenate([[0, len(self)], starts[long], stops[long]]))
        runs = np.isin(edges[:-1], starts[long])
        return [(int(a), int(b), bool(run)) for (a, b), run in zip(itertools.pairwise(edges), runs, strict=True)]

    def _read_run(self, part: PartColumn, first: int, out: Array) -> None:
        stored = np.dtype(part.dtype)
        row_bytes = self.width * stored.itemsize
        descriptor = open_part(part)
        try:
            if out.dtype == stored and out.flags.c_contiguous:
                read_into(descriptor, out, part.offset + first * row_bytes, part)
                return
            step = max(1, BLOCK_BYTES // row_bytes)
            scratch = np.empty((min(step, len(out)), self.width), stored)
            for start in range(0, len(out), step):
                block = scratch[: min(step, len(out) - start)]
                read_into(descriptor, block, part.offset + (first + start) * row_bytes, part)
                copy_into(out[start : start + len(block)], block)
        finally:
            os.close(descriptor)

    def _gather(self, parts: Array, rows: Array, out: Array) -> None:
        """Fetches scattered rows, part by part."""
        if (parts == parts[0]).all():
            gather(self.parts[int(parts[0])], rows, out, self._maps)
            return
        for number in np.unique(parts):
            places = np.flatnonzero(parts == number)
            found = np.empty((len(places), self.width), out.dtype)
            gather(self.parts[int(number)], rows[places], found, self._maps)
            out[places] = found


def _run_starts(part: Array, row: Array) -> Array:
    """Where each run of neighbouring rows of one part starts."""
    follows = (part[1:] == part[:-1]) & (row[1:] == row[:-1] + np.uint32(1))
    return np.flatnonzero(np.append(True, ~follows))


def _used(part: Array, count: int) -> tuple[Array, npt.NDArray[np.uint32]]:
    """The part numbers in use, ascending, and ``part`` renumbered by them."""
    used = np.bincount(part.astype(np.int64), minlength=count) > 0
    return np.flatnonzero(used), (np.cumsum(used) - 1).astype(np.uint32)[part]


def _packed(part: Array, row: Array) -> tuple[Array, Array, Array | None]:
    """Places as runs (part, first row, length) where that is smaller, as it is for rows in the order of the store."""
    if not len(row):
        return part, row, None
    starts = _run_starts(part, row)
    if 2 * len(starts) > len(row):
        return np.ascontiguousarray(part), np.ascontiguousarray(row), None
    return part[starts], row[starts], np.diff(np.append(starts, len(row))).astype(np.uint32)


def _unpacked(part: Array, row: Array, lengths: Array | None) -> tuple[Array, Array]:
    if lengths is None:
        return part, row
    first = np.cumsum(lengths, dtype=np.int64) - lengths
    steps = np.arange(first[-1] + lengths[-1]) - np.repeat(first, lengths)
    return np.repeat(part, lengths), (np.repeat(row, lengths) + steps).astype(np.uint32)


_WIDE_BYTES = 32 << 20  # of all columns, from which some values are taken
_NUMBERS_BYTES = 64  # a row's place in the file, in the order of the file, and its label


@dataclass(frozen=True)
class WideRows:
    """n rows of one or more columns, the columns in the order of the feature vector.

    Attributes:
        parts: The rows of each column; all have the same length.
    """

    parts: tuple[ColumnRows, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' names."""
        return tuple(part.column for part in self.parts)

    @property
    def width(self) -> int:
        """Values a row."""
        return sum(part.width for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        return len(self), self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds all columns' values exactly."""
        return np.result_type(*(part.dtype for part in self.parts))

    def row_bytes(self, dtype: npt.DTypeLike) -> int:
        """Memory that reading takes a row: the result, a column of it before it is in its place, and row numbers."""
        size = np.dtype(dtype).itemsize
        scratch = max(part.width * (part.dtype.itemsize + size) for part in self.parts)
        return self.width * size + scratch + _NUMBERS_BYTES

    def take(self, positions: Array | slice) -> WideRows:
        """Returns the view of some of the rows (positions, a boolean mask, or a slice)."""
        return WideRows(tuple(part.take(positions) for part in self.parts))

    def check(self) -> None:
        """Compares the checksums of every part concerned; see ``ColumnRows.check``."""
        for part in self.parts:
            part.check()

    def part_starts(self) -> npt.NDArray[np.int64]:
        """Row numbers, but for 0, at which another part begins."""
        return np.flatnonzero(np.diff(self.parts[0].part)) + 1

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Fetches rows, by default all, (m, D), each column straight into its place; see ``ColumnRows.read``."""
        if rows is not None:
            return self.take(rows).read(dtype)
        out = np.empty((len(self), self.width), self.dtype if dtype is None else dtype)
        start = 0
        for part in self.parts:
            part.read(out=out[:, start : start + part.width])
            start += part.width
        return out


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """n rows of features that lie in memory, not in a store; has what ``WideRows`` has.

    Attributes:
        columns: Names of the columns, in the order of the feature vector.
        values: (m, D), which may be filled later.
        positions: (n,) row in ``values`` of each row.
    """

    columns: tuple[str, ...]
    values: Array
    positions: Array

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def width(self) -> int:
        """Values a row."""
        return int(self.values.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        return len(self), self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the values."""
        return self.values.dtype

    def row_bytes(self, dtype: npt.DTypeLike) -> int:
        """Memory that reading takes a row: the result and the row's number."""
        return self.width * np.dtype(dtype).itemsize + _NUMBERS_BYTES

    def take(self, positions: Array | slice) -> ArrayRows:
        """Returns the view of some of the rows (positions, a boolean mask, or a slice)."""
        return ArrayRows(self.columns, self.values, self.positions[positions])

    def check(self) -> None:
        """Does nothing: there is no file that could be damaged."""

    def part_starts(self) -> npt.NDArray[np.int64]:
        """None: all rows lie in one place."""
        return np.zeros(0, np.int64)

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Copies rows, by default all, (m, D)."""
        chosen = self.positions if rows is None else self.positions[rows]
        return self.values[chosen].astype(self.dtype if dtype is None else dtype, copy=False)


@dataclass(frozen=True, eq=False)
class KeptRows:
    """n rows of some values of one or more columns; has what ``WideRows`` has.

    Attributes:
        rows: The columns as they are stored.
        kept: (k,) ascending positions in their feature vector.
    """

    rows: WideRows
    kept: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' names."""
        return self.rows.columns

    @property
    def width(self) -> int:
        """Values a row."""
        return len(self.kept)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        return len(self), self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds all columns' values exactly."""
        return self.rows.dtype

    def row_bytes(self, dtype: npt.DTypeLike) -> int:
        """Memory that reading takes a row: the result, and all values that it is taken from."""
        return self.width * np.dtype(dtype).itemsize + self.rows.row_bytes(self.dtype)

    def take(self, positions: Array | slice) -> KeptRows:
        """Returns the view of some of the rows (positions, a boolean mask, or a slice)."""
        return KeptRows(self.rows.take(positions), self.kept)

    def check(self) -> None:
        """Compares the checksums of every part concerned; see ``ColumnRows.check``."""
        self.rows.check()

    def part_starts(self) -> npt.NDArray[np.int64]:
        """Row numbers, but for 0, at which another part begins."""
        return self.rows.part_starts()

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Fetches rows, by default all, (m, k), some at a time, so that all their values are never in memory together."""
        wanted = self.rows if rows is None else self.rows.take(rows)
        out = np.empty((len(wanted), self.width), self.dtype if dtype is None else dtype)
        step = max(16, _WIDE_BYTES // max(1, self.rows.width * self.dtype.itemsize))
        for start in range(0, len(out), step):
            block = wanted.read(rows=slice(start, start + step))
            copy_into(out[start : start + step], np.take(block, self.kept, axis=1))
        return out
