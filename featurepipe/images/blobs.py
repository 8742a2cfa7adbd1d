"""Random access to the bytes of one file, whatever it is: local, compressed, or behind a URL; blob stores: ``files.py``."""

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
from typing import IO, Any, Generic, TypeVar

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
