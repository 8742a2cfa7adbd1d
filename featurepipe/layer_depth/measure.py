"""Measuring every column on every fold, several at once, each kept as soon as it is there."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from featurepipe.errors import Interrupted, UsageError
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.execution.local import LocalExecutor, ProcessExecutor
from featurepipe.heads.families import SMALL_VALUES
from featurepipe.interrupt import stop_on_signals
from featurepipe.layer_depth.journal import Journal, key_of
from featurepipe.layer_depth.probes import Cell, Scores, measure_fold, scores_again
from featurepipe.records import host, is_undisturbed, versions

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone
    from featurepipe.layer_depth.study import Study
    from featurepipe.progress import Progress


WORTH_STARTING = 3.0
"""Seconds of work from which on processes are started for it, which takes about as long."""
COPIES = 6
"""Times that a cell's features are in memory at once, as float32: read, standardised, in the fold's parts, in a solver."""


@dataclass(frozen=True)
class Series:
    """All cells of one head on one set of columns, in the order of the folds.

    Attributes:
        network: ``pretrained`` or ``random``.
        columns: side by side.
        head: name of the family.
        cells: one a fold.
    """

    network: str
    columns: tuple[str, ...]
    head: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Work:
    """One column on one fold with the heads that are not measured yet: a shard of the measuring.

    Attributes:
        key: of the column in the journal.
        network: ``pretrained`` or ``random``.
        columns: side by side.
        fold: number of the fold in the study.
        heads: names of the families.
    """

    key: str
    network: str
    columns: tuple[str, ...]
    fold: int
    heads: Sequence[str]

    def __str__(self) -> str:
        return f"{'+'.join(self.columns)} of the {self.network} network on fold {self.fold}"


@dataclass(frozen=True)
class Measuring:
    """What all cells have in common.

    Attributes:
        study: what is compared on what.
        wide: whether features are so many that one fit should have all cores.
    """

    study: Study
    wide: bool

    @classmethod
    def of(cls, study: Study) -> Measuring:
        """Decides by the largest column whether fits run side by side."""
        values = len(study.folds[0].train) * max(column.width for column in study.columns)
        return cls(study, values > SMALL_VALUES)

    @contextmanager
    def on_cores(self, worker: Worker, columns: Sequence[str]) -> Iterator[Study]:
        """On one core, beside other threads of the worker; or alone on all of them, if one cell needs them, or the memory."""
        if worker.is_local:
            yield self.study
            return
        study = self.study
        bytes_of_cell = 4 * COPIES * len(study.images) * sum(study.width(column) for column in columns)
        alone = self.wide or bool(worker.memory and worker.threads * bytes_of_cell > worker.memory)
        with worker.alone() if alone else nullcontext():
            threadpool_limits(
                worker.threads if alone else 1, user_api="blas"
            )  # not undone: it holds for the whole process
            yield study


@dataclass(frozen=True)
class Scoring:
    """What all fits again of a column's heads have in common.

    Attributes:
        measuring: the study.
        series: the column's cells, whose parameters are taken.
    """

    measuring: Measuring
    series: Series

    def __getstate__(self) -> dict[str, Any]:
        nothing = np.empty(0, np.bool_)
        cells = [replace(cell, contributions=nothing, shifted=None) for cell in self.series.cells]
        return {"measuring": self.measuring, "series": replace(self.series, cells=cells)}


def measure_cells(context: Measuring, work: Work, worker: Worker, _stop: Stop, _report: Report) -> list[Cell]:
    """Measures one column on one fold; see `featurepipe.layer_depth.probes.measure_fold`."""
    with context.on_cores(worker, work.columns) as study:
        return measure_fold(study.data(work.network, work.columns), study.folds[work.fold], work.heads)


def score_fold(context: Scoring, fold: int, worker: Worker, _stop: Stop, _report: Report) -> Scores:
    """Fits the head of one fold again, for what it says of each image; see `featurepipe.layer_depth.probes.scores_again`."""
    series = context.series
    with context.measuring.on_cores(worker, series.columns) as study:
        return scores_again(study.data(series.network, series.columns), study.folds[fold], series.cells[fold])


def scores_of(executor: Executor, study: Study, series: Series, folds: Sequence[int]) -> Iterator[tuple[int, Scores]]:
    """Yields what heads say that are fitted again, with the number of the fold, as they come."""
    context = Scoring(Measuring.of(study), series)
    with closing(executor.map(score_fold, folds, context=context)) as results:
        yield from results


def measure(
    study: Study,
    sets: Sequence[tuple[str, tuple[str, ...]]],
    journal: Journal,
    *,
    jobs: int | None,
    progress: Progress,
    executor: Executor | None = None,
) -> list[Series]:
    """Measures sets of columns on all folds with all heads; what the journal has is not measured again.

    Args:
        study: what is compared on what.
        sets: (network, columns) each.
        journal: where cells are kept.
        jobs: processes at once; None for one per CPU. Where features are many, one that uses all CPUs.
        progress: advanced by one for each head on each fold.
        executor: measures instead, in any order, if it is elsewhere; the journal stays here.

    Raises:
        Interrupted: SIGINT or SIGTERM; what was measured is kept, and the message says how much.
    """
    missing = _missing(study, sets, journal, progress)
    total = len(sets) * len(study.folds) * len(study.protocol.heads)
    left = sum(len(work.heads) for work in missing)
    try:
        executor = executor or LocalExecutor()
        if missing:
            executor.check(study.store.path)
        with ending_at_once(executor) as stop, closing(_measured(study, missing, jobs, executor, stop)) as results:
            for work, cells in results:
                journal.add(work.key, cells)
                left -= len(cells)
                progress.advance(len(cells), f"{work.network} {'+'.join(work.columns)}")
    except Interrupted as error:
        kept = f"{total - left:,} of {total:,} fits are measured and kept"
        raise Interrupted(f"{error}: {kept}; the same command goes on from there", error.exit_code - 128) from error
    return [
        Series(network, columns, head, _cells(study, journal, study.key(network, columns), head))
        for network, columns in sets
        for head in study.protocol.heads
    ]


def _missing(
    study: Study, sets: Sequence[tuple[str, tuple[str, ...]]], journal: Journal, progress: Progress
) -> list[Work]:
    missing, known = [], 0
    for network, columns in sets:
        key = study.key(network, columns)
        for number, fold in enumerate(study.folds):
            heads = [h for h in study.protocol.heads if journal.get(key, h, fold.seed, fold.number) is None]
            known += len(study.protocol.heads) - len(heads)
            if heads:
                missing.append(Work(key, network, columns, number, heads))
    # A step of nothing would let the first fit, which has all that is done once in it, tell how long the rest takes.
    if known:
        progress.advance(known)
    return missing


def _cells(study: Study, journal: Journal, key: str, head: str) -> list[Cell]:
    found = (journal.get(key, head, fold.seed, fold.number) for fold in study.folds)
    return [cell for cell in found if cell is not None]


def _measured(
    study: Study, missing: Sequence[Work], jobs: int | None, executor: Executor, stop: Stop
) -> Generator[tuple[Work, list[Cell]], None, None]:
    """Cells as they come: small features side by side on one thread each, large ones one after the other on all."""
    if not missing:
        return
    context, beside = Measuring.of(study), 1
    if executor.is_local:
        yield from _measured_here(executor, context, missing, jobs or os.cpu_count() or 1)
        return
    if not context.wide:
        beside = executor.most_threads()
    mapped = executor.map(measure_cells, missing, context=context, stop=stop, in_flight=beside + 1)
    with closing(mapped) as results:
        yield from results


def _measured_here(
    executor: Executor, context: Measuring, missing: Sequence[Work], processes: int
) -> Generator[tuple[Work, list[Cell]], None, None]:
    """In processes of this machine, where several fits at once are faster than one on all cores, and worth starting them.

    What takes seconds in all is measured in this process, on one thread as in theirs, so that the same bits come out.
    """
    side_by_side = processes > 1 and len(missing) > 1 and not context.wide
    begun, start = 0, time.perf_counter()

    def a_few() -> Iterator[Work]:
        nonlocal begun
        for begun, work in enumerate(missing, 1):
            yield work
            spent = time.perf_counter() - start
            if spent > WORTH_STARTING and spent / begun * (len(missing) - begun) > WORTH_STARTING:
                return

    with (
        threadpool_limits(1) if side_by_side else nullcontext(),
        closing(
            executor.map(measure_cells, a_few() if side_by_side else missing, context=context, interruptible=False)
        ) as results,
    ):
        yield from results
    if side_by_side and begun < len(missing):
        others = ProcessExecutor(processes).map(measure_cells, missing[begun:], context=context, interruptible=False)
        with closing(others) as results:
            yield from results


@contextmanager
def ending_at_once(executor: Executor) -> Iterator[Stop]:
    """A signal ends the work there and then: what is measured is kept, what is under way is measured again.

    In this process also between two results, in the middle of a long fit, or of a journal's line, which is passed over.
    Elsewhere as soon as the executor asks.
    """
    with stop_on_signals() as asked:
        if executor.is_local:
            with asked.raised():
                yield bool
            return

        def stop() -> bool:
            if asked():
                raise Interrupted(f"stopped by {asked.name}", asked.signal_number or 2)
            return False

        yield stop


FEW = 4
"""Images in a forward on a CPU: slow networks take long for more, and the time of one hardly changes."""


NODE_SECONDS = 1.0
"""About how long each node is timed."""

AGAIN = 3600.0
"""Seconds after which times of a busy machine are measured again."""


@dataclass(frozen=True)
class Timing:
    """What is timed, and where.

    Attributes:
        backbone: name of the network.
        nodes: up to each of which the forward is timed.
        precision: of weights and activations.
        device: a torch device.
        batch: images in a forward.
    """

    backbone: str
    nodes: tuple[str, ...]
    precision: str
    device: str
    batch: int

    @property
    def key(self) -> str:
        """Names all that the times depend on, the machine among them."""
        return key_of(what="times", torch=versions()["torch"], **asdict(self), **self.machine())

    def machine(self) -> dict[str, Any]:
        """What computes."""
        import torch

        is_cuda = self.device.startswith("cuda")
        return {
            "host": host()["name"],
            "processor": torch.cuda.get_device_name(self.device) if is_cuda else "cpu",
            "threads": torch.get_num_threads(),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"device": self.device, "precision": self.precision, "batch": self.batch, **self.machine()}

    def measure(self) -> dict[str, Any]:
        """Measures the forward for one image up to each node.

        Returns:
            ``{"milliseconds": {node: time}, "waited": share}``, see ``NodeTimes``.
        """
        from featurepipe.backbones.engine import node_times

        return asdict(
            node_times(
                network_to_time(self.backbone),
                self.nodes,
                precision=self.precision,
                device=self.device,
                batch=self.batch,
                seconds=NODE_SECONDS,
            )
        )


class TimedForward:
    """A forward that is timed by any one worker of an executor: where features are computed.

    Args:
        executor: times it.
        timing: what is timed.

    Attributes:
        key: see `Timing`, as the worker says it.
    """

    def __init__(self, executor: Executor, timing: Timing) -> None:
        self._executor, self._timing = executor, timing
        self.key, self._about = executor.once(_describe, timing)

    def as_dict(self) -> dict[str, Any]:
        """See `Timing`."""
        return self._about

    def measure(self) -> dict[str, Any]:
        """See `Timing`."""
        return self._executor.once(_measure, self._timing)


def _describe(_: None, timing: Timing, worker: Worker, _stop: Stop, _report: Report) -> tuple[str, dict[str, Any]]:
    # Not above: processes that measure cells need no PyTorch.
    from featurepipe.features.session import alone_on_all_cores

    with alone_on_all_cores(worker):
        return timing.key, timing.as_dict()


def _measure(_: None, timing: Timing, worker: Worker, _stop: Stop, _report: Report) -> dict[str, Any]:
    from featurepipe.features.session import alone_on_all_cores

    with alone_on_all_cores(worker):
        return timing.measure()


def least_disturbed(timing: TimedForward, journal: Journal) -> dict[str, Any]:
    """The times of all tries so far that waited least; tried again after an hour, while all were disturbed.

    So the same command says the same times again, and a machine that is always busy is not timed again and again.

    Returns:
        As `Timing.measure`, with ``tried``, when that was last, in seconds since 1970.

    Raises:
        DiskFull: no space is left to keep them.
    """
    known, now = journal.known(timing.key), time.time()
    if known is not None and (is_undisturbed(known) or 0 <= now - known.get("tried", 0.0) < AGAIN):
        return dict(known)
    tries = [timing.measure(), *([known] if known else [])]
    best = {**min(tries, key=lambda measured: float(measured["waited"])), "tried": now}
    journal.keep(timing.key, best)
    return best


def network_to_time(name: str) -> Backbone:
    """The network with random weights, which take the same time and are always at hand; else as its author's code builds it."""
    from featurepipe.backbones import load_backbone

    network = load_backbone(name, "none")
    try:
        network.module  # noqa: B018 - builds it
    except UsageError:  # a layer of the user's own whose values cannot be drawn anew
        return load_backbone(name)
    return network
