"""Accuracy over depth, over cost and over a score that needs no fitting: a line for each head, with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bokeh.models import ColumnDataSource, DataRange1d

from featurepipe.reporting.blocks import (
    BESIDES,
    INK,
    Exhibit,
    Key,
    MeasureStyle,
    Paint,
    Panel,
    Style,
    Table,
    TableCell,
    count,
    finite,
    measure_of,
    milliseconds,
    percent,
    plain,
    series,
)
from featurepipe.reporting.charts import TWO_LINES, blank, draw_points, draw_series, hover, label_axis, name_places

Results = Sequence[Mapping[str, Any]]

_NETWORKS = {"pretrained": "", "random": ", random weights"}
_SOURCES = {"source": ("dataset", "the same source"), "shifted": ("test_dataset", "the other source")}
"""Where the document has the name of what was tested on, and what that is called without."""
_RING = Style(INK, "circle", None, filled=False)
_APART = 0.07  # between the heads' points of one node, whose intervals would cover one another


def lines(measure: MeasureStyle) -> list[tuple[str, str]]:
    """What every tooltip of a measured value says, and the column of the data that has it."""
    return [("head", "head"), (measure.word, "said"), ("95\u00a0% interval", "interval"), ("measured", "cells")]


def depth_curves(document: Mapping[str, Any], paint: Paint) -> Exhibit | None:
    """A line for each head with 95 % intervals, dashed for random weights; the other source has a panel of its own."""
    columns = [str(column["column"]) for column in document.get("columns") or []]
    known = [row for row in document.get("results") or [] if finite(row.get("value")) is not None]
    results = [row for row in known if row["column"] in columns]
    if not results:
        return None
    heads = list(dict.fromkeys(str(row["head"]) for row in results))
    networks = [network for network in _NETWORKS if any(row["network"] == network for row in results)]
    drawn: dict[tuple[str, str], list[str]] = {(head, net): [] for head in heads for net in networks}
    panels, y_range = [], DataRange1d(only_visible=True, range_padding=0.08)
    for tested_on in _SOURCES:
        rows = [row for row in results if row.get("tested_on", "source") == tested_on]
        if rows:
            title = f"Tested on {_source(document, tested_on)}"
            panels.append(Panel(title, _depth_panel(paint, columns, rows, heads, drawn, y_range)))
    keys = [
        Key(f"{head}{_NETWORKS[net]}", head_style(heads, head, net), tuple(ids))
        for (head, net), ids in drawn.items()
        if ids
    ]
    best = recommended(document, results)
    ring = [] if best is None else [draw_ring(panels[0].plot, paint, best, _places(columns, heads, best["head"]))]
    return Exhibit(
        f"{measure_of(document).title} over depth",
        _depth_summary(document, columns, results, heads),
        tuple(panels),
        (*keys, *ring_key(ring)),
        _table(document, columns, results),
        note="Nodes in the order in which the network computes them. Bars are 95\u00a0% intervals.",
    )


def is_main(row: Mapping[str, Any]) -> bool:
    """Whether a result is one of the network as given, on the data it was asked about."""
    measured = finite(row.get("value")) is not None
    return measured and row.get("network") == "pretrained" and row.get("tested_on", "source") == "source"


def head_style(heads: Sequence[str], head: str, network: str) -> Style:
    """How a head is drawn, the same in every plot; dashed and hollow with random weights."""
    style = series(heads.index(head))
    return style if network == "pretrained" else replace(style, dash="dashed", filled=False)


def _source(document: Mapping[str, Any], tested_on: str) -> str:
    """What heads were tested on, by its name where that is known."""
    field, words = _SOURCES[tested_on]
    return str(document.get(field) or words)


def _depth_panel(
    paint: Paint,
    columns: Sequence[str],
    rows: Results,
    heads: Sequence[str],
    drawn: dict[tuple[str, str], list[str]],
    y_range: DataRange1d,
) -> Any:
    plot = blank(paint, height=430, y_range=y_range)
    name_places(plot.xaxis[0], columns, slanted=True, two_lines=True)
    plot.x_range.range_padding = 0.16 if len(columns) <= TWO_LINES else 0.06  # room beside the first and last name
    measure = measure_of(rows[0])
    label_axis(plot.xaxis[0], "node")
    label_axis(plot.yaxis[0], measure.word, shares=measure.is_share)
    plot.xgrid[0].visible = False
    markers = []
    for (head, network), ids in drawn.items():
        own = [row for row in rows if row["head"] == head and row["network"] == network]
        if own:
            source = series_source(own, _places(columns, heads, head))
            renderers, points = draw_series(plot, paint, source, head_style(heads, head, network))
            ids.extend(renderer.id for renderer in renderers)
            markers.append(points)
    hover(plot, markers, [*lines(measure), ("on its training images", "train"), ("parameters", "params")], title="name")
    return plot


def _places(columns: Sequence[str], heads: Sequence[str], head: str) -> dict[str, float]:
    """Where a head's points are: side by side with those of the other heads."""
    shift = _APART * (heads.index(head) - (len(heads) - 1) / 2)
    return {column: place + shift for place, column in enumerate(columns)}


