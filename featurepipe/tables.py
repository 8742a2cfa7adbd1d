"""Tables and numbers with units as plain text for people, and CSV files that no spreadsheet runs.

A cell that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line end may be taken for a formula (CWE-1236, "CSV injection").
Such text gets an apostrophe in front, the sign by which spreadsheets know text; numbers stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from featurepipe.display import displayed
from featurepipe.errors import Message, Option

if TYPE_CHECKING:
    import pyarrow as pa


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


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "part"), counted(2000, "part"), counted(3, "row that no snapshot needs")
        ('1 part', '2,000 parts', '3 rows that no snapshot needs')
    """
    first, space, rest = noun.partition(" that ")
    return f"{number:,} {first}{'' if number == 1 else 's'}{space}{rest}"


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
