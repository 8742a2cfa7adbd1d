"""What commands return in Python: the dictionary that ``--json`` prints, which a notebook shows as a card.

A result stays a plain ``dict`` for whoever reads, compares or writes it. Beside that it has ``to_pandas`` for its tables and
``plot`` for its curves; pandas and matplotlib are loaded only then.

A card is HTML without scripts, readable on light and on dark pages: text inherits the page's colours, lines and fills are half
transparent greys. Names come from strangers, so every text is `displayed` and escaped.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec, SupportsIndex, cast

from featurepipe.display import counted, displayed, first_names, named_columns
from featurepipe.errors import UsageError
from featurepipe.lazy_names import lazy_names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

P = ParamSpec("P")
Cell = str | int | float | bool | None

MAIN_TABLES = (
    "results",
    "routes",
    "per_class",
    "per_label",
    "suspects",
    "queries",
    "exact",
    "near",
    "dependents",
    "answers",
    "nodes",
    "columns",
    "pairs",
    "rejects",
)
"""Which table of a result ``to_pandas`` takes where none is named: the first of these that it has, else its only one."""


_FIRST = ("started", "status", "job", "command", "dataset", "listed", "computed", "known", "rejected", "gone", "run_id")
"""Of a run what people look for, which a card shows first: records have their fields by the alphabet."""


class Result(dict[str, Any]):
    """What one command found, as JSON values.

    Args:
        found: The values.
        command: Which command found them, the title of the card.
    """

    def __init__(self, found: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), command: str = "") -> None:
        super().__init__(found)
        self.command = command

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple[type[Result], tuple[dict[str, Any], str]]:
        return Result, (dict(self), self.command)

    def _repr_html_(self) -> str:
        """The card that a notebook shows: what is said in a word first, then tables, then all else, folded."""
        tables = {name: _named_rows(self, rows) for name, rows in tables_of(self).items() if rows}
        plain = _first_things_first(_facts_of(self))
        rest = {name: value for name, value in self.items() if name not in plain and name not in tables}
        title = self.command or str(self.get("kind", "result"))
        return card(title, headline(self) | plain, tables=tables, folded=rest)

    def to_pandas(self, table: str | None = None) -> pd.DataFrame:
        """One of the result's tables as a DataFrame, a column for each key; without any, the values as one row.

        Args:
            table: Its name, as the result or a part of it has it (``"results"``, ``"per_class"``); by default the main one.

        Raises:
            UsageError: pandas is not installed, or the result has no such table.
        """
        pandas = optional("pandas", "to_pandas()")
        tables = tables_of(self)
        if table is None:
            table = next((name for name in MAIN_TABLES if name in tables), next(iter(tables), None))
        if table is None:
            return pandas.json_normalize([dict(self)])
        if table not in tables:
            raise UsageError(f"this result has no table {table!r}; it has: {first_names(list(tables), 12) or 'none'}")
        return pandas.json_normalize([dict(row) for row in tables[table]])

    def plot(self, what: str | None = None, *, ax: Axes | None = None, **how: Any) -> Axes:
        """Draws a part of the result with matplotlib.

        Args:
            what: ``"curve"`` (the measure over the depth of the network, of several networks over the time of an image, or of
                routes over images), ``"confusion"``, ``"map"``, or ``"mistakes"``; by default the first of these that it has.
            ax: Where to draw; by default a new figure.
            **how: Of ``"mistakes"``, ``images``: a folder or function that gives the image of an id, and ``most``, how many.

        Returns:
            The Axes that were drawn on.

        Raises:
            UsageError: matplotlib is not installed, or the result has nothing of that kind; names what it has.
        """
        optional("matplotlib", "plot()")
        draw, _ = lazy_names("featurepipe", {"plot_result": "reporting.plots"})
        drawn: Axes = draw("plot_result")(self, what, ax=ax, **how)
        return drawn


class Results(list[Result]):
    """Several results of one kind, such as run records: in a notebook a table."""

    def __init__(self, found: Iterable[Mapping[str, Any]] = (), command: str = "") -> None:
        super().__init__(one if isinstance(one, Result) else Result(one, command) for one in found)
        self.command = command

    def _repr_html_(self) -> str:
        return card(self.command or "results", {"how many": len(self)}, tables={"": [_flat(one) for one in self]})

    def to_pandas(self) -> pd.DataFrame:
        """A row for each; values inside of values have the names of both, as ``counts.listed``.

        Raises:
            UsageError: pandas is not installed.
        """
        frame: pd.DataFrame = optional("pandas", "to_pandas()").json_normalize([dict(one) for one in self])
        return frame


class ShownReport:
    """A report as a dataclass, which a notebook shows as a card."""

    def _repr_html_(self) -> str:
        values: dict[str, Any] = asdict(cast("Any", self))
        lists = {name: value for name, value in values.items() if isinstance(value, list)}
        tables = {
            name: [row if isinstance(row, Mapping) else {"": row} for row in rows]
            for name, rows in lists.items()
            if rows
        }
        facts = {name: "none" if name in lists else value for name, value in values.items() if name not in tables}
        return card(type(self).__name__, facts, tables=tables)


def shown_as(command: str) -> Callable[[Callable[P, dict[str, Any]]], Callable[P, Result]]:
    """Has a function that returns a command's record return it as a `Result`."""

    def decorate(function: Callable[P, dict[str, Any]]) -> Callable[P, Result]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> Result:
            return Result(function(*args, **kwargs), command)

        return called

    return decorate


