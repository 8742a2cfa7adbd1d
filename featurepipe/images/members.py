"""What a tar or zip archive lists, and where each image lies in it."""

from __future__ import annotations

import json
import posixpath
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Final, NamedTuple, Self

from featurepipe.errors import SourceError
from featurepipe.images.blobs import Blob
from featurepipe.images.labels import is_image_name
from featurepipe.images.listing import printable

STORED: Final = 0
DEFLATED: Final = 8
LINK: Final = 0xFFFF  # a tar member that is a link: listed, and rejected when read

_LOCATOR: Final = struct.Struct("<IQQQHq")
_PLAIN: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_ENCRYPTED: Final = 0x1
_BLOCK: Final = 512


class Member(NamedTuple):
    """Where one image lies: what a locator of an archive says."""

    archive: int  # index into the source's archives
    offset: int  # of the member's data in the file; in a zip, of its local header
    stored: int  # bytes in the archive
    size: int  # bytes of the image
    method: int  # STORED, DEFLATED or LINK
    crc: int  # of the image's bytes, -1 where the archive has none

    def pack(self) -> bytes:
        """The locator."""
        return _LOCATOR.pack(*self)

    @classmethod
    def unpack(cls, locator: bytes) -> Self:
        """The member that a locator stands for."""
        return cls(*_LOCATOR.unpack(locator))


class Found(NamedTuple):
    """One image that an archive lists."""

    path: str
    label: str | None
    member: Member


def list_zip(blob: Blob, archive: int) -> Iterator[Found]:
    """Lists the images of a zip in the order of its directory.

    Raises:
        SourceError: The archive is damaged, truncated or encrypted.
    """
    try:
        with blob.stream() as stream, zipfile.ZipFile(stream) as opened:
            members = opened.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise SourceError(f"{blob.path}: not a readable zip archive (truncated?): {error}") from error
    if any(info.header_offset < 0 for info in members):
        raise SourceError(f"{blob.path}: not a readable zip archive (damaged?): its directory is not where it says")
    for info in members:
        if info.is_dir() or not is_image_name(info.filename):
            continue
        if info.flag_bits & _ENCRYPTED:
            raise SourceError(f"{blob.path}: {info.filename!r} is encrypted; make the archive without a password")
        place = Member(archive, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
        yield Found(_clean(info.filename), None, place)


def list_tar(blob: Blob, archive: int) -> Iterator[Found]:
    """Lists the images of a tar in its order, each with its sample's label.

    Raises:
        SourceError: The archive is damaged or truncated.
    """
    sample, images, label = "", list[Found](), None
    for info in _headers(blob):
        path = _clean(info.name)
        if _sample_of(path) != sample:
            yield from (found._replace(label=label) for found in images)
            sample, images, label = _sample_of(path), [], None
        if is_image_name(path) and not info.isdir():
            method = STORED if info.type in _PLAIN else LINK
            images.append(Found(path, None, Member(archive, info.offset_data, info.size, info.size, method, -1)))
        elif info.type in _PLAIN and path.endswith((".cls", ".json")):
            label = _label(blob, info, path) or label
    yield from (found._replace(label=label) for found in images)


def _headers(blob: Blob) -> Iterator[tarfile.TarInfo]:
    try:
        with blob.stream() as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
            while (info := opened.next()) is not None:
                opened.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                yield info
            end = opened.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise SourceError(f"{blob.path}: not a readable tar archive (truncated?): {error}") from error
    # tarfile takes a damaged header, or the end of the file, for the end of the archive. A real one has a zero block.
    if end + _BLOCK > blob.size or any(blob.pread(end, _BLOCK)):
        raise SourceError(f"{blob.path}: truncated or damaged at byte {end}")


def _clean(path: str) -> str:
    return posixpath.normpath(path.lstrip("/")) if path.startswith(("./", "/")) or "//" in path else path


def _sample_of(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _label(blob: Blob, info: tarfile.TarInfo, path: str) -> str | None:
    content = blob.pread(info.offset_data, info.size)
    try:
        text = content.decode()
        if path.endswith(".cls"):
            return printable(text.strip())
        fields = json.loads(text)
    except ValueError as error:
        raise SourceError(f"{blob.path}: the label in {path!r} cannot be read: {error}") from error
    value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    return None if value is None else printable(str(value))
