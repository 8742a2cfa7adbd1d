"""Names as they may be shown: file names, labels and ids come from strangers, and a terminal obeys what it is sent.

Escaped are the control characters (C0, DEL, C1), line and paragraph separators, the marks and overrides of text direction
(Boucher and Anderson 2023, "Trojan Source", CVE-2021-42574), and halves of surrogate pairs, which no encoding can write.
What is shown is escaped where it leaves us: `featurepipe.tables.table`, progress and messages, logs, results as text, errors,
HTML pages, figures for Prometheus. What machines read (JSON, HDF5, Parquet) holds the names as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

_UNSHOWN = (
    "\x00-\x1f\x7f-\x9f"  # C0, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # direction of text, and deprecated format characters
    "\u2028\u2029\ufff9-\ufffb\U000e0000-\U000e007f"  # separators, annotations, tags that nobody sees
    "\ud800-\udfff"
)
_ANY = re.compile(f"[{_UNSHOWN}]")
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/]*@")
_INSIDE_LINES = re.compile(f"(?!\n)[{_UNSHOWN}]")


def displayed(text: object) -> str:
    r"""Text on one line without a character that a terminal or a page would obey instead of showing it.

    Example:
        >>> print(displayed("cat\x1b[2J\nnext\u202e.png"))
        cat\x1b[2J\nnext\u202e.png
    """
    return _ANY.sub(_escape, str(text))


def without_password(text: str) -> str:
    """URLs and addresses without who is to read them, and with what password.

    Example:
        >>> without_password("tls://me:se@cret@head:8786"), without_password("head:8786")
        ('tls://head:8786', 'head:8786')
    """
    return _USER_AND_PASSWORD.sub("", text)


def displayed_lines(text: object) -> str:
    """The same of several lines, whose ends stay: only for text of our own whose names are `displayed` already."""
    return _INSIDE_LINES.sub(_escape, str(text))


def displayed_values(value: Any) -> Any:
    """A copy of JSON values, or of a dataclass of such, in which every text is `displayed`, keys as well."""
    if isinstance(value, str):
        return displayed(value)
    if isinstance(value, Mapping):
        return {displayed_values(name): displayed_values(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(displayed_values(inner) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: displayed_values(getattr(value, one.name)) for one in fields(value)})
    return value


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
