"""Annotations of images as people write them: CSV files with named columns, labels of classes, names of splits."""

from __future__ import annotations

import csv
import io
import json
import math
import numbers
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from featurepipe.display import first_names
from featurepipe.errors import Message, Option, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

KEPT_COLUMN: Final = "column:"
"""What the names of a manifest's further columns begin with in listings and snapshots, such as ``column:patient``."""
SEPARATORS: Final = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
PATHS: Final = (
    "path", "filepath", "imagepath", "imgpath", "file", "filename", "imagefile", "imagefilename", "imagename", "image", "img",
)  # fmt: skip
"""Names of a column of paths, in lower case and without ``_``, ``-`` and blanks; the first that is there is taken."""

_DECLARED: Final = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # what Excel writes, and reads, as a first line


def texts_of(values: pa.Array | pa.ChunkedArray | Iterable[Any]) -> pa.Array | pa.ChunkedArray:
    """A column as text: text as it is, None and NaN as null, anything else as JSON writes it; an Arrow column stays one.

    Dates, times and decimals of Arrow are as Arrow writes them: without quotes.

    Example:
        >>> texts_of(["a", None, 1.5, float("nan"), True, ["x", "y"]]).to_pylist()
        ['a', None, '1.5', None, 'true', '["x", "y"]']
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.Array | pa.ChunkedArray):
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if any(is_kind(values.type) for is_kind in _plain_types()):
            return values.cast(pa.string())
        values = values.to_pylist()
    return pa.array(map(_json_text, values), pa.string())


def _plain_types() -> Sequence[Callable[[Any], bool]]:
    """What Arrow writes as the text that a person would."""
    from pyarrow import types

    return (
        types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean, types.is_null,
        types.is_date, types.is_time, types.is_timestamp, types.is_decimal,
    )  # fmt: skip


def _json_text(value: Any) -> str | None:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    return json.dumps(value, default=str)


def plain_name(column: str) -> str:
    """A column's name in lower case and without ``_``, ``-``, blanks and a byte order mark."""
    return re.sub(r"[-_\s\ufeff]+", "", column).lower()


def column_named(wanted: str, columns: Sequence[str]) -> str | None:
    """The column of that name: exactly so, else without regard to case and blanks.

    Raises:
        UsageError: There is none exactly so, and several are without regard to that.

    Example:
        >>> column_named("label", ["path", " Label "]), column_named("label", ["path", "labels"])
        (' Label ', None)
    """
    if wanted in columns:
        return wanted
    found = list(dict.fromkeys(column for column in columns if column.strip().lower() == wanted.lower()))
    if len(found) > 1:
        raise UsageError(
            f"several columns may be {wanted!r}: {', '.join(map(repr, found))}; name the one meant exactly so"
        )
    return found[0] if found else None


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
        for fields in reader:
            if not any(fields) and (
                width > 1 or not fields
            ):  # an empty line, or what table programs write below a table
                continue
            if len(fields) != width:
                raise csv.Error(  # noqa: TRY301  # the handler says at which line
                    f"{len(fields)} fields separated by {SEPARATORS.get(separator, repr(separator))}, and the header has "
                    f"{width}; put fields that hold {separator!r} in double quotes"
                )
            if strip:
                fields = [field.strip() for field in fields]  # noqa: PLW2901
            yield skipped + reader.line_num, [field or None for field in fields]
    except csv.Error as error:
        raise csv.Error(f"line {skipped + reader.line_num}: {error}") from error
    finally:
        text.detach()  # the file is its opener's


def duplicate(names: Sequence[str], used: Sequence[str]) -> str | None:
    """The first used column that is there more than once, or None."""
    return next((name for name in used if names.count(name) > 1), None)


NAN: Final = ("nan", "NaN")
"""What programs write for a number that is none."""

_LIKE_NONE: Final = {"na", "n/a", "#n/a", "<na>", "nan", "nat", "none", "null", "nil", "undefined", "-", "?"}
_NAMED: Final = 3  # pairs of names that a message shows
_EXACT: Final = 2.0**53  # whole floats below it are whole numbers
_WHOLE: Final = re.compile(r"(0|-?[1-9]\d{0,14})(\.0)?")  # not 007, nor what a float does not hold exactly
_MARKS: Final = "|;,"
_IMAGES_A_NUMBER: Final = 10
"""Numbers with fractions that are classes have at least so many images each; measured amounts hardly repeat."""


