"""Where a bundle goes: nothing, an empty folder, a bundle, or what a damaged disk has left of one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from featurepipe.errors import BundleError
from featurepipe.heads.bundle.files import BOOSTER, HEAD, MANIFEST, SEEN, WEIGHTS, check_bundle_target

_FILES = frozenset({MANIFEST, HEAD, BOOSTER, SEEN, WEIGHTS})


def bundle_target(path: str | os.PathLike[str]) -> Path:
    """Checks that a bundle may be written to ``path``; the remains of one count as one.

    Returns:
        The path, absolute and without links.

    Raises:
        BundleError: something else is there.
    """
    try:
        return check_bundle_target(path)
    except BundleError:
        target = Path(os.path.realpath(path))
        if not _is_torn(target):
            raise
        return target


def clear_torn(target: Path) -> None:
    """Removes the remains of a bundle, that a new one can take its place; leaves all else as it is.

    Args:
        target: as `bundle_target` returned it.

    Raises:
        BundleError: a file cannot be removed.
    """
    if not _is_torn(target):
        return
    try:
        for file in target.iterdir():
            file.unlink()
    except OSError as error:
        raise BundleError(f"cannot remove the damaged bundle {target}: {error.strerror}; remove it yourself") from error


def _is_torn(folder: Path) -> bool:
    """Whether a folder holds a bundle's files and nothing else, and its ``bundle.json`` is cut short."""
    if not (folder / MANIFEST).is_file():
        return False
    if not all(file.name in _FILES and file.is_file() and not file.is_symlink() for file in folder.iterdir()):
        return False
    try:
        json.loads((folder / MANIFEST).read_bytes())
    except ValueError:  # no JSON; a manifest that is some, of a newer version say, is somebody's
        return True
    return False
