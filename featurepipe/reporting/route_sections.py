"""The page of a comparison of routes: which to take, accuracy over the number of images, costs, and the lecture's table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, DataRange1d, FixedTicker, PlainText, Range1d

from featurepipe.display import counted
from featurepipe.progress import spoken
from featurepipe.reporting.blocks import (
    ACCENT,
    DASH,
    INK,
    QUIET,
    RULE,
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
    amount,
    count,
    finite,
    measure_of,
    percent,
    plain,
    series,
)
from featurepipe.reporting.charts import blank, draw_line, draw_points, draw_series, hover, label_axis, name_places
from featurepipe.reporting.depth_curves import parameters

Document = Mapping[str, Any]

MANY = 100
"""Images per class from which on the picture calls data many; the lecture gives no number."""
_RING = Style(INK, "circle", None, filled=False)
_QUADRANTS = {  # of the picture, by whether images are many, and different
    (False, False): "a linear head on the top layer",
    (True, False): "tune a few layers",
    (False, True): "hard: linear heads on several layers",
    (True, True): "tune many layers",
}
_LECTURE = (
    "The picture is that of Stanford's course CS231n (transfer learning): what to do by the number of images, and by how alike "
    "they are to those that the network was trained on. The lecture gives no numbers; here data are many from "
    f"{MANY} images a class on, and images different from half of the way to noise on."
)


def routes_title(document: Document) -> str:
    """The question that the page answers."""
    network = (document.get("backbone") or {}).get("name", "the network")
    return f"Which route from {network} to {document.get('dataset', 'the data')}?"


def route_sections(document: Document, paint: Paint) -> list[Section]:
    """What the document has, in the order in which one reads it."""
    title = f"{measure_of(document).title} over the number of images"
    parts: list[tuple[str, str, Sequence[Block | None]]] = [
        ("answer", "Answer", _answer(document)),
        ("curves", title, (_curves(document, paint),)),
        ("routes", "All routes", _tables(document)),
        ("lecture", "Data size and similarity", (_picture(document, paint), _layers(document, paint))),
        ("untried", "Without a result", (_untried(document),)),
    ]
    sections = [Section(anchor, name, [block for block in blocks if block]) for anchor, name, blocks in parts]
    return [section for section in sections if section.blocks]


def route_facts(document: Document) -> dict[str, Any]:
    """Records for whoever wants to do it again."""
    data = ("dataset", "test_dataset", "images", "counts", "damaged", "classes", "sizes")
    network = ("backbone", "weights_note", "space", "columns", "cuts", "timing")
    return {
        "Provenance": document.get("provenance"),
        "Data": {name: document[name] for name in data if name in document},
        "Network": {name: document[name] for name in network if name in document},
    }


def change_sentence(change: Document, per: str) -> str:
    """A change of the recommendation in a sentence."""
    near = change["size"]
    if change["extrapolated"]:
        return (
            f"If trends go on, {change['to']} would be better by more than a standard error from about {near:,.0f} images a "
            f"{per} on; that is extrapolated from two sizes, so measure it when you have them."
        )
    about = f", and the lines of both cross at about {near:,.0f}" if near is not None else ""
    few = f"With {change['above']:,.0f} images a {per} or fewer take {change['from']}"
    return f"{few}, with {change['below']:,.0f} {change['to']}{about}."


def _answer(document: Document) -> list[Block]:
    best, measure, per = document.get("recommended") or {}, measure_of(document), document.get("per", "class")
    if not best:
        return []
    reached = (
        f"{measure.text(best.get('value'))} {measure.word}"
        if measure.is_share
        else f"{measure.word} {measure.text(best.get('value'))}"
    )
    bounds = measure.interval(best.get("low"), best.get("high"))
    within = f" (95\u00a0% interval {bounds})" if bounds else ""
    sentence = f"With {_with_images(best['size']['text'])} take {_called(best)}: {reached}{within}."
    other = "No route did better."
    if best["best"] != best["route"]:
        value = measure.text(best.get("best_value"))
        other = f"The {measure.best} route, {best['best']}, reaches {value} in {_time(best['best_seconds'])}."
    changes = [change_sentence(change, per) for change in best.get("changes") or []]
    if not changes:
        changes = ["At every size that was measured the answer is the same."]
    if not best.get("is_own_size", True):
        changes.append("Nothing was measured with all of your images; this is the largest size that was.")
    few = f"The answer was {best['few_draws']}." if best.get("few_draws") else ""
    smaller = [one for one in (best.get("by_size") or [])[:-1] if one.get("few_draws")]
    changes += [f"With {_with_images(one['size']['text'])} the answer was {one['few_draws']}." for one in smaller]
    same = best.get("not_told_apart")
    if best.get("same_cost"):
        others, take = " and ".join(best["same_cost"]), "takes" if len(best["same_cost"]) == 1 else "take"
        changes.insert(0, f"As far as a clock tells {others} {take} as long; {best['route']} is the simplest of them.")
    ties = f"By these images not told apart from {best['best']}: {', '.join(same)}." if same else ""
    figures = (
        (measure.title, measure.text(best.get("value")), f"{bounds} over test images and draws" if bounds else ""),
        ("Time", _time(best.get("seconds")), "to compute features and to learn"),
        ("Memory", amount(best.get("memory")), "at most, on top of what the process has"),
        ("Distance", _distance(document), "of the way from the network's training images to noise"),
    )
    return [
        Prose(tuple(filter(None, (f"{sentence} {other}", few)))),
        Figures(figures),
        Prose(tuple(filter(None, (" ".join(changes), ties, _elsewhere(best.get("elsewhere"), measure))))),
        Prose(tuple(filter(None, (f"Rule: {best['rule']}." if best.get("rule") else "", _untried_short(document))))),
    ]


def _with_images(text: str) -> str:
    """A size of the training images as it stands in a sentence.

    Example:
        >>> _with_images("20 a class"), _with_images("all (16 a class)")
        ('20 images a class', 'all (16 a class)')
    """
    return re.sub(r"^([\d,]+) a ", r"\1 images a ", text)


def _called(best: Document) -> str:
    return f"{best['route']} ({best['what']})"


def _time(seconds: Any) -> str:
    number = finite(seconds)
    return DASH if number is None else f"{number:.1f} s" if number < 10 else spoken(number)


def _distance(document: Document) -> str:
    relative = finite((document.get("similarity") or {}).get("relative"))
    return percent(relative, 0)


def _elsewhere(there: Document | None, measure: Any) -> str:
    if not there:
        return ""
    value = there.get(measure.name, there.get("value"))
    best = there.get(f"best_{measure.name}", there.get("best_value"))
    bounds = measure.interval(there.get("low"), there.get("high"))
    told = (
        f"On {there['dataset']} ({counted(int(there['images']), 'image')}) it has {measure.word} {measure.text(value)}"
    )
    return (
        f"{told}{f' ({bounds})' if bounds else ''}; the best route there is {there['best']} with {measure.text(best)}."
    )


def _untried_short(document: Document) -> str:
    names = list(dict.fromkeys(str(one["route"]) for one in document.get("not_tried") or []))
    return f"Without a result, or not at all sizes: {', '.join(names)}; why is said below." if names else ""


def _names(document: Document) -> list[str]:
    return list(dict.fromkeys(str(row["route"]) for row in document.get("results") or []))


def _rows(document: Document, tested_on: str) -> list[Document]:
    return [
        row
        for row in document.get("results") or []
        if row.get("tested_on") == tested_on and finite(row.get("value")) is not None
    ]


def _curves(document: Document, paint: Paint) -> Exhibit | None:
    """A line and a band for each route over the images per class; the other source has a panel of its own."""
    names, measure = _names(document), measure_of(document)
    if not names:
        return None
    drawn: dict[str, list[str]] = {name: [] for name in names}
    panels, rings = [], []
    y_range = DataRange1d(only_visible=True, range_padding=0.08)
    sources = {"source": document.get("dataset"), "shifted": document.get("test_dataset")}
    for tested_on, title in sources.items():
        rows = _rows(document, tested_on)
        if not rows:
            continue
        plot = blank(paint, height=430, y_range=y_range)
        _name_sizes(plot.xaxis[0], document)
        plot.x_range.range_padding = 0.08
        label_axis(plot.yaxis[0], measure.word, shares=measure.is_share)
        markers = []
        for name in names:
            own = [row for row in rows if row["route"] == name]
            if own:
                renderers, points = _line(plot, paint, own, series(names.index(name)), document)
                drawn[name] += [renderer.id for renderer in renderers]
                markers.append(points)
        hover(plot, markers, [(measure.word, "said"), ("95\u00a0% interval", "interval"), ("images", "size"), ("time", "time")],
              title="name")  # fmt: skip
        if tested_on == "source":
            rings.append(_ring(plot, paint, document, rows))
        panels.append(Panel(str(title or tested_on), plot))
    keys = [Key(name, series(names.index(name)), tuple(ids)) for name, ids in drawn.items() if ids]
    shown = [ring for ring in rings if ring is not None]
    keys += [Key("recommended", _RING, tuple(ring.id for ring in shown))] if shown else []
    return Exhibit(
        f"{measure.title} over the number of images",
        _course(document, names),
        tuple(panels),
        tuple(keys),
        _all_results(document),
        note=f"Images of each {document.get('per', 'class')} that train, on a logarithmic scale. Bands and bars are 95\u00a0% "
        "intervals over test images and draws.",
    )


def _name_sizes(axis: Any, document: Document) -> None:
    places = {_place(size["per_class"]): _short(size) for size in document.get("sizes") or []}
    axis.ticker = FixedTicker(ticks=list(places))
    axis.major_label_overrides = {place: PlainText(text=text) for place, text in places.items()}
    axis.axis_label = PlainText(text=f"images a {document.get('per', 'class')}")


def _short(size: Document) -> str:
    return f"{size['per_class']:,.0f}" if size["size"] != "all" else f"all ({size['per_class']:,.0f})"


def _place(per_class: float) -> float:
    return math.log10(max(per_class, 1.0))


def _line(plot: Any, paint: Paint, rows: Sequence[Document], style: Style, document: Document) -> tuple[list[Any], Any]:
    source = _source(rows, document)
    band = plot.varea("x", "low", "high", source=source, fill_alpha=0.13)
    band.nonselection_glyph = band.muted_glyph = None
    paint.set(band.glyph, fill_color=style.colour)
    renderers, points = draw_series(plot, paint, source, style)
    return [band, *renderers], points


def _source(rows: Sequence[Document], document: Document) -> ColumnDataSource:
    measure = measure_of(document)
    ordered = sorted(rows, key=lambda row: row["per_class"])
    return ColumnDataSource(
        {
            "x": [_place(row["per_class"]) for row in ordered],
            "y": [row["value"] for row in ordered],
            "low": [row["value"] if finite(row.get("low")) is None else row["low"] for row in ordered],
            "high": [row["value"] if finite(row.get("high")) is None else row["high"] for row in ordered],
            "name": [str(row["route"]) for row in ordered],
            "said": [measure.text(row["value"], 2) for row in ordered],
            "interval": [measure.interval(row.get("low"), row.get("high")) for row in ordered],
            "size": [f"{row['images']:,.0f}" for row in ordered],
            "time": [_time(row.get("seconds")) for row in ordered],
        }
    )


def _ring(plot: Any, paint: Paint, document: Document, rows: Sequence[Document]) -> Any:
    best = document.get("recommended") or {}
    size = (best.get("size") or {}).get("size")
    chosen = [row for row in rows if row["route"] == best.get("route") and row["size"] == size]
    return draw_points(plot, paint, _source(chosen, document), _RING, size=22) if chosen else None


def _course(document: Document, names: Sequence[str]) -> str:
    """Each route's curve in words."""
    measure, words = measure_of(document), []
    for name in names:
        own = sorted(
            (row for row in _rows(document, "source") if row["route"] == name), key=lambda row: row["per_class"]
        )
        if own:
            ends = [own[0], own[-1]] if len(own) > 1 else own
            told = " to ".join(f"{measure.text(row['value'])} with {row['per_class']:,.0f}" for row in ends)
            words.append(f"{name}: {told}.")
    return "\n".join(words)


