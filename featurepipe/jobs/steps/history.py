"""What earlier runs of the job did, and which of their snapshots drift is measured against."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from featurepipe.jobs.step import Night
from featurepipe.monitoring.standing_warnings import DRIFT, drift_result, standing, suspect_runs

Run = Mapping[str, Any]


def last_result(
    night: Night, step: str, *, places: Mapping[str, str] | None = None, **same: Any
) -> Mapping[str, Any] | None:
    """What a step did, or had no need to do, when an earlier night of the job last came through it.

    Args:
        night: this run.
        step: which step.
        places: entries of the result that must name these files or folders, seen from the job file wherever that was then.
        same: entries of the result that must have these values, to tell several of a kind apart.

    Returns:
        Its result; None if no night has. A night on which it failed or was not reached does not count.
    """
    for run, result in _results(night, step):
        there = all(_is_same_place(night, run, result.get(name), place) for name, place in (places or {}).items())
        if there and all(result.get(name) == value for name, value in same.items()):
            return result
    return None


def _results(night: Night, step: str) -> Iterator[tuple[Run, Mapping[str, Any]]]:
    """The results of a step that came to its end in earlier nights of the job, newest first, with the runs."""
    own = {"command": "run", "job": night.job.name, "dataset": night.dataset}
    for run in reversed(night.store.runs()):
        if run["run_id"] == night.run_id or any(run.get(name) != value for name, value in own.items()):
            continue
        for entry in run.get("steps", ()):
            if entry["step"] == step and entry["status"] in ("done", "skipped"):
                yield run, entry.get("result") or {}


def _is_same_place(night: Night, run: Run, was: Any, now: str) -> bool:
    """Whether a path of an earlier run is the one of now, also if the job file has moved with all that it names.

    A job file that is still where it was then was copied: what the copy writes is another job's.
    """
    if was == now:
        return True
    before = run.get("job_file")
    if not isinstance(was, str) or before is None or night.job.file is None or os.path.lexists(before):
        return False
    return not _seen_from(before, was).isdisjoint(_seen_from(str(night.job.file.absolute()), now))


def _seen_from(file: str, place: str) -> set[str]:
    """A path from the folder of a job file; in a template the folders around it have their braces twice."""
    folder = os.path.dirname(file)  # noqa: PTH120 - of another machine, perhaps
    twice = folder.replace("{", "{{").replace("}", "}}")
    return {os.path.relpath(place, around) for around in (folder, twice)}


class LastSnapshot(NamedTuple):
    """What a table that tells of new images told of last.

    Attributes:
        snapshot: its run id; None if all images are new.
        warnings: why all are new, though it or one like it has told of some.
        result: what it told.
    """

    snapshot: str | None
    warnings: Sequence[str] = ()
    result: Mapping[str, Any] = MappingProxyType({})


def last_snapshot(night: Night, step: str, *, places: Mapping[str, str], made: str, **same: Any) -> LastSnapshot:
    """The snapshot that a table told of last, of which what is new is counted; says so if it cannot be had.

    Args:
        night: this run.
        step: which step.
        places: as for `last_result`; ``to`` among them.
        made: what was done with the images, for people.
        same: as for `last_result`.
    """
    result = last_result(night, step, places=places, **same)
    if result is not None and result["snapshot"] in night.store.snapshot_ids(night.dataset):
        return LastSnapshot(result["snapshot"], result=result)
    to = night.job.named(Path(places["to"]))
    if result is not None:
        why = f"snapshot {result['snapshot']}, which {to} {made} last, is not in the store any more"
        return LastSnapshot(None, [f"{step} {to}: all images count as new, and none as gone: {why}"])
    others = {name: value for name, value in places.items() if name != "to"}
    elsewhere = last_result(night, step, places=others, **same)
    if elsewhere is None:
        return LastSnapshot(None)
    why = f"the job {made} to {elsewhere.get('to')} before, and never to {to}"
    return LastSnapshot(None, [f"{step} {to}: all images count as new, and none as gone: {why}"])


def previous(night: Night) -> str | None:
    """The snapshot that ``reference = "previous"`` names: the last whose images were tested, and not warned of.

    Images that were too few, or whose run was cut short, are tested again, together with those that have come since, until
    they pass; those that were warned of or failed until they are accepted or gone, whatever comes with them (see
    `featurepipe.monitoring.standing_warnings`); or until the job file names another reference, from which the next run goes on.

    Returns:
        Its run id, or that of the first snapshot if none was tested; None if there was none before this run.
    """
    earlier = [run_id for run_id in night.store.snapshot_ids(night.dataset) if run_id <= (night.before or "")]
    return _newest(_own(night, _past(night)), earlier, _suspects(night))


def warned_of(night: Night, *, with_this_run: bool = False) -> Run | None:
    """The drift warning of the job that stands, if any: before this run's test, or after it."""
    return next(iter(standing(_all_runs(night, with_this_run=with_this_run), **_about(night))), None)


