"""The files of a bundle: read only as they were written, ``bundle.json`` vouches for them; the folder is swapped in whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from featurepipe.errors import BundleError, near_paths, needs_posix, unsearchable

FORMAT, VERSION = "featurepipe-bundle", 2
"""The greatest version that is read.

Bundles are written as version 1 but those with a threshold, which older readers would pass over and give other labels.
"""
MANIFEST, HEAD, BOOSTER, SEEN, GROUPS, WEIGHTS = (
    "bundle.json",
    "head.skops",
    "head.ubj",
    "seen.safetensors",
    "groups.safetensors",
    "weights.safetensors",
)
CONTINUOUS = "continuous"
"""The type of target of a bundle that predicts numbers; one without a target predicts classes."""

MULTILABEL = "multilabel"
"""The type of target of a bundle that predicts several labels of each image."""

AS_IT_IS = "as_it_is"
"""What a bundle's ``training`` says of a head that is a network's own classifier."""

ENTRIES: dict[str, type | tuple[type, ...]] = {
    "backbone": dict,
    "classes": list,
    "columns": list,
    "family": str,
    "files": dict,
    "fingerprint": str,
    "metrics": dict,
    "params": dict,
    "software": dict,
    "space": dict,
    "temperature": (int, float, type(None)),
    "training": dict,
    "width": int,
}
_LARGEST_MANIFEST = 64 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_AGAIN = "copy the whole folder again from where it was made, or train again"


def canonical_json(value: Any) -> bytes:
    """The one form of a JSON value that is hashed, that of a store's feature spaces: sorted, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def sha256_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def plain(value: Any, where: str) -> Any:
    """Returns ``value`` as JSON values: NumPy's numbers as Python's, tuples and arrays as lists.

    Raises:
        BundleError: JSON cannot hold it, or it is NaN or infinite; names the place.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_text_key(key, where): plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, f"{where}[{number}]") for number, inner in enumerate(value)]
    if isinstance(value, float) and not np.isfinite(value):
        raise BundleError(f"{where} is {value}, which JSON cannot hold; give None where there is no number")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise BundleError(
        f"{where} is a {type(value).__name__}, which a bundle cannot record; give numbers, text, lists and dicts"
    )


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes ``bundle.json``: ``record`` with the format's name and version, and the checksum of all that."""
    content = {**record, "format": FORMAT, "version": 1 if record.get("threshold") is None else 2}
    content["checksum"] = sha256_of(content)
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads ``bundle.json`` and checks that it is one that this version can use, and as it was written.

    Raises:
        BundleError: It is not; says what to do.
    """
    content = _parse(_manifest_bytes(folder), folder / MANIFEST)
    place = folder / MANIFEST
    if content.get("format") != FORMAT:
        raise BundleError(
            f"{folder} is not a bundle: the format in {MANIFEST} is {content.get('format')!r}, not {FORMAT!r}"
        )
    version = content.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{place} is damaged: its version is {version!r}; {_AGAIN}")
    if version > VERSION:
        raise BundleError(
            f"{place} has version {version} of the format, this featurepipe reads up to {VERSION}; "
            "run: pip install --upgrade featurepipe"
        )
    claimed = content.pop("checksum", None)
    if claimed != sha256_of(content):
        raise BundleError(f"{place} is not what was written (its checksum differs); {_AGAIN}")
    _check_entries(content, place)
    return content


def record_file(folder: Path, name: str) -> dict[str, Any]:
    """What ``bundle.json`` keeps of a file: its SHA-256 and size."""
    with open_plain(folder, name) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Compares a file with what ``bundle.json`` keeps of it, in bounded memory.

    Raises:
        BundleError: It is missing, no plain file, or not what was written.
    """
    with open_plain(folder, name) as file:
        _check_size(file, folder / name, expected)
        _check_digest(hashlib.file_digest(file, "sha256").hexdigest(), folder / name, expected)


