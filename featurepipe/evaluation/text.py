"""An evaluation as plain text: warnings first, then measures, classes, confusions and mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featurepipe.display import counted, first_names, named_columns, share, table
from featurepipe.heads.bundle.files import MULTILABEL
from featurepipe.heads.bundle.text import interval_text, labels_calibration_text
from featurepipe.heads.statistics.metrics import measures_text
from featurepipe.heads.statistics.multilabel import labels_text
from featurepipe.heads.statistics.regression import numbers_text
from featurepipe.heads.statistics.screening import screening_text

MATRIX_CLASSES = 20
"""Classes up to which the confusion matrix is shown; past it the most frequent confusions."""
MATRIX_WIDTH = 132
"""Columns of text that the matrix may take."""

_ROWS = 10


def text(record: Mapping[str, Any]) -> str:
    """What ``featurepipe evaluate`` prints of ``evaluate(...)``."""
    metrics = record["metrics"]
    target = record["bundle"].get("target") or {}
    if target.get("type") == MULTILABEL:
        screening = [said] if (said := _screening(metrics.get("screening"))) else []
        return "\n\n".join([_heading(record), *_warnings(record), labels_text(metrics), *screening])
    if target:
        numeric = [_heading(record), *_warnings(record), numbers_text(metrics), _largest_errors(metrics)]
        return "\n\n".join(section for section in numeric if section)
    sections = [
        _heading(record),
        _own_classes(record.get("own_classes")),
        *_warnings(record),
        measures_text(metrics),
        _screening(metrics.get("screening")),
        _classes(metrics["per_class"]),
        _confusion(metrics),
        _mistakes(metrics),
    ]
    return "\n\n".join(section for section in sections if section)


def _heading(record: Mapping[str, Any]) -> str:
    counts, bundle = record["counts"], record["bundle"]
    unknown, copies = counts["unknown_classes"], counts["duplicates"]
    is_own = record.get("own_classes") is not None
    head = "own classifier" if is_own else bundle["head"]
    parts = [f"{_images(counts['scored'])} scored"]
    parts += [f"{counts[name]:,} {name}" for name in ("unlabelled", "rejected") if counts[name]]
    if unknown:
        strange = "of labels that mean no class of the network" if is_own else "of classes the bundle does not know"
        parts.append(f"{sum(unknown.values()):,} left out, {strange}: {_some(list(unknown))}")
    if counts["unmatched"]:
        parts.append(f"{counts['unmatched']:,} of the given labels fit no image")
    if copies:
        parts.append(f"{copies:,} of the scored {_are(copies, 'is a copy', 'are copies')} of another")
    heat = bundle["temperature"]
    calibrated = "not calibrated" if heat is None else f"calibrated (temperature {heat:.3g})"
    what = f"{bundle['classes']} classes, {calibrated}"
    target = bundle.get("target") or {}
    if target.get("type") == MULTILABEL:
        what = f"{counted(bundle['classes'], 'label')}, {labels_calibration_text(target['calibration'])}"
    elif target:
        interval = bundle["target"].get("interval")
        what = f"the number {bundle['target']['column']}, {interval_text(interval) if interval else 'no prediction intervals'}"
    return (
        f"{record['dataset']}, {record['scope']}: {', '.join(parts)}\n"
        f"{head} on {bundle['backbone']} {named_columns(bundle['columns'], bundle.get('bottleneck'))}, {what}"
    )


def _own_classes(found: Mapping[str, Any] | None) -> str:
    """Of a network as it is: which labels are classes, and how often another class was the answer."""
    if found is None:
        return ""
    labels, several = len(found["matched"]) + len(found["unmatched"]), found["classes"]
    lines = [f"{len(found['matched'])} of {counted(labels, 'label')} are meant by classes of the network"]
    if found["unmatched"]:
        lines[0] += f"; not: {first_names(found['unmatched'], _ROWS)}"
    if found["without_images"]:
        lines.append(f"labels of the mapping that no image has: {first_names(found['without_images'], _ROWS)}")
    if found["among_labels"]:
        lines.append(f"the other {several:,} classes are left out of the choice")
    elif found["answers"]:
        named = [f"{name} ({count:,})" for name, count in found["answers"].items()]
        count = sum(found["answers"].values())
        lines.append(
            f"{_images(count)} got one of the {several:,} classes without a label, a wrong answer: {first_names(named, _ROWS)}"
        )
    return "\n".join(lines)


def _warnings(record: Mapping[str, Any]) -> list[str]:
    found = record["leakage"]
    kinds = [
        _trained_on(found["trained_on"]),
        _trained_groups(found.get("trained_groups") or {}),
        _groups_across(found.get("groups_across_splits") or {}),
        _across_splits(found["across_splits"]),
        _conflicts(found["label_conflicts"]),
    ]
    return ["\n".join(lines) for lines in kinds if lines]


def _trained_on(found: Mapping[str, Any]) -> list[str]:
    count = found["images"]
    if not count:
        return []
    if "accuracy_with" not in found:  # of numbers
        part = share(found["share"]) if found["share"] >= 0.001 else "under 0.1 %"
        return [
            f"WARNING: the head was trained on {count:,} of these images ({part}): {_some(found['ids'])}",
            f"  every measure below includes {_are(count, 'it', 'them')}",
        ]
    without = found["accuracy_without"]
    others = f"without {_are(count, 'it', 'them')} {without:.4f}" if without is not None else "no other image is left"
    part = share(found["share"]) if found["share"] >= 0.001 else "under 0.1 %"
    return [
        f"WARNING: the head was trained on {count:,} of these images ({part}): {_some(found['ids'])}",
        f"  accuracy {found['accuracy_with']:.4f}, {others}; every measure below includes {_are(count, 'it', 'them')}",
    ]


def _trained_groups(found: Mapping[str, Any]) -> list[str]:
    if not found.get("images"):
        return []
    part = share(found["share"]) if found["share"] >= 0.001 else "under 0.1 %"
    count = found["groups"]
    lines = [
        f"WARNING: the head was trained on other images of {count:,} {_are(count, 'group', 'groups')} that "
        f"{found['images']:,} of these images are of ({part}): {_some(found['examples'])}"
    ]
    if "accuracy_with" in found:
        without = found["accuracy_without"]
        others = (
            f"{without:.4f} without all of these groups" if without is not None else "no image of another group is left"
        )
        lines.append(f"  accuracy {found['accuracy_with']:.4f}, {others}; every measure below includes them")
    return lines


def _across_splits(found: Mapping[str, Any]) -> list[str]:
    if not found["images"]:
        return []
    pairs = ", ".join(f"{' and '.join(pair['splits'])} share {pair['images']:,}" for pair in found["pairs"])
    return [
        f"WARNING: {_images(found['images'])} of the dataset with copies in several splits ({pairs})",
        *_examples(found, lambda row: f"{row['id']} ({row['split']})"),
    ]


def _groups_across(found: Mapping[str, Any]) -> list[str]:
    if not found.get("groups"):
        return []
    named = [f"{one['group']} ({' and '.join(one['splits'])})" for one in found["examples"]]
    count = found["groups"]
    return [f"WARNING: {count:,} {_are(count, 'group', 'groups')} with images in several splits: {_some(named)}"]


def _conflicts(found: Mapping[str, Any]) -> list[str]:
    if not found["images"]:
        return []
    return [
        f"WARNING: {_images(found['images'])} of the dataset with copies under different labels",
        *_examples(found, lambda row: f"{row['id']} ({row['label']})"),
    ]


def _examples(found: Mapping[str, Any], show: Callable[[Mapping[str, Any]], str]) -> list[str]:
    lines = ["  " + " = ".join(show(row) for row in rows) for rows in found["examples"]]
    return [*lines, "  ..."] if found["images"] > len(lines) else lines


def _classes(per_class: Sequence[Mapping[str, Any]]) -> str:
    shown, note = list(per_class), ""
    if len(shown) > MATRIX_CLASSES:
        supported = [row for row in shown if row["support"]]
        shown = sorted(supported, key=lambda row: (row["f1"], -row["support"]))[:_ROWS]
        note = f"the {len(shown)} classes of lowest F1, of {len(per_class)}\n"
    rows = [
        [row["class"], row["support"], *(_number(row[name]) for name in ("precision", "recall", "f1", "auc"))]
        for row in shown
    ]
    return note + table(["class", "images", "precision", "recall", "F1", "AUC"], rows)


def _confusion(metrics: Mapping[str, Any]) -> str:
    names, counts = metrics["confusion"]["classes"], metrics["confusion"]["counts"]
    if len(names) <= MATRIX_CLASSES:
        matrix = _matrix(names, counts)
        if max(map(len, matrix.splitlines())) <= MATRIX_WIDTH:
            return "rows are true classes, columns predicted ones\n" + matrix
    pairs = metrics["confused"][:_ROWS]
    if not pairs:
        return ""
    rows = [[pair["true"], pair["predicted"], pair["count"]] for pair in pairs]
    return "most frequent confusions\n" + table(["true", "predicted", "images"], rows)


def _matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Columns are numbered where their names would not fit; a dot is a zero."""
    wide = max(len(name) for name in names) > 6 or len(names) > 12
    heads = [str(number) for number in range(1, len(names) + 1)] if wide else list(names)
    width = max([*(len(head) for head in heads), *(len(f"{cell}") for row in counts for cell in row)])
    titles = [f"{head} {name}" if wide else name for head, name in zip(heads, names, strict=True)]
    cells = [[(str(cell) if cell else ".").rjust(width) for cell in row] for row in counts]
    return table(
        ["", *(head.rjust(width) for head in heads)], [[t, *row] for t, row in zip(titles, cells, strict=True)]
    )


