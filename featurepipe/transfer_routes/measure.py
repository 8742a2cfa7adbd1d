"""Measuring routes on draws of the training images, each kept as soon as it is there: the cheapest and most telling first."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from threadpoolctl import threadpool_limits

from featurepipe.display import counted
from featurepipe.errors import Interrupted, Message
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.layer_depth.folds import Fold
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import Series, ending_at_once
from featurepipe.layer_depth.phases import divisions_of, fit_seconds
from featurepipe.layer_depth.probes import Cell
from featurepipe.layer_depth.study import PRETRAINED, Study
from featurepipe.progress import Progress, took
from featurepipe.training.options import SHARES
from featurepipe.transfer_routes.options import (
    AS_IT_IS,
    BOTTLENECK,
    FULL,
    LAYERS,
    NODE,
    SCRATCH,
    TAIL,
    TUNED,
    RoutesOptions,
)
from featurepipe.transfer_routes.trials import (
    At,
    Diverged,
    Route,
    RoutesContext,
    RouteTrial,
    measure_as_it_is,
    measure_bottleneck,
    measure_images,
    measure_layers,
    measure_node,
    measure_tail,
)

_MEASURES: Mapping[str, Callable[[RoutesContext, RouteTrial, Fold, At], Cell | Diverged]] = {
    AS_IT_IS: measure_as_it_is,
    BOTTLENECK: measure_bottleneck,
    NODE: measure_node,
    LAYERS: measure_layers,
    TAIL: measure_tail,
    FULL: measure_images,
    SCRATCH: measure_images,
}


def measure_trial(
    context: RoutesContext, trial: RouteTrial, worker: Worker, _stop: Stop, report: Report
) -> Cell | Diverged:
    """Measures one route on one draw, alone on all cores: time and memory count. Here it reports what it is at, as text."""

    def at(text: str) -> None:
        worker.live(report)(f"{trial}: {text}")

    with worker.alone(), nullcontext() if worker.is_local else threadpool_limits(worker.threads):
        fold = context.study.draws[trial.size, trial.seed]
        start = time.perf_counter()
        with peak_memory() as memory:
            cell = _MEASURES[trial.route.kind](context, trial, fold, at)
        if isinstance(cell, Diverged):
            return cell
        besides = {**cell.besides, **({} if memory.bytes is None else {"memory": float(memory.bytes)})}
        return replace(
            cell, head=trial.route.name, seed=trial.seed, fold=0, seconds=time.perf_counter() - start, besides=besides
        )


@dataclass
class PeakMemory:
    """The most memory that a block took.

    Attributes:
        bytes: by which the process grew; None where the system does not tell.
    """

    bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """By how much the process' memory grows at most while the block runs; Linux alone tells."""
    status, reset, found = Path("/proc/self/status"), Path("/proc/self/clear_refs"), PeakMemory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)  # what glibc keeps of earlier trials would be taken again without growth
    try:
        reset.write_text("5")  # VmHWM counts from now on: proc(5)
        before = _of_status(status, "VmRSS")
    except (OSError, ValueError):
        yield found
        return
    yield found
    found.bytes = max(_of_status(status, "VmHWM") - before, 0)


def _of_status(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path} does not say {name}")


OVERRUN_SECONDS = 10.0
"""By how much a measurement takes longer than expected where that is told."""
PRIOR_SECONDS = 10.0
"""Of trials as long as estimated, beside which those of other sizes and routes are weighed."""
OVER_BUDGET = "the budget would not have sufficed"


@dataclass(frozen=True)
class Untried:
    """A trial that has no result.

    Attributes:
        trial: which.
        seconds: that it would take, estimated.
        why: it has none.
    """

    trial: RouteTrial
    seconds: float
    why: str = OVER_BUDGET


class _Took(NamedTuple):
    """A trial that was measured: its route, its size, the seconds that were estimated, and those that it took."""

    route: Route
    size: int | str
    estimate: float
    seconds: float


