"""Fetching scattered rows of one part: stretches of the file where many are wanted, through a map where few are."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.half import copy_into
from featurepipe.store.part_files import BLOCK_BYTES, PartColumn, gone, open_part, read_into

_DENSE = 8  # one row in so many is wanted: reading all of them beats touching the pages one by one
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