def read_file(folder: Path, name: str, expected: Mapping[str, Any]) -> bytes:
    """Reads a file once and returns exactly the bytes that were checked.

    Raises:
        BundleError: It is missing, no plain file, or not what was written.
    """
    with open_plain(folder, name) as file:
        _check_size(file, folder / name, expected)
        content = file.read()
    _check_digest(hashlib.sha256(content).hexdigest(), folder / name, expected)
    return content


def open_plain(folder: Path, name: str) -> BufferedReader:
    """Opens a file that lies in ``folder`` itself: no link, no device, no pipe.

    Raises:
        BundleError: There is none, or the system cannot open it so.
    """
    if why := needs_posix("bundles"):
        raise BundleError(why)
    path = folder / name
    try:  # O_NONBLOCK: opening a pipe must not wait for its other end
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing; {_AGAIN}") from error
    except OSError as error:
        if path.is_symlink():
            raise BundleError(f"{path} is a link; a bundle holds its files itself: {_AGAIN}") from error
        raise BundleError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a plain file; {_AGAIN}")
    return os.fdopen(descriptor, "rb")


def check_is_bundle(folder: Path) -> None:
    """Raises `BundleError` if a folder is no bundle; reads nothing."""
    if why := unsearchable(folder / MANIFEST):
        raise BundleError(f"cannot tell whether {folder} is a bundle: {why}")
    if not folder.is_dir():
        near = near_paths(str(folder), MANIFEST)
        near = f"; nearest: {near}" if near else ""
        what = f"{folder} is a file, not a bundle{near}"
        if not folder.exists():
            what = f"there is no bundle at {folder} (looked in {folder.absolute().parent}{near})"
        raise BundleError(f"{what}; give the folder that featurepipe train --out wrote")
    if not os.path.lexists(folder / MANIFEST):
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; give the folder that featurepipe train --out wrote"
        )


def _manifest_bytes(folder: Path) -> bytes:
    check_is_bundle(folder)
    with open_plain(folder, MANIFEST) as file:
        content = file.read(_LARGEST_MANIFEST + 1)
    if len(content) > _LARGEST_MANIFEST:
        raise BundleError(
            f"{folder / MANIFEST} is larger than {_LARGEST_MANIFEST >> 20} MiB, so it is none of ours; {_AGAIN}"
        )
    return content


def _parse(content: bytes, place: Path) -> dict[str, Any]:
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{place} is not JSON: {error}; {_AGAIN}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{place} is not a JSON object; {_AGAIN}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _check_entries(content: Mapping[str, Any], place: Path) -> None:
    for name, kind in ENTRIES.items():
        if name not in content or not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise BundleError(f"{place} is damaged: {name!r} is missing or of the wrong type; {_AGAIN}")
    _check_target(content, place)
    _check_threshold(content, place)
    _check_grouping(content, place)
    target = content.get("target")
    numeric = target is not None and target["type"] == CONTINUOUS
    for name in ("columns",) if numeric else ("classes", "columns"):
        values = content[name]
        if not values or not all(isinstance(value, str) for value in values) or len(set(values)) < len(values):
            raise BundleError(f"{place} is damaged: {name!r} must be distinct text, at least one; {_AGAIN}")
    for name, entry in content["files"].items():
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
            raise BundleError(f"{place} names a file {name!r} that may lie outside the bundle; do not use this bundle")
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise BundleError(f"{place} is damaged: it keeps no size or no SHA-256 of {name}; {_AGAIN}")
    for name in (HEAD, SEEN):
        if name not in content["files"]:
            raise BundleError(f"{place} is damaged: it does not list {name}; {_AGAIN}")


