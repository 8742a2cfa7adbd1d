"""Plain array files: those of others in HDF5, sliced lazily and safely, and features exported as .h5, .npz or .parquet."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featurepipe.errors import StoreError, StoreMoved, UsageError
from featurepipe.store.atomic import atomic_file
from featurepipe.store.choice import relocated
from featurepipe.store.commit import ArraySpec, PartArray, write_arrays
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.labelled_images import ROLES
from featurepipe.store.locks import starts_again
from featurepipe.store.views import FeatureSet


@dataclass
class LazyArray:
    """One dataset of an HDF5 file, read where it is indexed; pickles as path and name.

    Contiguous numbers are memory-mapped, so reads of several threads and processes run side by side. All else goes
    through a handle of h5py of this process and thread: a handle shared over a fork reads wrong data.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None
    stored_bytes: int | None = None
    """How many bytes of the file hold it, compressed or not."""

    def __post_init__(self) -> None:
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __getitem__(self, index: int | slice | tuple[Any, ...]) -> Any:
        """Reads a part of the array, as ``h5py`` does; text comes as ``str``.

        Raises:
            StoreError: The file cannot be read any more.
        """
        try:
            if self.offset is not None:
                return np.array(np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[index])
            dataset = self._file()[self.name]
            return (dataset.asstr() if h5py.check_string_dtype(dataset.dtype) else dataset)[index]
        except (OSError, KeyError) as error:
            raise StoreError(f"cannot read {self.name} of {self.path}: {error}") from error

    def _file(self) -> h5py.File:
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.file = h5py.File(self.path, "r", locking=False)
            self._local.pid = os.getpid()
        return self._local.file


