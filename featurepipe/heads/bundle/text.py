"""A bundle as text, and as JSON values: what it predicts, how well, and what it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featurepipe.display import counted, displayed, first_names, named_columns, table
from featurepipe.heads.bundle.files import CONTINUOUS, MULTILABEL
from featurepipe.heads.statistics.metrics import measures_text
from featurepipe.heads.statistics.multilabel import labels_text
from featurepipe.heads.statistics.regression import numbers_text
from featurepipe.heads.statistics.screening import screening_text

if TYPE_CHECKING:
    from featurepipe.heads.bundle.bundle import Bundle

_CLASSES_SHOWN = 8
_LABELS_SHOWN = 30
_SHORT = 40  # longer names are for --json


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Sums up a bundle as JSON values: all it records, but neither the head's numbers nor the keys."""
    names = (
        "backbone",
        "space",
        "fingerprint",
        "columns",
        "width",
        "family",
        "params",
        "classes",
        "target",
        "threshold",
        "ordered",
        "temperature",
    )
    found = {name: getattr(bundle, name) for name in (*names, "metrics", "training", "software")}
    return {
        **found,
        "columns": list(bundle.columns),
        "classes": list(bundle.classes),
        "seen": len(bundle.seen),
        **({} if bundle.grouping is None else {"groups": len(bundle.groups), "grouping": bundle.grouping}),
        "own_weights": bundle.weights_file is not None,
    }


def bundle_text(bundle: Bundle) -> str:
    """A bundle for people: what it needs, what it says, how it came about and how good it was on its test images."""
    weights = bundle.backbone["weights"]
    where = "" if weights != "file" else (", in the bundle" if bundle.weights_file else ", to be given when predicting")
    calibrated = (
        "not calibrated" if bundle.temperature is None else f"calibrated (temperature {bundle.temperature:.3g})"
    )
    if bundle.target_type == MULTILABEL:
        calibrated = labels_calibration_text(bundle.target.get("calibration") if bundle.target else None)
    elif bundle.target is not None:
        interval = bundle.target.get("interval")
        calibrated = "no prediction intervals" if interval is None else interval_text(interval)
    described = bundle.backbone.get("description") or {}
    params = ", ".join(f"{name}={value}" for name, value in bundle.params.items())
    lines = {
        "backbone": f"{bundle.backbone['name']}, weights {weights}{where}",
        "features": f"{named_columns(bundle.columns, described.get('bottleneck'))}: {bundle.width:,} values, {_space(bundle)}",
        "selected": selection_text(bundle.training["selection"]) if "selection" in bundle.training else "",
        "head": f"{bundle.family}{f' ({params})' if params else ''}, {calibrated}",
        "labels": f"{len(bundle.classes):,}: {_classes(bundle.classes)}" if bundle.target_type == MULTILABEL else "",
        "classes": ""
        if bundle.target
        else f"{len(bundle.classes):,}: {_classes(bundle.classes, ordered=bundle.ordered)}",
        "target": _target(bundle),
        "threshold": threshold_text(bundle.threshold) if bundle.threshold else "",
        "trained": _training(bundle),
        "software": ", ".join(f"{name} {version}" for name, version in bundle.software.items()),
    }
    text = "\n".join(f"{name:<9} {displayed(line)}" for name, line in lines.items() if line)
    tested = bundle.metrics.get("test")
    if not tested:
        return f"{text}\nno test images when it was trained; featurepipe evaluate measures it on others"
    by_type = {CONTINUOUS: numbers_text, MULTILABEL: labels_text}
    measures = by_type.get(bundle.target_type, measures_text)(tested)
    if "screening" in tested:
        heading = f"looking for {tested['screening']['positive']}:\n" if bundle.looked_for else ""
        measures = f"{measures}\n{heading}{screening_text(tested['screening'])}"
    return f"{text}\non the {counted(tested['images'], 'test image')} when it was trained:\n{measures}"


def labels_calibration_text(calibration: Mapping[str, Any] | None) -> str:
    """Says where probabilities and thresholds of several labels are from."""
    if calibration is None:
        return "not calibrated"
    lacking = len(calibration["uncalibrated"])
    but = f", but for {lacking:,} of them" if lacking else ""
    what = "a threshold" if lacking == len(calibration["thresholds"]) else "a probability and a threshold"
    but = but if what != "a threshold" else ""
    rule = calibration.get("rule", "f1")
    rule = "largest F1" if rule == "f1" else f"{rule}{', by the lower 95 % limit' if calibration.get('margin') else ''}"
    few, unreached = calibration.get("few", ()), calibration.get("unreached", ())
    more = f"; of {_names(few)} the threshold is a probability of 0.5, for lack of such images" if few else ""
    more += f"; WARNING: not reached for {_names(unreached)}" if unreached else ""
    return f"{what} ({rule}) for each label from {calibration['images']:,} validation images{but}{more}"


