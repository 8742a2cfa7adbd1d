"""The sections about one head: how good a bundle's is; of any, its confusions, the map, its mistakes, its provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.reporting.blocks import (
    Block,
    Facts,
    Figures,
    Gallery,
    Picture,
    Prose,
    Section,
    Table,
    TableCell,
    bounded,
    count,
    finite,
    interval,
    percent,
    plain,
)
from featurepipe.reporting.charts import confusion_map
from featurepipe.reporting.feature_map import feature_map
from featurepipe.reporting.images import Projection
from featurepipe.reporting.palette import Paint

Document = Mapping[str, Any]


def bundle_title(document: Document) -> str:
    """What the page is about."""
    bundle, evaluation = document.get("bundle") or {}, document.get("evaluation") or {}
    on = f" on {evaluation['dataset']}" if evaluation.get("dataset") else ""
    return f"How good is {bundle.get('family', 'the head')} on {bundle_column(document)}{on}?"


def bundle_column(document: Document) -> str:
    """The column or columns that the bundle's head reads."""
    return " + ".join(map(str, (document.get("bundle") or {}).get("columns") or [])) or "its features"


def bundle_sections(document: Document) -> list[Section]:
    """The answer, and the leaks between what it learned from and what it was tested on."""
    return [section for section in (_answer(document), _leaks(document)) if section]


def _answer(document: Document) -> Section | None:
    bundle, evaluation = document.get("bundle") or {}, document.get("evaluation") or {}
    metrics = evaluation.get("metrics") or {}
    accuracy = metrics.get("accuracy") or {}
    if finite(accuracy.get("value")) is None:
        return None
    bounds = interval(accuracy.get("low"), accuracy.get("high"))
    known = f", 95\u00a0% interval {bounds}" if bounds else ""
    scope = f" ({evaluation['scope']})" if evaluation.get("scope") else ""
    sentence = f"It names {percent(accuracy['value'])} of {count(metrics.get('images'))} images rightly{known}{scope}."
    balanced = metrics.get("balanced_accuracy") or {}
    figures = (
        ("Accuracy", percent(accuracy["value"]), bounds),
        ("Balanced accuracy", percent(balanced.get("value")), interval(balanced.get("low"), balanced.get("high"))),
        ("Classes", count(len(bundle.get("classes") or [])), ""),
        ("Trained on", count(bundle.get("seen")), "images"),
    )
    return Section("answer", "Answer", [Prose((sentence,)), Figures(figures)])


def _leaks(document: Document) -> Section | None:
    leakage = (document.get("evaluation") or {}).get("leakage") or {}
    trained, splits = leakage.get("trained_on") or {}, leakage.get("across_splits") or {}
    labels = leakage.get("label_conflicts") or {}
    if not leakage:
        return None
    lines = []
    if trained.get("images"):
        lines.append(
            f"{count(trained['images'])} of these images ({percent(trained.get('share'))}) were trained on; without them the "
            f"accuracy is {percent(trained.get('accuracy_without'))}."
        )
    if splits.get("images"):
        lines.append(f"{count(splits['images'])} images lie in more than one split.")
    if labels.get("images"):
        lines.append(f"{count(labels['images'])} images carry different labels in different rows.")
    clean = "None of these images was trained on, none lies in two splits, none carries two labels."
    return Section("leaks", "Leaks", [Prose(tuple(lines) or (clean,))])


_SHARES = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "top_5", "ece")
_MEASURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
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
    """The confusion matrix, then the measures and the classes, which may stand side by side."""
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
    """The images that were named wrongly with the greatest confidence."""
    blocks = worst(metrics, images)
    return Section("mistakes", "Most confident mistakes", blocks) if blocks else None


def worst(metrics: Document, images: Mapping[str, str]) -> list[Block]:
    """Those images, and how many of how many they are."""
    found = metrics.get("mistakes") or {}
    shown = found.get("most_confident") or []
    total = found.get("count")
    words = f"The {len(shown)} most confident of {count(total)} mistakes." if finite(total) else ""
    words += " Some may be errors of the labels rather than of the head."
    if metrics.get("calibrated") is False:
        words += " Probabilities are the head's own, not calibrated: they rank the mistakes, and say no more."
    gallery = Gallery(tuple(_picture(mistake, images) for mistake in shown))
    return [Prose((words.strip(),)), gallery] if shown else []


def provenance(document: Document, facts: Document) -> Section | None:
    """How it was measured, and everything needed to do it again."""
    blocks: list[Block] = [Prose((str(document["protocol"]),))] if document.get("protocol") else []
    blocks += [Facts(title, values) for title, values in facts.items() if values]
    return Section("provenance", "How this was measured", blocks) if blocks else None


def _picture(mistake: Document, images: Mapping[str, str]) -> Picture:
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
        f"Measures{images}", ("Measure", "Value", "95\u00a0% interval over test images"), tuple(rows), sortable=False
    )


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
