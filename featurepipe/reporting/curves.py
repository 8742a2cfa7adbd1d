"""Accuracy over depth: a line for each head, with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bokeh.models import ColumnDataSource, DataRange1d

from featurepipe.reporting.blocks import (
    Cell,
    Exhibit,
    Key,
    Panel,
    Table,
    bounded,
    count,
    finite,
    interval,
    milliseconds,
    percent,
)
from featurepipe.reporting.charts import blank, draw_points, draw_series, hover, label_axis, name_places
from featurepipe.reporting.palette import INK, Paint, Style, series

Results = Sequence[Mapping[str, Any]]

_NETWORKS = {"pretrained": "", "random": ", random weights"}
_PANELS = {"source": "Same data", "shifted": "Shifted data"}
_RING = Style(INK, "circle", None, filled=False)
_APART = 0.07  # between the heads' points of one node, whose intervals would cover one another

LINES = (("head", "head"), ("accuracy", "accuracy"), ("95\u00a0% interval", "interval"), ("measured", "cells"))
"""What every tooltip of a measured accuracy says, and the column of the data that has it."""


def depth_curves(document: Mapping[str, Any], paint: Paint) -> Exhibit | None:
    """One line for each head with 95 % intervals, dashed for random weights; shifted data have a panel of their own."""
    columns = [str(column["column"]) for column in document.get("columns") or []]
    results = [row for row in document.get("results") or [] if row["column"] in columns and finite(row.get("accuracy"))]
    if not results:
        return None
    heads = list(dict.fromkeys(str(row["head"]) for row in results))
    networks = [network for network in _NETWORKS if any(row["network"] == network for row in results)]
    drawn: dict[tuple[str, str], list[str]] = {(head, net): [] for head in heads for net in networks}
    panels, y_range = [], DataRange1d(only_visible=True, range_padding=0.08)
    for tested_on, title in _PANELS.items():
        rows = [row for row in results if row.get("tested_on", "source") == tested_on]
        if rows:
            panels.append(Panel(_panel_title(document, title), _panel(paint, columns, rows, heads, drawn, y_range)))
    keys = [
        Key(f"{head}{_NETWORKS[net]}", head_style(heads, head, net), tuple(ids))
        for (head, net), ids in drawn.items()
        if ids
    ]
    best = recommended(document, results)
    ring = [] if best is None else [draw_ring(panels[0].plot, paint, best, _places(columns, heads, best["head"]))]
    return Exhibit(
        "Accuracy over depth",
        _summary(columns, results, heads),
        tuple(panels),
        (*keys, *ring_key(ring)),
        _table(columns, results),
        note="Nodes in the order in which the network computes them. Bars are 95\u00a0% intervals.",
    )


def is_main(row: Mapping[str, Any]) -> bool:
    """Whether a result is one of the network as given, on the data it was asked about."""
    measured = finite(row.get("accuracy")) is not None
    return measured and row.get("network") == "pretrained" and row.get("tested_on", "source") == "source"


def head_style(heads: Sequence[str], head: str, network: str) -> Style:
    """How a head is drawn, the same in every plot; dashed and hollow with random weights."""
    style = series(heads.index(head))
    return style if network == "pretrained" else replace(style, dash="dashed", filled=False)


def _panel_title(document: Mapping[str, Any], title: str) -> str:
    name = document.get("dataset" if title == _PANELS["source"] else "test_dataset")
    return f"{title}: {name}" if name else title


def _panel(
    paint: Paint,
    columns: Sequence[str],
    rows: Results,
    heads: Sequence[str],
    drawn: dict[tuple[str, str], list[str]],
    y_range: DataRange1d,
) -> Any:
    plot = blank(paint, height=430, y_range=y_range)
    name_places(plot.xaxis[0], columns, slanted=True)
    plot.x_range.range_padding = 0.06
    label_axis(plot.yaxis[0], "accuracy", shares=True)
    plot.xgrid[0].visible = False
    markers = []
    for (head, network), ids in drawn.items():
        own = [row for row in rows if row["head"] == head and row["network"] == network]
        if own:
            source = series_source(own, _places(columns, heads, head))
            renderers, points = draw_series(plot, paint, source, head_style(heads, head, network))
            ids.extend(renderer.id for renderer in renderers)
            markers.append(points)
    hover(plot, markers, [*LINES, ("on its training images", "train"), ("parameters", "params")], title="name")
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
            "y": [finite(row["accuracy"]) for row in ordered],
            "low": [_or(row.get("low"), row["accuracy"]) for row in ordered],
            "high": [_or(row.get("high"), row["accuracy"]) for row in ordered],
            "name": [str(row["column"]) for row in ordered],
            "head": [f"{row['head']}{_NETWORKS[row['network']]}" for row in ordered],
            "accuracy": [percent(row["accuracy"], 2) for row in ordered],
            "interval": [interval(row.get("low"), row.get("high")) for row in ordered],
            "train": [percent(row.get("train_accuracy"), 2) for row in ordered],
            "cells": [f"{len(row.get('cells') or [])} times" for row in ordered],
            "params": [_chosen(row.get("params")) for row in ordered],
        }
    )


def _or(value: Any, other: float) -> float:
    number = finite(value)
    return other if number is None else number


def _chosen(params: Any) -> str:
    """The parameters that were chosen in some fold, each once."""
    words = [
        ", ".join(f"{name} {value}" for name, value in chosen.items()) if isinstance(chosen, Mapping) else str(chosen)
        for chosen in params or []
    ]
    return " or ".join(filter(None, dict.fromkeys(words))) or "its defaults"


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


def _summary(columns: Sequence[str], results: Results, heads: Sequence[str]) -> str:
    """The course of each head's curve in words."""
    words = []
    for head in heads:
        own = {row["column"]: row["accuracy"] for row in results if row["head"] == head and is_main(row)}
        if own:
            ordered = [name for name in columns if name in own]
            top = max(ordered, key=lambda name: own[name])
            places = dict.fromkeys([ordered[0], top, ordered[-1]])  # the best may be the first or the last
            course = (f"{'at most ' if name == top else ''}{percent(own[name])} at {name}" for name in places)
            words.append(f"{head}: {', '.join(course)}.")
    for about, rows in (
        ("With random weights", [row for row in results if row["network"] == "random"]),
        (
            "On shifted data",
            [row for row in results if row.get("tested_on") == "shifted" and row["network"] == "pretrained"],
        ),
    ):
        if rows:
            top_row = max(rows, key=lambda row: row["accuracy"])
            words.append(f"{about} at most {percent(top_row['accuracy'])}, {top_row['head']} at {top_row['column']}.")
    return " ".join(words)


def _table(columns: Sequence[str], results: Results) -> Table:
    ordered = sorted(results, key=lambda row: columns.index(row["column"]))
    rows = tuple(
        (
            Cell(str(row["column"]), columns.index(row["column"])),
            Cell(str(row["head"])),
            Cell(str(row["network"])),
            Cell(str(row.get("tested_on", "source"))),
            bounded(row["accuracy"], row.get("low"), row.get("high")),
            Cell(percent(row.get("train_accuracy")), finite(row.get("train_accuracy"))),
            Cell(count(len(row.get("cells") or [])), len(row.get("cells") or [])),
            Cell(_chosen(row.get("params"))),
            Cell(milliseconds(row.get("seconds")), finite(row.get("seconds"))),
        )
        for row in ordered
    )
    header = ("Node", "Head", "Weights", "Tested on", "Accuracy", "Training", "Measured", "Parameters", "Seconds")
    return Table("Every measured accuracy, with its 95\u00a0% interval", header, rows)
