"""How well something is found or estimated, as plots: one class that is looked for, several labels, a number.

Of one class: rates at the threshold, curves with their bands, the reliability diagram; of several labels the precision-recall
curves of some; of a number predictions and residuals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bokeh.models import ColumnDataSource, Range1d

from featurepipe.reporting.blocks import (
    ACCENT,
    INK,
    QUIET,
    Block,
    Exhibit,
    Figures,
    Key,
    Paint,
    Panel,
    Prose,
    Section,
    Style,
    Table,
    TableCell,
    bounded,
    count,
    finite,
    interval,
    percent,
    plain,
    series,
)
from featurepipe.reporting.charts import Figure, blank, draw_points, draw_series, hover, label_axis

Document = Mapping[str, Any]

_CURVE = Style(ACCENT)
_MARK = Style(INK, "diamond", None)
_BINS = Style(ACCENT, "circle", None)
_CHANCE = Style(QUIET, None, "dashed")
_HEIGHT = 380
_RATES = {
    "sensitivity": "Sensitivity (recall)",
    "specificity": "Specificity",
    "ppv": "PPV (precision)",
    "npv": "NPV",
    "auc": "Area under the ROC curve",
    "average_precision": "Average precision",
}


def screening(metrics: Document, paint: Paint) -> Section | None:
    """How well one of two classes is found; None without such a measurement."""
    found = metrics.get("screening") or {}
    if not found:
        return None
    name = str(found.get("positive", ""))
    blocks: list[Block | None] = [
        Prose((_sentence(found, name),)),
        _figures(found),
        _curves(found, paint),
        _reliability(found, name, paint),
        _rates(found),
    ]
    return Section("screening", f"Looking for {name}", [block for block in blocks if block])


def _sentence(found: Document, name: str) -> str:
    where = (
        "the threshold that was chosen on validation images when the head was trained"
        if found.get("chosen")
        else "where it is the more probable of the two classes; no threshold was chosen"
    )
    hits, missed = found.get("true_positives"), found.get("false_negatives")
    alarms = found.get("false_positives")
    return (
        f"An image is called {name} from a probability of {_probability(found.get('threshold'))} on: {where}. Of "
        f"{count(found.get('positives'))} images that are {name}, {count(hits)} are found and {count(missed)} missed; "
        f"{count(alarms)} others are called so, too."
    )


def _probability(value: Any) -> str:
    number = finite(value)
    return plain(number) if number is None or number >= 0.01 else f"{number:.3g}"


def _figures(found: Document) -> Figures:
    items = []
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        one = found.get(name) or {}
        bounds = interval(one.get("low"), one.get("high"))
        items.append((_RATES[name], percent(one.get("value")), bounds or str(one.get("reason", ""))))
    return Figures(tuple(items))


def _rates(found: Document) -> Table:
    rows = []
    for name, words in _RATES.items():
        one = found.get(name) or {}
        if one:
            cell = bounded(one.get("value"), one.get("low"), one.get("high"))
            images = TableCell(count(one["images"]), finite(one["images"])) if "images" in one else TableCell("")
            rows.append((TableCell(words), TableCell(cell.text, cell.order), TableCell(cell.note), images))
    header = ("Measure", "Value", "95\u00a0% interval", "Images")
    return Table("Rates at the threshold, and areas", header, tuple(rows), sortable=False)


def _curves(found: Document, paint: Paint) -> Exhibit | None:
    roc, precision = found.get("roc") or {}, found.get("precision_recall") or {}
    if not roc.get("x") or not precision.get("x"):
        return None
    share = (found.get("positives") or 0) / max(1, found.get("images") or 1)
    rates = {name: (found.get(name) or {}).get("value") for name in ("sensitivity", "specificity", "ppv")}
    at = {
        "roc": (None if rates["specificity"] is None else 1 - rates["specificity"], rates["sensitivity"]),
        "precision_recall": (rates["sensitivity"], rates["ppv"]),
    }
    drawn: list[tuple[Figure, list[Any], list[Any], list[Any]]] = []
    for name, curve, axes, chance in (
        ("roc", roc, ("false-positive rate (1 less specificity)", "recall (sensitivity)"), ([0.0, 1.0], [0.0, 1.0])),
        ("precision_recall", precision, ("recall (sensitivity)", "precision (PPV)"), ([0.0, 1.0], [share, share])),
    ):
        drawn.append(_curve(paint, curve, axes, chance, at[name]))
    titles = ("ROC curve", "Precision over recall")
    panels = [
        Panel(title, plot, "square", _spoken(curve))
        for title, (plot, *_), curve in zip(titles, drawn, (roc, precision), strict=True)
    ]
    groups = ("the curve, with its 95\u00a0% band", "at the threshold", "without any skill")
    styles = (_CURVE, _MARK, _CHANCE)
    keys = [
        Key(words, style, tuple(renderer.id for one in drawn for renderer in one[place]))
        for place, (words, style) in enumerate(zip(groups, styles, strict=True), start=1)
    ]
    areas = [
        f"{_RATES[name][:1].lower()}{_RATES[name][1:]} {percent(one.get('value'))} ({interval(one.get('low'), one.get('high'))})"
        for name in ("auc", "average_precision")
        if (one := found.get(name))
    ]
    return Exhibit(
        "What other thresholds would give",
        f"{', '.join(areas)}."[:1].upper() + f"{', '.join(areas)}."[1:],
        tuple(panels),
        tuple(key for key in keys if key.models),
        _points(roc, precision),
        note="The band holds the curve's height at each single place in 95 of 100 test sets; not the whole curve at once.",
    )


def _curve(
    paint: Paint,
    curve: Document,
    axes: tuple[str, str],
    chance: tuple[list[float], list[float]],
    at: tuple[float | None, float | None],
) -> tuple[Figure, list[Any], list[Any], list[Any]]:
    """A plot, and its renderers: curve and band, the threshold's mark, the line of no skill."""
    plot = _square(paint, axes)
    source = ColumnDataSource({"x": chance[0], "y": chance[1]})
    flat = plot.line("x", "y", source=source, line_width=1.5, line_dash="dashed")
    _quiet(paint, flat, line_color=QUIET)
    band = _band(plot, paint, curve)
    rows = list(zip(*(curve[name] for name in ("x", "y", "low", "high", "thresholds")), strict=True))
    source = ColumnDataSource(
        {
            "x": [row[0] for row in rows],
            "y": [row[1] for row in rows],
            "place": [percent(row[0]) for row in rows],
            "height": [percent(row[1]) for row in rows],
            "limits": [interval(row[2], row[3]) or "none" for row in rows],
            "threshold": [_probability(row[4]) for row in rows],
        }
    )
    line = plot.line("x", "y", source=source, line_width=2)
    _quiet(paint, line, line_color=ACCENT)
    touched = plot.scatter("x", "y", source=source, size=14, fill_alpha=0, line_alpha=0)
    touched.nonselection_glyph = touched.muted_glyph = None
    hover(
        plot, [touched],
        [(axes[0].split(" (")[0], "place"), (axes[1].split(" (")[0], "height"), ("95\u00a0% interval", "limits"),
         ("probability from", "threshold")],
        title="height",
    )  # fmt: skip
    mark = []
    if at[0] is not None and at[1] is not None:
        mark = [draw_points(plot, paint, ColumnDataSource({"x": [at[0]], "y": [at[1]]}), _MARK, size=13)]
    return plot, [band, line, touched], mark, [flat]


