"""Features handed on: one file (.h5, .npz, .parquet) or a folder of Parquet files, of all images or of what changed since."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurepipe.annotations import KEPT_COLUMN, column_named
from featurepipe.errors import Message, Option, StoreMoved, UsageError, unknown
from featurepipe.progress import announcer
from featurepipe.store.arrays import open_arrays
from featurepipe.store.atomic import atomic_file, reporting_full_disk, sync_folder, write_json
from featurepipe.store.choice import relocated
from featurepipe.store.commit import ArraySpec, PartArray, write_arrays
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.keys import KEY_BYTES, keys_to_arrow
from featurepipe.store.labelled_images import ROLES
from featurepipe.store.locks import starts_again
from featurepipe.store.options import EVERY_COLUMN, GROUP, ROWS_PER_FILE, ExportOptions, RoleOptions, is_file_of_groups
from featurepipe.store.roles import with_roles
from featurepipe.store.snapshots import FIRST, OK, PREVIOUS, SnapshotDifference, difference, snapshot_of_run
from featurepipe.store.views import FeatureSet

BLOCK_BYTES = 32 << 20
"""Of features that are in memory at a time, and in a row group of Parquet."""
ABOUT = "_export.json"
"""What a folder of Parquet files is; written last. Readers of Parquet folders pass over names with ``_`` before them."""
DELETED = "_deleted.parquet"
_TEXTS_AT_ONCE = 65_536  # which take 4 bytes a character, as long as the longest
_OF_SNAPSHOT = ("key", "size", "mtime_ns")


@dataclass(frozen=True)
class _Output:
    """What is written: features, in which dtype, and what stands beside them."""

    features: FeatureSet
    dtype: np.dtype[Any]
    more: Mapping[str, pa.Array] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Rows read at a time."""
        return max(1, BLOCK_BYTES // max(1, self.features.rows.row_bytes(self.dtype)))

    @cached_property
    def header(self) -> dict[str, str]:
        """What every format keeps of it."""
        return {"column": self.features.column, "space": self.features.space_fingerprint, **self.about}

    def block(self, place: slice) -> npt.NDArray[Any]:
        """Reads some rows.

        Raises:
            UsageError: A value is too large for the dtype that was asked for.
        """
        stored = self.features.read(None, rows=place)
        with np.errstate(over="ignore"):
            block = stored.astype(self.dtype, copy=False)
        if self.dtype.itemsize < stored.dtype.itemsize and not np.isfinite(block).all():
            raise UsageError(
                Message(f"values of {self.features.column} are too large for ", Option("dtype", "float16"), "; leave it out")
            )  # fmt: skip
        return block

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Reads all rows, some at a time."""
        return (self.block(place) for place in self.places())

    def places(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Cuts rows into blocks."""
        end = len(self.features) if stop is None else min(stop, len(self.features))
        return (slice(first, min(first + self.step, end)) for first in range(start, end, self.step))


def export(
    feature_set: FeatureSet,
    to: str | Path,
    *,
    dtype: str | None = None,
    more: Mapping[str, pa.Array] | None = None,
    rows_per_file: int = ROWS_PER_FILE,
) -> Path:
    """Writes features as one plain file, or as a folder of Parquet files, whole or not at all.

    ``.h5`` and ``.npz`` hold ``X`` (n, D) in the stored dtype, ``ids`` (n,), ``splits`` (n,), empty text where there is
    none, and, if any image is labelled, ``y`` (n,) int64 with numbers into ``classes``, -1 where there is no label. Of
    features with roles, ``groups`` (n,), empty text where there is none, ``weights`` (n,) float64, and as ``y`` numbers (n,)
    float64 or several labels (n, K) float32 with 1, 0 and NaN, named by ``classes``.
    ``.parquet`` holds ``id``, ``label``, ``split``, the roles as ``group``, ``weight`` and ``target`` (its field has the names of
    several labels), and ``features`` (a list of fixed length). A path without a suffix is a folder of such files, which
    replaces one that an export wrote before. Features are in memory some at a time. The checksum of every part concerned
    is compared before anything is written.

    Args:
        feature_set: What to write.
        to: File to write or replace; the suffix says the format.
        dtype: ``float32`` or ``float16``; by default the stored one.
        more: Further columns, a value a row, by name.
        rows_per_file: Of a folder.

    Returns:
        The path.

    Raises:
        UsageError: Unknown suffix, no folder of that name, a folder of something else, nothing to write, or values too large
            for ``dtype``.
        CorruptPart: A part is damaged; nothing is written, a file of that name stays as it was.
        StoreMoved: The store was rewritten again and again meanwhile; nothing stays behind.
        DiskFull: No space is left; nothing stays behind.
    """
    path = Path(to)
    check_target(path)
    if not len(feature_set):
        raise UsageError("there are no features to export")
    _export(_Output(feature_set, np.dtype(dtype or feature_set.dtype), more or {}), path, rows_per_file, None)
    return path


def check_target(path: Path) -> None:
    """Checks that features can be written to a path.

    Raises:
        UsageError: They cannot; says why.
    """
    if is_partitioned(path):
        if path.is_dir() and any(path.iterdir()) and not (path / ABOUT).is_file():
            raise UsageError(
                f"cannot export to the folder {path}: it holds something else (it has no {ABOUT}); name a new one"
            )
    elif path.suffix.lower() not in _WRITERS:
        raise UsageError(
            f"cannot export to {path.name!r}: the file name must end in {', '.join(_WRITERS)}; without a suffix it is a "
            "folder of Parquet files"
        )
    if not path.parent.is_dir():
        raise UsageError(f"cannot export to {path}: there is no folder {path.parent}")


def is_partitioned(path: Path) -> bool:
    """Whether features written to a path are a folder of Parquet files."""
    return path.is_dir() or not path.suffix


def _export(output: _Output, path: Path, rows_per_file: int, gone: pa.Table | None) -> None:
    try:
        _write(output, path, rows_per_file, gone)
    except StoreMoved:  # the same images and labels, wherever their rows are now
        _again(output, path, rows_per_file, gone)


@starts_again
def _again(output: _Output, path: Path, rows_per_file: int, gone: pa.Table | None) -> None:
    origin = output.features.origin
    space = FeatureStore(origin.store, create=False).space(origin.fingerprint)
    moved = _Output(relocated(output.features, space), output.dtype, output.more, output.about)
    _write(moved, path, rows_per_file, gone)


def _write(output: _Output, path: Path, rows_per_file: int, gone: pa.Table | None) -> None:
    output.features.check()
    if is_partitioned(path):
        with reporting_full_disk(path):
            _write_folder(output, path, rows_per_file, gone)
        return
    with atomic_file(path) as file:
        _WRITERS[path.suffix.lower()](output, file)
        deleted_file(path).unlink(missing_ok=True)  # of an earlier export: these ids are not gone from this one
    if gone is not None:
        with atomic_file(deleted_file(path)) as file:
            pq.write_table(gone, file)


def deleted_file(path: Path) -> Path:
    """Where the ids go that an earlier snapshot had and this one has not."""
    return path / DELETED if is_partitioned(path) else path.with_name(f"{path.stem}.deleted.parquet")


def _roles(features: FeatureSet) -> Iterator[tuple[str, list[str] | npt.NDArray[Any]]]:
    """What there is of images beside their ids, a value a row: texts, or numbers."""
    yield "splits", [split or "" for split in features.splits]
    if features.groups is not None:
        yield "groups", [group or "" for group in features.groups]
    if features.weights is not None:
        yield "weights", features.weights
    if features.targets is not None:
        yield "y", features.targets
        if features.target_names:
            yield "classes", list(features.target_names)
    elif features.classes:
        yield "y", features.codes()
        yield "classes", features.classes


def _arrays(output: _Output) -> Iterator[tuple[str, list[str] | npt.NDArray[Any]]]:
    """All that stands beside ``X`` in .h5 and .npz."""
    yield "ids", list(output.features.ids)
    yield from _roles(output.features)
    for name, column in output.more.items():
        if pa.types.is_fixed_size_binary(column.type):
            raw = b"".join(value or bytes(KEY_BYTES) for value in column.to_pylist())
            yield name, np.frombuffer(raw, np.uint8).reshape(-1, KEY_BYTES)
        elif pa.types.is_integer(column.type):
            yield name, column.to_numpy(zero_copy_only=False)
        else:
            yield name, [value or "" for value in column.to_pylist()]


def _encoded(texts: list[str]) -> npt.NDArray[np.bytes_]:
    encoded = [text.encode("utf-8") for text in texts]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def _write_hdf5(output: _Output, file: IO[bytes]) -> None:
    spec = ArraySpec("X", output.dtype.newbyteorder("<"), output.features.shape)
    arrays = [
        PartArray(spec, output.blocks()),
        *(_whole(name, _encoded(values) if isinstance(values, list) else values) for name, values in _arrays(output)),
    ]
    write_arrays(file.fileno(), dict(output.header), arrays)


def _whole(name: str, values: npt.NDArray[Any]) -> PartArray:
    return PartArray(ArraySpec(name, values.dtype, values.shape), [values])


def _write_npz(output: _Output, file: IO[bytes]) -> None:
    """Writes the bytes that ``np.savez`` would, some rows at a time."""
    with zipfile.ZipFile(file, "w") as packed:
        _add_member(packed, "X", output.dtype, output.features.shape, output.blocks())
        for name, values in _arrays(output):
            if isinstance(values, list):
                dtype = np.dtype(f"U{max(map(len, values), default=1) or 1}")
                starts = range(0, len(values), _TEXTS_AT_ONCE)
                blocks = (np.array(values[start : start + _TEXTS_AT_ONCE], dtype) for start in starts)
                _add_member(packed, name, dtype, (len(values),), blocks)
            else:
                _add_member(packed, name, values.dtype, values.shape, [values])


def _add_member(
    packed: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    blocks: Iterable[npt.NDArray[Any]],
) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with packed.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, described)
        for block in blocks:
            member.write(np.ascontiguousarray(block).view(np.uint8).data)


