"""Reading the bytes of one column of one part: from the file where rows are neighbours, through a map where not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import StoreError

_OPEN_MAPS = 64  # each keeps a file descriptor
_MAPPED_BYTES = 64 << 20  # of mapped files in memory: the system would keep every page ever touched
_FAULT_BYTES = 64 << 10  # the system maps this much around each page touched


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
        StoreError: It is gone.
    """
    try:
        return os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise gone(part) from error


def read_into(descriptor: int, block: npt.NDArray[Any], offset: int, part: PartColumn) -> None:
    """Fills a contiguous array with the bytes at ``offset``.

    Raises:
        StoreError: The part is shorter than it was.
    """
    content = memoryview(block.reshape(-1).view(np.uint8))
    while content:
        count = os.preadv(descriptor, [content], offset)
        if count == 0:
            raise gone(part)
        content, offset = content[count:], offset + count


def gone(part: PartColumn) -> StoreError:
    """Builds the error for a part that is not there any more."""
    return StoreError(
        f"part {part.path} is gone or shorter than it was; if the store was compacted meanwhile, open the features "
        "again with store.features(...), else run: featurepipe verify STORE"
    )


class PartMaps:
    """Mapped parts, opened when asked for; a pickle of it holds none.

    Mapped pages count as memory of the process for as long as the map lives, so the maps are dropped whenever about
    64 MB may have been touched, and made anew.
    """

    def __init__(self) -> None:
        self._maps: dict[PartColumn, npt.NDArray[Any]] = {}
        self._touched = 0

    def __reduce__(self) -> tuple[type[PartMaps], tuple[()]]:
        return PartMaps, ()

    def __len__(self) -> int:
        return len(self._maps)

    def rows(self, part: PartColumn, rows: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
        """Returns some rows, (n, width) in the stored dtype, newly allocated.

        Raises:
            StoreError: The part is gone.
        """
        out = np.empty((len(rows), width), part.dtype)
        cost = out.itemsize * width + _FAULT_BYTES
        step = max(1, _MAPPED_BYTES // cost)
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step]
            np.take(self._map(part, width), chosen, axis=0, out=out[start : start + step], mode="clip")
            self._count(len(chosen) * cost)
        return out

    def _count(self, touched: int) -> None:
        self._touched += touched
        if self._touched > _MAPPED_BYTES and sum(mapped.nbytes for mapped in list(self._maps.values())) > _MAPPED_BYTES:
            self._maps.clear()
            self._touched = 0

    def _map(self, part: PartColumn, width: int) -> npt.NDArray[Any]:
        mapped = self._maps.get(part)
        if mapped is None:
            try:
                mapped = np.memmap(part.path, part.dtype, "r", part.offset, (part.rows, width)).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise gone(part) from error
            for oldest in list(self._maps)[: max(0, len(self._maps) - _OPEN_MAPS + 1)]:
                self._maps.pop(oldest, None)  # another thread may have been here
            self._maps[part] = mapped
        return mapped