def _square(paint: Paint, axes: tuple[str, str]) -> Figure:
    plot = blank(paint, height=_HEIGHT)
    plot.x_range, plot.y_range = Range1d(start=-0.01, end=1.01), Range1d(start=-0.01, end=1.02)
    for axis, words in zip((plot.xaxis[0], plot.yaxis[0]), axes, strict=True):
        label_axis(axis, words, shares=True)
    return plot


def _band(plot: Figure, paint: Paint, curve: Document) -> Any:
    known = [row for row in zip(curve["x"], curve["low"], curve["high"], strict=True) if finite(row[1]) is not None]
    source = ColumnDataSource({name: [row[k] for row in known] for k, name in enumerate(("x", "low", "high"))})
    band = plot.varea("x", "low", "high", source=source, fill_alpha=0.2)
    _quiet(paint, band, fill_color=ACCENT)
    return band


def _quiet(paint: Paint, renderer: Any, **colours: Any) -> None:
    renderer.nonselection_glyph = None
    renderer.muted_glyph = None
    paint.set(renderer.glyph, **colours)


def _spoken(curve: Document) -> str:
    places = [int(k * (len(curve["x"]) - 1) / 4) for k in range(5)]
    return ", ".join(f"{percent(curve['y'][k])} at {percent(curve['x'][k])}" for k in places)


_TABLED = 20


