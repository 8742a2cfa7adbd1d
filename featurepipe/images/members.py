"""What a tar or zip archive lists, and where each image lies in it."""

from __future__ import annotations

import json
import posixpath
import struct
import zipfile
from collections.abc import Iterator
from typing import Final, NamedTuple, Self

from featurepipe.errors import SourceError
from featurepipe.images.blobs import Blob, reading
from featurepipe.images.labels import is_image_name
from featurepipe.images.listing import printable
from featurepipe.images.tar_headers import TarHeader, headers

STORED: Final = 0
DEFLATED: Final = 8
IN_TAR: Final = 0xFFFC  # as it is, behind a header of a tar
LARGEST_RATIO: Final = 1032
"""How many bytes one byte of deflated data can stand for, at most."""
LINK: Final = 0xFFFF
SPARSE: Final = 0xFFFE
BAD_LABEL: Final = 0xFFFD
LARGEST_LABEL: Final = 2**20
"""Bytes of a ``.cls`` or ``.json`` beside an image in a tar, at most."""
NOT_STORED: Final = {
    LINK: "is a link inside the archive",
    SPARSE: "is a sparse file, stored in pieces inside the archive",
    BAD_LABEL: "its label (.cls or .json) cannot be read: no UTF-8, no JSON, nested too deeply, or above 1 MiB",
}
"""Members of a tar that are listed, and why they are rejected when they are read."""

_LOCATOR: Final = struct.Struct("<IQQQHq")
_ENCRYPTED: Final = 0x1
_LARGEST: Final = 2**63 - 1  # what a listing's sizes, and offsets in files, can be


class Member(NamedTuple):
    """Where one image lies: what a locator of an archive says."""

    archive: int  # index into the source's archives
    offset: int  # of the member's data in the file; in a zip, of its local header
    stored: int  # bytes in the archive
    size: int  # bytes of the image
    method: int  # STORED, DEFLATED, IN_TAR, or one of NOT_STORED
    crc: int  # of the image's bytes; in a tar, which has none, of the header before them

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
    with reading(blob.path, "zip archive"), blob.stream() as stream, zipfile.ZipFile(stream) as opened:
        members = opened.infolist()
    if any(info.header_offset < 0 for info in members):
        raise SourceError(f"{blob.path}: not a readable zip archive (damaged?): its directory is not where it says")
    for info in members:
        if info.is_dir() or not is_image_name(info.filename):
            continue
        if info.flag_bits & _ENCRYPTED:
            raise SourceError(f"{blob.path}: {info.filename!r} is encrypted; make the archive without a password")
        # A directory may claim 64 bits of each. Whatever lies beyond any file is found to be so when it is read.
        offset, stored, size = (min(n, _LARGEST) for n in (info.header_offset, info.compress_size, info.file_size))
        member = Member(archive, offset, stored, size, info.compress_type, info.CRC)
        yield Found(_clean(info.filename), None, member)


def list_tar(blob: Blob, archive: int) -> Iterator[Found]:
    """Lists the images of a tar in its order, each with its sample's label.

    Raises:
        SourceError: The archive is damaged or truncated.
    """
    sample, images, label = "", list[Found](), _Label(None)
    for header in headers(blob):
        path = _clean(header.name)
        if _sample_of(path) != sample:
            yield from map(label.given, images)
            sample, images, label = _sample_of(path), [], _Label(None)
        if is_image_name(path) and not header.is_folder:
            method = IN_TAR if header.is_plain else SPARSE if header.is_sparse else LINK
            images.append(
                Found(path, None, Member(archive, header.offset, header.size, header.size, method, header.crc))
            )
        elif header.is_plain and path.endswith((".cls", ".json")):
            label = label.then(_label(blob, header, path))
    yield from map(label.given, images)


class _Label(NamedTuple):
    """What a sample says of its class."""

    text: str | None
    is_damaged: bool = False

    def then(self, other: _Label) -> _Label:
        return _Label(other.text or self.text, self.is_damaged or other.is_damaged)

    def given(self, found: Found) -> Found:
        """An image of the sample with its label; one whose label cannot be read is to be rejected, not to be taken unlabelled."""
        if self.is_damaged and found.member.method not in NOT_STORED:
            return found._replace(member=found.member._replace(method=BAD_LABEL))
        return found._replace(label=self.text)


def _clean(path: str) -> str:
    return posixpath.normpath(path.lstrip("/")) if path.startswith(("./", "/")) or "//" in path else path


def _sample_of(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _label(blob: Blob, header: TarHeader, path: str) -> _Label:
    if header.size > LARGEST_LABEL:
        return _Label(None, is_damaged=True)
    content = blob.pread(header.offset, header.size)
    try:
        text = content.decode()
        if path.endswith(".cls"):
            return _Label(printable(text.strip()))
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return _Label(None, is_damaged=True)
    value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    return _Label(None if value is None else printable(str(value)))
