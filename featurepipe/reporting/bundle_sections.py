"""The sections that only a trained bundle has: how good it is, and what to know before believing that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurepipe.reporting.blocks import Figures, Prose, Section, count, finite, interval, percent

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