def _tables(document: Document) -> list[Block]:
    """A table for each size, the user's own first."""
    found = [_table(document, size) for size in reversed(document.get("sizes") or [])]
    return [table for table in found if table]


def _table(document: Document, size: Document) -> Table | None:
    measure, other = measure_of(document), document.get("test_dataset")
    rows = [row for row in _rows(document, "source") if row["size"] == size["size"]]
    there = {row["route"]: row for row in _rows(document, "shifted") if row["size"] == size["size"]}
    apart = {row["a"]: row for row in document.get("differences") or [] if row["size"] == size["size"]}
    if not rows:
        return None
    groups = [("", 1), (measure.title, 4), *([(str(other), 1)] if there else []), ("What it takes", 3)]
    compared = ["draws", "difference to best", "shared draws"]
    header = ["Route", "here", *compared, *(["there"] if there else []), "features", "learning", "memory"]
    body = []
    for row in rows:
        gap, far = apart.get(row["route"], {}), there.get(row["route"])
        draws = len(row.get("cells") or [])
        bounds = measure.difference_interval(gap.get("low"), gap.get("high"))
        elsewhere = (
            []
            if not there
            else [TableCell(DASH) if far is None else measure.cell(far["value"], far.get("low"), far.get("high"))]
        )
        body.append((
            TableCell(str(row["route"])),
            measure.cell(row["value"], row.get("low"), row.get("high")),
            TableCell("any") if row.get("kind") == "as-it-is" else TableCell(count(draws), draws),
            TableCell(measure.difference(gap.get("difference")), finite(gap.get("difference")), bounds),
            TableCell(count(gap.get("draws")), finite(gap.get("draws"))),
            *elsewhere,
            TableCell(_time(row.get("seconds_features")), finite(row.get("seconds_features"))),
            TableCell(_time(row.get("seconds_fit")), finite(row.get("seconds_fit"))),
            TableCell(amount(row.get("memory")), finite(row.get("memory"))),
        ))  # fmt: skip
    best = document.get("recommended") or {}
    chosen = {one["size"]["size"]: one["route"] for one in best.get("by_size") or []}.get(size["size"])
    names = [str(row["route"]) for row in rows]
    unit = ", differences in percentage points" if measure.is_share else ""
    return Table(
        f"With {size['text']}, {size['images']:,.0f} images; 95\u00a0% intervals{unit}",
        tuple(header), tuple(body), tuple(groups), names.index(chosen) if chosen in names else None,
    )  # fmt: skip


