"""Images stored as arrays: IDX (MNIST's format), ``.npz`` and ``.h5``, read item by item."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH118, PTH119

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any, Final, Protocol

import numpy as np
import pyarrow as pa

from featurepipe.annotations import split_of
from featurepipe.errors import FeaturepipeError, Reject, SourceError, UsageError
from featurepipe.images.archives import LARGEST_RATIO
from featurepipe.images.blobs import Blob, PerProcess, gunzip, reading
from featurepipe.images.files import exists, identity_of, stat_file, unreadable
from featurepipe.images.listing import Findings, Row, check_unique, printable, table_of
from featurepipe.images.source import Source

_IMAGES: Final = {"x", "images", "image", "data"}
_LABELS: Final = {"y", "labels", "label", "targets"}


class Sliceable(Protocol):
    """What is asked of a stored array: an item is read only when it is indexed."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    # stored_bytes: int, where it is known: how many bytes of the file hold the array, compressed or not.

    def __getitem__(self, index: int | slice) -> Any: ...


Arrays = Mapping[str, Sliceable]
ArrayReader = Callable[[str], Arrays]


@dataclass(frozen=True)
class _Block:
    """The images of one array, with their labels."""

    prefix: str  # of their ids
    split: str | None
    images: Sliceable
    labels: Sequence[object] | None
    mtime_ns: int
    path: str
    ignored: Sequence[str]  # arrays of its file that are neither images nor their labels


class ArraySource(Source):
    """Images in the arrays of one file or several.

    Arrays named ``x``, ``images`` (alone, or with a split: ``x_train``, ``test_images``) are the images, ``y`` or
    ``labels`` with the same split their labels. An id is ``<split, else the file's stem>/<index>``.

    Args:
        files: For each file its path and the function that opens it as a mapping name -> array.
        name: The default dataset name.
        location: See :class:`Source`.
    """

    def __init__(self, files: Sequence[tuple[str, ArrayReader]], name: str, location: str) -> None:
        self.name = name
        self.location = location
        self._files = list(files)
        self._identities: list[
            tuple[Any, ...]
        ] = []  # travel along, so that a worker takes no earlier file for this one
        self._blocks = PerProcess(self._open)
        self._lock = PerProcess(threading.Lock)  # HDF5 is not safe to call from two threads

    def scan(self) -> pa.Table:
        """Lists the images; reads the labels, no pixels."""
        identities = [identity_of(path) for path, _ in self._files]
        if identities != self._identities:  # another file has the path of one that is open
            self.close()
        self._identities = identities
        findings = Findings(ignored_are="arrays")
        table = check_unique(table_of(self._rows(findings)), self.name, "keep one of the arrays")
        return findings.attach(table)

    def read(self, locator: bytes) -> np.ndarray[Any, Any]:
        """Reads one image's pixels; see :meth:`Source.read`."""
        blocks, number = self._blocks.get(), int.from_bytes(locator[:4], "little")
        index = int.from_bytes(locator[4:], "little")
        if number >= len(blocks) or index >= blocks[number].images.shape[0]:
            raise Reject("missing: the arrays hold fewer images than when they were listed")
        try:
            with self._lock.get():
                return np.asarray(blocks[number].images[index])
        except OSError as error:
            raise unreadable(error) from error

    def close(self) -> None:
        """Closes the files; a spooled copy is deleted."""
        for block in self._blocks.forget() or []:
            if (close := getattr(block.images, "close", None)) is not None:
                close()

    def _open(self) -> list[_Block]:
        blocks = []
        for path, reader in self._files:
            try:
                blocks += _pair(reader(path), path)
            except FeaturepipeError:
                raise
            except FileNotFoundError as error:
                raise SourceError(f"{path}: no such file") from error
            except Exception as error:  # the border of one file: readers and file systems raise what their libraries do
                raise SourceError(f"{path}: cannot be read: {error}") from error
        # Two files of one split, such as EMNIST's, keep their own names.
        prefixes = Counter(block.prefix for block in blocks)
        return [
            replace(block, prefix=_stem(block.path)) if prefixes[block.prefix] > 1 and len(self._files) > 1 else block
            for block in blocks
        ]

    def _rows(self, findings: Findings) -> Iterator[Row]:
        blocks = self._blocks.get()
        findings.ignored += dict.fromkeys(name for block in blocks for name in block.ignored)
        for number, block in enumerate(blocks):
            shape = block.images.shape
            size = int(np.prod(shape[1:], dtype=np.int64)) * block.images.dtype.itemsize
            place = number.to_bytes(4, "little")
            for index in range(shape[0]):
                label = findings.label(block.labels[index], block.prefix, index) if block.labels is not None else None
                # Six digits at least: ids stay the same when images are appended.
                id_ = f"{block.prefix}/{index:06d}"
                yield id_, label, block.split, size, block.mtime_ns, place + index.to_bytes(8, "little")


