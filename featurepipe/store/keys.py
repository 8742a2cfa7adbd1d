"""Keys of images: the SHA-256 of each as a row of 32 bytes, never a Python object a row, and lookup among many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.errors import UsageError

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
_SMALL_ROWS = 2**32


@dataclass(frozen=True, slots=True)
class SortedKeys:
    """Keys in the order given, and the order of their first 8 bytes: 44 bytes a row, 60 while they are sorted.

    Attributes:
        keys: (n, 32) uint8, as given.
        prefixes: Their first 8 bytes as numbers, sorted.
        order: The row in ``keys`` of each prefix.
    """

    keys: Keys
    prefixes: npt.NDArray[np.uint64]
    order: npt.NDArray[np.unsignedinteger]

    @classmethod
    def of_keys(cls, keys: Keys) -> SortedKeys:
        """Sorts keys, which are kept and must not be changed afterwards."""
        prefixes = prefixes_of(keys)
        order = np.argsort(prefixes, kind="stable")  # stable: of several copies the first one is found
        return cls(keys, prefixes[order], order.astype(np.uint32 if len(keys) < _SMALL_ROWS else np.uint64))

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.prefixes.nbytes + self.keys.nbytes + self.order.nbytes

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Returns the first row that holds each key, all 32 bytes compared; -1 where none does."""
        found = np.empty(len(keys), np.int64)
        for start in range(0, len(keys), _BLOCK):
            found[start : start + _BLOCK] = self._find_block(keys[start : start + _BLOCK])
        return found

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tells which keys are held."""
        return self.find(keys) >= 0

    def _find_block(self, keys: Keys) -> npt.NDArray[np.int64]:
        prefixes = prefixes_of(keys)
        open_ = np.argsort(prefixes)  # searched in order, neighbours need the same pages: five times as fast
        position = np.searchsorted(self.prefixes, prefixes[open_])
        held, wanted = _words(self.keys), _words(keys)
        found = np.full(len(keys), -1, np.int64)
        while len(open_):
            inside = position < len(self.prefixes)
            inside[inside] = self.prefixes[position[inside]] == prefixes[open_[inside]]
            open_, position = open_[inside], position[inside]
            row = self.order[position]
            equal = (held[row] == wanted[open_]).all(axis=1)
            found[open_[equal]] = row[equal]
            open_, position = open_[~equal], position[~equal] + 1  # same first 8 bytes, another key: try the next row
        return found


def count_distinct(keys: Keys) -> int:
    """Counts how many different keys there are, in a third of the memory that hashing them takes."""
    return int(np.count_nonzero(SortedKeys.of_keys(keys).find(keys) == np.arange(len(keys))))


def prefixes_of(keys: Keys) -> npt.NDArray[np.uint64]:
    """Returns the first 8 bytes of each key as a number; which order they have does not matter."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


def _words(keys: Keys) -> npt.NDArray[np.uint64]:
    return as_keys(keys).view(np.uint64).reshape(-1, KEY_BYTES // 8)
