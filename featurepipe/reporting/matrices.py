"""Matrices as shaded cells: how alike nodes are, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.models import ColumnDataSource, Range1d

from featurepipe.reporting.blocks import Exhibit, Panel, Table, TableCell, count, finite, percent, plain
from featurepipe.reporting.charts import Figure, blank, hover, label_axis, name_places
from featurepipe.reporting.palette import Paint, on_shade, shade

Values = npt.NDArray[np.float64]

_WRITTEN = 16  # cells a side that have room for a number
_DRAWN = 60  # classes; beyond, those most often wrong
_TABLED = 30


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
        (Panel("CKA", plot, "square"),),
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
    kept = _most_wrong(counts)
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
    left = (
        f" Shown are the {len(kept)} of {len(names)} classes with the most mistakes." if len(kept) < len(names) else ""
    )
    return Exhibit(
        "Confusion matrix",
        _mix_ups(counts, names),
        (Panel("Confusion", plot, "square"),),
        (),
        _confusion_table(names, counts, metrics),
        note=f"Numbers are per cent of the images of a true class.{left}",
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
    plot = blank(paint, height=min(max(250 + 26 * side, 360), 620))
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
    name_places(plot.xaxis[0], names, slanted=True)
    name_places(plot.yaxis[0], names)
    return plot


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


def _most_wrong(counts: Values) -> npt.NDArray[np.int64]:
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    return np.sort(np.argsort(-wrong, kind="stable")[:_DRAWN]).astype(np.int64)


def _mix_ups(counts: Values, names: Sequence[str]) -> str:
    hits, total = float(counts.trace()), float(counts.sum())
    right = f"{count(hits)} of {count(total)} images ({percent(hits / total)}) are named rightly."
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
    return (
        Table("Classes most often mistaken for one another", ("True class", "Taken for", "Images"), rows)
        if rows
        else None
    )
