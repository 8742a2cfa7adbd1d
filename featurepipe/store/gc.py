"""Removing what no snapshot needs: rows, old snapshots, and the records of old runs."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurepipe.errors import CorruptPart, StoreError
from featurepipe.results import ShownReport
from featurepipe.store.atomic import checked_folder, entries, is_temporary, listed, refuse_strangers, walked
from featurepipe.store.compact import Mask, rewrite_parts, rewritten_bytes
from featurepipe.store.documents import checked_run_id
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.indexes import unneeded_indexes
from featurepipe.store.keys import KEY_BYTES, Keys, SortedKeys, as_keys, keys_from_arrow
from featurepipe.store.options import GcOptions
from featurepipe.store.parts import PartInfo, damaged_arrays, read_array, read_part
from featurepipe.store.space import Space

SHOWN_SECONDS = 24 * 3600.0
"""How long the file by which a cluster's workers know the store is left alone; a client touches it with each command."""


@dataclass
class GcReport(ShownReport):
    """What ``gc_store`` removed, or would remove.

    Attributes:
        bytes_freed: In all.
        rows_dropped: Rows of images that are in no snapshot.
        rows_unfinished: Rows in no snapshot either, but of runs that have not finished: kept for the next run.
        snapshots_removed: Old snapshots.
        leftovers_removed: Temporary files of dead writers.
        quarantined_removed: Quarantined parts whose rows are elsewhere or not needed.
        indexes_removed: Indexes of look-alikes with images that no snapshot has, or of a dataset or space that is gone.
    """

    bytes_freed: int = 0
    rows_dropped: int = 0
    rows_unfinished: int = 0
    snapshots_removed: int = 0
    leftovers_removed: int = 0
    quarantined_removed: int = 0
    indexes_removed: int = 0


class _Needed:
    """The keys of all snapshots that stay, each image once, however many snapshots have it."""

    def __init__(self) -> None:
        self._set = SortedKeys(np.empty((0, KEY_BYTES), np.uint8))

    def add(self, keys: Keys) -> None:
        fresh = keys[~self.contains(keys)]
        if len(fresh):
            self._set = SortedKeys(np.concatenate([self._set.keys, fresh]))

    def contains(self, keys: Keys) -> Mask:
        return self._set.contains(keys)


def gc_store(
    store: FeatureStore,
    *,
    dry_run: bool = False,
    keep_snapshots: int | None = None,
    dataset: str | None = None,
    spared: Collection[str] = (),
) -> GcReport:
    """Removes temporary files of dead writers, and rows, quarantined parts and indexes that no snapshot needs.

    Takes the store's lock alone, so every temporary file is a dead writer's, but for the files by which the workers of a
    cluster know the store: those who train there only read, and hold no lock. Rows that a run committed before it was
    stopped are kept until a later run of that dataset has finished: they are its work.

    Args:
        store: The store.
        dry_run: Only say what would be done.
        keep_snapshots: Keep only this many of the latest snapshots of each dataset (at least 1); None keeps all.
        dataset: Remove old snapshots of this dataset only.
        spared: Run ids of snapshots that stay, however old.

    Raises:
        StoreLocked: Someone is writing into the store.
        StoreError: A snapshot cannot be read, so nobody knows what it needs; nothing is removed.
    """
    options = GcOptions(dry_run=dry_run, keep_snapshots=keep_snapshots)
    report = GcReport()
    store.check_exists()
    with store.lock(shared=False):
        refuse_strangers(store.path)  # what it names may be needed, or is not ours to remove
        datasets = store.datasets() if dataset is None else [dataset]
        old = [path for name in datasets for path in _old_snapshots(store, name, options.keep_snapshots, spared)]
        needed = _needed_keys(store, set(old))
        report.snapshots_removed = len(old)
        dead = sorted(
            Path(entry.path) for entry in walked(store.path) if is_temporary(entry.name) and not is_alive(entry)
        )
        report.leftovers_removed = len(dead)
        _remove([*old, *dead], report, dry_run=dry_run)
        if not dry_run:
            for half_made in entries(store.path / "spaces"):
                if is_temporary(half_made.name):
                    shutil.rmtree(half_made.path, ignore_errors=True)  # which follows no link
        latest = {dataset: store.snapshot_ids(dataset)[-1] for dataset in store.datasets()}
        for space in store.spaces():
            _collect_space(space, needed, latest, report, dry_run=dry_run)
        fingerprints = {space.fingerprint for space in store.spaces()}
        indexes = unneeded_indexes(store.path, set(latest), fingerprints, needed.contains)
        report.indexes_removed = len(indexes)
        _remove(indexes, report, dry_run=dry_run)
    return report


