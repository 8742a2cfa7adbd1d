"""The map of the images: a point each, placed by its features, with the image under the pointer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from bokeh.models import BooleanFilter, CDSView, ColumnDataSource

from featurepipe.reporting.blocks import Exhibit, Key, Panel, count, percent
from featurepipe.reporting.charts import Figure, blank, hover
from featurepipe.reporting.images import BLANK, Projection
from featurepipe.reporting.palette import OTHERS, Paint, Style, series

_CLASSES = 24  # with an entry of their own in the legend
_HEIGHT = 560


def feature_map(projection: Projection, images: Mapping[str, str], column: str, paint: Paint) -> Exhibit:
    """Draws one panel for each kind of projection, chosen by a button; the classes differ in colour and marker.

    Args:
        projection: Where the images are.
        images: Data URIs by id; where one is missing there is none to see.
        column: Whose features these are.
        paint: Collects the colours.
    """
    names, codes, styles = _classes(projection.labels)
    source = ColumnDataSource(
        {
            "id": list(projection.ids),
            "label": list(projection.labels),
            "code": codes,
            "marker": [styles[code].marker for code in codes],
            "colour_light": [styles[code].colour.light for code in codes],
            "colour_dark": [styles[code].colour.dark for code in codes],
            **({"image": [images.get(id_, BLANK) for id_ in projection.ids]} if images else {}),
            **{
                f"{method} {axis}": place[:, k]
                for method, place in projection.places.items()
                for k, axis in enumerate("xy")
            },
        }
    )
    shown = BooleanFilter(booleans=[True] * len(codes))
    panels = [
        Panel(method, _plot(paint, source, shown, method, bool(images)), "square") for method in projection.places
    ]
    panels.reverse()  # t-SNE first: it shows groups better
    return Exhibit(
        f"Map of the features at {column}",
        _summary(projection, names),
        tuple(panels),
        tuple(Key(name, styles[code], row=code) for code, name in enumerate(names)),
        chosen=True,
        filters=(shown.id, source.id),
        note="Point at a mark, or tap it, to see the image."
        + (" In t-SNE neighbours mean something, distances between groups do not." if len(panels) > 1 else ""),
    )


def _classes(labels: tuple[str, ...]) -> tuple[list[str], list[int], list[Style]]:
    """Names, the name's position for each image, and styles; classes beyond the most frequent share one."""
    frequent = [label for label, _ in Counter(labels).most_common(_CLASSES)]
    names = sorted(frequent)
    position = {name: k for k, name in enumerate(names)}
    codes = [position.get(label, len(names)) for label in labels]
    styles = [replace(series(k), dash=None) for k in range(len(names))]
    if len(names) in codes:
        return [*map(_named, names), "other classes"], codes, [*styles, Style(OTHERS, "cross", None)]
    return [_named(name) for name in names], codes, styles


def _named(label: str) -> str:
    return label or "no label"


def _plot(paint: Paint, source: ColumnDataSource, shown: BooleanFilter, method: str, images: bool) -> Figure:
    plot = blank(paint, height=_HEIGHT)
    plot.axis.visible = False
    plot.grid.visible = False
    points = plot.scatter(
        f"{method} x",
        f"{method} y",
        source=source,
        view=CDSView(filter=shown),
        marker="marker",
        size=8,
        fill_alpha=0.55,
        line_width=1,
    )
    points.nonselection_glyph = None
    points.muted_glyph = None
    paint.set_fields(points.glyph, fill_color="colour", line_color="colour")
    hover(plot, [points], [("", "id")], title="label", image="image" if images else "")
    return plot


def _summary(projection: Projection, names: list[str]) -> str:
    drawn, total = len(projection.ids), projection.total
    which = (
        f"All {count(drawn)} images" if drawn == total else f"{count(drawn)} of {count(total)} images, drawn at random"
    )
    return (
        f"{which}, placed so that images with similar features are near each other. {len(names)} classes are told apart by "
        "colour and marker. "
        f"The two principal components hold {percent(projection.kept)} of the variance."
    )
