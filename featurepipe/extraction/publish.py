"""The end of a run: the ledger is checked, then the snapshot and the run record are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe import records
from featurepipe.annotations import KEPT_COLUMN
from featurepipe.errors import FeaturepipeError, Interrupted, Message, Option, StoreError, TooManyRejects
from featurepipe.extraction.ledger import ExtractionLedger
from featurepipe.extraction.limits import DiskFloor, allowance
from featurepipe.extraction.plan import count_changes, still_rejected
from featurepipe.extraction.prepare import ExtractionSpec
from featurepipe.images import Source
from featurepipe.images.regions import CLIPPED
from featurepipe.interrupt import StopRequest
from featurepipe.option_groups import as_asked
from featurepipe.partitions import Rows, filtered, part_of, partitions, stored
from featurepipe.store import FeatureStore
from featurepipe.store.documents import PUBLISHING
from featurepipe.store.keys import KEY_BYTES
from featurepipe.store.snapshots import OK

SHOWN_REJECTS = 20
"""Rejects that a run record names; all are in the space's ``rejects.jsonl``."""


@dataclass(frozen=True)
class Run:
    """A run that has begun: what it is to do, and what has come of it so far."""

    store: FeatureStore
    job: ExtractionSpec
    command: str
    id: str
    started: str
    ledger: ExtractionLedger

    @cached_property
    def snapshot(self) -> pa.Table:
        """What the dataset is now; only for a run whose ledger is closed."""
        return snapshot_table(self.job.plan.listing, self.ledger)

    @property
    def warnings(self) -> list[Message]:
        """What is odd about the listing."""
        return list(self.job.losses.warnings(self.job.options.max_gone))

    def end(self, status: str, exit_code: int, **more: Any) -> dict[str, Any]:
        """Writes the run's record, and returns it."""
        facts = {"run_id": self.id, "command": self.command, "status": status, "exit_code": exit_code}
        times = {"started": self.started, "ended": records.now()}
        record = {**facts, **times, **describe(self.job, self.ledger), "warnings": self.warnings, **more}
        self.store.write_run(record)
        return record


