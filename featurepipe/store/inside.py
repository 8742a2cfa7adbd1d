"""Files and folders inside a store: opened, listed and made without following a link.

A store may come from someone else. A symbolic link in it could name any file of the user's, a named pipe could make a reader
wait for ever, and a device does what devices do. So every path below the store's own folder, which the user names and which
may be a link or lie below one, comes by here: links are not followed, and what is neither a file nor a folder is not opened.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from featurepipe.errors import StoreError

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
