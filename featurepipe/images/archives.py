"""Images inside tar and zip archives, read at their offset and never extracted.

A tar follows WebDataset's naming (Aizman et al. 2019, "High performance I/O for large scale deep learning"): members
that share a path up to the first dot of the base name are one sample, and its ``.cls`` or ``.json`` is the label.
Where a sample has neither, and in every zip, class folders give labels and splits as they do on disk.
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
from featurepipe.images.labels import FolderLabels, is_hidden
from featurepipe.images.listing import SCHEMA, UNKNOWN, Row, check_unique, printable, table_of
from featurepipe.images.members import (
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
from featurepipe.images.source import Source
from featurepipe.images.tar_headers import BLOCK


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
        tables = [self._table(index, blob) for index, blob in enumerate(self._blobs)]
        remedy = "rename one of the archives or members"
        return check_unique(pa.concat_tables(tables or [SCHEMA.empty_table()]), self.name, remedy)

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

    def _table(self, index: int, blob: Blob) -> pa.Table:
        blob.renew()
        listed = list_zip(blob, index) if blob.path.lower().endswith(".zip") else list_tar(blob, index)
        folders: set[str] = set()
        prefix = blob.path.rstrip("/").rpartition("/")[2]
        table = table_of(_rows(listed, prefix, blob.mtime_ns, folders))
        return _with_folder_labels(table, prefix, FolderLabels(folders))


def _rows(listed: Iterable[Found], prefix: str, mtime_ns: int, folders: set[str]) -> Iterator[Row]:
    for found in listed:
        parts = found.path.split("/")
        if any(map(is_hidden, parts)):
            continue
        if len(parts) > 1:
            folders.add(parts[0])
        size = UNKNOWN if found.member.method in NOT_STORED else found.member.size
        id_ = f"{printable(prefix)}/{printable(found.path)}"
        yield id_, found.label, None, size, mtime_ns, found.member.pack()


def _with_folder_labels(table: pa.Table, prefix: str, labels: FolderLabels) -> pa.Table:
    # A second pass, because whether folders are splits is known only when all of them have been seen.
    def rows() -> Iterator[Row]:
        skip = len(printable(prefix)) + 1
        for batch in table.to_batches():
            for id_, label, _, size, mtime_ns, locator in zip(*(c.to_pylist() for c in batch.columns), strict=True):
                folder_label, split = labels.of(id_[skip:].split("/")[:-1])
                yield id_, (folder_label if label is None else label), split, size, mtime_ns, locator

    return table_of(rows())


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
