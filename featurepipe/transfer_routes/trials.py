"""Routes, and how each is measured on one draw of the training images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import Message
from featurepipe.features.options import KEEP
from featurepipe.heads.selection import best_columns, column_scores, kept_count, regression_targets
from featurepipe.layer_depth.folds import Fold, with_choices
from featurepipe.layer_depth.probes import Cell, Data, measure_fold
from featurepipe.layer_depth.sources import source_options
from featurepipe.layer_depth.study import PRETRAINED, Study
from featurepipe.progress import StepsWithin, announcer
from featurepipe.store import FeatureStore
from featurepipe.store.rows import ArrayRows
from featurepipe.training.options import SHARES
from featurepipe.training.selection import PATIENCE
from featurepipe.transfer_routes.options import ALL, AS_IT_IS, FROM_IMAGES, SCRATCH, TUNED, RoutesOptions
from featurepipe.transfer_routes.study import VERSION, RoutesStudy

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone
    from featurepipe.backbones.tail import TunedLayers
    from featurepipe.features.session import NetworkName
    from featurepipe.images import Source
    from featurepipe.store import FeatureSet
    from featurepipe.tuning.loop import Examples

Array = npt.NDArray[Any]
LEARNED_VERSION = 1
"""Of learning from images: goes up when the same settings would measure something else."""
START_VERSIONS = {"multiclass": 3, "multilabel": 4, "continuous": 4}
"""Of the head that pretrained layers are tuned from, of the usual rate, and of the mix, by the type of target; as above."""


@dataclass(frozen=True)
class Route:
    """A way from the pretrained network to the user's classes.

    Attributes:
        kind: a key of `featurepipe.transfer_routes.options.ROUTES`.
        columns: of the store, that it reads.
        cut: the node above which layers are tuned; empty for other routes.
        width: values of an image in all of these columns; 0 where no head is fitted on them alone.
    """

    kind: str
    columns: tuple[str, ...]
    cut: str = ""
    width: int = 0

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
        per: what a size counts the images of.
    """

    key: str
    route: Route
    size: int | str
    seed: int
    per: str = "class"

    def __str__(self) -> str:
        images = "all images" if self.size == ALL else f"{self.size:,} images of each {self.per}"
        return f"{self.route.name}, {images}, draw {self.seed + 1}"


@dataclass(frozen=True)
class Diverged:
    """What a trial leaves whose loss was not finite before anything was learned.

    Attributes:
        why: what became of it, and which rate to lower.
    """

    why: Message


@dataclass(frozen=True)
class RoutesImages:
    """Where routes that learn from images read them.

    Attributes:
        source: as given; None for what the store's last run was made from.
        shifted: the other source, or None.
        extraction: arguments of the extraction.
        device: on which layers are tuned.
        workers: threads that read and decode.
        precision: the arithmetic of training.
    """

    source: Any
    shifted: Any
    extraction: Mapping[str, Any]
    device: str
    workers: int
    precision: str

    def opened(self, store: FeatureStore, dataset: str, *, shifted: bool = False) -> tuple[Source, bool]:
        """Opens one of the sources; and whether damaged images of it are kept.

        Raises:
            UsageError: It is gone.
            SourceError: It cannot be opened.
        """
        from featurepipe.features.reading import opened
        from featurepipe.tuning.from_images import recorded_source

        given = self.shifted if shifted else self.source
        if given is None:
            source, damaged = recorded_source(store, dataset)
            return source, damaged == KEEP
        return opened(given, source_options(self.extraction)), self.extraction.get("damaged") == KEEP


@dataclass(frozen=True)
class RoutesContext:
    """What all trials have in common.

    Attributes:
        study: what is compared on what.
        options: as asked for.
        network: as any process can load it; None where no route needs its weights.
        name: of the network.
        bottleneck: the column of the bottleneck.
        labels: of the own classes that mean a label: (K,) its number, or -1; None where none does.
        images: where they are read; None where no route learns from them.
    """

    study: RoutesStudy
    options: RoutesOptions
    network: NetworkName | None
    name: str
    bottleneck: str
    labels: Array | None = field(default=None, compare=False)
    images: RoutesImages | None = field(default=None, compare=False)

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

    @property
    def read_images(self) -> RoutesImages:
        """Where images are read."""
        if self.images is None:
            raise RuntimeError("no route was to learn from images")
        return self.images

    def key(self, route: Route, size: int | str, seed: int) -> str:
        """Names a measurement: the same images, roles, draws and settings give the same name."""
        more: dict[str, Any] = {}
        if route.kind in TUNED:
            import torch

            arguments = self.options.tuning(route.kind, route.cut).arguments()
            more = {"tuning": {name: arguments[name] for name in _DECIDING}, "torch": torch.__version__}
            more |= {} if route.kind == SCRATCH else {"start_version": START_VERSIONS[self.options.target_type]}
        if route.kind in FROM_IMAGES:
            more |= {"learned_version": LEARNED_VERSION, "precision": self.read_images.precision}
            more |= {"architecture": self.name} if route.kind == SCRATCH else {}
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


