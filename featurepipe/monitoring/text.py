"""What ``featurepipe drift`` and ``featurepipe duplicates`` print, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.tables import share, table

_IDS = 5
_COLUMNS = 3
_CLASSES = 5
_GROUPS = 20
_IMAGES = 6


def drift_text(found: Mapping[str, Any]) -> str:
    """Sums up what `featurepipe.monitoring.drift.drift` returns: the verdict, the numbers, the images behind them."""
    sections = [_verdict(found), _columns(found["columns"]), *_images(found), _classes(found["classes"])]
    return "\n\n".join(section for section in sections if section)


def _verdict(found: Mapping[str, Any]) -> str:
    images, limits = found["images"], found["thresholds"]
    lines = [f"{found['dataset']}: {found['verdict']}"]
    if found["columns"] or found["classes"]:
        tests = [*found["columns"], *([found["classes"]] if found["classes"] else [])]
        least = min(test["adjusted"] for test in tests)
        fails = f", drift below {limits['fail']:g}" if limits["fail"] is not None else ""
        lines = [
            f"{lines[0]} (least adjusted p-value {_p(least)}; a warning below {limits['warn']:g}{fails})",
            f"{images['new']:,} images new since {found['reference']}, which has {images['reference']:,}",
        ]
    return "\n".join([*lines, *found["warnings"]])


def _columns(columns: Sequence[Mapping[str, Any]]) -> str:
    if not columns:
        return ""
    rows = [
        [
            one["column"],
            one["space"],
            _p(one["p_value"]),
            _p(one["adjusted"]),
            "-" if one["effect"] is None else f"{one['effect']:.2f}",
            f"{one['auc']:.2f}",
        ]
        for one in columns
    ]
    return (
        f"{table(['column', 'space', 'p-value', 'adjusted', 'mean moved', 'AUC'], rows)}\n"
        "mean moved: the distance between both means, in spreads of the reference; AUC: how often a new image is told "
        "from one of the reference, 0.5 is chance"
    )


def _images(found: Mapping[str, Any]) -> list[str]:
    """Images of the columns that moved, those of the least p-values first."""
    moved = [one for one in found["columns"] if one["adjusted"] < found["thresholds"]["warn"]]
    moved.sort(key=lambda one: (one["adjusted"], -one["auc"]))
    return [
        f"by {one['column']}, farthest from the reference: {_some(one['farthest'])}\n"
        f"{' ' * len(one['column'])}    most typical of what is new: {_some(one['typical'])}"
        for one in moved[:_COLUMNS]
    ]


def _classes(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = [
        [one["class"], share(one["reference"]), share(one["new"]), f"{100 * (one['new'] - one['reference']):+.1f}"]
        for one in found["classes"][:_CLASSES]
    ]
    return (
        f"predicted classes: p-value {_p(found['p_value'])}, adjusted {_p(found['adjusted'])}; "
        f"{share(found['total_variation'])} of the images moved to another class, by chance alone it is "
        f"{share(found['by_chance'])}\n{table(['class', 'reference', 'new', 'points'], rows)}"
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0001 else f"{value:.0e}"


def _some(ids: Sequence[str]) -> str:
    return ", ".join([*ids[:_IDS], *(["..."] if len(ids) > _IDS else [])])
