"""The steps of a job: which there are, in their order, what each is given, and how it ends with the time budget."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from featurepipe.execution.dask import ExecutorWhenNeeded, in_this_process
from featurepipe.jobs.job import AnswerTable, BaseTable, Job, QuestionTable, SimilarTable
from featurepipe.store.exports import deleted_file

if TYPE_CHECKING:
    from featurepipe.interrupt import StopRequest
    from featurepipe.store import FeatureStore


QUESTIONS = frozenset({"similar", "labels", "outliers", "select"})
"""Steps that ask something of features."""
BEFORE_EXTRACTION = frozenset({"forget"})
"""Steps that come after the source was listed, which tells whose dataset it is, and before anything is extracted."""
OF_THIS_RUN = QUESTIONS | {"train", "finetune", "predict", "export", "drift", "depth", "routes"}
"""Steps that make no sense unless all features of this run's images are there."""
OF_ONE_DATASET = OF_THIS_RUN | {"keep", "forget"}
"""Steps that make no sense, and may do harm, unless the dataset's name is known."""
OF_ANY_RUN = frozenset({"report", "metrics"})
"""Steps that tell of a night however it went, and so run when the time is over, too."""
AT_ANY_END = frozenset({"metrics"})
"""Those of them that take an instant, and so run when the night was stopped, too: else the figures would be yesterday's."""


@dataclass(frozen=True)
class Step:
    """A step that a job asks for.

    Attributes:
        step: its table in the job file.
        name: which one, where there may be several; else empty.
        table: what the job file says of it.
    """

    step: str
    name: str
    table: BaseTable

    def __str__(self) -> str:
        return f"{self.step} {self.name}".strip()


def is_of_new(table: QuestionTable) -> bool:
    """Whether a question is asked of new images only, and so of none on many nights."""
    return isinstance(table, SimilarTable) or getattr(table, "since", None) is not None


def is_increment(table: AnswerTable) -> bool:
    """Whether what a table writes tells of new images only, under a name of its own: no night may replace another's."""
    of_new = is_of_new(table) if isinstance(table, QuestionTable) else getattr(table, "images", "all") == "new"
    return of_new and any(f"{{{name}}}" in table.to for name in ("date", "run"))


def place_of(table: AnswerTable, started: datetime, *, run: str, job: str) -> Path:
    """Where a table's answer of one run goes; the date is that of the run's beginning, in this machine's time zone.

    An increment takes a name that is free, beside that of an earlier run on the same date (``2026-11-22-2``): nobody else
    tells of its images again. Whatever tells of all images replaces what the earlier run wrote.
    """
    place = table.file(date=started.astimezone().date().isoformat(), run=run, job=job)
    if not is_increment(table):
        return place
    names = chain([place], (place.with_stem(f"{place.stem}-{number}") for number in count(2)))
    return next(name for name in names if not any(os.path.lexists(path) for path in (name, deleted_file(name))))


def steps_of(job: Job) -> Iterator[Step]:
    """The steps of a job, in the order in which they run."""
    if job.forget is not None:
        yield Step("forget", "", job.forget)
    for train in job.train:
        yield Step("train", train.out.name, train)
    for finetune in job.finetune:
        yield Step("finetune", finetune.out.name, finetune)
    for predict in job.predict:
        yield Step("predict", predict.bundle.name, predict)
    for export in job.export:
        yield Step("export", export.node, export)
    for key, question in job.questions.items():
        yield Step(key.partition("[")[0], Path(question.to).name, question)
    for name in ("drift", "depth", "routes", "compact", "keep", "report", "metrics"):
        table = getattr(job, name)
        if table is not None:
            yield Step(name, "", table)


@dataclass(frozen=True)
class Night:
    """One run of a job, as its steps see it.

    A step is a function ``(night, table) -> dict`` of plain JSON values: what it did; ``{"skipped": why}`` when there was
    nothing to do; ``"warnings"`` holds texts for the summary. It fails by raising a `FeaturepipeError`.

    Attributes:
        job: the job file.
        dataset: the dataset's name; empty if nobody knows it, and then only steps of the whole store are taken.
        store: the feature store.
        run_id: of this run; its record is ``runs/<run_id>.json``.
        before: the dataset's snapshot before this run's extractions, None on the first night. Each extraction of the night
            writes a snapshot, so that the last but one is this run's, too, where there are several feature spaces.
        stop: asks steps to stop.
        say: a line for people.
        silent: what commands are told, so that only ``say`` speaks.
        extracted: the run records of this run's extractions that were done.
        record: the run record as far as it is known: counts, changes, seconds, the steps before this one,
            and the status that the night will end with if all that is left succeeds. In the store it is still running.
        executor: of the run's cluster, see `featurepipe.execution.dask.executor_when_needed`.
    """

    job: Job
    dataset: str
    store: FeatureStore
    run_id: str
    before: str | None
    stop: StopRequest
    say: Callable[[str], None]
    silent: bool
    extracted: tuple[dict[str, Any], ...]
    record: dict[str, Any]
    executor: ExecutorWhenNeeded = in_this_process

    def place(self, table: AnswerTable) -> Path:
        """Where this run's answer of a table goes, see `place_of`."""
        return place_of(table, datetime.fromisoformat(self.record["started"]), run=self.run_id, job=self.job.name)


class _OutOfTimeError(Exception):
    """The deadline passed."""


def within_time(deadline: float | None, work: Callable[[], dict[str, Any]], otherwise: str) -> dict[str, Any]:
    """Does work that the deadline breaks off at once.

    Only for work that may be killed at any moment, because it puts everything in its place at its very end or goes on from
    what it has: training, comparing layers, merging parts. It is broken off between two steps of Python; a fit inside
    compiled code ends first.

    Args:
        deadline: value of `time.monotonic`, None for never; only the main thread can be broken off.
        work: what to do.
        otherwise: what becomes of it when there is no time left, for the summary.

    Returns:
        What ``work`` does, or why it is ``skipped``.
    """
    try:
        with _alarm(deadline):
            return work()
    except _OutOfTimeError:
        why = f"no time was left: {otherwise}"
        return {"skipped": why, "warnings": [why]}


@contextmanager
def _alarm(deadline: float | None) -> Iterator[None]:
    if deadline is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number: int, _frame: FrameType | None) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # someone else's alarm, which comes a little later now
        signal.signal(signal.SIGALRM, before)
