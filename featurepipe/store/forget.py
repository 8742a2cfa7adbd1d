"""Forgetting images: their rows, names and keys leave a store for good, which is then read back to prove it.

What is to go is written down first (``forgetting.json``), and every step may be done again, so that the next call finishes what a
killed one began. Parts are rewritten as `featurepipe.store.compact` does; snapshots, rejects and records keep all other images.
"""

from __future__ import annotations

import shutil
from collections import Counter
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
    read_json,
    read_lines,
    refuse_strangers,
    sync_folder,
    walked,
    write_json,
)
from featurepipe.store.compact import rewrite_parts
from featurepipe.store.documents import (
    EarlyForgettingDocument,
    ForgettingDocument,
    checked_dataset,
    is_dataset,
    read_document,
)
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
        dataset: Whose images; empty if those of several datasets, or of none, went.
        datasets: How many of the ids each dataset had something of that went; none of those that had nothing.
        elsewhere: How many of the ids other datasets than the one that was asked for have in a snapshot, where they stay.
        several: How many of the ids went from more than one dataset.
        several_ids: Some of these, at most 20.
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
    datasets: dict[str, int] = field(default_factory=dict)
    elsewhere: dict[str, int] = field(default_factory=dict)
    several: int = 0
    several_ids: list[str] = field(default_factory=list)
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
        dataset: Whose ids they are; by default an image goes from each dataset that has something of it.
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


def held_ids(store: FeatureStore, ids: Iterable[str], dataset: str | None) -> frozenset[str]:
    """The ids that the store has something of: a row of a snapshot or part of the dataset, or a reject. Takes no lock."""
    return frozenset(id_ for of_one in _held(store, tuple(ids), dataset).values() for id_ in of_one)


def without_blanks(store: FeatureStore | None, ids: Sequence[str], dataset: str | None) -> tuple[list[str], int]:
    """Ids without the blanks around them, and of how many these were taken: those that the store knows with them stay.

    Args:
        store: The store, if there is one. No lock is taken.
        ids: As people wrote them.
        dataset: Whose ids they are; None for those of any.
    """
    padded = [id_ for id_ in ids if id_ != id_.strip()]
    meant: set[str] = set()
    if padded and store is not None:
        store.check_exists()
        before = Forgotten.of(store.path)
        meant.update(held_ids(store, padded, checked_dataset(dataset) if dataset else None))
        for name in _datasets(store) if dataset is None else (dataset,):
            known = before.has_ids(name, padded)
            meant.update(id_ for id_, is_known in zip(padded, known, strict=True) if is_known)
    taken = set(padded) - meant
    return [id_.strip() if id_ in taken else id_ for id_ in ids], len(taken)


def held_elsewhere(store: FeatureStore, ids: Iterable[str], dataset: str) -> dict[str, int]:
    """How many of the ids are in a snapshot of each other dataset that has any. Takes no lock."""
    order, found = Removal((dataset,), tuple(ids)), {}
    for name in store.datasets():
        if name != dataset:
            tables = (table["id"] for _, table in _snapshots(store, name))
            found[name] = len(
                {id_ for table in tables for id_ in table.filter(pa.array(order.are_named(table))).to_pylist()}
            )
    return {name: count for name, count in found.items() if count}


def _pending(store: FeatureStore) -> Removal | None:
    """What a killed call has not finished."""
    path = store.path / JOURNAL
    if not is_unfinished(store):
        return None
    if "dataset" in read_json(path):
        record = read_document(path, EarlyForgettingDocument)
        datasets = (record["dataset"],)
        refused = tuple((record["dataset"], id_, key) for id_, key in record["pairs"])
    else:
        record = read_document(path, ForgettingDocument)
        datasets, refused = tuple(record["datasets"]), tuple((name, id_, key) for name, id_, key in record["refused"])
    ids, keys, kept = (tuple(record[name]) for name in ("ids", "keys", "kept"))
    shared = tuple((name, id_, key) for name, id_, key in record.get("shared", ()))
    earlier = Forgotten.of(store.path).traces_of(datasets, ids)
    return Removal(datasets, ids, keys, kept, refused, shared, come_back=record["come_back"], earlier=earlier)


