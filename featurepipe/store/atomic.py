"""Files that appear whole or not at all, and a full disk that is said plainly."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from featurepipe.errors import DiskFull, StoreError

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
        if not filecmp.cmp(temporary, twin, shallow=False):
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


def write_json(path: Path, value: Mapping[str, Any], *, replace: bool = True) -> None:
    """Writes a JSON document atomically, readable by people."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_file(path, replace=replace) as file:
        file.write((text + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON document that must be an object.

    Raises:
        StoreError: The file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}; run: featurepipe verify STORE") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is not a JSON object; run: featurepipe verify STORE")
    return value
