"""What an extraction has to do, and what happened to each image since the last snapshot: from tables alone, no image is read.

Every listed image is of exactly one kind. A rejected one is ``corrupted`` (it was usable), ``still_rejected`` or
``new_rejected``. A usable one under an id of the last snapshot is ``repaired`` (it was rejected), ``changed`` (another
key), ``relabelled`` (another label or split), ``touched`` (another size or time) or ``unchanged``, the first that fits. A
usable one under a new id is judged by its key:

- ``moved`` if the last snapshot has it under ids that are gone: as many new ids have moved as ids are gone, in the listing's
  order, also where other ids with that key stay; the others are copies;
- ``copied`` if otherwise the key is under an id that both snapshots list, in either of them;
- ``new`` if no other image has or had it; of several new ids with one such key, the first is new and the others are copies.

An id that is gone counts as ``deleted`` unless an image has moved from it. So the counts balance: images listed before, less
``deleted``, plus ``new``, ``copied`` and ``new_rejected``, are the images listed now.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.backbones import Column
from featurepipe.errors import ForgottenBytes, Reject
from featurepipe.features.options import RejectOptions
from featurepipe.images.decode import is_outdated, is_repaired
from featurepipe.partitions import (
    Codes,
    Entries,
    bucket_count,
    bucketed,
    filtered,
    flatnonzero,
    index_in,
    is_large,
    part_of,
    partitions,
    take,
    zeros,
)
from featurepipe.store import Space
from featurepipe.store.forgotten import FILE, REASON, Forgotten
from featurepipe.store.keys import KEY_BYTES, KeyIndex, keys_from_arrow, keys_to_arrow, prefixes_of
from featurepipe.store.parts import PartInfo
from featurepipe.store.snapshots import OK


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
    read only when some requested column lacks that key. Everything else is read, and its key decides.

    Args:
        listing: what the source holds now.
        known_files: id, size, mtime_ns, key of files seen before; later rows win.
        have: the keys that have every requested column.
        rejected: the keys that were rejected.
    """
    keys, has_key = _keys_of_unchanged(listing, known_files)
    todo = zeros((len(keys),), np.bool_)
    refused = zeros((len(keys),), np.bool_)
    for part in partitions(len(keys)):
        known = np.flatnonzero(has_key[part])
        mine = keys[part][known]
        done = have.contains(mine)
        refused[part][known] = rejected.contains(mine) & ~done
        todo[part] = ~refused[part]
        todo[part][known[done]] = False
    return Plan(listing, keys, has_key, flatnonzero(todo), flatnonzero(refused))


