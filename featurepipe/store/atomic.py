"""Files of a store: opened, listed and made without following a link, written whole or not at all; a full disk is said plainly.

A store may come from someone else. A symbolic link in it could name any file of the user's, a named pipe could make a reader
wait for ever, and a device does what devices do. So every path below the store's own folder, which the user names and which
may be a link or lie below one, comes by here: links are not followed, and what is neither a file nor a folder is not opened.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import fnmatch
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from featurepipe.errors import DiskFull, StoreError

MOST_BYTES = 1 << 30
"""Bytes of a document that are read: far more than any that was written, and less than a sparse file can claim."""

MOST_LINE = 1 << 24
MOST_OF_LINES = 1 << 34

_REFUSED = frozenset({errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.ENOTDIR})
"""What `os.open` answers to links (``EMLINK`` on some systems), to pipes that nobody reads, and to devices without a driver."""


def kind_of(mode: int) -> str:
    """Says what an entry is, by its ``st_mode``; empty for a file or folder."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    named = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in named if test(mode)), "a device")


def _refusal(path: Path, kind: str) -> StoreError:
    return StoreError(
        f"{path} is {kind}, and nothing in a store is opened, changed or removed through one; put the real thing in its place, "
        "or remove it if you do not know who made it"
    )


def _kind_at(path: Path) -> str:
    try:
        return kind_of(path.lstat().st_mode)
    except OSError:
        return ""


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file inside a store and returns the descriptor; with ``O_CREAT`` it is made if it is missing.

    Raises:
        StoreError: A link, a pipe, a device or a folder is there.
        OSError: As `os.open`.
    """
    if kind := _kind_at(path):  # before it is opened, since that can do something to a device
        raise _refusal(path, kind)
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _REFUSED and path.parent.is_dir():
            raise _refusal(path, _kind_at(path) or "no regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refusal(path, "no regular file")
    return descriptor


def has_other_names(descriptor: int) -> bool:
    """Whether an open file has a second name (a hard link), which may be outside the store: then it must not be changed."""
    return os.fstat(descriptor).st_nlink > 1


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """Reads a regular file inside a store.

    Raises:
        StoreError: It is larger than ``most`` bytes, or no regular file.
        OSError: It cannot be read.
    """
    with os.fdopen(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise StoreError(f"{path} has {size:,} bytes; no document of a store has more than {most:,}")
        return file.read(most)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the number, from 1, and the bytes of each line of a file inside a store; nothing if it is missing.

    Of a line of more than ``MOST_LINE`` bytes nothing is given but its beginning, which is no JSON.

    Raises:
        StoreError: It is larger than ``MOST_OF_LINES`` bytes, or no regular file.
    """
    try:
        descriptor = open_file(path)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_OF_LINES:
            raise StoreError(f"{path} has {size:,} bytes; no file of lines in a store has more than {MOST_OF_LINES:,}")
        number = 0
        while line := file.readline(MOST_LINE):
            number += 1
            yield number, line
            while len(line) == MOST_LINE and not line.endswith(b"\n"):
                line = file.readline(MOST_LINE)  # the rest of a line that is too long


