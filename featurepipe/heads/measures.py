"""The measures of a score table (``metrics.score_table``) as text: one set of names wherever people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.tables import table

_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auc": "AUC, one vs rest",
    "log_loss": "log-loss",
    "ece": "calibration error",
}


def measures_text(metrics: Mapping[str, Any]) -> str:
    """A table of measures with their intervals, and the reason where one has no value.

    Args:
        metrics: What ``score_table`` returns, or a part of it.
    """
    tops = {name: name.replace("_", "-") + " accuracy" for name in metrics if name.startswith("top_")}
    rows, reasons = [], []
    for name, title in {"accuracy": "accuracy", **tops, **_TITLES}.items():
        found = metrics.get(name, {})
        if found.get("value") is not None:
            limits = (
                found.get("reason", "") if found.get("low") is None else f"{found['low']:.4f} to {found['high']:.4f}"
            )
            rows.append([title, f"{found['value']:.4f}", limits])
        elif found and not name.startswith("top_"):  # of few classes nobody expects it
            reasons.append(f"{title}: none, {found['reason']}")
    interval = "95 % interval" if any(row[2] for row in rows) else ""
    untested = metrics.get("untested", [])
    if untested:
        reasons.append(untested_text(untested))
    return "\n".join([table(["measure", "value", interval], rows), *reasons])


def untested_text(classes: Sequence[str]) -> str:
    """Names the classes of which no image was scored."""
    more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
    return f"classes without a test image, about which the scores say nothing: {', '.join(classes[:10])}{more}"
