"""Converted networks that are kept between runs in the user's cache folder, by all that they follow from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

VARIABLE: Final = "FEATUREPIPE_CACHE"
"""Names the cache folder; empty for none."""
MOST_BYTES: Final = 2 * 2**30
"""Of all that is kept. What was used longest ago goes first."""
_MODEL: Final = ("network.xml", "network.bin")
_FACTS: Final = "facts.json"
_DRAFT: Final = ".draft-"


class KeptNetwork(NamedTuple):
    """A converted network on disk.

    Attributes:
        model: The path of its ``.xml``, beside which its weights lie.
        facts: What was kept with it, as JSON values.
    """

    model: Path
    facts: Mapping[str, Any]


def cache_folder() -> Path | None:
    """Where converted networks are kept: below ``FEATUREPIPE_CACHE``, else below the user's cache folder; None for nowhere."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) / "openvino" if named else None
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")  # noqa: PTH111  # which does not fail where there is no home
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(base) / "featurepipe" / "openvino" if base and Path(base).is_absolute() else None


def name_of(follows_from: Mapping[str, Any]) -> str:
    """The name of what follows from some JSON values, and from nothing else."""
    return hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()


def find(name: str) -> KeptNetwork | None:
    """What is kept under a name; None if there is nothing, or it is damaged, which is removed then."""
    folder = cache_folder()
    if folder is None or not (folder / name).is_dir():
        return None
    entry = folder / name
    try:
        facts = json.loads((entry / _FACTS).read_bytes())
        if facts["sha256"] == _sha256_of(entry):
            os.utime(entry)
            return KeptNetwork(entry / _MODEL[0], facts)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    forget(name)
    return None


def forget(name: str) -> None:
    """Removes what is kept under a name, as far as that works."""
    folder = cache_folder()
    if folder is not None:
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def draft() -> Iterator[Path | None]:
    """A folder to write a network into, which `keep` puts in its place or which is removed; None if nothing can be kept."""
    folder, made = cache_folder(), None
    with suppress(OSError):  # such as a home that cannot be written: the next run converts again
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))
    try:
        yield made
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def keep(made: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Puts a complete draft in its place at once, and removes what was used longest ago where there is too much.

    Args:
        made: The folder that `draft` gave, with ``network.xml`` and ``network.bin`` in it.
        name: As `name_of` gives it.
        facts: What to keep with it, as JSON values.
    """
    with suppress(OSError):  # a full disk, or another process that has kept the same: features do not depend on it
        if _bytes_of(made) > MOST_BYTES:
            return
        (made / _FACTS).write_text(json.dumps({**facts, "sha256": _sha256_of(made)}))
        made.rename(made.parent / name)
        _make_room(made.parent, name)


def _make_room(folder: Path, latest: str) -> None:
    """Removes entries, oldest first, and drafts of the day before, which nobody finishes."""
    by_age = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    total = sum(map(_bytes_of, by_age))
    newest = (folder / latest).stat().st_mtime
    for path in by_age:
        is_left_over = path.name.startswith(_DRAFT) and path.stat().st_mtime < newest - 86_400
        is_too_much = total > MOST_BYTES and path.name != latest and not path.name.startswith(_DRAFT)
        if is_left_over or is_too_much:
            total -= _bytes_of(path)
            shutil.rmtree(path, ignore_errors=True)


def _bytes_of(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())


def _sha256_of(entry: Path) -> list[str]:
    """Hashes of the files of a network."""
    found = []
    for name in _MODEL:
        with (entry / name).open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found
