"""The images that cannot be used now, why, and since which run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from featurepipe.store import FeatureStore
from featurepipe.store.snapshots import OK

Reject = dict[str, Any]


def current_rejects(store: FeatureStore, dataset: str) -> list[Reject]:
    """The rejects of a dataset's last snapshot.

    Args:
        store: the feature store.
        dataset: its name.

    Returns:
        JSON values, in the order of the snapshot: ``dataset``, ``id``, ``reason``, ``run``, the run that found these bytes
        unusable (a job's, where one did), and ``since``, when that began; both None where no record is left of it.
    """
    run_ids = store.snapshot_ids(dataset)
    if not run_ids:
        return []
    snapshot = store.snapshot(dataset, run_ids[-1], columns=("id", "key", "status", "reason"))
    rejected = [] if snapshot is None else snapshot.filter(pc.not_equal(snapshot["status"], OK)).to_pylist()
    found = _found_by(store, dataset) if rejected else {}
    runs = _whole_runs(store.runs())
    return [
        {
            "dataset": dataset,
            "id": row["id"],
            "reason": row["reason"],
            **_since(found.get((row["id"], row["key"])), runs),
        }
        for row in rejected
    ]


def _found_by(store: FeatureStore, dataset: str) -> dict[tuple[str, bytes | None], str]:
    """The extraction that found each reject first, in whatever feature space."""
    found: dict[tuple[str, bytes | None], str] = {}
    for space in store.spaces():
        for row in space.rejects(dataset=dataset, first=True).select(["id", "key", "run_id"]).to_pylist():
            place = (row["id"], row["key"])
            found[place] = min(row["run_id"], found.get(place, row["run_id"]))
    return found


def _whole_runs(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The record of each run by its id, for an extraction that was part of a job's run the record of that."""
    runs = {record["run_id"]: record for record in records}
    return runs | {part: record for record in records for part in record.get("extractions", ())}


def _since(run_id: str | None, runs: Mapping[str, Mapping[str, Any]]) -> Reject:
    run = runs.get(run_id or "", {})
    return {"run": run.get("run_id", run_id), "since": run.get("started")}
