"""Accuracy over what it costs: the same points as over depth, at their share of the operations or their milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from featurepipe.reporting.blocks import Exhibit, Key, Panel, finite, milliseconds, percent
from featurepipe.reporting.charts import blank, draw_series, hover, label_axis
from featurepipe.reporting.curves import (
    LINES,
    Results,
    draw_ring,
    head_style,
    is_main,
    recommended,
    ring_key,
    series_source,
)
from featurepipe.reporting.palette import Paint

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
            plot = _panel(paint, title, rows, heads, costs, drawn)
            best = recommended(document, rows)
            rings += [] if best is None else [draw_ring(plot, paint, best, costs)]
            panels.append(Panel(title, plot, spoken=_spoken(title, rows, costs)))
    if not panels:
        return None
    keys = [
        Key(head, replace(head_style(heads, head, "pretrained"), dash=None), tuple(ids)) for head, ids in drawn.items()
    ]
    return Exhibit(
        "Accuracy over cost",
        _summary(results, heads, document.get("columns") or []),
        tuple(panels),
        (*keys, *ring_key(rings)),
        chosen=True,
        note="What the network costs up to a node, not the head. The table of all nodes has these numbers.",
    )


def _panel(
    paint: Paint,
    title: str,
    rows: Results,
    heads: Sequence[str],
    costs: Mapping[str, float],
    drawn: dict[str, list[str]],
) -> Any:
    plot = blank(paint, height=400)
    label_axis(plot.xaxis[0], title.lower(), shares=title == _COSTS["cost"])
    label_axis(plot.yaxis[0], "accuracy", shares=True)
    markers = []
    for head in heads:
        own = [row for row in rows if row["head"] == head]
        source = series_source(own, costs)
        source.data["cost"] = [_said(title, cost) for cost in source.data["x"]]
        renderers, points = draw_series(plot, paint, source, head_style(heads, head, "pretrained"))
        drawn[head].extend(renderer.id for renderer in renderers)
        markers.append(points)
    hover(plot, markers, [*LINES, (title.lower(), "cost")], title="name")
    return plot


def _said(title: str, cost: float) -> str:
    return percent(cost, 0) if title == _COSTS["cost"] else f"{milliseconds(cost)} ms"


def _spoken(title: str, rows: Results, costs: Mapping[str, float]) -> str:
    """Every point in words."""
    ordered = sorted(rows, key=lambda row: costs[row["column"]])
    points = (
        f"{row['column']}, {row['head']}: {percent(row['accuracy'])} at {_said(title, costs[row['column']])}"
        for row in ordered
    )
    return f"{title}. {'; '.join(points)}."


def _summary(results: Results, heads: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> str:
    """What half of the operations buy, for each head."""
    costs = {str(node["column"]): finite(node.get("cost")) for node in columns}
    words = []
    for head in heads:
        own = [row for row in results if row["head"] == head]
        half = [row for row in own if (costs.get(row["column"]) or 1.0) <= 0.5]
        if half:
            cheap, top = (max(rows, key=lambda row: row["accuracy"]) for rows in (half, own))
            words.append(
                f"{head}: {percent(cheap['accuracy'])} with half of the operations or less ({cheap['column']}), "
                f"{percent(top['accuracy'])} at most ({top['column']})."
            )
    return " ".join(words) or "The cheaper of two equally accurate nodes lies to the left."