def _all_results(document: Document) -> Table:
    measure = measure_of(document)
    rows = tuple(
        (
            TableCell(str(row["route"])),
            TableCell(str(row["size"]), finite(row.get("per_class"))),
            TableCell("elsewhere" if row.get("tested_on") == "shifted" else "here"),
            measure.cell(row.get("value"), row.get("low"), row.get("high")),
            measure.cell(row.get("train_value")),
            TableCell(count(len(row.get("cells") or [])), len(row.get("cells") or [])),
            TableCell(_chosen(row.get("params"))),
        )
        for row in document.get("results") or []
    )
    header = ("Route", "Size", "Tested", measure.title, "Training", "Draws", "Chosen")
    return Table(f"Every measured {measure.word}, with its 95\u00a0% interval", header, rows)


def _chosen(params: Any) -> str:
    told = [
        parameters({name: _kept(value) if name == "kept" else value for name, value in one.items() if name != "ended"})
        for one in params or []
    ]
    return " or ".join(filter(None, dict.fromkeys(told))) or DASH


def _kept(values: Any) -> Any:
    """Of which node most values of several were kept; there may be dozens of nodes."""
    if not isinstance(values, Mapping) or not values:
        return values
    node = max(values, key=lambda name: values[name])
    return f"most at {node} ({count(values[node])})"


