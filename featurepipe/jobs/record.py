"""The record of a job's run, there from its beginning: counts, seconds, steps, the version of the job file, the store's disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from featurepipe import records
from featurepipe.errors import FeaturepipeError, Interrupted, StoreError
from featurepipe.jobs.job import Job
from featurepipe.jobs.log import JobLog
from featurepipe.jobs.step import steps_of, within_time
from featurepipe.jobs.validation import keys_of, result_in_keys
from featurepipe.records import KILLED, RUNNING
from featurepipe.store import FeatureStore

_GIT_SECONDS = 5.0
"""Seconds: a repository on a slow share must not hold up a night."""


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is at, with ``-dirty`` if tracked files were changed since; None without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # to look changes nothing
    try:
        found = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True, text=True, timeout=_GIT_SECONDS, env=environment, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git, no repository, not ours, too slow
        return None
    return found.stdout.strip()


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
        "copies": _copies(extractions),
        "forgotten": max((int(run.get("forgotten") or 0) for run in extractions), default=0),
        "counts_by_space": {run["space"]: _counts_of(run, extractions) for run in _last_tries(extractions)},
        "changes": next((run["changes"] for run in extractions if run.get("changes")), {}),
        "new_rejects": _new_rejects(extractions),
        "seconds": seconds,
        "images_per_second": round(counts["computed"] / computing, 2) if computing else None,
        "verdict": records.verdict(seconds, sum(map(_busy, extractions)), device=device).spelled(keys_of("extract")),
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


def _copies(extractions: Sequence[Run]) -> int:
    """Images known in the first feature space only as copies of what this night computed."""
    first = next(iter(done_ones(extractions) or extractions[-1:]), None)
    if first is None:
        return 0
    return sum(int(run.get("copies", 0)) for run in extractions if run["fingerprint"] == first["fingerprint"])


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
    """Some of the images that could not be used for the first time in this run; a later space sees them as known ones."""
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


DISK_SECONDS = 3.0
"""Seconds for which a store is measured: a night that is stopped ends soon, however many files there are."""


def disk_figures(store: Path) -> dict[str, int | None]:
    """``store_bytes`` and ``free_bytes``; None where the disk is too slow to tell."""

    def work() -> dict[str, Any]:
        return {"store_bytes": bytes_in(store), "free_bytes": shutil.disk_usage(store).free}

    found = within_time(time.monotonic() + DISK_SECONDS, work, "the store was not measured")
    return {name: found.get(name) for name in ("store_bytes", "free_bytes")}


def bytes_in(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files in a folder, each once however many names it has; files that vanish meanwhile count nothing."""
    sizes: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - as many as there are parts
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


DONE, SKIPPED, FAILED, NOT_REACHED = "done", "skipped", "failed", "not reached"
INTERRUPTED, OUT_OF_TIME = "interrupted", "out of time"
_TOO_MANY_REJECTS = 4
_TELLING = ("list", "extract")
"""Steps whose failures have exit codes of their own; any other one that fails is a failure like the next."""

Entry = dict[str, Any]


@dataclass
class RunRecord:
    """The record of one run.

    Attributes:
        job: the job.
        file: its file.
        store: where the record goes.
        run_id: of this run.
        dataset: its name, empty while unknown.
        retry_rejects: whether rejects are tried again.
        log: told what becomes of each step.
        steps: what became of each step, in their order.
        extractions: the run records of this run's extractions, also of those that failed.
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

    def warn(self, text: str) -> None:
        """Notes and says a warning of something that failed."""
        self.notes.append(text)
        self.log.warn(text)

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
                with suppress(StoreError, OSError):  # the next run will
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

    def _figures(self) -> dict[str, Any]:
        """The figures of the night; where no extraction began, images count as listed all the same."""
        found = figures_of(self.extractions, listing=self.listing, wall=time.monotonic() - self._clock)
        if not self.extractions:
            listed = (
                entry["result"]["listed"] for entry in self.steps if entry["step"] == "list" and entry["status"] == DONE
            )
            found["counts"]["listed"] = next(listed, 0)
        return found

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
            **self._figures(),
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
    lines = error.spelled(keys_of(step)) if isinstance(error, FeaturepipeError) else (str(error),)
    text = " ".join(map(str.strip, lines))
    told = {"status": status, "error": text or kind, "error_type": kind, "exit_code": exit_code}
    # What a step had found when it decided to fail; that of an extraction is a run record of its own.
    found = error.record if isinstance(error, FeaturepipeError) and step != "extract" else None
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
