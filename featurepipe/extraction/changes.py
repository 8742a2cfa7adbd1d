"""What happened to each image since the last snapshot, from the two snapshots alone: Arrow and NumPy, no I/O.

Every listed image is of exactly one kind. A rejected one is ``corrupted`` (it was usable), ``still_rejected`` or
``new_rejected``. A usable one under an id of the last snapshot is ``repaired`` (it was rejected), ``changed`` (another
key), ``relabelled`` (another label or split), ``touched`` (another size or time) or ``unchanged``, the first that fits. A
usable one under a new id is judged by its key:

- ``copied`` if the key is under an id that both snapshots list, in either of them;
- ``moved`` if otherwise the last snapshot has it, under ids that are gone: as many new ids have moved as ids are gone, in
  the listing's order, and the others are copies;
- ``new`` if no other image has or had it; of several new ids with one such key, the first is new and the others are copies.

An id that is gone counts as ``deleted`` unless an image has moved from it. So the books balance: images listed before, less
``deleted``, plus ``new``, ``copied`` and ``new_rejected``, are the images listed now.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.store.snapshots import OK

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


def count_changes(last: pa.Table | None, new: pa.Table) -> dict[str, int]:
    """Counts the images of each kind, and those deleted.

    Args:
        last: the dataset's last snapshot, or None; `featurepipe.store.snapshots.SCHEMA`, without ``reason``.
        new: the snapshot of now.

    Returns:
        A count for each of ``KINDS`` and for ``deleted``; all but ``deleted`` add up to the rows of ``new``.
    """
    counts = np.bincount(kinds_of(last, new), minlength=len(KINDS)).tolist()
    by_name = dict(zip(KINDS, counts, strict=True))
    appeared = by_name["new"] + by_name["copied"] + by_name["new_rejected"]
    by_name[DELETED] = (0 if last is None else last.num_rows) + appeared - new.num_rows
    return by_name


def kinds_of(last: pa.Table | None, new: pa.Table) -> npt.NDArray[np.int8]:
    """Says of each row of ``new`` what it is, as its place in ``KINDS``: int8 (rows,). Arguments as `count_changes`."""
    last = new.slice(0, 0) if last is None else last
    before = _rows_before(last, new)
    kinds = np.zeros(new.num_rows, np.int8)
    known = np.flatnonzero(before >= 0)
    kinds[known] = _kinds_of_known(_rows(last, before[known]), _rows(new, known))
    fresh = np.flatnonzero(before < 0)
    rejected = ~_usable(_rows(new, fresh))
    kinds[fresh[rejected]] = KINDS.index("new_rejected")
    fresh = fresh[~rejected]
    if len(fresh):
        kinds[fresh] = _kinds_of_fresh(last, new, before, fresh)
    return kinds


def _rows(table: pa.Table, rows: _Rows) -> pa.Table:
    """Some rows of what is judged; the table itself where those are all of them, in their order."""
    judged = table.select(_JUDGED)
    is_all = len(rows) == table.num_rows and np.array_equal(rows, np.arange(len(rows)))
    return judged if is_all else judged.take(pa.array(rows))


def _rows_before(last: pa.Table, new: pa.Table) -> _Rows:
    """The row of each of ``new``'s ids in ``last``, or -1."""
    if last["id"].equals(new["id"]):  # nearly every night of a large pile
        return np.arange(new.num_rows)
    found = pc.index_in(new["id"], value_set=last["id"])
    return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)


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


def _kinds_of_fresh(last: pa.Table, new: pa.Table, before: _Rows, fresh: _Rows) -> npt.NDArray[np.int8]:
    """Kinds of usable images under new ids: ``fresh`` are their rows, ``before`` is of all rows of ``new``."""
    keys = _numbered(last["key"], new["key"])
    stays = np.zeros(last.num_rows, np.bool_)
    stays[before[before >= 0]] = True
    elsewhere = np.zeros(keys.different, np.bool_)
    elsewhere[_present(keys.last[stays])] = True
    elsewhere[_present(keys.new[before >= 0])] = True
    gone = np.bincount(_present(keys.last[~stays]), minlength=keys.different)
    mine = keys.new[fresh]
    place = _occurrence(mine)
    return np.select(
        [elsewhere[mine], place < gone[mine], (place == 0) & (gone[mine] == 0)],
        [KINDS.index(name) for name in ("copied", "moved", "new")],
        KINDS.index("copied"),
    ).astype(np.int8)


class _Numbered(NamedTuple):
    """The keys of two snapshots as small numbers: equal keys have equal numbers, rows without a key -1."""

    last: _Rows
    new: _Rows
    different: int


def _numbered(last: pa.ChunkedArray, new: pa.ChunkedArray) -> _Numbered:
    codes = pa.chunked_array([*last.chunks, *new.chunks], new.type).combine_chunks().dictionary_encode()
    numbers = pc.fill_null(codes.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return _Numbered(numbers[: len(last)], numbers[len(last) :], len(codes.dictionary))


def _present(numbers: _Rows) -> _Rows:
    return numbers[numbers >= 0]


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