def _points(roc: Document, precision: Document) -> Table:
    """Some points of both curves, which have the same thresholds where they were thinned alike."""
    at = {t: k for k, t in enumerate(precision["thresholds"]) if t is not None}
    shared = [k for k, t in enumerate(roc["thresholds"]) if t in at]
    kept = [shared[int(k * (len(shared) - 1) / max(1, _TABLED - 1))] for k in range(min(_TABLED, len(shared)))]
    rows = []
    for k in kept:
        other = at[roc["thresholds"][k]]
        rows.append(
            (
                TableCell(_probability(roc["thresholds"][k]), roc["thresholds"][k]),
                bounded(roc["y"][k], roc["low"][k], roc["high"][k]),
                TableCell(percent(1 - roc["x"][k]), 1 - roc["x"][k]),
                bounded(precision["y"][other], precision["low"][other], precision["high"][other]),
            )
        )
    header = ("Probability from", "Recall", "Specificity", "Precision")
    return Table("Points of the curves", header, tuple(rows))


def _reliability(found: Document, name: str, paint: Paint) -> Exhibit | None:
    bins = found.get("reliability") or []
    if len(bins) < 2:
        return None
    plot = _square(paint, (f"probability of {name}", f"share that is {name}"))
    source = ColumnDataSource({"x": [0, 1], "y": [0, 1]})
    ideal = plot.line("x", "y", source=source, line_width=1.5, line_dash="dashed")
    _quiet(paint, ideal, line_color=QUIET)
    source = ColumnDataSource(
        {
            "x": [one["probability"] for one in bins],
            "y": [one["observed"] for one in bins],
            "low": [one["low"] for one in bins],
            "high": [one["high"] for one in bins],
            "words": [f"{percent(one['observed'])} of {count(one['images'])} images" for one in bins],
            "mean": [percent(one["probability"]) for one in bins],
            "limits": [interval(one["low"], one["high"]) for one in bins],
        }
    )
    renderers, points = draw_series(plot, paint, source, _BINS)
    hover(plot, [points], [("mean probability", "mean"), ("95\u00a0% interval", "limits")], title="words")
    threshold = finite(found.get("threshold"))
    if threshold is not None:
        source = ColumnDataSource({"x": [threshold] * 2, "y": [0, 1]})
        _quiet(paint, plot.line("x", "y", source=source, line_width=1.5, line_dash="dotted"), line_color=INK)
    off = sum(not one["low"] <= one["probability"] <= one["high"] for one in bins)
    rows = tuple(
        (
            TableCell(f"{_probability(one['from'])} to {_probability(one['to'])}", one["from"]),
            TableCell(percent(one["probability"]), one["probability"]),
            bounded(one["observed"], one["low"], one["high"]),
            TableCell(count(one["images"]), one["images"]),
        )
        for one in bins
    )
    header = ("Probability", "Mean", f"Share that is {name}", "Images")
    return Exhibit(
        "Can the probabilities be relied on?",
        f"Of {len(bins)} bins of about equally many images, {len(bins) - off} hold their mean probability within the 95\u00a0% "
        f"interval of the share that is {name}.",
        (Panel("Reliability", plot, "square"),),
        (
            Key("bins of images", _BINS, tuple(renderer.id for renderer in renderers)),
            Key("probabilities that are right", _CHANCE, (ideal.id,)),
        ),
        Table("Bins", header, rows, sortable=False),
        note="The dotted line is the threshold." if threshold is not None else "",
    )


