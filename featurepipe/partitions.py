"""Tables and arrays of more rows than memory should hold: in unnamed files, memory mapped, and worked on a partition at a time.

Within `spilling`, whatever has more rows than a partition goes to files that have no name, so that none is left when a process
is killed. Everything else, and everything outside of it, is in memory and one partition. Results are the same either way.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final, TypeVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import DiskFull

PARTITION_ROWS: Final = 1 << 20
"""Rows of a partition, which are those of a row group of a snapshot."""
_HASHED_AT_ONCE = 16_384
_POSITIONS = 4096
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Rows = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint64]
Entries = npt.NDArray[Any]
_PLACED = np.dtype([("row", np.int64), ("place", np.int64)])
_Columns = TypeVar("_Columns", pa.Table, pa.ChunkedArray)


@dataclass
class _Spill:
    """Where large tables and arrays go.

    Attributes:
        folder: on a disk, of the store.
        rows: of a partition.
    """

    folder: Path
    rows: int
    _maps: WeakSet[mmap.mmap] = field(default_factory=WeakSet)

    @cached_property
    def place(self) -> Path:
        """The folder if files can be made and mapped there, which not every share lets; else the system's for temporary files."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(mmap.PAGESIZE))
                file.flush()
                mmap.mmap(file.fileno(), mmap.PAGESIZE).close()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                return Path(tempfile.gettempdir())
        return self.folder

    @contextmanager
    def file(self) -> Iterator[IO[bytes]]:
        """A file without a name from the beginning."""
        try:
            with tempfile.TemporaryFile(dir=self.place) as opened:
                yield opened
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise DiskFull(
                f"no space is left in {self.place} for what a run keeps of a large source while it lasts, some 500 bytes an "
                "image; free some, and run the same command again"
            ) from error

    def mapped(self, file: IO[bytes], size: int, access: int = mmap.ACCESS_DEFAULT) -> mmap.mmap:
        found = mmap.mmap(file.fileno(), size, access=access)
        self._maps.add(found)
        return found

    def array(self, size: int) -> mmap.mmap:
        with self.file() as file:
            _allocate(file, size)
            return self.mapped(file, size)

    def release(self) -> None:
        """Takes pages out of this process's memory; what was written there stays in the files."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for each in list(self._maps):
                each.madvise(mmap.MADV_DONTNEED)


_SPILL: ContextVar[_Spill | None] = ContextVar("spill", default=None)


@contextmanager
def spilling(folder: Path, rows: int = PARTITION_ROWS) -> Iterator[None]:
    """Has tables and arrays of more rows than a partition put into files, in this block and whatever it calls.

    Within another such block it changes nothing. What was made stays as long as somebody has it. Threads that are started in the
    block have everything in memory; processes that are forked there share the arrays made before, and what is written to them.

    Args:
        folder: of the store, where files without names are made; if none can be made and mapped there, as in one that is only
            read or is not there yet, they are in the system's folder for temporary files.
        rows: of a partition.

    Raises:
        DiskFull: no space is left there.
    """
    if _SPILL.get() is not None:
        yield
        return
    token = _SPILL.set(_Spill(folder, rows))
    try:
        yield
    finally:
        _SPILL.reset(token)


def is_large(rows: int) -> bool:
    """Whether so many rows are more than a partition, and belong into files."""
    spill = _SPILL.get()
    return spill is not None and rows > spill.rows


def partitions(rows: int) -> Iterator[slice]:
    """The partitions of so many rows, in order; after each one, pages of files are released."""
    spill = _SPILL.get()
    size = max(rows, 1) if spill is None else spill.rows
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
        release()


def release() -> None:
    """Gives back the pages of files that are in this process's memory, as whoever goes through a large table should do."""
    spill = _SPILL.get()
    if spill is not None:
        spill.release()


def part_of(columns: _Columns, part: slice) -> _Columns:
    """A partition of a table or column, without a copy."""
    return columns.slice(part.start, part.stop - part.start)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros; in a file if it has more rows than a partition."""
    spill, kind = _SPILL.get(), np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    if spill is None or shape[0] <= spill.rows or not size:
        return np.zeros(shape, kind)
    return np.frombuffer(spill.array(size), kind).reshape(shape)


def copied(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that can be written to, of the same kind as `zeros` makes."""
    made = zeros(array.shape, array.dtype)
    for part in partitions(len(array)):
        made[part] = array[part]
    return made


