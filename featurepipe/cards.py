"""Cards: what a notebook shows of an object, as HTML without scripts, readable on light and on dark pages.

Colours are the page's own: text inherits, lines and fills are half transparent greys. Names come from strangers, so every text is
`displayed` and escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from featurepipe.display import counted, displayed

Cell = str | int | float | bool | None

ROWS_SHOWN = 12
COLUMNS_SHOWN = 10
_CHARACTERS = 160
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
    parts = [f'<div style="{_BOX}"><div style="font-weight:600;margin-bottom:.3em">{text(title)}</div>']
    if facts:
        lines = (
            f'<tr><th style="{_NAME}">{text(n)}</th><td style="{_LINE}">{text(v)}</td></tr>' for n, v in facts.items()
        )
        parts.append(f'<table style="border-collapse:collapse;background:none">{"".join(lines)}</table>')
    parts += [_table(name, rows) for name, rows in (tables or {}).items()]
    if folded:
        parts.append(f'<details style="margin-top:.5em"><summary>everything else</summary>{_nested(folded)}</details>')
    if note:
        parts.append(f'<div style="opacity:.75;margin-top:.4em">{text(note)}</div>')
    return "".join([*parts, "</div>"])


def text(value: Any) -> str:
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
    return escape(shown if len(shown) <= _CHARACTERS else f"{shown[: _CHARACTERS - 1]}…")


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Records as an HTML table: their plain values, the first rows and columns; says how many more there are."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_plain(value)))
    shown, kept = rows[:ROWS_SHOWN], names[:COLUMNS_SHOWN]
    head = "".join(f'<th style="{_NAME}">{text(name)}</th>' for name in kept)
    body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in kept)}</tr>" for row in shown)
    left = [counted(len(rows) - len(shown), "more row")] if len(rows) > len(shown) else []
    left += [f"not shown: {', '.join(names[COLUMNS_SHOWN:])}"] if len(names) > len(kept) else []
    more = f'<div style="opacity:.75">{text("; ".join(left))}</div>' if left else ""
    return f'<table style="border-collapse:collapse;background:none"><tr>{head}</tr>{body}</table>{more}'


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    title = f'<div style="margin-top:.6em;font-weight:600">{text(name)}</div>' if name else ""
    return title + rows_table(rows)


def _cell(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f'<td style="{_RIGHT if is_number else _LINE}">{text(value if _is_plain(value) else "…")}</td>'


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _nested(values: Mapping[str, Any], depth: int = 0) -> str:
    """Values inside of values, as lists; long ones are counted."""
    lines = "".join(f"<li>{text(name)}: {_inside(value, depth)}</li>" for name, value in values.items())
    return f'<ul style="margin:.1em 0 .1em 1.2em;padding:0">{lines}</ul>'


def _inside(value: Any, depth: int) -> str:
    if isinstance(value, Mapping) and value and depth < _DEEPEST:
        return _nested(value, depth + 1)
    if isinstance(value, list | tuple):
        plain = [one for one in value[:8] if _is_plain(one)]
        more = f", … ({len(value):,} in all)" if len(value) > len(plain) else ""
        return (", ".join(map(text, plain)) + more) if plain else counted(len(value), "value")
    return text(value)