At = Callable[[str], object]
"""Told what a measurement is at."""


def measure_bottleneck(context: RoutesContext, trial: RouteTrial, fold: Fold, at: At) -> Cell:
    """An exact head on the bottleneck."""
    at("a head on it")
    return _fitted(context.every, trial.route.columns, fold)


def _fitted(study: Study, columns: Sequence[str], fold: Fold) -> Cell:
    (cell,) = measure_fold(study.data(PRETRAINED, columns), fold, study.protocol.heads)
    return cell


def measure_node(context: RoutesContext, trial: RouteTrial, fold: Fold, at: At) -> Cell:
    """The node is chosen where parameters are: by heads on ``fit``, tested on ``choose``, in each division."""
    study, codes = context.every, _codes(context.every)
    scores: dict[str, list[float]] = {column: [] for column in trial.route.columns}
    for number, (fit, choose) in enumerate(fold.choices):
        inner = with_choices(study.images, codes, fit, choose, fold.seed, number, number + 1)
        if not len(inner.choose) or len(np.unique(codes[inner.fit])) < 2:
            continue
        for column in trial.route.columns:
            at(f"a head on {column}, division {number + 1} of {len(fold.choices)}")
            value = _fitted(study, [column], replace(inner, others=())).value
            scores[column] += [value] if np.isfinite(value) else []
    known = {column: float(np.mean(values)) for column, values in scores.items() if values}
    best = max(known, key=lambda column: known[column]) if known else context.bottleneck
    at(f"a head on {best}, on all that train")
    cell = _fitted(study, [best], fold)
    return replace(cell, params={"node": best, **cell.params})


def measure_layers(context: RoutesContext, trial: RouteTrial, fold: Fold, at: At) -> Cell:
    """The values of all blocks that tell most, after Head2Toe (see `featurepipe.heads.selection`), under one exact head.

    Values are scored, and their share is chosen, where parameters are: scored on ``fit``, shares compared on ``choose``, in each
    division. Those of the last head are scored on all images that train.
    """
    study, codes = context.every, _codes(context.every)
    at("reading and scoring the values of all blocks")
    values = _Values.of(study, trial.route.columns, fold)
    inner = [
        with_choices(study.images, codes, fit, choose, fold.seed, number, number + 1)
        for number, (fit, choose) in enumerate(fold.choices)
    ]
    usable = [part for part in inner if len(part.choose) and len(np.unique(codes[part.fit])) > 1]
    scored = [(replace(part, others=()), values.scores(part.train)) for part in usable]
    found: dict[float, float] = {}
    for share in sorted({kept_count(share, values.width): share for share in reversed(SHARES)}.values()):
        best = max(found, key=lambda one: (found[one], -one)) if found else None
        if best is not None and list(found)[::-1].index(best) >= PATIENCE:
            break
        at(f"heads on {share:g} of {values.width:,} values")
        each = [values.fitted(best_columns(scores, share), part, study).value for part, scores in scored]
        known = [value for value in each if np.isfinite(value)]
        found[share] = float(np.mean(known)) if known else -np.inf
    share = max(found, key=lambda one: (found[one], -one))
    kept = best_columns(values.scores(fold.train), share)
    at(f"a head on {share:g} of {values.width:,} values, on all that train")
    cell = values.fitted(kept, fold, study)
    counts = np.histogram(kept, bins=np.cumsum([0, *values.widths]))[0]
    columns = {name: int(count) for name, count in zip(trial.route.columns, counts, strict=True) if count}
    return replace(
        cell, params={"share": share, "values": len(kept), "of": values.width, "kept": columns, **cell.params}
    )


