"""Use a network as it is, freeze it, or tune it? Every route measured alike on the user's own images, and one recommended."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np

from featurepipe.backbones import Backbone
from featurepipe.backbones.tail import Trunk
from featurepipe.display import counted, size
from featurepipe.errors import DiskFull, FeaturepipeError, Message, Option, UsageError
from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor, executor_on
from featurepipe.features.session import NetworkName
from featurepipe.features.settings import Machine
from featurepipe.layer_depth.document import provenance
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import FEW, NODE_SECONDS, TimedForward, Timing, least_disturbed
from featurepipe.layer_depth.options import DepthOptions
from featurepipe.layer_depth.phases import EXTRACT, MEASURE, Phases
from featurepipe.layer_depth.sources import DEFAULT_STORE, ComparisonRequest, Extracted, counts_of, extracted, settled
from featurepipe.layer_depth.study import PRETRAINED, images_of
from featurepipe.option_groups import as_asked, declared
from featurepipe.prediction.own_classes import OwnClassifier
from featurepipe.progress import Silent, announcer, show, spoken, took
from featurepipe.reporting.from_store import last_source
from featurepipe.reporting.report import check_target, write_report
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore
from featurepipe.store.feature_store import is_store
from featurepipe.store.locks import starts_again
from featurepipe.store.options import RoleOptions, columns_of
from featurepipe.training.settle import compared_labels
from featurepipe.transfer_routes import answers
from featurepipe.transfer_routes.measure import (
    OVER_BUDGET,
    TrialTimes,
    Untried,
    measure_routes,
    measured,
    milliseconds_above,
    missing_of,
    route_seconds,
    trials_of,
)
from featurepipe.transfer_routes.options import (
    AS_IT_IS,
    AUTO,
    BOTTLENECK,
    FROM_IMAGES,
    FULL,
    LAYERS,
    NODE,
    SCRATCH,
    TAIL,
    RoutesOptions,
)
from featurepipe.transfer_routes.similarity import NOISE, SAMPLED, similarity
from featurepipe.transfer_routes.study import RoutesPlan, RoutesStudy, labels_meant, planned, settle_routes
from featurepipe.transfer_routes.trials import Route, RoutesContext, RoutesImages, RouteTrial
from featurepipe.tuning.from_images import check_room, located, precision_of
from featurepipe.tuning.options import TuneOptions
from featurepipe.tuning.work import network_of

PREPARE, COMPARE = "prepare", "compare"
PHASES = {
    PREPARE: "the network, and what each route reads of it",
    EXTRACT: "features of all frozen routes, and activations, from one pass over the images",
    COMPARE: "some of the images with what the network was trained on, and timing the network up to each node",
    MEASURE: "each route on each draw of the training images",
}
"""The phases of `routes`, and what is done in each."""


@shown_as("routes")
@starts_again
def routes(
    source: Any,
    store: FeatureStore | str | PathLike[str] | None = None,
    *,
    dataset: str | None = None,
    backbone: str | None = None,
    weights: str = "DEFAULT",
    nodes: str | Sequence[str] = AUTO,
    routes: str | Sequence[str] | None = None,
    sizes: Sequence[int | str] = (5, 20, 100, "all"),
    seeds: int = 3,
    cuts: str | Sequence[str] = AUTO,
    max_width: int = 2500,
    test_images: int | None = None,
    epochs: int | None = None,
    rate: float | None = None,
    batch_size: int | None = None,
    mapping: Any = None,
    budget: float | str | None = None,
    test_source: Any = None,
    labels: Any = None,
    label: str | None = None,
    group: str | None = None,
    split_column: str | None = None,
    target: str | None = None,
    multilabel: str | Sequence[str] | None = None,
    weight: str | None = None,
    extraction: Mapping[str, Any] | None = None,
    cluster: Any = None,
    command: str | None = None,
    report: str | PathLike[str] | None = None,
    trust_code: bool | Collection[str] = False,
    dry_run: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Measures which route to take from a pretrained network to a dataset's classes (or labels or numbers), and recommends one.

    Routes are: the network as it is, where its own classes are the labels; one layer frozen, with an exact head on the
    bottleneck or on the best of a few nodes; all layers frozen, with an exact head on the values of all blocks that tell most
    (as ``train`` with ``nodes="all", select="auto"``); the layers above a cut tuned; all layers tuned, and all learned from
    scratch, both from the images (as ``finetune`` with ``from_node="images"``). Each is measured at several numbers of training
    images, drawn several times, on the same test images. Features and activations stay in the store, and so does what has been
    measured: a call that was stopped goes on. Of a store whose images are gone, the routes from images are left out.

    Args:
        source: images, anything ``extract`` takes; or a feature store, of which the columns that it has are used.
        store: where features go, by default ``features``; not with a store as the source.
        dataset: its name in the store; by default the source's own.
        backbone: the network, by default ``auto`` as in ``extract``, or the one of the store.
        weights: of the network, as in ``extract``; of a store's network only a file of one's own.
        nodes: frozen nodes to compare: ``auto`` for the bottleneck and some stages, or nodes, each ``NODE`` or ``NODE:POOLING``.
        routes: which, names of `featurepipe.transfer_routes.options.ROUTES`; by default all.
        sizes: training images per class, and ``all``: what there is. Of several labels an image counts for its rarest; of
            numbers, a size is of each tenth of them.
        seeds: how often training images are drawn for each size.
        cuts: nodes above which layers are tuned; ``auto`` for one at about two thirds of the network's operations.
        max_width: values per image that a frozen node may have.
        test_images: how many of the test images to test on, drawn by class; None for all.
        epochs: of tuning, at most; None for 10, and from scratch for 60, or up to 300 of few images.
        rate: of tuning, as in `featurepipe.finetune`; None for its defaults.
        batch_size: of tuning; None for 64, and from images for 32.
        mapping: which label each of the network's own classes means, as in ``evaluate``; by default those of the same name.
        budget: seconds, or text such as ``"30min"``, that measuring may take; extracting features and comparing the images with
            those that the network was trained on comes before and does not count. What tells most for its time is measured first.
        test_source: images of the same classes from elsewhere, which all routes are tested on, too.
        labels: a CSV or mapping to use instead of the source's labels.
        label: the column of the class, as in `featurepipe.depth`, like the next three.
        group: the column of what stays on one side of every split.
        split_column: the column of the splits.
        target: the column of a number to estimate, instead of classes; the measure is R2.
        multilabel: the columns of several labels, as in ``train``; the measure is the mean average precision.
        weight: the column of how much each image counts while heads are fitted and layers tuned.
        extraction: further arguments of ``extract``, such as ``{"device": "cuda"}``.
        cluster: where to extract and measure instead of here, as in `featurepipe.depth`.
        command: how it was called, for the record.
        report: an HTML file to write, the page of what was found.
        trust_code: as in `featurepipe.depth`.
        dry_run: say what would be extracted and measured, and how long it takes; write nothing.
        silent: say nothing on the way.

    Returns:
        JSON values: ``results`` (one for each route, size and source of test images), ``differences``, ``recommended`` (with
        ``by_size`` and ``changes``), ``sizes``, ``not_tried``, ``protocol``, ``timing``, ``provenance``, and what was compared.

    Raises:
        UsageError: an argument is wrong, there are too few images, or no route can be taken.
        StoreError: features are missing.
        DiskFull: there is too little space for the activations.
        ClusterError: there is no such cluster, or none of its workers can be used.
        Interrupted: SIGINT or SIGTERM; what was measured is kept, and the message says how much.
    """
    options = _options(
        routes=routes, sizes=sizes, seeds=seeds, cuts=cuts, max_width=max_width, test_images=test_images, epochs=epochs,
        rate=rate, batch_size=batch_size, mapping=mapping, budget=budget, label=label, group=group, split_column=split_column,
        target=target, multilabel=columns_of(multilabel), weight=weight,
    )  # fmt: skip
    if report is not None:
        check_target(report)  # before hours of work, not after
    say = announcer(silent=silent)
    clock = Phases(PHASES, say)
    layers = DepthOptions(max_width=max_width, **RoleOptions.of(options).arguments())
    request = ComparisonRequest(
        source, store, dataset, backbone, weights, nodes, test_source, silent, layers, trust_code
    )
    with executor_on(None if dry_run else cluster, say=say) as executor:
        with clock.phase(PREPARE), _showing(clock.title(PREPARE), silent=silent):
            plan = planned(request, options, labels, extraction or {}, Silent().say if dry_run else say)
        arguments = {**(extraction or {}), "cluster": executor}
        if dry_run:
            return _outlook(extracted(plan.request, arguments, dry_run=True, say=say), plan, options, labels, say)
        with clock.phase(EXTRACT):
            if _lacks_activations(plan):
                quiet = replace(plan.request, silent=True)  # all of it is said again by the extraction itself
                with _showing(clock.title(EXTRACT), "settling precision, and timing a sample of images", silent=silent):
                    ahead = extracted(quiet, arguments, dry_run=True, say=Silent().say)
                _check_room(ahead, say)
                arguments |= settled(ahead.records[0])  # so that precisions are not compared again
            found = extracted(plan.request, arguments, dry_run=False, say=say)
        with _showing("settling routes", silent=silent):
            study = settle_routes(found, options, labels, say)
            loaded = _with_weights(found, plan, trust_code)
            context, ways = _context(found, study, plan, options, loaded, extraction or {}, say, executor)
        say(
            f"{study.every.what}, {len(study.test):,} of them to test on; routes: {', '.join(way.name for way in ways)}"
        )
        journal = Journal(found.store.depth_journal(found.dataset))
        with clock.phase(COMPARE), show(2, clock.title(COMPARE), silent=silent, unit="parts") as progress:
            progress.advance(0, "comparing images with what the network was trained on")
            alike = _similarity(found, study, loaded, extraction or {}, journal, executor)
            nodes = _nodes(found, plan)
            progress.advance(1)
            progress.advance(0, f"timing the network up to {counted(len(nodes), 'node')}")
            timing = TimedForward(executor, replace(found.timing(), nodes=nodes))
            if journal.known(timing.key) is None:
                say(f"{COMPARE}: the images are compared; timing the network up to {counted(len(nodes), 'node')}")
            times = least_disturbed(timing, journal)
        expected, trials = TrialTimes(context, times["milliseconds"]), trials_of(context, ways)
        with (
            clock.phase(MEASURE, _expected(trials, journal, expected, options)),
            show(len(trials), clock.title(MEASURE), silent=silent, unit="measurements") as progress,
        ):
            untried = measure_routes(
                context, trials, journal, expected, budget=options.budget, executor=executor, progress=progress
            )
    known = measured(context, ways, journal)
    if not known:
        if diverged := [one.why for one in untried if one.why != OVER_BUDGET]:
            raise UsageError(Message("no route has a result: ", diverged[0]))
        raise _nothing_fits(options.budget or 0.0, untried)
    answer = {
        "kind": "routes",
        "version": 1,
        "dataset": study.every.dataset,
        "backbone": found.backbone_record,
        "weights_note": found.weights_note,
        "space": {"name": found.space_name, "fingerprint": study.every.spaces[PRETRAINED]},
        "test_dataset": found.shifted_dataset,
        "labels": compared_labels(labels),
        **study.about(),
        "timing": {**timing.as_dict(), "waited": times["waited"]},
        "similarity": alike,
        "columns": [column.as_dict() for column in found.columns],
        "cuts": dict(plan.cuts),
        "blocks": list(plan.blocks),
        "blocks_lacking": list(plan.lacking),
        "sizes": [size.as_dict() for size in study.sizes],
        **answers.compared(study, known, times["milliseconds"], plan.bottleneck),
        "not_tried": answers.not_tried(untried, plan.unable),
        "damaged": found.damaged,
    }
    answer["provenance"] = {**provenance(study.every, found, clock.seconds, command), "options": as_asked(options)}
    if report is not None:
        write_report(answer, report, silent=silent)
    return answer


