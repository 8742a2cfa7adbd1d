"""What ``featurepipe train`` and ``featurepipe finetune`` print, as plain text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featurepipe.display import counted, first_names, named_columns, share, size, table
from featurepipe.heads.bundle.text import (
    interval_text,
    label_thresholds_text,
    labels_calibration_text,
    selection_text,
    threshold_text,
)
from featurepipe.heads.statistics.metrics import measures_text
from featurepipe.heads.statistics.multilabel import labels_text
from featurepipe.heads.statistics.regression import KAPPA_TITLE, numbers_text
from featurepipe.heads.statistics.screening import screening_text
from featurepipe.progress import spoken, took
from featurepipe.training.splits import NEAR_SHARE

_CLASSES_SHOWN = 10
_MEASURES = {
    "rmse": "RMSE",
    "map": "mean average precision",
    "accuracy": "accuracy",
    "quadratic_kappa": KAPPA_TITLE,
}


def cost_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe train --dry-run`` prints."""
    return "\n".join([*_task_lines(found), found["cost"]["text"], "dry run: nothing was written"])


def train_text(found: Mapping[str, Any], *, start_up: float = 0.0) -> str:
    """What ``featurepipe train`` prints; ``start_up`` are seconds of the command that the record does not count."""
    params = ", ".join(f"{name}={value}" for name, value in found["params"].items())
    protocol = f"; protocol {found['protocol']}" if "protocol" in found else ""
    lines = [
        found["split"],
        f"{found['head']} ({params or 'default parameters'}{protocol}), {_in_all(found, start_up)}",
    ]
    if found["cluster"]:
        lines.append(_cluster(found["cluster"]))
    if "selection" in found:
        lines.append(selection_text(found["selection"]))
        lines += [_shares(found["selection"])] if found["selection"]["tried"] else []
    if found["search"]:
        lines += [found["search"]["how"], _trials(found["search"]["trials"])]
    if "multilabel" in found:
        lines.append(labels_calibration_text(found["calibration"]))
    elif "target" in found:
        lines.append(interval_text(found["calibration"]) if found["calibration"] else "no prediction intervals")
    else:
        lines += calibration_lines(found["calibration"])
    if "multilabel" in found and found["calibration"]:
        lines += [said] if (said := label_thresholds_text(found["calibration"])) else []
    if "threshold" in found:
        lines.append(threshold_text(found["threshold"]))
    lines += [*tested_lines(found), *_near_lines(found)]
    return "\n".join([*lines, *_bundle_lines(found), _next(found["bundle"])])


def _near_lines(found: Mapping[str, Any]) -> list[str]:
    """Says that many test images have near copies among the training images, if so."""
    near = found.get("test_near")
    if near is None or near["share"] < NEAR_SHARE:
        return []
    return [
        f"{share(near['share'])} of the test images have a look-alike among the training images (cosine distance of at most "
        f"{near['distance']:.2g}); if they are frames or views of one thing, the score is too good: name what belongs together "
        "with --group COLUMN, or find it with featurepipe duplicates STORE --near auto --to FILE.csv and --group FILE.csv"
    ]


def _bundle_lines(found: Mapping[str, Any]) -> list[str]:
    warnings = [replaced_text(found)] if found.get("lost_classes") else []
    warnings += [left_out_text(found["left_out"])] if found.get("left_out") else []
    return [f"bundle {found['bundle']}", *(f"warning: {text}" for text in warnings)]


def replaced_text(found: Mapping[str, Any]) -> str:
    """Says that a head took the place of one that knew more classes."""
    lost = found["lost_classes"]
    what = "class" if len(lost) == 1 else "classes"
    return f"the head in {Path(found['bundle']).name} was replaced by one that no longer knows the {what} {first_names(lost, 5)}"