def label_thresholds_text(calibration: Mapping[str, Any]) -> str:
    """A table of what each label's threshold reaches on the validation images that chose it; empty for the largest F1."""
    if calibration.get("rule", "f1") == "f1":
        return ""
    rows = [
        [
            entry["label"],
            *(str(entry[name]) for name in ("true_positives", "false_negatives", "false_positives", "true_negatives")),
            *(_bounded(entry[name]) for name in ("sensitivity", "specificity", "ppv")),
            "" if entry["reached"] else "not reached",
        ]
        for entry in calibration["per_label"][:_LABELS_SHOWN]
        if "sensitivity" in entry
    ]
    more = len(calibration["per_label"]) - _LABELS_SHOWN
    titles = ["label", "found", "missed", "false alarms", "passed", "sensitivity", "specificity", "precision", ""]
    return table(titles, rows) + (f"\nand {more:,} more {'label' if more == 1 else 'labels'}" if more > 0 else "")


def _bounded(rate: Mapping[str, Any]) -> str:
    return "-" if rate["value"] is None else f"{rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})"


def _names(names: Sequence[str]) -> str:
    return f"{len(names):,} ({first_names(names, 5)})"


def threshold_text(threshold: Mapping[str, Any]) -> str:
    """Says from which probability on an image has which label, why, and what that reached where it was chosen."""
    limit = ", by the lower 95 % limit" if threshold["margin"] else ""
    rates = threshold["rates"]
    missed = "" if threshold["reached"] else f"; WARNING: {threshold['reason']}"
    return (
        f"{threshold['positive']} from a probability of {threshold['value']:.6g} on, for {threshold['wish']}{limit}: on the "
        f"{threshold['images']:,} validation images that chose it {_rate('sensitivity', rates)}, "
        f"{_rate('specificity', rates)}{missed}"
    )


def _rate(name: str, rates: Mapping[str, Any]) -> str:
    found = rates[name]
    return f"{name} {found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})"


def interval_text(interval: Mapping[str, Any]) -> str:
    """Says how wide prediction intervals are, and what of."""
    about = "about " if interval.get("refitted") else ""
    again = ", which the head was fitted on afterwards" if about else ""
    return (
        f"{about}{100 * interval['level']:g} % of new numbers are within {interval['half_width']:.4g} of the prediction "
        f"(from {interval['images']:,} validation images{again})"
    )


def _target(bundle: Bundle) -> str:
    return "" if bundle.target_type != CONTINUOUS else f"the number {bundle.target_name or '(without a name)'}"


def _space(bundle: Bundle) -> str:
    """What people tell feature spaces apart by."""
    known = [str(bundle.space["precision"])] if "precision" in bundle.space else []
    known += [f"stored as {bundle.space['dtype']}"] if "dtype" in bundle.space else []
    return ", ".join([*known, f"space {bundle.fingerprint[:12]}"])


def _classes(classes: tuple[str, ...], *, ordered: bool = False) -> str:
    names = [name if len(name) <= _SHORT else f"{name[: _SHORT - 3]}..." for name in classes[:_CLASSES_SHOWN]]
    return (" < " if ordered else ", ").join([*names, "..."] if len(classes) > len(names) else names)


def _training(bundle: Bundle) -> str:
    """On what, how many, when; copies of one image are counted once."""
    known = bundle.training
    where = f"on dataset {known['dataset']}, " if "dataset" in known else ""
    when = f", {str(known['when'])[:10]}" if "when" in known else ""
    how = f"; {known['split']}" if "split" in known else ""
    groups = (
        "" if bundle.grouping is None else f" of {counted(len(bundle.groups), 'group')} ({bundle.grouping['column']})"
    )
    return f"{where}{len(bundle.seen):,} different images{groups}{when}{how}"


def selection_text(found: Mapping[str, Any]) -> str:
    """One line: how many values a head was fitted on, of how many columns, and which columns have none of them.

    Args:
        found: as `featurepipe.training.selection.Selection.as_dict` gives it.
    """
    none = [column for column, count in found["columns"].items() if not count]
    used = len(found["columns"]) - len(none)
    most = sorted(found["columns"].items(), key=lambda pair: -pair[1])[:3]
    shown = ", ".join(f"{column} {count:,}" for column, count in most if count)
    without = f"; none of {first_names(none, 3)}" if none else ""
    return (
        f"kept {found['values']:,} of {found['of']:,} values ({100 * found['share']:g} %), in {used} of "
        f"{counted(len(found['columns']), 'column')}: {shown}{without}"
    )
