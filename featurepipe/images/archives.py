"""Images inside tar and zip archives, read at their offset and never extracted.

A tar follows WebDataset's naming (Aizman et al. 2019, "High performance I/O for large scale deep learning"): a ``.cls`` or
``.json`` labels the image of the same stem, see `SampleLabels`. It comes before the name of a class folder. Where an image has
neither, and in every zip, class folders give labels and splits as they do on disk.
"""

from __future__ import annotations

import json
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Self

import pyarrow as pa

from featurepipe.display import counted
from featurepipe.errors import Reject, SourceError
from featurepipe.images.blobs import BLOCK, Blob, FailedRead, ShortRead, TarHeader, gunzip, headers, reading
from featurepipe.images.budgets import check_bytes
from featurepipe.images.files import unreadable
from featurepipe.images.listing import (
    HIDDEN,
    OUTSIDE,
    SCHEMA,
    UNKNOWN,
    Findings,
    FolderLabels,
    Row,
    check_unique,
    is_hidden,
    is_image_name,
    printable,
    table_of,
)
from featurepipe.images.source import Source

LABEL_SUFFIXES: Final = (".cls", ".json")


class SampleLabel(NamedTuple):
    """What a ``.cls`` or ``.json`` says of its sample.

    Attributes:
        text: The class.
        suffix: Of the file that says so.
        is_damaged: Whether a file of the sample cannot be read.
    """

    text: str | None
    suffix: str
    is_damaged: bool = False


class SampleLabels:
    """The labels of one archive by the stem of their names, wherever in the archive they lie.

    A label belongs to the image of its own stem: ``a 1.5.cls`` to ``a 1.5.png``, and not to ``a 1.0.png``. Where there is none
    of the whole stem, that of a shorter one counts, down to the first dot, so that ``0001.cls`` labels both ``0001.left.png`` and
    ``0001.right.png``.

    Args:
        where: What errors call the archive.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._by_stem: dict[str, SampleLabel] = {}
        self._shared: dict[SampleLabel, SampleLabel] = {}  # one object for each class, not for each image
        self._used: set[str] = set()

    def add(self, path: str, text: str | None, *, is_damaged: bool = False) -> None:
        """Takes up what the file at ``path`` says.

        Raises:
            SourceError: Another file says that the sample is of another class.
        """
        path = printable(path)  # as the listing has those of images
        stem, _, suffix = path.rpartition(".")
        label, known = SampleLabel(text, f".{suffix}", is_damaged), self._by_stem.get(stem)
        if known is not None:
            if None not in (text, known.text) and text != known.text:
                both = (f"{stem}{known.suffix}", path)
                names = (
                    f"{both[0]!r} and {both[1]!r} say" if both[0] != both[1] else f"{path!r} is there twice, and says"
                )
                raise SourceError(
                    f"{self._where}: {names} {known.text!r} and {text!r}: an image has one label; leave one of them out"
                )
            label = SampleLabel(text or known.text, known.suffix, is_damaged or known.is_damaged)
        self._by_stem[stem] = self._shared.setdefault(label, label)

    def of(self, path: str) -> SampleLabel | None:
        """What is said of the image at ``path``."""
        if not self._by_stem:
            return None
        for stem in _stems(path):
            label = self._by_stem.get(stem)
            if label is not None:
                self._used.add(stem)
                return label
        return None

    def tell(self, findings: Findings) -> None:
        """Notes the labels that no image has asked for."""
        left = [stem for stem in self._by_stem if stem not in self._used]
        if left:
            first = left[0] + self._by_stem[left[0]].suffix
            findings.notes.append(
                f"{counted(len(left), 'label')} in {self._where} without an image of the same stem, such as {first!r}"
            )


def _stems(path: str) -> Iterator[str]:
    """A member's path, and what is left of it without one suffix after another."""
    yield path
    start = path.rfind("/") + 2  # a dot at the beginning begins no suffix
    end = path.rfind(".", start)
    while end >= 0:
        yield path[:end]
        end = path.rfind(".", start, end)


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
    if path.startswith("../"):
        findings.pass_over(OUTSIDE)
    elif any(map(is_hidden, path.split("/"))):
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
    return (
        posixpath.normpath(path.lstrip("/")) if path.startswith(("./", "/")) or "//" in path or "/../" in path else path
    )


