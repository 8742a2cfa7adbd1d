"""Plain text for people: tables and numbers with units, the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from featurepipe.display import displayed


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right; a cell is one line, whatever name it holds.

    Example:
        >>> print(table(["node", "width"], [["layer1", 256], ["layer4", 2048]]))
        node    width
        layer1    256
        layer4   2048
    """
    cells = [[_text(value) for value in row] for row in rows]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    widths = [max([len(title), *(len(row[i]) for row in cells)]) for i, title in enumerate(header)]
    lines = [list(map(displayed, header)), *cells]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def _text(value: object) -> str:
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