def _write_parquet(output: _Output, file: IO[bytes], start: int = 0, stop: int | None = None) -> None:
    """Writes rows as Parquet, a row group for each block."""
    features, width = output.features, output.features.shape[1]
    names = ["id", "label", "split", *(n for n in ROLES if n in features.table.column_names and n != "split")]
    table = pa.table(
        [*(features.table[name] for name in names), *output.more.values()],
        pa.schema([
            *(pa.field(name, features.table.schema.field(name).type, metadata=features.table.schema.field(name).metadata)
              for name in names),
            *(pa.field(name, column.type) for name, column in output.more.items()),
        ]),
    )  # fmt: skip
    lists = pa.field("features", pa.list_(pa.from_numpy_dtype(output.dtype), width))
    schema = pa.schema([*table.schema, lists], metadata=output.header)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for place in output.places(start, stop):
            rows = table.slice(place.start, place.stop - place.start)
            flat = pa.array(output.block(place).reshape(-1))
            values = pa.FixedSizeListArray.from_arrays(flat, width)
            writer.write_table(pa.table([*rows.columns, values], schema=schema))


_WRITERS: dict[str, Callable[[_Output, IO[bytes]], None]] = {
    ".h5": _write_hdf5,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}


def _write_folder(output: _Output, path: Path, rows_per_file: int, gone: pa.Table | None) -> None:
    """Writes a folder of Parquet files beside its place, then puts it there; one that a kill left is removed first."""
    made, aside = (path.parent / f".{path.name}.{name}.tmp" for name in ("export", "before"))
    _put_back(aside, path)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        files = _fill(output, made, rows_per_file)
        if gone is not None:
            _synced(made / DELETED, lambda file: pq.write_table(gone, file))
        shape = {"rows": len(output.features), "width": output.features.shape[1], "dtype": output.dtype.name}
        write_json(made / ABOUT, {**output.header, **shape, "files": files})
        shutil.rmtree(aside, ignore_errors=True)
        if path.is_dir():
            path.rename(aside)
        made.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _put_back(aside, path)
        shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path, path: Path) -> None:
    """Gives a folder its name back that was to be replaced by one that never came, as after a kill in between."""
    if aside.is_dir() and not path.exists():
        aside.rename(path)


