"""Rows of one column, scattered over parts: where they lie, and fetching them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from featurepipe.errors import CorruptPart, StoreError
from featurepipe.store.parts import PartInfo, crc32_of

_BLOCK_BYTES = 4 << 20  # read at once when the dtype changes on the way
_RUN_ROWS = 64  # consecutive rows in the file from which reading beats mapping
_OPEN_MAPS = 64  # each keeps a file descriptor


@dataclass(frozen=True, slots=True)
class PartColumn:
    """One column of one part, as plain values."""

    path: str
    offset: int
    dtype: str
    rows: int
    nbytes: int
    crc32: int


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
    _maps: dict[int, npt.NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, column: str, parts: Sequence[PartInfo], part: npt.NDArray[Any], row: npt.NDArray[Any], *, width: int
    ) -> Self:
        """Builds the view from what ``KeyIndex.locate`` returned; keeps only the parts that are used."""
        used, renumbered = np.unique(part, return_inverse=True)
        columns = []
        for number in used:
            info = parts[number].columns[column]
            if info.shape[1] != width:
                raise StoreError(f"parts of {column} differ in width ({info.shape[1]} and {width}): featurepipe verify")
            place = parts[number].path, info.offset, info.dtype, parts[number].rows
            columns.append(PartColumn(*place, info.nbytes, info.crc32))
        return cls(column, width, tuple(columns), renumbered.reshape(-1).astype(np.uint32), row.astype(np.uint32))

    def __len__(self) -> int:
        return len(self.row)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds all parts' values exactly."""
        names = {part.dtype for part in self.parts} or {"<f4"}
        return np.result_type(*(np.dtype(name) for name in names)).newbyteorder("=")

    def take(self, positions: npt.NDArray[Any] | slice) -> ColumnRows:
        """Returns the view of some of the rows (positions, a boolean mask, or a slice)."""
        chosen = self.part[positions], self.row[positions]
        return ColumnRows(self.column, self.width, self.parts, *chosen, self._maps)  # mapping anew costs page faults

    def check(self) -> None:
        """Reads this column of every part concerned and compares the checksums.

        Raises:
            CorruptPart: The bytes of a part are not what was committed.
            StoreError: A part is gone.
        """
        for number in np.unique(self.part):
            part = self.parts[number]
            descriptor = _open(part)
            try:
                intact = crc32_of(descriptor, part.offset, part.nbytes) == part.crc32
            finally:
                os.close(descriptor)
            if not intact:
                path = Path(part.path)
                raise CorruptPart(
                    f"part {path.stem}: the bytes of {self.column} are not what was committed (checksum differs); "
                    f"run: featurepipe verify {path.parents[3]}, then extract again"
                )

    def read(self, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """Fetches all rows in order.

        Args:
            dtype: Of the result; by default that of the store.

        Returns:
            (n, D) array, newly allocated.

        Raises:
            StoreError: A part is gone or shorter than it was.
        """
        out = np.empty((len(self), self.width), self.dtype if dtype is None else dtype)
        for start, stop, neighbours in self._runs():
            if neighbours:
                self._read_run(self.parts[int(self.part[start])], int(self.row[start]), out[start:stop])
            else:
                self._gather(start, stop, out)
        return out

    def _runs(self) -> list[tuple[int, int, bool]]:
        """Cuts the rows into long runs of neighbours in one file (true), and the scattered stretches between them."""
        if not len(self):
            return []
        follows = (np.diff(self.part.astype(np.int64)) == 0) & (np.diff(self.row.astype(np.int64)) == 1)
        starts = np.concatenate([[0], np.flatnonzero(~follows) + 1])
        stops = np.concatenate([starts[1:], [len(self)]])
        long = stops - starts >= min(_RUN_ROWS, len(self))
        edges = np.unique(np.concatenate([[0, len(self)], starts[long], stops[long]]))
        return [(int(a), int(b), bool(follows[a : b - 1].all())) for a, b in itertools.pairwise(edges)]

    def _read_run(self, part: PartColumn, first: int, out: npt.NDArray[Any]) -> None:
        stored = np.dtype(part.dtype)
        row_bytes = self.width * stored.itemsize
        descriptor = _open(part)
        try:
            if out.dtype == stored:
                _read_into(descriptor, out, part.offset + first * row_bytes, part)
                return
            step = max(1, _BLOCK_BYTES // row_bytes)
            scratch = np.empty((min(step, len(out)), self.width), stored)
            for start in range(0, len(out), step):
                block = scratch[: min(step, len(out) - start)]
                _read_into(descriptor, block, part.offset + (first + start) * row_bytes, part)
                out[start : start + len(block)] = block
        finally:
            os.close(descriptor)

    def _gather(self, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        numbers = self.part[start:stop]
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number) + start
            rows = self._map(int(number))[self.row[where]]
            out[where] = rows

    def _map(self, number: int) -> npt.NDArray[Any]:
        mapped = self._maps.get(number)
        if mapped is None:
            part = self.parts[number]
            try:
                mapped = np.memmap(part.path, part.dtype, "r", part.offset, (part.rows, self.width)).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise _gone(part) from error
            for oldest in list(self._maps)[: max(0, len(self._maps) - _OPEN_MAPS + 1)]:
                self._maps.pop(oldest, None)  # another thread may have been here
            self._maps[number] = mapped
        return mapped


def _open(part: PartColumn) -> int:
    try:
        return os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _gone(part) from error


def _read_into(descriptor: int, block: npt.NDArray[Any], offset: int, part: PartColumn) -> None:
    content = memoryview(block.reshape(-1).view(np.uint8))
    while content:
        count = os.preadv(descriptor, [content], offset)
        if count == 0:
            raise _gone(part)
        content, offset = content[count:], offset + count


def _gone(part: PartColumn) -> StoreError:
    return StoreError(
        f"part {part.path} is gone or shorter than it was; if the store was compacted meanwhile, open the features "
        "again with store.features(...), else run: featurepipe verify STORE"
    )
