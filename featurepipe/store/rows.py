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
from featurepipe.half import copy_into
from featurepipe.store.gathering import PartMaps, gather
from featurepipe.store.part_files import BLOCK_BYTES, PartColumn, open_part, read_into
from featurepipe.store.parts import PartInfo, crc32_of

_RUN_ROWS = 64  # consecutive rows in the file from which they are read straight into their place

Array = npt.NDArray[Any]


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
        """Reads this column of every part concerned and compares the checksums.

        Raises:
            CorruptPart: The bytes of a part are not what was committed.
            StoreError: A part is gone.
        """
        for number in np.unique(self.part):
            part = self.parts[number]
            descriptor = open_part(part)
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
