"""From a job file to a job: everything that is wrong with it is said at once, a line each."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from featurepipe.errors import UsageError
from featurepipe.jobs.job import LONGEST_NAME, Job, is_name
from featurepipe.jobs.validation import CHECKS, Problem
from featurepipe.jobs.wording import problem_of, told

_STAND_INS: Mapping[str, Any] = MappingProxyType(
    {"name": "job", "store": "store", "source": {"path": "images"}, "features": [{}]}
)


def read_job(path: str | PathLike[str]) -> Job:
    """Reads a job file; relative paths in it are seen from its folder.

    Names of networks and nodes are not looked up: that takes seconds, see `networks.check_networks`.

    Raises:
        UsageError: It cannot be read, or something in it is wrong. The message has a line for each problem: file, key, what
            was given, and the choices or the nearest name.
    """
    file = Path(path).absolute()
    parsed = _parsed(file)
    given = {"name": file.stem, **parsed}
    context = {"folder": file.parent}
    problems: list[Problem] = []
    try:
        job = Job.model_validate(given, context=context)
    except ValidationError as error:
        found = list(_one_per_key(error))
        problems = [problem_of(details) for details in found]
        if "name" not in parsed and not is_name(file.stem):
            problems = [problem if problem[0] != "name" else _unnamed(file) for problem in problems]
        wrong = {str(details["loc"][0]) for details in found}
        # What the other tables say of each other can still be checked.
        sound = {name: value for name, value in given.items() if name not in wrong}
        job = Job.model_validate({**_STAND_INS, **sound}, context=context)
    else:
        wrong = set()
    problems += [problem for check, tables in CHECKS if wrong.isdisjoint(tables) for problem in check(job)]
    if problems:
        raise UsageError(*told(problems, path))
    return job.read_from(Path(path))


def _unnamed(file: Path) -> Problem:
    name = re.sub("[^A-Za-z0-9._-]+", "-", file.stem)[:LONGEST_NAME].strip("-.") or "nightly"
    message = (
        f'is missing, and the file\'s own, {file.stem!r}, cannot be one: write name = "{name}" at the top of the file'
    )
    return "name", None, message


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file}: not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8, as TOML must be: {error}") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}; name a job file, such as nightly.toml") from error


def _one_per_key(error: ValidationError) -> Iterable[ErrorDetails]:
    found: dict[tuple[int | str, ...], ErrorDetails] = {}
    for details in error.errors(include_url=False):
        found.setdefault(details["loc"], details)
    return found.values()
