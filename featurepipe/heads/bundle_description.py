"""What a bundle is, as JSON values and as text: what ``featurepipe info BUNDLE`` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from featurepipe.heads.bundle import Bundle

_CLASSES_SHOWN = 8
_SHORT = 80  # longer lists and texts are for --json


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Sums up a bundle as JSON values: all it records, but neither the head's numbers nor the keys."""
    names = ("backbone", "space", "fingerprint", "columns", "width", "family", "params", "classes", "temperature")
    found = {name: getattr(bundle, name) for name in (*names, "metrics", "training", "software")}
    return {
        **found,
        "columns": list(bundle.columns),
        "classes": list(bundle.classes),
        "seen": len(bundle.seen),
        "own_weights": bundle.weights_file is not None,
    }


def bundle_text(bundle: Bundle) -> str:
    """A bundle on a dozen lines, for people."""
    weights = bundle.backbone["weights"]
    where = "" if weights != "file" else (", in the bundle" if bundle.weights_file else ", to be given when predicting")
    calibrated = "not calibrated" if bundle.temperature is None else f"temperature {bundle.temperature:.4g}"
    lines = {
        "backbone": f"{bundle.backbone['name']}, weights {weights}{where}",
        "space": f"{bundle.fingerprint[:12]} ({_pairs(bundle.space)})",
        "columns": f"{', '.join(bundle.columns)} ({bundle.width} values)",
        "head": f"{bundle.family} ({_pairs(bundle.params) or 'its defaults'}), {calibrated}",
        "classes": _classes(bundle.classes),
        "seen": f"{len(bundle.seen):,} images in training",
        "training": _pairs(bundle.training),
        "metrics": ", ".join(_measures(bundle.metrics)),
        "software": _pairs(bundle.software),
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items() if text)


def _classes(classes: tuple[str, ...]) -> str:
    more = f", ... ({len(classes)} in all)" if len(classes) > _CLASSES_SHOWN else ""
    return ", ".join(classes[:_CLASSES_SHOWN]) + more


def _pairs(values: Mapping[str, Any]) -> str:
    """The short plain values of a record, one after the other."""
    shown = {name: value for name, value in values.items() if not isinstance(value, dict | list)}
    return ", ".join(f"{name} {value}" for name, value in sorted(shown.items()) if len(str(value)) <= _SHORT)


def _measures(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each measure that is a number, or a number with its interval, at any depth."""
    for name, value in metrics.items():
        if isinstance(value, Mapping) and isinstance(value.get("value"), int | float):
            bounds = value.get("low"), value.get("high")
            interval = f" [{bounds[0]:.4g}, {bounds[1]:.4g}]" if None not in bounds else ""
            yield f"{prefix}{name} {value['value']:.4g}{interval}"
        elif isinstance(value, Mapping):
            yield from _measures(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name} {value:.4g}" if isinstance(value, float) else f"{prefix}{name} {value:,}"
