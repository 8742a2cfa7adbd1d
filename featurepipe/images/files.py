"""One file by path or URL: its size and date, its bytes, and why it cannot be read."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH116

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, Final

import fsspec

from featurepipe.display import without_password
from featurepipe.errors import FeaturepipeError, Reject, SourceError, Unavailable, pip_install
from featurepipe.images.budgets import FILE_BYTES, check_bytes
from featurepipe.images.listing import UNKNOWN, printable

_PASSING: Final = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.EIO, errno.EMFILE, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ENFILE, errno.ENOLINK, errno.ENOTCONN,
    errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT, socket.EAI_AGAIN,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux alone has it
}  # fmt: skip
_BUSY: Final = {408, 425, 429, 500, 502, 503, 504}  # HTTP status codes that invite to ask again

ASKED_AT_ONCE: Final = 32
"""Files behind URLs whose size and date are asked for at the same time."""

_CHECKSUMS: Final = (
    "ETag",
    "etag",
    "md5Hash",
    "md5",
    "Content-MD5",
    "checksum",
    "generation",
    "VersionId",
    "version_id",
    "ino",
)
_SIZE: Final = struct.Struct("<q")
_TO_READ: Final = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
"""O_BINARY is Windows' alone, which has neither of the others."""


def is_url(path: str) -> bool:
    """Whether fsspec has to open this (``s3://...``, ``memory://...``) rather than the operating system."""
    return "://" in path


def location_of(path: str) -> str:
    """What a source's ``location`` says of a path, glob or URL.

    Example:
        >>> location_of("ftp://ann:secret@example.org/cats")
        'ftp://example.org/cats'
    """
    return printable(without_password(path) if is_url(path) else os.path.abspath(path))


