"""Names as they may be shown, since a terminal obeys what it is sent, and amounts of memory and time as people write them.

File names, labels and ids come from strangers. Escaped are the control characters (C0, DEL, C1), line and paragraph separators,
the marks and overrides of text direction (Boucher and Anderson 2023, "Trojan Source", CVE-2021-42574), and halves of surrogate
pairs, which no encoding can write. What is shown is escaped where it leaves us: `featurepipe.display.table`, progress and
messages, logs, results as text, errors, HTML pages, figures for Prometheus. What machines read (JSON, HDF5, Parquet) holds the
names as they are.

A cell that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line end may be taken for a formula (CWE-1236, "CSV injection").
Such text gets an apostrophe in front, the sign by which spreadsheets know text; numbers stay. Where labels are read from a CSV
file, it goes again, so that a file that was written here means the same when it is handed back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from featurepipe.errors import Message, Option, UsageError

if TYPE_CHECKING:
    import pyarrow as pa


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


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right; a cell is one line, whatever name it holds.

    Example:
        >>> print(table(["node", "width"], [["layer1", 256], ["layer4", 2048]]))
        node    width
        layer1    256
        layer4   2048
    """
    cells = [[_cell_text(value) for value in row] for row in rows]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    widths = [max([len(title), *(len(row[i]) for row in cells)]) for i, title in enumerate(header)]
    lines = [list(map(displayed, header)), *cells]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def _cell_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else displayed(value)


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least one before the point.

    Example:
        >>> size(999), size(2_560_000), size(64 * 2**20)
        ('999 B', '2.6 MB', '67.1 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def share(part: float) -> str:
    """A share as per cent.

    Example:
        >>> share(0.0493)
        '4.9 %'
    """
    return f"{100 * part:.1f} %"


def named_columns(columns: str | Sequence[str], bottleneck: object) -> str:
    """Columns or nodes as people know them: that of the network's bottleneck is called so, if it has a name of its own.

    Args:
        columns: Names, ``node`` or ``node:pooling``, or one.
        bottleneck: The node that people ask for as the bottleneck; None if it is not known.

    Example:
        >>> named_columns("flatten:gap", "flatten"), named_columns(["layer1:gap", "bottleneck:gap"], "bottleneck")
        ('bottleneck (flatten:gap)', 'layer1:gap + bottleneck:gap')
    """
    names = [columns] if isinstance(columns, str) else columns
    return " + ".join(
        f"bottleneck ({one})" if one.partition(":")[0] == bottleneck != "bottleneck" else one for one in names
    )


def counted(number: int, noun: str, one: str = "", several: str = "") -> str:
    """A number with its noun, and with a verb if its two forms are given.

    Example:
        >>> counted(1, "part"), counted(2000, "part"), counted(3, "row that no snapshot needs")
        ('1 part', '2,000 parts', '3 rows that no snapshot needs')
        >>> counted(1, "label", "has", "have"), counted(2, "label", "has", "have")
        ('1 label has', '2 labels have')
    """
    first, space, rest = noun.partition(" that ")
    verb = one if number == 1 else several
    return f"{number:,} {first}{'' if number == 1 else 's'}{space}{rest}{verb and f' {verb}'}"


def has(number: int) -> str:
    """``has`` or ``have``, as so many do, where other words stand between; else `counted` says it."""
    return "has" if number == 1 else "have"


def dealt_with(counts: Mapping[str, int], copies: int = 0, left: int = 0) -> str:
    """What became of images.

    Args:
        counts: How many were ``computed``, ``known`` and ``rejected``.
        copies: How many of the known are copies of those computed.
        left: How many were listed and are none of these, as the run ended before.

    Example:
        >>> dealt_with({"computed": 4, "known": 3, "rejected": 1}, 2)
        '4 computed, 3 known (2 as copies of these), 1 rejected'
        >>> dealt_with({"computed": 4, "known": 0, "rejected": 1}, left=7)
        '4 computed, 0 known, 1 rejected, 7 left'
    """
    computed, known, rejected = (f"{counts.get(name, 0):,} {name}" for name in ("computed", "known", "rejected"))
    more = f", {left:,} left" if left > 0 else ""
    return f"{computed}, {known}{f' ({copies:,} as copies of these)' if copies else ''}, {rejected}{more}"


def shortened(text: str, most: int) -> str:
    """A text cut in the middle so that it has at most ``most`` characters: names differ at both ends.

    Example:
        >>> shortened("features.denseblock4.denselayer16", 16)
        'features\u2026layer16'
    """
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (most - most // 2 - 1) :]}"


def first_names(names: Sequence[object], most: int = 3, *, apart: str = ", ", what: str = "") -> str:
    """The first names, and how many more there are.

    Args:
        names: All of them.
        most: How many are shown.
        apart: What stands between two.
        what: What they are, behind the number of the others.

    Example:
        >>> first_names(["a", "b", "c", "d"]), first_names(["a", "b"])
        ('a, b, c and 1 more', 'a, b')
    """
    more = f" and {len(names) - most:,} more{what and f' {what}'}" if len(names) > most else ""
    return apart.join(map(str, names[:most])) + more


_FORMULA = r"^(\s*[=+\-@＝＋－＠]|[\t\r\n])"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

Rows = TypeVar("Rows", "pa.Table", "pa.RecordBatch")


def neutralised(rows: Rows) -> tuple[Rows, int]:
    """Rows whose texts no spreadsheet runs, and how many cells had to be changed.

    Args:
        rows: any columns; only those of text are looked at.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    changed, columns = 0, []
    for column in rows.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            found = pc.fill_null(pc.match_substring_regex(column, _FORMULA), fill_value=False)
            if pc.any(found).as_py():
                cells = [_neutral_cell(cell) for cell in column.to_pylist()]
                changed += sum(one != other for one, other in zip(cells, column.to_pylist(), strict=True))
                column = pa.array(cells, column.type)  # noqa: PLW2901
        columns.append(column)
    return type(rows).from_arrays(columns, schema=rows.schema), changed


def restored(cell: str) -> str:
    """The text that a cell had before `neutralised` changed it.

    Example:
        >>> restored("'=cmd"), restored("'tis"), restored("-1")
        ('=cmd', "'tis", '-1')
    """
    return cell[1:] if cell.startswith("'") and re.match(_FORMULA, cell[1:]) else cell


def neutralised_text(changed: int, file: object) -> Message:
    """What is said where cells were changed; empty if none was."""
    if not changed:
        return Message()
    return Message(
        f"{counted(changed, 'cell')} of {file} would have been a formula in a spreadsheet and got an apostrophe in front; ",
        Option("raw_ids", value=True),
        " keeps them as they are",
    )


def _neutral_cell(cell: str | None) -> str | None:
    if cell is None or not re.match(_FORMULA, cell) or _NUMBER.fullmatch(cell):
        return cell
    return f"'{cell}"


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SECONDS |= {
    f"{word}{end}": n
    for word, n in (("second", 1), ("minute", 60), ("hour", 3600), ("day", 86400))
    for end in ("", "s")
}
_DURATION = rf"(\d+(?:\.\d+)?)\s*({'|'.join(sorted(_SECONDS, key=len, reverse=True))})\s*"


def bytes_of(amount: float | str) -> int:
    """Returns an amount of memory in bytes.

    Args:
        amount: Bytes, or text: a number and a unit, decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB).

    Raises:
        UsageError: It is no positive amount.

    Example:
        >>> bytes_of("512MB"), bytes_of("1.5 GiB"), bytes_of(4096)
        (512000000, 1610612736, 4096)
    """
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower())
        number = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    else:
        number = amount
    if not number >= 1:
        raise UsageError(
            f"memory {amount!r} is no amount of memory; give bytes or text such as '512MB', '2GB', '1.5GiB'"
        )
    return int(number)


def seconds_of(duration: float | str) -> float:
    """Returns a duration in seconds.

    Args:
        duration: Seconds, or text: numbers with units (s, m or min, h, d, or "6 hours"), or a number alone, which is seconds.

    Raises:
        UsageError: It is no positive duration.

    Example:
        >>> seconds_of("30min"), seconds_of("1h30m"), seconds_of("0.5 d"), seconds_of("6 hours"), seconds_of(1.5)
        (1800.0, 5400.0, 43200.0, 21600.0, 1.5)
    """
    text = str(duration).strip().lower()
    if re.fullmatch(r"[\d.]+", text):
        text += "s"
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_DURATION, text))
    if not seconds or not re.fullmatch(f"(?:{_DURATION})+", text):
        raise UsageError(f"{duration!r} is no duration; give seconds or text such as '90s', '30min', '6h', '1h30m'")
    return seconds
