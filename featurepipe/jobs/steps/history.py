"""What earlier nights of the job did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurepipe.jobs.step import Night


def last_result(night: Night, step: str, **same: Any) -> Mapping[str, Any] | None:
    """What a step did, or had no need to do, when an earlier night of the job last came through it.

    Args:
        night: tonight.
        step: which step.
        same: entries of the result that must have these values, to tell several of a kind apart.

    Returns:
        Its result; None if no night has. A night on which it failed or was not reached does not count.
    """
    own = {"command": "run", "job": night.job.name, "dataset": night.dataset}
    for run in reversed(night.store.runs()):
        if run["run_id"] == night.run_id or any(run.get(name) != value for name, value in own.items()):
            continue
        for entry in run.get("steps", ()):
            result: Mapping[str, Any] = entry.get("result") or {}
            done = entry["step"] == step and entry["status"] in ("done", "skipped")
            if done and all(result.get(name) == value for name, value in same.items()):
                return result
    return None
