"""Bokeh plots that follow the page: transparent, as wide as they may be, no toolbar that keeps a finger from scrolling.

Text in a canvas that comes from the document is given as ``PlainText``: what Bokeh takes for TeX makes it load MathJax
from the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from bokeh.models import (
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PlainText,
    Range1d,
)
from bokeh.plotting import figure

from featurepipe.display import counted, first_names, shortened
from featurepipe.reporting.blocks import (
    INK,
    QUIET,
    RULE,
    Exhibit,
    Paint,
    Panel,
    Style,
    Table,
    TableCell,
    count,
    finite,
    on_shade,
    percent,
    plain,
    shade,
)

Figure = Any
"""A ``bokeh.plotting.figure``, whose annotations do not know all that its properties accept."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_LETTER, _FRAME = 7, 230  # pixels: of a character, and of a plot's width on a phone
_TICK = 24  # characters of a label under an axis
_SLANTED, _LEVEL = 16, 30  # labels that fit side by side on a phone, and one above the other
TWO_LINES = 8
"""Names below a plot that have room for two level lines each on a desk."""
_CARD = (  # narrow enough to fit beside any point on a phone
    "background:var(--card);color:var(--ink);box-sizing:border-box;max-width:min(15rem,42vw);margin:-5px;padding:8px 10px;"
    "font:13px/1.4 var(--sans)"
)
_BREAK = "overflow-wrap:anywhere"


def blank(
    paint: Paint,
    *,
    height: int = 400,
    least_width: int = 200,
    y_range: DataRange1d | Range1d | None = None,
    y_axis: Literal["linear", "log"] = "linear",
) -> Figure:
    """An empty plot without tools; ``y_range`` may be another plot's, ``y_axis`` logarithmic."""
    ranges: dict[str, Any] = {} if y_range is None else {"y_range": y_range}
    plot: Figure = figure(
        sizing_mode="stretch_width",
        height=height,
        min_width=least_width,
        tools="",
        toolbar_location=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        y_axis_type=y_axis,
        **ranges,
    )
    plot.toolbar.logo = None
    for axis in plot.axis:
        paint.set_plain(axis, axis_line_color=RULE, major_tick_line_color=RULE)
        paint.set_plain(axis, major_label_text_color=QUIET, axis_label_text_color=INK)
        axis.minor_tick_line_color = None
        axis.major_label_text_font = axis.axis_label_text_font = _FONT
        axis.major_label_text_font_size = axis.axis_label_text_font_size = "12px"
        axis.axis_label_text_font_style = "normal"
    for grid in plot.grid:
        paint.set_plain(grid, grid_line_color=RULE)
    return plot


def label_axis(axis: Any, text: str, *, shares: bool = False) -> None:
    """Says what an axis shows; ``shares`` are written as per cent."""
    axis.axis_label = PlainText(text=text)
    if shares:
        axis.formatter = NumeralTickFormatter(format="0.[0] %")