def series_source(rows: Results, places: Mapping[str, float]) -> ColumnDataSource:
    """A head's accuracies with their intervals, and what their tooltips say, at the place of each column."""
    ordered = sorted(rows, key=lambda row: places[row["column"]])
    return ColumnDataSource(
        {
            "x": [places[row["column"]] for row in ordered],
            "y": [finite(row["value"]) for row in ordered],
            "low": [_or(row.get("low"), row["value"]) for row in ordered],
            "high": [_or(row.get("high"), row["value"]) for row in ordered],
            "name": [str(row["column"]) for row in ordered],
            "head": [f"{row['head']}{_NETWORKS[row['network']]}" for row in ordered],
            "said": [measure_of(row).text(row["value"], 2) for row in ordered],
            "interval": [measure_of(row).interval(row.get("low"), row.get("high")) for row in ordered],
            "train": [measure_of(row).text(row.get("train_value"), 2) for row in ordered],
            "cells": [f"{len(row.get('cells') or [])} times" for row in ordered],
            "params": [_chosen(row.get("params")) for row in ordered],
        }
    )


def _or(value: Any, other: float) -> float:
    number = finite(value)
    return other if number is None else number


def _chosen(params: Any) -> str:
    """The parameters that were chosen in some fold, each once."""
    words = [parameters(chosen) if isinstance(chosen, Mapping) else str(chosen) for chosen in params or []]
    return " or ".join(filter(None, dict.fromkeys(words))) or "its defaults"


def parameters(values: Mapping[str, Any]) -> str:
    """Parameters of a head with their values, on one line.

    Example:
        >>> parameters({"C": 100.0, "best_epoch": 3, "kernel": "rbf"})
        'C 100, best epoch 3, kernel rbf'
    """
    told = {
        name.replace("_", " "): f"{value:g}" if isinstance(value, float) else value for name, value in values.items()
    }
    return ", ".join(f"{name} {value}" for name, value in told.items())


def recommended(document: Mapping[str, Any], results: Results) -> Mapping[str, Any] | None:
    """The result of the recommended column and head."""
    best = document.get("recommended") or {}
    wanted = (best.get("column"), best.get("head"))
    return next((row for row in results if is_main(row) and (row["column"], row["head"]) == wanted), None)


def draw_ring(plot: Any, paint: Paint, row: Mapping[str, Any], places: Mapping[str, float]) -> Any:
    """Draws a ring around a point."""
    return draw_points(plot, paint, series_source([row], places), _RING, size=22)


def ring_key(rings: Sequence[Any]) -> list[Key]:
    """Says what the rings mean, where there are any."""
    return [Key("recommended", _RING, tuple(ring.id for ring in rings))] if rings else []