@dataclass(frozen=True)
class _Values:
    """All values of several columns, of the images of a fold; in memory where they take at most half of what is free.

    Attributes:
        data: of the fold's images alone.
        rows: (n,) which these are, ascending.
        widths: values of each column.
    """

    data: Data
    rows: npt.NDArray[np.int64]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, study: Study, columns: Sequence[str], fold: Fold) -> _Values:
        """Reads what fits."""
        from featurepipe.training.cost import available_memory

        every, rows = study.data(PRETRAINED, columns), np.union1d(fold.train, fold.test)
        of_rows, shifted = every.features.take(rows), every.shifted
        images = len(rows) + (0 if shifted is None else len(shifted))
        if 4 * images * of_rows.shape[1] <= available_memory() // 2:
            of_rows, shifted = _in_memory(of_rows), None if shifted is None else _in_memory(shifted)
        weights = None if every.weights is None else every.weights[rows]
        data = replace(every, features=of_rows, truth=every.truth[rows], shifted=shifted, weights=weights)
        return cls(data, rows, every.features.widths)

    @property
    def width(self) -> int:
        """Values of an image."""
        return sum(self.widths)

    def scores(self, train: Array) -> npt.NDArray[np.float64]:
        """(D,) how much each value tells, by some images."""
        places = np.searchsorted(self.rows, train)
        truth, kind = self.data.truth[places], self.data.target_type
        with warnings.catch_warnings():  # of a label that is known of none of them
            warnings.filterwarnings("ignore", "Mean of empty slice|Degrees of freedom", RuntimeWarning)
            targets = regression_targets(truth, np.unique(truth) if kind == "multiclass" else None)
            weights = self.data.weights_of(places).get("sample_weight")
            return column_scores(self.data.features.take(places), targets, weights)

    def fitted(self, kept: Array, fold: Fold, study: Study) -> Cell:
        """A head on some of the values."""

        def narrow(features: FeatureSet) -> FeatureSet:
            held = features.rows
            if isinstance(held, ArrayRows):
                return replace(features, rows=replace(held, values=held.values[:, kept]))
            own, places = features.keep(kept)
            return own.values_alone(places)

        def placed(rows: Array) -> Array:
            return np.searchsorted(self.rows, rows)

        data, others = self.data, tuple((placed(fit), placed(choose)) for fit, choose in fold.others)
        shifted = None if data.shifted is None else narrow(data.shifted)
        own = replace(fold, fit=placed(fold.fit), choose=placed(fold.choose), test=placed(fold.test), others=others)
        (cell,) = measure_fold(
            replace(data, features=narrow(data.features), shifted=shifted), own, study.protocol.heads
        )
        return cell


def _in_memory(features: FeatureSet) -> FeatureSet:
    rows = ArrayRows(tuple(features.columns), features.read(np.float32), np.arange(len(features)))
    return replace(features, rows=rows)


def _codes(study: Study) -> npt.NDArray[np.int64]:
    """By which images are dealt evenly."""
    from featurepipe.training.splits import quantile_bins, rarest_labels

    truth = study.truth
    if study.protocol.target_type == "continuous":
        return quantile_bins(truth)
    return rarest_labels(truth) if study.protocol.target_type == "multilabel" else truth


def measure_as_it_is(context: RoutesContext, trial: RouteTrial, fold: Fold, at: At) -> Cell:
    """The labels that the network's own classes mean; an image of another label is wrong."""
    from featurepipe.prediction.own_classes import LabelsOfClasses, OwnClassifier

    at("scoring images by the network's own classes")
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


def measure_tail(context: RoutesContext, trial: RouteTrial, fold: Fold, at: At) -> Cell | Diverged:
    """LP-FT from stored activations: see `featurepipe.tuning.finetune`."""
    from featurepipe.backbones.tail import Tail
    from featurepipe.tuning.activations import Activations

    at("loading the network, reading activations")
    study = context.every
    tail = Tail(context.backbone(), trial.route.cut)
    maps = study.data(PRETRAINED, [tail.column])
    examples = Activations(maps.features, np.union1d(fold.train, fold.test))
    shifted = None if maps.shifted is None else Activations(maps.shifted, np.arange(0))
    return _tuned(context, trial, fold, tail, examples, shifted, at)


def measure_images(context: RoutesContext, trial: RouteTrial, fold: Fold, at: At) -> Cell | Diverged:
    """All layers from images, of the network's weights or of random ones: see `featurepipe.tuning.from_images`."""
    from featurepipe.backbones import load_backbone
    from featurepipe.backbones.tail import Trunk
    from featurepipe.features.session import Decoding
    from featurepipe.features.settings import Settings
    from featurepipe.tuning.augmentation import Augmentation, ImageExamples
    from featurepipe.tuning.from_images import located
    from featurepipe.tuning.peers import fabric_on

    at("loading the network, listing images")
    study, images = context.every, context.read_images
    is_scratch = trial.route.kind == SCRATCH
    backbone = load_backbone(context.name, "none", seed=trial.seed) if is_scratch else context.backbone()
    settings = Settings.of_space(study.store.space(study.spaces[PRETRAINED]).fields, why="as in the store")
    with ExitStack() as stack:

        def examples_of(dataset: str, features: FeatureSet, *, shifted: bool) -> ImageExamples:
            source, kept = images.opened(study.store, dataset, shifted=shifted)
            stack.enter_context(closing(source))
            listing, _ = located(source, features, announcer(silent=True))
            return ImageExamples(
                source, listing, features.keys, backbone.preprocessing, Augmentation.of(None, backbone.preprocessing),
                Decoding("cpu", settings.intensity, kept), images.workers,
            )  # fmt: skip

        own = examples_of(study.dataset, study.images, shifted=False)
        there = study.elsewhere
        shifted = None if there is None else examples_of(there.dataset, there.images, shifted=True)
        cell = _tuned(
            context, trial, fold, Trunk(backbone), own, shifted, at, fabric=fabric_on(images.device, images.precision)
        )
        lost = len(own.lost) + (0 if shifted is None else len(shifted.lost))
    if isinstance(cell, Diverged) or not lost:
        return cell
    return replace(cell, params={**cell.params, "unreadable": lost})


