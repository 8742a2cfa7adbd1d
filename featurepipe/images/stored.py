"""Arrays inside IDX and ``.npz`` files, read item by item at their offset."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH118, PTH119

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Sequence
from functools import partial
from typing import IO, Any, Final

import numpy as np

from featurepipe.errors import SourceError
from featurepipe.images.archives import LARGEST_RATIO
from featurepipe.images.arrays import Arrays
from featurepipe.images.blobs import Blob, gunzip, reading
from featurepipe.images.files import exists
from featurepipe.split_names import split_of

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