def label_text(label: Any) -> tuple[str | None, str]:
    """A label as the text of its class, and what is wrong with it.

    Args:
        label: What a file, an array or a user gives for one image.

    Returns:
        The text, without blanks around it, and ``""``; None and ``""`` for no label (None, an empty text); or None and what
        it is that cannot be a label, such as ``"NaN"`` or ``"a list"``. Whole floats are whole numbers, since table programs
        make floats of a column of numbers with gaps. Bytes that are not UTF-8 become surrogates, as in file names.

    Example:
        >>> label_text(" cat "), label_text(3.0), label_text(""), label_text(["cat", "dog"])
        (('cat', ''), ('3', ''), (None, ''), (None, 'a list'))
    """
    value = label.item() if isinstance(label, np.generic) else label
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if value is None:
        return None, ""
    if isinstance(value, str):
        text = value.strip()
        return (None, repr(text)) if text in NAN else (text or None, "")
    if isinstance(value, bool | numbers.Integral):
        return str(value), ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None, "NaN" if math.isnan(value) else "infinite"
        return str(int(value) if value.is_integer() and abs(value) < _EXACT else value), ""
    return (None, "NaN") if is_missing(value) else (None, f"a {type(value).__name__}")


def whole_numbers(labels: pa.ChunkedArray) -> tuple[pa.ChunkedArray, str]:
    """Writes whole numbers as such that a column without types holds as floats, as pandas writes whole numbers with gaps.

    Columns with types give a whole float as the whole number (`label_text`), so that the class ``1`` of a Parquet file is that
    of ``1.0`` in a CSV file. One label alone does not tell: ``1.0`` may be the name of a version, or an amount. The column
    tells, if all of it are whole numbers.

    Args:
        labels: The whole column, of text; null and ``""`` stand for no label.

    Returns:
        The column, changed if it holds such numbers; and what is to be said, empty if no label is written so.

    Example:
        >>> import pyarrow as pa
        >>> [whole_numbers(pa.chunked_array([column]))[0].to_pylist() for column in (["1.0", ""], ["1.0", "1.5"], ["01", "1"])]
        [['1', ''], ['1.0', '1.5'], ['01', '1']]
    """
    import pyarrow.compute as pc

    classes = [name for name in pc.unique(labels).to_pylist() if name]
    as_floats = sorted((name for name in classes if name.endswith(".0") and _WHOLE.fullmatch(name)), key=float)
    if not as_floats:
        return labels, ""
    first = as_floats[0]
    others = sorted(name for name in classes if not _WHOLE.fullmatch(name))
    if others:
        return labels, (
            f"labels such as {first!r} are kept as they are written, since not all are whole numbers (such as {others[0]!r}); "
            f"a file with types, such as Parquet, has {first[:-2]!r} for it"
        )
    return pc.replace_substring_regex(labels, r"\.0$", ""), (
        f"labels are whole numbers written as floats, and taken as whole numbers: {first!r} as {first[:-2]!r}"
    )


def is_missing(label: Any) -> bool:
    """Whether a label is None, or the NaN, NaT or NA of NumPy or pandas.

    Example:
        >>> is_missing(float("nan")), is_missing(None), is_missing("nan")
        (True, True, False)
    """
    if label is None:
        return True
    if isinstance(label, str | bytes | np.ndarray | list | tuple | dict):
        return False
    try:
        return not label == label  # noqa: PLR0124, SIM201  # NaN and NaT equal nothing, not even themselves
    except TypeError:  # pandas' NA is neither true nor false
        return True


def numbers_on_a_scale(classes: Sequence[str], images: int) -> str | None:
    """What makes classes look like measured numbers, such as ages: a target for regression, not for a classifier.

    They do if all are numbers, and have fractions and fewer than ten images each, or are whole, not counted from 0 or 1,
    and have fewer than two images each. Codes of classes, such as 0 to 9, do not.

    Args:
        classes: The distinct labels.
        images: How many images have one of them.

    Returns:
        Words such as ``"40 different numbers from 20 to 73.43"``, or None.
    """
    values = [_number(name) for name in classes]
    found = [value for value in values if value is not None]
    if len(found) < max(3, len(classes)):
        return None
    has_fractions = any(value != math.floor(value) for value in found)
    is_counted = not has_fractions and min(found) in (0, 1) and max(found) <= 2 * len(found)
    if is_counted or images >= (_IMAGES_A_NUMBER if has_fractions else 2) * len(found):
        return None
    return f"{len(found):,} different numbers from {min(found):g} to {max(found):g}"


