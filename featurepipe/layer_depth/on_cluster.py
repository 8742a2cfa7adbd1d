"""Measuring cells on the workers of a cluster: each a task, with what all of them need sent to a worker once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from featurepipe.cluster import Team, one_at_a_time
from featurepipe.extraction.worker_tasks import alone_at_desk, this_desk
from featurepipe.layer_depth.probes import Cell, Scores, measure_fold, scores_again
from featurepipe.layer_depth.timing import Timing
from featurepipe.store import FeatureStore

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.layer_depth.measure import Series, Work
    from featurepipe.layer_depth.study import Study

COPIES = 6
"""Times that a cell's features are in memory at once, as float32: read, standardised, in the fold's parts, in a solver."""


class Task(NamedTuple):
    """One column on one fold. Dask puts the study there before a worker begins, so that little travels with each task."""

    number: int
    network: str
    columns: tuple[str, ...]
    fold: int
    heads: Sequence[str]
    study: Any

    def __str__(self) -> str:
        return f"{'+'.join(self.columns)} of the {self.network} network on fold {self.fold}"


def measured_on(
    team: Team, study: Study, missing: Sequence[Work], *, wide: bool, stop: Callable[[], bool]
) -> Iterator[tuple[Work, list[Cell]]]:
    """Yields the cells of each column and fold as they come.

    The study goes to the scheduler once and from there, and from worker to worker, to whoever needs it: a task like any other,
    so that it is made again where a worker is lost.

    Args:
        team: the workers.
        study: what is compared on what.
        missing: what to measure.
        wide: whether features are so many that a worker should put all its cores into one cell.
        stop: asked between answers; may raise.

    Raises:
        ClusterError: no worker is left, or the scheduler is gone.
    """
    team.check(study.store.path)
    there, place = _travelling(team, study), {(fold.seed, fold.number): at for at, fold in enumerate(study.folds)}
    tasks = (
        Task(number, work.network, work.columns, place[work.fold.seed, work.fold.number], work.heads, there)
        for number, work in enumerate(missing)
    )
    beside = 1 if wide else max((worker.threads for worker in team.workers()), default=1)
    flow = team.results(tasks, partial(_cells, wide=wide), stop=stop, in_flight_per_worker=beside + 1)
    with closing(flow) as answers:
        for task, cells in answers:
            yield missing[task.number], cells


def scores_on(
    team: Team, study: Study, series: Series, numbers: Sequence[int], *, wide: bool
) -> Iterator[tuple[int, Scores]]:
    """Yields what heads say that are fitted again, with the number of the fold, as they come; see `probes.scores_again`.

    Args:
        team: the workers.
        study: what is compared on what.
        series: a column's cells, whose parameters are taken.
        numbers: of the folds.
        wide: as in `measured_on`.
    """
    nothing = np.empty(0, np.bool_)
    cells = {number: replace(series.cells[number], correct=nothing, shifted=None) for number in numbers}
    there = _travelling(team, study)
    tasks = (Task(number, series.network, series.columns, number, (series.head,), there) for number in numbers)
    with closing(team.results(tasks, partial(_scores, cells=cells, wide=wide))) as answers:
        for task, scores in answers:
            yield task.number, scores


def _travelling(team: Team, study: Study) -> Future[Study]:
    """The study as a task's result."""
    here = replace(study, store=FeatureStore(study.store.path.absolute()))
    fit = {"workers": team.addresses(), "allow_other_workers": True} if team.refused else {}
    return team.scheduler.submit(pickle.loads, pickle.dumps(here), pure=False, retries=3, **fit)


def _cells(task: Task, *, wide: bool) -> list[Cell]:
    """A task, as it runs in a worker."""
    with _at_desk(task, wide=wide):
        return measure_fold(task.study.data(task.network, task.columns), task.study.folds[task.fold], task.heads)


def _scores(task: Task, *, cells: Mapping[int, Cell], wide: bool) -> Scores:
    """The same, for scores."""
    with _at_desk(task, wide=wide):
        data = task.study.data(task.network, task.columns)
        return scores_again(data, task.study.folds[task.fold], cells[task.number])


@contextmanager
def _at_desk(task: Task, *, wide: bool) -> Iterator[None]:
    """On one core, beside other threads of the worker; or alone on all of them, if one cell needs them, or the memory."""
    desk, study = this_desk(), task.study
    bytes_of_cell = 4 * COPIES * len(study.images) * sum(study.width(column) for column in task.columns)
    alone = wide or bool(desk.memory and desk.threads * bytes_of_cell > desk.memory)
    with one_at_a_time() if alone else nullcontext():
        threadpool_limits(desk.threads if alone else 1, user_api="blas")  # not undone: it holds for the whole process
        yield


@dataclass(frozen=True)
class TimedThere:
    """A forward that a worker times, since that is where features are computed.

    Attributes:
        timing: what is timed.
        team: the workers, of which any one will do.
        about: key and description of the timing, as a worker gives them.
    """

    timing: Timing
    team: Team
    about: tuple[str, dict[str, Any]]

    @classmethod
    def on(cls, team: Team, timing: Timing) -> TimedThere:
        """Has a worker say what it is."""
        return cls(timing, team, team.once(timing, _about))

    @property
    def key(self) -> str:
        """See `Timing`."""
        return self.about[0]

    def as_dict(self) -> dict[str, Any]:
        """See `Timing`."""
        return self.about[1]

    def measure(self) -> dict[str, Any]:
        """See `Timing`; by a worker that has nothing else to do for us."""
        return self.team.once(self.timing, _times)


def _about(timing: Timing) -> tuple[str, dict[str, Any]]:
    with alone_at_desk():
        return timing.key, timing.as_dict()


def _times(timing: Timing) -> dict[str, Any]:
    with alone_at_desk():
        return timing.measure()
