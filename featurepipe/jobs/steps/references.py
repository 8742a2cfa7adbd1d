"""Which snapshots drift is measured against: tonight, the next time, and by the other jobs of the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.jobs.night import Night

Run = Mapping[str, Any]


def previous(night: Night) -> str | None:
    """The snapshot that ``reference = "previous"`` names: the last whose images were tested, and did not fail.

    Images that failed, that were too few, or whose night was cut short are tested again, together with those that have come
    since, until they pass; or until the job file names another reference, from which the next night goes on.

    Returns:
        Its run id, or that of the first snapshot if none was tested; None if there was none before tonight.
    """
    earlier = [run_id for run_id in night.store.snapshot_ids(night.dataset) if run_id <= (night.before or "")]
    return _newest(_own(night, _past(night)), earlier)


def needed(night: Night) -> set[str]:
    """Snapshots of the dataset that are or may be the next reference of tonight's job, or of another one."""
    past, there = _past(night), night.store.snapshot_ids(night.dataset)
    found = _of_others(night, past)
    if there:
        for reference in _named_by_others(night, past):
            found |= _meant(reference, None, past, there)
    if night.job.drift is not None and there:
        previous = _newest([*_own(night, past), night.record], there)
        found |= _meant(night.job.drift.reference, previous, past, there)
    return found


def _meant(reference: str, previous: str | None, past: Sequence[Run], there: Sequence[str]) -> set[str]:
    """The snapshots that a job file's ``reference`` means."""
    if reference == "previous":
        return {previous} if previous else set()
    return {there[0]} if reference == "first" else {reference, *_extractions(past, reference)}


def telling_runs(night: Night) -> set[str]:
    """Past runs whose records tell what drift compares with: the job's last that came to it, and those that a job names."""
    past = _past(night)
    named = _named_by_others(night, past)
    if night.job.drift is None:
        return named
    last = next((run["run_id"] for run in reversed(_own(night, past)) if _next(run)), "")
    return {last, night.job.drift.reference, *named}


def _extractions(runs: Sequence[Run], run_id: str) -> list[str]:
    """Of a job's run, which may be named as a reference, too."""
    return next((list(run.get("extractions", ())) for run in runs if run["run_id"] == run_id), [])


def _past(night: Night) -> list[Run]:
    """The records of all jobs' runs about the dataset but tonight's, oldest first."""
    runs = (run for run in night.store.runs() if run["run_id"] != night.run_id)
    return [run for run in runs if run.get("command") == "run" and run.get("dataset") == night.dataset]


def _own(night: Night, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.get("job") == night.job.name]


def _of_others(night: Night, runs: Sequence[Run]) -> set[str]:
    """What each other job compared with when it last came to that, and what it will compare with next."""
    last = {run.get("job"): run for run in runs if run.get("job") != night.job.name and _next(run)}
    return {run_id for run in last.values() for run_id in (_next(run), _result(run).get("reference")) if run_id}


def _named_by_others(night: Night, past: Sequence[Run]) -> set[str]:
    """The ``reference`` of each other job's file when it last ran, whether or not it came to drift."""
    last = {
        run.get("job"): run.get("plan", {}).get("drift_reference") for run in past if run.get("job") != night.job.name
    }
    return {reference for reference in last.values() if reference}


def _newest(runs: Sequence[Run], there: Sequence[str]) -> str | None:
    """The reference that the newest run leaves which leaves one that is there; else the first snapshot."""
    left = (_next(run) for run in reversed(runs))
    return next((run_id for run_id in left if run_id in there), there[0] if there else None)


def _next(run: Run) -> str | None:
    """The reference that a run leaves: its own snapshot if that passed, else what that was compared with.

    A first night has nothing to compare with, and passes; a night that did not come to drift leaves none.
    """
    result = _result(run)
    found: str | None = result.get("snapshot") if _has_passed(run) else result.get("reference")
    return found


def _has_passed(run: Run) -> bool:
    return _result(run).get("reference") is None or any(
        entry["step"] == "drift" and entry["status"] == "done" for entry in run.get("steps", ())
    )


def _result(run: Run) -> Mapping[str, Any]:
    """What drift found; empty if the run did not come to it."""
    found = (entry.get("result") for entry in run.get("steps", ()) if entry["step"] == "drift")
    return next(found, None) or {}