@contextmanager
def _showing(what: str, at: str = "", *, silent: bool) -> Iterator[None]:
    """Tells, where the block takes long, that it goes on."""
    with show(1, what, silent=silent) as progress:
        progress.advance(0, at)
        yield


def _expected(trials: Sequence[RouteTrial], journal: Journal, expected: TrialTimes, options: RoutesOptions) -> str:
    """About how long measuring takes, and how much of that a budget allows."""
    seconds = sum(expected.seconds(trial) for trial in missing_of(trials, journal, expected))
    limit = "" if options.budget is None else f", of which the budget allows {spoken(options.budget)}"
    return f"; about {spoken(seconds)} for what is not measured yet{limit}" if seconds else "; all is measured already"


def _nothing_fits(budget: float, untried: Sequence[Untried]) -> UsageError:
    """The budget is shorter than any measurement by itself."""
    least = min(untried, key=lambda one: one.seconds)
    enough = math.ceil(least.seconds + 1)
    return UsageError(
        Message(
            f"a budget of {took(budget)} is too short for any of the {counted(len(untried), 'measurement')}: the shortest, "
            f"{least.trial}, takes about {took(least.seconds)} by itself (extracting and comparing images do not count); "
            "features are kept; give ", Option("budget", f"{enough}s"), " or more",
        )
    )  # fmt: skip


