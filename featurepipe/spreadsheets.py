"""CSV files that a spreadsheet opens without running what a stranger's file name says.

A cell that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line end may be taken for a formula (CWE-1236, "CSV injection").
Such text gets an apostrophe in front, the sign by which spreadsheets know text; numbers stay.
"""

from __future__ import annotations

import re
from typing import TypeVar

import pyarrow as pa

from featurepipe.tables import counted

_FORMULA = r"^(\s*[=+\-@＝＋－＠]|[\t\r\n])"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


def neutralised(rows: Rows) -> tuple[Rows, int]:
    """Rows whose texts no spreadsheet runs, and how many cells had to be changed.

    Args:
        rows: any columns; only those of text are looked at.
    """
    import pyarrow.compute as pc

    changed, columns = 0, []
    for column in rows.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            found = pc.fill_null(pc.match_substring_regex(column, _FORMULA), fill_value=False)
            if pc.any(found).as_py():
                cells = [_text(cell) for cell in column.to_pylist()]
                changed += sum(one != other for one, other in zip(cells, column.to_pylist(), strict=True))
                column = pa.array(cells, column.type)  # noqa: PLW2901
        columns.append(column)
    return type(rows).from_arrays(columns, schema=rows.schema), changed


def neutralised_text(changed: int, file: object) -> str:
    """What is said where cells were changed; empty if none was."""
    if not changed:
        return ""
    return (
        f"{counted(changed, 'cell')} of {file} would have been a formula in a spreadsheet and got an apostrophe in front; "
        "--raw-ids keeps them as they are"
    )


def _text(cell: str | None) -> str | None:
    if cell is None or not re.match(_FORMULA, cell) or _NUMBER.fullmatch(cell):
        return cell
    return f"'{cell}"