def _journal(order: Removal) -> dict[str, Any]:
    texts = {name: list(getattr(order, name)) for name in ("datasets", "ids", "keys", "kept")}
    triples = {name: [list(one) for one in getattr(order, name)] for name in ("refused", "shared")}
    return {**texts, **triples, "come_back": order.come_back}


# What is to go


def make_order(
    store: FeatureStore, ids: Sequence[str], asked: RemovalOptions, report: ForgetReport, *, unknown_ok: bool = False
) -> Removal:
    """Finds all keys that the images ever had, and who else has them.

    Raises:
        UsageError: An id is nowhere, and ``unknown_ok`` is false.
    """
    held = _held(store, ids, checked_dataset(asked.dataset) if asked.dataset else None)
    names = tuple(sorted(held) or [store.only_dataset()])  # which says how there comes to be one
    places = Counter(id_ for of_one in held.values() for id_ in of_one)
    before = Forgotten.of(store.path)
    again = {id_ for name in names for id_, is_known in zip(ids, before.has_ids(name, ids), strict=True) if is_known}
    strange = [id_ for id_ in ids if id_ not in places and id_ not in again]
    report.elsewhere = held_elsewhere(store, ids, asked.dataset) if asked.dataset else {}
    if strange and not unknown_ok:
        raise _nowhere(store, names, strange)
    keys = sorted({key for of_one in held.values() for keys in of_one.values() for key in keys})
    others = _others(store, Removal(names, tuple(ids)), keys)
    kept = sorted(others)
    several = [id_ for id_ in ids if places[id_] > 1]
    report.datasets = {name: len(held[name]) for name in names if held[name]}
    report.dataset = (*report.datasets, *names)[0] if len(report.datasets or names) == 1 else ""
    report.several, report.several_ids = len(several), several[:_NAMED]
    report.images, report.known = len(ids), len(places)
    report.unknown, report.unknown_ids = len(strange), strange[:_NAMED]
    report.kept_keys = len(kept)
    shown = sorted({place for places in others.values() for place in places})
    report.kept_for = [{"dataset": name, "id": id_} for name, id_ in shown[:_NAMED]]
    going = tuple(key.hex() for key in keys if key not in others)
    report.keys = len(going)
    refused = [(name, id_, "") for name in names for id_ in (*held[name], *strange)]
    pairs = [(name, id_, key) for name in names for id_, keys_of_it in held[name].items() for key in sorted(keys_of_it)]
    refused += [(name, id_, key.hex()) for name, id_, key in pairs if key not in others]
    shared = tuple((name, id_, key.hex()) for name, id_, key in pairs if key in others)
    keeps = tuple(key.hex() for key in kept)
    return Removal(
        names, tuple(ids), going, keeps, tuple(refused), shared, come_back=asked.may_come_back,
        earlier=before.traces_of(names, ids), known=len(places),
    )  # fmt: skip


def _nowhere(store: FeatureStore, names: Sequence[str], ids: Sequence[str]) -> UsageError:
    known = store.datasets()
    if known and len(names) == 1 and names[0] not in known:
        return unknown("dataset", names[0], known, where=str(store.path))
    tables = [store.snapshot(name, columns=["id"]) for name in names if name in known]
    near = nearest(ids[0], [id_ for table in tables if table is not None for id_ in table["id"].to_pylist()[:100_000]])
    hint = f"; nearest to {ids[0]!r}: {', '.join(near)}" if near else ""
    others = held_elsewhere(store, ids, names[0]) if len(names) == 1 else {}
    hint += "".join(f"; dataset {name} has {count:,} of them" for name, count in others.items())
    verb = "is" if len(ids) == 1 else "are"
    return UsageError(
        f"{len(ids):,} of the ids {verb} nowhere in {'dataset' if len(names) == 1 else 'datasets'} {', '.join(names)} (no "
        f"snapshot, part or reject names them): {first_names(ids, 5)}{hint}. Nothing was forgotten; mend or remove them"
    )