def file_system_of(url: str, *, redirects: bool = True) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there.

    With ``redirects`` false, what an HTTP server would have read from elsewhere is a `Reject` when it is read.

    ``::`` chains file systems only where the first one lies on another (``zip://*.png::archive.zip``,
    ``simplecache::s3://bucket``). Elsewhere it is two characters of a name, which fsspec would cut there.

    Raises:
        SourceError: A library that the file system needs is not installed.
        ValueError: There is no such file system.
    """
    try:
        if "::" not in url or is_chain(url):
            options = {} if redirects or not url.startswith(("http://", "https://")) else _NO_REDIRECTS
            file_system, path = fsspec.core.url_to_fs(url, **options)
            return file_system, str(path)
        protocol = url.partition("://")[0]
        kind = fsspec.get_filesystem_class(protocol)
        return fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(url)), str(kind._strip_protocol(url))  # noqa: SLF001  # as fsspec's own url_to_fs
    except ImportError as error:
        raise SourceError(
            f"{url.partition('://')[0]}:// cannot be read here, since a library is not installed: {error}; "
            f"{pip_install('remote')} brings those for s3://, http:// and https://"
        ) from error


REFUSED: Final = "refused: "
"""How the reasons begin of images that ``only_under`` does not allow."""


async def _refuse_redirect(response: Any) -> None:
    """Called by aiohttp with each answer of a server."""
    if 300 <= response.status < 400 and "Location" in response.headers:
        raise Reject(f"{REFUSED}the server redirects to another place, and --only-under forbids to follow")


_NO_REDIRECTS = {"allow_redirects": False, "client_kwargs": {"raise_for_status": _refuse_redirect}}


def is_chain(url: str) -> bool:
    """Whether ``::`` in a URL has one file system read what another one has."""
    head, chained, _ = url.partition("::")
    protocol = head.partition("://")[0]
    if not chained or protocol not in fsspec.available_protocols():
        return False
    kind = fsspec.get_filesystem_class(protocol)
    options = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    return not options.isdisjoint({"fo", "target_protocol"})


def url_in(file_system: Any, url: str, path: str) -> str:
    """The URL of a path in the file system of ``url``, chained as that is."""
    if not is_chain(url):
        return str(file_system.unstrip_protocol(path))
    links = url.split("::")
    here = next(number for number, link in enumerate(links) if "://" in link)
    links[here] = path if "://" in path else f"{links[here].partition('://')[0]}://{path}"
    return "::".join(links)


def open_anew(url: str) -> tuple[Any, str]:
    """`file_system_of`, without what this process remembers: listings, and archives that it opened, may be of an earlier run."""
    file_system, path = file_system_of(url)
    file_system.invalidate_cache()
    if is_chain(url):
        type(file_system).clear_instance_cache()
        file_system, path = file_system_of(url)
    return file_system, path


def identity_of(path: str) -> tuple[Any, ...]:
    """What tells whether a path names the same thing as before: inode, size and date, or what the server says of it."""
    if not is_url(path):
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    try:
        file_system, inside = open_anew(path)
        info = file_system.info(inside)
    except Exception:  # noqa: BLE001  # the border of one file; reading it says what is wrong
        return ()
    return (*details_of(info), *(str(info.get(name)) for name in _CHECKSUMS))


def stat_file(path: str, *, redirects: bool = True) -> tuple[int, int]:
    """The (size, mtime_ns) of a file; ``UNKNOWN`` where it is missing, no plain file, or does not say."""
    return _stat_url(path, redirects=redirects) if is_url(path) else _stat_local(path)


def _stat_local(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return UNKNOWN, UNKNOWN
    return stat_of(found)


def stat_files(paths: Sequence[str], *, redirects: bool = True) -> Iterator[tuple[int, int]]:
    """`stat_file` of each in turn; servers are asked for many at the same time, since each answer takes a while."""
    urls = list(dict.fromkeys(filter(is_url, paths)))
    if not urls:
        return map(_stat_local, paths)
    _forget_listings(urls)
    pool = ThreadPoolExecutor(min(ASKED_AT_ONCE, len(urls)), "featurepipe-stat")
    try:
        answers = dict(zip(urls, pool.map(partial(_stat_url, redirects=redirects), urls), strict=True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # of a listing that is stopped, nobody wants the rest
    return (answers[path] if path in answers else _stat_local(path) for path in paths)


def _forget_listings(urls: Iterable[str]) -> None:
    """Has the file systems of these URLs ask their servers anew, since what they listed for an earlier run may have changed."""
    for url in {url[: url.find("/", url.index("://") + 3)]: url for url in urls}.values():
        with contextlib.suppress(Exception):  # the border of one file; reading it says what is wrong
            file_system_of(url)[0].invalidate_cache()


def exists(path: str) -> bool:
    """Whether there is such a file, locally or behind a URL."""
    if not is_url(path):
        return os.path.exists(path)
    file_system, inside = file_system_of(path)
    return bool(file_system.exists(inside))


def stat_of(found: os.stat_result) -> tuple[int, int]:
    """The (size, mtime_ns) of a plain file, ``UNKNOWN`` for anything else."""
    if not stat.S_ISREG(found.st_mode):
        return UNKNOWN, UNKNOWN
    return found.st_size, found.st_mtime_ns


def read_file(path: str, listed: int = UNKNOWN, *, redirects: bool = True) -> bytes:
    """Reads one image file.

    Args:
        path: Where it is.
        listed: The size that a listing gave, if it did. Where other bytes come, the file system is asked again: a file that has
            changed since is read as it is now, one of which not all has come is `Unavailable`.
        redirects: Whether to follow an HTTP server to another place.

    Raises:
        Reject: ``missing: ...``, ``unreadable: ...``, or ``budget: ...`` where it is larger than an image may be.
    """
    return _read_url(path, listed, redirects=redirects) if is_url(path) else _read_local(path)


def read_head(path: str, size: int) -> bytes:
    """The first bytes of a local image file, ``size`` at most; of a URL all of it is read.

    Raises:
        Reject: As `read_file`.
    """
    if is_url(path) or size > FILE_BYTES():
        return read_file(path)[:size]
    try:
        descriptor = os.open(path, _TO_READ)
        with open(descriptor, "rb", buffering=0) as file:
            return (file.read(size) or b"") if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise unreadable(error) from error


def located(path: bytes, size: int) -> bytes:
    """A locator that holds the listed size beside the path, for `size_and_path`."""
    return _SIZE.pack(size) + path


def size_and_path(locator: bytes) -> tuple[int, bytes]:
    """What `located` has put together."""
    return _SIZE.unpack_from(locator)[0], locator[_SIZE.size :]


def _read_local(path: str) -> bytes:
    try:
        # Non-blocking, because a named pipe called x.jpg would otherwise hang here for ever.
        descriptor = os.open(path, _TO_READ)
        with open(descriptor, "rb", buffering=0) as file:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                what = "named pipe" if stat.S_ISFIFO(before.st_mode) else "device"
                raise Reject(f"unreadable: is a {what}, no file")
            check_bytes(before.st_size)
            content = file.readall()
            after = os.fstat(descriptor).st_size
    except FileNotFoundError:
        raise _missing(path) from None
    except IsADirectoryError:
        raise Reject("unreadable: is a directory, no file") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # nobody can open a socket
            raise Reject("unreadable: is a socket or a device, no file") from None
        raise unreadable(error) from error
    if after != before.st_size or len(content) < after:
        raise Unavailable(
            f"unreadable: is being written: {before.st_size:,} bytes, then {after:,}; read {len(content):,}"
        )
    return content


def _missing(path: str) -> Reject:
    """What a local file is that cannot be found: not there, or a symbolic link to what is not there."""
    try:
        target = os.readlink(path)  # noqa: PTH115  # a path here may not be valid UTF-8, so it stays a string
    except OSError:
        return Reject("missing: no such file")
    return Reject(f"missing: a link to nowhere (-> {printable(target)})")


def _stat_url(url: str, *, redirects: bool = True) -> tuple[int, int]:
    try:
        file_system, path = file_system_of(url, redirects=redirects)
        return details_of(file_system.info(path))
    except Exception:  # noqa: BLE001  # the border of one file; reading it says what is wrong
        return UNKNOWN, UNKNOWN


def _read_url(url: str, listed: int, *, redirects: bool) -> bytes:
    try:
        file_system, path = file_system_of(url, redirects=redirects)
    except Exception as error:  # the border of one image: a manifest may name what no file system takes
        raise unreadable(error) from error
    return read_from(file_system, path, listed)


def read_from(file_system: Any, path: str, listed: int = UNKNOWN) -> bytes:
    """Reads one image file of an fsspec file system; see `read_file`."""
    try:
        return _whole(file_system, path, listed)
    except Reject:
        raise
    except FileNotFoundError:
        raise Reject("missing: no such file") from None
    except Exception as error:  # the border of one image: file systems raise what their libraries do
        raise unreadable(error) from error


def _whole(file_system: Any, path: str, listed: int) -> bytes:
    check_bytes(listed)
    try:
        content = bytes(file_system.cat_file(path))
        if listed in (UNKNOWN, len(content)):
            return content
    except FileNotFoundError:
        if not getattr(file_system, "dircache", None):
            raise  # else it may be missing only among what was listed once
    file_system.invalidate_cache(path)
    size = details_of(file_system.info(path))[0]
    check_bytes(size)
    content = bytes(file_system.cat_file(path))
    if size not in (UNKNOWN, len(content)):
        raise Unavailable(f"unreadable: {len(content):,} bytes came of {size:,}: cut off, or it is being written")
    return content


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
    if isinstance(error, SourceError):
        plain = str(error)
    says = " ".join(str(error).split())  # in one line, whatever the library says
    reason = f"unreadable: {plain or f'{type(error).__name__}: {says}'}"
    return Unavailable(reason) if is_passing(error) else Reject(reason)


def is_passing(error: Exception) -> bool:
    """Whether a failure may be over in a moment: a share does not answer, a connection broke, a server is busy."""
    if isinstance(error, OSError):
        return isinstance(error, TimeoutError | ConnectionError) or error.errno in _PASSING
    if type(error).__module__ == "builtins" or isinstance(error, FeaturepipeError):
        return False
    # What the libraries of file systems raise has the server's answer, unless there was none.
    status = next((getattr(error, name) for name in ("status", "status_code", "code") if hasattr(error, name)), None)
    return not isinstance(error, ValueError) if status is None else status in _BUSY
