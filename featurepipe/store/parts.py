"""Parts: the header, arrays and checksums of one, and the headers of a space's. Reading only; see ``commit.py`` for writing."""

from __future__ import annotations

import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from h5py import h5a, h5d, h5f, h5g, h5l, h5o, h5p

from featurepipe.errors import CorruptPart, StoreError, StoreMoved
from featurepipe.store.atomic import entries, kind_of, open_file

PART_VERSION = 1
FEATURES = "features/"
_ARRAYS = ("id", "key", "mtime_ns", "size")
_DTYPES = {"key": {"u1"}, "size": {"i8"}, "mtime_ns": {"i8"}}
_ATTRIBUTES = ("format_version", "rows", "fingerprint", "run_id", "dataset")
_BLOCK = 1 << 20  # bytes read at a time when checking: stays in the processor's cache
_FIRST_NOT_ASCII = 0x80
# What h5py raises on files that are not what they should be.
_UNREADABLE = (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """Where one array lies in a part's file, and what it is."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return (
            math.prod(self.shape) * np.dtype(self.dtype).itemsize
        )  # Python's numbers, which no header can make overflow


@dataclass(frozen=True, slots=True)
class PartInfo:
    """The header of one part: plain values only, so it may be pickled and sent anywhere."""

    path: str
    rows: int
    file_bytes: int
    fingerprint: str
    run_id: str
    dataset: str
    arrays: Mapping[str, ArrayInfo]

    @property
    def name(self) -> str:
        """The part's id."""
        return Path(self.path).stem

    @property
    def columns(self) -> dict[str, ArrayInfo]:
        """The feature arrays by column name, sorted."""
        return {name.removeprefix(FEATURES): self.arrays[name] for name in sorted(self.arrays) if is_feature(name)}


def is_feature(name: str) -> bool:
    """Tells whether an array's name is that of a feature column."""
    return name.startswith(FEATURES)


def read_part(path: Path) -> PartInfo:
    """Reads the header of a part; no array is read.

    Raises:
        CorruptPart: The file is not a readable part.
        StoreMoved: The file is missing.
        StoreError: It may not be read, or is of a newer format.
    """
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CorruptPart(
                f"part {path.name} is {kind_of(found.st_mode) or 'a folder'}, and nothing is read through one"
            )
        size = found.st_size
        attributes, arrays = _read_header(path)
    except FileNotFoundError as error:
        raise StoreMoved(f"part {path} is gone") from error
    except PermissionError as error:
        raise StoreError(f"cannot open part {path}: {error.strerror}") from error
    except _UNREADABLE as error:
        raise CorruptPart(f"part {path.name} has an unreadable header: {error}") from error
    return _checked(path, size, attributes, arrays)


def _read_header(path: Path) -> tuple[dict[str, str | int], dict[str, ArrayInfo]]:
    """Reads a part's attributes and arrays by h5py's plain calls: its classes take twice as long, and parts are many."""
    access = h5p.create(h5p.FILE_ACCESS)
    # Parts never change, and HDF5's own file locks fail on some network file systems.
    access.set_file_locking(use_file_locking=False, ignore_when_disabled=False)
    file = h5f.open(os.fsencode(path), h5f.ACC_RDONLY, access)
    try:
        attributes = {name: _attribute(file, name) for name in _ATTRIBUTES if h5a.exists(file, name.encode())}
        arrays = {name: info for name in _ARRAYS if (info := _array(file, name.encode())) is not None}
        # Not by `visit`: groups of a stranger's file that lie thousands deep in each other keep it busy for hours.
        columns: list[bytes] = []
        if _is_own(file, b"features") and isinstance(group := h5o.open(file, b"features"), h5g.GroupID):
            group.links.iterate(columns.append)
            found = {FEATURES + name.decode(): _array(group, name) for name in columns}
            arrays |= {name: info for name, info in found.items() if info is not None}
    finally:
        file.close()
    return attributes, arrays


def _attribute(holder: h5f.FileID | h5d.DatasetID, name: str) -> str | int:
    attribute = h5a.open(holder, name.encode())
    read = np.empty((), attribute.dtype)
    attribute.read(read)
    value: object = read[()]
    if isinstance(value, np.integer):
        return int(value)
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _is_own(group: h5g.GroupID | h5f.FileID, name: bytes) -> bool:
    """Whether a name leads to something of this file and not, by a link, to a path in it or in another file."""
    return bool(group.links.exists(name)) and bool(group.links.get_info(name).type == h5l.TYPE_HARD)


def _array(group: h5g.GroupID | h5f.FileID, name: bytes) -> ArrayInfo | None:
    """Describes a dataset; None for what is missing, reached by a link, or something else."""
    item = h5o.open(group, name) if _is_own(group, name) else None
    if not isinstance(item, h5d.DatasetID):
        return None
    offset = item.get_offset()
    return ArrayInfo(
        offset=-1 if offset is None else int(offset),
        dtype=item.dtype.str,
        shape=tuple(int(n) for n in item.shape),
        crc32=int(_attribute(item, "crc32")),
    )


def _checked(path: Path, size: int, attributes: Mapping[str, str | int], arrays: dict[str, ArrayInfo]) -> PartInfo:
    version = attributes.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CorruptPart(f"part {path.name} has no format version that is a number from 1: {version!r}")
    if version > PART_VERSION:
        raise StoreError(f"part {path} has format version {version}; this featurepipe reads up to {PART_VERSION}")
    try:
        rows = int(attributes["rows"])
        texts = {name: str(attributes[name]) for name in ("fingerprint", "run_id")}
        widths = {"key": (rows, 32), "id": (rows,), "size": (rows,), "mtime_ns": (rows,)}
        wrong = [name for name, shape in widths.items() if arrays[name].shape != shape]
    except (KeyError, ValueError) as error:
        raise CorruptPart(f"part {path.name} lacks {error}") from error
    wrong += [name for name, info in arrays.items() if not _is_sound(name, info, rows, size)]
    if wrong or rows < 1:
        raise CorruptPart(f"part {path.name}: wrong shape, dtype or place of {', '.join(sorted(set(wrong)))}")
    return PartInfo(
        str(path), rows, size, texts["fingerprint"], texts["run_id"], str(attributes.get("dataset", "")), arrays
    )


def _is_sound(name: str, info: ArrayInfo, rows: int, size: int) -> bool:
    """Whether an array has a dtype that its name allows, and lies inside the file."""
    dtype = np.dtype(info.dtype)
    if is_feature(name) and (
        len(info.shape) != 2 or info.shape[0] != rows or not info.shape[1] or info.dtype not in {"<f2", "<f4"}
    ):
        return False
    kinds = _DTYPES.get(name)
    if dtype.hasobject or not dtype.itemsize or (kinds is not None and dtype.kind + str(dtype.itemsize) not in kinds):
        return False
    return (name != "id" or dtype.kind == "S") and info.offset >= 0 and info.offset + info.nbytes <= size


def read_array(part: PartInfo, name: str) -> npt.NDArray[Any]:
    """Reads one whole array and checks it.

    Raises:
        CorruptPart: The bytes are not what was committed.
        StoreError: The file cannot be opened.
    """
    info = part.arrays[name]
    try:
        with os.fdopen(open_file(Path(part.path)), "rb") as file:
            flat = np.fromfile(file, dtype=info.dtype, count=math.prod(info.shape), offset=info.offset)
    except FileNotFoundError as error:
        raise StoreMoved(f"part {part.path} is gone") from error
    except OSError as error:
        raise StoreError(f"cannot read part {part.path}: {error.strerror}") from error
    if flat.nbytes != info.nbytes or zlib.crc32(flat.view(np.uint8)) != info.crc32:
        raise CorruptPart(f"part {part.name}: the bytes of {name} are not what was committed (checksum differs)")
    return flat.reshape(info.shape)


def read_blocks(part: PartInfo, name: str, *, block_bytes: int = 8 << 20) -> Iterator[npt.NDArray[Any]]:
    """Yields an array in consecutive blocks of rows, in bounded memory; not checked."""
    info = part.arrays[name]
    row_bytes = max(1, info.nbytes // part.rows)
    step = max(1, block_bytes // row_bytes)
    with os.fdopen(open_file(Path(part.path)), "rb") as file:
        for start in range(0, part.rows, step):
            shape = (min(step, part.rows - start), *info.shape[1:])
            file.seek(info.offset + start * row_bytes)
            yield np.fromfile(file, info.dtype, math.prod(shape)).reshape(shape)


def read_ids(part: PartInfo) -> pa.StringArray:
    """Reads the ids of a part's rows.

    Raises:
        CorruptPart: The bytes are not what was committed, or no UTF-8.
        StoreError: The file cannot be opened.
    """
    try:
        return text_of(read_array(part, "id"))
    except pa.ArrowInvalid as error:
        raise CorruptPart(f"part {part.name}: the bytes of id are no text in UTF-8") from error


def text_of(values: npt.NDArray[np.bytes_]) -> pa.StringArray:
    """Texts (N,) in Arrow of bytes (N,) of one width that zeros fill up.

    By hand, as ``pa.array`` of a NumPy array imports pandas where that is installed, to ask whether it is a Series: 0.3 s, 50 MB.

    Raises:
        pa.ArrowInvalid: It is no UTF-8, or more than 2 GB.
    """
    lengths = np.strings.str_len(values)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise pa.ArrowInvalid(f"{offsets[-1]} bytes of text")
    table = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.itemsize)
    text = table[np.arange(values.itemsize) < lengths[:, None]]
    found = pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text))
    found.validate(full=True)
    return found