def optional(package: str, what: str) -> Any:
    """A package that is not required, imported.

    Raises:
        UsageError: It is not installed; says what needs it, and how to get it.
    """
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{what} needs {package}, which is not installed; install it: pip install {package}")
    return importlib.import_module(package)


def tables_of(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Lists of records in a result and in its parts ``metrics`` and ``details``, by their name.

    Images that were found for each of several queries, or in each group of copies, are a row each: beside their own values
    the ``query`` and ``rank``, or the ``group``.
    """
    parts = [found, metrics_of(found)]
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) for row in value):
                tables.setdefault(name, _found_for(value) if name == "queries" else list(value))
    for name in ("exact", "near"):  # of duplicates
        if isinstance(found.get(name), Mapping) and found[name].get("listed"):
            tables.setdefault(name, _in_groups(found[name]["listed"]))
    return tables | _of_networks(found["networks"]) if found.get("kind") == "networks" else tables


def _of_networks(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layer that is recommended of each network, and the results of all."""
    own = [(one["backbone"]["name"], one) for one in documents]
    return {
        "networks": [{"backbone": name, **one["recommended"]} for name, one in own if one.get("recommended")],
        "results": [{"backbone": name, **row} for name, one in own for row in one["results"]],
    }


def _found_for(queries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [
        {"query": query["id"], "rank": rank, **image}
        for query in queries
        for rank, image in enumerate(query["found"], 1)
    ]


def _in_groups(groups: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    odd = ("across_splits", "label_conflict")
    return [
        {"group": number, **image, **{name: group[name] for name in odd}}
        for number, group in enumerate(groups, 1)
        for image in group["images"]
    ]


def metrics_of(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The measures in a result: of an evaluation, of a training's test images, or of the layer that is recommended; or none."""
    details = found.get("details")
    parts = (found.get("metrics"), found.get("test"), details.get("metrics") if isinstance(details, Mapping) else None)
    return next((part for part in parts if isinstance(part, Mapping) and part), {})


def headline(found: Mapping[str, Any]) -> dict[str, Cell]:
    """What matters most of a result: what was recommended, how good it is with its interval, how many images."""
    said: dict[str, Cell] = {}
    best = found.get("recommended")
    if isinstance(best, Mapping):
        named = named_columns(str(best.get("column") or best.get("route")), _bottleneck_of(found))
        of = f" of {best['backbone']}" if best.get("backbone") else ""
        said["recommended"] = f"{named}{of} with {best['head']}" if best.get("head") else f"{named}{of}"
    for source in (best if isinstance(best, Mapping) else {}, metrics_of(found)):
        for name in ("accuracy", "map", "r2"):
            if name in source and name not in said:
                said[name] = _measured(source, name)
    for name in ("counts", "seconds"):
        if isinstance(found.get(name), Mapping):
            parts = {key: value for key, value in found[name].items() if _is_said(value)}
            parts = {key: value for key, value in parts.items() if value or len(parts) <= _MOST_COUNTS} or parts
            said[name] = ", ".join(f"{key} {_short(value)}" for key, value in parts.items())
    return said


def _bottleneck_of(found: Mapping[str, Any]) -> str | None:
    """The node that is called the bottleneck of the network whose features a result is of; None if that is not known."""
    backbone = found.get("backbone")
    described = (backbone.get("description") or {}) if isinstance(backbone, Mapping) else found
    node = described.get("bottleneck")
    return node if isinstance(node, str) else None


def _facts_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is said in a word, the column by the name that people know; without a file's kind and version."""
    facts: dict[str, Any] = {}
    for name, value in found.items():
        if name in {"column", "columns"} and value and _are_texts(value):
            facts[name] = named_columns(value, _bottleneck_of(found))
        elif _is_said(value) and value != "" and not (name in {"kind", "version"} and "version" in found):
            facts[name] = value
    if {"column", "columns"} & set(facts):
        facts.pop("bottleneck", None)
    return facts


def _named_rows(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table's rows as a card shows them: columns by the names that people know."""
    nodes = {one["backbone"]["name"]: _bottleneck_of(one) for one in found.get("networks") or () if "backbone" in one}

    def named(name: str, value: Any, backbone: object) -> Any:
        if name in _NAMES_OF_COLUMNS and value and _are_texts(value):
            network, space, column = value.rpartition(" ") if isinstance(value, str) else ("", "", value)
            return f"{network}{space}{named_columns(column, nodes.get(network or backbone, _bottleneck_of(found)))}"
        return value

    return [{name: named(name, value, row.get("backbone")) for name, value in row.items()} for row in rows]


_NAMES_OF_COLUMNS = ("column", "columns", "a", "b", "against", "best")
_MOST_COUNTS = 8  # of which those that are 0 are shown, too


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value))


def _measured(source: Mapping[str, Any], name: str) -> str:
    value = source[name]
    bounds = value if isinstance(value, Mapping) else source
    number = value.get("value") if isinstance(value, Mapping) else value
    known = bounds.get("low") is not None and bounds.get("high") is not None
    interval = f" (95 % interval {_short(bounds['low'])} to {_short(bounds['high'])})" if known else ""
    return f"{_short(number)}{interval}"


def _is_said(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _flat(one: Mapping[str, Any]) -> dict[str, Any]:
    """The record's plain values, and those of its counts."""
    counts = one.get("counts")
    plain = {name: value for name, value in one.items() if _is_said(value)}
    return _first_things_first(plain | (dict(counts) if isinstance(counts, Mapping) else {}))


def _first_things_first(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _FIRST if name in values} | dict(values)


PER_CLASS = ("class", "support", "predicted", "precision", "recall", "f1", "auc")
"""What is measured of each class, in the order in which it is shown."""
PER_LABEL = (
    "label", "positive", "negative", "predicted", "precision", "recall", "f1", "ap", "auc", "ece", "unknown", "threshold",
    "ap_11_point",
)  # fmt: skip
"""The same of each of several labels."""
ROWS_SHOWN = 12
COLUMNS_SHOWN = 10
_CHARACTERS = 160
_IN_A_FACT = 600  # characters: there is a line for it
_DEEPEST = 4

_BOX = (
    "border:1px solid rgba(128,128,128,.45);border-radius:6px;padding:.6em .9em;max-width:72em;overflow-x:auto;"
    "line-height:1.45"
)
_LINE = "border-bottom:1px solid rgba(128,128,128,.3);padding:.2em .7em .2em 0;vertical-align:top;text-align:left"
_NAME = f"{_LINE};opacity:.75;font-weight:normal;white-space:nowrap"
_RIGHT = f"{_LINE};text-align:right;font-variant-numeric:tabular-nums"


def card(
    title: str,
    facts: Mapping[str, Any],
    *,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    folded: Mapping[str, Any] | None = None,
    note: str = "",
) -> str:
    """HTML of a title, facts, tables of at most `ROWS_SHOWN` rows, and what is folded away; says what it leaves out.

    Example:
        >>> "&lt;b&gt;" in card("<b>", {"images": 3}) and "<script" not in card("<script>", {})
        True
    """
    parts = [f'<div style="{_BOX}"><div style="font-weight:600;margin-bottom:.3em">{_text(title)}</div>']
    if facts:
        lines = (
            f'<tr><th style="{_NAME}">{_text(n)}</th><td style="{_LINE}">{_text(v, _IN_A_FACT)}</td></tr>'
            for n, v in facts.items()
        )
        parts.append(f'<table style="border-collapse:collapse;background:none">{"".join(lines)}</table>')
    parts += [_table(name, rows) for name, rows in (tables or {}).items()]
    if folded:
        parts.append(f'<details style="margin-top:.5em"><summary>everything else</summary>{_nested(folded)}</details>')
    if note:
        parts.append(f'<div style="opacity:.75;margin-top:.4em">{_text(note)}</div>')
    return "".join([*parts, "</div>"])


def _text(value: Any, most: int = _CHARACTERS) -> str:
    """A value as one line of escaped HTML; numbers as people read them."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    shown = displayed(value)
    return escape(shown if len(shown) <= most else f"{shown[: most - 1]}…")


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Records as an HTML table: plain values and measures, the first rows and columns; says how many more there are."""
    rows = [
        {
            name: value.get("value") if isinstance(value, Mapping) and "low" in value else value
            for name, value in row.items()
        }
        for row in rows
    ]
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_plain(value)))
    for order in (PER_CLASS, PER_LABEL):  # a bundle's file has them by the alphabet
        names = sorted(names, key=order.index) if order[0] in names and set(names) <= set(order) else names
    shown, kept = rows[:ROWS_SHOWN], names[:COLUMNS_SHOWN]
    over_numbers = {name for name in kept if all(_is_number(row[name]) for row in shown if row.get(name) is not None)}
    styles = {name: f"{_NAME};text-align:right" if name in over_numbers else _NAME for name in kept}
    head = "".join(f'<th style="{styles[name]}">{_text(name)}</th>' for name in kept)
    body = "".join(
        f"<tr>{''.join(_cell(row.get(name), right=name in over_numbers) for name in kept)}</tr>" for row in shown
    )
    left = [counted(len(rows) - len(shown), "more row")] if len(rows) > len(shown) else []
    left += [f"not shown: {', '.join(names[COLUMNS_SHOWN:])}"] if len(names) > len(kept) else []
    more = f'<div style="opacity:.75">{_text("; ".join(left))}</div>' if left else ""
    return f'<table style="border-collapse:collapse;background:none"><tr>{head}</tr>{body}</table>{more}'


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    title = f'<div style="margin-top:.6em;font-weight:600">{_text(name)}</div>' if name else ""
    return title + _rows_table(rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_DIGEST = re.compile(r"[0-9a-f]{64}")


def _cell(value: Any, *, right: bool) -> str:
    """A value of a table, ``right`` below the name of a column of numbers; of a SHA-256 the first digits."""
    shown = value if _is_plain(value) else "…"
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        shown = f"{value[:12]}…"
    return f'<td style="{_RIGHT if right or _is_number(value) else _LINE}">{_text(shown)}</td>'


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _nested(values: Mapping[str, Any], depth: int = 0) -> str:
    """Values inside of values, as lists; long ones are counted."""
    lines = "".join(f"<li>{_text(name)}: {_inside(value, depth)}</li>" for name, value in values.items())
    return f'<ul style="margin:.1em 0 .1em 1.2em;padding:0">{lines}</ul>'


def _inside(value: Any, depth: int) -> str:
    if isinstance(value, Mapping) and value and depth < _DEEPEST:
        return _nested(value, depth + 1)
    if isinstance(value, list | tuple):
        plain = [one for one in value[:8] if _is_plain(one)]
        more = f", … ({len(value):,} in all)" if len(value) > len(plain) else ""
        return (", ".join(map(_text, plain)) + more) if plain else counted(len(value), "value")
    return _text(value)
