"""What a dataset was at one run: one parquet file each, the last one is current.

Beside the columns of ``SCHEMA`` a snapshot keeps the further columns of a manifest, as text, called ``column:NAME``. They say
nothing of features; `featurepipe.store.roles` reads from them what an image's group is, say. Readers of before pass them over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurepipe.annotations import KEPT_COLUMN
from featurepipe.errors import StoreError, StoreMoved, UnknownSnapshot, UsageError, unknown
from featurepipe.partitions import PARTITION_ROWS, is_large, release, stored
from featurepipe.store.atomic import atomic_file, checked_folder, listed, made_folder, open_file
from featurepipe.store.documents import checked_dataset, is_dataset, is_run_id
from featurepipe.store.parts import text_of

OK, REJECTED = "ok", "rejected"
PREVIOUS, FIRST = "previous", "first"
"""What commands call the snapshot before one, and a dataset's first."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.binary(32)),
        ("label", pa.string()),
        ("split", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)


_STATUSES = {status: text_of(np.array([status.encode()]))[0] for status in (OK, REJECTED)}
"""Arrow's scalars, made by hand as `text_of` says: Arrow imports pandas to compare a column with a string."""


def have_status(table: pa.Table, status: str) -> pa.ChunkedArray:
    """Says of each image (n,) whether its status is ``OK``, or ``REJECTED``; null where it has none."""
    return pc.equal(table["status"], _STATUSES[status])


def snapshot_ids(folder: Path, dataset: str) -> list[str]:
    """Lists the run ids of a dataset's snapshots, oldest first; a file of another name is of no run."""
    of_dataset = checked_folder(checked_folder(folder) / checked_dataset(dataset))
    return [path.stem for path in listed(of_dataset, "*.parquet") if is_run_id(path.stem)]


def snapshot_of_run(
    run_id: str, dataset: str, known: Sequence[str], records: Iterable[Mapping[str, Any]]
) -> str | None:
    """Returns the snapshot that a run id means: a job's run has the one of its last extraction that wrote one.

    Args:
        run_id: Of a snapshot, or of any run.
        dataset: Whose snapshots are meant.
        known: Run ids of these.
        records: Of runs; looked at only if ``run_id`` is not among ``known``.

    Returns:
        One of ``known``; None if there is no such run.

    Raises:
        UnknownSnapshot: That run left no snapshot of the dataset, or none that is still there.
    """
    if run_id in known:
        return run_id
    run = next((run for run in records if run["run_id"] == run_id), None)
    if run is None:
        return None
    found = [extraction for extraction in run.get("extractions") or () if extraction in known]
    if found:
        return str(found[-1])
    of = run.get("dataset")
    about = f", which is about dataset {of}," if of not in (None, dataset) else ""
    raise UnknownSnapshot(
        f"run {run_id} ({run.get('status')}){about} has no snapshot of dataset {dataset}; runs that have: "
        f"{', '.join(known[-5:]) or 'none'}",
        run_id,
    )


def dataset_names(folder: Path) -> list[str]:
    """Lists the datasets that have a snapshot; a folder of another name is passed over, and named by ``verify``."""
    paths = [path for path in listed(folder, "*/*.parquet") if is_run_id(path.stem)]
    return sorted(name for name in {path.parent.name for path in paths} if is_dataset(name))


def read_snapshot(
    folder: Path, dataset: str, run_id: str | None = None, columns: Sequence[str] | None = None
) -> pa.Table | None:
    """Reads one snapshot, by default the current one; None if the dataset has none.

    Args:
        folder: ``snapshots`` of a store.
        dataset: Its name.
        run_id: Whose snapshot.
        columns: Only these columns of ``SCHEMA``, or further ones by their names there, in this order.

    Raises:
        StoreError: The file is damaged, or its rows contradict themselves.
        UnknownSnapshot: There is no snapshot of that run.
    """
    ids = snapshot_ids(folder, dataset)
    if run_id is not None and run_id not in ids:
        raise UnknownSnapshot(str(unknown("snapshot", run_id, ids, where=f"dataset {dataset}")), run_id)
    if not ids:
        return None
    path = folder / dataset / f"{run_id or ids[-1]}.parquet"
    schema = SCHEMA if columns is None else pa.schema([_field(name) for name in columns])
    try:
        with (
            os.fdopen(open_file(path), "rb") as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as file,
        ):
            table = _read(file, schema)
            _check_rows(table)
            return table
    except FileNotFoundError as error:
        raise StoreMoved(f"snapshot {path} is gone") from error
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"cannot read snapshot {path}: {error}; move it out of the store, and the one before it, or the next that "
            "featurepipe extract writes, is the current one"
        ) from error