def _picture(document: Document, paint: Paint) -> Exhibit | None:
    """The lecture's 2 x 2, with a point for each size at which routes were measured."""
    found, best = document.get("similarity") or {}, document.get("recommended") or {}
    relative, border = finite(found.get("relative")), finite(found.get("different"))
    if relative is None or border is None or not best:
        return None
    sizes = best.get("by_size") or []
    right = max(4.0, _place(sizes[-1]["size"]["per_class"]) + 0.3)
    top = max(1.0, relative + 0.1)
    plot = blank(paint, height=430)
    plot.x_range, plot.y_range = Range1d(start=0.0, end=right), Range1d(start=top, end=0.0)
    plot.grid.visible = False
    many = _place(MANY)
    columns = {False: (0.0, many), True: (many, right)}
    rows = {False: (0.0, border), True: (border, top)}
    source = ColumnDataSource({
        "left": [columns[big][0] for big, _ in _QUADRANTS], "right": [columns[big][1] for big, _ in _QUADRANTS],
        "bottom": [rows[far][0] for _, far in _QUADRANTS], "top": [rows[far][1] for _, far in _QUADRANTS],
        "x": [sum(columns[big]) / 2 for big, _ in _QUADRANTS], "y": [0.94 * top if far else 0.06 * top for _, far in _QUADRANTS],
        "text": [_in_two(text) for text in _QUADRANTS.values()],
    })  # fmt: skip
    own = (best["size"]["per_class"] >= MANY, relative >= border)
    source.data["alpha"] = [0.12 if place == own else 0.0 for place in _QUADRANTS]
    quads = plot.quad("left", "right", "top", "bottom", source=source, fill_alpha="alpha", line_width=1)
    paint.set(quads.glyph, fill_color=ACCENT, line_color=RULE)
    words = plot.text(
        "x", "y", "text", source=source, text_align="center", text_baseline="middle", text_font_size="12px"
    )
    paint.set(words.glyph, text_color=QUIET)
    names, points, keys = _names(document), [], []
    for name in dict.fromkeys(str(one["route"]) for one in sizes):
        some = [one for one in sizes if one["route"] == name]
        at = ColumnDataSource({
            "x": [_place(one["size"]["per_class"]) for one in some], "y": [relative] * len(some),
            "name": [one["size"]["text"] for one in some], "route": [name] * len(some),
        })  # fmt: skip
        style = series(names.index(name))
        points.append(draw_points(plot, paint, at, style, size=13))
        keys.append(Key(name, Style(style.colour, style.marker, None), (points[-1].id,)))
    mine = ColumnDataSource({"x": [_place(best["size"]["per_class"])], "y": [relative]})
    ring = draw_points(plot, paint, mine, _RING, size=24)
    keys.append(Key("your images", _RING, (ring.id,)))
    hover(plot, points, [("take", "route")], title="name")
    ticks = list(range(math.floor(right) + 1))
    plot.xaxis[0].ticker = FixedTicker(ticks=ticks)
    plot.xaxis[0].major_label_overrides = {place: PlainText(text=f"{10**place:,}") for place in ticks}
    plot.xaxis[0].axis_label = PlainText(text=f"images a {document.get('per', 'class')}")
    label_axis(plot.yaxis[0], "distance from the training images", shares=True)
    kind = f"{'many' if own[0] else 'few'} and {'different' if own[1] else 'similar'}"
    return Exhibit(
        "The table of CS231n, with your images in it",
        f"Your images are {kind} ({percent(relative, 0)} of the way to noise), for which CS231n says: {_QUADRANTS[own]}. "
        f"Measured, {best['route']} is recommended here.",
        (Panel("2 x 2", plot, "square"),),
        tuple(keys),
        note=_LECTURE,
    )


