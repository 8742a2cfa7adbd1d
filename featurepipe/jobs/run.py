"""A night of a job: its extractions, then its steps, and a record of what became of them."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurepipe.errors import Interrupted, StoreLocked
from featurepipe.execution.dask import executor_when_needed
from featurepipe.execution.launchers import checked_spec
from featurepipe.interrupt import StopRequest, stop_on_signals
from featurepipe.jobs.job import Job
from featurepipe.jobs.lock import HeldLock, job_lock
from featurepipe.jobs.log import LogFormat, job_log
from featurepipe.jobs.record import DONE, INTERRUPTED, OUT_OF_TIME, SKIPPED, RunRecord
from featurepipe.jobs.step import (
    AT_ANY_END,
    BEFORE_EXTRACTION,
    OF_ANY_RUN,
    OF_ONE_DATASET,
    OF_THIS_RUN,
    Night,
    Step,
    steps_of,
)
from featurepipe.jobs.validation import read_job
from featurepipe.partitions import spilling
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore

if TYPE_CHECKING:
    from featurepipe.jobs.plan import Extractions


@shown_as("run")
def run_job(
    path: str | PathLike[str],
    *,
    dry_run: bool = False,
    retry_rejects: bool = False,
    log_format: LogFormat = "text",
    silent: bool = False,
    cluster: Any = None,
) -> dict[str, Any]:
    """Runs a job once: computes the features of what is new, then takes the steps that its file names.

    It goes on where the last run stopped, however that ended. What fails during the night is in the record, not raised: look at
    its ``status`` (``done``, ``failed``, ``interrupted``, ``out of time``) and ``exit_code``.

    Args:
        path: the job file, see `featurepipe.jobs.job.Job`.
        dry_run: say what would be done; change nothing.
        retry_rejects: try images again whose bytes were rejected before.
        log_format: of what is said on standard error, ``text`` or ``json``.
        silent: say nothing.
        cluster: where to work instead of where the job's ``[cluster]`` says, as `featurepipe.execution.connect` takes it.

    Returns:
        The run record as JSON values, also kept in the store's ``runs/``; with ``dry_run`` the plan.

    Raises:
        UsageError: something in the job file is wrong.
        WeightsNotFound: the weights of a network are not at hand.
        StoreLocked: another run of the job has not ended, or the store is being rewritten.
        StoreError: the store cannot be used.
        Interrupted: a signal came before anything was done.
    """
    job, file = read_job(path), Path(path).absolute()
    cluster = job.cluster if cluster is None else checked_spec(cluster)
    with job_log(job.name, log_format=log_format, silent=silent) as log:
        if dry_run:
            from featurepipe.jobs.plan import plan_job

            return plan_job(job, file, cluster, retry_rejects=retry_rejects, silent=silent)
        store = FeatureStore(job.store)
        with stop_on_signals(StopRequest.after(job.limits.time_budget)) as stop, _only_run(store, job, stop) as held:
            stop.say = log.warn
            with stop.at_once(before="anything was done"):
                from featurepipe.jobs.plan import (
                    Extractions,  # load torch, which takes a while
                    check_networks,
                )

                check_networks(job)
            record = RunRecord(job, file, store, store.new_run_id(), log, retry_rejects, job.dataset or "")
            with log.about(run_id=record.run_id), record.kept(), executor_when_needed(cluster, log.say) as executor:
                extractions = Extractions(job, record, stop, log.say, silent, executor)
                with spilling(store.path):
                    extractions.list_source()
                    _take_steps(_night(extractions), record, held, early=True)
                    extractions.run()
                _take_steps(_night(extractions), record, held)
                _close(record, stop, held)
    return record.written


def _only_run(store: FeatureStore, job: Job, stop: StopRequest) -> AbstractContextManager[HeldLock]:
    def end_soon() -> None:
        stop.deadline = time.monotonic()

    return job_lock(store, job.name, stop, on_lost=end_soon)


def _night(done: Extractions) -> Night:
    """What the steps see of the night so far."""
    record, job = done.record, done.job
    record.dataset = record.dataset or _last_dataset(record.store, job.name)
    return Night(
        job=job,
        dataset=record.dataset,
        store=record.store,
        run_id=record.run_id,
        before=done.before,
        stop=done.stop,
        say=done.say,
        silent=done.silent,
        executor=done.executor,
        extracted=tuple(run for run in record.extractions if run["status"] == DONE),
        record=record.as_dict(),
    )


def _last_dataset(store: FeatureStore, job: str) -> str:
    """What the dataset was called when the job last ran: its source, which could tell, is not there in this run.

    Empty if no run of the job has known. A guess could be the name of someone else's dataset, whose snapshots would go.
    """
    names = (run["dataset"] for run in reversed(store.runs()) if run.get("job") == job and run.get("dataset"))
    return next(names, "")


def _take_steps(night: Night, record: RunRecord, held: HeldLock, *, early: bool = False) -> None:
    """Takes the steps in their order; those that tell of the night see it as it will end if they succeed.

    Args:
        night: as it is.
        record: told what becomes of each step.
        held: the job's lock.
        early: take those that come before the extractions, and else all others.
    """
    for step in steps_of(night.job):
        if (step.step in BEFORE_EXTRACTION) is not early:
            continue
        why = _why_not(step, night, record, held)
        if why:
            record.not_reached(step.step, step.name, why)
            continue
        if step.step in OF_ANY_RUN:
            _note_signal(record, night.stop)
            record.measure()
        _take(step, replace(night, record=record.as_dict()), record)


def _take(step: Step, night: Night, record: RunRecord) -> None:
    from featurepipe.jobs import steps

    def work() -> dict[str, Any]:
        try:
            ends = step.step not in AT_ANY_END
            with night.stop.at_once(before=f"the end of step {step}") if ends else nullcontext():
                found: dict[str, Any] = getattr(steps, step.step)(night, step.table)
                return found
        except Interrupted as error:
            number = error.exit_code - 128
            raise Interrupted(f"stopped in step {step}; what it had finished stays", number) from error

    entry = record.attempt(step.step, step.name, work)
    record.is_late |= entry["status"] == SKIPPED and night.stop.out_of_time


def _why_not(step: Step, night: Night, record: RunRecord, held: HeldLock) -> str:
    """Why a step is not begun; empty if it is."""
    if held.lost:
        return "another host has taken over"
    is_stopped = bool(night.stop.signal_number) or record.has(INTERRUPTED)
    if step.step in (AT_ANY_END if is_stopped else OF_ANY_RUN):
        return ""
    if is_stopped:
        return "the run was stopped"
    if night.stop.out_of_time or record.has(OUT_OF_TIME):
        record.is_late = True
        return "no time was left"
    return _what_is_missing(step, night)


def _what_is_missing(step: Step, night: Night) -> str:
    if step.step in BEFORE_EXTRACTION and night.record["steps"][0]["status"] != DONE:
        return "the source was not listed"
    if step.step in OF_ONE_DATASET and not night.dataset:
        return "no run of the job has listed its source yet, so that nobody knows the dataset's name"
    if step.step in OF_THIS_RUN and len(night.extracted) < len(night.job.features):
        return "the features of this run's images are not complete"
    return ""


def _close(record: RunRecord, stop: StopRequest, held: HeldLock) -> None:
    """Notes what no step has noted: a signal between two of them, a lock that was lost."""
    _note_signal(record, stop)
    if held.lost:
        error = StoreLocked(
            "another host took over the job while this one could not renew its lease: it was suspended, or cut off from the store"
        )
        record.failed("lock", error, error.exit_code)


def _note_signal(record: RunRecord, stop: StopRequest) -> None:
    if stop.signal_number and not record.has(INTERRUPTED):
        error = Interrupted(f"stopped by {stop.name}", stop.signal_number)
        record.failed("run", error, error.exit_code)
