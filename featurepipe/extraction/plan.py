"""What an extraction has to do, decided without touching an image: the listing joined with what the store knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.store.keys import KEY_BYTES, keys_from_arrow


class Keys(Protocol):
    """Anything that can tell which keys it holds, such as the store's `KeyIndex`."""

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Boolean (n,) for uint8 keys (n, 32)."""
        ...


class KeySet:
    """A small set of keys with the look-up of `Keys`; an empty one stands for a space that does not exist yet."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self._keys = frozenset(keys)
        self._prefixes = np.array([int.from_bytes(key[:8], "little") for key in self._keys], dtype="<u8")

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Boolean (n,) for uint8 keys (n, 32)."""
        found = np.isin(np.ascontiguousarray(keys[:, :8]).view("<u8").ravel(), self._prefixes)
        for row in np.flatnonzero(found):
            found[row] = keys[row].tobytes() in self._keys
        return found


@dataclass(frozen=True)
class Plan:
    """What to do with each row of a listing.

    Attributes:
        listing: the source's listing, `featurepipe.images.listing.SCHEMA`.
        keys: uint8 (rows, 32), the key of each file whose id, size and time are unchanged; zeros elsewhere.
        has_key: bool (rows,), which rows of ``keys`` are filled.
        todo: int64, the rows to read, in the listing's order.
        rejected: int64, the rows that were rejected before and whose bytes have not changed.
    """

    listing: pa.Table
    keys: np.ndarray
    has_key: np.ndarray
    todo: np.ndarray
    rejected: np.ndarray

    @property
    def known(self) -> int:
        """How many rows need nothing: their features are in the store."""
        return len(self.keys) - len(self.todo) - len(self.rejected)


def make_plan(listing: pa.Table, known_files: pa.Table, have: Keys, rejected: Keys) -> Plan:
    """Decides which images must be read.

    A file whose id, size and modification time are as before is taken to have the same bytes (and so the same key); it is
    read only when some wanted column lacks that key. Everything else is read, and its key decides.

    Args:
        listing: what the source holds now.
        known_files: id, size, mtime_ns, key of files seen before; later rows win.
        have: the keys that have every wanted column.
        rejected: the keys that were rejected.
    """
    keys, has_key = _keys_of_unchanged(listing, known_files)
    done = np.zeros(len(keys), dtype=bool)
    refused = np.zeros(len(keys), dtype=bool)
    done[has_key] = have.contains(keys[has_key])
    refused[has_key] = rejected.contains(keys[has_key])
    refused &= ~done
    return Plan(listing, keys, has_key, np.flatnonzero(~done & ~refused), np.flatnonzero(refused))


def _keys_of_unchanged(listing: pa.Table, known_files: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    keys = np.zeros((listing.num_rows, KEY_BYTES), dtype=np.uint8)
    has_key = np.zeros(listing.num_rows, dtype=bool)
    if not listing.num_rows or not known_files.num_rows:
        return keys, has_key
    rows = _rows_of(known_files["id"], listing["id"])
    same = rows >= 0
    for name in ("size", "mtime_ns"):
        then, now = known_files[name].to_numpy(), listing[name].to_numpy()
        same &= (then == now[rows]) & (then >= 0)  # a source that cannot tell sizes or times cannot tell "unchanged"
    keys[rows[same]] = keys_from_arrow(known_files["key"])[same]  # of two notes on one file the later is written last
    has_key[rows[same]] = True
    return keys, has_key


def _rows_of(ids: pa.ChunkedArray, listed: pa.ChunkedArray) -> np.ndarray:
    """The row of each id among those listed, or -1: int64, as long as ``ids``."""
    if ids.equals(listed):  # nearly every night of a large pile
        return np.arange(len(ids))
    return np.asarray(pc.fill_null(pc.index_in(ids, value_set=listed), -1).to_numpy(), np.int64)
