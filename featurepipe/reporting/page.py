"""The file itself: sections through the template, scripts and styles inline, and a policy under which nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import bokeh.document
from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from featurepipe.display import displayed, displayed_values
from featurepipe.reporting.blocks import (
    DASH,
    Exhibit,
    Gallery,
    Paint,
    Picture,
    Prose,
    Section,
    Style,
    finite,
    with_values,
)
from featurepipe.reporting.depth_sections import called, depth_sections, depth_title, elsewhere_section
from featurepipe.reporting.head_sections import (
    bundle_column,
    bundle_sections,
    bundle_title,
    details,
    map_of_images,
    mistakes,
    provenance,
    rejects,
)
from featurepipe.reporting.images import Projection
from featurepipe.reporting.network_sections import network_sections, networks_title
from featurepipe.reporting.night_sections import night_sections, nights_title
from featurepipe.reporting.route_sections import route_facts, route_sections, routes_title
from featurepipe.reporting.screening_sections import screening

Document = Mapping[str, Any]
Images = Mapping[str, str]

_PACKAGE = "featurepipe.reporting"
_LINE = 90  # characters of a record's part that is written on one line
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*\b")


def compose(
    document: Document,
    metrics: Document,
    projection: Projection | None,
    small: Images,
    large: Images,
    elsewhere: Images,
) -> str:
    """The page as HTML.

    Args:
        document: Of any kind.
        metrics: Its table of scores, or nothing.
        projection: Where the images of the map are.
        small: Thumbnails for the map, data URIs by id.
        large: Thumbnails of the mistakes, or of the images of a page about images.
        elsewhere: Thumbnails of the mistakes on the other source, or of the images that were asked with.
    """
    paint = Paint()
    document, metrics, projection = map(displayed_values, (with_values(document), metrics, projection))
    small, large, elsewhere = (_by_shown_id(pictures) for pictures in (small, large, elsewhere))
    if document["kind"] == "nights":
        return render(nights_title(document), night_sections(document, paint), paint, _footer(document))
    if document["kind"] == "routes":
        found = [*route_sections(document, paint), provenance(document, route_facts(document))]
        return render(routes_title(document), [section for section in found if section], paint, _footer(document))
    if document["kind"] == "images":
        return render(document["title"], image_sections(document, large, elsewhere), paint, _footer(document))
    depth = document["kind"] in {"depth", "networks"}
    part = document.get("details") or {}
    column = str(part.get("column", "the recommended node")) if depth else bundle_column(document)
    if depth:
        column = " + ".join(called(one, document) for one in column.split("+"))
    if document["kind"] == "networks":
        column = f"{column} of {document['backbone']['name']}"
    head = str(part.get("head", "")) if depth else str((document.get("bundle") or {}).get("family", ""))
    sections = [
        *_own_sections(document, paint),
        screening(metrics, paint),
        details(metrics, column, head, paint),
        map_of_images(projection, small, column, paint),
        mistakes(metrics, large),
        elsewhere_section(document, elsewhere, paint) if depth else None,
        rejects(document, large),
        provenance(document, _depth_facts(document) if depth else _bundle_facts(document)),
    ]
    titles = {"depth": depth_title, "networks": networks_title}
    title = titles.get(document["kind"], bundle_title)(document)
    return render(title, [section for section in sections if section], paint, _footer(document))


def _own_sections(document: Document, paint: Paint) -> list[Section]:
    if document["kind"] == "networks":
        return network_sections(document, paint)
    return depth_sections(document, paint) if document["kind"] == "depth" else bundle_sections(document)


def image_sections(document: Document, pictures: Images, queries: Images) -> list[Section]:
    """Groups of images, such as a query and its nearest, each a gallery under its own heading."""
    found = [Section("answer", "What is shown", (Prose(tuple(document["paragraphs"])),))]
    for number, group in enumerate(document["groups"]):
        shown = [
            Picture(
                (queries if image.get("is_query") else pictures).get(image["id"]),
                f"Image {image['id']}: {', '.join(image['lines'])}",
                image["id"],
                tuple(image["lines"]),
            )
            for image in group["images"]
        ]
        found.append(Section(f"group-{number}", group["title"], (Gallery(tuple(shown)),)))
    last = provenance(document, {"Provenance": document.get("provenance")})
    return [*found, last] if last else found


def render(title: str, sections: Sequence[Section], paint: Paint, footer: str) -> str:
    """Fills the template; everything that is not ``Markup`` is escaped there."""
    plots = {
        panel.plot.id: panel.plot
        for section in sections
        for block in section.blocks
        if isinstance(block, Exhibit)
        for panel in block.panels
    }
    scripts: list[str] = []
    divs: dict[str, str] = {}
    if plots:
        together = bokeh.document.Document()
        with together.models.freeze():  # else Bokeh walks through all plots again for each one that is added
            for plot in plots.values():
                together.add_root(plot)
        start, divs = components(plots, wrap_script=False)
        library = Resources(mode="inline", components=["bokeh"], log_level="warn")
        scripts = [*library.js_raw, start]
    scripts.append(_text("page.js"))
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(FUNCTIONS)
    html = environment.get_template("page.html").render(
        title=title,
        sections=sections,
        divs={name: Markup(div) for name, div in divs.items()},  # noqa: S704  Bokeh's own, made of ids only
        style=Markup(_text("style.css")),  # noqa: S704
        scripts=[Markup(_inline(script)) for script in scripts],  # noqa: S704
        policy=_policy([_inline(script) for script in scripts]),
        colours=Markup(_json(paint.notes)),  # noqa: S704
        footer=footer,
    )
    return html.lstrip()  # what the template's macros leave before the doctype


def _by_shown_id(pictures: Images) -> Images:
    return {displayed(name): picture for name, picture in pictures.items()}


def _policy(scripts: Sequence[str]) -> str:
    """A Content Security Policy: these scripts and no others, pictures from the page itself, and no connection at all."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _inline(script: str) -> str:
    """A script as it may stand between tags, line ends as the browser's parser leaves them (the hash is of those)."""
    return script.replace("\r\n", "\n").replace("</script", "<\\/script")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _text(name: str) -> str:
    return (resources.files(_PACKAGE) / name).read_text(encoding="utf-8")


