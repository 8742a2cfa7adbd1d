"""Committing one part: temporary file, sync, verification, rename."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe import __version__
from featurepipe.errors import CorruptPart, UsageError
from featurepipe.store.atomic import reporting_full_disk, sync_folder
from featurepipe.store.parts import PART_VERSION, PartInfo, damaged_arrays, read_part
from featurepipe.store.skeleton import ArraySpec, Skeleton


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
