"""Array files of others in HDF5, sliced lazily and safely."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurepipe.errors import StoreError, UsageError


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
