"""Tables with named columns in ``.csv`` files as people have them: separators, byte order marks, names in any case."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Final, Protocol

SEPARATORS: Final = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
PATHS: Final = (
    "path", "filepath", "imagepath", "imgpath", "file", "filename", "imagefile", "imagefilename", "imagename", "image", "img",
)  # fmt: skip
"""Names of a column of paths, in lower case and without ``_``, ``-`` and blanks; the first that is there is taken."""

_DECLARED: Final = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # what Excel writes, and reads, as a first line


def plain_name(column: str) -> str:
    """A column's name in lower case and without ``_``, ``-``, blanks and a byte order mark."""
    return re.sub(r"[-_\s\ufeff]+", "", column).lower()


def column_named(wanted: str, columns: Sequence[str]) -> str | None:
    """The column of that name: exactly so, else without regard to case and blanks.

    Example:
        >>> column_named("label", ["path", " Label "]), column_named("label", ["path", "labels"])
        (' Label ', None)
    """
    if wanted in columns:
        return wanted
    return next((column for column in columns if column.strip().lower() == wanted), None)


def path_column(columns: Sequence[str]) -> str | None:
    """The column of paths: ``path``, else the first of `PATHS` that is there, in any case.

    Example:
        >>> path_column(["id", "File_Name"])
        'File_Name'
    """
    if "path" in columns:
        return "path"
    by_name = {plain_name(column): column for column in reversed(columns)}
    return next((by_name[name] for name in PATHS if name in by_name), None)


class _Reader(Protocol):
    line_num: int

    def __next__(self) -> list[str]: ...
    def __iter__(self) -> Iterator[list[str]]: ...


@dataclass(frozen=True)
class CsvTable:
    """A table that is read row by row.

    Attributes:
        names: Of its columns, without blanks around them.
        separator: Between them.
        rows: Line number and fields of each row that is not empty; an empty field is None.
    """

    names: list[str]
    separator: str
    rows: Iterator[tuple[int, list[str | None]]]


def read_csv(file: IO[bytes], needed: Sequence[str] = PATHS) -> CsvTable:
    """Opens a CSV file, whatever separates its columns.

    Commas are tried first, then semicolons, tabs and vertical bars: the first with which the header has a needed column.
    Blanks around names never count, and those around fields do not if the header has one after a separator. UTF-8 and, with
    a byte order mark, UTF-16 are read.

    Args:
        file: The file, at its beginning.
        needed: Names of columns, as `plain_name` gives them, any of which shows that a separator is the right one.

    Raises:
        csv.Error: While rows are read: one has more or fewer fields than the header, or a quote is not closed.
        UnicodeDecodeError: It is neither UTF-8 nor UTF-16.
    """
    start = file.read(2)
    file.seek(0)
    text = io.TextIOWrapper(file, "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", newline="")
    header, skipped = text.readline(), 1
    declared = _DECLARED.fullmatch(header)
    while header and (not header.strip() or (declared and skipped == 1)):
        header, skipped = text.readline(), skipped + 1
    separator = declared[1] if declared else _separator(header, needed)
    has_blanks = f"{separator} " in header
    names = [name.strip() for name in _fields(header, separator)]
    return CsvTable(names, separator, _rows(text, len(names), separator, skipped, strip=has_blanks))


def _separator(header: str, needed: Sequence[str]) -> str:
    fits = (mark for mark in SEPARATORS if any(plain_name(name) in needed for name in _fields(header, mark)))
    return next(fits, None) or max(SEPARATORS, key=header.count)


def _fields(header: str, separator: str) -> list[str]:
    return next(csv.reader([header], delimiter=separator, skipinitialspace=True), []) if header.strip() else []


def _rows(
    text: io.TextIOWrapper, width: int, separator: str, skipped: int, *, strip: bool
) -> Iterator[tuple[int, list[str | None]]]:
    reader = csv.reader(text, delimiter=separator, skipinitialspace=strip, strict=True)
    try:
        while (fields := _next(reader, skipped)) is not None:
            if not any(fields) and (
                width > 1 or not fields
            ):  # an empty line, or what table programs write below a table
                continue
            line = skipped + reader.line_num
            if len(fields) != width:
                raise csv.Error(
                    f"line {line} has {len(fields)} fields separated by {SEPARATORS.get(separator, repr(separator))}, "
                    f"and the header has {width}; put fields that hold {separator!r} in double quotes"
                )
            yield line, [(field.strip() if strip else field) or None for field in fields]
    finally:
        text.detach()  # the file is its opener's


def _next(reader: _Reader, skipped: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise csv.Error(f"line {skipped + reader.line_num}: {error}") from error


def duplicate(names: Sequence[str], used: Sequence[str]) -> str | None:
    """The first used column that is there more than once, or None."""
    return next((name for name in used if names.count(name) > 1), None)