def several_names(classes: Sequence[str]) -> str | None:
    """Says which classes look like several labels in one text, such as ``red|round``; None if none do.

    With ``|`` any does; with ``;`` and ``,`` only those of which a part is a class as well, or a part of two classes: a class
    may well be called ``Washington, D.C.``.
    """
    for mark in _MARKS:
        parts = {name: [part.strip() for part in name.split(mark)] for name in classes if mark in name.strip(mark)}
        counts = Counter(part for several in parts.values() for part in set(several))
        known = set(classes)
        shared = [name for name, several in parts.items() if any(counts[part] > 1 or part in known for part in several)]
        named = list(parts) if mark == "|" else shared
        if named:
            count = "1 label holds" if len(named) == 1 else f"{len(named):,} labels hold"
            return (
                f"{count} several names separated by {mark!r}, such as {named[0]!r}: they are taken as one class each; "
                "for one class a label, keep one name in each"
            )
    return None


def names_in_doubt(classes: Sequence[str], one: str = "class", more: str = "classes") -> list[str]:
    """Says which classes may stand for no label, such as ``NA``, and which may be meant to be one, such as ``Cat`` and ``cat``.

    Those of one character may differ in case: they may be letters that are to be told apart.

    Args:
        classes: Distinct names, of classes or of ``more``.
        one: What a name is.
        more: What several are.

    Example:
        >>> names_in_doubt(["None", "cat", "Cat ", "1", "1.0"])[0]
        "taken as a class: 'None'; leave the label empty where there is none"
        >>> names_in_doubt(["cat", "Cat ", "1", "1.0"])
        ["taken as classes of their own, though they look alike: '1' and '1.0', 'Cat ' and 'cat'"]
    """
    notes = []
    if none := [repr(name) for name in sorted(classes) if name.strip().lower() in _LIKE_NONE]:
        cell = "label" if one == "class" else one
        notes.append(
            f"taken as {f'a {one}' if len(none) == 1 else more}: {', '.join(none)}; leave the {cell} empty where there is none"
        )
    alike: dict[str | float, list[str]] = {}
    for name in sorted(classes):
        plain = " ".join(unicodedata.normalize("NFC", name).split())
        number = _number(plain) if plain[:1].isdigit() else None
        key = number if number is not None else plain if len(plain) == 1 else plain.casefold()
        alike.setdefault(key, []).append(name)
    if several := [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]:
        notes.append(f"taken as {more} of their own, though they look alike: {first_names(several, _NAMED)}")
    return notes


def check_classes(classes: Sequence[str], images: int, say: Callable[[str], None], column: str = "label") -> None:
    """Refuses classes that are numbers on a scale, and says if some look like several labels in one.

    Args:
        classes: The distinct labels.
        images: How many images have one of them.
        say: Told one line, if any.
        column: Where they are from.

    Raises:
        UsageError: They look like measured numbers.
    """
    scale = numbers_on_a_scale(classes, images)
    if scale is not None:
        raise UsageError(
            Message(
                f"the labels are {scale}, on {images:,} images: numbers to be estimated (regression), not classes to be told "
                "apart. featurepipe train estimates them with ",
                Option("target", column),
                "; to learn classes, write ranges, such as 20-29, or names in their place",
            )
        )
    several = several_names(classes)
    if several is not None:
        say(several)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


_NAMES: Final = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst"),
}
_SPLITS: Final = {name: split for split, names in _NAMES.items() for name in names}
_AROUND: Final = "set|sets|data|dataset|split|img|imgs|image|images"
_NAME: Final = re.compile(rf"(?:(?:seg|{_AROUND})_)?({'|'.join(_SPLITS)})(?:_?(?:{_AROUND}))?(?:_?(?:19|20)\d\d)?")


def split_asked(name: str, there: Collection[str | None]) -> str:
    """The split of a dataset that a user's name means: itself, or what it stands for (``validation``: ``val``).

    Example:
        >>> split_asked("validation", ["train", "val"]), split_asked("fold-7", ["train"])
        ('val', 'fold-7')
    """
    usual = split_of(name)
    return usual if name not in there and usual in there and usual is not None else name


def split_of(name: str) -> str | None:
    """The split that the name of a folder, of an array, or in a manifest stands for: train, val, test, or None.

    Case does not matter, nor whether words are joined by ``_``, ``-`` or blanks; a word such as ``set`` or ``images``
    beside the split's name and a year after it are allowed: ``training_set``, ``seg_train``, ``Val-Images``, ``train2017``.

    Example:
        >>> split_of("validation"), split_of("Test-Set"), split_of("seg_train"), split_of("cats")
        ('val', 'test', 'train', None)
    """
    found = _NAME.fullmatch(re.sub(r"[-\s_]+", "_", name.strip().lower()))
    return _SPLITS[found[1]] if found else None