def open_arrays(path: str | Path) -> Mapping[str, LazyArray]:
    """Lists the datasets of an HDF5 file by full name; nothing is read until they are sliced.

    Raises:
        StoreError: The file is missing or not HDF5.
        UsageError: A dataset's values lie in other files: where one of them is missing, HDF5 gives fill values
            and no error.
    """
    found: dict[str, LazyArray] = {}

    def collect(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            _check_own(item, path)
            stored = int(item.id.get_storage_size())
            found[name] = LazyArray(str(path), name, item.shape, item.dtype, _mappable_offset(item), stored)

    try:
        with h5py.File(path, "r", locking=False) as file:
            file.visititems(collect)
    except OSError as error:
        raise StoreError(f"cannot open {path} as an HDF5 file: {error}") from error
    return found


def _check_own(dataset: h5py.Dataset, path: str | Path) -> None:
    kind = "a virtual dataset" if dataset.is_virtual else "stored externally" if dataset.external else ""
    if kind:
        raise UsageError(
            f"{path}: {dataset.name} is {kind}: its values lie in other files, and where one is missing HDF5 makes up "
            "values without an error; copy the data into one file"
        )


def _mappable_offset(dataset: h5py.Dataset) -> int | None:
    """Returns where the values lie in the file if they can be mapped as they are."""
    plain = dataset.dtype.kind in "iuf" and dataset.chunks is None
    matches = plain and dataset.id.get_type().get_size() == dataset.dtype.itemsize and dataset.size
    offset = dataset.id.get_offset() if matches else None
    return None if offset is None else int(offset)


_BLOCK_ROWS = 4096


def export(feature_set: FeatureSet, to: str | Path) -> Path:
    """Writes features as one plain file, whole or not at all.

    ``.h5`` and ``.npz`` hold ``X`` (n, D) in the stored dtype, ``ids`` (n,), ``splits`` (n,), empty text where there is
    none, and, if any image is labelled, ``y`` (n,) int64 with numbers into ``classes``, -1 where there is no label. Of
    features with roles, ``groups`` (n,), empty text where there is none, ``weights`` (n,) float64, and as ``y`` numbers (n,)
    float64 or several labels (n, K) float32 with 1, 0 and NaN, named by ``classes``.
    ``.parquet`` holds ``id``, ``label``, ``split``, the roles as ``group``, ``weight`` and ``target`` (its field has the names of
    several labels), and ``features`` (a list of fixed length). HDF5 and parquet are written in bounded memory. The checksum of
    every part concerned is compared before anything is written.

    Args:
        feature_set: What to write.
        to: File to write or replace; the suffix says the format.

    Returns:
        The path.

    Raises:
        UsageError: Unknown suffix, no folder of that name, or nothing to write.
        CorruptPart: A part is damaged; nothing is written, a file of that name stays as it was.
        StoreMoved: The store was rewritten again and again meanwhile; nothing stays behind.
        DiskFull: No space is left; nothing stays behind.
    """
    path = Path(to)
    writers: dict[str, Callable[[FeatureSet, IO[bytes]], None]] = {
        ".h5": _write_hdf5,
        ".npz": _write_npz,
        ".parquet": _write_parquet,
    }
    if path.suffix.lower() not in writers:
        raise UsageError(f"cannot export to {path.name!r}: the file name must end in {', '.join(writers)}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot export to {path}: there is no folder {path.parent}")
    if not len(feature_set):
        raise UsageError("there are no features to export")
    write = writers[path.suffix.lower()]
    try:
        _write(feature_set, path, write)
    except StoreMoved:  # the same images and labels, wherever their rows are now
        _again(feature_set, path, write)
    return path


@starts_again
def _again(feature_set: FeatureSet, path: Path, write: Callable[[FeatureSet, IO[bytes]], None]) -> None:
    origin = feature_set.origin
    space = FeatureStore(origin.store, create=False).space(origin.fingerprint)
    _write(relocated(feature_set, space), path, write)


def _write(feature_set: FeatureSet, path: Path, write: Callable[[FeatureSet, IO[bytes]], None]) -> None:
    feature_set.check()
    with atomic_file(path) as file:
        write(feature_set, file)


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


def _encoded(texts: list[str]) -> npt.NDArray[np.bytes_]:
    encoded = [text.encode("utf-8") for text in texts]
    return np.array(encoded, dtype=f"S{max(map(len, encoded)) or 1}")


def _write_hdf5(features: FeatureSet, file: IO[bytes]) -> None:
    stored = features.dtype.newbyteorder("<")
    arrays = [
        PartArray(ArraySpec("X", stored, features.shape), (x for x, _ in features.blocks(_BLOCK_ROWS, stored))),
        _whole("ids", _encoded(list(features.ids))),
        *(_whole(name, _encoded(values) if isinstance(values, list) else values) for name, values in _roles(features)),
    ]
    header: dict[str, str | int] = {"column": features.column, "space": features.space_fingerprint}
    write_arrays(file.fileno(), header, arrays)


def _whole(name: str, values: npt.NDArray[Any]) -> PartArray:
    return PartArray(ArraySpec(name, values.dtype, values.shape), [values])


def _write_npz(features: FeatureSet, file: IO[bytes]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "X": features.read(),
        "ids": np.array(list(features.ids), dtype=np.str_),
    }
    for name, values in _roles(features):
        arrays[name] = np.array(values, dtype=np.str_) if isinstance(values, list) else values
    np.savez(file, allow_pickle=False, **arrays)


def _write_parquet(features: FeatureSet, file: IO[bytes]) -> None:
    values = pa.from_numpy_dtype(features.dtype)
    text = pa.string()
    roles = [
        features.table.schema.field(name) for name in ROLES if name in features.table.column_names and name != "split"
    ]
    schema = pa.schema(
        [("id", text), ("label", text), ("split", text), *roles, ("features", pa.list_(values, features.shape[1]))],
        metadata={"column": features.column, "space": features.space_fingerprint},
    )
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(features), _BLOCK_ROWS):
            block = features.take(slice(start, start + _BLOCK_ROWS))
            flat = pa.array(block.read().reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
            columns = [pa.array(texts, text) for texts in (block.ids, block.labels, block.splits)]
            columns += [block.table[role.name].combine_chunks() for role in roles]
            writer.write_table(pa.table([*columns, lists], schema=schema))
