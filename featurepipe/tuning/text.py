"""What ``featurepipe finetune`` prints, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurepipe.display import size, table
from featurepipe.progress import spoken
from featurepipe.training.text import tested_lines


def dry_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe finetune --dry-run`` prints."""
    counts = found["counts"]
    return "\n".join(
        [
            f"{found['dataset']}: {counts['train']:,} images to learn from, {counts['validation']:,} to choose by, "
            f"{counts['test']:,} to test; {found['split']}",
            _tuned(found["tuning"]),
            "dry run: nothing was written",
        ]
    )


def finetune_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe finetune`` prints."""
    tuning = found["tuning"]
    run = tuning["runs"][tuning["kept_run"]]
    several = f" (the best of {len(tuning['runs'])} runs)" if len(tuning["runs"]) > 1 else ""
    lines = [
        found["split"],
        f"{_tuned(tuning)}, {spoken(found['seconds'])} in all",
        f"ended after {len(run['history']) - 1} epochs{several}: {run['ended']}",
        _epochs(run["history"], tuning["measure"]),
        _mixes(tuning),
        *tested_lines(found),
        f"bundle {found['bundle']}",
    ]
    return "\n".join(lines)


def _tuned(tuning: Mapping[str, Any]) -> str:
    blocks = tuning["blocks"]
    return (
        f"{tuning['backbone']['name']} above {tuning['from']}: {tuning['parameters']:,} weights in {len(blocks)} blocks, from "
        f"activations of {size(tuning['activations'])}"
    )


def _epochs(history: list[Mapping[str, Any]], measure: str) -> str:
    rows = [
        [
            str(entry["epoch"]) if entry["epoch"] else "frozen",
            "" if entry["train_loss"] is None else f"{entry['train_loss']:.4f}",
            f"{entry['loss']:.4f}",
            f"{entry['score']:.4f}",
        ]
        for entry in history
    ]
    return table(["epoch", "loss", "validation loss", f"validation {measure}"], rows)


def _mixes(tuning: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{float(share):.0%} {score:.4f}" for share, score in tuning["mixes"].items())
    if not tuning["mix"]:
        return (
            f"kept: the frozen network, which is best on the validation images ({tuning['measure']} by share of the tuned "
            f"weights: {shown}); tuning gained nothing there"
        )
    measure, mix = tuning["measure"], tuning["mix"]
    return f"kept: {mix:.0%} of the tuned weights (validation {measure} by share of the tuned weights: {shown})"