def begin_run(store: FeatureStore, job: ExtractionSpec, command: str = "extract") -> Run:
    """Gives a run its name and opens its ledger."""
    return Run(store, job, command, store.new_run_id(), records.now(), ExtractionLedger.of(job.plan, job.missing))


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Leaves a record of a run that ends with an error, and passes the error on with that record."""
    try:
        yield
    except Exception as error:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        text = error.message if isinstance(error, FeaturepipeError) else str(error)
        with suppress(StoreError):  # such as a full disk, of which the error tells already
            record = run.end(status, getattr(error, "exit_code", 1), error=text, changes=None)
            error.record = record  # type: ignore[attr-defined]  # the system's errors carry it, too
        raise


def publish(run: Run, asked: StopRequest, floor: DiskFloor) -> dict[str, Any]:
    """Writes the snapshot and the run record, and returns the record.

    A run that has no time left writes no snapshot, but a record that says so.

    Args:
        run: whose images are all computed, unless something stopped it.
        asked: whether a signal, or the time, has stopped it.
        floor: whether the disk has.

    Raises:
        Interrupted: a signal came; there is no new snapshot.
        DiskFull: the same, for too little space.
        TooManyRejects: the same, for more rejects than allowed.
        FeaturepipeError: the counts do not balance.
    """
    job, ledger = run.job, run.ledger
    left = len(job.plan.todo) - ledger.read
    if asked.signal_number is not None:
        raise Interrupted(
            f"stopped by {asked.name}: {ledger.computed:,} images computed and committed, {left:,} left. "
            "Run the same command again to go on",
            asked.signal_number,
        )
    if left and floor.reached:
        floor.check()
    if left and asked.out_of_time:
        return run.end("out of time", 0, left=left, changes=None)
    ledger.check()
    warnings = [*run.warnings, *_check_rejects(run)]
    # Only a run that leaves a snapshot tells of changes: without one, the next run finds the same ones again.
    changes = count_changes(job.history.snapshot, run.snapshot)
    code = 3 if ledger.reasons else 0
    # A kill after the snapshot must not lose what it changed.
    run.end(PUBLISHING, code, changes=changes, warnings=warnings)
    run.store.write_snapshot(job.dataset, run.id, run.snapshot)
    return run.end("done", code, changes=changes, warnings=warnings)


def _check_rejects(run: Run) -> list[Message]:
    """Refuses too many rejects; returns a warning of those that are too many only because the dataset has shrunk.

    A share is of the images listed now. Where fewer are listed than before, it allows fewer rejects; those that the last
    snapshot has already, with the same bytes and under the same limit, fail no run again as long as none comes in addition.
    """
    job, reasons, limit = run.job, run.ledger.reasons, run.job.options.max_rejects
    listed, losses = job.plan.listing, job.losses
    if len(reasons) <= allowance(limit, listed.num_rows):
        return []
    known = still_rejected(job.history.snapshot, run.snapshot)
    new = [row for row in sorted(reasons) if listed["id"][row].as_py() not in known]
    too_many = Message(
        f"{len(reasons):,} of {listed.num_rows:,} images were rejected, more than ",
        Option("max_rejects", limit),
        " allows",
    )
    if not new and str(limit) == str(job.history.max_rejects):
        return [
            Message(
                too_many, f"; the run goes on as all of them were rejected in the last snapshot, of {losses.images:,} images, "
                "and passed the same limit. The next new one will fail it",
            )
        ]  # fmt: skip
    first = (new or sorted(reasons))[0]
    before = "" if job.history.snapshot is None else f", {len(new):,} of them new or changed since the last snapshot"
    gone = f"; {losses} are gone" if losses.gone else ""
    raise TooManyRejects(
        Message(
            too_many,
            f"{before}{gone}; first: {listed['id'][first].as_py()}: {reasons[first]}. The features of all others are kept, "
            "but no snapshot is written: the dataset stays as it was. To go on without these images: ",
            Option("max_rejects", len(reasons)),
            f". All reasons: {job.existing_space.path}/rejects.jsonl",
        )
    )


def describe(job: ExtractionSpec, ledger: ExtractionLedger) -> dict[str, Any]:
    """The part of a run record that is known once the work is done."""
    seconds = {stage: round(value, 3) for stage, value in job.clock.totals.items()}
    return {
        "dataset": job.dataset,
        "source": job.source.location,
        **bounds_of(job.source),
        "backbone": {"name": job.existing_space.backbone, **job.existing_space.notes.get("backbone", {})},
        "weights_note": job.session.backbone.weights_note,  # of this run's file: the space's may be another one
        "space": job.existing_space.name,
        "fingerprint": job.existing_space.fingerprint,
        "new_space": job.why_new,
        "columns": [str(column) for column in job.session.columns],
        "settings": job.session.settled.as_dict(),
        "machine": {
            "device": job.session.machine.device,
            "batch_size": job.session.machine.batch_size,
            "workers": job.session.machine.workers,
            **({"engine": job.session.runtime()} if ledger.computed else {}),
        },
        "counts": {
            "listed": job.plan.listing.num_rows,
            "computed": ledger.computed,
            "known": ledger.known,
            "rejected": len(ledger.reasons),
            "read": ledger.read,
        },
        "copies": ledger.copies,
        "listing": job.listing.as_dict(),
        "gone": job.losses.gone,
        "lost_labels": dict(job.losses.labels),
        "forgotten": job.forgotten,
        "tried_again": ledger.tried_again,
        **remarked(ledger.remarks),
        "computed_by_column": {str(column): ledger.columns[str(column)] for column in job.session.columns},
        "rejects": _rejects(job, ledger)[:SHOWN_REJECTS],
        "new_rejects": _new_rejects(job, ledger)[:SHOWN_REJECTS],
        "options": as_asked(job.options),
        "damaged": kept_damaged(job.options.damaged, job.plan.listing["id"], ledger.damage),
        "rejects_file": str(job.existing_space.path / "rejects.jsonl"),
        "reject_reasons": by_code(ledger.reasons),
        "seconds": {**seconds, "wall": round(ledger.seconds, 3)},
        "images_per_second": round(ledger.computed / ledger.seconds, 2) if ledger.seconds else None,
        "verdict": records.verdict(job.clock.totals, ledger.busy or ledger.seconds, device=job.session.machine.device),
        **({} if ledger.cluster is None else {"cluster": ledger.cluster}),
        "versions": records.versions(),
        "host": records.host(),
    }


def bounds_of(source: Source) -> dict[str, list[str]]:
    """Where the images had to lie, for a record; nothing where that was not said."""
    bounds = getattr(source, "only_under", None)  # a user's own source need not have it
    return {} if bounds is None else {"only_under": list(bounds.places)}


def _rejects(job: ExtractionSpec, ledger: ExtractionLedger) -> list[dict[str, str]]:
    return named(job.plan.listing["id"], ledger.reasons)


def kept_damaged(asked: str, ids: pa.ChunkedArray, damage: Mapping[int, str]) -> dict[str, Any]:
    """What a record says of images that were kept although they are damaged.

    Args:
        asked: the choice, ``reject`` or ``keep``.
        ids: of all images.
        damage: what is wrong, by row.
    """
    return {"asked": asked, "kept": len(damage), "images": named(ids, damage)[:SHOWN_REJECTS]}


def named(ids: pa.ChunkedArray, reasons: Mapping[int, str]) -> list[dict[str, str]]:
    """Images with the reasons that were found by row, in the order of the rows."""
    return [{"id": ids[row].as_py(), "reason": reason} for row, reason in sorted(reasons.items())]


def _new_rejects(job: ExtractionSpec, ledger: ExtractionLedger) -> list[dict[str, str]]:
    """Those that the last snapshot does not have as rejected."""
    last = job.history.snapshot
    rejected = (
        None if last is None else filtered(last.select(["id", "status"]), lambda rows: pc.not_equal(rows["status"], OK))
    )
    before = set() if rejected is None else set(rejected["id"].to_pylist())
    return [reject for reject in _rejects(job, ledger) if reject["id"] not in before]


_LISTED = ("id", "label", "split", "size", "mtime_ns")


def snapshot_table(listing: pa.Table, ledger: ExtractionLedger) -> pa.Table:
    """The listing with each image's key, status and reason; the locator stays behind."""
    further = [name for name in listing.column_names if name.startswith(KEPT_COLUMN)]
    listed = listing.select([*_LISTED, *further]).replace_schema_metadata(None)
    rejected = np.array(sorted(ledger.reasons), np.int64)
    pieces = (_of_part(part_of(listed, part), ledger, part, rejected) for part in partitions(listing.num_rows))
    schema = _of_part(listed.slice(0, 0), ledger, slice(0, 0), rejected).schema
    return stored((batch for piece in pieces for batch in piece.to_batches()), schema)


