"""Random access to the bytes of one file, local, compressed, or behind a URL; headers of a tar archive in bounded memory.

Python's ``tarfile`` is not used: up to 3.11.7 a negative size sends it back to a header that it has read (CVE-2025-8194), a long
extended header takes it time that is quadratic in its length (CVE-2024-6232), and many of them in a row take its stack. Here the
position only ever grows, and an extended header is parsed once, from its first byte to its last.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Final, Generic, NamedTuple, TypeVar

from featurepipe.errors import FeaturepipeError, SourceError
from featurepipe.images.files import details_of, identity_of, is_url, open_anew, stat_file
from featurepipe.images.listing import UNKNOWN

T = TypeVar("T")
Unpack = Callable[[IO[bytes], IO[bytes]], None]


class ShortRead(SourceError):
    """A file ends before the bytes that were asked for."""


class FailedRead(SourceError):
    """The operating system could not read a file that is open; ``error`` is what it said."""

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(f"{path}: cannot be read: {error.strerror}")
        self.error = error


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """For as long as a library parses a file that may be damaged, or made to do harm: what it raises says that it cannot be read.

    Such parsers end in whatever their next step runs into: values out of range, broken text, no memory, too deep a nesting.

    Raises:
        SourceError: ``path`` is not a readable ``what``.
    """
    try:
        yield
    except FeaturepipeError:
        raise
    except Exception as error:  # the border of one file
        reason = str(error) or type(error).__name__
        raise SourceError(f"{path}: not a readable {what} (truncated?): {reason}") from error


class PerProcess(Generic[T]):
    """Opens something once per process, on first use, and never carries it into another process.

    A handle inherited through a fork would share its position with the parent, and a lock inherited while held would
    never be released; so both are kept under the id of the process that made them.
    """

    def __init__(self, opener: Callable[[], T]) -> None:
        self._opener = opener
        self._opened: dict[int, T] = {}
        self._locks: dict[int, threading.Lock] = {}

    def get(self) -> T:
        """The opened thing; threads that ask at the same time get the same one."""
        process = os.getpid()
        if process not in self._opened:
            with self._locks.setdefault(process, threading.Lock()):
                if process not in self._opened:
                    self._opened[process] = self._opener()
        return self._opened[process]

    def forget(self) -> T | None:
        """Gives up this process's handle; the next :meth:`get` opens it again."""
        return self._opened.pop(os.getpid(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"_opener": self._opener, "_opened": {}, "_locks": {}}


class Blob:
    """The bytes of one file, readable at any offset from any thread.

    A plain local file is read where it is. A compressed or remote one is first copied, once per process, into an
    anonymous temporary file (so ``TMPDIR`` needs room for it), because neither can be read at an offset reliably.

    Args:
        path: A local path or a URL.
        unpack: Writes what is to be read (second argument) from the file as it is (first argument), such as
            :func:`gunzip`; picklable.
    """

    def __init__(self, path: str, *, unpack: Unpack | None = None) -> None:
        self.path = path
        self._unpack = unpack
        self._identity: tuple[Any, ...] = ()  # travels along, so that a worker takes no earlier file for this one
        self._file = PerProcess(self._open)

    def renew(self) -> None:
        """Forgets a file that another one has replaced; what a listing starts with."""
        identity = identity_of(self.path)
        if identity != self._identity:
            self.close()
        self._identity = identity

    @property
    def mtime_ns(self) -> int:
        """The file's date, nanoseconds since 1970, -1 if unknown."""
        return stat_file(self.path)[1]

    @property
    def size(self) -> int:
        """How many bytes there are to read (once unpacked)."""
        return os.fstat(self._file.get().fileno()).st_size

    def pread(self, offset: int, size: int) -> bytes:
        """Reads exactly ``size`` bytes.

        Raises:
            ShortRead: The file is shorter than it was, or than something in it says.
            FailedRead: It cannot be read now.
            SourceError: The file has gone.
        """
        # Asked first, since the system is handed a buffer of the size that a header claims, and knows no offset from 2^63.
        if not 0 <= offset <= offset + size <= self.size:
            raise ShortRead(f"{self.path}: ends inside bytes {offset} to {offset + size}: truncated, or it changed")
        data = self._pread(offset, size)
        while len(data) < size:  # one call returns at most 2 GiB
            more = self._pread(offset + len(data), size - len(data))
            if not more:
                raise ShortRead(f"{self.path}: ends inside bytes {offset} to {offset + size}: truncated, or it changed")
            data += more
        return data

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.get().fileno(), size, offset)
        except OSError as error:
            self._file.forget()  # a handle from before a share was mounted anew never works again
            raise FailedRead(self.path, error) from error

    def stream(self) -> IO[bytes]:
        """A seekable stream over the bytes with a position of its own."""
        return io.BufferedReader(_Stream(self))

    def close(self) -> None:
        """Closes this process's handle."""
        if (file := self._file.forget()) is not None:
            file.close()

    def _open(self) -> _Handle:
        try:
            if is_url(self.path) or self._unpack is not None:
                return self._spool(self._unpack or _copy)
            return _Handle(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError as error:
            raise SourceError(f"{self.path}: no such file") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise SourceError(f"{self.path}: the gzip data is damaged or truncated: {error}") from error
        except FeaturepipeError:
            raise
        except Exception as error:  # the border of one file: file systems raise what their libraries do
            raise SourceError(f"{self.path}: cannot be read: {error}") from error

    def _spool(self, unpack: Unpack) -> _Handle:
        with tempfile.TemporaryFile() as copy:
            if is_url(self.path):
                file_system, path = open_anew(self.path)
                with file_system.open(path, "rb") as original:
                    unpack(original, copy)
                size, _ = details_of(file_system.info(path))
                if unpack is _copy and size not in (UNKNOWN, copy.tell()):
                    raise SourceError(
                        f"{self.path}: {copy.tell():,} bytes came of {size:,}: cut off, or it is being written"
                    )
            else:
                with open(self.path, "rb") as original:
                    unpack(original, copy)
            copy.flush()
            return _Handle(os.dup(copy.fileno()))


def gunzip(original: IO[bytes], target: IO[bytes]) -> None:
    """Decompresses gzip data."""
    with gzip.GzipFile(fileobj=original) as plain:
        shutil.copyfileobj(plain, target, 1 << 20)


def _copy(original: IO[bytes], target: IO[bytes]) -> None:
    shutil.copyfileobj(original, target, 1 << 20)


class _Handle:
    """A file descriptor that is closed when nobody needs it any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def fileno(self) -> int:
        if self._descriptor is None:
            raise SourceError("the source was closed while it was being read")
        return self._descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class _Stream(io.RawIOBase):
    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._size = blob.size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._position))
        data = self._blob.pread(self._position, wanted) if wanted else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


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