def _depth_summary(document: Mapping[str, Any], columns: Sequence[str], results: Results, heads: Sequence[str]) -> str:
    """The course of each head's curve in words."""
    words, measure = [], measure_of(results[0])
    for head in heads:
        own = {row["column"]: row["value"] for row in results if row["head"] == head and is_main(row)}
        if own:
            ordered = [name for name in columns if name in own]
            top = max(ordered, key=lambda name: own[name])
            places = dict.fromkeys([ordered[0], top, ordered[-1]])  # the best may be the first or the last
            course = (f"{'at most ' if name == top else ''}{measure.text(own[name])} at {name}" for name in places)
            words.append(f"{head}: {', '.join(course)}.")
    for about, rows in (
        ("With random weights", [row for row in results if row["network"] == "random"]),
        (
            f"On {_source(document, 'shifted')}",
            [row for row in results if row.get("tested_on") == "shifted" and row["network"] == "pretrained"],
        ),
    ):
        if rows:
            top_row = max(rows, key=lambda row: row["value"])
            words.append(f"{about} at most {measure.text(top_row['value'])}, {top_row['head']} at {top_row['column']}.")
    return "\n".join(words)


def _table(document: Mapping[str, Any], columns: Sequence[str], results: Results) -> Table:
    measure = measure_of(results[0])
    ordered = sorted(results, key=lambda row: columns.index(row["column"]))
    besides = [name for name in BESIDES if any(name in row for row in results)]
    rows = tuple(
        (
            TableCell(str(row["column"]), columns.index(row["column"])),
            TableCell(str(row["head"])),
            TableCell(str(row["network"])),
            TableCell(_source(document, row.get("tested_on", "source"))),
            measure.cell(row["value"], row.get("low"), row.get("high")),
            measure.cell(row.get("train_value")),
            *(TableCell(plain(row.get(name)), finite(row.get(name))) for name in besides),
            TableCell(count(len(row.get("cells") or [])), len(row.get("cells") or [])),
            TableCell(_chosen(row.get("params"))),
            TableCell(milliseconds(row.get("seconds")), finite(row.get("seconds"))),
        )
        for row in ordered
    )
    more = (BESIDES[name] for name in besides)
    header = (
        "Node",
        "Head",
        "Weights",
        "Tested on",
        measure.title,
        "Training",
        *more,
        "Measured",
        "Parameters",
        "Seconds",
    )
    return Table(f"Every measured {measure.word}, with its 95\u00a0% interval", header, rows)


_COSTS = {"cost": "Share of the operations", "ms_per_image": "Milliseconds per image"}


def cost_curves(document: Mapping[str, Any], paint: Paint) -> Exhibit | None:
    """A line for each head over the share of the forward up to a node, and over the time that takes; one is shown."""
    results = [row for row in document.get("results") or [] if is_main(row)]
    heads = list(dict.fromkeys(str(row["head"]) for row in results))
    drawn: dict[str, list[str]] = {head: [] for head in heads}
    panels, rings = [], []
    for field, title in _COSTS.items():
        known = {str(node["column"]): finite(node.get(field)) for node in document.get("columns") or []}
        costs = {column: cost for column, cost in known.items() if cost is not None}
        rows = [row for row in results if row["column"] in costs]
        if len({costs[row["column"]] for row in rows}) > 1:
            plot = _cost_panel(paint, title, rows, heads, costs, drawn)
            best = recommended(document, rows)
            rings += [] if best is None else [draw_ring(plot, paint, best, costs)]
            panels.append(Panel(title, plot, spoken=_costs_spoken(title, rows, costs)))
    if not panels:
        return None
    keys = [
        Key(head, replace(head_style(heads, head, "pretrained"), dash=None), tuple(ids)) for head, ids in drawn.items()
    ]
    return Exhibit(
        f"{measure_of(document).title} over cost",
        _cost_summary(results, heads, document.get("columns") or []),
        tuple(panels),
        (*keys, *ring_key(rings)),
        chosen=True,
        note="What a network costs up to a node, not the head. The table of all nodes has these numbers.",
    )