def _held(store: FeatureStore, ids: Sequence[str], dataset: str | None = None) -> dict[str, dict[str, set[bytes]]]:
    """Of each dataset, or of one, the ids that it has something of, each with all keys that it ever had there."""
    order = Removal(_datasets(store) if dataset is None else (dataset,), tuple(ids))
    held: dict[str, dict[str, set[bytes]]] = {name: {} for name in order.datasets}
    for name, found, keys in _named_anywhere(store, order, any_dataset=dataset is None):
        of_one = held.setdefault(name, {})
        for id_, key in zip(found, keys, strict=True):
            of_one.setdefault(id_, set()).update(() if key is None else (bytes(key),))
    unsaid = held.pop("", {})  # early parts and rejects say no dataset
    for id_, known in unsaid.items():
        for name in [name for name in held if id_ in held[name]] or list(held):
            held[name].setdefault(id_, set()).update(known)
    return held


def _datasets(store: FeatureStore) -> tuple[str, ...]:
    """All datasets: those of runs, too, that took no snapshot, and of which images may have been forgotten before."""
    of_runs = {str(record.get("dataset") or "") for record in store.runs()}
    return tuple(sorted({*store.datasets(), *filter(is_dataset, of_runs)}))


def _named_anywhere(
    store: FeatureStore, order: Removal, *, any_dataset: bool
) -> Iterator[tuple[str, Sequence[str], Sequence[bytes | None]]]:
    """The order's ids in snapshots of its datasets, and in parts and rejects of these or of any: dataset, ids, keys."""
    for name in order.datasets:
        for _, table in _snapshots(store, name):
            mine = table.filter(pa.array(order.are_named(table["id"])))
            yield name, mine["id"].to_pylist(), mine["key"].to_pylist()
    for path in listed(store.path, "spaces/*/parts/*.h5"):
        with suppress(StoreError):  # of a damaged part nobody can tell: it goes as a whole
            part = read_part(path)
            if any_dataset or order.is_of(part.dataset):
                ids, keys = read_ids(part), read_array(part, "key")
                mask = order.are_named(ids)
                yield part.dataset, ids.filter(pa.array(mask)).to_pylist(), [key.tobytes() for key in keys[mask]]
    for path in listed(store.path, "spaces/*/rejects.jsonl"):
        for _, line in read_lines(path):
            reject = reject_of(line)
            if reject is not None and reject["id"] in order.names:
                name = reject.get("dataset", "")
                if any_dataset or order.is_of(name):
                    yield name, [reject["id"]], [reject["key"]]


def _others(store: FeatureStore, order: Removal, keys: Sequence[bytes]) -> dict[bytes, set[tuple[str, str]]]:
    """The keys that other images have or had, with their dataset and id."""
    wanted = SortedKeys(as_keys(list(keys)))
    places: dict[bytes, set[tuple[str, str]]] = {}
    for dataset in store.datasets():
        for _, table in _snapshots(store, dataset):
            usable = table.filter(table["key"].is_valid())
            same = usable.filter(pa.array(wanted.contains(keys_from_arrow(usable["key"]))))
            for id_, key in zip(same["id"].to_pylist(), same["key"].to_pylist(), strict=True):
                if not (order.is_of(dataset) and id_ in order.names):
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
    before = after = Forgotten.of(store.path)
    for dataset in order.datasets:
        keys_of, shared = _keys_by_id(order.refused, dataset), _keys_by_id(order.shared, dataset)
        after = (
            after.without_images(dataset, order.ids) if order.come_back else after.with_images(dataset, keys_of, shared)
        )
    if after.images != before.images:
        after.write(store.path)


def _keys_by_id(triples: Iterable[tuple[str, str, str]], dataset: str) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, id_, key in triples:
        if name == dataset:
            found.setdefault(id_, []).extend([bytes.fromhex(key)] if key else [])
    return found


def _rewrite_snapshots(store: FeatureStore, order: Removal, *, dry_run: bool) -> int:
    folder, count, sound = store.path / "snapshots", 0, set()
    for dataset, run_id in ((name, run_id) for name in order.datasets for run_id in store.snapshot_ids(name)):
        file = (folder / dataset / f"{run_id}.parquet").lstat().st_ino
        if file in sound:
            continue
        table = store.snapshot(dataset, run_id, columns=["id"])
        named = np.zeros(0, bool) if table is None else order.are_named(table["id"])
        if not named.any():
            sound.add(file)
            continue
        count += 1
        if not dry_run:
            replace_snapshot(folder, dataset, run_id, pa.array(~named))
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