def _tuned(
    context: RoutesContext, trial: RouteTrial, fold: Fold, body: TunedLayers, examples: Examples, shifted: Examples | None,
    at: At, *, fabric: Any = None,
) -> Cell | Diverged:  # fmt: skip
    """Tunes layers from an exact head, or from a random one; those from pretrained weights are mixed with these."""
    import torch

    from featurepipe.backbones.tail import Model
    from featurepipe.tuning.loop import LossNotFinite, TuningCheckpoint, TuningRun, score_rows, tune
    from featurepipe.tuning.objective import TuningObjective
    from featurepipe.tuning.runs import MIXES, adopt_best_mix, exact_head, random_head

    study, is_scratch = context.every, trial.route.kind == SCRATCH
    options = context.options.tuning(trial.route.kind, trial.route.cut)
    data = study.data(PRETRAINED, [context.bottleneck])
    kind = study.protocol.target_type
    weights = None if data.weights is None else np.asarray(data.weights, np.float64)
    objective = TuningObjective.of(kind, data.truth, weights, fold.fit)
    outputs = len(study.classes) if kind == "multiclass" else data.labels
    if is_scratch:
        head = random_head(outputs, body.width, trial.seed)
    else:
        rows = fold.train
        at("the head to start from")
        head, _ = exact_head(
            data.features.take(rows).read(np.float32), rows, objective, fold.fit, fold.choose,
            outputs=outputs, seed=fold.seed,
        )  # fmt: skip
    torch.manual_seed(trial.seed)
    model = Model(body, *head)
    before = model.weights()
    schedule = options.schedule(len(fold.fit), is_scratch=is_scratch)
    run = TuningRun(
        model, examples, objective, fold.fit, fold.choose, schedule, body.blocks(), trial.seed, fabric=fabric
    )
    with TemporaryDirectory() as scratch:
        checkpoint = TuningCheckpoint(Path(scratch) / "run.pt", trial.key)
        progress = StepsWithin(run.steps * schedule.epochs, at)
        try:
            tuned = tune(run, checkpoint=checkpoint, stop=bool, progress=progress)
        except LossNotFinite as error:
            return Diverged(error.message)
    shares = MIXES[-1:] if is_scratch else MIXES
    at("testing what was tuned")
    mix, _ = adopt_best_mix(model, before, tuned.best, shares, examples, objective, fold.choose)

    def answers(of: Examples, some: Array) -> Array:
        """Of images that cannot be read no class, no label, and the mean number."""
        given, read = score_rows(model, of, some)
        places = np.flatnonzero(np.isin(some, read))  # in their order
        if kind == "multiclass":
            said: Array = np.full(len(some), -1, np.int64)
            said[places] = given.argmax(axis=1)[: len(places)]
            return said
        found = np.zeros((len(some), model.head.out_features))
        found[places] = given[: len(places)]
        return found if kind == "multilabel" else found[:, 0] * objective.scale + objective.centre

    measure, test = data.measure, answers(examples, fold.test)
    elsewhere = None
    if shifted is not None and data.shifted is not None:
        elsewhere = measure.contributions(answers(shifted, np.arange(len(data.shifted))), data.shifted_truth)
    value = float(measure.contributions(answers(examples, fold.fit), data.truth[fold.fit]).mean())
    params = {"mix": mix.share, "epochs": len(tuned.history) - 1, "best_epoch": tuned.epoch, "ended": tuned.ended}
    besides = {} if measure.besides is None else measure.besides(test, data.truth[fold.test])
    return Cell(
        trial.route.kind, trial.seed, 0, params, measure.contributions(test, data.truth[fold.test]), elsewhere,
        value if np.isfinite(value) else 0.0, 0.0, besides,
    )  # fmt: skip
