"""Bokeh plots that follow the page: transparent, as wide as they may be, no toolbar that keeps a finger from scrolling.

Text in a canvas that comes from the document is given as ``PlainText``: what Bokeh takes for TeX makes it load MathJax
from the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

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

from featurepipe.reporting.blocks import shortened
from featurepipe.reporting.palette import INK, QUIET, RULE, Paint, Style

Figure = Any
"""A ``bokeh.plotting.figure``, whose annotations do not know all that its properties accept."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_TICK = 22  # characters of a label under an axis
_SLANTED, _LEVEL = 16, 30  # labels that fit side by side on a phone, and one above the other
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


def name_places(axis: Any, names: Sequence[str], *, slanted: bool = False) -> None:
    """Names the places 0, 1, ... of an axis; where they are many, only some, so that labels stay apart on a phone."""
    every = -(-len(names) // (_SLANTED if slanted else _LEVEL))
    labels = dict(list(enumerate(tick_names(names)))[:: max(every, 1)])
    axis.ticker = FixedTicker(ticks=list(labels))
    axis.major_label_overrides = {place: PlainText(text=text) for place, text in labels.items()}
    axis.major_tick_line_color = None
    if slanted:
        axis.major_label_orientation = 0.9 if max(map(len, labels.values()), default=0) <= 14 else 1.25  # stays inside


def tick_names(names: Sequence[str]) -> list[str]:
    """Names short enough for an axis; they are numbered where they could no longer be told apart.

    Example:
        >>> tick_names(["conv1", "features.stage.1.block.conv", "features.stage.2.block.conv"])
        ['1 conv1', '2 features.…ock.conv', '3 features.…ock.conv']
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