def numbers_of(values: npt.NDArray[np.generic]) -> pa.Array:
    """Numbers (N,) in Arrow, of the same bytes where they lie in a row; see `text_of` for why."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


CHECKSUM_DIFFERS = "its bytes are not what was committed (checksum differs)"
NOT_FINITE = "it holds NaN or infinity, which is never committed"


def array_faults(part: PartInfo) -> dict[str, str]:
    """Reads every byte of a part's arrays and says of each that is damaged what is wrong."""
    descriptor = open_file(Path(part.path))
    try:
        found = {name: fault_of(descriptor, info, finite=is_feature(name)) for name, info in part.arrays.items()}
    finally:
        os.close(descriptor)
    if not found["id"] and not _is_text(part, "id"):
        found["id"] = "its bytes are no text in UTF-8"
    return {name: fault for name, fault in found.items() if fault}


def _is_text(part: PartInfo, name: str) -> bool:
    """Whether all values of an array are UTF-8; in blocks, as those of a large part take several times its bytes."""
    try:
        for block in read_blocks(part, name, block_bytes=_BLOCK):
            if (block.view(np.uint8) >= _FIRST_NOT_ASCII).any():
                text_of(block)
    except pa.ArrowInvalid:
        return False
    return True


def damaged_arrays(part: PartInfo) -> list[str]:
    """Reads every byte of a part's arrays and names those that are damaged."""
    return list(array_faults(part))


