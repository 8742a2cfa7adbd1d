"""Warnings of drift: what p-values together say, and what stands until somebody accepts its images, or they are gone.

What stands follows from the run records alone. An acceptance is a record of its own beside them: who, when, which run.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurepipe import records
from featurepipe.display import counted
from featurepipe.errors import UsageError, unknown
from featurepipe.records import ACCEPTANCE
from featurepipe.store import FeatureStore
from featurepipe.store.choice import usable_keys
from featurepipe.store.snapshots import FIRST, PREVIOUS

NO_DRIFT, WARNING, DRIFT, TOO_FEW = "no drift", "warning", "drift", "too few images"

_LEAST_PERMUTATIONS = 9_999
_MOST_PERMUTATIONS = 1_000_000


@dataclass(frozen=True)
class Thresholds:
    """Adjusted p-values below which a night is warned of, and below which it fails.

    Attributes:
        warn: Below it there is a warning.
        fail: Below it there is drift; None for never.
    """

    warn: float
    fail: float | None

    def __post_init__(self) -> None:
        if self.fail is not None and self.fail > self.warn:
            raise UsageError(
                f"fail={self.fail} is above warn={self.warn}: nothing would ever be warned of; give a smaller fail"
            )

    def permutations(self, tests: int) -> int:
        """How many are needed for the least adjusted p-value of so many tests to be half the lower threshold.

        Raises:
            UsageError: More than a million, which would take minutes.
        """
        least = self.warn if self.fail is None else self.fail
        needed = float(np.ceil(2 * tests / least))  # infinite, where the threshold is next to nothing
        if needed > _MOST_PERMUTATIONS:
            raise UsageError(
                f"a p-value below {least} in {tests} tests would take {needed:,.0f} permutations; thresholds of "
                f"{2 * tests / _MOST_PERMUTATIONS:.2g} and more can be tested"
            )
        return max(_LEAST_PERMUTATIONS, int(needed) - 1)

    def verdict(self, adjusted: Sequence[float]) -> str:
        """Says what the least of the adjusted p-values means."""
        least = min(adjusted)
        if self.fail is not None and least < self.fail:
            return DRIFT
        return WARNING if least < self.warn else NO_DRIFT


Run = Mapping[str, Any]
LAST = "last"

PREDICTIONS = {
    "classes": ("predicted classes", "total_variation"),
    "labels": ("predicted labels", "effect"),
    "numbers": ("predicted numbers", "effect"),
}
"""Entries of what ``drift`` returns that compare predictions: how people read of each, and its field for the effect."""


def prediction_tests(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], float]]:
    """The tests of predictions among what ``drift`` found: name, entry and effect of each; none without a bundle."""
    return [
        (name, test, float(test[effect])) for key, (name, effect) in PREDICTIONS.items() if (test := found.get(key))
    ]


_NAMED = (PREVIOUS, FIRST)


def drift_result(run: Run) -> Mapping[str, Any]:
    """What the step drift of a job's run found; empty if the run did not come to it."""
    found = (entry.get("result") for entry in run.get("steps") or () if entry["step"] == "drift")
    return next((result for result in found if result), {})


def standing(runs: Iterable[Run], **of: str) -> list[dict[str, Any]]:
    """The warnings that stand, at most one for each job and dataset: the last, whose new images hold those of any before.

    A warning ends when it is accepted, when a later run found that its images are gone, or when the job file names its
    snapshot, or a later one, as the reference. It does not end when a later test passes, in which many more images may have
    hidden those that were warned of.

    Args:
        runs: run records, oldest first.
        of: ``job`` and ``dataset``, if only one's are asked for.

    Returns:
        JSON values, oldest first: ``run_id`` of the run that warned last, ``since`` (the run that warned first), ``job``,
        ``dataset``, ``verdict``, ``reference``, ``snapshot``, ``images`` (how many new ones there were), ``held_by`` (runs
        since then, whose snapshots hold the images).
    """
    found = _followed(runs, of)[0]
    return sorted(found.values(), key=lambda one: str(one["run_id"]))


def suspect_runs(runs: Iterable[Run], **of: str) -> set[str]:
    """Runs whose snapshots hold images that were warned of and that nobody has accepted: none may be the reference.

    Those are the runs that warned and all later ones until the warning ended, also where it ended with its images gone.
    """
    found, suspects = _followed(runs, of)
    return suspects | {run_id for one in found.values() for run_id in one["held_by"]}


def _followed(runs: Iterable[Run], of: Mapping[str, str]) -> tuple[dict[tuple[Any, Any], dict[str, Any]], set[str]]:
    """The warnings that stand after the last of the runs, by job and dataset; and the suspect runs of those that ended."""
    every = list(runs)
    accepted = {run_id for run in every if run.get("command") == ACCEPTANCE for run_id in run.get("accepted") or ()}
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    suspects: set[str] = set()
    for run in every:
        if run.get("command") == "run" and all(run.get(name) == value for name, value in of.items()):
            place, result = (run.get("job"), run.get("dataset")), drift_result(run)
            before = found.pop(place, None)
            if before is not None and before["run_id"] in (result.get("settled") or ()):
                suspects |= set(before["held_by"])
                before = None
            elif before is not None and _names(run, result, before):
                before = None
            after = _after(run, result, before)
            if after is not None and after["run_id"] not in accepted:
                found[place] = after
    return found, suspects