def left_out_text(left_out: Mapping[str, int]) -> str:
    """Says which classes are not learned, having too few images, and what to do."""
    named = first_names([f"{name} ({counted(count, 'image')})" for name, count in left_out.items()], 5)
    return (
        f"not learned, as too few images are of {'this class' if len(left_out) == 1 else 'these classes'}: {named}; give more, "
        f"or set min_class_size to {min(left_out.values())}"
    )


def _next(bundle: str) -> str:
    """The command that comes next."""
    command = f"featurepipe predict {shlex.quote(bundle)} IMAGES --to predictions.csv"
    return f"next: {command}   # IMAGES are new ones, as for featurepipe extract"


def _cluster(found: Mapping[str, Any]) -> str:
    places = "1 machine" if found["hosts"] == 1 else f"{found['hosts']:,} machines"
    workers = "1 worker" if found["workers"] == 1 else f"{found['workers']:,} workers"
    return f"on the cluster {found['scheduler']}: {workers} on {places}"


def _task_lines(found: Mapping[str, Any]) -> list[str]:
    counts, classes = found["counts"], found["classes"]
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(classes.items())[:_CLASSES_SHOWN])
    left_out = [f"{counts[name]:,} {name}" for name in ("unlabelled", "rejected") if counts[name]]
    left_out += [f"{name} ({count:,})" for name, count in found.get("left_out", {}).items()]
    columns = named_columns(found["columns"], found.get("bottleneck"))
    return [
        f"{found['dataset']}, {columns}: {counts['train']:,} images to train on, {counts['test']:,} to test"
        + (f"; left out: {', '.join(left_out)}" if left_out else ""),
        _target(found["target"])
        if "target" in found
        else _labels(found["multilabel"])
        if "multilabel" in found
        else f"{len(classes):,} {'ordered ' if 'ordered' in found else ''}classes: {shown}"
        f"{', ...' if len(classes) > _CLASSES_SHOWN else ''}",
        found["split"],
    ]


def _trials(trials: list[Mapping[str, Any]]) -> str:
    measure = next(name for name in _MEASURES if all(name in trial for trial in trials))
    rows = [
        [
            ", ".join(f"{k}={v}" for k, v in trial["params"].items()),
            f"{trial[measure]:{'.4g' if measure == 'rmse' else '.4f'}}",
        ]
        for trial in trials
    ]
    return table(["parameters", f"validation {_MEASURES[measure]}"], rows)


def _shares(selection: Mapping[str, Any]) -> str:
    measure = selection["measure"]
    rows = [
        [
            f"{100 * one['share']:g} %",
            f"{one['values']:,}",
            "-" if one["score"] is None else f"{one['score']:{'.4g' if measure == 'rmse' else '.4f'}}",
            one["why"] and f"not tried: {one['why']}",
        ]
        for one in selection["tried"]
    ]
    return table(["kept", "values", f"validation {_MEASURES[measure]}", ""], rows)


def _labels(found: Mapping[str, Mapping[str, int]]) -> str:
    shown = ", ".join(f"{name} ({counts['positive']:,})" for name, counts in list(found.items())[:_CLASSES_SHOWN])
    unknown = sum(counts["unknown"] for counts in found.values())
    more = ", ..." if len(found) > _CLASSES_SHOWN else ""
    return f"{counted(len(found), 'label')}: {shown}{more}" + (f"; {unknown:,} entries unknown" if unknown else "")


def _target(found: Mapping[str, float]) -> str:
    return (
        f"numbers from {found['least']:.4g} to {found['greatest']:.4g}, mean {found['mean']:.4g}, "
        f"deviation {found['deviation']:.4g}"
    )