def _in_two(text: str) -> str:
    """A text on two lines, broken near its middle."""
    words = text.split()
    if len(text) < 18:
        return text
    lengths = [abs(len(" ".join(words[:k])) - len(text) / 2) for k in range(1, len(words))]
    cut = lengths.index(min(lengths)) + 1
    return " ".join(words[:cut]) + "\n" + " ".join(words[cut:])


def _layers(document: Document, paint: Paint) -> Exhibit | Prose | None:
    """The distance layer by layer, of the images and of noise."""
    found = document.get("similarity") or {}
    if found.get("relative") is None:
        return (
            Prose((f"How far the images are from what the network was trained on was not measured: {found['why']}.",))
            if found.get("why")
            else None
        )
    names = list(found["layers"])
    plot = blank(paint, height=360, y_range=DataRange1d(start=0.0, range_padding=0.1))
    name_places(plot.xaxis[0], names, slanted=True, two_lines=True)
    label_axis(plot.xaxis[0], "BatchNorm layer")
    label_axis(plot.yaxis[0], "distance (learned deviations)")
    keys, markers = [], []
    for place, (title, values) in enumerate((("your images", found["layers"]), ("noise", found["noise_layers"]))):
        source = ColumnDataSource({
            "x": list(range(len(names))), "y": [values[name] for name in names], "name": names,
            "said": [plain(values[name]) for name in names], "what": [title] * len(names),
        })  # fmt: skip
        renderers, points = draw_line(plot, paint, source, series(place), size=6)
        keys.append(Key(title, series(place), tuple(renderer.id for renderer in renderers)))
        markers.append(points)
    hover(plot, markers, [("of", "what"), ("distance", "said")], title="name")
    most = max(names, key=lambda name: found["layers"][name])
    rows = tuple(
        (TableCell(name, place), TableCell(plain(found["layers"][name]), found["layers"][name]),
         TableCell(plain(found["noise_layers"][name]), found["noise_layers"][name]))
        for place, name in enumerate(names)
    )  # fmt: skip
    sure = finite(found.get("confidence"))
    confident = f" The network gives its own likeliest class {percent(sure, 0)} on average." if sure is not None else ""
    return Exhibit(
        "Distance from what the network was trained on, by layer",
        f"On average {plain(found['distance'], 2)}, where noise has {plain(found['noise'], 2)}; farthest at {most} "
        f"({plain(found['layers'][most], 2)}).{confident}",
        (Panel("Distance", plot),),
        tuple(keys),
        Table("Distance of each BatchNorm layer's inputs from its statistics", ("Layer", "Your images", "Noise"), rows),
        note=f"Of {count(found['images'])} images: {found['method']}.",
    )


def _untried(document: Document) -> Table | None:
    rows = tuple(
        (
            TableCell(str(one["route"])),
            TableCell(str(one.get("size", "any"))),
            TableCell(str(one["why"]), note=_lacking(one)),
        )
        for one in document.get("not_tried") or []
    )
    return Table("What has no result, and why", ("Route", "Size", "Why"), rows) if rows else None


def _lacking(one: Document) -> str:
    """How many draws have no result, and how long they would take; under the reason, since a phone has no room beside it."""
    if "draws" not in one:
        return ""
    lasts = f", about {_time(one['seconds'])} by the estimate" if finite(one.get("seconds")) is not None else ""
    return f"{counted(int(one['draws']), 'draw')}{lasts}"
