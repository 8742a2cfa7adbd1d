"""Images inside tar and zip archives, read at their offset and never extracted.

A tar follows WebDataset's naming (Aizman et al. 2019, "High performance I/O for large scale deep learning"): a ``.cls`` or
``.json`` labels the image of the same stem, see `SampleLabels`. It comes before the name of a class folder. Where an image has
neither, and in every zip, class folders give labels and splits as they do on disk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from featurepipe.errors import Reject
from featurepipe.images.blobs import Blob, FailedRead, ShortRead, gunzip
from featurepipe.images.budgets import check_bytes
from featurepipe.images.files import unreadable
from featurepipe.images.findings import Findings
from featurepipe.images.listing import SCHEMA, UNKNOWN, FolderLabels, Row, check_unique, printable, table_of
from featurepipe.images.members import (
    BAD_LABEL,
    DEFLATED,
    IN_TAR,
    LARGEST_RATIO,
    NOT_STORED,
    STORED,
    Found,
    Member,
    list_tar,
    list_zip,
)
from featurepipe.images.sample_labels import SampleLabels
from featurepipe.images.source import Source
from featurepipe.images.tar_headers import BLOCK
from featurepipe.tables import counted


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
