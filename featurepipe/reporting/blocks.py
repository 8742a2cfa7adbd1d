"""What a page is made of: values as people read them, tables, plots, pictures, facts, colours. The template knows their looks.

A value that is missing or not finite is shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from featurepipe.display import named_columns, size

if TYPE_CHECKING:
    from bokeh.model import Model


DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


class TableCell(NamedTuple):
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


def bounded(value: Any, low: Any, high: Any) -> TableCell:
    """A share with its interval as a cell."""
    return TableCell(percent(value), finite(value), interval(low, high))


@dataclass(frozen=True)
class MeasureStyle:
    """What heads were compared by, and how its values are written.

    Attributes:
        name: as documents have it.
        word: in a sentence.
        title: as a heading.
        is_share: written as per cent; else as a number.
        best: what the one with the greatest value is called.
    """

    name: str
    word: str
    title: str
    is_share: bool
    best: str

    def text(self, value: Any, digits: int = 1) -> str:
        """A value; ``digits`` as of per cent."""
        return percent(value, digits) if self.is_share else plain(value, digits + 2)

    def interval(self, low: Any, high: Any) -> str:
        """Bounds of a value, or nothing where one is missing."""
        if self.is_share:
            return interval(low, high)
        return "" if finite(low) is None or finite(high) is None else f"{plain(low)} to {plain(high)}"

    def cell(self, value: Any, low: Any = None, high: Any = None) -> TableCell:
        """A value with its interval."""
        return TableCell(self.text(value), finite(value), self.interval(low, high))

    def difference(self, value: Any) -> str:
        """A difference of two values, with its sign: of shares in percentage points."""
        if self.is_share:
            return points(value)
        number = finite(value)
        return DASH if number is None else f"{number:+.3f}".replace("-", _MINUS)

    def difference_interval(self, low: Any, high: Any) -> str:
        """Bounds of a difference, or nothing where one is missing."""
        if finite(low) is None or finite(high) is None:
            return ""
        return f"{self.difference(low)} to {self.difference(high)}"


MEASURES: Mapping[str, MeasureStyle] = {
    "accuracy": MeasureStyle("accuracy", "accuracy", "Accuracy", is_share=True, best="most accurate"),
    "map": MeasureStyle("map", "mAP", "Mean average precision", is_share=True, best="best"),
    "r2": MeasureStyle("r2", "R2", "R2", is_share=False, best="best"),
}


BESIDES = {"macro_f1": "Macro F1", "rmse": "RMSE", "mae": "MAE"}
"""What may be measured beside, and its name in tables."""


def measure_of(part: Mapping[str, Any]) -> MeasureStyle:
    """What a comparison of layers, or an entry of one as `with_values` makes it, measures."""
    return MEASURES[part.get("measure", "accuracy")]


def with_values(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A comparison as people read it.

    Entries call what they measure ``value``, whatever it is, and say what under ``measure``; the columns of the network's
    bottleneck are called so (`featurepipe.display.named_columns`).
    """
    name = measure_of(document).name
    names = {name: "value", f"train_{name}": "train_value", f"best_{name}": "best_value"}

    def renamed(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"measure": name, **{names.get(key, key): value for key, value in entry.items()}}

    found = dict(document)
    for part in ("results", "concatenations"):
        if part in found:
            found[part] = [renamed(entry) for entry in found[part] or []]
    if found.get("recommended"):
        found["recommended"] = renamed(found["recommended"])
        if found["recommended"].get("elsewhere"):
            found["recommended"]["elsewhere"] = renamed(found["recommended"]["elsewhere"])
    described = (document.get("backbone") or {}).get("description")
    node = described.get("bottleneck") if isinstance(described, Mapping) else None
    names = {one["column"]: named_columns(one["column"], node) for one in document.get("columns") or ()}
    return found | {part: _with_names(found[part], names) for part in _NAMING_COLUMNS if part in found}


_NAMING_COLUMNS = (
    "columns", "results", "differences", "concatenations", "recommended", "similarity", "transferability",
)  # fmt: skip


