"""What the template needs besides the blocks: swatches of the legend, and records as nested lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from featurepipe.reporting.blocks import DASH, finite
from featurepipe.reporting.palette import Style

# Bokeh's markers around (14, 8) of a 28 x 16 swatch.
_SHAPES = {
    "circle": "M14 3.5a4.5 4.5 0 1 1 0 9a4.5 4.5 0 1 1 0-9z",
    "square": "M9.8 3.8h8.4v8.4h-8.4z",
    "triangle": "M14 3l5 9h-10z",
    "diamond": "M14 2.5l4 5.5l-4 5.5l-4-5.5z",
    "inverted_triangle": "M14 13l5-9h-10z",
    "hex": "M14 3l4.3 2.5v5l-4.3 2.5l-4.3-2.5v-5z",
    "star": "M14 2l1.6 4.1l4.4.2l-3.4 2.8l1.1 4.3l-3.7-2.4l-3.7 2.4l1.1-4.3l-3.4-2.8l4.4-.2z",
    "cross": "M14 3v10M9 8h10",
    "x": "M10 4l8 8M18 4l-8 8",
}


def marker_path(style: Style) -> str:
    """The outline of a marker for an SVG of 28 x 16, or nothing."""
    return _SHAPES.get(style.marker or "", "")


def is_record(value: Any) -> bool:
    """Whether a value is a mapping with something in it."""
    return isinstance(value, Mapping) and bool(value)


def is_records(value: Any) -> bool:
    """Whether a value is a list of mappings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def spoken_value(value: Any) -> str:
    """A plain value or a list of them on one line; what is missing is a dash."""
    if isinstance(value, list | tuple):
        return ", ".join(spoken_value(one) for one in value) or DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return DASH if finite(value) is None else f"{value:.6g}"
    if value is None or value in ("", {}):
        return DASH
    return str(value)


FUNCTIONS = {
    "is_record": is_record,
    "is_records": is_records,
    "marker_path": marker_path,
    "spoken": spoken_value,
    "as_json": json.dumps,
}
