"""Measuring routes on draws of the training images, each kept as soon as it is there: the cheapest and most telling first."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from featurepipe.errors import Interrupted
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.heads.families import make_head
from featurepipe.heads.linear.linear_map import linear_map
from featurepipe.interrupt import StopRequest, stop_on_signals
from featurepipe.layer_depth.folds import Fold
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import Series
from featurepipe.layer_depth.probes import Cell, Data, measure_fold
from featurepipe.layer_depth.study import PRETRAINED, Study
from featurepipe.progress import Progress, show
from featurepipe.store import FeatureStore
from featurepipe.transfer_routes.options import ALL, AS_IT_IS, BOTTLENECK, NODE, TAIL, RoutesOptions
from featurepipe.transfer_routes.study import VERSION, RoutesStudy

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone
    from featurepipe.features.session import NetworkName
    from featurepipe.store import FeatureSet

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Route:
    """A way from the pretrained network to the user's classes.

    Attributes:
        kind: a key of `featurepipe.transfer_routes.options.ROUTES`.
        columns: of the store, that it reads.
        cut: the node above which layers are tuned; empty for routes that tune none.
    """

    kind: str
    columns: tuple[str, ...]
    cut: str = ""

    @property
    def name(self) -> str:
        """What tells it apart from other routes."""
        return f"{self.kind} from {self.cut}" if self.cut else self.kind


@dataclass(frozen=True)
class RouteTrial:
    """One route on one draw: a shard of the measuring.

    Attributes:
        key: in the journal.
        route: which.
        size: training images of each class, or ``all``.
        seed: of the draw.
    """

    key: str
    route: Route
    size: int | str
    seed: int

    def __str__(self) -> str:
        return f"{self.route.name}, {self.size} images of each class, draw {self.seed + 1}"


@dataclass(frozen=True)
class RoutesContext:
    """What all trials have in common.

    Attributes:
        study: what is compared on what.
        options: as asked for.
        network: as any process can load it; None where no route needs its weights.
        bottleneck: the column of the bottleneck.
        labels: of the own classes that mean a label: (K,) its number, or -1; None where none does.
    """

    study: RoutesStudy
    options: RoutesOptions
    network: NetworkName | None
    bottleneck: str
    labels: Array | None = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        every = self.study.every
        there = replace(every, store=FeatureStore(every.store.path.absolute()))
        return {**self.__dict__, "study": replace(self.study, every=there)}

    @property
    def every(self) -> Study:
        """All images."""
        return self.study.every

    def backbone(self) -> Backbone:
        """The network, loaded once in a process."""
        from featurepipe.features.session import load_network

        if self.network is None:
            raise RuntimeError("no route was to need the network's weights")
        return load_network(self.network, "cpu").backbone

    def key(self, route: Route, size: int | str, seed: int) -> str:
        """Names a measurement: the same images, roles, draws and settings give the same name."""
        more: dict[str, Any] = {}
        if route.kind == TAIL:
            import torch

            more = {"tuning": self.options.tuning(route.cut).arguments(), "torch": torch.__version__}
            more["tuning"] = {name: more["tuning"][name] for name in _DECIDING}
        if route.kind == AS_IT_IS:
            size, more = ALL, {"labels": None if self.labels is None else self.labels.tolist()}
        return self.every.key(
            PRETRAINED, route.columns, what="routes", routes_version=VERSION, route=route.name, size=size, draw=seed,
            test_images=self.options.test_images, max_width=self.options.max_width, **more,
        )  # fmt: skip


_DECIDING = (
    "from_node",
    "epochs",
    "rate",
    "lowest_rate",
    "weight_decay",
    "warmup",
    "batch_size",
    "patience",
    "interpolate",
)


@dataclass
class _Found:
    """What a route says: of the tested images, of the other source's, and of those that it learned from."""

    test: Array
    shifted: Array | None
    train: Array
    params: dict[str, Any]


def measure_trial(context: RoutesContext, trial: RouteTrial, worker: Worker, _stop: Stop, _report: Report) -> Cell:
    """Measures one route on one draw, alone on all cores: time and memory count."""
    with worker.alone(), nullcontext() if worker.is_local else threadpool_limits(worker.threads):
        fold = context.study.draws[trial.size, trial.seed]
        start = time.perf_counter()
        with peak_memory() as memory:
            cell = _MEASURES[trial.route.kind](context, trial, fold)
        besides = {**cell.besides, **({} if memory.bytes is None else {"memory": float(memory.bytes)})}
        return replace(
            cell, head=trial.route.name, seed=trial.seed, fold=0, seconds=time.perf_counter() - start, besides=besides
        )