class CommittedArray(Protocol):
    """Where an array lies in a file, and what is known of it."""

    @property
    def offset(self) -> int:
        """Of its first byte."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""

    @property
    def dtype(self) -> str:
        """Of its values."""

    @property
    def crc32(self) -> int:
        """Of its bytes when they were committed."""


def fault_of(descriptor: int, info: CommittedArray, *, finite: bool) -> str:
    """Reads an array in bounded memory and says what is wrong with it; empty if nothing is.

    Args:
        descriptor: Of the open file.
        info: Where the array lies.
        finite: Whether its values, of float16 or float32, have to be finite. A checksum tells damage and not malice: a
            stranger's part may have any values under a matching one.
    """
    buffer, crc, position, stop = memoryview(bytearray(_BLOCK)), 0, info.offset, info.offset + info.nbytes
    is_finite = True
    while position < stop:
        block = buffer[: min(_BLOCK, stop - position)]
        filled = 0
        while filled < len(block):
            count = os.preadv(descriptor, [block[filled:]], position + filled)
            if count == 0:
                return CHECKSUM_DIFFERS  # the file ends before
            filled += count
        crc = zlib.crc32(block, crc)
        is_finite = is_finite and (not finite or all_finite(np.frombuffer(block, info.dtype)))
        position += filled
    return CHECKSUM_DIFFERS if crc != info.crc32 else "" if is_finite else NOT_FINITE


def all_finite(values: npt.NDArray[Any]) -> bool:
    """Tells whether no value, of float16 or float32, is NaN or infinite."""
    if values.dtype == np.float16:  # an all-ones exponent; 2.5 times faster than isfinite
        return not bool(((values.view(np.uint16) & 0x7C00) == 0x7C00).any())
    return bool(np.isfinite(values).all())


_Signature = tuple[int, int, int]  # inode, size and time of change: what a part that is put back has another of


def list_parts(folder: Path) -> dict[str, _Signature]:
    """Lists the part files in a folder, which may be missing, by name, which is by run."""
    found = [entry for entry in entries(folder) if entry.name.endswith(".h5") and not entry.name.startswith(".")]
    return {entry.name: signature for entry in found if (signature := _signature(entry))}


def _signature(entry: os.DirEntry[str]) -> _Signature | None:
    try:
        stat = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # compacted away since the folder was listed
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(slots=True)
class Headers:
    """What is known of one space's parts; shared by all that read them in a process, since a part never changes.

    Attributes:
        read: The header of each part that can be read, with the file it was read from.
        damaged: Why each of the others cannot, with its file.
    """

    read: dict[str, tuple[_Signature, PartInfo]] = field(default_factory=dict)
    damaged: dict[str, tuple[_Signature, str]] = field(default_factory=dict)

    def refresh(self, folder: Path, fingerprint: str) -> list[PartInfo]:
        """Reads the headers of parts that are new in the folder, and returns all that can be read, by name."""
        present = list_parts(folder)
        self._forget(present)
        for name, signature in present.items():
            if name not in self.read and name not in self.damaged:
                self._read(folder / name, signature, fingerprint)
        return [self.read[name][1] for name in present if name in self.read]

    def mark_damaged(self, part: PartInfo, error: CorruptPart) -> None:
        """Counts a part as damaged from now on."""
        name = Path(part.path).name
        if name in self.read:
            self.damaged[name] = (self.read.pop(name)[0], str(error))

    def _forget(self, present: dict[str, _Signature]) -> None:
        """Drops what is known of files that are gone, or are others by now."""
        for known in (self.read, self.damaged):
            for name in [name for name, (signature, _) in known.items() if present.get(name) != signature]:
                del known[name]

    def _read(self, path: Path, signature: _Signature, fingerprint: str) -> None:
        try:
            header = read_part(path)
        except CorruptPart as error:
            self.damaged[path.name] = signature, str(error)
        except StoreError:
            if path.exists():  # else: compacted away since the folder was listed
                raise
        else:
            if header.fingerprint == fingerprint:
                self.read[path.name] = signature, header
            else:
                why = f"part {path.name} is of another feature space ({header.fingerprint[:12]})"
                self.damaged[path.name] = signature, why
