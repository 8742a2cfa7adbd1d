"""The kinds of values that a job file holds: durations, amounts, shares, paths, names, lists."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from featurepipe.errors import UsageError, unknown
from featurepipe.images.intensity import parse_intensity
from featurepipe.sizes import bytes_of, seconds_of

PLACEHOLDERS = ("date", "run", "job")
"""What the name of a file of predictions may hold in braces."""

REFERENCES = ("previous", "first")
"""Snapshots that drift can be measured from, beside those that a run id names."""
LONGEST_NAME = 100
LONGEST = 366 * 86_400
"""Seconds: no clock or timer of the system is asked for more."""
LARGEST_BATCH = 65_536
"""Images that no device takes at once."""
_RUN_ID = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}")


def _amount(given: Any) -> Any:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise UsageError("no amount of memory; give bytes or text such as '512MB', '20GB'")
    bytes_of(given)  # refused here, with the key's name, and not hours later
    return given


def _seconds(given: Any) -> float:
    seconds = seconds_of(given)
    if seconds > LONGEST:
        raise UsageError("is too long: a night, or a wait, is of 366 days at most")
    return seconds


def _batch_size(given: Any) -> Any:
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= LARGEST_BATCH):
        return given
    raise UsageError(f"must be 'auto' or a number from 1 to {LARGEST_BATCH}")


def _intensity(text: str) -> str:
    if text != "auto":
        parse_intensity(text)
    return text


def _share(given: Any) -> int | str:
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    if isinstance(given, str) and re.fullmatch(r"\d+(\.\d+)?%?", given):
        return given
    raise UsageError("must be a number of images such as 10, or a share such as '1%'")


def is_name(text: str) -> bool:
    """Whether a text may name files, wherever they lie."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text) is not None and len(text) <= LONGEST_NAME


def _name(name: str) -> str:
    if not is_name(name):
        raise UsageError(
            "cannot be a name; use letters, digits, '.', '_' and '-', at most 100, starting with a letter, digit or '_'"
        )
    return name


def _components(given: Any) -> Any:
    if isinstance(given, int | float) and not isinstance(given, bool):
        if 0 < given < 1:
            return given
        if given >= 1 and math.isfinite(given) and given == int(given):
            return int(given)
    raise UsageError("must be a whole number of components from 1, or a share of the variance below 1, such as 0.95")


def _reference(text: str) -> str:
    if text in REFERENCES or _RUN_ID.fullmatch(text):
        return text
    near = str(unknown("reference", text, REFERENCES))
    raise UsageError(f"{near}; or the run id of a snapshot, such as 20260131T020000000000Z-0123abcd")


def listed(value: Any) -> Any:
    """TOML's arrays as tuples, since a job never changes; one text stands for a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _place(text: Any, info: ValidationInfo) -> Any:
    return Path(_joined(text, info)) if isinstance(text, str) else text


def _joined(text: str, info: ValidationInfo) -> str:
    """A relative path seen from the job file's folder; URLs stay as they are."""
    if not text.strip():
        raise UsageError("must not be empty")
    folder = (info.context or {}).get("folder")
    if folder is None or "://" in text:
        return text
    return os.path.normpath(Path(folder) / _at_home(text))


def _at_home(text: str) -> Path:
    """A path in which ``~`` or ``~user`` at the beginning stands for a home folder."""
    if "\0" in text:
        raise UsageError("cannot be a path: it has a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.split("/", 1)[0]
        raise UsageError(
            f"this machine has no home folder for {user!r}; write ./{user} for a folder of that name"
        ) from error


def _template(text: str, info: ValidationInfo) -> str:
    try:
        braces = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise UsageError(f"a brace without its partner ({error}); write {{{{ and }}}} for braces themselves") from error
    for name, form, conversion in braces:
        if name not in PLACEHOLDERS:
            raise unknown("placeholder", name or "", PLACEHOLDERS)
        if form or conversion:
            raise UsageError(f"a placeholder takes no format; write {{{name}}}")
    folder = (info.context or {}).get("folder")
    if folder is None:
        return text
    literal = str(folder).replace("{", "{{").replace("}", "}}")
    return os.path.normpath(Path(literal) / _at_home(text))


def _weights(text: str, info: ValidationInfo) -> str:
    if "." not in text and "/" not in text:
        return text
    from featurepipe.backbones.weights import is_file_name

    return _joined(text, info) if is_file_name(text) else text


Seconds = Annotated[float, BeforeValidator(_seconds)]
"""A duration, written ``"90s"``, ``"1h30m"``; in seconds."""
Amount = Annotated[int | str, BeforeValidator(_amount)]
"""Bytes, or text such as ``"20GB"``."""
BatchSize = Annotated[int | str, BeforeValidator(_batch_size)]
"""Images per forward, or ``"auto"``."""
Intensity = Annotated[str, AfterValidator(_intensity)]
"""``auto``, or what `featurepipe.images.intensity.parse_intensity` reads."""
Share = Annotated[int | str, BeforeValidator(_share)]
"""A number of images, or a share such as ``"1%"``."""
Components = Annotated[int | float, BeforeValidator(_components)]
"""Principal components: how many, or the share of the variance that they keep."""
Reference = Annotated[str, AfterValidator(_reference)]
"""``previous``, ``first``, or a run id."""
Name = Annotated[str, AfterValidator(_name)]
"""What may name files."""
Names = Annotated[tuple[str, ...], BeforeValidator(listed)]
"""One or more texts."""
JobPath = Annotated[Path, BeforeValidator(_place)]
"""A path, relative to the job file's folder."""
PathOrUrl = Annotated[str, AfterValidator(_joined)]
"""A path or glob, relative to the job file's folder, or a URL."""
Weights = Annotated[str, AfterValidator(_weights)]
"""A name, or a file, relative to the job file's folder."""
Template = Annotated[str, AfterValidator(_template)]
"""A path with ``{date}``, ``{run}`` or ``{job}`` in it, relative to the job file's folder."""
