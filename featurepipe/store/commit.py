"""Committing one part: its HDF5 structure made in memory, a temporary file, sync, verification, rename.

HDF5 lays out the file and says where each array lies, but it only ever writes its few kilobytes of structure, and
those into this process's memory. So it never meets a full disk (after which an HDF5 file cannot be closed cleanly),
and the arrays are written once, straight from where they are.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from featurepipe import __version__
from featurepipe.errors import CorruptPart, UsageError
from featurepipe.store.atomic import reporting_full_disk, sync_folder
from featurepipe.store.parts import PART_VERSION, PartInfo, damaged_arrays, read_part


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


@dataclass(frozen=True)
class PartArray:
    """One array to store: what it is, and its rows in consecutive chunks (which may be made while writing)."""

    spec: ArraySpec
    chunks: Iterable[npt.NDArray[Any]]


def write_part(folder: Path, part_id: str, *, attributes: Mapping[str, str], arrays: Sequence[PartArray]) -> PartInfo:
    """Writes one part, whole or not at all.

    Args:
        folder: The ``parts`` folder of a space.
        part_id: Name of the part, without suffix; must be new.
        attributes: ``fingerprint``, ``run_id`` and ``dataset``; the rest is added here.
        arrays: ``key``, ``id``, ``size``, ``mtime_ns`` and ``features/...``, all with the same number of rows.

    Returns:
        The header of the committed part.

    Raises:
        DiskFull: No space is left; nothing of this part stays behind.
        CorruptPart: What the file holds is not what was written; nothing of this part stays behind.
    """
    final, temporary = folder / f"{part_id}.h5", folder / f".{part_id}.h5.tmp"
    header = _header(attributes, arrays[0].spec.shape[0])
    with reporting_full_disk(final):
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            checksums = write_arrays(descriptor, header, arrays)
            part = _sync_and_verify(descriptor, temporary, checksums)
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_folder(folder)
    return replace(part, path=str(final))


def part_bytes(attributes: Mapping[str, str], specs: Sequence[ArraySpec]) -> int:
    """Returns how large the file would be that ``write_part`` makes of arrays like these; writes nothing."""
    return Skeleton(_header(attributes, specs[0].shape[0]), specs).close()[1]


def _header(attributes: Mapping[str, str], rows: int) -> dict[str, str | int]:
    return {
        "format_version": PART_VERSION,
        "rows": rows,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": f"featurepipe {__version__}",
        **attributes,
    }


def write_arrays(descriptor: int, header: Mapping[str, str | int], arrays: Sequence[PartArray]) -> dict[str, int]:
    """Writes a whole HDF5 file of contiguous arrays into an empty file; returns the CRC-32 of each array."""
    skeleton = Skeleton(header, [array.spec for array in arrays])
    try:
        checksums = {a.spec.name: _write_array(descriptor, skeleton.offsets[a.spec.name], a) for a in arrays}
        for name, crc in checksums.items():
            skeleton.set_checksum(name, crc)
    finally:
        structure, size = skeleton.close()
    for offset, content in structure:
        _write_all(descriptor, memoryview(content), offset)
    os.ftruncate(descriptor, size)  # the file may end in padding that nobody wrote
    return checksums


def _write_array(descriptor: int, offset: int, array: PartArray) -> int:
    """Writes the chunks of an array one after the other; returns the CRC-32 of all its bytes."""
    crc, position = 0, offset
    for chunk in array.chunks:
        content = np.ascontiguousarray(chunk, dtype=array.spec.dtype).reshape(-1).view(np.uint8)
        crc = zlib.crc32(content, crc)
        _write_all(descriptor, memoryview(content), position)
        position += content.nbytes
    if position - offset != array.spec.nbytes:
        raise UsageError(f"{array.spec.name}: {position - offset} bytes given, {array.spec.nbytes} announced")
    return crc


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _sync_and_verify(descriptor: int, path: Path, checksums: Mapping[str, int]) -> PartInfo:
    # Both see the same pages of the kernel's cache, so they may run side by side; the rename waits for both.
    with ThreadPoolExecutor(1, "featurepipe-fsync") as pool:
        synced = pool.submit(os.fsync, descriptor)
        part = read_part(path)
        damaged = damaged_arrays(part)
        synced.result()
    stored = {name: info.crc32 for name, info in part.arrays.items()}
    if damaged or stored != checksums:
        raise CorruptPart(
            f"part {path.name} did not read back as it was written ({', '.join(damaged) or 'checksums'}): "
            "check this machine's disk and memory"
        )
    return part


ALIGNMENT = 64  # bytes; so that memory-mapped arrays are aligned for any dtype and for vector loads


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