def is_file(path: Path) -> bool:
    """Whether a regular file is at a path; false for a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is at a path; false for a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def checked_folder(path: Path) -> Path:
    """Returns the path of a folder inside a store, which may be missing.

    Raises:
        StoreError: A link, or anything else that is no folder, is there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    except OSError as error:
        raise StoreError(f"cannot look at {path}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise _refusal(path, kind_of(mode) or "a file where a folder belongs")
    return path


def made_folder(path: Path) -> Path:
    """Makes a folder inside a store if it is missing, in a folder that is there.

    Raises:
        StoreError: A link, or anything else that is no folder, is there.
    """
    try:
        path.mkdir()
    except FileExistsError:
        return checked_folder(path)
    return path


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Lists what is in a folder inside a store, by name; nothing if there is no such folder, or a link to one."""
    if not is_folder(folder):
        return []
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:  # removed since
        return []


def listed(root: Path, pattern: str) -> list[Path]:
    """Lists the paths below ``root`` that fit a pattern such as ``spaces/*/parts/*.h5``, sorted.

    Links to folders are not entered. The last name may be that of anything but a folder, so that a link in the place of a
    document is met, and refused, by whoever reads it. ``*`` does not stand for names that begin with a dot.
    """
    *folders, last = pattern.split("/")
    found = [root]
    for name in folders:
        if "*" in name:
            found = [
                folder / entry.name
                for folder in found
                for entry in entries(folder)
                if entry.is_dir(follow_symlinks=False) and _fits(entry.name, name)
            ]
        else:
            found = [folder / name for folder in found if is_folder(folder / name)]
    return [
        folder / entry.name
        for folder in found
        for entry in entries(folder)
        if _fits(entry.name, last) and not entry.is_dir(follow_symlinks=False)
    ]


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(".") == pattern.startswith(".") and fnmatch.fnmatchcase(name, pattern)


def walked(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yields everything below ``root`` that is no folder: files, links, pipes, devices."""
    waiting = [os.fspath(root)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as found:
                inside = sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):  # removed since
            continue
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            else:
                yield entry


def strangers(root: Path) -> list[tuple[Path, str]]:
    """Lists what is neither a file nor a folder below ``root``, and what it is instead."""
    others = (Path(entry.path) for entry in walked(root) if not entry.is_file(follow_symlinks=False))
    return sorted((path, kind) for path in others if (kind := _kind_at(path)))


def refuse_strangers(root: Path) -> None:
    """Refuses a store with a link, a pipe or a device in it, for those who remove what they find no use for.

    Raises:
        StoreError: There is one; names it.
    """
    for path, kind in strangers(root):
        raise _refusal(path, kind)


MOST_NESTED = 64
"""How deep lists and objects of a document may lie in each other: ours need eight, and Python's own limit is a crash away."""

_FULL = {
    errno.ENOSPC: ("no space left", "free some space (featurepipe gc STORE --dry-run says if it could)"),
    errno.EDQUOT: (
        "this user's quota is used up",
        "free some of it (featurepipe gc STORE --dry-run says if it could) or have it raised",
    ),
    errno.EFBIG: ("no file may become so large", "raise the limit of this process (ulimit -f) or of the file system"),
}
"""Errors that are kinds of "full": what each means, and what helps."""


def is_temporary(name: str) -> bool:
    """Tells whether a file name is that of a file still being written (or left by a dead writer)."""
    return name.startswith(".") and name.endswith(".tmp")


@contextlib.contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turns "no space", "over quota" and "file too large" inside the block into ``DiskFull``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what, cure = _FULL[error.errno]
        raise DiskFull(
            f"{what} while writing {path.name} in {path.parent} ({os.strerror(error.errno)}); "
            f"everything committed before is safe: {cure}, and run again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes a rename inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, *, replace: bool = True, twin: Path | None = None) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path``; on success it is synced and takes that name, on failure it is removed.

    Args:
        path: The final name.
        replace: Whether a file that is already there is replaced; if not, the first one stays and ours is dropped.
        twin: A file in the same folder that never changes; if it holds the same bytes, ``path`` becomes another name of it.

    Raises:
        DiskFull: No space is left.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with reporting_full_disk(path):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if twin is None or not _is_linked(temporary, twin):
                    os.fsync(file.fileno())
            _publish(temporary, path, replace=replace)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _is_linked(temporary: Path, twin: Path) -> bool:
    """Makes ``temporary`` another name of ``twin`` if both hold the same bytes; tells whether it did."""
    link = temporary.with_suffix(".link.tmp")
    try:
        if not is_file(twin) or not filecmp.cmp(temporary, twin, shallow=False):
            return False
        os.link(twin, link)
        link.replace(temporary)
    except OSError:  # the twin is gone by now, or this file system has no hard links
        return False
    finally:
        link.unlink(missing_ok=True)
    return True


def _publish(temporary: Path, path: Path, *, replace: bool) -> None:
    if not replace:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}:
                raise  # else: a file system without hard links; a rename is the best it can do
        else:
            return
        if path.exists():
            return
    temporary.replace(path)


def append_lines(path: Path, lines: bytes) -> None:
    """Appends whole lines to a file of lines, synced, and ends a line before them that was torn by a kill.

    A file that has another name (a hard link, which may be a backup or a stranger's trap) is replaced by a copy first.

    Args:
        path: The file; made if it is missing.
        lines: Each with a line feed at its end.

    Raises:
        DiskFull: No space is left.
        StoreError: A link, or anything else that is no file, is there.
    """
    with reporting_full_disk(path):
        descriptor = open_file(path, os.O_CREAT | os.O_APPEND | os.O_RDWR)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines
            if has_other_names(descriptor):
                _replace_with_more(path, descriptor, lines)
                return
            while lines:
                lines = lines[os.write(descriptor, lines) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_with_more(path: Path, descriptor: int, lines: bytes) -> None:
    with os.fdopen(os.dup(descriptor), "rb") as old, atomic_file(path) as new:
        old.seek(0)
        shutil.copyfileobj(old, new)
        new.write(lines)


def write_json(path: Path, value: Mapping[str, Any], *, replace: bool = True) -> None:
    """Writes a JSON document atomically, readable by people."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_file(path, replace=replace) as file:
        file.write((text + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON document inside a store, which must be an object of finite numbers that is not nested deeply.

    Raises:
        StoreError: The file cannot be read, is no such object, or is a link.
    """
    try:
        return parsed_object(read_file(path))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}; run: featurepipe verify STORE") from error


def parsed_object(text: bytes) -> dict[str, Any]:
    """Parses a JSON object of finite numbers that is not nested deeply.

    Raises:
        ValueError: It is none.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_number)
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_NESTED} levels") from None
    except MemoryError:
        raise ValueError(f"its {len(text):,} bytes take more memory than there is") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # one kind of error, as of `json`
    _check_values(value)
    return value


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _check_values(value: dict[str, Any]) -> None:
    """Refuses what could not be written again: infinite numbers (1e999), and nesting that ends in a recursion error."""
    level: list[Any] = [value]
    for _ in range(MOST_NESTED):
        inner: list[Any] = []
        for item in level:
            for entry in item.values() if isinstance(item, dict) else item:
                if isinstance(entry, dict | list):
                    inner.append(entry)
                elif isinstance(entry, float) and not math.isfinite(entry):
                    raise ValueError("a number in it is too large")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested deeper than {MOST_NESTED} levels")
