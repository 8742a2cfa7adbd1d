"""Forgetting images: their rows, names and keys leave a store for good, which is then read back to prove it.

What is to go is written down first (``forgetting.json``), and every step may be done again, so that the next call finishes what a
killed one began. Parts are rewritten as `featurepipe.store.compact` does; snapshots, rejects and records keep all other images.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurepipe.display import first_names
from featurepipe.errors import CorruptPart, StoreError, UsageError, nearest, unknown
from featurepipe.store.atomic import (
    atomic_file,
    entries,
    is_file,
    is_temporary,
    listed,
    read_lines,
    refuse_strangers,
    sync_folder,
    walked,
    write_json,
)
from featurepipe.store.compact import rewrite_parts
from featurepipe.store.documents import ForgettingDocument, checked_dataset, read_document
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.forgotten import JOURNAL, Forgotten
from featurepipe.store.gc import is_alive
from featurepipe.store.keys import SortedKeys, as_keys, keys_from_arrow, reject_of
from featurepipe.store.options import RemovalOptions
from featurepipe.store.parts import damaged_arrays, read_array, read_ids, read_part
from featurepipe.store.snapshots import replace_snapshot
from featurepipe.store.traces import Needles, Removal, strike_documents, traces

INDEXES = "indexes"
_NAMED = 20


@dataclass
class ForgetReport:
    """What ``forget_images`` did, or would do.

    Attributes:
        dataset: Whose images.
        images: How many ids were asked for.
        known: How many of them the store had something of.
        unknown: How many of them are nowhere in it and were not forgotten before, where those are no error.
        unknown_ids: Some of these, at most 20.
        keys: Different bytes that went with them.
        rows_dropped: Rows that went from parts.
        parts_rewritten: Parts without these rows now.
        parts_removed: Damaged and quarantined parts that held some of them, or of which nobody can tell; their other rows are
            computed again by the next extraction.
        snapshots_rewritten: Of the dataset, earlier ones too.
        rejects_removed: Lines of rejects.
        documents_rewritten: Run records and findings that named some of them.
        indexes_removed: Index files; each is built anew when it is next asked for.
        kept_for: Other ids that have the same bytes and were not forgotten, so that the rows stay, without a name: ``dataset``
            and ``id`` of each, at most 20.
        kept_keys: How many different bytes stay for such ids.
        finished: Images of an earlier call, killed meanwhile, that this one has finished.
        unfinished: (Of a dry run) those that it would finish.
        refused: Whether the next extractions refuse these images.
        searched_files: Read back afterwards.
        searched_bytes: In them.
        left: Where something of them still is: files that are not the store's own, which nobody may change but their owner.
        linked: Parts that went and have another name (a hard link), such as in a backup on the same disk, where they still are.
        alike: Rows of other images that have the same values, such as the same picture saved anew; they stay.
        unsearched: Names so short or common that text is not searched for them, only what is a name.
    """

    dataset: str = ""
    images: int = 0
    known: int = 0
    unknown: int = 0
    unknown_ids: list[str] = field(default_factory=list)
    keys: int = 0
    rows_dropped: int = 0
    parts_rewritten: int = 0
    parts_removed: list[str] = field(default_factory=list)
    snapshots_rewritten: int = 0
    rejects_removed: int = 0
    documents_rewritten: int = 0
    indexes_removed: int = 0
    kept_for: list[dict[str, str]] = field(default_factory=list)
    kept_keys: int = 0
    finished: int = 0
    unfinished: int = 0
    refused: bool = True
    searched_files: int = 0
    searched_bytes: int = 0
    left: list[str] = field(default_factory=list)
    linked: int = 0
    alike: int = 0
    unsearched: list[str] = field(default_factory=list)


def forget_images(
    store: FeatureStore,
    ids: Iterable[str] = (),
    *,
    dataset: str | None = None,
    may_come_back: bool = False,
    dry_run: bool = False,
    unknown_ok: bool = False,
    before: Callable[[Removal], object] = lambda _order: None,
    silent: bool = True,
) -> ForgetReport:
    """Removes images from a store: rows of parts, of all snapshots, rejects, quarantined parts, indexes, names in records.

    Their keys are removed as well, whatever bytes they had in the past. Rows stay only for other ids with the same bytes, and
    lose the id. The next extractions refuse the images, by salted hashes of ids and keys. Takes the store's lock alone; may be
    killed at any moment: the next call (of whatever ids, or none) finishes it first.

    Args:
        store: The store.
        ids: The images; none to finish what a killed call began.
        dataset: Whose ids they are; by default the store's only dataset.
        may_come_back: Do not refuse them in the next extractions, and no longer those that were.
        dry_run: Only say what would go.
        unknown_ok: Ids that are nowhere in the store are no error: they are counted, and refused later as the others are.
        before: Called with each order before anything of it is changed: afterwards nobody knows the keys. What it raises keeps
            the order from being carried out.
        silent: Show no progress while the store is read back.

    Returns:
        What went, and what the search found afterwards.

    Raises:
        UsageError: An id is nowhere in the store, and ``unknown_ok`` is false; nothing is changed.
        StoreLocked: Someone is writing into the store.
        StoreError: A snapshot or record cannot be read, so nobody knows whether it names them; nothing is changed.
        DiskFull: No space for a rewritten part; call again to go on.
    """
    wanted = tuple(dict.fromkeys(ids))
    asked = RemovalOptions(dataset=dataset, may_come_back=may_come_back, dry_run=dry_run)
    store.check_exists()
    with store.lock(shared=False):
        refuse_strangers(store.path)
        pending = _pending(store)
        report = ForgetReport(refused=not may_come_back)
        if pending is not None and dry_run:
            report.unfinished = len(pending.ids)
        elif pending is not None:
            before(pending)
            carry_out(store, pending, report, silent=silent)
            report.finished = len(pending.ids)
        elif not wanted:
            raise UsageError("no image to forget: give ids; no earlier call was killed that could be finished")
        if wanted:
            order = make_order(store, wanted, asked, report, unknown_ok=unknown_ok)
            before(order)
            if not dry_run:
                strike_documents(store.path, order, dry_run=True)  # raises before anything is changed
                write_json(store.path / JOURNAL, _journal(order))
            carry_out(store, order, report, dry_run=dry_run, silent=silent)
    return report


def is_unfinished(store: FeatureStore) -> bool:
    """Tells whether a call was killed that the next one finishes."""
    return is_file(store.path / JOURNAL)


def held_ids(store: FeatureStore, ids: Iterable[str], dataset: str) -> frozenset[str]:
    """The ids that the store has something of: a row of a snapshot or part of the dataset, or a reject. Takes no lock."""
    return frozenset(_keys_of(store, Removal(dataset, tuple(ids)))[1])


def _pending(store: FeatureStore) -> Removal | None:
    """What a killed call has not finished."""
    path = store.path / JOURNAL
    if not is_unfinished(store):
        return None
    record = read_document(path, ForgettingDocument)
    ids, keys, kept = (tuple(record[name]) for name in ("ids", "keys", "kept"))
    pairs = tuple((id_, key) for id_, key in record["pairs"])
    return Removal(record["dataset"], ids, keys, kept, pairs, come_back=record["come_back"])


def _journal(order: Removal) -> dict[str, Any]:
    texts = {name: list(getattr(order, name)) for name in ("ids", "keys", "kept")}
    pairs = [list(pair) for pair in order.pairs]
    return {"dataset": order.dataset, **texts, "pairs": pairs, "come_back": order.come_back}


# What is to go


def make_order(
    store: FeatureStore, ids: Sequence[str], asked: RemovalOptions, report: ForgetReport, *, unknown_ok: bool = False
) -> Removal:
    """Finds all keys that the images ever had, and who else has them.

    Raises:
        UsageError: An id is nowhere, and ``unknown_ok`` is false.
    """
    dataset = checked_dataset(asked.dataset) if asked.dataset else store.only_dataset()
    bare = Removal(dataset, tuple(ids))
    pairs, found = _keys_of(store, bare)
    before = Forgotten.of(store.path)
    unknown = [id_ for id_ in ids if id_ not in found]
    again = dict(zip(unknown, before.has_ids(dataset, unknown), strict=True))
    strange = [id_ for id_ in unknown if not again[id_]]
    if strange and not unknown_ok:
        raise _nowhere(store, dataset, strange)
    keys = sorted({key for _, key in pairs})
    others = _others(store, bare, keys)
    kept = sorted(others)
    report.dataset, report.images, report.known = dataset, len(ids), len(found)
    report.unknown, report.unknown_ids = len(strange), strange[:_NAMED]
    report.kept_keys = len(kept)
    shown = sorted({place for places in others.values() for place in places})
    report.kept_for = [{"dataset": name, "id": id_} for name, id_ in shown[:_NAMED]]
    going = tuple(key.hex() for key in keys if key not in others)
    report.keys = len(going)
    refused = tuple((id_, key.hex()) for id_, key in sorted(pairs) if key not in others)
    refused += tuple((id_, "") for id_ in ids)
    keeps = tuple(key.hex() for key in kept)
    return Removal(dataset, tuple(ids), going, keeps, refused, come_back=asked.may_come_back, known=len(found))


def _nowhere(store: FeatureStore, dataset: str, ids: Sequence[str]) -> UsageError:
    if dataset not in (known := store.datasets()):
        return unknown("dataset", dataset, known, where=str(store.path))
    table = store.snapshot(dataset, columns=["id"])
    near = nearest(ids[0], table["id"].to_pylist()[:100_000]) if table is not None else []
    hint = f"; nearest to {ids[0]!r}: {', '.join(near)}" if near else ""
    return UsageError(
        f"{len(ids):,} of the ids are nowhere in dataset {dataset} (no snapshot, part or reject names them): "
        f"{first_names(ids, 5)}{hint}. Nothing was forgotten; mend or remove them"
    )


def _keys_of(store: FeatureStore, order: Removal) -> tuple[set[tuple[str, bytes]], set[str]]:
    """Each id with each key that it ever had, and the ids that are anywhere."""
    pairs: set[tuple[str, bytes]] = set()
    found: set[str] = set()
    for _, table in _snapshots(store, order.dataset):
        mine = table.filter(pa.array(order.are_named(table["id"])))
        found.update(mine["id"].to_pylist())
        pairs.update(_pairs(mine["id"].to_pylist(), mine["key"].to_pylist()))
    for path in listed(store.path, "spaces/*/parts/*.h5"):
        with suppress(StoreError):  # of a damaged part nobody can tell: it goes as a whole
            part = read_part(path)
            if order.is_of(part.dataset):
                ids, keys = read_ids(part), read_array(part, "key")
                mask = order.are_named(ids)
                names = ids.filter(pa.array(mask)).to_pylist()
                found.update(names)
                pairs.update(_pairs(names, [key.tobytes() for key in keys[mask]]))
    for path in listed(store.path, "spaces/*/rejects.jsonl"):
        for _, line in read_lines(path):
            reject = reject_of(line)
            if reject is not None and reject["id"] in order.names and order.is_of(reject.get("dataset", "")):
                found.add(reject["id"])
                pairs.update(_pairs([reject["id"]], [reject["key"]]))
    return pairs, found


def _pairs(ids: Sequence[str], keys: Sequence[bytes | None]) -> Iterator[tuple[str, bytes]]:
    return ((id_, bytes(key)) for id_, key in zip(ids, keys, strict=True) if key is not None)


def _others(store: FeatureStore, order: Removal, keys: Sequence[bytes]) -> dict[bytes, set[tuple[str, str]]]:
    """The keys that other images have or had, with their dataset and id."""
    wanted = SortedKeys(as_keys(list(keys)))
    places: dict[bytes, set[tuple[str, str]]] = {}
    for dataset in store.datasets():
        for _, table in _snapshots(store, dataset):
            usable = table.filter(table["key"].is_valid())
            same = usable.filter(pa.array(wanted.contains(keys_from_arrow(usable["key"]))))
            for id_, key in zip(same["id"].to_pylist(), same["key"].to_pylist(), strict=True):
                if dataset != order.dataset or id_ not in order.names:
                    places.setdefault(key, set()).add((dataset, id_))
    return places


def _snapshots(store: FeatureStore, dataset: str) -> Iterator[tuple[str, pa.Table]]:
    """Each snapshot of a dataset with its ids and keys; a file that several nights share, once."""
    read: set[int] = set()
    for run_id in store.snapshot_ids(dataset):
        file = (store.path / "snapshots" / dataset / f"{run_id}.parquet").lstat().st_ino
        if file not in read:
            read.add(file)
            table = store.snapshot(dataset, run_id, columns=["id", "key"])
            if table is not None:
                yield run_id, table.combine_chunks()


# Its removal


def carry_out(
    store: FeatureStore, order: Removal, report: ForgetReport, *, dry_run: bool = False, silent: bool = True
) -> None:
    """Removes all of an order, reads the store back, and lets the journal go; may be done again after a kill."""
    if not dry_run:
        _refuse_later(store, order)
    needles = Needles(order)
    report.snapshots_rewritten += _rewrite_snapshots(store, order, dry_run=dry_run)
    for folder in [Path(entry.path) for entry in entries(store.path / "spaces") if entry.is_dir(follow_symlinks=False)]:
        for path in listed(folder, "parts/*.h5"):
            _rewrite_part(store, path, order, report, needles, dry_run=dry_run)
        for path in listed(folder, "quarantine/*.h5"):
            _remove_quarantined(store, path, order, report, dry_run=dry_run)
        report.rejects_removed += _rewrite_rejects(folder / "rejects.jsonl", order, dry_run=dry_run)
    report.documents_rewritten += strike_documents(store.path, order, dry_run=dry_run)
    report.indexes_removed += _remove_indexes(store.path / INDEXES, dry_run=dry_run)
    if dry_run:
        return
    _remove_temporaries(store.path)
    found = traces(store.path, order, needles, passed_over=(JOURNAL,), silent=silent)
    report.searched_files, report.searched_bytes = found.files, found.bytes
    report.left, report.alike = found.places, found.alike
    report.unsearched = [id_ for id_ in order.ids if id_ not in set(order.searchable)][:_NAMED]
    (store.path / JOURNAL).unlink(missing_ok=True)
    sync_folder(store.path)


def _refuse_later(store: FeatureStore, order: Removal) -> None:
    """Puts the images on the list of those that extractions refuse, or takes them off it."""
    before = Forgotten.of(store.path)
    if order.come_back:
        after = before.without_images(order.dataset, order.ids)
    else:
        keys_of: dict[str, list[bytes]] = {}
        for id_, key in order.pairs:
            keys_of.setdefault(id_, []).extend([bytes.fromhex(key)] if key else [])
        after = before.with_images(order.dataset, keys_of)
    if after.images != before.images:
        after.write(store.path)


def _rewrite_snapshots(store: FeatureStore, order: Removal, *, dry_run: bool) -> int:
    folder, count, sound = store.path / "snapshots", 0, set()
    for run_id in store.snapshot_ids(order.dataset):
        path = folder / order.dataset / f"{run_id}.parquet"
        file = path.lstat().st_ino
        if file in sound:
            continue
        table = store.snapshot(order.dataset, run_id, columns=["id"])
        named = np.zeros(0, bool) if table is None else order.are_named(table["id"])
        if not named.any():
            sound.add(file)
            continue
        count += 1
        if not dry_run:
            replace_snapshot(folder, order.dataset, run_id, pa.array(~named))
    return count


def _rewrite_part(
    store: FeatureStore, path: Path, order: Removal, report: ForgetReport, needles: Needles, *, dry_run: bool
) -> None:
    try:
        part = read_part(path)
        gone, nameless = order.masks(part)
    except CorruptPart:
        _remove_part(store, path, report, dry_run=dry_run)
        return
    if not (gone.any() or nameless.any()):
        return
    if damaged_arrays(part):  # damage is never copied into a fresh part
        _remove_part(store, path, report, dry_run=dry_run)
        return
    report.rows_dropped += int(gone.sum())
    report.parts_rewritten += 1
    report.linked += int(path.lstat().st_nlink > 1)
    if not dry_run:
        needles.add_rows(part, gone)
        rewrite_parts(path.parent, [part], [~gone], nameless=[nameless])


def _remove_part(store: FeatureStore, path: Path, report: ForgetReport, *, dry_run: bool) -> None:
    report.parts_removed.append(str(path.relative_to(store.path)))
    report.linked += int(path.lstat().st_nlink > 1)
    if not dry_run:
        path.unlink()
        sync_folder(path.parent)


def _remove_quarantined(
    store: FeatureStore, path: Path, order: Removal, report: ForgetReport, *, dry_run: bool
) -> None:
    try:
        gone, nameless = order.masks(read_part(path))
        stays = not (gone.any() or nameless.any())
    except StoreError:
        stays = False  # nobody can say what it holds
    if not stays:
        _remove_part(store, path, report, dry_run=dry_run)


def _rewrite_rejects(path: Path, order: Removal, *, dry_run: bool) -> int:
    """Drops the rejects of the images, and torn lines with a name of theirs; returns how many."""
    if not is_file(path):
        return 0
    lines = [line for _, line in read_lines(path)]
    kept = [line for line in lines if not order.has_reject(line)]
    if len(kept) < len(lines) and not dry_run:
        with atomic_file(path) as file:
            file.writelines(kept)
    return len(lines) - len(kept)


def _remove_indexes(folder: Path, *, dry_run: bool) -> int:
    """Removes the folder of indexes, whose vectors are those of the images; they are built anew from the parts."""
    count = sum(1 for _ in walked(folder))
    if count and not dry_run:
        shutil.rmtree(folder)
        sync_folder(folder.parent)
    return count


def _remove_temporaries(root: Path) -> None:
    """Removes what dead writers left, in which rows may lie."""
    for entry in list(walked(root)):
        if is_temporary(entry.name) and not is_alive(entry):
            Path(entry.path).unlink()
    for half_made in entries(root / "spaces"):
        if is_temporary(half_made.name):
            shutil.rmtree(half_made.path, ignore_errors=True)
