"""What a run of a job did: the books while it runs, and the run record, which is there from its beginning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurepipe import records
from featurepipe.errors import FeaturepipeError, Interrupted, StoreError
from featurepipe.jobs.disk import disk_figures
from featurepipe.jobs.figures import done_ones, figures_of
from featurepipe.jobs.job import Job
from featurepipe.jobs.log import JobLog
from featurepipe.jobs.provenance import git_commit
from featurepipe.jobs.schedule import steps_of
from featurepipe.jobs.validation import in_keys, result_in_keys
from featurepipe.records import KILLED, RUNNING
from featurepipe.store import FeatureStore

DONE, SKIPPED, FAILED, NOT_REACHED = "done", "skipped", "failed", "not reached"
INTERRUPTED, OUT_OF_TIME = "interrupted", "out of time"
_TOO_MANY_REJECTS = 4
_TELLING = ("list", "extract")
"""Steps whose failures have exit codes of their own; any other one that fails is a failure like the next."""

Entry = dict[str, Any]


@dataclass
class RunRecord:
    """The books of one run.

    Attributes:
        job: the job.
        file: its file.
        store: where the record goes.
        run_id: of this run.
        dataset: its name, empty while unknown.
        retry_rejects: whether rejects are tried again.
        log: told what becomes of each step.
        steps: what became of each step, in their order.
        extractions: the run records of tonight's extractions, also of those that failed.
        listing: seconds it took to list the source.
        is_late: whether steps were left out because no time was left.
        disk: what the store takes and leaves, as it was before the steps that tell of the night.
        notes: warnings that no step gave.
        written: the record as it was last written.
    """

    job: Job
    file: Path
    store: FeatureStore
    run_id: str
    log: JobLog
    retry_rejects: bool = False
    dataset: str = ""
    steps: list[Entry] = field(default_factory=list)
    extractions: list[dict[str, Any]] = field(default_factory=list)
    listing: float = 0.0
    is_late: bool = False
    disk: dict[str, int | None] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started, self._clock = records.now(), time.monotonic()
        self._git, self._host = git_commit(self.file.parent), records.host()

    # While it runs

    def attempt(self, step: str, name: str, work: Callable[[], Mapping[str, Any]]) -> Entry:
        """Does a step, and notes what became of it; only what is a defect of ours is raised.

        Args:
            step: which one.
            name: which of several.
            work: does it; returns what it did, or why it was ``skipped``.
        """
        entry: Entry = {"step": step, "name": name, "status": DONE}
        with self.log.about(step=f"{step} {name}".strip()):
            self._attempt(entry, work)
            self.steps.append(entry)
            self.log.step_ended(entry)
        self._write_running()
        return entry

    def _attempt(self, entry: Entry, work: Callable[[], Mapping[str, Any]]) -> None:
        start = time.monotonic()
        try:
            result = result_in_keys(work(), entry["step"])
            entry["status"] = SKIPPED if "skipped" in result else DONE
            entry["result"] = result
        except Interrupted as error:
            entry |= _told(INTERRUPTED, error, error.exit_code, entry["step"])
        except (FeaturepipeError, OSError) as error:
            code = getattr(error, "exit_code", 1) if entry["step"] in _TELLING else 1
            entry |= _told(FAILED, error, code, entry["step"])
        entry["seconds"] = round(time.monotonic() - start, 3)

    @contextmanager
    def waiting(self, why: str) -> Iterator[None]:
        """While the block runs, the record says what the run waits for, and since when."""
        self.log.event("waiting", why)
        self._write_running(waiting={"since": records.now(), "why": why})
        yield
        self._write_running()

    def not_reached(self, step: str, name: str, why: str) -> None:
        """Notes a step that was not begun."""
        self.steps.append({"step": step, "name": name, "status": NOT_REACHED, "seconds": 0.0, "result": {"why": why}})

    def failed(self, step: str, error: BaseException, exit_code: int = 1) -> None:
        """Notes that something went wrong that is no step's own failure."""
        told = _told(INTERRUPTED if exit_code > 128 else FAILED, error, exit_code, step)
        self.steps.append({"step": step, "name": "", "seconds": 0.0, **told})

    def has(self, *statuses: str) -> bool:
        """Whether anything so far ended in one of these ways."""
        return any(entry["status"] in statuses for entry in self.steps)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes the record before the block and at its end, however it ends, and logs it.

        A run that is killed leaves what it had done by then, with the status "running"; the next one sets that right.
        """
        try:
            self._note_killed()
            self._write_running()
            yield
        except KeyboardInterrupt as error:
            self.failed("run", error, 130)
            raise
        except BaseException as error:
            self.failed("run", error)
            raise
        finally:
            self.write()
            self.log.run_ended(self.written)

    def _note_killed(self) -> None:
        """Marks the job's runs that say they are running: only one holds the job's lock, and that is this one."""
        for run in self.store.runs():
            if run.get("job") == self.job.name and run.get("status") == RUNNING and run["run_id"] != self.run_id:
                host = run.get("host", {}).get("name", "?")
                self.notes.append(
                    f"run {run['run_id']}, begun {run.get('started', '?')} on {host}, was killed or lost its machine; "
                    "what it had finished stays"
                )
                with suppress(StoreError, OSError):  # the next night will
                    self.store.write_run({**run, "status": KILLED})
        for note in self.notes:
            self.log.warn(note)

    def _write_running(self, **more: Any) -> None:
        """Writes what is done so far, for the case that nothing can be written later."""
        unknown: dict[str, Any] = {"status": RUNNING, "exit_code": None}
        so_far = {name: value for name, value in self.as_dict().items() if name != "ended"}
        with suppress(StoreError, OSError):  # the record at the end warns of it
            self.store.write_run({**so_far, **unknown, **more})

    def measure(self) -> None:
        """Looks at the store's disk, once."""
        try:
            self.disk = self.disk or disk_figures(self.store.path)
        except OSError as error:
            self.log.warn(f"the store could not be measured: {error}")

    def write(self) -> None:
        """Writes the record of a run that is over; a disk without space for it does not end the night."""
        self.measure()
        self.written = self.as_dict()
        try:
            self.store.write_run(self.written)
        except (StoreError, OSError) as error:
            self.log.warn(f"the run record could not be written: {error}")

    # At the end

    @property
    def status(self) -> str:
        """How the run ended, or would if it ended now."""
        late = OUT_OF_TIME if self.is_late else DONE
        return next((status for status in (INTERRUPTED, FAILED, OUT_OF_TIME) if self.has(status)), late)

    @property
    def exit_code(self) -> int:
        """The process' exit code; see ``featurepipe --help``."""
        if self.status in (DONE, OUT_OF_TIME):
            return max((int(run.get("exit_code") or 0) for run in done_ones(self.extractions)), default=0)
        codes = [int(entry["exit_code"]) for entry in self.steps if entry["status"] == self.status]
        return next((code for code in codes if code != _TOO_MANY_REJECTS), _TOO_MANY_REJECTS)

    def as_dict(self) -> dict[str, Any]:
        """The run record, plain JSON values."""
        return {
            "run_id": self.run_id,
            "command": "run",
            "job": self.job.name,
            "job_file": str(self.file),
            "dataset": self.dataset,
            "status": self.status,
            "exit_code": self.exit_code,
            "started": self._started,
            "ended": records.now(),
            "plan": plan_of(self.job, retry_rejects=self.retry_rejects),
            **figures_of(self.extractions, listing=self.listing, wall=time.monotonic() - self._clock),
            "steps": list(self.steps),
            "extractions": [run["run_id"] for run in self.extractions],
            "store_bytes": self.disk.get("store_bytes"),
            "free_bytes": self.disk.get("free_bytes"),
            "warnings": [*self.notes, *(text for entry in self.steps for text in _warnings(entry))],
            "versions": records.versions(),
            "host": self._host,
            "git": self._git,
        }


def _warnings(entry: Entry) -> list[str]:
    return list(entry.get("result", {}).get("warnings", ()))


def _told(status: str, error: BaseException, exit_code: int, step: str) -> Entry:
    kind = type(error).__name__
    lines = error.lines if isinstance(error, FeaturepipeError) else (str(error),)
    text = in_keys(" ".join(map(str.strip, lines)), step)
    told = {"status": status, "error": text or kind, "error_type": kind, "exit_code": exit_code}
    found = getattr(error, "result", None)  # what a step had found when it decided to fail
    return told if found is None else {**told, "result": result_in_keys(found, step)}


def plan_of(job: Job, *, retry_rejects: bool) -> dict[str, Any]:
    """What a run sets out to do, as JSON values; a source's path may hold a password, and is left out."""
    return {
        "store": str(job.store),
        "features": [table.model_dump(mode="json") for table in job.features],
        "limits": job.limits.model_dump(mode="json"),
        "machine": job.machine.model_dump(mode="json"),
        "steps": [str(step) for step in steps_of(job)],
        "drift_reference": job.drift.reference if job.drift else None,
        "retry_rejects": retry_rejects,
    }