def _with_names(value: Any, names: Mapping[str, str]) -> Any:
    """JSON values in which columns have the names that people know them by, keys as well."""
    if isinstance(value, str):
        return "+".join(names.get(part, part) for part in value.split("+"))
    if isinstance(value, Mapping):
        return {_with_names(key, names): _with_names(inner, names) for key, inner in value.items()}
    return [_with_names(one, names) for one in value] if isinstance(value, list | tuple) else value


def metrics_of(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of scores (``heads.statistics.metrics.score_table``) of the recommended column, or of the bundle."""
    part = document.get("details") if document.get("kind") in {"depth", "networks"} else document.get("evaluation")
    found: Mapping[str, Any] = (part or {}).get("metrics") or {}
    return found


def metrics_elsewhere(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same of the recommended column on the other source; empty where the document has none."""
    found: Mapping[str, Any] = (document.get("details_shifted") or {}).get("metrics") or {}
    return found


@dataclass(frozen=True)
class Prose:
    """Paragraphs."""

    kind: ClassVar[str] = "prose"
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """A few numbers that matter most: a name, a value and a remark each."""

    kind: ClassVar[str] = "figures"
    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        caption: What it shows.
        header: One name for each column.
        rows: As many cells each as the header has.
        groups: A row above the header: names and how many columns each spans (an empty name spans quietly).
        marked: Position of the row to point out, and ``mark`` the word that does.
        sortable: Whether a click on a column's name sorts by it.
        unbroken: Whether the names of rows stay on one line, as dates should.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    groups: tuple[tuple[str, int], ...] = ()
    marked: int | None = None
    mark: str = "recommended"
    sortable: bool = True
    unbroken: bool = False

    @property
    def looks(self) -> str:
        """Classes of its element: what a click does, and how it fits on paper.

        A long table of few columns stands there in columns of its own, side by side; one of many has smaller letters.
        """
        few = len(self.header) <= _NARROW and len(self.rows) > _LONG
        named = {
            "sortable": self.sortable and len(self.rows) > 1,
            "unbroken": self.unbroken,
            "narrow": few,
            "narrower": few and len(self.header) <= _NARROWER,
            "many": len(self.header) > _MANY,
        }
        return " ".join(name for name, applies in named.items() if applies)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        return tuple(any(row[k].order is not None for row in self.rows) for k in range(len(self.header)))


_NARROW, _NARROWER, _MANY = 5, 3, 10  # columns
_LONG = 12  # rows


class ColourPair(NamedTuple):
    """A colour on a light page and on a dark one."""

    light: str
    dark: str


@dataclass(frozen=True)
class Style:
    """How a series is drawn: colour, marker (None for none), dash, and whether the marker is filled."""

    colour: ColourPair
    marker: str | None = None
    dash: str | None = "solid"
    filled: bool = True


@dataclass(frozen=True)
class Key:
    """An entry of a plot's legend, which hides and shows what it stands for.

    Attributes:
        label: What it stands for.
        style: How that is drawn.
        models: Ids of the Bokeh models whose ``visible`` it switches.
        row: Instead, the value of a filter's rows that it switches (see ``page.js``).
        shown: Whether it starts shown.
    """

    label: str
    style: Style
    models: tuple[str, ...] = ()
    row: int | None = None
    shown: bool = True


@dataclass(frozen=True)
class Panel:
    """One Bokeh plot of an exhibit, with the words under which it is chosen.

    Attributes:
        title: What it shows, in a word or two.
        plot: The Bokeh figure.
        shape: How wide it may be: ``wide``, ``square``, ``strip``, several of which fit side by side, or ``dense``, a square of
            so many rows and columns that it is scrolled on a phone, and larger on paper.
        spoken: Its points in words, for screen readers; by default the exhibit's summary.
    """

    title: str
    plot: Any
    shape: str = "wide"
    spoken: str = ""


@dataclass(frozen=True)
class Exhibit:
    """Plots that belong together, their legend, and the same in words and as a table.

    Attributes:
        title: What is shown.
        summary: What there is to see, in a sentence or two: what a screen reader reads.
        panels: The plots.
        keys: The legend.
        table: The numbers.
        chosen: Whether one panel is shown at a time, chosen by a button; on paper all are.
        filters: For keys with a ``row``: ids of a boolean filter and of its source.
        note: How to read it.
    """

    kind: ClassVar[str] = "exhibit"
    title: str
    summary: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...] = ()
    table: Table | None = None
    chosen: bool = False
    filters: tuple[str, str] | None = None
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A thumbnail (a data URI, or None where the image is not at hand) with what is known of the image."""

    source: str | None
    alt: str
    name: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    kind: ClassVar[str] = "gallery"
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Steps:
    """What to do, in order, under a name."""

    kind: ClassVar[str] = "steps"
    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A record of any depth, as names and values; folded away unless printed."""

    kind: ClassVar[str] = "facts"
    title: str
    values: Mapping[str, Any]