def _check_target(content: Mapping[str, Any], place: Path) -> None:
    """Checks what a bundle says of the number, the labels or the order of classes that it predicts, if it says so."""
    if content.get("ordered", True) is not True or ("ordered" in content and content.get("target") is not None):
        raise BundleError(f"{place} is damaged: 'ordered' is true, and of classes, where it is there; {_AGAIN}")
    target: Any = content.get("target")
    kind = target.get("type") if isinstance(target, dict) else target
    if target is not None and (
        kind not in (CONTINUOUS, MULTILABEL) or bool(content["classes"]) == (kind == CONTINUOUS)
    ):
        raise BundleError(
            f"{place} is of a target that this version does not know ({target!r}); use the version that wrote it, or {_AGAIN}"
        )
    looked_for = target.get("positive") if kind == MULTILABEL else None
    if looked_for is not None and looked_for not in content["classes"]:
        raise BundleError(f"{place} is damaged: it looks for {looked_for!r}, which is none of its labels; {_AGAIN}")
    calibration = target.get("calibration") if kind == MULTILABEL else None
    if calibration is not None and not _calibrates(calibration, len(content["classes"])):
        raise BundleError(f"{place} is damaged: its labels' calibration does not fit them; {_AGAIN}")
    interval = None if target is None else target.get("interval")
    if interval is not None and not _is_interval(interval):
        raise BundleError(f"{place} is damaged: its prediction interval is {interval!r}; {_AGAIN}")


def _is_measured(rate: Any) -> bool:
    numbers = [rate.get(name) for name in ("value", "low", "high")] if isinstance(rate, dict) else [None]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers)


def _check_threshold(content: Mapping[str, Any], place: Path) -> None:
    """Checks a threshold, if there is one."""
    found: Any = content.get("threshold")
    if found is None:
        return
    kinds = {"wish": str, "margin": bool, "reached": bool, "reason": str, "images": int, "rates": dict}
    fits = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    fits = fits and all(_is_measured(found["rates"].get(name)) for name in ("sensitivity", "specificity"))
    value = found.get("value") if fits else None
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or content.get("target") is not None
        or sorted(content["classes"]) != sorted([str(found.get("positive")), str(found.get("negative"))])
    ):
        raise BundleError(f"{place} is damaged: its threshold is not one of its two classes; {_AGAIN}")


def _check_grouping(content: Mapping[str, Any], place: Path) -> None:
    """Checks what a bundle says of the groups that it was trained on, if it does."""
    found: Any = content.get("grouping")
    if found is None:
        return
    fits = isinstance(found, dict) and all(isinstance(found.get(name), str) for name in ("column", "salt"))
    if not fits or GROUPS not in content["files"]:
        raise BundleError(f"{place} is damaged: what it says of groups is {found!r}, and {GROUPS} has them; {_AGAIN}")


def _calibrates(value: Any, labels: int) -> bool:
    if not isinstance(value, dict):
        return False
    columns = [value.get(name) for name in ("slopes", "offsets", "thresholds")]
    return all(
        isinstance(column, list)
        and len(column) == labels
        and all(isinstance(one, int | float) and not isinstance(one, bool) for one in column)
        for column in columns
    )


def _is_interval(value: Any) -> bool:
    if not isinstance(value, dict) or not {"level", "half_width", "images"} <= value.keys():
        return False
    numbers = [value[name] for name in ("level", "half_width", "images")]
    return all(isinstance(one, int | float) and not isinstance(one, bool) and one >= 0 for one in numbers)


def _check_size(file: BufferedReader, path: Path, expected: Mapping[str, Any]) -> None:
    found = os.fstat(file.fileno()).st_size
    if found != expected["bytes"]:
        raise BundleError(f"{path} has {found} bytes, {expected['bytes']} were written; {_AGAIN}")


def _check_digest(found: str, path: Path, expected: Mapping[str, Any]) -> None:
    if found != expected["sha256"]:
        raise BundleError(f"{path} is not what was written (its checksum differs); {_AGAIN}")


def _text_key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise BundleError(f"{where} has the key {key!r}, which is not text; a bundle records JSON objects")
    return str(key)


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