def calibration_lines(found: Mapping[str, Any] | None) -> list[str]:
    """What calibration did to classes, and why an error that rose is no mistake; ``found`` is None without it."""
    if found is None:
        return ["not calibrated"]
    is_kept = found["temperature"] == 1

    def error(name: str) -> str:
        before, after = f"{found[f'{name}_before']:.4f}", f"{found[f'{name}_after']:.4f}"
        return before if is_kept else f"{before} before, {after} after"

    line = f"temperature {found['temperature']:.3g} from {found['rows']:,} validation images"
    line += f"; calibration error there {error('ece')}"
    if "test_ece_before" in found:
        line += f"{',' if is_kept else ';'} on the test images {error('test_ece')}"
    rose = [where for where in ("ece", "test_ece") if found.get(f"{where}_after", 0) > found.get(f"{where}_before", 0)]
    if not rose:
        return [line]
    why = "the temperature minimises the log-loss of the validation images, and the calibration error of few images says little"
    return [line, f"that error may rise, as here: {why}"]


def tested_lines(found: Mapping[str, Any]) -> list[str]:
    """How good a bundle was on its test images."""
    left_out = found["test_left_out"]
    if not found["test"] and left_out:
        return [f"none of the {left_out:,} labelled test images is of a class that was trained on: accuracy is unknown"]
    if not found["test"]:
        quality = "the error" if "target" in found else "precision" if "multilabel" in found else "accuracy"
        return [f"no test images: {quality} is unknown; featurepipe evaluate measures it on another dataset or split"]
    note = f" ({left_out:,} more are of classes that were not trained on)" if left_out else ""
    seen = found["test_seen"]
    warning = (
        [f"WARNING: copies of {seen:,} of the test images were trained on; featurepipe evaluate names them"]
        if seen
        else []
    )
    screening = []
    if "screening" in found["test"]:
        looked_for = found["test"]["screening"]
        screening = [f"looking for {looked_for['positive']}:"] if "multilabel" in found else []
        screening.append(screening_text(looked_for))
    return [
        *warning,
        f"on the {counted(found['test']['images'], 'test image')}{note}:",
        numbers_text(found["test"])
        if "target" in found
        else labels_text(found["test"])
        if "multilabel" in found
        else measures_text(found["test"]),
        *screening,
    ]


