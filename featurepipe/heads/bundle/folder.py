"""A folder that takes its place whole: complete under another name first, then swapped in, in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from featurepipe.errors import BundleError
from featurepipe.heads.bundle.files import MANIFEST, read_manifest

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def check_bundle_target(path: str | os.PathLike[str]) -> Path:
    """Checks that a bundle may be written to ``path``, before any work is spent on it.

    Args:
        path: Nothing, an empty folder, or a bundle, which will be replaced.

    Returns:
        The path, absolute and without links.

    Raises:
        BundleError: Something else is there, or a bundle with files of the user's inside.
    """
    target = Path(os.path.realpath(path))
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return target
    try:
        ours = {MANIFEST, *read_manifest(target)["files"]}
    except BundleError as error:
        raise BundleError(
            f"{target} is there and is no bundle that can be replaced, so it is left alone ({error}); give another path"
        ) from error
    others = sorted(inside.name for inside in target.iterdir() if inside.name not in ours)
    if others:
        raise BundleError(
            f"{target} holds {', '.join(others[:3])} beside the old bundle, and replacing it would delete that; "
            "move it away, or give another path"
        )
    return target


@contextlib.contextmanager
def folder_in_place(target: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; on success it is synced and becomes ``target``, on failure it is removed.

    A kill at any moment leaves at ``target`` what was there or the new folder.

    Args:
        target: As ``check_bundle_target`` returned it.

    Raises:
        BundleError: The system refuses: no space, no permission.
    """
    temporary = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        _put(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise BundleError(
            f"cannot write the bundle {target}: {error.strerror or error}; what was there is unchanged"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Returns ``path``, or where its old content waits if a writer was killed between two renames."""
    folder = Path(path)
    if not os.path.lexists(folder):
        aside = _aside(Path(os.path.realpath(folder)))
        if aside.is_dir():
            return aside
    return folder


def _put(temporary: Path, target: Path) -> None:
    aside = _aside(target)
    try:
        temporary.rename(target)  # also over an empty folder
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        if not exchange(temporary, target):  # if it is, what was at the target has the temporary name now
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one step (Linux); false where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code))


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
