"""What a page is made of: sections of prose, tables, plots, pictures and facts. The template knows how each looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from featurepipe.reporting.numbers import Cell
from featurepipe.reporting.palette import Style


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
    rows: tuple[tuple[Cell, ...], ...]
    groups: tuple[tuple[str, int], ...] = ()
    marked: int | None = None
    mark: str = "recommended"
    sortable: bool = True
    unbroken: bool = False

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        return tuple(any(row[k].order is not None for row in self.rows) for k in range(len(self.header)))


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
        shape: How wide it may be: ``wide``, ``square``, or ``strip``, several of which fit side by side.
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