class TrialTimes:
    """How long trials take: estimated from the network's times, and corrected by the trials that were measured.

    The correction is the time of the trials that are nearest over what was estimated for them: of the same route and size, else
    of the route, else, but only where they took longer, of the routes that are estimated alike (heads on frozen features; tuned
    layers). Trials of few seconds say little of larger ones: to those of other sizes and routes `PRIOR_SECONDS` are added that
    were right.

    Args:
        context: of the trials.
        milliseconds: of the forward for one image up to each node.
    """

    def __init__(self, context: RoutesContext, milliseconds: Mapping[str, float]) -> None:
        self._context, self._milliseconds = context, milliseconds
        self._known: list[_Took] = []

    def seconds(self, trial: RouteTrial) -> float:
        """That a trial takes."""
        return self.estimate(trial) * self._correction(trial)

    def learn(self, trial: RouteTrial, seconds: float) -> None:
        """Takes note of how long one took."""
        self._known.append(_Took(trial.route, trial.size, self.estimate(trial), seconds))

    def _correction(self, trial: RouteTrial) -> float:
        def ratio(some: Sequence[_Took], prior: float) -> float:
            return (sum(one.seconds for one in some) + prior) / (sum(one.estimate for one in some) + prior)

        route = trial.route
        own = [one for one in self._known if one.route.name == route.name]
        if same := [one for one in own if one.size == trial.size]:
            return ratio(same, 0.0)
        if own:
            return ratio(own, PRIOR_SECONDS)
        alike = [one for one in self._known if _estimated_as(one.route) == _estimated_as(route)]
        return max(ratio(alike, PRIOR_SECONDS), 1.0)

    def estimate(self, trial: RouteTrial) -> float:
        """As far as it is known before any trial."""
        context, study, route = self._context, self._context.every, trial.route
        fold = context.study.draws[trial.size, trial.seed]
        there = 0 if study.elsewhere is None else len(study.elsewhere.rows)
        above = milliseconds_above(self._milliseconds, context.bottleneck, route.cut)
        images = len(fold.fit), len(fold.choose), len(fold.test) + there
        return route_seconds(route, context.options, above, images, max(len(study.classes), 1))


def _estimated_as(route: Route) -> str:
    return "tuned" if route.kind in TUNED else AS_IT_IS if route.kind == AS_IT_IS else "frozen"


def milliseconds_above(milliseconds: Mapping[str, float], bottleneck: str, cut: str) -> float:
    """Of the forward of one image above a node, from those up to each node; of all of it without a cut."""
    whole = milliseconds[bottleneck.partition(":")[0]]
    return max(whole - milliseconds[cut], 0.05 * whole) if cut else whole


