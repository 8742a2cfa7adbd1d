"""One file by path or URL: its size and date, its bytes, and why it cannot be read."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH116

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import fsspec

from featurepipe.errors import Reject, Unavailable
from featurepipe.images.listing import UNKNOWN, printable

_PASSING: Final = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.EIO, errno.EMFILE, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ENFILE, errno.ENOLINK, errno.ENOTCONN,
    errno.EPIPE, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, socket.EAI_AGAIN,
}  # fmt: skip
_BUSY: Final = {408, 425, 429, 500, 502, 503, 504}  # HTTP status codes that invite to ask again

_USER_AND_PASSWORD: Final = re.compile(r"(?<=://)[^/]*@")


def is_url(path: str) -> bool:
    """Whether fsspec has to open this (``s3://...``, ``memory://...``) rather than the operating system."""
    return "://" in path


def location_of(path: str) -> str:
    """What a source's ``location`` says of a path, glob or URL.

    Example:
        >>> location_of("ftp://ann:secret@example.org/cats")
        'ftp://example.org/cats'
    """
    return printable(_USER_AND_PASSWORD.sub("", path) if is_url(path) else os.path.abspath(path))


def stat_file(path: str) -> tuple[int, int]:
    """The (size, mtime_ns) of a file; ``UNKNOWN`` where it is missing, no plain file, or does not say."""
    if is_url(path):
        return _stat_url(path)
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return UNKNOWN, UNKNOWN
    return stat_of(found)


def exists(path: str) -> bool:
    """Whether there is such a file, locally or behind a URL."""
    if not is_url(path):
        return os.path.exists(path)
    try:
        file_system, inside = fsspec.core.url_to_fs(path)
        return bool(file_system.exists(inside))
    except remote_errors():
        return False


def stat_of(found: os.stat_result) -> tuple[int, int]:
    """The (size, mtime_ns) of a plain file, ``UNKNOWN`` for anything else."""
    if not stat.S_ISREG(found.st_mode):
        return UNKNOWN, UNKNOWN
    return found.st_size, found.st_mtime_ns


def read_file(path: str) -> bytes:
    """Reads one image file.

    Raises:
        Reject: ``missing: ...`` or ``unreadable: ...``.
    """
    return _read_url(path) if is_url(path) else _read_local(path)


def _read_local(path: str) -> bytes:
    try:
        # Non-blocking, because a named pipe called x.jpg would otherwise hang here for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                what = "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
                raise Reject(f"unreadable: {what}")
            return file.readall()
    except FileNotFoundError:
        raise Reject("missing: no such file") from None
    except IsADirectoryError:
        raise Reject("unreadable: is a directory") from None
    except (OSError, ValueError) as error:
        raise unreadable(error) from error


def _stat_url(url: str) -> tuple[int, int]:
    try:
        file_system, path = fsspec.core.url_to_fs(url)
        return details_of(file_system.info(path))
    except remote_errors():
        return UNKNOWN, UNKNOWN


def _read_url(url: str) -> bytes:
    try:
        file_system, path = fsspec.core.url_to_fs(url)
        return bytes(file_system.cat_file(path))
    except FileNotFoundError:
        raise Reject("missing: no such file") from None
    except remote_errors() as error:
        raise unreadable(error) from error


def details_of(info: Mapping[str, Any]) -> tuple[int, int]:
    """The (size, mtime_ns) from fsspec's description of a file; file systems name their dates differently."""
    size = info.get("size")
    dates = (info.get(name) for name in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"))
    date = next((date for date in dates if date is not None), None)
    return (UNKNOWN if size is None else int(size)), _nanoseconds(date)


def _nanoseconds(date: object) -> int:
    if isinstance(date, str):
        try:
            date = datetime.fromisoformat(date)
        except ValueError:
            return UNKNOWN
    if isinstance(date, datetime):
        date = date.timestamp()
    # Rounded to microseconds: a float holds no more of today's date, and the rounding makes it reproducible.
    return round(date * 1_000_000) * 1_000 if isinstance(date, int | float) else UNKNOWN


def unreadable(error: Exception) -> Reject:
    """The reject for an image whose reading failed; an `Unavailable` where it may succeed in a moment."""
    plain = getattr(error, "strerror", None) if type(error).__module__ == "builtins" else None
    reason = f"unreadable: {plain or f'{type(error).__name__}: {error}'}"
    return Unavailable(reason) if is_passing(error) else Reject(reason)


def is_passing(error: Exception) -> bool:
    """Whether a failure may be over in a moment: a share does not answer, a connection broke, a server is busy."""
    if isinstance(error, OSError):
        return isinstance(error, TimeoutError | ConnectionError) or error.errno in _PASSING
    # What the libraries of file systems raise has the server's answer, unless there was none.
    status = next((getattr(error, name) for name in ("status", "code") if hasattr(error, name)), None)
    return not isinstance(error, ValueError) if status is None else status in _BUSY


def remote_errors() -> tuple[type[Exception], ...]:
    """What fsspec file systems raise when a file cannot be had now; some libraries' errors are no OSError."""
    loaded = [OSError, ValueError]
    for module, name in (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("gcsfs.retry", "HttpError"),
    ):
        if module in sys.modules:
            loaded.append(getattr(sys.modules[module], name))
    return tuple(loaded)