def _fill(output: _Output, folder: Path, rows_per_file: int) -> list[str]:
    names = []
    for start in range(0, len(output.features), rows_per_file):
        name = f"features-{start // rows_per_file:05d}.parquet"
        stop = start + rows_per_file
        _synced(folder / name, lambda file, start=start, stop=stop: _write_parquet(output, file, start, stop))  # type: ignore[misc]
        names.append(name)
    return names


def _synced(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    with path.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def export_dataset(
    store: FeatureStore,
    node: str,
    to: str | Path,
    *,
    silent: bool = False,
    labels_changed: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes one column of a dataset's features, of all images or of those that changed since an earlier snapshot.

    Args:
        store: The store.
        node: Which column, as ``FeatureStore.features`` takes it.
        to: A file, or without a suffix a folder of Parquet files; see `export`.
        silent: Say nothing.
        labels_changed: With ``since`` or ``new``, whether ``labels`` or a file of groups says something else of the earlier
            snapshot's images than when they were handed on: then every image counts as relabelled. The store does not
            know it, so with such a file, None is refused.
        options: Those of `ExportOptions`.

    Returns:
        ``file``, ``rows``, ``width``, ``dtype``, ``column``, ``bytes``, ``files``, ``snapshot``; with ``since`` or ``new`` also
        ``since``, the counts ``new``, ``changed``, ``relabelled`` and ``deleted``, and ``deleted_file``, whose ``id`` are the
        images that the earlier snapshot had and this one has not.

    Raises:
        UsageError: An option is wrong, or there is nothing to export (but with ``since`` or ``new``).
        CorruptPart: A part is damaged; nothing is written.
        StoreMoved: The store was rewritten again and again meanwhile.
        DiskFull: No space is left; nothing stays behind.
    """
    asked, path = ExportOptions(**options), Path(to)
    check_target(path)
    if labels_changed is None and (asked.new or asked.since is not None):
        _check_labels(asked)
    dataset = asked.dataset or store.only_dataset()
    say = announcer(silent=silent)
    every = bool(labels_changed)
    return _exported(store, node, path, dataset, asked, say, snapshot=asked.snapshot, since=asked.since, every=every)


def _check_labels(asked: ExportOptions) -> None:
    """Refuses labels or groups of a file where changes are asked for: a correction in it would not be among them.

    Raises:
        UsageError: There is such a file.
    """
    groups = asked.group if asked.group is not None and is_file_of_groups(asked.group) else None
    for name, file in (("labels", asked.labels), ("group", groups)):
        if file is not None:
            given = Option(name, str(file)) if isinstance(file, str | Path) else Option(name)
            raise UsageError(
                Message(
                    given, ": what it said when the earlier snapshot was handed on is not known, and corrections in it would be "
                    "missed; export all images, extract a manifest with these columns (nothing is computed again), or use "
                    '[[export]] of a job with images = "new", which keeps a checksum of what it handed on',
                )
            )  # fmt: skip


@starts_again
def _exported(
    store: FeatureStore,
    node: str,
    path: Path,
    dataset: str,
    asked: ExportOptions,
    say: Callable[[str], None],
    *,
    snapshot: str | None,
    since: str | None,
    every: bool,
) -> dict[str, Any]:
    """Exports; ``snapshot`` and ``since`` are those asked for, which `starts_again` does not ask for twice if there are none."""
    features = store.features(dataset, node=node, backbone=asked.backbone, snapshot=snapshot)
    features = with_roles(store, features, asked.labels, RoleOptions.of(asked), say, snapshot=snapshot)
    features = features if asked.split is None else features.select(split=asked.split)
    snapshot = _snapshot(store, dataset, snapshot)
    about = {"dataset": dataset, "snapshot": snapshot}
    since = _since(store, dataset, since, snapshot, new=asked.new)
    found: SnapshotDifference | None = None
    names = _further(store, dataset, snapshot, asked.metadata)
    if since is not None:
        split = None if asked.split is None else features.table["split"][0].as_py()
        compared = {*names.values(), *_role_columns(asked, store.further_columns(dataset, snapshot))}
        found = _difference(store, dataset, snapshot, since, compared, split, every=every)
        features = features.take(np.flatnonzero(pc.is_in(features.table["id"], found.fresh).to_numpy()))
        about["since"] = since
    elif not len(features):
        raise UsageError("there are no features to export")
    more = _metadata(store, dataset, snapshot, features, names)
    output = _Output(features, np.dtype(asked.dtype or features.dtype), more, about)
    _export(output, path, asked.rows_per_file, None if found is None else found.gone)
    return _told(output, path, found)


def _told(output: _Output, path: Path, found: SnapshotDifference | None) -> dict[str, Any]:
    """What was written, as JSON values."""
    rows, width = output.features.shape
    files = sorted(path.glob("*.parquet")) if is_partitioned(path) else [path]
    written = [file for file in files if not file.name.startswith("_")]
    told = {"file": str(path), "rows": rows, "width": width, "dtype": output.dtype.name, "files": len(written)}
    told |= {"column": output.features.column, "bottleneck": output.features.origin.bottleneck}
    told |= {"bytes": sum(file.stat().st_size for file in files), **output.about}
    return told if found is None else {**told, **found.counts, "deleted_file": str(deleted_file(path))}


def _snapshot(store: FeatureStore, dataset: str, asked: str | None) -> str:
    """The snapshot of a run, by default the current one."""
    known = store.snapshot_ids(dataset)
    found = None if asked is None else snapshot_of_run(asked, dataset, known, store.runs())
    return found or asked or known[-1]


def _since(store: FeatureStore, dataset: str, asked: str | None, snapshot: str, *, new: bool) -> str | None:
    """The earlier snapshot that is compared with; None for all images.

    Raises:
        UsageError: There is none before, or that one is later.
    """
    if new or asked == PREVIOUS:
        return previous_snapshot(store, dataset, snapshot, asked)
    if asked is None:
        return None
    since = store.snapshot_ids(dataset)[0] if asked == FIRST else _snapshot(store, dataset, asked)
    if since > snapshot and since in store.snapshot_ids(dataset):
        raise UsageError(
            Message(Option("since", asked), f" is later than the snapshot that is exported, {snapshot}; swap them")
        )
    return since


def previous_snapshot(store: FeatureStore, dataset: str, snapshot: str, asked: str | None = None) -> str:
    """The snapshot before one, of another night: a job's night leaves one for each of its feature spaces.

    Raises:
        UsageError: It is the dataset's first.
    """
    job = next((run for run in store.runs() if snapshot in run.get("extractions", ())), {})
    night = {snapshot, *job.get("extractions", ())}
    before = [name for name in store.snapshot_ids(dataset) if name < snapshot and name not in night]
    if not before:
        option = Option("new") if asked is None else Option("since", asked)
        raise UsageError(
            Message(f"{snapshot} is the first snapshot of dataset {dataset}: all is new; leave out ", option)
        )
    return before[-1]


def _difference(
    store: FeatureStore,
    dataset: str,
    snapshot: str,
    since: str,
    names: Iterable[str],
    split: str | None,
    *,
    every: bool,
) -> SnapshotDifference:
    """What differs between two snapshots in what is exported of a split; ``every`` image of the later one, if that is known."""
    columns = ["id", "key", "label", "split", "status"]
    further = [name for name in names if name.startswith(KEPT_COLUMN)]
    there = set(store.further_columns(dataset, since))
    both = [name for name in further if name.removeprefix(KEPT_COLUMN) in there]
    now, then = (store.snapshot(dataset, run, columns=[*columns, *both]) for run in (snapshot, since))
    if now is None or then is None:
        raise StoreMoved(f"a snapshot of dataset {dataset} is gone")
    found = difference(*(_of_split(table, split) for table in (now, then)))
    if every or len(both) < len(further):  # a column that is new is new of every image
        return found.with_all(_of_split(now, split))
    return found


def _role_columns(asked: ExportOptions, kept: list[str]) -> Iterator[str]:
    """The manifest's columns that say something of images that is exported, as a snapshot names them."""
    roles = (
        asked.label,
        asked.group or GROUP,
        asked.split_column,
        asked.target,
        asked.weight,
        *(asked.multilabel or ()),
    )
    for name in roles:
        if name is not None and (found := column_named(name, kept)) is not None:
            yield KEPT_COLUMN + found


def _of_split(table: pa.Table, split: str | None) -> pa.Table:
    return table if split is None else table.filter(pc.equal(table["split"], split))


def _further(store: FeatureStore, dataset: str, snapshot: str, asked: tuple[str, ...] | None) -> dict[str, str]:
    """Columns of a snapshot that are asked for, by the name that they get.

    Raises:
        UsageError: There is no such column.
    """
    kept = store.further_columns(dataset, snapshot)
    if asked == (EVERY_COLUMN,):
        asked = (*_OF_SNAPSHOT, *kept)
    found = {}
    for name in asked or ():
        own = name if name in _OF_SNAPSHOT else column_named(name, kept)
        if own is None:
            raise unknown("column", name, [*_OF_SNAPSHOT, *kept, EVERY_COLUMN], where=f"dataset {dataset}")
        found[own] = own if own in _OF_SNAPSHOT else KEPT_COLUMN + own
    return found


def _metadata(
    store: FeatureStore, dataset: str, snapshot: str, features: FeatureSet, names: Mapping[str, str]
) -> dict[str, pa.Array]:
    """Columns of a snapshot, a value a row of the features."""
    taken = {*features.table.column_names, "features", "X", "ids", "y", "classes"} & names.keys()
    if taken:
        raise UsageError(Message(Option("metadata"), f": {min(taken)!r} is the name of another column of the file"))
    if not names:
        return {}
    table = store.snapshot(dataset, snapshot, columns=["id", "status", *(n for n in names.values() if n != "key")])
    if table is None:
        raise StoreMoved(f"a snapshot of dataset {dataset} is gone")
    usable = table.filter(pc.equal(table["status"], OK)).combine_chunks()
    place = pc.index_in(features.table["id"], value_set=usable["id"])
    return {
        name: keys_to_arrow(features.keys) if name == "key" else _one(usable[column].take(place))
        for name, column in names.items()
    }


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def read_about(folder: str | Path) -> dict[str, Any]:
    """What a folder of Parquet files is: dataset, snapshot, column, space, rows, files.

    Raises:
        UsageError: No export has written it.
    """
    path = Path(folder) / ABOUT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is no folder that featurepipe export wrote: {error}") from error
    return found


TABLES = (".parquet", ".npz", ".h5")
"""Files of which `texts_in` gives the texts."""


def texts_in(path: Path) -> Iterator[pa.Array | pa.ChunkedArray]:
    """Yields the texts in a file of features, or in any Parquet file, some at a time: ids, names, and all other columns of texts.

    Raises:
        OSError: It cannot be read.
        StoreError: It is no HDF5 file.
        ValueError: It is no such file (also `pyarrow.ArrowInvalid`), or an array of it would run code when it is read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            names = [field.name for field in file.schema_arrow if _is_text(field.type)]
            for batch in file.iter_batches(columns=names) if names else ():
                yield from (column.cast(pa.string()) for column in batch.columns)
    elif suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            yield from (pa.array(arrays[name]) for name in arrays.files if arrays[name].dtype.kind == "U")
    else:
        for array in open_arrays(path).values():
            for start in (
                range(0, len(array), _TEXTS_AT_ONCE) if array.dtype.kind in "SO" and len(array.shape) == 1 else ()
            ):
                yield pa.array(array[start : start + _TEXTS_AT_ONCE].tolist(), pa.string())


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))


def behind(features: FeatureSet, held: pa.Table) -> SnapshotDifference:
    """What a copy of features elsewhere, such as a vector database, lacks of them, and what it has too much.

    A copy that is compared as it is needs no note of what it was last told: after a night that was missed, a kill, or images
    that were forgotten here, it catches up all the same.

    Args:
        features: What should be there.
        held: ``id`` (text) and ``key`` (32 bytes, or hex) of what is there, and ``label``, ``split`` if a change of these counts.
    """
    names = [name for name in ("label", "split") if name in held.column_names]
    key = held["key"]
    if pa.types.is_string(key.type) or pa.types.is_large_string(key.type):
        key = pa.array([bytes.fromhex(text) for text in key.to_pylist()], pa.binary(KEY_BYTES))
    now = {name: features.table[name] for name in names} | {"key": keys_to_arrow(features.keys)}
    then = {name: held[name].cast(pa.string()) for name in names} | {"key": key}
    sides = [(features.table["id"], now), (held["id"].cast(pa.string()), then)]
    return difference(*(pa.table({"id": ids, **side, "status": pa.repeat(OK, len(ids))}) for ids, side in sides))