class ArchiveSource(Source):
    """One archive or several; an id is ``<archive's base name>/<member's path>``, in the archive's own order.

    Members carry the date of their archive, because WebDataset writers leave theirs at zero.

    Args:
        paths: The archives.
        name: The default dataset name.
        location: See :class:`Source`.
    """

    def __init__(self, paths: Sequence[str], name: str, location: str) -> None:
        self.name = name
        self.location = location
        self._blobs = [
            Blob(path, unpack=gunzip if path.lower().endswith((".tar.gz", ".tgz")) else None) for path in paths
        ]

    def scan(self) -> pa.Table:
        """Lists the members; reads headers and WebDataset's labels, no image."""
        findings = Findings()
        tables = [self._table(index, blob, findings) for index, blob in enumerate(self._blobs)]
        remedy = "rename one of the archives or members"
        table = check_unique(pa.concat_tables(tables or [SCHEMA.empty_table()]), self.name, remedy)
        return findings.attach(table)

    def read(self, locator: bytes) -> bytes:
        """Reads one member; see :meth:`Source.read`."""
        member = Member.unpack(locator)
        blob = self._blobs[member.archive]
        if member.method in NOT_STORED:
            raise Reject(f"unreadable: {NOT_STORED[member.method]}")
        check_bytes(max(member.size, member.stored))
        try:
            if member.method == IN_TAR:
                return _checked(blob.pread(member.offset - BLOCK, BLOCK + member.size), member)
            return _inflate(blob.pread(_zip_data_offset(blob, member), member.stored), member)
        except ShortRead as error:
            raise Reject("truncated: the archive ends inside this member") from error
        except FailedRead as error:
            raise unreadable(error.error) from error

    def close(self) -> None:
        """Closes the archives; a spooled copy is deleted."""
        for blob in self._blobs:
            blob.close()

    def _table(self, index: int, blob: Blob, findings: Findings) -> pa.Table:
        blob.renew()
        samples = SampleLabels(blob.path)
        if blob.path.lower().endswith(".zip"):
            listed = list_zip(blob, index, findings)
        else:
            listed = list_tar(blob, index, findings, samples)
        folders: set[str] = set()
        prefix = blob.path.rstrip("/").rpartition("/")[2]
        table = table_of(_rows(listed, prefix, blob.mtime_ns, folders))
        labels = FolderLabels(folders)
        table = table_of(_labelled(table, labels, samples, findings))
        samples.tell(findings)
        findings.split_folders(labels)
        return table


def _rows(listed: Iterable[Found], prefix: str, mtime_ns: int, folders: set[str]) -> Iterator[Row]:
    """The members as rows, with their path in the archive where their label will be."""
    for found in listed:
        folder, separator, _ = found.path.partition("/")
        if separator:
            folders.add(folder)
        size = UNKNOWN if found.member.method in NOT_STORED else found.member.size
        path = printable(found.path)
        yield f"{printable(prefix)}/{path}", path, None, size, mtime_ns, found.member.pack()


def _labelled(table: pa.Table, labels: FolderLabels, samples: SampleLabels, findings: Findings) -> Iterator[Row]:
    # A second pass, because labels may lie anywhere, and whether folders are splits is known only when all have been seen.
    by_folder = by_file = 0
    for batch in table.to_batches():
        for id_, path, _, size, mtime_ns, locator in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            folders = path.split("/")[:-1]
            label, split = labels.of(folders)
            findings.in_folders(folders, split)
            own = samples.of(path)
            if own is not None and own.is_damaged and size != UNKNOWN:
                # To be rejected, and not to be taken unlabelled.
                yield id_, label, split, UNKNOWN, mtime_ns, Member.unpack(locator)._replace(method=BAD_LABEL).pack()
                continue
            by_file += own is not None
            by_folder += own is None and label is not None
            yield id_, (label if own is None else own.text), split, size, mtime_ns, locator
    if by_file and by_folder:
        findings.notes.append(
            f"{counted(by_file, 'image')} labelled by a .cls or .json, {by_folder:,} without one by the name of a folder"
        )


def _checked(data: bytes, member: Member) -> bytes:
    """The data behind the header that was listed; another header means another member, or none."""
    if zlib.crc32(data[:BLOCK]) != member.crc:
        raise Reject(f"corrupt: the archive has another member at byte {member.offset}; it changed since it was listed")
    return data[BLOCK:]


def _zip_data_offset(blob: Blob, member: Member) -> int:
    header = blob.pread(member.offset, 30)
    if header[:4] != b"PK\x03\x04":
        raise Reject(f"corrupt: the archive has no member at byte {member.offset}; damaged, or changed since listed")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return member.offset + 30 + int(name_length) + int(extra_length)


def _inflate(data: bytes, member: Member) -> bytes:
    if member.method not in (STORED, DEFLATED):
        raise Reject(f"unsupported: zip compression method {member.method}; use stored or deflated")
    if member.size > LARGEST_RATIO * len(data):
        raise Reject(f"corrupt: claims {member.size:,} bytes; the {len(data):,} in the archive hold fewer")
    try:
        # The declared size is the limit, so that a small member cannot unfold into more than it says.
        plain = data if member.method == STORED else zlib.decompressobj(-15).decompress(data, member.size + 1)
    except zlib.error as error:
        raise Reject(f"corrupt: cannot be inflated: {error}") from error
    if len(plain) != member.size or zlib.crc32(plain) != member.crc:
        raise Reject("corrupt: the checksum in the archive does not match")
    return plain
