"""The sections about one head: how good a bundle's is; of any, its confusions, the map, its mistakes, its provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bokeh.models import BooleanFilter, CDSView, ColumnDataSource

from featurepipe.display import counted, named_columns
from featurepipe.heads.statistics.multilabel import TITLES as LABEL_TITLES
from featurepipe.heads.statistics.regression import KAPPA_TITLE
from featurepipe.heads.statistics.regression import TITLES as NUMBER_TITLES
from featurepipe.reporting.blocks import (
    OTHERS,
    Block,
    Exhibit,
    Facts,
    Figures,
    Gallery,
    Key,
    Paint,
    Panel,
    Picture,
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
from featurepipe.reporting.charts import Figure, blank, confusion_map, hover
from featurepipe.reporting.images import BLANK, Projection
from featurepipe.reporting.screening_sections import number_plots, precision_curves

Document = Mapping[str, Any]


def bundle_title(document: Document) -> str:
    """What the page is about."""
    bundle, evaluation = document.get("bundle") or {}, document.get("evaluation") or {}
    on = f" on {evaluation['dataset']}" if evaluation.get("dataset") else ""
    return f"How good is {bundle.get('family', 'the head')}{on}, from {bundle_column(document)}?"


def bundle_column(document: Document) -> str:
    """The column or columns that the bundle's head reads; the network's last is also known as its bottleneck."""
    bundle = document.get("bundle") or {}
    columns = [str(column) for column in bundle.get("columns") or []]
    return named_columns(columns, bundle.get("bottleneck")) or "its features"


def bundle_sections(document: Document) -> list[Section]:
    """The answer, and the leaks between what it learned from and what it was tested on."""
    return [section for section in (_answer(document), _leaks(document)) if section]


def _answer(document: Document) -> Section | None:
    bundle, evaluation = document.get("bundle") or {}, document.get("evaluation") or {}
    metrics = evaluation.get("metrics") or {}
    if "map" in metrics or "r2" in metrics:
        return _answer_of_targets(bundle, evaluation, metrics)
    accuracy = metrics.get("accuracy") or {}
    if finite(accuracy.get("value")) is None:
        return None
    bounds = interval(accuracy.get("low"), accuracy.get("high"))
    known = f", 95\u00a0% interval {bounds}" if bounds else ""
    scope = f"; tested on {evaluation['scope']}" if evaluation.get("scope") else ""
    sentence = (
        f"It classifies {percent(accuracy['value'])} of {count(metrics.get('images'))} images correctly{known}{scope}."
    )
    balanced = metrics.get("balanced_accuracy") or {}
    figures = (
        ("Accuracy", percent(accuracy["value"]), _between(bounds)),
        ("Balanced accuracy", percent(balanced.get("value")), _between(_bounds_of(balanced))),
        *_kappa_figure(metrics.get("quadratic_kappa")),
        ("Classes", count(len(bundle.get("classes") or [])), ""),
        ("Trained and calibrated on", count(bundle.get("seen")), "different images"),
    )
    return Section("answer", "Answer", [Prose((sentence,)), Figures(figures)])


def _kappa_figure(kappa: Document | None) -> list[tuple[str, str, str]]:
    """The measure of ordered classes, if they are."""
    if not kappa:
        return []
    return [("Weighted kappa", plain(kappa["value"]), _between(_plain_bounds(kappa)))]


def _answer_of_targets(bundle: Document, evaluation: Document, metrics: Document) -> Section:
    """How good several labels, or a number, are predicted."""
    scope = f", of {evaluation['scope']}" if evaluation.get("scope") else ""
    images = count(metrics.get("images"))
    if "map" in metrics:
        measured = len(metrics["per_label"]) - len(metrics["unmeasured"])
        reached = _said(metrics["map"])
        sentence = (
            f"Over {counted(measured, 'label')} its mean average precision is {reached} on {images} images{scope}."
        )
        shown = [("map", "Mean average precision"), ("auc", "AUC"), ("macro_f1", "Macro F1"), ("micro_f1", "Micro F1")]
        figures = [
            (title, percent(metrics[name]["value"]), _between(_bounds_of(metrics[name]))) for name, title in shown
        ]
    else:
        sentence = (
            f"Its predictions are off by {plain(metrics['mae']['value'])} on average ({images} images{scope}); they explain "
            f"{_said(metrics['r2'])} of the variance."
        )
        shown = [("mae", "Mean absolute error"), ("rmse", "RMSE"), ("r2", "R2"), ("spearman", "Spearman's correlation")]
        figures = [
            (title, plain(metrics[name]["value"]), _between(_plain_bounds(metrics[name]))) for name, title in shown
        ]
        if "coverage" in metrics:
            width = f", predicted \N{PLUS-MINUS SIGN} {plain(metrics.get('half_width'))}"
            figures.append(
                (
                    "True numbers in the interval",
                    percent(metrics["coverage"]["value"]),
                    f"{_between(_bounds_of(metrics['coverage']))}{width}",
                )
            )
    figures.append(("Trained and calibrated on", count(bundle.get("seen")), "different images"))
    return Section("answer", "Answer", [Prose((sentence,)), Figures(tuple(figures))])


def _between(bounds: str) -> str:
    """What stands below a value: which interval its bounds are of."""
    return bounds and f"95\u00a0% interval {bounds}"


def _said(found: Document) -> str:
    bounds = _bounds_of(found)
    return percent(found.get("value")) + (f" (95\u00a0% interval {bounds})" if bounds else "")


def _bounds_of(found: Document) -> str:
    return interval(found.get("low"), found.get("high"))


def _leaks(document: Document) -> Section | None:
    leakage = (document.get("evaluation") or {}).get("leakage") or {}
    trained, splits = leakage.get("trained_on") or {}, leakage.get("across_splits") or {}
    labels = leakage.get("label_conflicts") or {}
    if not leakage:
        return None
    lines = []
    if trained.get("images"):
        share = percent(trained.get("share"))
        were = "was" if trained["images"] == 1 else "were"
        lines.append(f"{count(trained['images'])} of these images ({share}) {were} trained on{_without(trained)}.")
    groups, across = leakage.get("trained_groups") or {}, leakage.get("groups_across_splits") or {}
    if groups.get("images"):
        share = percent(groups.get("share"))
        are = "is" if groups["images"] == 1 else "are"
        lines.append(
            f"{count(groups['images'])} of these images ({share}) {are} of {counted(groups['groups'], 'group')} of which other "
            f"images were trained on{_without(groups)}."
        )
    if splits.get("images"):
        lines.append(
            f"{counted(splits['images'], 'image', 'lies', 'lie')} in more than one split{_such_as(splits, 'split')}."
        )
    if across.get("groups"):
        lines.append(f"{counted(across['groups'], 'group', 'has', 'have')} images in more than one split.")
    if labels.get("images"):
        there = counted(labels["images"], "image", "is", "are")
        lines.append(f"{there} there more than once, with different labels{_such_as(labels, 'label')}.")
    clean = "None of these images was trained on, none lies in two splits, none carries two labels."
    return Section("leaks", "Leaks", [Prose(tuple(lines) or (clean,))])


def _such_as(leak: Document, side: str) -> str:
    """The first copies of an image and the sides that they are on, as the document names them."""
    shown = [" = ".join(f"{row['id']} ({row[side]})" for row in rows) for rows in leak.get("examples") or []]
    if not shown:
        return ""
    return f": {'; '.join(shown)}{'; ...' if leak['images'] > len(shown) else ''}"


def _without(leak: Document) -> str:
    """What the accuracy is without the images concerned, if that is known."""
    found = leak.get("accuracy_without")
    return "" if found is None else f"; without them the accuracy is {percent(found)}"


_SHARES = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "top_5", "ece")
_MEASURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "quadratic_kappa": KAPPA_TITLE,
    "auc": "AUC, one against the rest",
    "top_5": "true class among the first five",
    "log_loss": "log loss",
    "ece": "expected calibration error",
}


def details(metrics: Document, column: str, head: str, paint: Paint) -> Section | None:
    """What kinds of errors a head makes: its measures, the confusion matrix, the classes."""
    kept = errors(metrics, paint)
    return Section("details", f"{head} on {column} in detail" if head else "In detail", kept) if kept else None


def errors(metrics: Document, paint: Paint) -> list[Block]:
    """The confusion matrix, then the measures and the classes, which may stand side by side; or those of labels or numbers."""
    if "map" in metrics:
        of_labels = [precision_curves(metrics, paint), _measures_of(metrics, LABEL_TITLES), _labels(metrics)]
        return [block for block in of_labels if block]
    if "r2" in metrics:
        return [*number_plots(metrics, paint), _measures_of(metrics, NUMBER_TITLES)]
    blocks: list[Block | None] = [confusion_map(metrics, paint), _measures(metrics), _classes(metrics)]
    return [block for block in blocks if block]


def map_of_images(
    projection: Projection | None, images: Mapping[str, str], column: str, paint: Paint
) -> Section | None:
    """Where the images lie."""
    if projection is None or not projection.ids:
        return None
    return Section("map", "Map of the images", [feature_map(projection, images, column, paint)])


def mistakes(metrics: Document, images: Mapping[str, str]) -> Section | None:
    """The images that were named wrongly with the greatest confidence, or whose numbers are the furthest off."""
    blocks = worst(metrics, images)
    title = "Largest errors" if "r2" in metrics else "Most confident mistakes"
    return Section("mistakes", title, blocks) if blocks else None


def worst(metrics: Document, images: Mapping[str, str]) -> list[Block]:
    """Those images, and how many of how many they are."""
    found = metrics.get("mistakes") or {}
    if isinstance(found, list):
        words = "The images whose predictions are the furthest off. Some may be errors of the numbers rather than of the head."
        return [Prose((words,)), Gallery(tuple(_off(mistake, images) for mistake in found))] if found else []
    shown = found.get("most_confident") or []
    total = found.get("count")
    words = f"The {len(shown)} most confident of {count(total)} mistakes." if finite(total) else ""
    words += " Some may be errors of the labels rather than of the head. Per cent are the head's probability of what it answered."
    if metrics.get("calibrated") is False:
        words += " Probabilities are the head's own, not calibrated: they rank the mistakes, and say no more."
    gallery = Gallery(tuple(_picture(mistake, images) for mistake in shown))
    return [Prose((words.strip(),)), gallery] if shown else []


def rejects(document: Document, images: Mapping[str, str]) -> Section | None:
    """The images that could not be used, with why; pictures of those that can be shown all the same."""
    found = document.get("rejects") or {}
    shown = found.get("images") or []
    if not shown:
        return None
    more = f" The first {len(shown)} are shown." if found["count"] > len(shown) else ""
    words = f"{counted(found['count'], 'image', 'was', 'were')} rejected: no other part of this page counts them.{more}"
    pictures = (
        Picture(images.get(one["id"]), f"Image {one['id']}: {one['reason']}", one["id"], _reason(one["reason"]))
        for one in shown
    )
    return Section("rejects", "Rejects", [Prose((words,)), Gallery(tuple(pictures))])


def _reason(reason: object) -> tuple[str, ...]:
    """Why an image was rejected in two lines: its kind, such as ``truncated``, and what was seen of it."""
    kind, _, seen = str(reason).partition(": ")
    return tuple(filter(None, (kind, seen)))


def provenance(document: Document, facts: Document) -> Section | None:
    """How it was measured, and everything needed to do it again."""
    blocks: list[Block] = [Prose((str(document["protocol"]),))] if document.get("protocol") else []
    blocks += [Facts(title, values) for title, values in facts.items() if values]
    return Section("provenance", "How this was measured", blocks) if blocks else None


def _off(mistake: Document, images: Mapping[str, str]) -> Picture:
    """An image whose number was predicted wrongly."""
    id_, true, predicted = str(mistake.get("id", "")), *(plain(mistake.get(name)) for name in ("true", "predicted"))
    alt = f"Image {id_}: {true}, predicted {predicted}"
    return Picture(images.get(id_), alt, id_, (f"is {true}", f"predicted {predicted}"))


def _finding(mistake: Document, images: Mapping[str, str]) -> Picture:
    """An image in which a label was found that is not there, or was missed."""
    id_, label = str(mistake.get("id", "")), str(mistake["label"])
    sure = "" if mistake.get("probability") is None else f", {percent(mistake['probability'])}"
    said = (
        (f"has no {label}", f"said to have it{sure}") if mistake.get("predicted") else (f"has {label}", f"missed{sure}")
    )
    return Picture(images.get(id_), f"Image {id_}: {said[0]}, {said[1]}", id_, said)


def _picture(mistake: Document, images: Mapping[str, str]) -> Picture:
    if "label" in mistake:
        return _finding(mistake, images)
    id_, true, predicted = (str(mistake.get(name, "")) for name in ("id", "true", "predicted"))
    sure = percent(mistake.get("probability"))
    alt = f"Image {id_}: {true}, taken for {predicted} with probability {sure}"
    return Picture(images.get(id_), alt, id_, (f"is {true}", f"taken for {predicted}, {sure}"))


def _measures(metrics: Document) -> Table | None:
    rows = []
    for name, words in _MEASURES.items():
        found = metrics.get(name)
        if not isinstance(found, Mapping):
            continue
        if name in _SHARES:
            cell = bounded(found.get("value"), found.get("low"), found.get("high"))
        else:
            cell = TableCell(plain(found.get("value")), finite(found.get("value")))
        bounds = interval(found.get("low"), found.get("high")) if name in _SHARES else _plain_bounds(found)
        rows.append(
            (TableCell(words), TableCell(cell.text, cell.order), TableCell(bounds or str(found.get("reason", ""))))
        )
    if not rows:
        return None
    images = f" on {count(metrics['images'])} images" if finite(metrics.get("images")) else ""
    return Table(
        f"Measures{images}{_of_groups(metrics)}", ("Measure", "Value", _over(metrics)), tuple(rows), sortable=False
    )


def _of_groups(metrics: Document) -> str:
    return f", {counted(metrics['groups'], 'group')}" if metrics.get("groups") else ""


def _over(metrics: Document) -> str:
    return f"95\u00a0% interval over {'groups' if metrics.get('groups') else 'test images'}"


def _measures_of(metrics: Document, titles: Mapping[str, str]) -> Table:
    """Measures of labels or numbers, with their intervals over test images."""
    rows = []
    for name, words in titles.items():
        found = metrics.get(name)
        if found:
            is_share = titles is LABEL_TITLES or name == "coverage"
            value, bounds = (
                (percent(found["value"]), _bounds_of(found))
                if is_share
                else (plain(found["value"]), _plain_bounds(found))
            )
            cell = TableCell(bounds or str(found.get("reason", "")))
            rows.append((TableCell(words), TableCell(value, finite(found["value"])), cell))
    caption = f"Measures on {count(metrics.get('images'))} images{_of_groups(metrics)}"
    return Table(caption, ("Measure", "Value", _over(metrics)), tuple(rows), sortable=False)


def _labels(metrics: Document) -> Table:
    """A row for each label, those of the lowest average precision first."""
    entries = sorted(
        metrics["per_label"], key=lambda one: (one["ap"]["value"] is None, one["ap"]["value"], one["label"])
    )
    rows = []
    for one in entries:
        found = (one.get(name) or {} for name in ("ap", "auc", "f1", "ece"))  # bundles of before have no last one
        scores = (bounded(score.get("value"), score.get("low"), score.get("high")) for score in found)
        shares = (TableCell(percent(one.get(name)), finite(one.get(name))) for name in ("precision", "recall"))
        counts = (TableCell(count(one[name]), one[name]) for name in ("positive", "negative", "unknown"))
        threshold = TableCell(plain(one.get("threshold")), finite(one.get("threshold")))
        rows.append((TableCell(str(one["label"])), *scores, *shares, *counts, threshold))
    header = (
        "Label",
        "AP",
        "AUC",
        "F1",
        "Calibration error",
        "Precision",
        "Recall",
        "With",
        "Without",
        "Unknown",
        "Threshold (score)",
    )
    left = len(metrics["unmeasured"])
    without = f"; {count(left)} lack test images of a side and are not measured" if left else ""
    return Table(f"Each label, with 95\u00a0% intervals{without}", header, tuple(rows))


def _plain_bounds(found: Document) -> str:
    low, high = found.get("low"), found.get("high")
    return "" if finite(low) is None or finite(high) is None else f"{plain(low)} to {plain(high)}"


def _classes(metrics: Document) -> Table | None:
    found: Sequence[Document] = metrics.get("per_class") or []
    shares = ("recall", "precision", "f1", "auc")
    rows = tuple(
        (
            TableCell(str(row["class"])),
            *(TableCell(percent(row.get(name)), finite(row.get(name))) for name in shares),
            TableCell(count(row.get("support")), finite(row.get("support"))),
        )
        for row in found
    )
    return Table("Each class", ("Class", "Recall", "Precision", "F1", "AUC", "Images"), rows) if rows else None


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
    names, codes, styles = _colours_of(projection.labels)
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
        _summary(projection),
        tuple(panels),
        tuple(Key(name, styles[code], row=code) for code, name in enumerate(names)),
        chosen=True,
        filters=(shown.id, source.id),
        note="Point at a mark, or tap it, to see the image."
        + (
            " In t\N{NON-BREAKING HYPHEN}SNE neighbours mean something, distances between groups do not."
            if len(panels) > 1
            else ""
        ),
    )


def _colours_of(labels: tuple[str, ...]) -> tuple[list[str], list[int], list[Style]]:
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


def _summary(projection: Projection) -> str:
    drawn, total = len(projection.ids), projection.total
    which = (
        f"All {count(drawn)} images" if drawn == total else f"{count(drawn)} of {count(total)} images, drawn at random"
    )
    every = len(set(projection.labels))
    classes = (
        f"The {_CLASSES} most frequent of {count(every)} classes" if every > _CLASSES else f"{count(every)} classes"
    )
    return (
        f"{which}, placed so that images with similar features are near each other. {classes} are told "
        "apart by colour and marker. "
        f"The two principal components hold {percent(projection.kept)} of the variance."
    )