def remove_runs(store: FeatureStore, run_ids: Iterable[str], *, dry_run: bool = False) -> list[str]:
    """Removes the records of some runs, but of none whose snapshot is there: it says where that came from.

    Args:
        store: The store.
        run_ids: Whose records are to go; those without one are passed over.
        dry_run: Only say which ones.

    Returns:
        The run ids whose records went.

    Raises:
        UsageError: A run id is none.
    """
    needed = {run_id for dataset in store.datasets() for run_id in store.snapshot_ids(dataset)}
    removed = []
    for run_id in run_ids:
        path = checked_folder(store.path / "runs") / f"{checked_run_id(run_id)}.json"
        if run_id in needed or not path.exists():
            continue
        removed.append(run_id)
        if not dry_run:
            path.unlink(missing_ok=True)
    return removed


def is_alive(temporary: os.DirEntry[str]) -> bool:
    """Whether somebody may still need a temporary file: workers look for one of these in the store as they come."""
    return (
        temporary.name.startswith(".cluster-")
        and time.time() - temporary.stat(follow_symlinks=False).st_mtime < SHOWN_SECONDS
    )


def _old_snapshots(store: FeatureStore, dataset: str, keep: int | None, spared: Collection[str]) -> Iterator[Path]:
    for run_id in store.snapshot_ids(dataset)[: -keep if keep else 0]:
        if run_id not in spared:
            yield store.path / "snapshots" / dataset / f"{run_id}.parquet"


def _needed_keys(store: FeatureStore, old: set[Path]) -> _Needed:
    needed, read = _Needed(), set()
    for dataset in store.datasets():
        for run_id in reversed(store.snapshot_ids(dataset)):  # the current one first: most have the same images
            path = store.path / "snapshots" / dataset / f"{run_id}.parquet"
            file = path.lstat().st_ino  # snapshots of nights with nothing new are names of one file
            if path in old or file in read:
                continue
            table = store.snapshot(dataset, run_id, columns=["key"])
            if table is not None:
                needed.add(keys_from_arrow(table["key"].drop_null()))
            read.add(file)
    return needed


def _collect_space(
    space: Space, needed: _Needed, latest: Mapping[str, str], report: GcReport, *, dry_run: bool
) -> None:
    for part in space.parts():
        try:
            keep = needed.contains(as_keys(read_array(part, "key")))
        except CorruptPart:
            continue  # verify's business
        if keep.all():
            continue
        if _unfinished(part, latest):
            report.rows_unfinished += int((~keep).sum())
        elif not (keep.any() and damaged_arrays(part)):  # damage is never copied into a fresh part
            _drop_rows(space, part, keep, report, dry_run=dry_run)
    quarantined = listed(space.path, "quarantine/*.h5")
    spent = [path for path in quarantined if _is_spent(space, path, needed)]
    report.quarantined_removed += len(spent)
    _remove(spent, report, dry_run=dry_run)


def _drop_rows(space: Space, part: PartInfo, keep: Mask, report: GcReport, *, dry_run: bool) -> None:
    report.rows_dropped += int((~keep).sum())
    if dry_run:
        report.bytes_freed += part.file_bytes - rewritten_bytes([part], [keep])
    else:
        rest = rewrite_parts(space.path / "parts", [part], [keep])
        report.bytes_freed += part.file_bytes - (rest.file_bytes if rest else 0)


def _unfinished(part: PartInfo, latest: Mapping[str, str]) -> bool:
    """Tells whether a part is of a run after the last snapshot of its dataset (of any, if it names none)."""
    last = latest.get(part.dataset, "") if part.dataset else max(latest.values(), default="")
    return part.run_id > last


def _is_spent(space: Space, path: Path, needed: _Needed) -> bool:
    """Tells whether all rows of a quarantined part are stored elsewhere too, or are needed by nobody."""
    try:
        part = read_part(path)
        keys = as_keys(read_array(part, "key"))
    except StoreError:
        return False  # nobody can say what it held
    return bool((space.index(list(part.columns)).contains(keys) | ~needed.contains(keys)).all())


def _remove(paths: list[Path], report: GcReport, *, dry_run: bool) -> None:
    names = Counter(path.lstat().st_ino for path in paths)
    for path in paths:
        found = path.lstat()
        if names.pop(found.st_ino, 0) >= found.st_nlink:  # else another snapshot is a name of the same file
            report.bytes_freed += found.st_size
    if not dry_run:
        for path in paths:
            path.unlink()