Block = Prose | Figures | Table | Exhibit | Gallery | Steps | Facts


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    anchor: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


INK = ColourPair("#1d2329", "#e8eaed")
QUIET = ColourPair("#555e68", "#adb5bf")
RULE = ColourPair("#dfe3e8", "#363c45")
ACCENT = ColourPair("#0063a6", "#6cbcf5")

# Hues that remain apart under the common kinds of colour blindness (after Okabe and Ito, 2008), darker or lighter so that
# each stands out from its page at 3:1 or more.
SERIES = (
    ColourPair("#0072b2", "#56b4e9"),
    ColourPair("#c44e00", "#f5a742"),
    ColourPair("#00795c", "#3fc99b"),
    ColourPair("#b0307a", "#f08bc4"),
    ColourPair("#7a6200", "#e8dc5a"),
    ColourPair("#3a3f45", "#d5d9de"),
    ColourPair("#5b4bb5", "#b3a6ff"),
    ColourPair("#9c2f1f", "#ff9a8a"),
)
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star")
OTHERS = ColourPair("#8a929b", "#7d8590")

# From the page's own colour to the accent's darkest (on dark pages lightest) tone.
_SCALE_LIGHT = ((244, 247, 250), (118, 176, 222), (4, 62, 110))
_SCALE_DARK = ((30, 35, 42), (31, 99, 153), (176, 222, 255))


def series(position: int) -> Style:
    """The style of one of many series: 56 differ in colour or marker, and neighbours in both."""
    return Style(SERIES[position % len(SERIES)], MARKERS[position % len(MARKERS)])


def shade(value: float) -> ColourPair:
    """The colour of a cell from 0 (the page) to 1."""
    return ColourPair(_between(_SCALE_LIGHT, value), _between(_SCALE_DARK, value))


def on_shade(value: float) -> ColourPair:
    """The colour of text on ``shade(value)``: black or white, whichever stands out more."""
    return ColourPair(*(_readable(colour) for colour in shade(value)))


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (Web Content Accessibility Guidelines 2.2).

    Example:
        >>> round(contrast("#ffffff", "#000000"))
        21
    """
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


class Paint:
    """Colours models for a light page, and keeps a note of what the page's script changes where the reader's is dark."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str, Any, Any]] = []

    def set(self, model: Model, **colours: ColourPair) -> None:
        """Sets properties of a Bokeh model to the light colours."""
        for name, pair in colours.items():
            setattr(model, name, pair.light)
            self.notes.append((model.id, name, {"value": pair.light}, {"value": pair.dark}))

    def set_plain(self, model: Model, **colours: ColourPair) -> None:
        """As ``set``, for properties that take a colour only, as those of axes and grids do."""
        for name, pair in colours.items():
            setattr(model, name, pair.light)
            self.notes.append((model.id, name, pair.light, pair.dark))

    def set_fields(self, model: Model, **stems: str) -> None:
        """As ``set``, for properties that follow columns ``STEM_light`` and ``STEM_dark`` of the data."""
        for name, stem in stems.items():
            setattr(model, name, f"{stem}_light")
            self.notes.append((model.id, name, {"field": f"{stem}_light"}, {"field": f"{stem}_dark"}))


def _between(stops: tuple[tuple[int, int, int], ...], value: float) -> str:
    place = min(max(value, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    share = place - left
    mixed = (round(a + share * (b - a)) for a, b in zip(stops[left], stops[left + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _readable(colour: str) -> str:
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


def _luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