def _depth_facts(document: Document) -> dict[str, Any]:
    several = {
        f"Network {one['backbone']['name']}": {
            **{name: one[name] for name in ("backbone", "weights_note", "space", "control", "timing") if name in one},
            "runs": (one.get("provenance") or {}).get("runs"),
        }
        for one in document.get("networks", [])
    }
    facts = _facts_of_one(document)
    return {**{name: facts[name] for name in facts if not (several and name == "Network")}, **several}


def _facts_of_one(document: Document) -> dict[str, Any]:
    return {
        "Provenance": document.get("provenance"),
        "Settings": document.get("settings"),
        "Data": {
            name: document[name]
            for name in ("dataset", "test_dataset", "images", "groups", "counts", "damaged", "classes")
            if name in document
        },
        "Network": {
            name: document[name]
            for name in ("backbone", "weights_note", "space", "control", "timing")
            if name in document
        },
    }


def _bundle_facts(document: Document) -> dict[str, Any]:
    evaluation = document.get("evaluation") or {}
    return {
        "Provenance": document.get("provenance"),
        "Bundle": _settings_of(document.get("bundle") or {}),
        "Evaluation": {name: value for name, value in evaluation.items() if name != "metrics"},
    }


def _settings_of(bundle: Document) -> dict[str, Any]:
    """A bundle's record but for what its training measured on test images: the page has what is measured now."""
    metrics = bundle.get("metrics")
    kept = {"metrics": {name: value for name, value in metrics.items() if name != "test"}} if metrics else {}
    return {**bundle, **kept}


def _footer(document: Document) -> str:
    origin = document.get("provenance") or {}
    version = (origin.get("software") or {}).get("featurepipe")
    made = f"featurepipe {version}" if version else "featurepipe"
    return f"Made with {made}{', ' + str(origin['when']) if origin.get('when') else ''}"


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


def on_a_line(value: Any) -> str:
    """A mapping of a few plain values in words; empty if it is none, or too long for a line.

    Example:
        >>> on_a_line({"value": 0.8475, "low": None}), on_a_line({"a": {}}), on_a_line({"a": "x" * 100})
        ('value 0.8475, low –', '', '')
    """
    if not is_record(value) or any(isinstance(one, Mapping | list | tuple) for one in value.values()):
        return ""
    line = spoken_value(value)
    return line if len(line) <= _LINE else ""


def is_records(value: Any) -> bool:
    """Whether a value is a list of mappings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def with_options(text: str) -> Markup:
    """A text in which no line ends inside an option such as ``--accept``.

    Example:
        >>> print(with_options("or with --retry-rejects <b>"))
        or with <span class="option">--retry-rejects</span> &lt;b&gt;
    """
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', str(escape(text))))  # noqa: S704  escaped just there


def breakable(name: str) -> Markup:
    """A name whose lines may end behind each ``/`` and ``_``.

    Example:
        >>> print(breakable("a/b_<c>.png"))
        a/<wbr>b_<wbr>&lt;c&gt;.png
    """
    return Markup(re.sub(r"[/_]", r"\g<0><wbr>", str(escape(name))))  # noqa: S704  escaped just there


def spoken_value(value: Any) -> str:
    """A value on one line, a list or a mapping of values as well; what is missing is a dash.

    Example:
        >>> spoken_value([[{"id": "a.png", "split": "test"}, {"id": "b.png", "split": None}]])
        'id a.png, split test; id b.png, split –'
    """
    if isinstance(value, list | tuple):
        apart = "; " if any(isinstance(one, Mapping | list | tuple) for one in value) else ", "
        return apart.join(spoken_value(one) for one in value) or DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return DASH if finite(value) is None else f"{value:.6g}"
    if value is None or value in ("", {}):
        return DASH
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {spoken_value(one)}" for name, one in value.items())
    return str(value)


FUNCTIONS = {
    "breakable": breakable,
    "is_record": is_record,
    "is_records": is_records,
    "marker_path": marker_path,
    "on_a_line": on_a_line,
    "spoken": spoken_value,
    "with_options": with_options,
    "as_json": json.dumps,
}
