"""Lines over nights: drift, and the classes that bundles predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bokeh.models import ColumnDataSource, DataRange1d, FixedTicker, PlainText

from featurepipe.reporting.blocks import DASH, Cell, Exhibit, Key, Panel, Table, count, finite, percent, plain
from featurepipe.reporting.charts import blank, draw_line, hover, label_axis
from featurepipe.reporting.night_outcomes import Night
from featurepipe.reporting.palette import QUIET, Paint, series
from featurepipe.reporting.strips import Figure, name_nights, night_name, strip_panel

_LEAST = 1e-9  # a p-value of 0 has no place on a logarithmic axis
_CLASSES = 8  # lines that can be told apart
_TABLED = 50
_TICKS = 5
_SIZE = 8
_SPREAD = 0.5  # of the way to the next night, which the markers of one night take


def drift_trend(nights: Sequence[Night], paint: Paint) -> Exhibit | None:
    """P-values and effects of every column over nights, with the thresholds of the last night."""
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
        f"in spreads of the images of before, or the share of images that moved to another class.{_limit_words(limits)}",
    )


def class_trend(nights: Sequence[Night], bundle: str, paint: Paint) -> Exhibit | None:
    """Shares of the classes that a bundle predicted, of each night's predicted images."""
    counts = {k: night["classes"][bundle] for k, night in enumerate(nights) if (night.get("classes") or {}).get(bundle)}
    if not counts:
        return None
    totals = {place: sum(found.values()) for place, found in counts.items()}
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
    summary = f"Of the {images} of the last night with predictions: {words}."
    predicted = strip_panel(nights, Figure("images predicted", [totals.get(k) for k in range(len(nights))]), paint)
    note = f"Shares of few images say little: see how many there were.{left}"
    return Exhibit(f"Predicted by {bundle}", summary, (Panel("Shares", plot), predicted), tuple(keys), table, note=note)


def _name_powers(axis: Any) -> None:
    """Ticks 1, 0.1, 0.01, ... as people write them."""
    powers = [10.0**-k for k in range(10)]
    axis.ticker = FixedTicker(ticks=powers)
    axis.major_label_overrides = {power: PlainText(text=f"{power:g}") for power in powers}


def _limits(nights: Sequence[Night]) -> dict[str, float]:
    """Thresholds of the last night that had some."""
    known = [found["thresholds"] for night in nights if (found := night.get("drift")) and found.get("thresholds")]
    return {name: value for name, value in (known[-1] if known else {}).items() if finite(value)}


def _draw_limits(plot: Any, paint: Paint, limits: Mapping[str, float], nights: int) -> None:
    for value in limits.values():
        line = plot.line([-0.7, nights - 0.3], [value, value], line_dash="dotted", line_width=1.5)
        paint.set(line.glyph, line_color=QUIET)


def _limit_words(limits: Mapping[str, float]) -> str:
    if not limits:
        return ""
    does = {"warn": "warns", "fail": "fails the night"}
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
    return f"Of {len(nights)} nights: {', '.join(told)}. {least_of_all}"


def _drift_table(nights: Sequence[Night]) -> Table:
    rows = tuple(
        (
            Cell(night_name(night), place),
            Cell(str(test["name"])),
            Cell(_p(test.get("p")), finite(test.get("p"))),
            Cell(plain(test.get("effect")), finite(test.get("effect"))),
            Cell(str(night["drift"]["verdict"])),
            Cell(", ".join(map(str, test.get("farthest") or ())) or DASH),
        )
        for place, night in reversed(list(enumerate(nights)))
        for test in (night.get("drift") or {}).get("tests") or ()
    )
    header = ("Night", "Column", "Adjusted p-value", "Effect", "Verdict of the night", "Farthest from those of before")
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
        rows.append((Cell(name), *(Cell(percent(value), value) for value in four)))
    left = f"; the {_TABLED} most frequent of {len(shares)}" if len(shares) > _TABLED else ""
    header = ("Class", "Last night", "Middle night", "Least", "Most")
    return Table(f"Shares of the classes predicted by {bundle}{left}", header, tuple(rows))
