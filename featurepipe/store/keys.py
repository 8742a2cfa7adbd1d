"""Keys as arrays: the SHA-256 of each image, 32 bytes a row, never a Python object a row."""

from __future__ import annotations

from collections.abc import Sequence
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
