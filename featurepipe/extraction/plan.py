"""What an extraction has to do, decided without touching an image: the listing joined with what the store knows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.backbones import Column
from featurepipe.errors import Reject
from featurepipe.features.options import RejectOptions
from featurepipe.images.decode import is_outdated, is_repaired
from featurepipe.store import Space
from featurepipe.store.keys import KEY_BYTES, KeyIndex, keys_from_arrow
from featurepipe.store.parts import PartInfo


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


_BY_DEFAULT = RejectOptions()


class MissingColumns:
    """Tells for a key which columns are still to be computed; the look-up of `plan.Keys`.

    Args:
        space: the feature space, for what it holds and what it rejected; None for one that does not exist yet.
        columns: the columns asked for.
        options: what becomes of rejects and of JPEGs that libjpeg could only repair. These are rejects unless they are kept,
            although an earlier run kept them and has left their features.

    Attributes:
        reasons: why bytes were rejected before, by key. Bytes with a feature are usable whatever was said of them once:
            they were tried again; unless they are damaged, which the store knows of features that were kept, too.
        damaged: what is wrong with bytes that are kept all the same, by key; none unless they are kept.
        indexes: of what is there, in which a column of a key may be found.
        claimed: keys that are being computed in this run.
    """

    def __init__(
        self,
        space: Space | None,
        columns: Sequence[Column],
        options: RejectOptions = _BY_DEFAULT,
    ) -> None:
        self._names = tuple(str(column) for column in columns)
        self.indexes: list[KeyIndex] = [] if space is None else [space.index(self._names)]
        told = {} if space is None else _told(space)
        damaged = {key: reason for key, reason in told.items() if is_repaired(reason)}
        usable = self._usable(list(told))
        self.damaged = damaged if options.keep_damaged else {}
        self.reasons = {
            key: reason
            for key, reason in told.items()
            if key not in self.damaged and (key in damaged if key in usable else not options.retry_rejects)
        }
        self._refused = KeySet(key for key in self.reasons if key in usable)
        self.claimed: set[bytes] = set()

    def of_shard(self, parts: Sequence[PartInfo]) -> MissingColumns:
        """The same for one shard of a run, of which some parts may be there already; with claims of its own."""
        other = copy.copy(self)
        other.claimed = set()
        other.indexes = [*self.indexes, KeyIndex(self._names, parts, on_damage=lambda _part, _error: None)]
        return other

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of some keys, uint8 (n, 32), have every column and are not rejects all the same: bool (n,)."""
        if len(self.indexes) == 1:
            held = self.indexes[0].contains(keys)
        else:
            held = np.logical_and.reduce([self.holds(keys, name) for name in self._names])
        return np.asarray(held & ~self._refused.contains(keys))

    def __call__(self, key: bytes) -> tuple[str, ...] | Reject:
        """The names of the missing columns, none when all are there, or the reject that these bytes were before."""
        if key in self.reasons:
            return Reject(self.reasons[key])
        if key in self.claimed:
            return ()
        row = np.frombuffer(key, dtype=np.uint8)[None]
        return tuple(name for name in self._names if not self.holds(row, name)[0])

    def holds(self, keys: np.ndarray, column: str) -> np.ndarray:
        """Which of some keys have a column: bool (n,)."""
        held = np.zeros(len(keys), bool)
        for index in self.indexes:
            held |= index.locate(keys, column)[2]
        return held

    def _usable(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of some keys that have a column."""
        if not keys:
            return set()
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        usable = np.logical_or.reduce([self.holds(rows, name) for name in self._names])
        return {key for key, has in zip(keys, usable, strict=True) if has}


def _told(space: Space) -> dict[bytes, str]:
    """What the space says of bytes that are no good, or that are kept although they are damaged, by key."""
    rejects = space.rejects()
    rejects = rejects.filter(rejects["key"].is_valid())
    pairs = zip(rejects["key"].to_pylist(), rejects["reason"].to_pylist(), strict=True)
    return {key: reason for key, reason in pairs if not is_outdated(reason)}
