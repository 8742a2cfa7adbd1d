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
from featurepipe.images.findings import HIDDEN, Findings
from featurepipe.images.listing import is_hidden, is_image_name
from featurepipe.images.sample_labels import LABEL_SUFFIXES, SampleLabels
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
    member: Member


def list_zip(blob: Blob, archive: int, findings: Findings) -> Iterator[Found]:
    """Lists the images of a zip in the order of its directory.

    Args:
        blob: The archive.
        archive: Its place among the source's.
        findings: Told of the other members.

    Raises:
        SourceError: The archive is damaged, truncated or encrypted.
    """
    with reading(blob.path, "zip archive"), blob.stream() as stream, zipfile.ZipFile(stream) as opened:
        members = opened.infolist()
    if any(info.header_offset < 0 for info in members):
        raise SourceError(f"{blob.path}: not a readable zip archive (damaged?): its directory is not where it says")
    for info in members:
        path = _clean(info.filename)
        if info.is_dir() or not _is_listed(path, findings):
            continue
        if info.flag_bits & _ENCRYPTED:
            raise SourceError(f"{blob.path}: {info.filename!r} is encrypted; make the archive without a password")
        # A directory may claim 64 bits of each. Whatever lies beyond any file is found to be so when it is read.
        offset, stored, size = (min(n, _LARGEST) for n in (info.header_offset, info.compress_size, info.file_size))
        member = Member(archive, offset, stored, size, info.compress_type, info.CRC)
        yield Found(path, member)


def list_tar(blob: Blob, archive: int, findings: Findings, labels: SampleLabels) -> Iterator[Found]:
    """Lists the images of a tar in its order.

    Args:
        blob: The archive.
        archive: Its place among the source's.
        findings: Told of the members that are neither images nor labels.
        labels: Takes up the labels, which are complete once the last image is listed.

    Raises:
        SourceError: The archive is damaged or truncated, or gives an image two labels.
    """
    for header in headers(blob):
        path = _clean(header.name)
        if header.is_folder or _is_label(blob, header, path, findings, labels) or not _is_listed(path, findings):
            continue
        method = IN_TAR if header.is_plain else SPARSE if header.is_sparse else LINK
        yield Found(path, Member(archive, header.offset, header.size, header.size, method, header.crc))


def _is_listed(path: str, findings: Findings) -> bool:
    """Whether a member is an image; counts it as passed over if not."""
    if any(map(is_hidden, path.split("/"))):
        findings.pass_over(HIDDEN)
    elif is_image_name(path):
        return True
    else:
        findings.pass_over(path)
    return False


def _is_label(blob: Blob, header: TarHeader, path: str, findings: Findings, labels: SampleLabels) -> bool:
    """Takes up the label that a member is; tells whether it is one."""
    if not header.is_plain or not path.lower().endswith(LABEL_SUFFIXES) or any(map(is_hidden, path.split("/"))):
        return False
    if header.size > LARGEST_LABEL:
        labels.add(path, None, is_damaged=True)
        return True
    content = blob.pread(header.offset, header.size)
    try:
        if path.lower().endswith(".cls"):
            value: object = content.decode().strip()
        else:
            fields = json.loads(content)
            if not isinstance(fields, dict) or not fields.keys() & {"label", "cls"}:
                return False  # it tells other things of the sample
            value = fields.get("label", fields.get("cls"))
    except (ValueError, RecursionError):
        labels.add(path, None, is_damaged=True)
    else:
        text = findings.label(value, path)
        if text is not None or value not in (None, ""):  # else the name of the folder may tell
            labels.add(path, text)
    return True


def _clean(path: str) -> str:
    return posixpath.normpath(path.lstrip("/")) if path.startswith(("./", "/")) or "//" in path else path
