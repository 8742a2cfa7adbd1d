"""Figures over nights: strips, one small plot of bars for each figure, and lines for drift and predicted classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

from bokeh.models import ColumnDataSource, DataRange1d, FixedTicker, PlainText, Range1d

from featurepipe.display import counted
from featurepipe.progress import spoken
from featurepipe.reporting.blocks import (
    DASH,
    INK,
    QUIET,
    SERIES,
    Exhibit,
    Key,
    Paint,
    Panel,
    Style,
    Table,
    TableCell,
    amount,
    count,
    finite,
    percent,
    plain,
    series,
)
from featurepipe.reporting.charts import blank, draw_bars, draw_line, draw_points, hover, label_axis
from featurepipe.reporting.night_outcomes import Night, is_good

STARTED = "Started (UTC)"
"""The column of tables that says which run a row is of."""
_HEIGHT = 150
_STRIP_TICKS = 2
_BESIDE = 0.4  # of the way to the next run: where a bar ends
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
        else " A cross marks a run that failed, was killed or stopped, or ran out of time."
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


def name_nights(plot: Any, nights: Sequence[Night], most: int = _STRIP_TICKS) -> None:
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
            "x": [k - _BESIDE if k > len(figure.values) / 2 else k + _BESIDE for k, _ in tall],
            "y": [1.19 * top] * len(tall),
            "text": [f"\N{UPWARDS ARROW}\u00a0{figure.text(value)}" for _, value in tall],
            "align": ["right" if k > len(figure.values) / 2 else "left" for k, _ in tall],
            "offset": [-3 if k > len(figure.values) / 2 else 3 for k, _ in tall],
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
    return f"{last} in the last of {counted(len(known), 'run')}, median {middle}, {most}"


def _table(title: str, nights: Sequence[Night], found: Sequence[Figure]) -> Table:
    rows = tuple(
        (
            TableCell(night_name(night), place),
            *(
                TableCell(
                    DASH if figure.values[place] is None else figure.text(figure.values[place]), figure.values[place]
                )
                for figure in found
            ),
        )
        for place, night in reversed(list(enumerate(nights)))
    )
    return Table(f"{title}, run by run", (STARTED, *(figure.name for figure in found)), rows, unbroken=True)


_LEAST = 1e-9  # a p-value of 0 has no place on a logarithmic axis
_CLASSES = 8  # lines that can be told apart
_TABLED = 50
_TICKS = 5
_SIZE = 8
_SPREAD = 0.5  # of the way to the next night, which the markers of one night take


def drift_trend(nights: Sequence[Night], paint: Paint) -> Exhibit | None:
    """P-values and effects of every column over nights, with the thresholds of the last run."""
    tests: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for place, night in enumerate(nights):
        for test in (night.get("drift") or {}).get("tests") or ():
            tests.setdefault(str(test["name"]), []).append((place, test))
    if not tests:
        return None
    styles = {name: series(k) for k, name in enumerate(tests)}
    drawn: dict[str, list[str]] = {name: [] for name in tests}
    shares = blank(paint, height=320, y_range=DataRange1d(range_padding=0.15), y_axis="log")
    effects = blank(paint, height=320, y_range=DataRange1d(range_padding=0.1))
    _name_powers(shares.yaxis[0])
    limits = _limits(nights)
    _draw_limits(shares, paint, limits, len(nights))
    for plot, field, label in ((shares, "p", "adjusted p-value"), (effects, "effect", "effect")):
        name_nights(plot, nights, _TICKS)
        label_axis(plot.yaxis[0], label)
        markers = []
        for position, (name, found) in enumerate(tests.items()):
            source = _tests(nights, name, found, field, aside=_aside(position, len(tests)))
            renderers, points = draw_line(plot, paint, source, styles[name], size=_SIZE)
            drawn[name].extend(renderer.id for renderer in renderers)
            markers.append(points)
        lines = [("column", "name"), ("adjusted p-value", "p"), ("effect", "effect"), ("verdict", "verdict")]
        hover(plot, markers, [*lines, ("new images", "images")], title="night")
    words = {name: _drift_words(nights, name, found) for name, found in tests.items()}
    spoken = " ".join(words.values())
    return Exhibit(
        "Drift",
        _drift_summary(nights, tests),
        (Panel("Adjusted p-value", shares, spoken=spoken), Panel("Effect", effects, spoken=spoken)),
        tuple(Key(name, styles[name], tuple(ids)) for name, ids in drawn.items()),
        _drift_table(nights),
        note="A small p-value says that the new images are not like those of before; the effect says how far they are from them, "
        "in standard deviations of the images of before, the share of images that moved to another class, the greatest change of "
        "a label's rate, or how far predicted numbers moved, in their standard deviations."
        f"{_limit_words(limits)}",
    )


def class_trend(nights: Sequence[Night], bundle: str, paint: Paint) -> Exhibit | None:
    """Shares of the classes, or of each of several labels, that a bundle predicted, of each night's predicted images."""
    counts = {k: night["classes"][bundle] for k, night in enumerate(nights) if (night.get("classes") or {}).get(bundle)}
    if not counts:
        return None
    totals = {  # not the sum of the counts, in which an image of several labels is several times
        place: (nights[place].get("predicted") or {}).get(bundle) or sum(found.values())
        for place, found in counts.items()
    }
    shares = {
        name: {place: found.get(name, 0) / totals[place] for place, found in counts.items()}
        for name, _ in sum((Counter(found) for found in counts.values()), Counter()).most_common()
    }
    plot = blank(paint, height=360)
    name_nights(plot, nights, _TICKS)
    label_axis(plot.yaxis[0], "share of the images predicted", shares=True)
    keys, markers = [], []
    for position, name in enumerate(list(shares)[:_CLASSES]):
        style = series(position)
        renderers, points = draw_line(
            plot, paint, _classes(nights, name, shares[name], counts, totals), style, size=_SIZE
        )
        keys.append(Key(name, style, tuple(renderer.id for renderer in renderers)))
        markers.append(points)
    hover(plot, markers, [("", "name"), ("share", "share"), ("images", "images")], title="night")
    left = f" Drawn are the {_CLASSES} most frequent of {len(shares)} classes." if len(shares) > _CLASSES else ""
    table = _class_table(bundle, shares)
    words = "; ".join(f"{row[0].text} {row[1].text}" for row in table.rows[:_CLASSES])
    last = totals[max(totals)]
    images = "1 image" if last == 1 else f"{count(last)} images"
    summary = f"Of the {images} of the last run with predictions: {words}."
    predicted = strip_panel(nights, Figure("images predicted", [totals.get(k) for k in range(len(nights))]), paint)
    note = f"Shares of few images say little: see how many there were.{left}"
    return Exhibit(f"Predicted by {bundle}", summary, (Panel("Shares", plot), predicted), tuple(keys), table, note=note)


