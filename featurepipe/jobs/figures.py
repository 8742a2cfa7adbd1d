"""What a run record counts of a night: images, seconds and rates of its extractions, as pure functions of their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from featurepipe import records
from featurepipe.jobs.validation import in_keys

Run: TypeAlias = Mapping[str, Any]
"""The record of an extraction."""

_SUMMED = ("computed", "read")
_COUNTED = ("listed", "known", "rejected")
_STAGES = ("read", "decode", "forward", "write", "waiting")
_NAMED = 3
"""New rejects that the record names; each extraction's own record names more."""


def figures_of(extractions: Sequence[Run], *, listing: float, wall: float) -> dict[str, Any]:
    """The figures of a night, as plain JSON values.

    Args:
        extractions: all of the night, in their order, also those that failed.
        listing: seconds it took to list the source.
        wall: seconds of the whole run.
    """
    seconds, counts = _seconds(extractions, listing, wall), _counts(extractions)
    computing = seconds["extract"]
    device = next((run["machine"]["device"] for run in extractions), "cpu")
    return {
        "counts": counts,
        "counts_by_space": {run["space"]: _counts_of(run, extractions) for run in _last_tries(extractions)},
        "changes": next((run["changes"] for run in extractions if run.get("changes")), {}),
        "new_rejects": _new_rejects(extractions),
        "seconds": seconds,
        "images_per_second": round(counts["computed"] / computing, 2) if computing else None,
        "verdict": in_keys(records.verdict(seconds, sum(map(_busy, extractions)), device=device), "extract"),
    }


def _busy(run: Run) -> float:
    """Seconds that an extraction's stages are shares of: its own, or those of all workers of a cluster together."""
    workers = run.get("cluster", {}).get("workers", ())
    return sum(worker["seconds"] for worker in workers) if workers else float(run["seconds"].get("wall", 0.0))


def done_ones(extractions: Sequence[Run]) -> list[Run]:
    """Those that came to their end, and left a snapshot."""
    return [run for run in extractions if run["status"] == "done"]


def _counts(extractions: Sequence[Run]) -> dict[str, int]:
    """Images listed, known and rejected in the first feature space, computed and read in all."""
    first = next(iter(done_ones(extractions) or extractions[-1:]), None)
    counts = dict.fromkeys(_COUNTED, 0) if first is None else _counts_of(first, extractions)
    return counts | {name: sum(int(run["counts"][name]) for run in extractions) for name in _SUMMED}


def _counts_of(run: Run, extractions: Sequence[Run]) -> dict[str, int]:
    """What an extraction counted, with earlier tries of the night, before its source went away.

    What those computed was not known before the night.
    """
    tries = [other for other in extractions if other["fingerprint"] == run["fingerprint"]]
    counts = {name: int(run["counts"][name]) for name in _COUNTED}
    counts["known"] -= sum(int(other["counts"]["computed"]) for other in tries[: tries.index(run)])
    return counts | {name: sum(int(other["counts"][name]) for other in tries) for name in _SUMMED}


def _last_tries(extractions: Sequence[Run]) -> list[Run]:
    """The last extraction of each feature space."""
    return list({run["fingerprint"]: run for run in extractions}.values())


def _new_rejects(extractions: Sequence[Run]) -> list[Mapping[str, str]]:
    """Some of the images that could not be used for the first time tonight; a later space sees them as known ones."""
    found = {reject["id"]: reject for run in extractions for reject in run.get("new_rejects", ())}
    return list(found.values())[:_NAMED]


def _seconds(extractions: Sequence[Run], listing: float, wall: float) -> dict[str, float]:
    """Per stage, summed over extractions; ``extract`` is what they took in all, ``wall`` the whole run."""
    stages = dict.fromkeys(_STAGES, 0.0)
    for run in extractions:
        for stage, value in run["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + value
    stages["extract"] = stages.pop("wall", 0.0)
    stages["scan"] = stages.get("scan", 0.0) + listing
    stages["wall"] = wall
    return {stage: round(value, 3) for stage, value in stages.items()}