def _of_part(listed: pa.Table, ledger: ExtractionLedger, part: slice, rejected: Rows) -> pa.Table:
    """A partition of the snapshot; ``listed`` is that of the listing, ``rejected`` are the rows of all rejects."""
    count = listed.num_rows
    has_key = pa.array(ledger.has_key[part]).buffers()[1]
    keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), count, [has_key, pa.py_buffer(ledger.keys[part])])
    reasons: list[str | None] = [None] * count
    for row in rejected[slice(*np.searchsorted(rejected, [part.start, part.stop]))].tolist():
        reasons[row - part.start] = ledger.reasons[row]
    reason_column = pa.array(reasons, pa.string())
    status = pa.DictionaryArray.from_arrays(reason_column.is_valid().cast(pa.int8()), ["ok", "rejected"]).cast(
        pa.string()
    )
    columns = {name: listed[name] for name in _LISTED}
    further = {name: listed[name] for name in listed.column_names[len(_LISTED) :]}
    return pa.table({**columns, "key": keys, "status": status, "reason": reason_column, **further})


def remarked(remarks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a record that say how images were decoded: ``clipped``, regions, and counts of all other ``remarks``."""
    return {"clipped": remarks.get(CLIPPED, 0), "remarks": {name: n for name, n in remarks.items() if name != CLIPPED}}


def by_code(reasons: Mapping[int, str]) -> dict[str, int]:
    """How many images were rejected for each kind of reason."""
    counts: dict[str, int] = {}
    for reason in reasons.values():
        code = reason.partition(":")[0]
        counts[code] = counts.get(code, 0) + 1
    return counts
