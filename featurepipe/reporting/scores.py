"""Measured accuracy against a score that needs no fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bokeh.models import ColumnDataSource, DataRange1d

from featurepipe.reporting.blocks import Cell, Exhibit, Key, Panel, Table, finite, percent, plain
from featurepipe.reporting.charts import blank, draw_points, hover, label_axis
from featurepipe.reporting.curves import Results, head_style, is_main
from featurepipe.reporting.palette import INK, Paint


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
    label_axis(plot.yaxis[0], "accuracy", shares=True)
    keys, renderers = [], []
    for head in heads:
        own = [row for row in rows if row["head"] == head]
        points = draw_points(plot, paint, _score_source(own, scores), head_style(heads, head, "pretrained"), size=11)
        keys.append(Key(head, replace(head_style(heads, head, "pretrained"), dash=None), (points.id,)))
        renderers.append(points)
    hover(plot, renderers, [("head", "head"), (method, "score"), ("accuracy", "accuracy")], title="name")
    numbers = _number_nodes(plot, paint, document, rows, scores)
    return Exhibit(
        f"{method} against measured accuracy",
        _rank_words(method, heads, found.get("correlations") or {}),
        (Panel(method, plot, spoken=_spoken(method, rows, scores)),),
        tuple(keys),
        _score_table(method, heads, rows, scores, found.get("correlations") or {}),
        note=f"Nodes are numbered in the order of the network: {numbers}.",
    )


def _number_nodes(
    plot: Any, paint: Paint, document: Mapping[str, Any], rows: Results, scores: Mapping[str, float]
) -> str:
    """Writes each node's number above the best of its points, and returns what the numbers mean."""
    names = [name for name in (str(node["column"]) for node in document.get("columns") or []) if name in scores]
    tops = {name: max((row["accuracy"] for row in rows if row["column"] == name), default=None) for name in names}
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


def _spoken(method: str, rows: Results, scores: Mapping[str, float]) -> str:
    """Every point in words."""
    ordered = sorted(rows, key=lambda row: scores[row["column"]])
    points = (
        f"{row['column']}, {row['head']}: {method} {plain(scores[row['column']])}, accuracy {percent(row['accuracy'])}"
        for row in ordered
    )
    return f"{'; '.join(points)}."


def _score_source(rows: Results, scores: Mapping[str, float]) -> ColumnDataSource:
    return ColumnDataSource(
        {
            "x": [scores[row["column"]] for row in rows],
            "y": [row["accuracy"] for row in rows],
            "name": [str(row["column"]) for row in rows],
            "head": [str(row["head"]) for row in rows],
            "score": [plain(scores[row["column"]]) for row in rows],
            "accuracy": [percent(row["accuracy"], 2) for row in rows],
        }
    )


def _rank_words(method: str, heads: Sequence[str], correlations: Mapping[str, Any]) -> str:
    words = [
        f"{head}: Spearman {plain(correlations[head].get('spearman'), 2)}, Kendall {plain(correlations[head].get('kendall'), 2)}"
        for head in heads
        if correlations.get(head)
    ]
    tail = f" Rank correlation with the measured accuracy: {'; '.join(words)}." if words else ""
    return f"{method} is computed from features and labels, without fitting a head.{tail}"


def _score_table(
    method: str, heads: Sequence[str], rows: Results, scores: Mapping[str, float], correlations: Mapping[str, Any]
) -> Table:
    accuracy = {(row["column"], row["head"]): row["accuracy"] for row in rows}
    body = [
        (
            Cell(str(name)),
            Cell(plain(scores[name]), scores[name]),
            *(Cell(percent(accuracy.get((name, head))), finite(accuracy.get((name, head)))) for head in heads),
        )
        for name in scores
    ]
    for measure in ("spearman", "kendall") if correlations else ():
        values = [(correlations.get(head) or {}).get(measure) for head in heads]
        body.append((Cell(f"rank correlation ({measure})"), Cell(""), *(Cell(plain(value), None) for value in values)))
    return Table(f"{method} and accuracy of each node", ("Node", method, *heads), tuple(body), sortable=False)
