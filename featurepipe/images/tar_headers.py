"""The headers of a tar archive, read one after another in bounded memory, whatever they claim.

Python's ``tarfile`` is not used: up to 3.11.7 a negative size sends it back to a header that it has read (CVE-2025-8194), a long
extended header takes it time that is quadratic in its length (CVE-2024-6232), and many of them in a row take its stack. Here the
position only ever grows, and an extended header is parsed once, from its first byte to its last.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from featurepipe.errors import SourceError
from featurepipe.images.blobs import Blob, ShortRead

BLOCK: Final = 512
LARGEST_EXTENDED: Final = 16 * 2**20
"""Bytes that an extended header (of pax, or GNU's long names) may take; paths take at most 4 KiB, attributes a few MiB."""

_PLAIN: Final = b"0\0" + b"7"  # regular, regular of 1979's format, contiguous
_WITHOUT_DATA: Final = b"123456"  # links, devices, folders, pipes: whatever size they state
_END: Final = bytes(BLOCK)
_COMPRESSED: Final = {
    b"\x1f\x8b": "with gzip: name it .tar.gz or .tgz, so that it is unpacked",
    b"BZh": "with bzip2, which is not read: unpack it, or compress it with gzip",
    b"\xfd7zXZ": "with xz, which is not read: unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "with zstd, which is not read: unpack it, or compress it with gzip",
}
_AFTER_SPARSE: Final = 504  # where a block of GNU's map of a sparse file says whether another one follows


class TarHeader(NamedTuple):
    """One member.

    Attributes:
        name: its path; bytes that are not UTF-8 as surrogates.
        offset: of its data in the archive.
        size: bytes of its data.
        is_plain: whether it is a regular file, whose data lie at ``offset`` in one piece.
        is_folder: whether it is a folder.
        is_sparse: whether it is a file of which only pieces are stored.
        crc: CRC-32 of the header's block, which lies right before the data of a regular file.
    """

    name: str
    offset: int
    size: int
    is_plain: bool
    is_folder: bool
    is_sparse: bool
    crc: int


@dataclass
class _Extended:
    """What headers before a member say of it."""

    everywhere: dict[str, bytes] = field(default_factory=dict)  # pax: of all that follow
    fields: dict[str, bytes] = field(default_factory=dict)  # pax: of the next member
    name: bytes | None = None  # GNU: of the next member

    def member(self, block: bytes, offset: int) -> TarHeader:
        said = self.everywhere | self.fields
        kind = block[156:157]
        name = said.get("GNU.sparse.name") or said.get("path") or self.name or _name(block)
        size = _decimal(said["size"]) if "size" in said else _number(block[124:136])
        if size < 0 or kind in _WITHOUT_DATA:
            size = min(size, 0)
        sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in said)
        folder = kind == b"5" or (kind == b"\0" and name.endswith(b"/"))
        self.fields, self.name = {}, None
        path = os.fsdecode(name.rstrip(b"/") or name)
        return TarHeader(
            path, offset, size, kind in _PLAIN and not sparse and not folder, folder, sparse, zlib.crc32(block)
        )


def headers(blob: Blob) -> Iterator[TarHeader]:
    """Reads the members' headers in the order of the archive.

    Raises:
        SourceError: The archive is damaged or truncated: a checksum is wrong, a size is negative or leads beyond the end, or the
            block of zeros at the end is not there.
    """
    position, end, extended = 0, blob.size, _Extended()
    _check_start(blob, end)
    while position + BLOCK <= end:  # each header takes a block, so that this ends
        block = blob.pread(position, BLOCK)
        if block == _END:
            return
        try:
            member, position = _next(blob, block, position + BLOCK, extended)
        except (ValueError, ShortRead) as error:
            kind = "" if position else "not a readable tar archive: "
            raise SourceError(f"{blob.path}: {kind}truncated or damaged at byte {position}: {error}") from error
        if position > end:
            what = "a header" if member is None else repr(member.name)
            raise SourceError(
                f"{blob.path}: truncated or damaged: {what} claims bytes to {position}, and there are {end}"
            )
        if member is not None:
            yield member
    raise SourceError(f"{blob.path}: truncated or damaged at byte {position}")


def _check_start(blob: Blob, end: int) -> None:
    """Tells of files that are no tar, but of a kind that is often taken for one, which kind it is.

    Raises:
        SourceError: it is compressed, or too short for one header.
    """
    start = blob.pread(0, min(end, 6))
    for magic, how in _COMPRESSED.items():
        if start.startswith(magic):
            raise SourceError(f"{blob.path}: not a readable tar archive: it is compressed {how}")
    if end < BLOCK:
        raise SourceError(f"{blob.path}: not a readable tar archive: {end} bytes, which start with {start!r}")


def _next(blob: Blob, block: bytes, position: int, extended: _Extended) -> tuple[TarHeader | None, int]:
    """The member that a header describes, None for one that describes the next; and where the next header is."""
    if not _is_checked(block):
        raise ValueError("its checksum does not match")
    kind = block[156:157]
    if kind in b"LKxXg":
        size = _number(block[124:136])
        if not 0 <= size <= LARGEST_EXTENDED:
            raise ValueError(f"an extended header of {size:,} bytes; at most {LARGEST_EXTENDED:,} are read")
        content = blob.pread(position, size)
        if kind == b"L":
            extended.name = content.partition(b"\0")[0]
        elif kind == b"g":
            extended.everywhere |= _pax(content)
        elif kind != b"K":
            extended.fields |= _pax(content)
        return None, position + _blocks(size)
    if kind == b"S" and block[482]:
        while blob.pread(position, BLOCK)[_AFTER_SPARSE]:
            position += BLOCK
        position += BLOCK
    member = extended.member(block, position)
    if member.size < 0:
        raise ValueError(f"a size of {member.size} bytes")
    return member, position + _blocks(member.size)


def _is_checked(block: bytes) -> bool:
    """Whether the checksum is right; old writers summed signed bytes."""
    stated = _number(block[148:156])
    rest = block[:148] + block[156:]
    unsigned = 256 + sum(rest)
    return stated in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest))


def _number(digits: bytes) -> int:
    """A number in octal, or in base 256 where its first bit is set."""
    if digits[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(digits[1:], "big") - (256 ** (len(digits) - 1) if digits[0] == 0xFF else 0)
    text = digits.partition(b"\0")[0].strip()
    if text and (not text.isdigit() or b"8" in text or b"9" in text):
        raise ValueError(f"{digits!r} is no number")
    return int(text or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:
        raise ValueError(f"a size of {digits[:24]!r} bytes")
    return int(digits)


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name(block: bytes) -> bytes:
    name, prefix = (part.partition(b"\0")[0] for part in (block[:100], block[345:500]))
    # GNU's format, which ends its magic in blanks, keeps times where POSIX has the prefix.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _pax(content: bytes) -> dict[str, bytes]:
    """The records of length, key and value of a pax header; of their values only those that are asked for are kept."""
    found, start = {}, 0
    while start < len(content) and content[start]:
        blank = content.find(b" ", start, start + 20)
        digits = content[start:blank] if blank > 0 else b""
        if not digits.isdigit():
            raise ValueError("a pax record without a length")
        stop = start + int(digits)
        if not blank < stop <= len(content) or content[stop - 1 : stop] != b"\n":
            raise ValueError(f"a pax record of {int(digits)} bytes that does not end there")
        key, equals, value = content[blank + 1 : stop - 1].partition(b"=")
        if not equals:
            raise ValueError("a pax record without a value")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[key.decode("ascii", "replace")] = value
        start = stop
    return found