def _pair(arrays: Arrays, path: str) -> list[_Block]:
    roles = {name: _role(name) for name in sorted(arrays)}
    labels = _one_per_split(roles, "labels", path)
    images = _one_per_split(roles, "images", path)
    used = {*images.values(), *(name for split, name in labels.items() if split in images)}
    ignored = [name for name in roles if name not in used]
    mtime_ns = stat_file(path)[1]
    blocks = []
    for split, name in images.items():
        pixels = arrays[name]
        if len(pixels.shape) not in (3, 4):
            raise UsageError(f"{path}: array {name!r} has shape {pixels.shape}; images are (N, H, W) or (N, H, W, C)")
        _check_rows(pixels, f"{path}: array {name!r}")
        values = (
            _labels(arrays[labels[split]], pixels.shape[0], f"{path}: {labels[split]}") if split in labels else None
        )
        blocks.append(_Block(split or _stem(path), split, pixels, values, mtime_ns, path, ignored))
    if not blocks:
        raise UsageError(
            f"{path}: no image array among {', '.join(sorted(arrays)) or 'no arrays'}; call it x or images, or per "
            "split x_train, x_val, x_test (labels: y or labels)"
        )
    return blocks


def _one_per_split(roles: Mapping[str, tuple[str | None, str | None]], wanted: str, path: str) -> dict[str | None, str]:
    """The array of each split that has a role; two of one are an error."""
    found: dict[str | None, str] = {}
    for name, (role, split) in roles.items():
        if role == wanted and found.setdefault(split, name) != name:
            of = f" of split {split}" if split else ""
            raise SourceError(
                f"{path}: both {found[split]!r} and {name!r} are named like the {wanted}{of}; keep one of the arrays"
            )
    return found


def _check_rows(images: Sliceable, where: str) -> None:
    """Refuses rows that no bytes stand for: a header of a hundred bytes may claim billions, and each would be listed."""
    item, stored = math.prod(images.shape[1:]) * images.dtype.itemsize, getattr(images, "stored_bytes", None)
    claimed = item * images.shape[0]
    if images.shape[0] and (not item or (stored is not None and claimed > LARGEST_RATIO * stored)):
        raise SourceError(
            f"{where} claims {images.shape[0]:,} images of {item:,} bytes, and the file holds "
            f"{stored if stored is not None else 0:,} bytes of them; it is damaged, or was never written"
        )


def _role(name: str) -> tuple[str | None, str | None]:
    """What an array is and of which split: ``x_train``, ``train_set_x`` -> images, train."""
    words = re.split(r"[_\-./\s]+", name.strip("_-./ ").lower())
    for place, word in enumerate(words):
        role = "images" if word in _IMAGES else "labels" if word in _LABELS else None
        rest = "_".join(words[:place] + words[place + 1 :])
        split = split_of(rest)
        if role and (split or not rest):
            return role, split
    return None, None


def _labels(array: Sliceable, count: int, where: str) -> Sequence[object]:
    size = math.prod(array.shape)
    if size != count:
        raise SourceError(f"{where}: {size} labels for {count} images; give one label per image")
    return np.asarray(array[:]).ravel().tolist()


def _stem(path: str) -> str:
    return printable(os.path.basename(path).partition(".")[0])


IDX_IMAGES: Final = re.compile(r"idx[34]-ubyte(\.gz)?$", re.IGNORECASE)
_UBYTE: Final = 0x08


