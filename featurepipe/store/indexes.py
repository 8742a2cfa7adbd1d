"""Indexes of look-alikes beside the features: what is said of one, its file, and which of them nothing needs any more."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from featurepipe.errors import StoreError
from featurepipe.store.atomic import atomic_file, listed, made_folder, open_file, parsed_object
from featurepipe.store.keys import KEY_BYTES, Keys

INDEX_VERSION = 1
FILES = "indexes/*/*.npz"
"""Where indexes are in a store."""
_DOCUMENT = "document"
_NPY_HEADER = 4096  # bytes, more than there are before the values of an array
_ALIGNED = 4
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    struct.error,
)  # ValidationError, too

Array = npt.NDArray[Any]
Count = Annotated[int, Field(ge=0)]


class IndexDocument(BaseModel):
    """What an index says of itself.

    Attributes:
        version: Of the format.
        dataset: Of whose images it is.
        snapshot: Run id of the snapshot that it is of, for people; ``images_digest`` decides.
        images_digest: SHA-256 of the keys of the snapshot's usable images, in their order.
        fingerprint: Of the feature space.
        columns: In the order of the feature vector.
        distance: ``cosine`` or ``euclidean``.
        width: Values of a feature vector, D.
        vectors: Different images, n.
        trained_on: How many there were when the cells were made.
        scale: What euclidean features are divided by.
        probes: Cells that a search looks into.
        candidates: Vectors that it compares by all their values.
        recall: The share of the 10 nearest that it finds, as measured when it was made or last brought up to date: of images that
            were there and of those that came, the lower one.
        recall_made: The same when the cells were made; None if an earlier version made them.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, defer_build=True)

    version: Annotated[int, Field(ge=1)]
    dataset: str
    snapshot: str
    images_digest: str
    fingerprint: str
    columns: list[str]
    distance: str
    width: Count
    vectors: Count
    trained_on: Count
    scale: float
    probes: Count
    candidates: Count
    recall: float
    recall_made: float | None = None


@dataclass(frozen=True)
class StoredIndex:
    """An index as its file has it: an inverted file, whose vectors lie in c cells around centres.

    Attributes:
        document: What it says of itself.
        keys: (n, 32) of the images, cell by cell.
        rows: (m,) number in ``keys`` of each usable image of the snapshot, in their order.
        axes: (D, d) onto which features are projected; (0, d) where they stay as they are, D = d.
        offset: (d,) that is taken from them then.
        centres: (c, d) of the cells.
        sizes: (c,) vectors in each.
        codes: (n, d) float16, the projected features, cell by cell.
    """

    document: IndexDocument
    keys: Keys
    rows: npt.NDArray[np.uint32]
    axes: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]
    centres: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.uint32]
    codes: npt.NDArray[np.float16]


_SHAPES: Mapping[str, tuple[str, int]] = {
    "keys": ("|u1", 2), "rows": ("<u4", 1), "axes": ("<f4", 2), "offset": ("<f4", 1), "centres": ("<f4", 2),
    "sizes": ("<u4", 1), "codes": ("<f2", 2),
}  # fmt: skip


def digest_of_images(keys: Keys) -> str:
    """SHA-256 of the keys (n, 32) of images, in their order: two snapshots with the same are of the same images."""
    return hashlib.sha256(np.ascontiguousarray(keys)).hexdigest()


def index_path(root: Path, dataset: str, fingerprint: str, columns: Sequence[str], distance: str) -> Path:
    """Where the index of some columns of a dataset is, or would be."""
    which = hashlib.sha256("\0".join([*columns, distance]).encode()).hexdigest()[:8]
    return root / "indexes" / dataset / f"{fingerprint[:12]}-{which}.npz"


def write_index(root: Path, index: StoredIndex) -> Path:
    """Writes an index, whole or not at all; it takes the place of the one before.

    Raises:
        DiskFull: No space is left.
        OSError: The store cannot be written to.
    """
    about = index.document
    path = index_path(root, about.dataset, about.fingerprint, about.columns, about.distance)
    made_folder(made_folder(root / "indexes") / about.dataset)
    document = np.frombuffer(about.model_dump_json().encode(), np.uint8)
    arrays: dict[str, Any] = {_DOCUMENT: document}
    arrays |= {name: getattr(index, name).astype(dtype, copy=False) for name, (dtype, _) in _SHAPES.items()}
    with atomic_file(path) as file:
        np.savez(file, **arrays)
    return path


