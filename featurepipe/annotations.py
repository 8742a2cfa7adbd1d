"""What a label may be: the text of a class, or nothing; whether classes are numbers on a scale, or several names in one."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from featurepipe.errors import UsageError

NAN: Final = ("nan", "NaN")
"""What programs write for a number that is none."""

_EXACT: Final = 2.0**53  # whole floats below it are whole numbers
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


def check_classes(classes: Sequence[str], images: int, say: Callable[[str], None]) -> None:
    """Refuses classes that are numbers on a scale, and says if some look like several labels in one.

    Args:
        classes: The distinct labels.
        images: How many images have one of them.
        say: Told one line, if any.

    Raises:
        UsageError: They look like measured numbers.
    """
    scale = numbers_on_a_scale(classes, images)
    if scale is not None:
        raise UsageError(
            f"the labels are {scale}, on {images:,} images: numbers to be estimated (regression), not classes to be told "
            "apart. Heads learn classes: write ranges, such as 20-29, or names in their place"
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
