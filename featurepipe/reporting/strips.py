"""Strips: one small plot for each figure, a bar a night, on a scale of its own; several stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

from bokeh.models import ColumnDataSource, FixedTicker, PlainText, Range1d

from featurepipe.progress import spoken
from featurepipe.reporting.blocks import DASH, Cell, Exhibit, Panel, Table, amount, count, finite, plain
from featurepipe.reporting.charts import blank, draw_bars, draw_points, hover
from featurepipe.reporting.night_outcomes import Night, is_good
from featurepipe.reporting.palette import INK, SERIES, Paint, Style

_HEIGHT = 150
_TICKS = 2
_TALL = 8  # times the usual height, beyond which a bar is cut off
_MANY = 10  # nights, of which one may be cut off; with fewer there is no usual height
_BARS = Style(SERIES[0], "square", None)
_BAD = Style(SERIES[7], "x", None)


@dataclass(frozen=True)
class Figure:
    """One figure of every night.

    Attributes:
        name: What it is.
        values: Of each night; None where it is not known.
        text: A value as people read it.
    """

    name: str
    values: Sequence[float | None]
    text: Callable[[Any], str] = count

    @property
    def known(self) -> list[float]:
        """The values there are."""
        return [value for value in self.values if value is not None]


def figures(
    nights: Sequence[Night], table: str, names: Mapping[str, str], text: Callable[[Any], str] = count
) -> list[Figure]:
    """Figures of one table of the nights, those that are not nothing on every night.

    Args:
        nights: Oldest first.
        table: Where the values are, such as ``counts`` or ``seconds.steps``.
        names: What each key is called.
        text: A value as people read it.
    """
    rows = [_inside(night, table) for night in nights]
    made = (Figure(name, [finite(row.get(key)) for row in rows], text) for key, name in names.items())
    return [figure for figure in made if any(figure.known)]


def strip_exhibit(
    title: str, summary: str, nights: Sequence[Night], found: Sequence[Figure], paint: Paint, note: str = ""
) -> Exhibit:
    """One strip for each figure; nights that did not end well are crossed on every one.

    Args:
        title: What is shown.
        summary: The same in a sentence or two.
        nights: Oldest first.
        found: At least one figure, all of as many values as there are nights.
        paint: Collects the colours.
        note: How to read it.
    """
    panels = [strip_panel(nights, figure, paint) for figure in found]
    crossed = (
        ""
        if all(map(is_good, nights))
        else " A cross marks a night that failed, was killed or stopped, or ran out of time."
    )
    return Exhibit(title, summary, tuple(panels), table=_table(title, nights, found), note=f"{note}{crossed}".strip())


def night_name(night: Night) -> str:
    """When a night began, as people write it."""
    return str(night.get("started") or night["run_id"])[:16].replace("T", " ")


def strip_panel(nights: Sequence[Night], figure: Figure, paint: Paint) -> Panel:
    """A strip under its name and last value; the figure must be known and more than nothing on some night."""
    return Panel(_headed(figure), _strip(nights, figure, paint), "strip", _words(nights, figure))


def seconds(value: Any) -> str:
    """A duration, with a decimal where it is short; or a dash."""
    number = finite(value)
    if number is None:
        return DASH
    return f"{number:.1f} s" if number < 9.95 else spoken(number)


def rate(value: Any) -> str:
    """Images per second."""
    return f"{plain(value, 1)} img/s"


def stored(value: Any) -> str:
    """Bytes in a fitting unit."""
    return amount(value)


def name_nights(plot: Any, nights: Sequence[Night], most: int = _TICKS) -> None:
    """Writes the dates of some nights under a plot: the first, the last, and some between."""
    last = len(nights) - 1
    places = sorted({round(k * last / max(most - 1, 1)) for k in range(most)})
    names = [night_name(night) for night in nights]
    part = slice(5, 10) if names[0][:10] != names[-1][:10] else slice(11, 16)  # the day, or the time of day
    plot.x_range = Range1d(start=-0.7, end=last + 0.7)
    plot.xaxis[0].ticker = FixedTicker(ticks=places)
    plot.xaxis[0].major_label_overrides = {k: PlainText(text=names[k][part]) for k in places}
    plot.xgrid[0].visible = False


def _inside(night: Night, table: str) -> Mapping[str, Any]:
    found: Any = night
    for name in table.split("."):
        found = (found or {}).get(name) or {}
    return dict(found)


def _headed(figure: Figure) -> str:
    last = next((value for value in reversed(figure.values) if value is not None), None)
    return figure.name if last is None else f"{figure.name}: {figure.text(last)}"


def _strip(nights: Sequence[Night], figure: Figure, paint: Paint) -> Any:
    top = _scale(figure.known)
    plot = blank(paint, height=_HEIGHT, least_width=100, y_range=Range1d(start=-0.09 * top, end=1.2 * top))
    name_nights(plot, nights)
    plot.yaxis[0].ticker = FixedTicker(ticks=[0.0, top])
    plot.yaxis[0].major_label_overrides = {0.0: "0", top: PlainText(text=figure.text(top))}
    places = [k for k, value in enumerate(figure.values) if value is not None]
    bars = draw_bars(plot, paint, _source(nights, figure, places), _BARS)
    _point_at_tall(plot, paint, figure, top)
    bad = [k for k, night in enumerate(nights) if not is_good(night)]
    source = _source(nights, figure, bad)
    source.data["y"] = [0.0] * len(bad)
    marks = draw_points(plot, paint, source, _BAD, size=9)
    hover(plot, [bars, marks], [(figure.name, "text"), ("ended", "status"), ("", "reason")], title="night", column=True)
    return plot


def _scale(known: Sequence[float]) -> float:
    """The height of a strip: of its highest bar, but for one that would leave many others flat, as a first night's.

    Two would have labels that lie on each other.
    """
    usual = median([value for value in known if value > 0])
    near = [value for value in known if value <= _TALL * usual]
    return max(near) if len(known) >= _MANY and len(known) - len(near) == 1 else max(known)


def _point_at_tall(plot: Any, paint: Paint, figure: Figure, top: float) -> None:
    """Says how high the bars are that end beyond the strip."""
    tall = [(k, value) for k, value in enumerate(figure.values) if value is not None and value > 1.2 * top]
    source = ColumnDataSource(
        {
            "x": [k for k, _ in tall],
            "y": [1.19 * top] * len(tall),
            "text": [f"\N{UPWARDS ARROW}\u00a0{figure.text(value)}" for _, value in tall],
            "align": ["right" if k > len(figure.values) / 2 else "left" for k, _ in tall],
            "offset": [-6 if k > len(figure.values) / 2 else 6 for k, _ in tall],
        }
    )
    label = plot.text(
        "x",
        "y",
        "text",
        source=source,
        x_offset="offset",
        text_align="align",
        text_baseline="top",
        text_font_size="11px",
    )
    paint.set(label.glyph, text_color=INK)


def _source(nights: Sequence[Night], figure: Figure, places: Sequence[int]) -> ColumnDataSource:
    chosen = [nights[k] for k in places]
    return ColumnDataSource(
        {
            "x": list(places),
            "y": [figure.values[k] or 0.0 for k in places],
            "night": [night_name(night) for night in chosen],
            "text": [DASH if figure.values[k] is None else figure.text(figure.values[k]) for k in places],
            "status": [str(night.get("status")) for night in chosen],
            "reason": ["; ".join(night.get("reasons") or ())[:200] for night in chosen],
        }
    )


def _words(nights: Sequence[Night], figure: Figure) -> str:
    """The course of a figure, for those who do not see it."""
    known = [(value, night) for value, night in zip(figure.values, nights, strict=True) if value is not None]
    top, when = max(known, key=lambda one: one[0])
    last, middle = figure.text(known[-1][0]), figure.text(median_low(figure.known))
    most = f"at most {figure.text(top)} on {night_name(when)}"
    return f"{last} in the last of {len(known)} nights, {middle} in the middle one, {most}"


def _table(title: str, nights: Sequence[Night], found: Sequence[Figure]) -> Table:
    rows = tuple(
        (
            Cell(night_name(night), place),
            *(
                Cell(DASH if figure.values[place] is None else figure.text(figure.values[place]), figure.values[place])
                for figure in found
            ),
        )
        for place, night in reversed(list(enumerate(nights)))
    )
    return Table(f"{title}, night by night", ("Night", *(figure.name for figure in found)), rows, unbroken=True)