def route_seconds(
    route: Route, options: RoutesOptions, above: float, images: tuple[int, int, int], classes: int
) -> float:
    """About how long a route takes on one draw: heads as in depth, and of what is tuned a backward as long as two forwards.

    Args:
        route: which.
        options: as asked for.
        above: milliseconds of the forward of one image through the layers that are tuned.
        images: that are learned from, that choose, and that are tested.
        classes: or labels; 1 of numbers.
    """
    fit, choose, test = images
    if route.kind in TUNED:
        tuning, is_scratch = options.tuning(route.kind, route.cut), route.kind == SCRATCH
        epochs = tuning.schedule(max(fit, 1), is_scratch=is_scratch).epochs
        return 1.0 + above / 1000 * (epochs * (3 * fit + choose) + test)
    if route.kind == AS_IT_IS:
        return 0.1
    head = "ridge" if options.target_type == "continuous" else "logistic"
    of_all = partial(fit_seconds, fit + choose, classes=classes, head=head)
    to_choose = partial(fit_seconds, fit, classes=classes, divisions=1, head=head)
    divisions, columns = divisions_of(fit + choose), len(route.columns)
    if route.kind == NODE:
        return of_all(route.width // columns) + divisions * columns * to_choose(route.width // columns)
    if route.kind == LAYERS:
        return of_all(route.width) + divisions * sum(to_choose(round(share * route.width)) for share in SHARES)
    return of_all(route.width)


def trials_of(context: RoutesContext, routes: Sequence[Route]) -> list[RouteTrial]:
    """Every route on every draw; the network as it is learns nothing, so that one draw tells all."""
    sizes, found = context.study.sizes, []
    for route in routes:
        for size in sizes[-1:] if route.kind == AS_IT_IS else sizes:
            seeds = range(1 if route.kind == AS_IT_IS else context.options.seeds)
            found += [
                RouteTrial(context.key(route, size.name, seed), route, size.name, seed, context.study.per)
                for seed in seeds
            ]
    return found


def measure_routes(
    context: RoutesContext,
    trials: Sequence[RouteTrial],
    journal: Journal,
    outlook: TrialTimes,
    *,
    budget: float | None,
    executor: Executor,
    progress: Progress,
) -> list[Untried]:
    """Measures trials that the journal does not have, those first that tell most for their time.

    Args:
        context: what they have in common.
        trials: which.
        journal: where cells are kept.
        outlook: how long they take; learns from those that are done.
        budget: seconds that trials may take from now on; None for any time. The first is tried if it fits by itself.
        executor: measures.
        progress: advanced by one for each trial.

    Returns:
        Those that would have taken too long, and those that diverged; the next call tries both again.

    Raises:
        Interrupted: SIGINT or SIGTERM; what was measured is kept, and the message says how much.
    """
    queue = _Queue(context, missing_of(trials, journal, outlook), outlook, budget, progress, executor)
    done = len(trials) - len(queue.waiting)
    if done:
        progress.advance(done)
    try:
        executor.check(context.every.store.path)
        queue.tell(queue.beyond(), "")
        with ending_at_once(executor) as stop:
            mapped = executor.map(
                measure_trial, queue.in_order(), context=context, stop=stop, report=partial(progress.advance, 0),
                in_flight=1,
            )  # fmt: skip
            with closing(mapped) as results:
                for trial, cell in results:
                    progress.advance(1, str(trial))
                    if isinstance(cell, Diverged):
                        queue.untried.append(Untried(trial, outlook.seconds(trial), diverged := _diverged(cell)))
                        progress.say(f"{trial}: {diverged}")
                        continue
                    journal.add(trial.key, [cell])
                    queue.learn(trial, cell.seconds)
                    done += 1
    except Interrupted as error:
        kept = f"{done:,} of {len(trials):,} measurements are kept"
        raise Interrupted(f"{error}: {kept}; the same command goes on from there", error.exit_code - 128) from error
    return queue.untried


def _diverged(cell: Diverged) -> Message:
    return Message("it diverged: ", cell.why)


class _Queue:
    """Trials that wait for their turn, and what the budget is too short for.

    Attributes:
        waiting: those without a turn yet.
        untried: those that have no result.
    """

    def __init__(
        self, context: RoutesContext, waiting: list[RouteTrial], outlook: TrialTimes, budget: float | None,
        progress: Progress, executor: Executor,
    ) -> None:  # fmt: skip
        self.waiting, self.untried = waiting, list[Untried]()
        self._context, self._outlook, self._progress, self._executor = context, outlook, progress, executor
        self._end = math.inf if budget is None else time.monotonic() + budget
        self._told = set[str]()

    def in_order(self) -> Generator[RouteTrial, None, None]:
        """Pulled when there is room; sorted anew each time, since estimates learn."""
        under_way = 0.0  # of the first; elsewhere another is at work while one waits
        while self.waiting:
            trial = self._sorted()[0]
            self.waiting.remove(trial)
            seconds = self._outlook.seconds(trial)
            if (1 + under_way) * seconds > self._end - time.monotonic():
                self.untried.append(Untried(trial, seconds))
                self.tell([trial], " now")
                continue
            under_way = 0.0 if self._executor.is_local else 1.0
            self._progress.advance(0, str(trial))
            yield trial

    def learn(self, trial: RouteTrial, seconds: float) -> None:
        """Takes note of how long one took; says so where that was far longer than expected, and what has no time left."""
        if over := overrun_text(trial, seconds, self._outlook.seconds(trial)):
            self._progress.say(over)
        self._outlook.learn(trial, seconds)
        self.tell(self.beyond(), " now")

    def beyond(self) -> list[RouteTrial]:
        """The trials that there is no time for, if those that tell most for their time are measured first."""
        left, lost = self._end - time.monotonic(), []
        for trial in self._sorted():
            seconds = self._outlook.seconds(trial)
            if seconds > left:
                lost.append(trial)
            else:
                left -= seconds
        return lost

    def tell(self, lost: Sequence[RouteTrial], since: str) -> None:
        """Says which trials the budget is too short for, each once."""
        if new := Counter(trial.route.name for trial in lost if trial.key not in self._told):
            self._told.update(trial.key for trial in lost)
            some = ", ".join(f"{name} ({count})" for name, count in new.items())
            self._progress.say(f"{counted(sum(new.values()), 'measurement')} beyond the budget{since}: {some}")

    def _sorted(self) -> list[RouteTrial]:
        return sorted(self.waiting, key=lambda one: _urgency(self._context, one, self._outlook.seconds(one)))


def overrun_text(trial: RouteTrial, seconds: float, expected: float) -> str:
    """That a measurement took far longer than was expected, and others of its kind will, too; empty if it did not."""
    if seconds < 2 * expected or seconds - expected < OVERRUN_SECONDS:
        return ""
    return (
        f"{trial} took {took(seconds)}, where {took(expected)} were expected; others of its kind are expected to, too"
    )


def missing_of(trials: Sequence[RouteTrial], journal: Journal, outlook: TrialTimes) -> list[RouteTrial]:
    """The trials that the journal does not have; the outlook learns from the others."""
    missing = []
    for trial in trials:
        known = _known(journal, trial)
        if known is None:
            missing.append(trial)
        else:
            outlook.learn(trial, known.seconds)
    return missing


def _urgency(context: RoutesContext, trial: RouteTrial, seconds: float) -> tuple[bool, float]:
    """Seconds, weighed: a first draw tells more than a further one, and the user's own size more than smaller ones.

    Starting from scratch comes last: it takes longest, and hardly any user is to take it.
    """
    own = trial.size == context.study.sizes[-1].name
    return trial.route.kind == SCRATCH, seconds * (trial.seed + 1) / (2 if own else 1)


def _known(journal: Journal, trial: RouteTrial) -> Cell | None:
    return journal.get(trial.key, trial.route.name, trial.seed, 0)


@dataclass(frozen=True)
class MeasuredRoute:
    """What is known of a route at a size.

    Attributes:
        route: which.
        size: training images of each class, or ``all``.
        seeds: the draws that were measured.
        study: the images, with the folds of those draws.
        series: the cells.
    """

    route: Route
    size: int | str
    seeds: tuple[int, ...]
    study: Study
    series: Series


def measured(context: RoutesContext, routes: Sequence[Route], journal: Journal) -> list[MeasuredRoute]:
    """What the journal has of each route at each size."""
    find, found = partial(_found, context, journal), []
    for route in routes:
        for size in context.study.sizes:
            cells = find(route, size.name)
            if not cells:
                continue
            study = context.study.of(size.name)
            seeds = tuple(cell.seed for cell in cells)
            own = replace(study, folds=[fold for fold in study.folds if fold.seed in seeds])
            found.append(
                MeasuredRoute(route, size.name, seeds, own, Series(PRETRAINED, (route.name,), route.name, cells))
            )
    return found


def _found(context: RoutesContext, journal: Journal, route: Route, size: int | str) -> list[Cell]:
    if route.kind == AS_IT_IS:  # learns nothing: the same for all draws
        cell = _known(journal, RouteTrial(context.key(route, size, 0), route, size, 0))
        return [] if cell is None else [replace(cell, seed=seed) for seed in range(context.options.seeds)]
    trials = (RouteTrial(context.key(route, size, seed), route, size, seed) for seed in range(context.options.seeds))
    return [cell for trial in trials if (cell := _known(journal, trial)) is not None]