def _frozen(context: RoutesContext, trial: RouteTrial, fold: Fold) -> Cell:
    study = context.every
    return _fitted(study, trial.route.columns, fold)


def _fitted(study: Study, columns: Sequence[str], fold: Fold) -> Cell:
    (cell,) = measure_fold(study.data(PRETRAINED, columns), fold, study.protocol.heads)
    return cell


def _best_node(context: RoutesContext, trial: RouteTrial, fold: Fold) -> Cell:
    """The node is chosen where parameters are: by heads on ``fit``, tested on ``choose``, in each division."""
    from featurepipe.layer_depth.folds import with_choices

    study, codes = context.every, _codes(context.every)
    scores: dict[str, list[float]] = {column: [] for column in trial.route.columns}
    for number, (fit, choose) in enumerate(fold.choices):
        inner = with_choices(study.images, codes, fit, choose, fold.seed, number, number + 1)
        if not len(inner.choose) or len(np.unique(codes[inner.fit])) < 2:
            continue
        for column in trial.route.columns:
            value = _fitted(study, [column], replace(inner, others=())).value
            scores[column] += [value] if np.isfinite(value) else []
    known = {column: float(np.mean(values)) for column, values in scores.items() if values}
    best = max(known, key=lambda column: known[column]) if known else context.bottleneck
    cell = _fitted(study, [best], fold)
    return replace(cell, params={"node": best, **cell.params})


def _codes(study: Study) -> npt.NDArray[np.int64]:
    """By which images are dealt evenly."""
    from featurepipe.training.splits import quantile_bins, rarest_labels

    truth = study.truth
    if study.protocol.target_type == "continuous":
        return quantile_bins(truth)
    return rarest_labels(truth) if study.protocol.target_type == "multilabel" else truth


def _as_it_is(context: RoutesContext, trial: RouteTrial, fold: Fold) -> Cell:
    """The labels that the network's own classes mean; an image of another label is wrong."""
    from featurepipe.prediction.own_classes import LabelsOfClasses, OwnClassifier

    own, places = OwnClassifier.of_network(context.backbone()), context.labels
    assert places is not None  # noqa: S101 - such a route is only made where some class means a label
    names = tuple(context.every.classes)
    meant = LabelsOfClasses(names, places)
    data = context.every.data(PRETRAINED, trial.route.columns)

    def right(features: FeatureSet, truth: Array) -> Array:
        scores = features.read(np.float64) @ own.weight.T + own.bias
        _, answers = meant.probabilities(scores, among_labels=True)
        return np.asarray(answers == truth)

    shifted = None if data.shifted is None else right(data.shifted, data.shifted_truth)
    test = right(data.features.take(fold.test), data.truth[fold.test])
    learned = float(right(data.features.take(fold.train), data.truth[fold.train]).mean())
    return Cell(AS_IT_IS, trial.seed, 0, {}, test, shifted, learned, 0.0)