def _after(run: Run, result: Run, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The warning that stands after a run, if any, given the one that stood before."""
    held_by = [*(before["held_by"] if before else ()), run["run_id"]]
    if result.get("verdict") not in (WARNING, DRIFT):
        return None if before is None else {**before, "held_by": held_by}
    return {
        "run_id": run["run_id"],
        "since": result.get("since") or (before["since"] if before else run["run_id"]),
        "job": run.get("job"),
        "dataset": run.get("dataset"),
        **{name: result.get(name) for name in ("verdict", "reference", "snapshot")},
        "images": (result.get("images") or {}).get("new"),
        "held_by": held_by,
    }


def _names(run: Run, result: Run, before: Run) -> bool:
    """Whether the job file takes images that were warned of for the reference, in so many words."""
    asked = (run.get("plan") or {}).get("drift_reference")
    reference = result.get("reference")
    return asked not in (None, *_NAMED) and bool(reference) and str(reference) >= str(before["snapshot"])


def is_gone(store: FeatureStore, warning: Run, snapshot: str) -> bool:
    """Whether no image that a warning is about is left in a snapshot of its dataset; not if nobody can tell any more."""
    there = store.snapshot_ids(warning["dataset"])
    if warning["snapshot"] not in there or warning["reference"] not in there:
        return False
    warned, reference, now = (
        _keys(store, warning["dataset"], run_id) for run_id in (warning["snapshot"], warning["reference"], snapshot)
    )
    return (warned - reference).isdisjoint(now)


def _keys(store: FeatureStore, dataset: str, snapshot: str) -> set[int]:
    """The first 8 bytes of each usable image's key, as `samples.sides` tells images apart."""
    table = store.snapshot(dataset, snapshot)
    return set() if table is None else set(usable_keys(table).view("<u8")[:, 0].tolist())


def told(warning: Run, store: object) -> str:
    """What people read of a warning that stands, and what to do about it."""
    images = counted(int(warning["images"] or 0), "image")
    since = "" if warning["since"] == warning["run_id"] else f", first warned of by run {warning['since']}"
    return (
        f"drift warning of run {warning['run_id']} stands: {images} of {warning['dataset']}, new since "
        f"{warning['reference']}{since}. If they are as they should be: featurepipe drift {store} --accept "
        f"{warning['run_id']}; else remove them"
    )


def accept_drift(
    store: FeatureStore | str | os.PathLike[str], run: str = LAST, *, dataset: str | None = None, job: str | None = None
) -> dict[str, Any]:
    """Accepts the images that a run warned of: from the next run on they may be part of the reference.

    Writes a record of its own beside the run records, and changes none.

    Args:
        store: The feature store or its path.
        run: Id of the run that warned, or its beginning; ``last`` for the one that warned last.
        dataset: Name of the dataset whose warnings count; by default every one's.
        job: Name of the job whose warnings count; by default every one's.

    Returns:
        The record as JSON values: ``run_id`` (its own), ``accepted`` (ids of runs), ``accepted_by`` (the user), ``ended``
        (when), ``dataset``, ``of_job``, ``reference``, ``snapshot``, ``images``.

    Raises:
        UsageError: No warning of that run stands; the message names those that do.
    """
    kept = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    of = {name: value for name, value in (("dataset", dataset), ("job", job)) if value is not None}
    warning = _chosen(standing(kept.runs(), **of), run, kept)
    moment = records.now()
    record = {
        "run_id": kept.new_run_id(),
        "command": ACCEPTANCE,
        "dataset": warning["dataset"],
        "of_job": warning["job"],
        "status": "done",
        "started": moment,
        "ended": moment,
        "accepted": [warning["run_id"]],
        "accepted_by": _user(),
        **{name: warning[name] for name in ("reference", "snapshot", "images", "since")},
        "host": records.host(),
        "versions": records.versions(),
    }
    kept.write_run(record)
    return record


def accepted_text(record: Run) -> str:
    """What ``featurepipe drift --accept`` prints."""
    images = counted(int(record["images"] or 0), "image")
    return (
        f"{record['dataset']}: accepted {images} that run {record['accepted'][0]} warned of, by {record['accepted_by']}; "
        f"the next run of {record['of_job']} compares with snapshot {record['snapshot']}"
    )


def _chosen(there: Sequence[dict[str, Any]], run: str, store: FeatureStore) -> dict[str, Any]:
    if not there:
        raise UsageError(f"no drift warning stands in {store.path}: there is nothing to accept; see featurepipe runs")
    if run == LAST:
        return there[-1]
    found = [one for one in there if run and str(one["run_id"]).startswith(run)]
    if len(found) != 1:
        names = [LAST, *(str(one["run_id"]) for one in there)]
        raise unknown("drift warning", run, names, where=str(store.path), see=f"featurepipe runs {store.path}")
    return found[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # an account without a name, as in containers
        return f"user {os.getuid()}"
