"""What a bundle is, as JSON values and as text: what ``featurepipe info BUNDLE`` shows."""

from __future__ import annotations

from typing import Any

from featurepipe.display import displayed
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.metrics import measures_text

_CLASSES_SHOWN = 8
_SHORT = 40  # longer names are for --json


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
    """A bundle for people: what it needs, what it says, how it came about and how good it was on its test images."""
    weights = bundle.backbone["weights"]
    where = "" if weights != "file" else (", in the bundle" if bundle.weights_file else ", to be given when predicting")
    calibrated = (
        "not calibrated" if bundle.temperature is None else f"calibrated (temperature {bundle.temperature:.3g})"
    )
    params = ", ".join(f"{name}={value}" for name, value in bundle.params.items())
    lines = {
        "backbone": f"{bundle.backbone['name']}, weights {weights}{where}",
        "features": f"{' + '.join(bundle.columns)}: {bundle.width:,} values, {_space(bundle)}",
        "head": f"{bundle.family}{f' ({params})' if params else ''}, {calibrated}",
        "classes": f"{len(bundle.classes):,}: {_classes(bundle.classes)}",
        "trained": _training(bundle),
        "software": ", ".join(f"{name} {version}" for name, version in bundle.software.items()),
    }
    text = "\n".join(f"{name:<9} {displayed(line)}" for name, line in lines.items() if line)
    tested = bundle.metrics.get("test")
    if not tested:
        return f"{text}\nno test images when it was trained; featurepipe evaluate measures it on others"
    return f"{text}\non the {tested['images']:,} test images when it was trained:\n{measures_text(tested)}"


def _space(bundle: Bundle) -> str:
    """What people tell feature spaces apart by."""
    known = [str(bundle.space[name]) for name in ("precision", "dtype") if name in bundle.space]
    return ", ".join([*known, f"space {bundle.fingerprint[:12]}"])


def _classes(classes: tuple[str, ...]) -> str:
    names = [name if len(name) <= _SHORT else f"{name[: _SHORT - 3]}..." for name in classes[:_CLASSES_SHOWN]]
    return ", ".join([*names, "..."] if len(classes) > len(names) else names)


def _training(bundle: Bundle) -> str:
    """On what, how many, when; copies of one image are counted once."""
    known = bundle.training
    where = f"on dataset {known['dataset']}, " if "dataset" in known else ""
    when = f", {str(known['when'])[:10]}" if "when" in known else ""
    how = f"; {known['split']}" if "split" in known else ""
    return f"{where}{len(bundle.seen):,} different images{when}{how}"