def _name_powers(axis: Any) -> None:
    """Ticks 1, 0.1, 0.01, ... as people write them."""
    powers = [10.0**-k for k in range(10)]
    axis.ticker = FixedTicker(ticks=powers)
    axis.major_label_overrides = {power: PlainText(text=f"{power:g}") for power in powers}


def _limits(nights: Sequence[Night]) -> dict[str, float]:
    """Thresholds of the last run that had some."""
    known = [found["thresholds"] for night in nights if (found := night.get("drift")) and found.get("thresholds")]
    return {name: value for name, value in (known[-1] if known else {}).items() if finite(value)}


def _draw_limits(plot: Any, paint: Paint, limits: Mapping[str, float], nights: int) -> None:
    for value in limits.values():
        line = plot.line([-0.7, nights - 0.3], [value, value], line_dash="dotted", line_width=1.5)
        paint.set(line.glyph, line_color=QUIET)


def _limit_words(limits: Mapping[str, float]) -> str:
    if not limits:
        return ""
    does = {"warn": "warns", "fail": "fails the run"}
    return f" Dotted: {'; '.join(f'below {_p(value)} it {does.get(name, name)}' for name, value in limits.items())}."


def _p(value: Any) -> str:
    number = finite(value)
    return DASH if number is None else f"{number:.2g}"


