"""The end of a run: the books are checked, then the snapshot and the run record are written."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from featurepipe import records
from featurepipe.errors import Interrupted, TooManyRejects, UsageError
from featurepipe.extraction.compute import Outcome
from featurepipe.extraction.prepare import Job
from featurepipe.interrupt import StopRequest
from featurepipe.store import FeatureStore
from featurepipe.store.keys import KEY_BYTES

SHOWN_REJECTS = 20
"""Rejects that a run record names; all are in the space's ``rejects.jsonl``."""


@dataclass(frozen=True)
class Run:
    """A run that has begun."""

    id: str
    started: str
    clock: float


def begin_run(store: FeatureStore) -> Run:
    """Gives a run its name and starts its clock."""
    return Run(store.new_run_id(), records.now(), time.perf_counter())


def allowance(max_rejects: int | str, listed: int) -> float:
    """How many rejects ``max_rejects`` allows among ``listed`` images.

    Raises:
        UsageError: it is neither a count nor a share.

    Example:
        >>> allowance("1%", 250), allowance(3, 250)
        (2.5, 3.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(max_rejects).strip())
    if match is None:
        raise UsageError(f"max_rejects {max_rejects!r} must be a number of images such as 10, or a share such as 1%")
    number = float(match[1])
    return number / 100 * listed if match[2] else number


def publish(store: FeatureStore, job: Job, run: Run, outcome: Outcome, stop: StopRequest) -> dict[str, Any]:
    """Writes the snapshot and the run record, and returns the record.

    Raises:
        Interrupted: the run was stopped; its record says so, and there is no new snapshot.
        TooManyRejects: the same, for more rejects than allowed.
        FeaturepipeError: the books do not balance.
    """
    record = {"run_id": run.id, "command": "extract", "started": run.started, **describe(job, outcome)}
    if stop():
        store.write_run({**record, "status": "interrupted", "ended": records.now()})
        left = len(job.plan.todo) - outcome.read
        raise Interrupted(
            f"stopped by {stop.name}: {outcome.computed:,} images computed and committed, {left:,} left. "
            "Run the same command again to go on",
            stop.signal_number or 2,
        )
    outcome.check()
    rejected, listed = len(outcome.reasons), job.plan.listing.num_rows
    if rejected > allowance(job.options.max_rejects, listed):
        store.write_run({**record, "status": "failed", "ended": records.now()})
        first = next(iter(outcome.reasons))
        raise TooManyRejects(
            f"{rejected:,} of {listed:,} images were rejected, more than --max-rejects {job.options.max_rejects} allows; first: "
            f"{job.plan.listing['id'][first].as_py()}: {outcome.reasons[first]}. The features of all others are kept, the "
            f"dataset's last snapshot stays. All reasons: {job.existing_space.path}/rejects.jsonl"
        )
    store.write_snapshot(job.dataset, run.id, snapshot_table(job.plan.listing, outcome))
    record |= {"status": "done", "ended": records.now(), "exit_code": 3 if rejected else 0}
    store.write_run(record)
    return record


def describe(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The part of a run record that is known once the work is done."""
    seconds = {stage: round(value, 3) for stage, value in job.clock.totals.items()}
    return {
        "dataset": job.dataset,
        "source": job.source.location,
        "backbone": job.existing_space.notes["backbone"],
        "space": job.existing_space.name,
        "fingerprint": job.existing_space.fingerprint,
        "new_space": job.why_new,
        "columns": [str(column) for column in job.columns],
        "settings": {
            name: {"value": value, "why": job.settings.why[name]} for name, value in job.settings.fields().items()
        },
        "machine": {"device": job.machine.device, "batch_size": job.machine.batch_size, "workers": job.machine.workers},
        "counts": {
            "listed": job.plan.listing.num_rows,
            "computed": outcome.computed,
            "known": outcome.known,
            "rejected": len(outcome.reasons),
            "read": outcome.read,
        },
        "gone": job.gone,
        "computed_by_column": {str(column): outcome.columns[str(column)] for column in job.columns},
        "rejects": [
            {"id": job.plan.listing["id"][row].as_py(), "reason": reason}
            for row, reason in sorted(outcome.reasons.items())[:SHOWN_REJECTS]
        ],
        "rejects_file": str(job.existing_space.path / "rejects.jsonl"),
        "reject_reasons": by_code(outcome.reasons),
        "seconds": {**seconds, "wall": round(outcome.seconds, 3)},
        "images_per_second": round(outcome.computed / outcome.seconds, 2) if outcome.seconds else None,
        "verdict": records.verdict(job.clock.totals, outcome.seconds, device=job.machine.device),
        "versions": records.versions(),
        "host": records.host(),
    }


def snapshot_table(listing: pa.Table, outcome: Outcome) -> pa.Table:
    """The listing with each image's key, status and reason; the locator stays behind."""
    count = listing.num_rows
    key_data = pa.py_buffer(outcome.keys)
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), count, [pa.array(outcome.has_key).buffers()[1], key_data]
    )
    reasons: list[str | None] = [None] * count
    for row, reason in outcome.reasons.items():
        reasons[row] = reason
    reason_column = pa.array(reasons, pa.string())
    status = pa.DictionaryArray.from_arrays(reason_column.is_valid().cast(pa.int8()), ["ok", "rejected"]).cast(
        pa.string()
    )
    columns = {name: listing[name] for name in ("id", "label", "split", "size", "mtime_ns")}
    return pa.table({**columns, "key": keys, "status": status, "reason": reason_column})


def by_code(reasons: Mapping[int, str]) -> dict[str, int]:
    """How many images were rejected for each kind of reason."""
    counts: dict[str, int] = {}
    for reason in reasons.values():
        code = reason.partition(":")[0]
        counts[code] = counts.get(code, 0) + 1
    return counts
