"""What verbs say of options, in the words of a job file: ``--max-gone 100%`` is ``[limits] max_gone = "100%"`` there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, get_origin

from featurepipe.jobs.job import Job
from featurepipe.jobs.wording import table_called

_TABLES: Mapping[str, tuple[str, ...]] = {
    "list": ("source", "limits", ""),
    "labels": ("source",),
    "extract": ("features", "machine", "limits", "source", ""),
}
"""The tables that a step looks at; those of any other step bear its name."""
_RENAMED = {"node": "nodes"}
_COMMAND = r"\b(?:featurepipe|pip|dask) [a-z][^;,\n]*"
"""What is meant to be typed stays as it is."""
_OPTION = r"(?<![\w-])--(?P<flag>[a-z][a-z-]*)"
_VALUE = (
    r"(?P<value>\d[\d.,]*(?: ?[kMGT]?B\b)?%?|[A-Z]+(?:\.[a-z]+)?\b|[a-z_]+\d+\b|none|gpu|cpu|cuda|auto|timm/[\w./-]+)"
)
_FOUND = re.compile(rf"{_COMMAND}|{_OPTION}(?:[ =]{_VALUE})?")


def in_keys(text: str, step: str) -> str:
    """The same text with the keys of the job file for the options of the command line; others stay, and commands do.

    Args:
        text: a message.
        step: which step of a job it is about.

    Example:
        >>> in_keys("more than --max-rejects 1% allows", "extract")
        'more than [limits] max_rejects = "1%" allows'
        >>> in_keys("leave --tune out; or run: featurepipe depth STORE --seeds 3", "train")
        'leave [[train]] tune out; or run: featurepipe depth STORE --seeds 3'
    """

    def said(found: re.Match[str]) -> str:
        name = _RENAMED.get(key := (found["flag"] or "").replace("-", "_"), key)
        table = next((table for table in _TABLES.get(step, (step,)) if name in table_called(table).model_fields), None)
        if not name or table is None:
            return found[0]
        value = "" if found["value"] is None else f" = {_toml(found['value'])}"
        return f"{_heading(table)}{name}{value}"

    return _FOUND.sub(said, text)


def result_in_keys(result: Mapping[str, Any], step: str) -> dict[str, Any]:
    """A step's result, of which what people read is in the words of the job file."""
    names = (name for name in ("text", "skipped", "why", "verdict") if isinstance(result.get(name), str))
    told = {name: in_keys(result[name], step) for name in names}
    warnings = {"warnings": [in_keys(text, step) for text in result["warnings"]]} if "warnings" in result else {}
    return {**result, **told, **warnings}


def _heading(table: str) -> str:
    if not table:
        return ""
    several = get_origin(Job.model_fields[table].annotation) is tuple
    return f"[[{table}]] " if several else f"[{table}] "


def _toml(value: str) -> str:
    return value.replace(",", "") if re.fullmatch(r"\d[\d,]*(?:\.\d+)?", value) else json.dumps(value)