def _read(file: pq.ParquetFile, schema: pa.Schema) -> pa.Table:
    """The columns of a schema, in one piece; within `featurepipe.partitions.spilling`, a large one row group by row group."""
    if not is_large(file.metadata.num_rows):  # four times as fast as pq.read_table
        return file.read(schema.names).select(schema.names).cast(schema)
    groups = (
        file.read_row_group(n, schema.names).select(schema.names).cast(schema) for n in range(file.num_row_groups)
    )
    return stored((batch for group in groups for batch in group.to_batches()), schema)


def further_columns(folder: Path, dataset: str, run_id: str) -> list[str]:
    """The names of a snapshot's further columns, as the manifest had them, without reading it.

    Raises:
        StoreError: The file is damaged.
    """
    path = folder / dataset / f"{run_id}.parquet"
    try:
        with os.fdopen(open_file(path), "rb") as opened, pq.ParquetFile(opened) as file:
            return [name.removeprefix(KEPT_COLUMN) for name in file.schema_arrow.names if name.startswith(KEPT_COLUMN)]
    except FileNotFoundError as error:
        raise StoreMoved(f"snapshot {path} is gone") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"cannot read snapshot {path}: {error}") from error


def _field(name: str) -> pa.Field:
    return pa.field(name, pa.string()) if name.startswith(KEPT_COLUMN) else SCHEMA.field(name)


def _check_rows(table: pa.Table) -> None:
    """Raises ``ValueError`` if rows contradict themselves, as far as the columns read tell."""
    names = table.column_names
    if "status" in names:
        states = set(pc.unique(table["status"]).to_pylist())
        if not states <= {OK, REJECTED}:
            raise ValueError(f"status must be {OK!r} or {REJECTED!r}, not {sorted(map(str, states - {OK, REJECTED}))}")
        if "key" in names and pc.any(pc.and_(have_status(table, OK), table["key"].is_null())).as_py():
            raise ValueError("every row needs an id, and every usable image a key")
    if "id" in names and table["id"].null_count:
        raise ValueError("every row needs an id, and every usable image a key")


def write_snapshot(folder: Path, dataset: str, run_id: str, table: pa.Table) -> Path:
    """Writes one snapshot atomically; one that equals the one before takes no room, it is another name of that file.

    Args:
        folder: ``snapshots`` of a store.
        dataset: Its name.
        run_id: Of the run that saw it.
        table: The columns of ``SCHEMA``, and further ones called ``column:NAME`` (others are dropped); ``key`` is null where
            the image could not be read, ``status`` is ``ok`` or ``rejected``.

    Raises:
        UsageError: A column is missing, rows contradict themselves, or ``run_id`` is none.
        DiskFull: No space is left.
    """
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise UsageError(f"a snapshot needs the columns {SCHEMA.names}; missing: {missing}")
    schema = pa.schema([*SCHEMA, *(_field(name) for name in table.column_names if name.startswith(KEPT_COLUMN))])
    clean = table.select(schema.names).cast(schema)
    try:
        _check_rows(clean)
    except ValueError as error:
        raise UsageError(f"no snapshot of dataset {dataset} can be written: {error}") from error
    if not is_run_id(run_id):
        raise UsageError(f"not a run id: {run_id!r}; take one from FeatureStore.new_run_id()")
    before = snapshot_ids(folder, dataset)
    path = folder / dataset / f"{run_id}.parquet"
    made_folder(path.parent)
    with atomic_file(path, twin=path.with_name(f"{before[-1]}.parquet") if before else None) as file:
        _write(clean, file)
    return path