def _cost_panel(
    paint: Paint,
    title: str,
    rows: Results,
    heads: Sequence[str],
    costs: Mapping[str, float],
    drawn: dict[str, list[str]],
) -> Any:
    plot = blank(paint, height=400)
    label_axis(plot.xaxis[0], title.lower(), shares=title == _COSTS["cost"])
    measure = measure_of(rows[0])
    label_axis(plot.yaxis[0], measure.word, shares=measure.is_share)
    markers = []
    for head in heads:
        own = [row for row in rows if row["head"] == head]
        source = series_source(own, costs)
        source.data["cost"] = [_said(title, cost) for cost in source.data["x"]]
        renderers, points = draw_series(plot, paint, source, head_style(heads, head, "pretrained"))
        drawn[head].extend(renderer.id for renderer in renderers)
        markers.append(points)
    hover(plot, markers, [*lines(measure), (title.lower(), "cost")], title="name")
    return plot


def _said(title: str, cost: float) -> str:
    return percent(cost, 0) if title == _COSTS["cost"] else f"{milliseconds(cost)} ms"


def _costs_spoken(title: str, rows: Results, costs: Mapping[str, float]) -> str:
    """Every point in words."""
    ordered = sorted(rows, key=lambda row: costs[row["column"]])
    points = (
        f"{row['column']}, {row['head']}: {measure_of(row).text(row['value'])} at {_said(title, costs[row['column']])}"
        for row in ordered
    )
    return f"{title}. {'; '.join(points)}."