def _aside(position: int, of: int) -> float:
    """How far beside its night a test is drawn: p-values are often equal, and would hide each other."""
    return round(_SPREAD * (position / (of - 1) - 0.5), 3) if of > 1 else 0.0


def _tests(
    nights: Sequence[Night], name: str, found: Sequence[tuple[int, Mapping[str, Any]]], field: str, aside: float
) -> ColumnDataSource:
    known = [(k, test) for k, test in found if finite(test.get(field)) is not None]
    drifts = [nights[k]["drift"] for k, _ in known]
    return ColumnDataSource(
        {
            "x": [k + aside for k, _ in known],
            "y": [max(test[field], _LEAST) if field == "p" else test[field] for _, test in known],
            "night": [night_name(nights[k]) for k, _ in known],
            "name": [name] * len(known),
            "p": [_p(test.get("p")) for _, test in known],
            "effect": [plain(test.get("effect")) for _, test in known],
            "verdict": [str(drift.get("verdict")) for drift in drifts],
            "images": [count((drift.get("images") or {}).get("new")) for drift in drifts],
        }
    )


def _drift_words(nights: Sequence[Night], name: str, found: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    place, least = min(found, key=lambda one: one[1]["p"])
    return f"{name}: {_p(found[-1][1]['p'])} last, at least {_p(least['p'])} on {night_name(nights[place])}."


def _drift_summary(nights: Sequence[Night], tests: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]]) -> str:
    verdicts = Counter(str(night["drift"]["verdict"]) for night in nights if night.get("drift"))
    told = [f"{verdict} on {times}" for verdict, times in verdicts.most_common()]
    without = len(nights) - sum(verdicts.values())
    told += [f"no comparison on {without}"] if without else []
    place, least, name = min(
        ((k, test["p"], name) for name, found in tests.items() for k, test in found), key=lambda one: one[1]
    )
    least_of_all = f"The least p-value was {_p(least)}, {name} on {night_name(nights[place])}."
    return f"Of {counted(len(nights), 'run')}: {', '.join(told)}. {least_of_all}"


def _drift_table(nights: Sequence[Night]) -> Table:
    rows = tuple(
        (
            TableCell(night_name(night), place),
            TableCell(str(test["name"])),
            TableCell(_p(test.get("p")), finite(test.get("p"))),
            TableCell(plain(test.get("effect")), finite(test.get("effect"))),
            TableCell(str(night["drift"]["verdict"])),
            TableCell(", ".join(map(str, test.get("farthest") or test.get("moved") or ())) or DASH),
        )
        for place, night in reversed(list(enumerate(nights)))
        for test in (night.get("drift") or {}).get("tests") or ()
    )
    header = (
        STARTED,
        "Column",
        "Adjusted p-value",
        "Effect",
        "Verdict",
        "Images farthest from those of before, or labels that moved",
    )
    return Table("Every test, newest first", header, rows)


def _classes(
    nights: Sequence[Night],
    name: str,
    shares: Mapping[int, float],
    counts: Mapping[int, Mapping[str, int]],
    totals: Mapping[int, int],
) -> ColumnDataSource:
    return ColumnDataSource(
        {
            "x": list(shares),
            "y": list(shares.values()),
            "night": [night_name(nights[k]) for k in shares],
            "name": [name] * len(shares),
            "share": [percent(value) for value in shares.values()],
            "images": [f"{count(counts[k].get(name, 0))} of {count(totals[k])}" for k in shares],
        }
    )


def _class_table(bundle: str, shares: Mapping[str, Mapping[int, float]]) -> Table:
    rows = []
    for name, found in list(shares.items())[:_TABLED]:
        values = list(found.values())
        four = (values[-1], median(values), min(values), max(values))
        rows.append((TableCell(name), *(TableCell(percent(value), value) for value in four)))
    left = f"; the {_TABLED} most frequent of {len(shares)}" if len(shares) > _TABLED else ""
    header = ("Class", "Last run", "Median", "Least", "Most")
    return Table(f"Shares of the classes predicted by {bundle}{left}", header, tuple(rows))