def _keys_of_unchanged(listing: pa.Table, known_files: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    keys = zeros((listing.num_rows, KEY_BYTES), np.uint8)
    has_key = zeros((listing.num_rows,), np.bool_)
    if not listing.num_rows or not known_files.num_rows:
        return keys, has_key
    places = index_in(known_files["id"], listing["id"])
    for part in partitions(len(places)):
        listed = np.flatnonzero(places[part] >= 0)
        rows, files = places[part][listed], take(part_of(known_files, part), listed)
        same = np.ones(len(rows), np.bool_)
        for name in ("size", "mtime_ns"):
            then, now = files[name].to_numpy(), take(listing[name], rows).to_numpy()
            same &= (then == now) & (then >= 0)  # a source that cannot tell sizes or times cannot tell "unchanged"
        keys[rows[same]] = keys_from_arrow(files["key"])[same]  # of two notes on one file the later is written last
        has_key[rows[same]] = True
    return keys, has_key


_BY_DEFAULT = RejectOptions()


def forgotten_of(store: Path) -> Forgotten | None:
    """What must not be computed again; None in a store from which nothing was ever removed by name."""
    return Forgotten.of(store) if os.path.lexists(store / FILE) else None


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
        forgotten: bytes that must not be computed again (`featurepipe.store.forget`).
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
        self.forgotten = None if space is None else forgotten_of(space.path.parent.parent)
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
        if self.forgotten is not None and self.forgotten.has_key(key):
            return ForgottenBytes(REASON)
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


KINDS = (
    "unchanged",
    "touched",
    "relabelled",
    "new",
    "changed",
    "moved",
    "copied",
    "corrupted",
    "repaired",
    "still_rejected",
    "new_rejected",
)
DELETED = "deleted"

_JUDGED = ["key", "label", "split", "size", "mtime_ns", "status"]
_Mask = npt.NDArray[np.bool_]
_Rows = npt.NDArray[np.int64]
_KEYED = np.dtype([("row", np.int64), ("key", np.uint8, (KEY_BYTES,)), ("stays", np.bool_), ("fresh", np.bool_)])


def count_changes(last: pa.Table | None, new: pa.Table) -> dict[str, int]:
    """Counts the images of each kind, and those deleted.

    Args:
        last: the dataset's last snapshot, or None; `featurepipe.store.snapshots.SCHEMA`, without ``reason``.
        new: the snapshot of now.

    Returns:
        A count for each of ``KINDS`` and for ``deleted``; all but ``deleted`` add up to the rows of ``new``.
    """
    kinds, counts = kinds_of(last, new), np.zeros(len(KINDS), np.int64)
    for part in partitions(len(kinds)):
        counts += np.bincount(kinds[part], minlength=len(KINDS))
    by_name = dict(zip(KINDS, counts.tolist(), strict=True))
    appeared = by_name["new"] + by_name["copied"] + by_name["new_rejected"]
    by_name[DELETED] = (0 if last is None else last.num_rows) + appeared - new.num_rows
    return by_name


def kinds_of(last: pa.Table | None, new: pa.Table) -> npt.NDArray[np.int8]:
    """Says of each row of ``new`` what it is, as its place in ``KINDS``: int8 (rows,). Arguments as `count_changes`."""
    last = new.slice(0, 0) if last is None else last
    before, kinds = index_in(new["id"], last["id"]), zeros((new.num_rows,), np.int8)
    are_new = zeros((new.num_rows,), np.bool_)
    for part in partitions(new.num_rows):
        now = part_of(new.select(_JUDGED), part)
        known = np.flatnonzero(before[part] >= 0)
        kinds[part][known] = _kinds_of_known(_rows(last, before[part][known]), _rows(now, known))
        rejected = (before[part] < 0) & ~_usable(now)
        kinds[part][rejected] = KINDS.index("new_rejected")
        are_new[part] = (before[part] < 0) & ~rejected
    if are_new.any():
        _judge_fresh(kinds, last["key"], new["key"], before, are_new)
    return kinds


def still_rejected(last: pa.Table | None, new: pa.Table) -> set[str]:
    """The ids of rejects that the last snapshot has as rejects, too, and whose bytes have not changed.

    Args:
        last: the dataset's last snapshot, or None.
        new: the snapshot of now.
    """
    if last is None:
        return set()
    before, now = (
        filtered(table.select(["id", "key", "status"]), lambda rows: pa.array(~_usable(rows))) for table in (last, new)
    )
    pairs = [set(zip(each["id"].to_pylist(), each["key"].to_pylist(), strict=True)) for each in (before, now)]
    return {id_ for id_, _ in pairs[0] & pairs[1]}


def _rows(table: pa.Table, rows: _Rows) -> pa.Table:
    """Some rows of what is judged; the table itself where those are all of them, in their order."""
    judged = table.select(_JUDGED)
    is_all = len(rows) == table.num_rows and np.array_equal(rows, np.arange(len(rows)))
    return judged if is_all else take(judged, rows)


def _kinds_of_known(then: pa.Table, now: pa.Table) -> npt.NDArray[np.int8]:
    """Kinds of images that both snapshots list, row by row."""
    was_usable, usable = _usable(then), _usable(now)
    return np.select(
        [
            ~usable & was_usable,
            ~usable,
            ~was_usable,
            _differ(then, now, "key"),
            _differ(then, now, "label") | _differ(then, now, "split"),
            _differ(then, now, "size") | _differ(then, now, "mtime_ns"),
        ],
        [KINDS.index(name) for name in ("corrupted", "still_rejected", "repaired", "changed", "relabelled", "touched")],
        KINDS.index("unchanged"),
    ).astype(np.int8)


def _judge_fresh(
    kinds: npt.NDArray[np.int8], last: pa.ChunkedArray, new: pa.ChunkedArray, before: _Rows, are_new: _Mask
) -> None:
    """Enters the kinds of usable images under new ids.

    Equal keys are looked at together: all at once, or if there are many, one range of keys after the other.

    Args:
        kinds: int8, of all rows of ``new``.
        last: keys of the last snapshot.
        new: keys of the snapshot of now.
        before: the row of each row of ``new`` in ``last``, or -1.
        are_new: which rows of ``new`` are meant.
    """
    stays, are_known = zeros((len(last),), np.bool_), zeros((len(new),), np.bool_)
    for part in partitions(len(before)):
        are_known[part] = before[part] >= 0
        stays[before[part][are_known[part]]] = True
    rows = flatnonzero(are_new)
    wanted = None if is_large(len(rows)) else take(new, rows)
    buckets = bucket_count(max(len(last), len(new))) if wanted is None else 1
    sides = (
        bucketed(_keyed(keys, wanted, stay, fresh), len(keys), buckets, _KEYED)
        for keys, stay, fresh in ((last, stays, stays), (new, are_known, are_new))
    )
    for (then, _), (now, _) in zip(*sides, strict=True):
        mine, known = now[now["fresh"]], now[now["stays"]]
        kinds[mine["row"]] = _kinds_of_fresh(then["key"], then["stays"], known["key"], mine["key"])


def _keyed(
    keys: pa.ChunkedArray, wanted: pa.ChunkedArray | None, stays: _Mask, fresh: _Mask
) -> Iterator[tuple[Entries, Codes]]:
    """The rows that have a key, or one of those wanted, and what their keys begin with.

    Args:
        keys: of a snapshot.
        wanted: some of them, or None for all.
        stays: which rows have an id that the other snapshot has, too.
        fresh: which rows are usable images under new ids.
    """
    for part in partitions(len(keys)):
        some = part_of(keys, part)
        mask = some.is_valid() if wanted is None else pc.and_(some.is_valid(), pc.is_in(some, value_set=wanted))
        rows, found = np.flatnonzero(mask), keys_from_arrow(some.filter(mask))
        entries = np.empty(len(rows), _KEYED)
        entries["row"], entries["key"] = rows + part.start, found
        entries["stays"], entries["fresh"] = stays[part][rows], fresh[part][rows]
        yield entries, prefixes_of(found)


def _kinds_of_fresh(last: np.ndarray, stays: _Mask, known: np.ndarray, fresh: np.ndarray) -> npt.NDArray[np.int8]:
    """Kinds of usable images under new ids, from keys (n, 32).

    Args:
        last: of the last snapshot.
        stays: which of those are of ids that are listed now, too.
        known: of images under ids that the last snapshot lists.
        fresh: of those under new ids, in their order.
    """
    codes = keys_to_arrow(np.concatenate([last, known, fresh])).dictionary_encode()
    numbers = codes.indices.to_numpy().astype(np.int64)
    then, now, mine = np.split(numbers, [len(last), len(last) + len(known)])
    elsewhere = np.zeros(len(codes.dictionary), np.bool_)
    elsewhere[then[stays]] = True
    elsewhere[now] = True
    gone = np.bincount(then[~stays], minlength=len(codes.dictionary))
    place = _occurrence(mine)
    return np.select(
        [place < gone[mine], elsewhere[mine], (place == 0) & (gone[mine] == 0)],
        [KINDS.index(name) for name in ("moved", "copied", "new")],
        KINDS.index("copied"),
    ).astype(np.int8)


def _occurrence(values: _Rows) -> _Rows:
    """For each value how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(values)])
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return place


def _usable(table: pa.Table) -> _Mask:
    return np.asarray(pc.equal(table["status"], OK).to_numpy())


def _differ(then: pa.Table, now: pa.Table, column: str) -> _Mask:
    """Where two columns differ; two nulls do not, a null and a value do."""
    a, b = then[column], now[column]
    either = pc.xor(a.is_null(), b.is_null())
    differ = pc.or_(either, pc.fill_null(pc.not_equal(a, b), fill_value=False))
    return np.asarray(differ.to_numpy())