def _lacks_activations(plan: RoutesPlan) -> bool:
    """Whether activations of images are yet to be computed, as far as the store's feature spaces tell."""
    request = plan.request
    if is_store(request.source) or not request.further:
        return False
    target = DEFAULT_STORE if request.store is None else request.store
    if not is_store(target):
        return True
    kept = target if isinstance(target, FeatureStore) else FeatureStore(target, create=False)
    return not any(set(request.further) <= set(space.columns()) for space in kept.spaces())


def _outlook(
    found: Extracted, plan: RoutesPlan, options: RoutesOptions, labels: Any, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a dry run says: columns, what is to be extracted to where, and how long routes take with all images."""
    images, classes, groups = counts = counts_of(found.joined(labels, RoleOptions.of(options), say))
    nodes = _nodes(found, plan)
    timing = Timing(found.backbone.name, nodes, "fp32", found.machine.device, FEW)
    times = TimedForward(LocalExecutor(), timing).measure()["milliseconds"]
    # A fifth is tested, a fifth of the rest chooses.
    parts = round(0.64 * images), round(0.16 * images), round(0.2 * images)
    ways = _ways(found, plan, [kind for kind in options.kinds if kind not in plan.unable])
    return {
        "kind": "routes plan",
        **found.plan(),
        **_room(found),
        "routes": [way.name for way in ways],
        "measurements": options.seeds * len(options.sizes),
        "budget": options.budget,
        "what": images_of(counts, options.target_type),
        "images": images,
        "classes": classes,
        "groups": groups,
        "seconds_to_compare": NODE_SECONDS * len(nodes)
        + (min(images, SAMPLED) + NOISE) * milliseconds_above(times, plan.bottleneck, "") / 1000,
        "seconds_of_a_draw_of_all": {
            way.name: route_seconds(
                way, options, milliseconds_above(times, plan.bottleneck, way.cut), parts, max(classes, 1)
            )
            for way in ways
        },
        "not_tried": answers.not_tried([], plan.unable),
    }


def _room(found: Extracted) -> dict[str, Any]:
    """How many bytes are to be written where, and how many are free there."""
    path = found.store.path.absolute()
    return {
        "store": str(path),
        "bytes": sum(sum(record["bytes_per_column"].values()) for record in found.records),
        "free": shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free,
    }


def _check_room(found: Extracted, say: Callable[[str], None]) -> None:
    """Says how much space features and activations take, and refuses what there is not.

    Raises:
        DiskFull: It does not fit.
    """
    room = _room(found)
    need, free, store = room["bytes"], room["free"], room["store"]
    say(f"features and activations take {size(need)} in {store}, where {size(free)} are free")
    if need > free:
        raise DiskFull(
            Message(
                f"features and activations take {size(need)}, and {size(free)} are free on the disk of {store}; give a folder on "
                "another disk with ", Option("store", "DIR"), ", cut nearer to the end with ", Option("cuts"),
                ", or leave activations out with ", Option("routes", f"{AS_IT_IS},{BOTTLENECK},{NODE}"),
            )
        )  # fmt: skip


def _options(**asked: Any) -> RoutesOptions:
    """The options of the function's arguments, where texts may stand for several values."""
    readers = {name: one for name, one in declared(RoutesOptions).items() if one.read is not None}
    for name, value in asked.items():
        if name in readers and isinstance(value, str):
            asked[name] = readers[name].read_from(value)
        elif isinstance(value, list):
            asked[name] = tuple(value)
    return RoutesOptions(**asked)


def _nodes(found: Extracted, plan: RoutesPlan) -> tuple[str, ...]:
    """Nodes up to which the forward is timed."""
    nodes = [*(column.node for column in found.columns), plan.bottleneck.partition(":")[0], *plan.cuts]
    nodes += [column.partition(":")[0] for column in list(plan.blocks)[-1:]]  # the last one tells how long all take
    return tuple(dict.fromkeys(nodes))


def _context(
    found: Extracted,
    study: RoutesStudy,
    plan: RoutesPlan,
    options: RoutesOptions,
    loaded: _Loaded | UsageError,
    extraction: Mapping[str, Any],
    say: Callable[[str], None],
    executor: Executor,
) -> tuple[RoutesContext, list[Route]]:
    """What trials have in common, and the routes that can be taken."""
    kinds = [kind for kind in options.kinds if kind not in plan.unable]
    network, name, places = found.backbone, None, None
    if with_weights := [kind for kind in (AS_IT_IS, TAIL, FULL) if kind in kinds]:
        if isinstance(loaded, UsageError):
            for kind in with_weights:
                plan.refuse(kind, loaded.message, options)
                kinds.remove(kind)
        else:
            network, name = loaded
    if AS_IT_IS in kinds:
        places, why = _places(network, study, options)
        if places is None:
            plan.refuse(AS_IT_IS, why, options)
            kinds.remove(AS_IT_IS)
    images = None
    if from_images := [kind for kind in FROM_IMAGES if kind in kinds]:
        machine = found.machine
        images = RoutesImages(
            None if found.is_held else found.request.source, found.request.test_source, extraction, machine.device,
            machine.workers, precision_of(options.tuning(FULL), machine),
        )  # fmt: skip
        if why := _unlisted(study, images) or (_lacks_room(network, options, machine) if executor.is_local else ""):
            for kind in from_images:
                plan.refuse(kind, why, options)
                kinds.remove(kind)
    if LAYERS in kinds and plan.lacking:
        say(f"of all blocks the store lacks {', '.join(plan.lacking)}; the route {LAYERS} is without them")
    context = RoutesContext(study, options, name, found.backbone.name, plan.bottleneck, places, images)
    return context, _ways(found, plan, kinds)


def _ways(found: Extracted, plan: RoutesPlan, kinds: Sequence[str]) -> list[Route]:
    """The routes of some kinds, with what they read."""
    columns = tuple(column.column for column in found.columns)
    width = {column.column: column.width for column in found.columns}
    bottleneck = (plan.bottleneck,)
    ways = {
        AS_IT_IS: [Route(AS_IT_IS, bottleneck, width=width[plan.bottleneck])],
        BOTTLENECK: [Route(BOTTLENECK, bottleneck, width=width[plan.bottleneck])],
        NODE: [Route(NODE, columns, width=sum(width.values()))],
        LAYERS: [Route(LAYERS, tuple(plan.blocks), width=sum(plan.blocks.values()))],
        TAIL: [Route(TAIL, (column,), cut) for cut, column in plan.cuts.items()],
        FULL: [Route(FULL, bottleneck)],
        SCRATCH: [Route(SCRATCH, bottleneck)],
    }
    return [way for kind in kinds for way in ways[kind]]


def _unlisted(study: RoutesStudy, images: RoutesImages) -> str:
    """Why routes from images would not see the images that others do; empty if they would."""
    every = study.every
    for name, of in (
        (every.dataset, every.images),
        *(((there.dataset, there.images),) if (there := every.elsewhere) else ()),
    ):
        try:
            source, _ = images.opened(every.store, name, shifted=name != every.dataset)
            with closing(source):
                _, gone = located(source, of, announcer(silent=True))
        except FeaturepipeError as error:
            return error.message
        if len(gone):
            return f"{counted(len(gone), 'image')} of {name} cannot be read any more, such as {of.ids[gone[0]]!r}"
    return ""


def _lacks_room(network: Backbone, options: RoutesOptions, machine: Machine) -> str:
    """Why this machine cannot learn from images; empty if it can. Checkpoints of trials are temporary files."""
    batch_size = options.tuning(FULL).schedule(1).batch_size
    try:
        check_room(Trunk(network), batch_size, machine.device, Path(gettempdir()), name=network.name)
    except FeaturepipeError as error:
        return error.message
    return ""


_Loaded = tuple[Backbone, NetworkName]


def _with_weights(found: Extracted, plan: RoutesPlan, trust_code: bool | Collection[str]) -> _Loaded | UsageError:
    """The network with the weights that made the features, and how other processes load it; or why it cannot be had."""
    asked = found.request.weights
    if not found.is_held:
        return found.backbone, NetworkName.of(found.backbone, asked, int(found.backbone_record["seed"] or 0))
    space = found.store.space(found.spaces[PRETRAINED])
    own = None if asked == "DEFAULT" else asked
    try:
        return network_of(space, TuneOptions(weights=own, trust_code=trust_code, backbone=plan.request.backbone))
    except UsageError as error:
        return error


def _similarity(
    found: Extracted,
    study: RoutesStudy,
    loaded: _Loaded | UsageError,
    extraction: Mapping[str, Any],
    journal: Journal,
    executor: Executor,
) -> dict[str, Any]:
    """How far the images are from what the network was trained on; of a store's dataset they are read where they came from."""
    source = last_source(found.store, found.dataset) if found.is_held else found.request.source
    if source is None:
        return {"relative": None, "why": "no run says where the images are; give them as the source"}
    if isinstance(loaded, UsageError):
        return {"relative": None, "why": loaded.message}
    network, name = loaded
    space = found.store.space(found.spaces[PRETRAINED])
    return similarity(
        source, network, found.machine, space.fields, extraction, weights=name.weights, seed=name.seed,
        images=hashlib.sha256(np.sort(study.every.images.keys64)).hexdigest(), journal=journal, executor=executor,
    )  # fmt: skip


def _places(network: Backbone, study: RoutesStudy, options: RoutesOptions) -> tuple[Any, str | Message]:
    """Which label each of the network's own classes means, (K,) with -1 for none; or None, and why."""
    try:
        own = OwnClassifier.of_network(network)
    except FeaturepipeError as error:
        return None, error.message
    labels = list(map(str, study.every.classes))
    matched = labels_meant(network, own.classes, labels, options)
    if isinstance(matched, Message):
        return None, matched
    number = np.array([labels.index(label) if label in labels else -1 for label in matched.labels] + [-1], np.int64)
    return number[matched.places], ""
