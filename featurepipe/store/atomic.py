"""Files that appear whole or not at all, and a full disk that is said plainly."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from featurepipe.errors import DiskFull, StoreError
from featurepipe.store.inside import has_other_names, is_file, open_file, read_file

MOST_NESTED = 64
"""How deep lists and objects of a document may lie in each other: ours need eight, and Python's own limit is a crash away."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
        raise DiskFull(
            f"no space left while writing {path.name} in {path.parent} ({os.strerror(error.errno or 0)}); "
            "everything committed before is safe: free some space (featurepipe gc STORE) and run again"
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