def dry_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe finetune --dry-run`` prints."""
    each = found["tuning"].get("cuts", [found["tuning"]])
    if "extraction" in found:
        lines = [
            found["extraction"]["text"],
            *(
                f"{_tuned(tuning)}; an epoch takes about {spoken(tuning['seconds_per_1000_images'])} for each 1,000 images"
                for tuning in each
            ),
        ]
    else:
        counts = found["counts"]
        lines = [
            f"{found['dataset']}: {counts['train']:,} images to learn from, {counts['validation']:,} to choose by, "
            f"{counts['test']:,} to test; {_split_of_tuning(found)}",
            *(f"{_tuned(tuning)}; an epoch takes about {spoken(tuning['seconds_per_epoch'])}" for tuning in each),
        ]
    lines += [found["stored_features"]["text"]] if "stored_features" in found else []
    return "\n".join([*lines, "dry run: nothing was written"])


def _in_all(found: Mapping[str, Any], start_up: float) -> str:
    """How long a command took, and how much of that went into loading libraries.

    Example:
        >>> _in_all({"seconds": 1.2}, 3.1), _in_all({"seconds": 1.2}, 0.04)
        ('4.3 s in all, 3.1 s of it for loading libraries', '1.2 s in all')
    """
    loading = f", {took(start_up)} of it for loading libraries" if start_up >= 0.95 else ""
    return f"{took(found['seconds'] + start_up)} in all{loading}"


def finetune_text(found: Mapping[str, Any], *, start_up: float = 0.0) -> str:
    """What ``featurepipe finetune`` prints; ``start_up`` as for `train_text`."""
    tuning = found["tuning"]
    run = tuning["runs"][tuning["kept_run"]]
    losses = tuning["mix_losses"]
    mixes = [{"share": float(x), "score": score, "loss": losses[x]} for x, score in tuning["mixes"].items()]
    several = f" (the best of {len(tuning['runs'])} runs)" if len(tuning["runs"]) > 1 else ""
    diverged = counted(tuning["diverged"], "run") if "diverged" in tuning else ""
    lines = [
        _split_of_tuning(found),
        f"{_tuned(tuning)}, {_in_all(found, start_up)}",
        f"ended after {len(run['history']) - 1} epochs{several}: {run['ended']}",
        *([f"{diverged} diverged, whose loss was not finite, and left nothing"] if diverged else []),
        _epochs(run["history"], tuning["measure"], "random" if tuning.get("scratch") else "frozen"),
        *([_by_cut(tuning)] if "from" in run else []),
        *([] if tuning.get("scratch") else [mix_text(mixes, tuning["mix"], tuning["measure"])]),
        *tested_lines(found),
        *_start_lines(tuning),
        *([found["stored_features"]["text"]] if "stored_features" in found else []),
        *_bundle_lines(found),
        _next(found["bundle"]),
    ]
    return "\n".join(lines)


def _split_of_tuning(found: Mapping[str, Any]) -> str:
    """How images were divided; those that are set aside choose, and calibrate in the end."""
    return str(found["split"]).replace("set aside to calibrate", "set aside, which choose and calibrate")


def _start_lines(tuning: Mapping[str, Any]) -> list[str]:
    """How the head on the frozen network did on the test images."""
    start = tuning.get("start_test")
    if start is None:
        return []
    images = counted(start["images"], "test image")
    return [
        f"before tuning, the head on the frozen network: {tuning['measure']} {start['score']:.4f} on the same {images}"
    ]


def _tuned(tuning: Mapping[str, Any]) -> str:
    blocks = tuning["blocks"]
    together = f", {tuning['processes']} processes together" if "processes" in tuning else ""
    softened = f"; {tuning['softened']}" if "softened" in tuning else ""
    if "augmentation" in tuning:
        return (
            f"all of {tuning['backbone']['name']}, {'from scratch' if tuning['scratch'] else 'from pretrained weights'}: "
            f"{tuning['parameters']:,} weights in {len(blocks)} blocks, from images ({tuning['augmentation']['text']}; BatchNorm "
            f"{tuning['batch_norm']}, {tuning['mixed_precision']} on {tuning['device']}"
            f"{together}{softened})"
        )
    return (
        f"{tuning['backbone']['name']} above {tuning['from']}: {tuning['parameters']:,} weights in {len(blocks)} blocks, from "
        f"activations of {size(tuning['activations'])}{', of mirrored images, too' if 'mirrored' in tuning else ''}{softened}"
    )


def _by_cut(tuning: Mapping[str, Any]) -> str:
    """The best of each cut."""
    best: dict[str, float] = {}
    for run in tuning["runs"]:
        best[run["from"]] = max(best.get(run["from"], run["score"]), run["score"])
    rows = [[cut, f"{score:.4f}", "kept" if cut == tuning["from"] else ""] for cut, score in best.items()]
    return table(["cut", f"best validation {tuning['measure']}", ""], rows)


def _epochs(history: list[Mapping[str, Any]], measure: str, start: str) -> str:
    rows = [
        [
            str(entry["epoch"]) if entry["epoch"] else start,
            "" if entry["train_loss"] is None else f"{entry['train_loss']:.4f}",
            f"{entry['loss']:.4f}",
            f"{entry['score']:.4f}",
        ]
        for entry in history
    ]
    return table(["epoch", "loss", "validation loss", f"validation {measure}"], rows)


def mix_text(mixes: Sequence[Mapping[str, float]], share: float, measure: str) -> str:
    """Which share of the tuned weights is kept, and how good each was on the validation images."""
    shown = ", ".join(f"{mix['share']:.0%} {mix['score']:.4f} ({mix['loss']:.4g})" for mix in mixes)
    of_all = (
        f"the smallest share whose {measure} and loss on the validation images are within a standard error of the best; "
        f"{measure} (loss) by share: {shown}"
    )
    if not share:
        return f"kept: the frozen network, tuning gained no more than a standard error ({of_all})"
    return f"kept: {share:.0%} of the tuned weights ({of_all})"
