"""What pydantic finds wrong with a job file, in the file's own words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from featurepipe.errors import unknown
from featurepipe.jobs.job import Job, Table
from featurepipe.jobs.validation import Problem

_MUST_BE = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "tuple_type": "must be an array",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "greater_than": "must be more than {gt}",
    "less_than": "must be less than {lt}",
    "too_short": "must not be empty",
}


LONGEST_SHOWN = 80
"""Characters of a value that a message repeats."""


def told(problems: Iterable[Problem], file: str | PathLike[str] | None) -> list[str]:
    """A line for each problem: the file, the key, what was given, and what is wrong with it."""
    begin = "" if file is None else f"{fspath(file)}: "
    return [f"{begin}{_line(problem)}" for problem in problems]


def _line(problem: Problem) -> str:
    key, given, message = problem
    return f"{key}: {message}" if given is None else f"{key} = {_shown(given)}: {message}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def problem_of(details: ErrorDetails) -> Problem:
    """What is wrong, in the words of a job file: its key, what was given, and the choices or the nearest name."""
    place, given = details["loc"], details["input"]
    kind, key = details["type"], _dotted(place)
    if kind == "extra_forbidden":
        return key, None, _unknown_key(place)
    if kind == "missing":
        return key, None, f"is missing: {_description(place)}"
    return _brackets(kind, key, given) or (key, given, _message(details))


def _message(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":  # our own errors, see job.py
        return str(context["error"])
    if kind != "literal_error":
        return _MUST_BE.get(kind, details["msg"]).format(**context)
    given, choices = details["input"], _choices(details["loc"])
    return str(unknown("value", given, choices)) if isinstance(given, str) else f"choices: {', '.join(choices)}"


def _brackets(kind: str, key: str, given: Any) -> Problem | None:
    """The two ways of TOML to open a table are easily taken for one another."""
    if kind == "tuple_type" and isinstance(given, dict):
        return key, None, f"write [[{key}]], with double brackets: there may be several"
    if kind == "model_type" and isinstance(given, list):
        return key, None, f"write [{key}], with single brackets: there is only one"
    return None


def _dotted(place: Iterable[int | str]) -> str:
    """A place as TOML writes it, such as ``train[0].head``."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _unknown_key(place: tuple[int | str, ...]) -> str:
    name, table = str(place[-1]), _table_at(place)
    keys = list(table.model_fields)
    near = difflib.get_close_matches(name, keys, n=3, cutoff=0.6)
    homes = [home for home in ("", *Job.model_fields) if name in table_called(home).model_fields]
    if homes and not near:
        where = " or ".join(f"[{home}]" if home else "the top of the file, before the first table" for home in homes)
        return f"unknown key; it belongs to {where}"
    if not keys:
        return "unknown key; this table has none"
    return f"unknown key; nearest: {', '.join(near)}" if near else f"unknown key; choices: {', '.join(keys)}"


def _description(place: tuple[int | str, ...]) -> str:
    field = _table_at(place).model_fields[str(place[-1])]
    text = (field.description or "").rstrip(".")
    return text[:1].lower() + text[1:]


def _choices(place: tuple[int | str, ...]) -> list[str]:
    annotation = _table_at(place).model_fields[next(str(step) for step in place[::-1] if isinstance(step, str))]
    return [text for text in _leaves(annotation.annotation) if isinstance(text, str)]


def _table_at(place: tuple[int | str, ...]) -> type[BaseModel]:
    return table_called(str(place[0])) if len(place) > 1 else Job


def table_called(name: str) -> type[BaseModel]:
    """The class of a table by its name in the file; the job itself for the top, and for keys that are no tables."""
    if not name:
        return Job
    kinds = [kind for kind in _leaves(Job.model_fields[name].annotation) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), _NoTable)


class _NoTable(Table):
    """Stands for keys at the top that hold no table."""


def _leaves(annotation: Any) -> list[Any]:
    """What a type is made of: the classes in unions and tuples, the texts in literals."""
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [annotation]