class StoredArray:
    """An array of contiguous items in a file, in C order.

    Attributes:
        shape: Its extents.
        dtype: Its type.
    """

    def __init__(self, blob: Blob, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype
        self._blob = blob
        self._offset = offset
        self._stride = math.prod(shape[1:]) * dtype.itemsize

    def __getitem__(self, index: int | slice) -> np.ndarray[Any, Any]:
        first, last, _ = index.indices(self.shape[0]) if isinstance(index, slice) else (index, index + 1, 1)
        data = self._blob.pread(self._offset + first * self._stride, (last - first) * self._stride)
        items = np.frombuffer(data, self.dtype).reshape(last - first, *self.shape[1:])
        return items if isinstance(index, slice) else items[0]

    def close(self) -> None:
        """Closes the file behind it."""
        self._blob.close()


def read_idx(path: str) -> Arrays:
    """Opens an IDX image file and, if it is there, the label file beside it.

    The format is that of Y. LeCun's MNIST page: two zero bytes, a type, the number of dimensions, each extent as a
    big-endian 32-bit integer, then the data.

    Raises:
        SourceError: A file is missing, truncated, or no IDX file of bytes.
    """
    suffix = f"_{split}" if (split := idx_split(path)) else ""
    arrays = {f"images{suffix}": _idx_array(path)}
    for candidate in _label_files(path):
        if exists(candidate):
            return arrays | {f"labels{suffix}": _idx_array(candidate)}
    return arrays


def idx_split(path: str) -> str | None:
    """The split in an IDX file's name: ``t10k-images-idx3-ubyte`` -> test."""
    words = re.split(r"[-_.]", os.path.basename(path).lower())
    return next(filter(None, ("test" if word == "t10k" else split_of(word) for word in words)), None)


def _label_files(path: str) -> list[str]:
    folder, name = os.path.split(path)
    plain = re.sub(r"idx[34]", "idx1", name.removesuffix(".gz")).replace("images", "labels")
    return [os.path.join(folder, candidate) for candidate in (plain, plain + ".gz")]


def _idx_array(path: str) -> StoredArray:
    blob = Blob(path, unpack=gunzip if path.lower().endswith(".gz") else None)
    zeros, kind, dimensions = struct.unpack(">HBB", blob.pread(0, 4))
    if zeros or kind != _UBYTE or not 1 <= dimensions <= 4:
        raise SourceError(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", blob.pread(4, 4 * dimensions))
    offset = 4 + 4 * dimensions
    _check_claim(path, shape, offset + math.prod(shape), blob.size)
    return StoredArray(blob, offset, shape, np.dtype(np.uint8))


def _check_claim(what: str, shape: Sequence[int], takes: int, there: int) -> None:
    """Refuses a header whose array takes more bytes than there are."""
    if min(shape, default=1) < 0:
        raise SourceError(f"{what}: claims the shape {tuple(shape)}, which no array has")
    if there < takes:
        raise SourceError(f"{what}: truncated: {there} bytes, but {tuple(shape)} takes {takes}")


def read_npz(path: str) -> Arrays:
    """Opens the arrays of an ``.npz`` file, without unpickling anything.

    Raises:
        SourceError: The file is missing or damaged, an array holds Python objects, or claims more bytes than there are.
    """
    whole = Blob(path)
    try:
        with reading(path, ".npz file"), whole.stream() as stream, zipfile.ZipFile(stream) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _npz_array(archive, name, path, whole.size) for name in names}
    finally:
        whole.close()


def _npz_array(archive: zipfile.ZipFile, name: str, path: str, there: int) -> StoredArray:
    with archive.open(name) as member:
        shape, _, dtype = _npy_header(member)
        header = member.tell()
    if dtype.hasobject:
        raise SourceError(f"{path}: {name} holds Python objects, which are never unpickled; save it as uint8")
    claim = archive.getinfo(name)
    holds = min(claim.file_size, LARGEST_RATIO * min(claim.compress_size, there))
    _check_claim(f"{path}: {name}", shape, math.prod(shape) * dtype.itemsize + header, holds)
    return StoredArray(Blob(path, unpack=partial(_unpack_npy, name)), 0, shape, dtype)


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = reader(member)
    return shape, is_fortran, dtype


def _unpack_npy(name: str, original: IO[bytes], target: IO[bytes]) -> None:
    """Writes the items of one member in C order."""
    with zipfile.ZipFile(original) as archive, archive.open(name) as member:
        shape, is_fortran, dtype = _npy_header(member)
        if is_fortran:  # rare, and the only way is through memory
            data = np.frombuffer(member.read(), dtype).reshape(shape, order="F")
            target.write(np.ascontiguousarray(data).tobytes())
        else:
            shutil.copyfileobj(member, target, 1 << 20)