def _write(table: pa.Table, file: IO[bytes]) -> None:
    """Writes rows so that equal ones are equal bytes, however they came: a row group of one chunk after the other."""
    with pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, max(table.num_rows, 1), PARTITION_ROWS):
            writer.write_table(table.slice(start, PARTITION_ROWS).combine_chunks(), row_group_size=PARTITION_ROWS)
            release()


def replace_snapshot(folder: Path, dataset: str, run_id: str, keep: pa.Array) -> None:
    """Puts a snapshot with fewer rows in the place of one, atomically, with all its columns.

    One that equals the one before becomes another name of that file, as when it was written.

    Args:
        folder: ``snapshots`` of a store.
        dataset: Its name.
        run_id: Whose snapshot.
        keep: (n,) which rows stay.

    Raises:
        DiskFull: No space is left.
    """
    path = folder / dataset / f"{run_id}.parquet"
    with os.fdopen(open_file(path), "rb") as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
        table = file.read()
    rest = table.filter(keep)
    known = snapshot_ids(folder, dataset)
    before = known[known.index(run_id) - 1] if known.index(run_id) else None
    with atomic_file(path, twin=path.with_name(f"{before}.parquet") if before else None) as written:
        _write(rest, written)


def ids_and_keys(path: Path) -> pa.Table:
    """Reads ``id`` and ``key`` of a snapshot's file, whatever it is called.

    Raises:
        StoreError: It is damaged.
    """
    try:
        with os.fdopen(open_file(path), "rb") as opened, pq.ParquetFile(opened) as file:
            return file.read(["id", "key"])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"cannot read snapshot {path}: {error}") from error


@dataclass(frozen=True)
class SnapshotDifference:
    """What differs between two snapshots of a dataset, as far as usable images go.

    Attributes:
        fresh: Ids that are new, or whose bytes, label, split or further columns are others.
        gone: ``id`` and ``key`` of those that the earlier one has and this one has not, or not as usable.
        counts: ``new``, ``changed`` (other bytes), ``relabelled`` (the same bytes), ``deleted``.
    """

    fresh: pa.Array
    gone: pa.Table
    counts: dict[str, int]

    def with_all(self, now: pa.Table) -> SnapshotDifference:
        """The same with every usable image of ``now`` among ``fresh``, those that did not differ as relabelled."""
        every = now["id"].filter(have_status(now, OK)).combine_chunks()
        more = len(every) - len(self.fresh)
        return replace(self, fresh=every, counts={**self.counts, "relabelled": self.counts["relabelled"] + more})


def difference(now: pa.Table, then: pa.Table) -> SnapshotDifference:
    """Compares two snapshots by id; columns other than ``id``, ``key`` and ``status`` tell what is relabelled.

    Args:
        now: The later one.
        then: The earlier one, with the same columns.
    """
    now, then = (table.filter(have_status(table, OK)).combine_chunks() for table in (now, then))
    place = pc.index_in(now["id"], value_set=then["id"])
    old = then.take(place)
    new = place.is_null()
    known = pc.invert(new)
    changed = pc.and_(known, pc.fill_null(pc.not_equal(now["key"], old["key"]), fill_value=False))
    relabelled = pa.chunked_array([pa.repeat(pa.scalar(value=False), len(now))])
    for name in now.column_names:
        if name not in {"id", "key", "status"}:
            relabelled = pc.or_(relabelled, _differ(now[name], old[name]))
    relabelled = pc.and_(pc.and_(known, pc.invert(changed)), relabelled)
    gone = then.filter(pc.invert(pc.is_in(then["id"], value_set=now["id"]))).select(["id", "key"])
    masks = {"new": new, "changed": changed, "relabelled": relabelled}
    counts = {name: int(pc.sum(mask).as_py() or 0) for name, mask in masks.items()}
    fresh = now["id"].filter(pc.or_(pc.or_(new, changed), relabelled)).combine_chunks()
    return SnapshotDifference(fresh, gone, {**counts, "deleted": len(gone)})


def _differ(a: pa.ChunkedArray, b: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where two columns differ; two nulls do not, a null and a value do."""
    either = pc.xor(a.is_null(), b.is_null())
    return pc.or_(either, pc.fill_null(pc.not_equal(a, b), fill_value=False))