def _cost_summary(results: Results, heads: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> str:
    """What half of the operations buy, for each head; where only times are known, what the best costs."""
    costs = {str(node["column"]): finite(node.get("cost")) for node in columns}
    if not any(costs.values()):
        times = {str(node["column"]): milliseconds(node.get("ms_per_image")) for node in columns}
        tops = (max((row for row in results if row["head"] == head), key=lambda row: row["value"]) for head in heads)
        return "\n".join(
            f"{top['head']}: {measure_of(top).text(top['value'])} at most, at {times[top['column']]} ms per image."
            for top in tops
        )
    words = []
    for head in heads:
        own = [row for row in results if row["head"] == head]
        half = [row for row in own if (costs.get(row["column"]) or 1.0) <= 0.5]
        if half:
            cheap, top = (max(rows, key=lambda row: row["value"]) for rows in (half, own))
            words.append(
                f"{head}: {measure_of(cheap).text(cheap['value'])} with half of the operations or less ({cheap['column']}), "
                f"{measure_of(top).text(top['value'])} at most ({top['column']})."
            )
    return "\n".join(words) or "The cheaper of two equally accurate nodes lies to the left."


def score_scatter(document: Mapping[str, Any], paint: Paint) -> Exhibit | None:
    """Measured accuracy against the transferability score of each column."""
    found = document.get("transferability") or {}
    scores = {name: value for name, value in (found.get("scores") or {}).items() if finite(value) is not None}
    rows = [row for row in document.get("results") or [] if row["column"] in scores and is_main(row)]
    if not rows:
        return None
    method = str(found.get("method") or "score")
    heads = list(dict.fromkeys(str(row["head"]) for row in rows))
    plot = blank(paint, y_range=DataRange1d(range_padding=0.2))  # room for a number above the uppermost point
    label_axis(plot.xaxis[0], method)
    measure = measure_of(document)
    label_axis(plot.yaxis[0], measure.word, shares=measure.is_share)
    keys, renderers = [], []
    for head in heads:
        own = [row for row in rows if row["head"] == head]
        points = draw_points(plot, paint, _score_source(own, scores), head_style(heads, head, "pretrained"), size=11)
        keys.append(Key(head, replace(head_style(heads, head, "pretrained"), dash=None), (points.id,)))
        renderers.append(points)
    hover(plot, renderers, [("head", "head"), (method, "score"), (measure.word, "said")], title="name")
    numbers = _number_nodes(plot, paint, document, rows, scores)
    return Exhibit(
        f"{method} against measured {measure.word}",
        _rank_words(method, measure, heads, found.get("correlations") or {}),
        (Panel(method, plot, spoken=_scores_spoken(method, rows, scores)),),
        tuple(keys),
        _score_table(method, heads, rows, scores, found.get("correlations") or {}),
        note=f"Nodes are numbered in the order of the network: {numbers}.",
    )


def _number_nodes(
    plot: Any, paint: Paint, document: Mapping[str, Any], rows: Results, scores: Mapping[str, float]
) -> str:
    """Writes each node's number above the best of its points, and returns what the numbers mean."""
    names = [name for name in (str(node["column"]) for node in document.get("columns") or []) if name in scores]
    tops = {name: max((row["value"] for row in rows if row["column"] == name), default=None) for name in names}
    shown = {name: number for number, name in enumerate(names, start=1) if tops[name] is not None}
    source = ColumnDataSource(
        {
            "x": [scores[name] for name in shown],
            "y": [tops[name] for name in shown],
            "number": [str(number) for number in shown.values()],
        }
    )
    text = plot.text(
        "x",
        "y",
        "number",
        source=source,
        y_offset=-9,
        text_align="center",
        text_baseline="bottom",
        text_font_size="12px",
    )
    paint.set(text.glyph, text_color=INK)
    return ", ".join(f"{number}\u00a0{name}" for name, number in shown.items())


def _scores_spoken(method: str, rows: Results, scores: Mapping[str, float]) -> str:
    """Every point in words."""
    ordered = sorted(rows, key=lambda row: scores[row["column"]])
    points = (
        f"{row['column']}, {row['head']}: {method} {plain(scores[row['column']])}, "
        f"{measure_of(row).word} {measure_of(row).text(row['value'])}"
        for row in ordered
    )
    return f"{'; '.join(points)}."


def _score_source(rows: Results, scores: Mapping[str, float]) -> ColumnDataSource:
    return ColumnDataSource(
        {
            "x": [scores[row["column"]] for row in rows],
            "y": [row["value"] for row in rows],
            "name": [str(row["column"]) for row in rows],
            "head": [str(row["head"]) for row in rows],
            "score": [plain(scores[row["column"]]) for row in rows],
            "said": [measure_of(row).text(row["value"], 2) for row in rows],
        }
    )


def _rank_words(method: str, measure: MeasureStyle, heads: Sequence[str], correlations: Mapping[str, Any]) -> str:
    words = [
        f"{head}: Spearman {plain(correlations[head].get('spearman'), 2)}, Kendall {plain(correlations[head].get('kendall'), 2)}"
        for head in heads
        if correlations.get(head)
    ]
    tail = f" Rank correlation with the measured {measure.word}: {'; '.join(words)}." if words else ""
    return f"{method} is computed from features and labels, without fitting a head.{tail}"


def _score_table(
    method: str, heads: Sequence[str], rows: Results, scores: Mapping[str, float], correlations: Mapping[str, Any]
) -> Table:
    measure = measure_of(rows[0])
    values = {(row["column"], row["head"]): row["value"] for row in rows}
    body = [
        (
            TableCell(str(name)),
            TableCell(plain(scores[name]), scores[name]),
            *(measure.cell(values.get((name, head))) for head in heads),
        )
        for name in scores
    ]
    for kind in ("spearman", "kendall") if correlations else ():
        ranks = [(correlations.get(head) or {}).get(kind) for head in heads]
        body.append(
            (
                TableCell(f"rank correlation ({kind})"),
                TableCell(""),
                *(TableCell(plain(value), None) for value in ranks),
            )
        )
    return Table(f"{method} and {measure.word} of each node", ("Node", method, *heads), tuple(body), sortable=False)