def _mistakes(metrics: Mapping[str, Any]) -> str:
    found = metrics["mistakes"]
    if not found["count"]:
        return "no mistakes"
    shown = found["most_confident"][:_ROWS]
    rows = [[row["id"], row["true"], row["predicted"], f"{row['probability']:.4f}"] for row in shown]
    title = (
        f"the {len(rows)} most confident of {found['count']:,} mistakes\n" if len(rows) > 1 else "the only mistake\n"
    )
    return title + table(["id", "true", "predicted", "probability"], rows)


def _largest_errors(metrics: Mapping[str, Any]) -> str:
    shown = metrics["mistakes"][:_ROWS]
    rows = [[row["id"], f"{row['true']:.6g}", f"{row['predicted']:.6g}"] for row in shown]
    return f"the {len(rows)} largest errors\n" + table(["id", "true", "predicted"], rows) if len(rows) > 1 else ""


def _screening(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    without = "a half" if found.get("label") else "the more probable class; featurepipe train --threshold chooses"
    how = "the bundle's threshold" if found["chosen"] else without
    return (
        f"looking for {found['positive']} ({found['positives']:,} of {_images(found['images'])}), from a probability of "
        f"{found['threshold']:.6g} on ({how})\n{screening_text(found)}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _images(count: int) -> str:
    return f"{count:,} {_are(count, 'image', 'images')}"


def _are(count: int, one: str, several: str) -> str:
    return one if count == 1 else several


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names)