def flatnonzero(mask: npt.NDArray[Any]) -> Rows:
    """As ``np.flatnonzero`` of a mask (n,)."""
    if not is_large(len(mask)):
        return np.flatnonzero(mask)
    found, stop = zeros((sum(int(np.count_nonzero(mask[part])) for part in partitions(len(mask))),), np.int64), 0
    for part in partitions(len(mask)):
        rows = np.flatnonzero(mask[part]) + part.start
        found[stop : stop + len(rows)] = rows
        stop += len(rows)
    return found


def stored(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The table of some batches; in a file, with a chunk for each partition, if it has more rows than one."""
    spill = _SPILL.get()
    waiting, rows = list[pa.RecordBatch](), 0
    if spill is None:
        return pa.Table.from_batches(list(batches), schema=schema)
    stream = iter(batches)
    for batch in stream:
        waiting.append(batch)
        rows += batch.num_rows
        if rows > spill.rows:
            return _written(spill, waiting, stream, schema)
    return pa.Table.from_batches(waiting, schema=schema)


def _written(
    spill: _Spill, waiting: list[pa.RecordBatch], more: Iterator[pa.RecordBatch], schema: pa.Schema
) -> pa.Table:
    with spill.file() as file:
        with pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer:
            rest = pa.Table.from_batches(waiting, schema=schema)
            waiting.clear()
            for batch in more:
                rest = pa.concat_tables([rest, pa.Table.from_batches([batch], schema=schema)])
                while rest.num_rows >= spill.rows:
                    writer.write_table(rest.slice(0, spill.rows).combine_chunks())
                    rest = rest.slice(spill.rows)
            while rest.num_rows:
                writer.write_table(rest.slice(0, spill.rows).combine_chunks())
                rest = rest.slice(spill.rows)
        file.flush()
        content = pa.py_buffer(spill.mapped(file, file.tell(), mmap.ACCESS_READ))
        return pa.ipc.open_file(pa.BufferReader(content)).read_all()


def gathered(table: pa.Table) -> pa.Table:
    """The same table in one chunk, or if it is large, in a file with a chunk for each partition."""
    if not is_large(table.num_rows):
        return table.combine_chunks()
    if max(column.num_chunks for column in table.columns) <= bucket_count(table.num_rows):
        return table  # it is, or whoever made it has it in memory anyhow
    kept = stored(table.replace_schema_metadata(None).to_batches(), table.schema.remove_metadata())
    return kept.replace_schema_metadata(table.schema.metadata)


def filtered(table: pa.Table, mask_of: Callable[[pa.Table], pa.Array | pa.ChunkedArray] | npt.NDArray[Any]) -> pa.Table:
    """The rows of a table that a mask (n,) has, or for which a function says so that is given a partition at a time."""

    def kept(part: slice) -> pa.Table:
        rows = part_of(bare, part)
        return rows.filter(mask_of(rows) if callable(mask_of) else pa.array(mask_of[part]))

    bare = table.replace_schema_metadata(None)
    if not is_large(table.num_rows):
        return kept(slice(0, table.num_rows)).replace_schema_metadata(table.schema.metadata)
    batches = (batch for part in partitions(table.num_rows) for batch in kept(part).to_batches())
    return stored(batches, bare.schema).replace_schema_metadata(table.schema.metadata)


def take(columns: _Columns, rows: Rows) -> _Columns:
    """Rows of a table or column by their numbers, none below 0; of many chunks in the time that one takes."""
    if isinstance(columns, pa.Table):
        if all(column.num_chunks < 2 for column in columns.columns):
            return columns.take(pa.array(rows))
        return pa.Table.from_arrays([take(column, rows) for column in columns.columns], schema=columns.schema)
    if columns.num_chunks < 2:
        return columns.take(pa.array(rows))
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return columns.slice(int(rows[0]), len(rows))
    order = None if (np.diff(rows) >= 0).all() else np.argsort(rows, kind="stable")
    ascending = rows if order is None else rows[order]
    starts = np.cumsum([0, *map(len, columns.chunks)])
    bounds = np.searchsorted(ascending, starts)
    pieces = [
        chunk.take(pa.array(ascending[first:last] - start))
        for chunk, start, (first, last) in zip(columns.chunks, starts, pairwise(bounds), strict=False)
        if first < last
    ]
    found = pa.chunked_array(pieces, columns.type)
    if order is None:
        return found
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return pa.chunked_array([found.combine_chunks()]).take(pa.array(back))


def bucketed(
    pieces: Iterable[tuple[Entries, Codes]], most: int, buckets: int, dtype: npt.DTypeLike = np.int64
) -> Iterator[tuple[Entries, Codes]]:
    """Entries by ranges of their codes: those with equal codes come together, each bucket's in their order.

    What is asked of them afterwards should be in the entries: looked up elsewhere by row, it takes pages from all over a file.

    Args:
        pieces: entries, such as numbers of rows, and their codes.
        most: entries there are at most.
        buckets: how many ranges the codes are divided into; a power of two.
        dtype: of the entries.

    Yields:
        So many times, the entries and codes of a range, the lowest codes first.
    """
    if buckets == 1:
        every = [(np.empty(0, dtype), np.empty(0, np.uint64)), *pieces]
        yield np.concatenate([some for some, _ in every]), np.concatenate([their for _, their in every])
        return
    entries, codes, count = zeros((most,), dtype), zeros((most,), np.uint64), 0
    sizes = np.zeros(buckets, np.int64)
    for some, their in pieces:
        entries[count : count + len(some)], codes[count : count + len(some)] = some, their
        sizes += np.bincount(_bucket(their, buckets), minlength=buckets)
        count += len(some)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    fill = bounds[:-1].copy()
    sorted_entries, sorted_codes = zeros((most,), dtype), zeros((most,), np.uint64)
    for part in partitions(count):
        which = _bucket(codes[part], buckets)
        order = np.argsort(which, kind="stable")
        here = np.bincount(which, minlength=buckets)
        place = np.arange(len(order)) + np.repeat(fill - (np.cumsum(here) - here), here)
        sorted_entries[place], sorted_codes[place] = entries[part][order], codes[part][order]
        fill += here
    del entries, codes
    for first, last in pairwise(bounds):
        yield sorted_entries[first:last], sorted_codes[first:last]
        release()


def bucket_count(rows: int) -> int:
    """How many buckets so many rows should have, so that each is about a partition."""
    spill = _SPILL.get()
    return 1 if spill is None or rows <= spill.rows else 1 << (-(-rows // spill.rows) - 1).bit_length()


def _bucket(codes: Codes, buckets: int) -> Rows:
    return (codes >> np.uint64(64 - (buckets - 1).bit_length())).astype(np.int64)


def are_equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Whether two columns are the same."""
    return len(one) == len(other) and all(
        part_of(one, part).equals(part_of(other, part)) for part in partitions(len(one))
    )


def distinct(column: pa.ChunkedArray) -> pa.Array:
    """The values of a column, each once, in the order in which they come first."""
    values = [part_of(column, part).unique() for part in partitions(len(column))]
    return pa.chunked_array(values, column.type).unique()


def index_in(ids: pa.ChunkedArray, listed: pa.ChunkedArray) -> Rows:
    """The row of each id among those listed, or -1: int64, as long as ``ids``; as ``pc.index_in``, in bounded memory.

    Args:
        ids: any, also several times.
        listed: none of them twice.
    """
    are_same = are_equal(ids, listed)  # nearly every run of a large source
    if not is_large(len(ids)):
        return np.arange(len(ids)) if are_same else _searched(ids, listed)
    found = zeros((len(ids),), np.int64)
    if are_same:
        for part in partitions(len(ids)):
            found[part] = np.arange(part.start, part.stop)
        return found
    lacking = _find_in_order(ids, listed, found)
    if not len(listed):
        return found
    if not is_large(lacking):
        rows = flatnonzero(found < 0)
        found[rows] = _searched(take(ids, rows), listed)
    else:
        _join(ids, listed, found)
        _verify(found, ids, listed)
    return found


def _find_in_order(ids: pa.ChunkedArray, listed: pa.ChunkedArray, found: Rows) -> int:
    """Enters where ids are listed that come in the order of the list, as they mostly do; all others get -1.

    Returns:
        How many are others.
    """
    start = lacking = 0
    for part in partitions(len(ids)):
        count = part.stop - part.start
        window = listed.slice(start, count + count // 4) if 2 * lacking <= part.start else listed.slice(0, 0)
        places = pc.fill_null(pc.index_in(part_of(ids, part), value_set=window), -1).to_numpy()
        there = np.flatnonzero(places >= 0)
        found[part] = np.where(places >= 0, places + start, -1)
        start += int(places[there[-1]]) + 1 if len(there) else 0
        lacking += count - len(there)
    return lacking


def _join(ids: pa.ChunkedArray, listed: pa.ChunkedArray, found: Rows) -> None:
    """Enters for each id the first row that has its code, or -1."""
    buckets = bucket_count(max(len(ids), len(listed)))
    shift = np.uint64(64 - len(ids).bit_length())

    def places() -> Iterator[tuple[Entries, Codes]]:
        sides = (bucketed(coded(column), len(column), buckets) for column in (ids, listed))
        for (rows, codes), (there, their) in zip(*sides, strict=True):
            order = np.argsort(their, kind="stable")
            ascending, entries = their[order], np.empty(len(rows), _PLACED)
            place = np.minimum(np.searchsorted(ascending, codes), max(len(order) - 1, 0))
            entries["row"] = rows
            entries["place"] = np.where(ascending[place] == codes, there[order][place], -1) if len(order) else -1
            yield entries, rows.astype(np.uint64) << shift

    for entries, _ in bucketed(places(), len(ids), buckets, _PLACED):  # in the order of rows again
        found[entries["row"]] = entries["place"]


def _searched(ids: pa.ChunkedArray, listed: pa.ChunkedArray) -> Rows:
    """The same as `index_in` for few ids, however many are listed."""
    if not is_large(len(listed)):
        return np.asarray(pc.fill_null(pc.index_in(ids, value_set=listed), -1).to_numpy(), np.int64)
    codes = ids.combine_chunks().dictionary_encode()
    found = np.full(len(codes.dictionary) + 1, -1, np.int64)  # the last one is of null
    for part in partitions(len(listed)) if len(ids) else ():
        which = pc.fill_null(pc.index_in(part_of(listed, part), value_set=codes.dictionary), -1).to_numpy()
        rows = np.flatnonzero(which >= 0)[::-1]
        rows = rows[found[which[rows]] < 0]
        found[which[rows]] = rows + part.start  # of several, the first is entered last
    return np.asarray(found[pc.fill_null(codes.indices, -1).to_numpy()], np.int64)


def _verify(found: Rows, ids: pa.ChunkedArray, listed: pa.ChunkedArray) -> None:
    """Compares the ids themselves; where another id has the same code, all that are listed are searched."""
    doubtful = [np.empty(0, np.int64)]
    for part in partitions(len(ids)):
        rows = np.flatnonzero(found[part] >= 0)
        same = pc.equal(take(part_of(ids, part), rows), take(listed, found[part][rows]))
        doubtful.append(rows[~np.asarray(same.to_numpy(), np.bool_)] + part.start)
    rows = np.concatenate(doubtful)
    found[rows] = _searched(take(ids, rows), listed)


def repeated(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """All ids if they are few, else those that may occur more than once, as often as they do, in their order."""
    if not is_large(len(ids)):
        return ids
    rows = [np.empty(0, np.int64)]
    for some, codes in bucketed(coded(ids), len(ids), bucket_count(len(ids))):
        order = np.argsort(codes, kind="stable")
        again = codes[order][1:] == codes[order][:-1]
        rows.append(some[order][np.r_[again, False] | np.r_[False, again]] if len(order) else some)
    return take(ids, np.sort(np.concatenate(rows)))


def coded(ids: pa.ChunkedArray) -> Iterator[tuple[Rows, Codes]]:
    """Rows of ids and their codes, a partition at a time, for `bucketed`."""
    for part in partitions(len(ids)):
        codes = [np.empty(0, np.uint64)]
        codes += [codes_of(chunk) for chunk in part_of(ids, part).chunks]
        yield np.arange(part.start, part.stop), np.concatenate(codes)


def codes_of(ids: pa.Array) -> Codes:
    """A 64-bit code of each text, (n,): sums of its bytes times random numbers for their positions (multilinear hashing).

    Equal texts have equal codes in a process; different ones hardly ever.
    """
    codes = np.empty(len(ids), np.uint64)
    for start in range(0, len(ids), _HASHED_AT_ONCE):
        block = ids.slice(start, _HASHED_AT_ONCE).cast(pa.binary())
        offsets = np.frombuffer(block.buffers()[1], np.int32)[block.offset : block.offset + len(block) + 1]
        offsets = offsets.astype(np.int64)
        text = np.frombuffer(block.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        lengths, starts = np.diff(offsets), offsets[:-1] - offsets[0]
        positions = np.arange(len(text)) - np.repeat(starts, lengths)
        products = (text.astype(np.uint64) + np.uint64(1)) * _multipliers()[positions % _POSITIONS]
        sums = np.zeros(len(block), np.uint64)
        if (filled := lengths > 0).any():
            sums[filled] = np.add.reduceat(products, starts[filled])
        codes[start : start + len(block)] = sums
    return codes


@cache
def _multipliers() -> Codes:
    return np.random.default_rng().integers(0, 2**64, _POSITIONS, np.uint64, endpoint=False) | np.uint64(1)


def _allocate(file: IO[bytes], size: int) -> None:
    """Reserves the space of a file: a page that found none later would end the process."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # a system, or a file system, that reserves nothing
        if getattr(error, "errno", errno.EINVAL) not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))
        file.flush()
