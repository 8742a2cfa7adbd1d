"""What ``featurepipe drift`` and ``featurepipe duplicates`` print, as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featurepipe.display import counted, first_names, named_columns, share, table
from featurepipe.monitoring.standing_warnings import prediction_tests

_IDS = 5
_COLUMNS = 3
_CLASSES = 5
_LABELS = 10
_GROUPS = 20
_IMAGES = 6


def drift_text(found: Mapping[str, Any]) -> str:
    """Sums up what `featurepipe.monitoring.drift.drift` returns: the verdict, the numbers, the images behind them."""
    sections = [_verdict(found), _columns(found["columns"]), *_images(found), *_predictions(found)]
    return "\n\n".join(section for section in sections if section)


def duplicates_text(found: Mapping[str, Any]) -> str:
    """Sums up what `featurepipe.monitoring.duplicates.duplicates` returns: counts, then groups, those across splits first."""
    exact, near = found["exact"], found["near"]
    copies = f"{exact['copies']:,} {_are(exact['copies'], 'is a copy', 'are copies')} of another"
    lines = [f"{found['dataset']}: {_images_text(found['images'])}, {copies} ({_groups(exact)})"]
    if near is not None:
        how = "" if near["search"] == "exact" else f"; about {share(near['recall'])} of such pairs are found"
        column = named_columns(near["column"], near.get("bottleneck"))
        lines.append(f"within {near['distance']:.3g} of another by {column}: {_groups(near)}{how}")
    else:
        lines.append("images nearly alike were not looked for; to do so: --near auto")
    lines += [f"WARNING: {text}" for text in found["warnings"]]
    sections = ["\n".join(lines)]
    sections += [_listing(kind) for kind in (exact, near) if kind is not None and kind["listed"]]
    if found["file"]:
        sections.append(f"file {found['file']}")
    return "\n\n".join(sections)


def _groups(kind: Mapping[str, Any]) -> str:
    counted = f"{kind['groups']:,} {_are(kind['groups'], 'group', 'groups')}, {_images_text(kind['images'])}"
    odd = [(kind["across_splits"], "across splits"), (kind["label_conflicts"], "with different labels")]
    return ", ".join([counted, *(f"{count:,} {what}" for count, what in odd if count)])


def _listing(kind: Mapping[str, Any]) -> str:
    """Every group across splits, and of the others as many as make a screen."""
    groups = kind["listed"]
    shown = max(_GROUPS, sum(group["across_splits"] for group in groups))
    lines = [_group(group) for group in groups[:shown]]
    left = kind["groups"] - len(lines)
    return "\n".join([*lines, *([f"... {left:,} more; write all of them: --to FILE"] if left else [])])


def _group(group: Mapping[str, Any]) -> str:
    images = group["images"]
    marks = [
        mark for name, mark in (("across_splits", "ACROSS SPLITS"), ("label_conflict", "LABELS DIFFER")) if group[name]
    ]
    sides = ["split"] * group["across_splits"] + ["label"] * group["label_conflict"]
    named = [_image(image, sides) for image in _each_side_first(images, sides)]
    sign = " = " if group["kind"] == "exact" else " ~ "
    return f"{', '.join(marks)}{': ' if marks else ''}{first_names(named, _IMAGES, apart=sign)}"


def _each_side_first(images: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> list[Mapping[str, Any]]:
    """The images of a group, with one of each split or label that it straddles before all others."""
    seen: set[tuple[Any, ...]] = set()
    first: list[Mapping[str, Any]] = []
    rest: list[Mapping[str, Any]] = []
    for image in images:
        side = tuple(image[name] for name in sides)
        (rest if side in seen else first).append(image)
        seen.add(side)
    return first + rest


def _image(image: Mapping[str, Any], sides: Sequence[str]) -> str:
    known = [image[name] or "none" for name in sides]
    return f"{image['id']} ({', '.join(known)})" if known else str(image["id"])


def _images_text(count: int) -> str:
    return f"{count:,} {_are(count, 'image', 'images')}"


def _are(count: int, one: str, several: str) -> str:
    return one if count == 1 else several


def _verdict(found: Mapping[str, Any]) -> str:
    images, limits = found["images"], found["thresholds"]
    lines = [f"{found['dataset']}: {found['verdict']}"]
    if tests := [*found["columns"], *(test for _, test, _ in prediction_tests(found))]:
        least = min(test["adjusted"] for test in tests)
        fails = f", drift below {limits['fail']:g}" if limits["fail"] is not None else ""
        lines = [
            f"{lines[0]} (least adjusted p-value {_p(least)}; a warning below {limits['warn']:g}{fails})",
            f"{counted(images['new'], 'image')} new since {found['reference']}, which has {images['reference']:,}",
        ]
        if groups := found["groups"]:
            counts = f"{groups['new']:,} new against {groups['reference']:,} of the reference"
            lines.append(f"compared by groups ({groups['column']}): {counts}")
    return "\n".join([*lines, *found["warnings"]])


def _columns(columns: Sequence[Mapping[str, Any]]) -> str:
    if not columns:
        return ""
    rows = [
        [
            named_columns(one["column"], one.get("bottleneck")),
            one["space"],
            _p(one["p_value"]),
            _p(one["adjusted"]),
            f"{one['effect']:.2f}",
            f"{one['auc']:.2f}",
        ]
        for one in columns
    ]
    return (
        f"{table(['column', 'space', 'p-value', 'adjusted', 'mean moved', 'AUC'], rows)}\n"
        "mean moved: the distance between both means, in standard deviations of the reference; AUC: how often a new image "
        "is told from one of the reference, 0.5 is chance"
    )


def _images(found: Mapping[str, Any]) -> list[str]:
    """Images of the columns that moved, those of the least p-values first."""
    moved = [one for one in found["columns"] if one["adjusted"] < found["thresholds"]["warn"]]
    moved.sort(key=lambda one: (one["adjusted"], -one["auc"]))
    named = [(named_columns(one["column"], one.get("bottleneck")), one) for one in moved[:_COLUMNS]]
    return [
        f"by {name}, farthest from the reference: {_some(one['farthest'])}\n"
        f"{' ' * len(name)}    most typical of what is new: {_some(one['typical'])}"
        for name, one in named
    ]


def _predictions(found: Mapping[str, Any]) -> list[str]:
    kinds = {"classes": _classes, "labels": _labels, "numbers": _numbers}
    return [
        f"predicted {kind}: p-value {_p(test['p_value'])}, adjusted {_p(test['adjusted'])}; {text(test)}"
        for kind, text in kinds.items()
        if (test := found.get(kind))
    ]


def _classes(found: Mapping[str, Any]) -> str:
    rows = [
        [one["class"], share(one["reference"]), share(one["new"]), f"{100 * (one['new'] - one['reference']):+.1f}"]
        for one in found["classes"][:_CLASSES]
    ]
    return (
        f"{share(found['total_variation'])} of the images moved to another class, by chance alone it is "
        f"{share(found['by_chance'])}\n{table(['class', 'reference', 'new', 'points'], rows)}"
    )


def _labels(found: Mapping[str, Any]) -> str:
    """The labels of the least p-values: rates with 95 % intervals, and what is not shown."""
    shown = found["labels"][:_LABELS]
    rows = [
        [
            one["label"],
            _with_limits(one["reference"], share),
            _with_limits(one["new"], share),
            _with_limits(one["change"], _points),
            _p(one["adjusted"]),
        ]
        for one in shown
    ]
    lines = [f"a rate changed by {share(found['effect'])} at most"]
    if rows:
        lines.append(table(["label", "reference", "new", "points", "adjusted"], rows))
        lines.append("rates with 95 % intervals; adjusted over the labels (Benjamini-Hochberg)")
    if found["tested"] > len(shown):
        lines.append(
            f"{found['tested'] - len(shown):,} more labels of greater p-values are not shown; --json lists 100 labels"
        )
    if found["constant"]:
        constant = found["constant"]
        lines.append(
            f"{constant:,} {_are(constant, 'label is', 'labels are')} predicted for no image, or for all, on both sides"
        )
    return "\n".join(lines)


def _numbers(found: Mapping[str, Any]) -> str:
    rows = [[f"{one['quantile']:.0%}", _number(one["reference"]), _number(one["new"])] for one in found["quantiles"]]
    return (
        f"the mean of {found['target']} changed by {_with_limits(found['change'], _signed)}, KS distance {found['ks']:.2f}, "
        f"Wasserstein distance {_number(found['wasserstein'])} ({found['effect']:.2f} standard deviations of the reference)\n"
        f"{table(['quantile', 'reference', 'new'], rows)}"
    )


def _with_limits(found: Mapping[str, float], text: Callable[[float], str]) -> str:
    return f"{text(found['value'])} ({text(found['low'])} to {text(found['high'])})"


def _points(part: float) -> str:
    return f"{100 * part:+.1f}"


def _signed(value: float) -> str:
    return f"{value:+.4g}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0001 else f"{value:.0e}"


def _some(ids: Sequence[str]) -> str:
    return ", ".join([*ids[:_IDS], *(["..."] if len(ids) > _IDS else [])])