def precision_curves(metrics: Document, paint: Paint) -> Exhibit | None:
    """Precision over recall of some labels, those of the worst, middle and best average precision."""
    curves = metrics.get("curves") or []
    if not curves:
        return None
    plot, keys, points = _square(paint, ("recall", "precision")), [], []
    for place, curve in enumerate(curves):
        style = series(place)
        source = ColumnDataSource(
            {
                "x": curve["recall"],
                "y": curve["precision"],
                "label": [str(curve["label"])] * len(curve["recall"]),
                "recall": [percent(value) for value in curve["recall"]],
                "precision": [percent(value) for value in curve["precision"]],
            }
        )
        line = plot.line("x", "y", source=source, line_width=2)
        _quiet(paint, line, line_color=style.colour)
        some = ColumnDataSource({name: values[:: max(1, len(values) // 8)] for name, values in source.data.items()})
        marks = draw_points(plot, paint, some, style, size=9)
        touched = plot.scatter("x", "y", source=source, size=14, fill_alpha=0, line_alpha=0)
        touched.nonselection_glyph = touched.muted_glyph = None
        points.append(touched)
        said = f"{curve['label']}, AP {percent(curve['ap'])}"
        keys.append(Key(said, style, (line.id, marks.id, touched.id)))
    hover(plot, points, [("recall", "recall"), ("precision", "precision")], title="label")
    words = "; ".join(
        f"{curve['label']}: average precision {percent(curve['ap'])}, {count(curve['positive'])} of {count(curve['images'])} "
        "images have it"
        for curve in curves
    )
    measured = len(metrics.get("per_label") or []) - len(metrics.get("unmeasured") or [])
    which = (
        "all labels"
        if len(curves) == measured
        else f"{len(curves)} of {count(measured)} labels, from the worst to the best"
    )
    rows = tuple(
        (
            TableCell(str(curve["label"])),
            *(_precision_at(curve, recall) for recall in _RECALLS),
        )
        for curve in curves
    )
    header = ("Label", *(f"at recall {percent(recall, 0)}" for recall in _RECALLS))
    return Exhibit(
        f"Precision over recall of {which}",
        f"{words}.",
        (Panel("Precision over recall", plot, "square"),),
        tuple(keys),
        Table("Best precision of each label", header, rows, sortable=False),
        note="A threshold for each label picks a point of its curve.",
    )


_RECALLS = (0.25, 0.5, 0.75, 0.9, 1.0)


def _precision_at(curve: Document, recall: float) -> TableCell:
    """The best precision with at least a recall."""
    pairs = zip(curve["recall"], curve["precision"], strict=True)
    best = max((precision for reached, precision in pairs if reached >= recall - 1e-12), default=None)
    return TableCell(percent(best), best)


_DOTS = Style(ACCENT, "circle", None, filled=False)
_BOUNDS = Style(QUIET, None, "dashed")


def number_plots(metrics: Document, paint: Paint) -> list[Block]:
    """Predicted against true numbers, and what is left of each, with the limits of the prediction intervals."""
    sample = metrics.get("sample") or {}
    true, predicted = sample.get("true") or [], sample.get("predicted") or []
    if not true:
        return []
    rest = [guess - number for guess, number in zip(predicted, true, strict=True)]
    low, high = min(true), max(true)
    half = finite(metrics.get("half_width"))
    words = {"true": [plain(value) for value in true], "predicted": [plain(value) for value in predicted]}
    words["rest"] = [plain(value) for value in rest]
    panels: list[Panel] = []
    dots: list[str] = []
    ideals: list[str] = []
    bounds: list[str] = []
    for title, x, y, slope, axes in (
        ("Predicted against true", true, predicted, 1.0, ("true number", "predicted number")),
        ("Residuals", predicted, rest, 0.0, ("predicted number", "predicted less true")),
    ):
        plot = blank(paint, height=_HEIGHT)
        for axis, text in zip((plot.xaxis[0], plot.yaxis[0]), axes, strict=True):
            label_axis(axis, text)
        left, right = (low, high) if slope else (min(predicted), max(predicted))
        for offset in (0.0, *([-half, half] if half is not None else [])):
            ends = ColumnDataSource({"x": [left, right], "y": [slope * left + offset, slope * right + offset]})
            line = plot.line("x", "y", source=ends, line_width=1.5, line_dash="dashed" if offset else "solid")
            _quiet(paint, line, line_color=QUIET)
            (bounds if offset else ideals).append(line.id)
        marks = draw_points(plot, paint, ColumnDataSource({"x": x, "y": y, **words}), _DOTS, size=7)
        hover(plot, [marks], [("true", "true"), ("predicted", "predicted"), ("difference", "rest")], title="predicted")
        dots.append(marks.id)
        panels.append(Panel(title, plot, "square", f"{title} of {count(len(true))} images."))
    keys = [Key("images", _DOTS, tuple(dots)), Key("right", replace(_BOUNDS, dash="solid"), tuple(ideals))]
    keys += [Key("limits of the prediction interval", _BOUNDS, tuple(bounds))] if bounds else []
    total = metrics.get("images") or len(true)
    drawn = (
        f"All {count(total)} images"
        if total == len(true)
        else f"{count(len(true))} of {count(total)} images, drawn at random"
    )
    mean = sum(rest) / len(rest)
    summary = f"{drawn}. On average predictions are {plain(abs(mean))} too {'high' if mean > 0 else 'low'}."
    inside = metrics.get("coverage")
    if inside:
        summary += f" {percent(inside.get('value'))} of all true numbers lie within the limits."
    return [Exhibit("Predicted and true numbers", summary, tuple(panels), tuple(keys))]
