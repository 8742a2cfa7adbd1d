"""The HDF5 structure of a part, made in memory; the arrays' bytes go to the disk past HDF5.

HDF5 lays out the file and says where each array lies, but it only ever writes its few kilobytes of structure, and
those into this process's memory. So it never meets a full disk (after which an HDF5 file cannot be closed cleanly),
and the arrays are written once, straight from where they are.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import h5py
import numpy as np

ALIGNMENT = 64  # bytes; so that memory-mapped arrays are aligned for any dtype and for vector loads


@dataclass(frozen=True)
class ArraySpec:
    """Name inside the file, little-endian dtype and shape of one array."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class _SparseMemory(io.RawIOBase):
    """A file of any size that remembers only what was written into it."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self.size = 0
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: bytes) -> int:  # type: ignore[override]
        content = bytes(data)
        self.writes.append((self._position, content))
        self._position += len(content)
        self.size = max(self.size, self._position)
        return len(content)

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        start, stop = self._position, self._position + len(view)
        view[:] = bytes(len(view))
        for offset, content in self.writes:
            low, high = max(offset, start), min(offset + len(content), stop)
            if low < high:
                view[low - start : high - start] = content[low - offset : high - offset]
        self._position = stop
        return len(view)


class Skeleton:
    """The structure of one part file: ask where arrays lie, say their checksums, take the bytes of the structure.

    Args:
        attributes: Attributes of the root group; text is stored as fixed-length UTF-8.
        arrays: The arrays, each stored contiguously, in this order.
    """

    def __init__(self, attributes: Mapping[str, str | int], arrays: Sequence[ArraySpec]) -> None:
        self._memory = _SparseMemory()
        # v108: structure is checksummed by HDF5 itself, and anything since HDF5 1.8 (2008) can read it.
        self._file = h5py.File(
            self._memory, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=ALIGNMENT
        )
        for name, value in attributes.items():
            self._file.attrs.create(name, **_attribute(value))
        self.offsets = {spec.name: self._allocate(spec) for spec in arrays}

    def _allocate(self, spec: ArraySpec) -> int:
        """Reserves room for one array and returns its offset in the file, in bytes."""
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        links.set_char_encoding(h5py.h5t.CSET_UTF8)
        text = spec.dtype.kind == "S"
        dtype = h5py.string_dtype("utf-8", spec.dtype.itemsize) if text else spec.dtype
        stored = h5py.h5t.py_create(dtype, logical=True)
        extent = h5py.h5s.create_simple(spec.shape)
        dataset = h5py.Dataset(h5py.h5d.create(self._file.id, spec.name.encode(), stored, extent, creation, links))
        dataset.attrs.create("crc32", 0, dtype="<u4")
        return int(dataset.id.get_offset())

    def set_checksum(self, name: str, crc32: int) -> None:
        """Records the checksum of an array's bytes."""
        self._file[name].attrs.modify("crc32", np.uint32(crc32))

    def close(self) -> tuple[list[tuple[int, bytes]], int]:
        """Finishes the structure.

        Returns:
            Pairs of (offset, bytes) to write in this order, and the size of the whole file in bytes.
        """
        self._file.close()
        return self._memory.writes, self._memory.size


def _attribute(value: str | int) -> dict[str, object]:
    if isinstance(value, int):
        return {"data": value, "dtype": "<i8"}
    encoded = value.encode("utf-8")
    return {"data": np.bytes_(encoded), "dtype": h5py.string_dtype("utf-8", max(1, len(encoded)))}