def _suspects(night: Night, *, with_this_run: bool = False) -> set[str]:
    return suspect_runs(_all_runs(night, with_this_run=with_this_run), **_about(night))


def _about(night: Night) -> dict[str, str]:
    return {"job": night.job.name, "dataset": night.dataset}


def _all_runs(night: Night, *, with_this_run: bool) -> list[Run]:
    """All records, acceptances as well, oldest first; this run's as far as it is known, or not at all."""
    runs: list[Run] = [run for run in night.store.runs() if run["run_id"] != night.run_id]
    return [*runs, night.record] if with_this_run else runs


def needed(night: Night) -> set[str]:
    """Snapshots of the dataset that are or may be the next reference of this run's job, or of another one."""
    past, there = _past(night), night.store.snapshot_ids(night.dataset)
    found = _of_others(night, past)
    if there:
        for reference in _named_by_others(night, past):
            found |= _meant(reference, None, past, there)
    if night.job.drift is not None and there:
        warning = warned_of(night, with_this_run=True)
        if warning is not None:  # until it ends, it must be possible to tell whether its images are gone
            found |= {warning["snapshot"], warning["reference"]} & set(there)
        previous = _newest([*_own(night, past), night.record], there, _suspects(night, with_this_run=True))
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
    last = next((run["run_id"] for run in reversed(_own(night, past)) if _next(run, set())), "")
    warning = warned_of(night, with_this_run=True)
    return {last, night.job.drift.reference, *named, *((warning["run_id"],) if warning else ())}


def _extractions(runs: Sequence[Run], run_id: str) -> list[str]:
    """Of a job's run, which may be named as a reference, too."""
    return next((list(run.get("extractions", ())) for run in runs if run["run_id"] == run_id), [])


def _past(night: Night) -> list[Run]:
    """The records of all jobs' runs about the dataset but this run's, oldest first."""
    runs = (run for run in night.store.runs() if run["run_id"] != night.run_id)
    return [run for run in runs if run.get("command") == "run" and run.get("dataset") == night.dataset]


def _own(night: Night, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.get("job") == night.job.name]


def _of_others(night: Night, runs: Sequence[Run]) -> set[str]:
    """What each other job compared with when it last came to that, and what it will compare with next."""
    last = {run.get("job"): run for run in runs if run.get("job") != night.job.name and _next(run, set())}
    warnings = [one for one in standing(night.store.runs(), dataset=night.dataset) if one["job"] != night.job.name]
    needed = [*(drift_result(run) for run in last.values()), *warnings]
    return {str(one[name]) for one in needed for name in ("snapshot", "reference") if one.get(name)}


def _named_by_others(night: Night, past: Sequence[Run]) -> set[str]:
    """The ``reference`` of each other job's file when it last ran, whether or not it came to drift."""
    last = {
        run.get("job"): run.get("plan", {}).get("drift_reference") for run in past if run.get("job") != night.job.name
    }
    return {reference for reference in last.values() if reference}


def _newest(runs: Sequence[Run], there: Sequence[str], suspects: set[str]) -> str | None:
    """The reference that the newest run leaves which leaves one that is there; else the first snapshot."""
    left = (_next(run, suspects) for run in reversed(runs))
    return next((run_id for run_id in left if run_id in there), there[0] if there else None)


def _next(run: Run, suspects: set[str]) -> str | None:
    """The reference that a run leaves: its own snapshot if that passed, else what that was compared with.

    A first run has nothing to compare with, and passes; a run that did not come to drift leaves none.
    """
    result = drift_result(run)
    passed = _was_tested(run) and run["run_id"] not in suspects
    found: str | None = result.get("snapshot") if passed else result.get("reference")
    return found


def _was_tested(run: Run) -> bool:
    """Whether images were tested, or there was nothing to compare with; what was found is another matter."""
    result = drift_result(run)
    is_done = any(entry["step"] == "drift" and entry["status"] == "done" for entry in run.get("steps") or ())
    return is_done or result.get("reference") is None or result.get("verdict") == DRIFT
