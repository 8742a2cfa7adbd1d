"""Rows of several columns side by side: several layers as one feature vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.store.rows import ColumnRows

Array = npt.NDArray[Any]
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