def _tail(context: RoutesContext, trial: RouteTrial, fold: Fold) -> Cell:
    """LP-FT from stored activations: see `featurepipe.tuning.finetune`."""
    import torch

    from featurepipe.backbones.tail import Tail
    from featurepipe.training.cost import available_memory
    from featurepipe.tuning.activations import Activations
    from featurepipe.tuning.loop import Model, TuningCheckpoint, TuningObjective, TuningRun, score_rows, tune
    from featurepipe.tuning.work import MIXES, mixed

    study, options = context.every, context.options.tuning(trial.route.cut)
    tail = Tail(context.backbone(), trial.route.cut)
    maps = study.data(PRETRAINED, [tail.column])
    frozen_data = study.data(PRETRAINED, [context.bottleneck])
    rows = np.union1d(fold.train, fold.test)
    fits = len(rows) * maps.features.shape[1] * maps.features.dtype.itemsize <= available_memory() // 2
    examples = Activations(maps.features, maps.features.read(rows=rows) if fits else None, rows)
    kind = study.protocol.target_type
    weights = None if maps.weights is None else np.asarray(maps.weights, np.float64)
    objective = TuningObjective.of(kind, maps.truth, weights, fold.fit)
    torch.manual_seed(trial.seed)
    model = Model(tail, *objective.to_scores(*_exact_head(frozen_data, study, fold)))
    frozen = model.weights()
    run = TuningRun(
        model, examples, objective, fold.fit, fold.choose, options.schedule(len(fold.fit)), tail.blocks(), trial.seed
    )
    with TemporaryDirectory() as scratch, show(0, "", silent=True) as progress:
        checkpoint = TuningCheckpoint(Path(scratch) / "run.pt", trial.key)
        tuned = tune(run, checkpoint=checkpoint, stop=StopRequest(), progress=progress)
    scores: dict[float, float] = {}
    for share in MIXES:
        model.adopt(mixed(frozen, tuned.best, share))
        scores[share] = objective.score(*score_rows(model, examples, fold.choose))
    share = max(scores, key=lambda mix: (scores[mix], -mix))
    model.adopt(mixed(frozen, tuned.best, share))

    def answers(of: Any, some: Array) -> Array:
        found = np.asarray(score_rows(model, of, some)[0], np.float64)
        if kind == "multiclass":
            return np.asarray(found.argmax(axis=1))
        return found if kind == "multilabel" else found[:, 0] * objective.scale + objective.centre

    test = answers(examples, fold.test)
    shifted = None
    if maps.shifted is not None:
        every = np.arange(len(maps.shifted))
        there = answers(Activations(maps.shifted, None, every), every)
        shifted = maps.measure.contributions(there, maps.shifted_truth)
    learned = maps.measure.contributions(answers(examples, fold.fit), maps.truth[fold.fit])
    value = float(learned.mean())
    params = {"mix": share, "epochs": len(tuned.history) - 1, "best_epoch": tuned.epoch, "ended": tuned.ended}
    besides = {} if maps.measure.besides is None else maps.measure.besides(test, maps.truth[fold.test])
    return Cell(
        TAIL, trial.seed, 0, params, maps.measure.contributions(test, maps.truth[fold.test]), shifted,
        value if np.isfinite(value) else 0.0, 0.0, besides,
    )  # fmt: skip


def _exact_head(data: Data, study: Study, fold: Fold) -> tuple[Array, Array]:
    """The head on the frozen bottleneck of the images that are learned from, its penalty chosen on those set aside."""
    kind, name = study.protocol.target_type, study.protocol.heads[0]
    (cell,) = measure_fold(data, fold, [name])
    one_sided: dict[str, Any] = {"one_sided": "drop"} if kind == "multilabel" else {}
    head = make_head(name, target_type=kind, random_state=fold.seed, **one_sided, **cell.params)
    last = head.steps[-1][0]
    weights = {f"{last}__{key}": value for key, value in data.weights_of(fold.fit).items()}
    head.fit(data.features.take(fold.fit).read(np.float32), data.truth[fold.fit], **weights)
    weight, bias = linear_map(head)
    if kind == "continuous" or len(weight) == (data.labels if kind == "multilabel" else len(study.classes)):
        return weight, bias
    known = np.asarray(head.classes_, np.int64)  # classes without an image to learn from score lowest
    of_all = np.zeros((data.labels if kind == "multilabel" else len(study.classes), weight.shape[1]))
    lowest = np.full(len(of_all), float(bias.min(initial=0.0)) - 10.0)
    of_all[known], lowest[known] = weight, bias
    return of_all, lowest


_MEASURES: Mapping[str, Callable[[RoutesContext, RouteTrial, Fold], Cell]] = {
    AS_IT_IS: _as_it_is,
    BOTTLENECK: _frozen,
    NODE: _best_node,
    TAIL: _tail,
}


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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
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


@dataclass(frozen=True)
class Untried:
    """A trial that the budget left out.

    Attributes:
        trial: which.
        seconds: that it would take, estimated.
    """

    trial: RouteTrial
    seconds: float


class TrialTimes:
    """How long trials take: estimated from the network's times, then from trials of the same route.

    Args:
        context: of the trials.
        milliseconds: of the forward for one image up to each node.
    """

    def __init__(self, context: RoutesContext, milliseconds: Mapping[str, float]) -> None:
        self._context, self._milliseconds = context, milliseconds
        self._ratios: dict[str, list[float]] = {}

    def seconds(self, trial: RouteTrial) -> float:
        """That a trial takes."""
        ratios = self._ratios.get(trial.route.name)
        return self.estimate(trial) * (median(ratios) if ratios else 1.0)

    def learn(self, trial: RouteTrial, seconds: float) -> None:
        """Takes note of how long one took."""
        self._ratios.setdefault(trial.route.name, []).append(seconds / self.estimate(trial))

    def estimate(self, trial: RouteTrial) -> float:
        """As far as it is known before any trial."""
        study, route = self._context.every, trial.route
        fold = self._context.study.draws[trial.size, trial.seed]
        there = 0 if study.elsewhere is None else len(study.elsewhere.rows)
        if route.kind == TAIL:
            above, epochs = self.above(route.cut), self._context.options.epochs
            return tuning_seconds(above, epochs, len(fold.fit), len(fold.choose), len(fold.test) + there)
        classes = max(len(study.classes), 1)
        widths = sum(study.width(column) for column in route.columns)
        times = len(fold.choices) + 1 if route.kind == NODE else 1
        return 0.2 + 1e-9 * times * widths * (30 * classes * len(fold.train) + len(fold.test) + there)

    def above(self, cut: str) -> float:
        """Milliseconds of the forward of one image above a node."""
        whole = self._milliseconds[self._context.bottleneck.partition(":")[0]]
        return max(whole - self._milliseconds[cut], 0.05 * whole)


