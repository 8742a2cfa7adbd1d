"""The steps of a job in their order, and what each needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from featurepipe.jobs.job import DepthTable, DriftTable, Job, KeepTable, PredictTable, ReportTable, Table, TrainTable

OF_TONIGHT = frozenset({"train", "predict", "drift", "depth"})
"""Steps that make no sense unless all features of tonight's images are there."""
OF_ONE_DATASET = OF_TONIGHT | {"keep"}
"""Steps that make no sense, and may do harm, unless the dataset's name is known."""
OF_ANY_NIGHT = frozenset({"report", "metrics"})
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
    table: Table

    def __str__(self) -> str:
        return f"{self.step} {self.name}".strip()


def steps_of(job: Job) -> Iterator[Step]:
    """The steps of a job, in the order in which they run."""
    for train in job.train:
        yield Step("train", train.out.name, train)
    for predict in job.predict:
        yield Step("predict", predict.bundle.name, predict)
    for name in ("drift", "depth", "compact", "keep", "report", "metrics"):
        table = getattr(job, name)
        if table is not None:
            yield Step(name, "", table)


def outlook(table: Table, job: str) -> tuple[bool | None, str]:
    """Whether a step of a job would run, None where that depends on the night; and what it would do, if that were now."""
    match table:
        case TrainTable():
            return _of_training(table)
        case PredictTable():
            file = table.file(date=datetime.now(UTC).date().isoformat(), run="RUN-ID", job=job)
            return None if table.images == "new" else True, f"predicts {table.images} images, into {file.name}"
        case DriftTable():
            reference = "those of nights before" if table.reference == "previous" else f"snapshot {table.reference}"
            return None, f"compares tonight's new images with {reference}"
        case DepthTable():
            return (True, "always") if table.when == "always" else (None, f"if {table.when} since the last comparison")
        case _:
            return True, _upkeep(table)


def _upkeep(table: Table) -> str:
    if isinstance(table, KeepTable):
        return f"keeps {_all(table.snapshots)} snapshots and {_all(table.runs)} run records"
    if isinstance(table, ReportTable):
        return f"the last {table.last} nights, into {table.to.name}"
    return "always"


def _of_training(table: TrainTable) -> tuple[bool | None, str]:
    if table.when == "always":
        return True, "always"
    if not table.out.exists():
        return True, "there is no bundle yet"
    return None, "if images, labels or settings are not those that the bundle was trained with"


def _all(count: int | None) -> Any:
    return "all" if count is None else count
