"""Handing features to programs that know nothing of featurepipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featurepipe.errors import StoreMoved, UsageError
from featurepipe.store.atomic import atomic_file
from featurepipe.store.choice import relocated
from featurepipe.store.commit import ArraySpec, PartArray, write_arrays
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.locks import starts_again
from featurepipe.store.views import FeatureSet

_BLOCK_ROWS = 4096


def export(feature_set: FeatureSet, to: str | Path) -> Path:
    """Writes features as one plain file, whole or not at all.

    ``.h5`` and ``.npz`` hold ``X`` (n, D) in the stored dtype, ``ids`` (n,), ``splits`` (n,), empty text where there is
    none, and, if any image is labelled, ``y`` (n,) int64 with numbers into ``classes``, -1 where there is no label.
    ``.parquet`` holds ``id``, ``label``, ``split`` and ``features`` (a list of fixed length). HDF5 and parquet are
    written in bounded memory. The checksum of every part concerned is compared before anything is written.

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


def _splits(features: FeatureSet) -> list[str]:
    return [split or "" for split in features.splits]


def _encoded(texts: list[str]) -> npt.NDArray[np.bytes_]:
    encoded = [text.encode("utf-8") for text in texts]
    return np.array(encoded, dtype=f"S{max(map(len, encoded)) or 1}")


def _write_hdf5(features: FeatureSet, file: IO[bytes]) -> None:
    stored = features.dtype.newbyteorder("<")
    arrays = [
        PartArray(ArraySpec("X", stored, features.shape), (x for x, _ in features.blocks(_BLOCK_ROWS, stored))),
        _whole("ids", _encoded(list(features.ids))),
        _whole("splits", _encoded(_splits(features))),
    ]
    if features.classes:
        arrays += [_whole("y", features.codes()), _whole("classes", _encoded(features.classes))]
    header: dict[str, str | int] = {"column": features.column, "space": features.space_fingerprint}
    write_arrays(file.fileno(), header, arrays)


def _whole(name: str, values: npt.NDArray[Any]) -> PartArray:
    return PartArray(ArraySpec(name, values.dtype, values.shape), [values])


def _write_npz(features: FeatureSet, file: IO[bytes]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "X": features.read(),
        "ids": np.array(list(features.ids), dtype=np.str_),
        "splits": np.array(_splits(features), dtype=np.str_),
    }
    if features.classes:
        arrays |= {"y": features.codes(), "classes": np.array(features.classes, dtype=np.str_)}
    np.savez(file, allow_pickle=False, **arrays)


def _write_parquet(features: FeatureSet, file: IO[bytes]) -> None:
    values = pa.from_numpy_dtype(features.dtype)
    text = pa.string()
    schema = pa.schema(
        [("id", text), ("label", text), ("split", text), ("features", pa.list_(values, features.shape[1]))],
        metadata={"column": features.column, "space": features.space_fingerprint},
    )
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(features), _BLOCK_ROWS):
            block = features.take(slice(start, start + _BLOCK_ROWS))
            flat = pa.array(block.read().reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
            columns = [pa.array(texts, text) for texts in (block.ids, block.labels, block.splits)]
            writer.write_table(pa.table([*columns, lists], schema=schema))