def name_places(
    axis: Any, names: Sequence[str], *, slanted: bool = False, every: bool = False, two_lines: bool = False
) -> None:
    """Names the places 0, 1, ... of an axis; where they are many, only some, so that labels stay apart on a phone.

    With ``every`` all have names, in smaller letters where they are many. With ``two_lines`` a few names stand level, in two
    lines each, wherever the page finds that they fit (the tag is for ``page.js``); elsewhere they are ``slanted``.
    """
    many = -(-len(names) // (_SLANTED if slanted else _LEVEL))
    labels = dict(list(enumerate(tick_names(names)))[:: 1 if every else max(many, 1)])
    if every and many > 1:
        axis.major_label_text_font_size = "9px"
    longest = max(map(len, labels.values()), default=0)
    if two_lines and len(labels) <= TWO_LINES:
        labels = {place: in_two_lines(text) for place, text in labels.items()}
        axis.tags = ["level where it fits"]
        longest = max((len(line) for text in labels.values() for line in text.split("\n")), default=0)
    axis.ticker = FixedTicker(ticks=list(labels))
    axis.major_label_overrides = {place: PlainText(text=text) for place, text in labels.items()}
    axis.major_tick_line_color = None
    if slanted and (longest + 1) * _LETTER * len(labels) > _FRAME:
        axis.major_label_orientation = 0.9 if longest <= 14 else 1.25  # stays inside


def in_two_lines(name: str) -> str:
    r"""Breaks a name after the colon or at the space that leaves the shorter lines; one without either stays.

    Example:
        >>> in_two_lines("blocks.10:avg8x8")
        'blocks.10:\navg8x8'
    """
    breaks = [place + 1 for place, sign in enumerate(name[:-1]) if sign in ": " and place]
    if not breaks:
        return name
    place = min(breaks, key=lambda place: max(place, len(name) - place))
    return f"{name[:place].rstrip()}\n{name[place:]}"


def tick_names(names: Sequence[str]) -> list[str]:
    """Names short enough for an axis; they are numbered where they could no longer be told apart.

    Example:
        >>> tick_names(["conv1", "features.stage.1.block.conv", "features.stage.2.block.conv"])
        ['1 conv1', '2 features.s…lock.conv', '3 features.s…lock.conv']
    """
    short = [shortened(name, _TICK) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    return [f"{place} {shortened(name, _TICK - 4)}" for place, name in enumerate(names, start=1)]


def hover(
    plot: Figure,
    renderers: Sequence[Any],
    lines: Sequence[tuple[str, str]],
    *,
    title: str,
    image: str = "",
    column: bool = False,
) -> None:
    """Shows the uppermost point under the pointer: ``title``, ``image`` and the values of ``lines`` are columns.

    Args:
        plot: Where.
        renderers: Whose points.
        lines: What each value is, and its column.
        title: The column shown in bold.
        image: The column of data URIs, if there are images.
        column: Whether it is enough to point above or below a point: bars may be too small to be hit.
    """
    rows = "".join(
        f'<div style="{_BREAK}"><span style="color:var(--quiet)">{name}</span> @{{{column}}}</div>'
        for name, column in lines
    )
    picture = (
        f'<img src="@{{{image}}}" alt="" style="display:block;width:96px;height:96px;object-fit:contain;'
        'background:#808080;margin-bottom:6px">'
        if image
        else ""
    )
    html = f'<div style="{_CARD}">{picture}<div style="font-weight:600;{_BREAK}">@{{{title}}}</div>{rows}</div>'
    plot.add_tools(
        HoverTool(
            renderers=list(renderers),
            tooltips=html,
            limit=1,
            sort_by=[("$index", "descending")],
            show_arrow=False,
            mode="vline" if column else "mouse",
        )
    )


def draw_series(plot: Figure, paint: Paint, source: ColumnDataSource, style: Style) -> tuple[list[Any], Any]:
    """Draws columns ``x``, ``y``, ``low`` and ``high`` as a line with markers and intervals.

    Returns:
        Every renderer, and the one of the markers, on which to hover.
    """
    bars = plot.segment("x", "low", "x", "high", source=source, line_width=2, line_alpha=0.75)
    _follow(paint, bars, line_color=style)
    renderers, points = draw_line(plot, paint, source, style)
    return [bars, *renderers], points


def draw_line(
    plot: Figure, paint: Paint, source: ColumnDataSource, style: Style, *, size: int = 10
) -> tuple[list[Any], Any]:
    """Draws columns ``x`` and ``y`` as a line with markers; returns as ``draw_series``."""
    line = plot.line("x", "y", source=source, line_width=2, line_dash=style.dash or "solid")
    _follow(paint, line, line_color=style)
    points = draw_points(plot, paint, source, style, size=size)
    return [line, points], points


def draw_bars(plot: Figure, paint: Paint, source: ColumnDataSource, style: Style) -> Any:
    """Draws columns ``x`` and ``y`` as bars that stand on 0."""
    bars = plot.vbar("x", 0.8, "y", source=source, line_width=0)
    _follow(paint, bars, fill_color=style, line_color=style)
    return bars


def draw_points(plot: Figure, paint: Paint, source: ColumnDataSource, style: Style, *, size: int = 10) -> Any:
    """Draws columns ``x`` and ``y`` as markers."""
    points = plot.scatter("x", "y", source=source, marker=style.marker or "circle", size=size, line_width=1.5)
    _follow(paint, points, line_color=style)
    if style.filled:
        _follow(paint, points, fill_color=style)
    else:
        points.glyph.fill_color = None
    return points


def _follow(paint: Paint, renderer: Any, **styles: Style) -> None:
    """Colours a glyph; Bokeh's own dimmed copies of it are never shown."""
    renderer.nonselection_glyph = None
    renderer.muted_glyph = None
    paint.set(renderer.glyph, **{name: style.colour for name, style in styles.items()})


Values = npt.NDArray[np.float64]

_WRITTEN = 16  # cells a side that have room for a number
_NAMED = 200  # classes that are left out and named
_DRAWN = 30  # classes, each with its name; beyond, those most often wrong
_TABLED = 30
_LABELS, _CELL = 180, 13  # pixels: of the names beside a map, and of a cell whose slanted name is apart from the next
_WHAT_CELLS_ARE = {
    True: "Numbers are per cent of the images of a true class.",
    False: "The stronger a cell's colour, the larger its share of the images of its true class, of 0 to 100\u00a0%; point at "
    "it, or tap it, for the numbers.",
}


def similarity_map(document: Mapping[str, Any], paint: Paint) -> Exhibit | None:
    """Linear CKA between nodes."""
    found = document.get("similarity") or {}
    names = [str(name) for name in found.get("columns") or []]
    values = _square(found.get("cka"), len(names))
    if len(names) < 2 or values is None:
        return None
    texts = [[plain(value, 2) for value in row] for row in values]
    plot = _heat(paint, names, values, texts)
    hover(plot, plot.renderers[:1], [("and", "column"), ("CKA", "text")], title="row")
    table = Table("CKA of each two nodes", ("Node", *names), _rows(names, values, texts), sortable=False)
    how = [f"{count(found['images'])} images" if found.get("images") else "", str(found.get("method") or "")]
    measured = f" Measured: {', '.join(filter(None, how))}." if any(how) else ""
    return Exhibit(
        "How alike the nodes' features are (linear CKA)",
        _likeness(names, values),
        (Panel("CKA", plot, _shape(names)),),
        (),
        table,
        note=f"1 is the same up to rotation and scale, 0 is unrelated.{measured}",
    )


def confusion_map(metrics: Mapping[str, Any], paint: Paint) -> Exhibit | None:
    """Which classes are taken for which, as shares of each true class."""
    found = metrics.get("confusion") or {}
    names = [str(name) for name in found.get("classes") or []]
    counts = _square(found.get("counts"), len(names))
    if not names or counts is None or not counts.sum():
        return None
    kept = most_wrong(counts)
    drawn = counts[np.ix_(kept, kept)]
    shares = drawn / np.maximum(counts[kept].sum(axis=1, keepdims=True), 1)
    shown = [names[k] for k in kept]
    texts = [[f"{100 * value:.0f}" if value >= 0.005 else "" for value in row] for row in shares]
    tips = [
        [f"{count(n)} ({percent(s)})" for n, s in zip(a, b, strict=True)] for a, b in zip(drawn, shares, strict=True)
    ]
    plot = _heat(paint, shown, shares, texts, tips)
    label_axis(plot.xaxis[0], "predicted")
    label_axis(plot.yaxis[0], "true")
    hover(plot, plot.renderers[:1], [("taken for", "column"), ("images", "tip")], title="row")
    others = [name for place, name in enumerate(names) if place not in set(kept.tolist())]
    left = (
        f" Shown are the {len(kept)} of {len(names)} classes with the most mistakes; left out: {first_names(others, _NAMED)}."
        if others
        else ""
    )
    return Exhibit(
        "Confusion matrix",
        _mix_ups(counts, names),
        (Panel("Confusion", plot, _shape(shown)),),
        (),
        _confusion_table(names, counts, metrics),
        note=f"{_WHAT_CELLS_ARE[len(shown) <= _WRITTEN]}{left}",
    )


def _square(values: Any, side: int) -> Values | None:
    """The values as a square matrix, what is missing as NaN; None if they are none."""
    rows = [[finite(value) for value in row] for row in values or []]
    if len(rows) != side or any(len(row) != side for row in rows):
        return None
    return np.array([[np.nan if value is None else value for value in row] for row in rows], np.float64)


def _heat(
    paint: Paint,
    names: Sequence[str],
    values: Values,
    texts: Sequence[Sequence[str]],
    tips: Sequence[Sequence[str]] | None = None,
) -> Figure:
    side = len(names)
    least = _LABELS + _CELL * side if side > _WRITTEN else 200
    plot = blank(paint, height=min(max(250 + 26 * side, 360), 620), least_width=least)
    plot.x_range, plot.y_range = Range1d(start=-0.5, end=side - 0.5), Range1d(start=side - 0.5, end=-0.5)
    level = np.nan_to_num(values).ravel()
    shades, inks = [shade(v) for v in level], [on_shade(v) for v in level]
    source = ColumnDataSource(
        {
            "x": [k % side for k in range(side * side)],
            "y": [k // side for k in range(side * side)],
            "row": [names[k // side] for k in range(side * side)],
            "column": [names[k % side] for k in range(side * side)],
            "text": [text for row in texts for text in row],
            "tip": [text for row in tips or texts for text in row],
            **{f"shade_{scheme}": [getattr(pair, scheme) for pair in shades] for scheme in ("light", "dark")},
            **{f"ink_{scheme}": [getattr(pair, scheme) for pair in inks] for scheme in ("light", "dark")},
        }
    )
    cells = plot.rect("x", "y", 0.98, 0.98, source=source, line_color=None)
    paint.set_fields(cells.glyph, fill_color="shade")
    if side <= _WRITTEN:
        words = plot.text("x", "y", "text", source=source, text_align="center", text_baseline="middle")
        words.glyph.text_font_size = "12px" if side <= 10 else "10px"
        paint.set_fields(words.glyph, text_color="ink")
    plot.grid.visible = False
    name_places(plot.xaxis[0], names, slanted=True, every=side <= _DRAWN)
    name_places(plot.yaxis[0], names, every=side <= _DRAWN)
    return plot


def _shape(names: Sequence[str]) -> str:
    return "square" if len(names) <= _WRITTEN else "dense"


def _likeness(names: Sequence[str], values: Values) -> str:
    others = np.where(np.eye(len(names), dtype=np.bool_), np.nan, values)
    if np.isnan(others).all():
        return ""
    places = (divmod(int(cell), len(names)) for cell in (np.nanargmax(others), np.nanargmin(others)))
    words = [
        f"{what} alike are {names[place[0]]} and {names[place[1]]} ({plain(others[place], 2)})"
        for what, place in zip(("Most", "least"), places, strict=True)
    ]
    return f"{', '.join(words)}."


def most_wrong(counts: Values, most: int = _DRAWN) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the ``most`` classes of a confusion matrix that have most mistakes of both kinds."""
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    return np.sort(np.argsort(-wrong, kind="stable")[:most]).astype(np.int64)


def _mix_ups(counts: Values, names: Sequence[str]) -> str:
    hits, total = float(counts.trace()), float(counts.sum())
    right = f"{count(hits)} of {count(total)} images ({percent(hits / total)}) are classified correctly."
    wrong = counts * ~np.eye(len(names), dtype=np.bool_)
    worst = [divmod(int(cell), len(names)) for cell in np.argsort(-wrong, axis=None, kind="stable")[:3]]
    pairs = [f"{names[a]} for {names[b]} ({count(wrong[a, b])})" for a, b in worst if wrong[a, b]]
    return f"{right} Most often mistaken: {', '.join(pairs)}." if pairs else right


def _rows(names: Sequence[str], values: Values, texts: Sequence[Sequence[str]]) -> tuple[tuple[TableCell, ...], ...]:
    return tuple(
        (TableCell(name), *(TableCell(text, finite(float(value))) for value, text in zip(row, written, strict=True)))
        for name, row, written in zip(names, values, texts, strict=True)
    )


def _confusion_table(names: Sequence[str], counts: Values, metrics: Mapping[str, Any]) -> Table | None:
    if len(names) <= _TABLED:
        texts = [[count(value) for value in row] for row in counts]
        caption = "Images of each true class (rows) by predicted class (columns)"
        return Table(caption, ("True class", *names), _rows(names, counts, texts), sortable=False)
    pairs = metrics.get("confused") or []
    rows = tuple(
        (
            TableCell(str(pair["true"])),
            TableCell(str(pair["predicted"])),
            TableCell(count(pair["count"]), finite(pair["count"])),
        )
        for pair in pairs
    )
    several = int(np.count_nonzero(counts * ~np.eye(len(names), dtype=np.bool_)))
    some = f", the first {len(rows)} of {counted(several, 'pair')}" if len(rows) < several else ""
    caption = f"Classes most often mistaken for one another{some}"
    return Table(caption, ("True class", "Taken for", "Images"), rows) if rows else None