def read_index(path: Path, *names: str) -> StoredIndex | None:
    """Maps an index into memory, or some arrays of it, the others being empty; compares the checksums of what it maps.

    Args:
        path: Of its file.
        names: Of the arrays; by default all.

    Returns:
        The index; None if there is none.

    Raises:
        StoreError: It is damaged, or of a newer version.
    """
    try:
        with os.fdopen(open_file(path), "rb") as file, zipfile.ZipFile(file) as members:
            whole = memoryview(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )  # which lives as long as the arrays
            packed = [one.filename for one in members.infolist() if one.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise StoreError(f"{path} is no index: {packed[0]} in it is compressed")
            document = _document(_array(whole, members.getinfo(f"{_DOCUMENT}.npy"), "|u1", 1))
            if document.version > INDEX_VERSION:
                raise StoreError(f"{path} is an index of version {document.version}: upgrade featurepipe, or remove it")
            wanted = names or tuple(_SHAPES)
            arrays = {
                name: _array(whole, members.getinfo(f"{name}.npy"), *kind)
                if name in wanted
                else np.zeros((0,) * kind[1], kind[0])
                for name, kind in _SHAPES.items()
            }
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        raise StoreError(
            f"index {path} is damaged ({_line(error)}); `similar --index always` makes it again"
        ) from error
    index = StoredIndex(document, **arrays)
    if not names:
        _check_shapes(path, index)
    return index


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _array(whole: memoryview, member: zipfile.ZipInfo, dtype: str, dimensions: int) -> Array:
    """An array of an uncompressed .npz file where it lies; it may start at any byte, but that of 4-byte numbers is aligned."""
    name_bytes, further_bytes = struct.unpack_from("<HH", whole, member.header_offset + 26)  # of the header before it
    start = member.header_offset + 30 + name_bytes + further_bytes
    packed = whole[start : start + member.file_size]
    if len(packed) < member.file_size or zlib.crc32(packed) != member.CRC:
        raise zipfile.BadZipFile(f"{member.filename}: its checksum differs")
    header = io.BytesIO(packed[:_NPY_HEADER])
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"{member.filename} is no array of version 1.0")
    shape, is_fortran, kind = np.lib.format.read_array_header_1_0(header)
    if kind != np.dtype(dtype) or len(shape) != dimensions or is_fortran:
        raise ValueError(f"{member.filename} is {kind} of {len(shape)} dimensions")
    found: Array = np.frombuffer(packed[header.tell() :], kind).reshape(shape)
    return np.require(found, requirements="A") if kind.itemsize == _ALIGNED else found


def _document(text: Array) -> IndexDocument:
    return IndexDocument.model_validate(parsed_object(text.tobytes()))


def _check_shapes(path: Path, index: StoredIndex) -> None:
    about, (vectors, width) = index.document, index.codes.shape
    fit = (
        index.keys.shape == (about.vectors, KEY_BYTES)
        and vectors == about.vectors == int(index.sizes.sum())
        and index.centres.shape == (len(index.sizes), width)
        and index.offset.shape == (width,)
        and index.axes.shape in ((about.width, width), (0, width))
        and (len(index.axes) > 0 or width == about.width)
        and int(index.rows.max(initial=0)) < max(vectors, 1)
        and about.probes >= 1
    )
    if not fit:
        raise StoreError(
            f"index {path} is damaged (its arrays do not fit together); `similar --index always` makes it again"
        )


def broken_indexes(root: Path, fingerprints: Collection[str]) -> Iterator[tuple[Path, str]]:
    """Yields the indexes of a store that are damaged, or of no space of the store, and what is wrong."""
    for path in listed(root, FILES):
        try:
            index = read_index(path)
        except StoreError as error:
            yield path, str(error)
            continue
        if index is not None and index.document.fingerprint not in fingerprints:
            yield path, "it is of a feature space that is not here; featurepipe gc removes it"


def unneeded_indexes(
    root: Path,
    datasets: Collection[str],
    fingerprints: Collection[str],
    needed: Callable[[Keys], npt.NDArray[np.bool_]],
) -> list[Path]:
    """Lists the indexes that must go: of a dataset or space that is gone, or with images that no snapshot has, or damaged.

    Args:
        root: The store's folder.
        datasets: Those that have a snapshot.
        fingerprints: Of the feature spaces.
        needed: Which of some keys (n, 32) a snapshot has.
    """
    found = []
    for path in listed(root, FILES):
        try:
            index = read_index(path, "keys")
        except StoreError:
            found.append(path)
            continue
        if index is None:
            continue
        about = index.document
        if about.dataset not in datasets or about.fingerprint not in fingerprints or not needed(index.keys).all():
            found.append(path)
    return found


def described_indexes(root: Path) -> list[dict[str, Any]]:
    """What the indexes of a store say of themselves, for ``featurepipe info``; damaged ones are passed over."""
    found = []
    for path in listed(root, FILES):
        try:
            index = read_index(path, _DOCUMENT)
        except StoreError:
            continue
        if index is not None:
            about = index.document.model_dump(mode="json")
            found.append({"file": str(path.relative_to(root)), "bytes": path.lstat().st_size, **about})
    return found
