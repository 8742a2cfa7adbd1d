"""Values as people read them; what is missing or not finite is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from featurepipe.tables import size

DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


class Cell(NamedTuple):
    """One cell of a table: its text, what to sort by (null last), and a smaller second line."""

    text: str
    order: float | None = None
    note: str = ""


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is no finite number (a truth value is none).

    Example:
        >>> finite(2), finite(float("nan")), finite("2"), finite(True)
        (2.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: Any, digits: int = 1) -> str:
    r"""A share as per cent.

    Example:
        >>> percent(0.9134), percent(None), percent(0.5, 0)
        ('91.3\xa0%', '–', '50\xa0%')
    """
    number = finite(value)
    return DASH if number is None else f"{100 * number:.{digits}f}\u00a0%"


def points(value: Any) -> str:
    """A difference of two shares in percentage points, always with its sign.

    Example:
        >>> points(-0.0042), points(0.01)
        ('\u22120.42', '+1.00')
    """
    number = finite(value)
    if number is None:
        return DASH
    text = f"{100 * number:+.2f}".replace("-", _MINUS)
    return "0.00" if text[1:] == "0.00" else text


def interval(low: Any, high: Any) -> str:
    r"""Bounds of a share, or nothing where one is missing.

    Example:
        >>> interval(0.9, 0.92), interval(0.9, None)
        ('90.0 to 92.0\xa0%', '')
    """
    if finite(low) is None or finite(high) is None:
        return ""
    return f"{100 * low:.1f} to {percent(high)}"


def points_interval(low: Any, high: Any) -> str:
    """Bounds of a difference in percentage points, or nothing where one is missing."""
    return "" if finite(low) is None or finite(high) is None else f"{points(low)} to {points(high)}"


def plain(value: Any, digits: int = 3) -> str:
    """A number with so many decimals.

    Example:
        >>> plain(0.91234), plain(float("inf"))
        ('0.912', '\u2013')
    """
    number = finite(value)
    return DASH if number is None else f"{number:.{digits}f}".replace("-", _MINUS)


def count(value: Any) -> str:
    """A whole number with thousands set off.

    Example:
        >>> count(70000), count(None)
        ('70,000', '\u2013')
    """
    number = finite(value)
    return DASH if number is None else f"{number:,.0f}"


def amount(value: Any) -> str:
    """Bytes in a fitting unit."""
    number = finite(value)
    return DASH if number is None else size(number)


def milliseconds(value: Any) -> str:
    """Milliseconds, with more decimals where they are few.

    Example:
        >>> milliseconds(12.34), milliseconds(0.456)
        ('12.3', '0.46')
    """
    number = finite(value)
    return DASH if number is None else f"{number:.{1 if number >= 10 else 2}f}"


def bounded(value: Any, low: Any, high: Any) -> Cell:
    """A share with its interval as a cell."""
    return Cell(percent(value), finite(value), interval(low, high))


def shortened(text: str, most: int) -> str:
    """A text cut in the middle so that it has at most ``most`` characters: names differ at both ends.

    Example:
        >>> shortened("features.denseblock4.denselayer16", 16)
        'features\u2026layer16'
    """
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (most - most // 2 - 1) :]}"


def metrics_of(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of scores (``heads.metrics.score_table``) of the recommended column, or of the bundle."""
    part = document.get("details") if document.get("kind") == "depth" else document.get("evaluation")
    found: Mapping[str, Any] = (part or {}).get("metrics") or {}
    return found


def metrics_elsewhere(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same of the recommended column on the other source; empty where the document has none."""
    found: Mapping[str, Any] = (document.get("details_shifted") or {}).get("metrics") or {}
    return found