def tuning_seconds(above: float, epochs: int, fit: float, choose: float, test: float) -> float:
    """How long a tail is tuned and tested: a backward takes as long as two forwards.

    Args:
        above: milliseconds of the forward of one image above the cut.
        epochs: passes over the images.
        fit: images that are learned from.
        choose: images that are scored after each epoch.
        test: images that are scored once.
    """
    return 1.0 + above / 1000 * (epochs * (3 * fit + choose) + test)


def trials_of(context: RoutesContext, routes: Sequence[Route]) -> list[RouteTrial]:
    """Every route on every draw; the network as it is learns nothing, so that one draw tells all."""
    sizes, found = context.study.sizes, []
    for route in routes:
        for size in sizes[-1:] if route.kind == AS_IT_IS else sizes:
            seeds = range(1 if route.kind == AS_IT_IS else context.options.seeds)
            found += [RouteTrial(context.key(route, size.name, seed), route, size.name, seed) for seed in seeds]
    return found


def measure_routes(
    context: RoutesContext,
    trials: Sequence[RouteTrial],
    journal: Journal,
    outlook: TrialTimes,
    *,
    until: float | None,
    executor: Executor,
    progress: Progress,
) -> list[Untried]:
    """Measures trials that the journal does not have, those first that tell most for their time.

    Args:
        context: what they have in common.
        trials: which.
        journal: where cells are kept.
        outlook: how long they take; learns from those that are done.
        until: value of `time.monotonic` up to which trials may take; None for any time.
        executor: measures.
        progress: advanced by one for each trial.

    Returns:
        Those that would have taken too long.

    Raises:
        Interrupted: SIGINT or SIGTERM; what was measured is kept, and the message says how much.
    """
    missing = []
    for trial in trials:
        cell = _known(journal, trial)
        if cell is None:
            missing.append(trial)
        else:
            outlook.learn(trial, cell.seconds)
            progress.advance(1)
    waiting, untried, done = list(missing), list[Untried](), len(trials) - len(missing)

    def in_order() -> Generator[RouteTrial, None, None]:
        """Pulled when there is room; sorted anew each time, since estimates learn."""
        under_way = 0.0 if executor.is_local else 1.0
        while waiting:
            waiting.sort(key=lambda trial: _urgency(context, trial, outlook.seconds(trial)))
            trial = waiting.pop(0)
            seconds = outlook.seconds(trial)
            if until is not None and time.monotonic() + (1 + under_way) * seconds > until:
                untried.append(Untried(trial, seconds))
                continue
            yield trial

    try:
        executor.check(context.every.store.path)
        with _ends_at_once(executor) as stop:
            mapped = executor.map(
                measure_trial, in_order(), context=context, stop=stop, in_flight=1, interruptible=not executor.is_local
            )
            with closing(mapped) as results:
                for trial, cell in results:
                    journal.add(trial.key, [cell])
                    outlook.learn(trial, cell.seconds)
                    done += 1
                    progress.advance(1, str(trial))
    except Interrupted as error:
        kept = f"{done:,} of {len(trials):,} measurements are kept"
        raise Interrupted(f"{error}: {kept}; the same command goes on from there", error.exit_code - 128) from error
    return untried


def _urgency(context: RoutesContext, trial: RouteTrial, seconds: float) -> float:
    """Seconds, weighed: a first draw tells more than a further one, and the user's own size more than smaller ones."""
    own = trial.size == context.study.sizes[-1].name
    return seconds * (trial.seed + 1) / (2 if own else 1)


@contextmanager
def _ends_at_once(executor: Executor) -> Iterator[Stop]:
    """A signal ends a trial there and then; what is measured is kept, what is under way is measured again."""
    with stop_on_signals() as asked:

        def stop() -> bool:
            if asked():
                raise Interrupted(f"stopped by {asked.name}", asked.signal_number or 2)
            return False

        if executor.is_local:
            with asked.raised():
                yield bool
        else:
            yield stop


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
