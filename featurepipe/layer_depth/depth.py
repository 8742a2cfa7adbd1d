"""Which layer transfers best: one pass over the images, every stage measured alike, a recommendation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.local import executor_on
from featurepipe.features.options import SourceOptions
from featurepipe.layer_depth import answers
from featurepipe.layer_depth.document import document, files_of, parts_of, provenance
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import Series, TimedForward, measure
from featurepipe.layer_depth.options import MAX_WIDTH, DepthOptions
from featurepipe.layer_depth.phases import (
    DESCRIBE,
    EXTRACT,
    JOIN,
    MEASURE,
    PHASES,
    SETS,
    Phases,
    not_estimated,
    outlook,
)
from featurepipe.layer_depth.sources import DEFAULT_STORE, ComparisonRequest, Extracted, counts_of, extracted
from featurepipe.layer_depth.study import AUTO, PRETRAINED, Protocol, Study, choose_columns, images_of, settle
from featurepipe.option_groups import as_asked, by_commas, declared
from featurepipe.progress import announcer, show, spoken
from featurepipe.reporting.from_store import report as write_page
from featurepipe.reporting.report import check_target
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore
from featurepipe.store.choice import name_among
from featurepipe.store.feature_store import is_store
from featurepipe.store.locks import starts_again
from featurepipe.store.options import RoleOptions, columns_of
from featurepipe.training.settle import compared_labels


@shown_as("depth")
@starts_again
def depth(
    source: Any,
    store: FeatureStore | str | PathLike[str] | None = None,
    *,
    dataset: str | None = None,
    backbone: str | Sequence[str] | None = None,
    weights: str = "DEFAULT",
    nodes: str | Sequence[str] = "auto",
    heads: str | Sequence[str] | None = None,
    folds: int = 5,
    split: bool = False,
    pooling: Sequence[str] | None = None,
    max_width: int = MAX_WIDTH,
    seeds: int = 3,
    control: str | None = None,
    test_source: Any = None,
    labels: Any = None,
    label: str | None = None,
    group: str | None = None,
    split_column: str | None = None,
    target: str | None = None,
    multilabel: str | Sequence[str] | None = None,
    weight: str | None = None,
    extraction: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    cluster: Any = None,
    command: str | None = None,
    report: str | PathLike[str] | None = None,
    trust_code: bool | Collection[str] = False,
    dry_run: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Measures how well the layers of a network tell a dataset's classes apart (or its labels or numbers), and recommends one.

    All columns come from one pass over the images and stay in the store, so that a second call extracts nothing; what has
    been measured is kept as well, so that a call that was stopped goes on.

    Args:
        source: images, anything ``extract`` takes; or a feature store, whose columns are compared as they are.
        store: where features go, by default ``features``; not with a store as the source.
        dataset: its name in the store; by default the source's own.
        backbone: the network, by default ``auto`` as in ``extract``, or the one of the store. Of several each is compared on the
            same images and folds, and the fastest layer that is as good as the best of all by one standard error is recommended.
        weights: of the network, as in ``extract``.
        nodes: ``auto`` for the network's stages, or nodes, each ``NODE`` or ``NODE:POOLING``.
        heads: families to measure with, such as ``logistic``, ``linear-svm``, ``xgboost``, ``knn``; by default ``logistic``, of
            a number ``ridge``.
        folds: of the cross-validation.
        split: test on the dataset's split ``test`` instead, trained on ``train``.
        pooling: poolings of nodes named without one; None for the finest average grid within ``max_width`` values.
        max_width: values per image that a column may have.
        seeds: how often the cross-validation is repeated, with new folds.
        control: ``random`` to measure the same network with random weights as well.
        test_source: images of the same classes from elsewhere, which all heads are tested on, too; numbers, labels and groups
            are those of its own manifest, in columns of the same names, numbers and labels else those of ``labels``, by id.
        labels: a CSV or mapping to use instead of the source's labels.
        label: the column of the class, by default ``label``: of ``labels``, else of the manifest that was extracted.
        group: the column of what stays on one side of every split, such as a patient; by default ``group``, where there is
            one; ``none`` for no groups.
        split_column: the column of the splits, of ``labels``, else of the manifest; by default the dataset's own splits; ``none``
            for no splits.
        target: the column of a number to estimate, instead of classes; the measure is R2.
        multilabel: the columns of several labels, as in ``train``; the measure is the mean average precision.
        weight: the column of how much each image counts while heads are fitted; measures count all alike.
        extraction: further arguments of ``extract``, such as ``{"device": "cuda", "damaged": "keep"}``.
        jobs: measurements at once; by default one per CPU.
        cluster: where to extract and measure instead of here, as `featurepipe.execution.connect` takes it: the workers see
            source and store under the same paths. There each core measures, whatever ``jobs`` says.
        command: how it was called, for the record.
        report: an HTML file to write, the page of what was found.
        trust_code: whether a network ``package.module:factory`` that a store as the source names, and ``backbone`` does not,
            may be loaded, which runs that module; or the names of the networks that may.
        dry_run: say what would be extracted and measured; write nothing.
        silent: say nothing on the way.

    Returns:
        JSON values: ``columns``, ``results``, ``differences``, ``recommended``, ``concatenations``, ``similarity``,
        ``transferability``, ``details``, ``details_shifted``, ``timing``, ``provenance``, with ``report`` also the ``map``,
        ``target_type``, ``measure`` (``accuracy``, ``map`` or ``r2``: the key under which entries of ``results`` and others have
        it; beside it ``macro_f1``, or ``rmse`` and ``mae``), ``weights_note`` (what was ignored or guessed of a file of weights),
        ``damaged`` (the images of the sources that were kept all the same), and what they were measured on. Kept in the store as
        well. Of several networks what ``featurepipe.layer_depth.answers.compared`` returns; kept is the document of each, that
        of the recommended one last, which ``train`` and ``report`` take.

    Raises:
        UsageError: an argument is wrong, or there are not two classes to tell apart.
        StoreError: features are missing.
        ClusterError: there is no such cluster, or none of its workers can be used.
        Interrupted: SIGINT or SIGTERM; what was measured is kept, and the message says how much.
    """
    asked = dict(locals())  # all arguments, before anything else has a name
    names = answers.names_of(backbone)
    if len(names) > 1:
        return _of_networks(list(filter(None, names)), asked)
    (backbone,) = names
    options = DepthOptions(
        heads=None if heads is None else by_commas(heads) if isinstance(heads, str) else tuple(heads),
        folds=folds,
        split=split,
        seeds=seeds,
        max_width=max_width,
        jobs=jobs,
        pooling=None if pooling is None else tuple(pooling),
        control=control,
        label=label,
        group=group,
        split_column=split_column,
        target=target,
        multilabel=columns_of(multilabel),
        weight=weight,
    )
    protocol = Protocol.of(options)
    if report is not None:
        check_target(report)  # before hours of work, not after
    say = announcer(silent=silent)
    clock = Phases(PHASES, say)
    request = ComparisonRequest(
        source, store, dataset, backbone, weights, nodes, test_source, silent, options, trust_code
    )
    with executor_on(None if dry_run else cluster, say=say) as executor:
        arguments = {**(extraction or {}), "cluster": executor}
        if dry_run:
            ahead = extracted(request, arguments, dry_run=True, say=say)
            images = ahead.joined(labels, RoleOptions.of(options), say)
            return _plan(ahead, protocol, options, counts_of(images, tests=protocol.folds is None))
        with clock.phase(EXTRACT):
            found = extracted(request, arguments, dry_run=False, say=say)
        study = settle(
            found.store, found.dataset, found.columns, protocol,
            spaces=found.spaces, shifted_dataset=found.shifted_dataset, labels=labels,
            roles=RoleOptions.of(options), say=say,
        )  # fmt: skip
        say(f"{study.what}, {len(study.columns)} columns")
        journal = Journal(found.store.depth_journal(found.dataset))
        run = partial(measure, journal=journal, jobs=jobs, executor=executor)
        lasts = _expected(found, protocol, options, len(study.images), len(study.classes))
        with clock.phase(MEASURE, lasts[MEASURE]):
            measured = _measure_all(study, run, clock.title(MEASURE), silent=silent)
        with clock.phase(JOIN, lasts[JOIN]):
            recommended = answers.recommend(study, measured)
            sets = answers.neighbours_to_join(study, measured, recommended.best.head, max_width)
            joined = _measure_joined(study, sets, recommended.best.head, run, clock.title(JOIN), silent=silent)
        parts = parts_of(with_map=report is not None)
        with (
            clock.phase(DESCRIBE, lasts[DESCRIBE]),
            show(parts, clock.title(DESCRIBE), silent=silent, unit="parts") as progress,
        ):
            answer = document(
                study, found, journal, measured, joined, recommended,
                timing=TimedForward(executor, found.timing()), executor=executor,
                labels_name=compared_labels(labels), with_map=report is not None, say=say, progress=progress,
            )  # fmt: skip
    answer["space"]["named"] = name_among(found.store, found.store.space(study.spaces[PRETRAINED]))
    answer["provenance"] = {
        **provenance(study, found, clock.seconds, command),
        "options": as_asked(options),
        "files": files_of(labels=labels, group=group),
    }
    found.store.write_depth(answer)
    if report is not None:
        _write_page(found.store, answer, asked)
    return answer


def _write_page(store: FeatureStore, answer: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """The page of what was found, with pictures of the images that were given."""
    pictures = None if is_store(asked["source"]) else asked["source"]
    named = {name: value for name, value in (asked["extraction"] or {}).items() if name in declared(SourceOptions)}
    write_page(
        store,
        asked["report"],
        document=answer,
        source=pictures,
        **{name: asked[name] for name in ("labels", "test_source", "silent")},
        **named,
    )


def _of_networks(names: Sequence[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Compares the layers of several networks: each alone, then all of them; see `featurepipe.layer_depth.answers.compared`."""
    if asked["weights"] not in {"DEFAULT", "none"}:
        given = Option("weights", str(asked["weights"]))
        raise UsageError(
            Message(given, " is for one network; for several leave it out, or give ", Option("weights", "none"))
        )
    if asked["report"] is not None:
        check_target(asked["report"])
    from featurepipe.backbones import load_backbone

    say = announcer(silent=asked["silent"])
    if asked["nodes"] not in (AUTO, [AUTO], (AUTO,)):
        for name in names:  # before the first is measured
            choose_columns(load_backbone(name, "none"), asked["nodes"], asked["pooling"], asked["max_width"])

    def measure_one(name: str) -> dict[str, Any]:
        say(f"{name}, network {names.index(name) + 1} of {len(names)}")
        return dict(depth(**{**asked, "backbone": name, "report": None}))

    found = answers.compared(names, measure_one)
    if asked["dry_run"]:
        return found
    place = asked["source"] if is_store(asked["source"]) else asked["store"] or DEFAULT_STORE
    store = place if isinstance(place, FeatureStore) else FeatureStore(place, create=False)
    for one in found["networks"]:  # which were measured while the store had fewer
        one["space"]["named"] = name_among(store, store.space(one["space"]["fingerprint"]))
    answers.keep_recommended(store, found)
    if asked["report"] is not None:
        _write_page(store, found, asked)
    return found


def _measure_all(study: Study, run: Callable[..., list[Series]], title: str, *, silent: bool) -> list[Series]:
    sets = [(network, (column.column,)) for network in study.networks for column in study.columns]
    total = len(sets) * len(study.folds) * len(study.protocol.heads)
    with show(total, title, silent=silent, unit="fits") as progress:
        return run(study, sets, progress=progress)


def _measure_joined(
    study: Study,
    sets: Sequence[tuple[str, ...]],
    head: str,
    run: Callable[..., list[Series]],
    title: str,
    *,
    silent: bool,
) -> list[Series]:
    """Columns side by side, with the head that does best on single ones."""
    alone = study.with_heads([head])
    with show(len(sets) * len(study.folds), title, silent=silent, unit="fits") as progress:
        return run(alone, [(PRETRAINED, columns) for columns in sets], progress=progress)


def _measurements(found: Extracted, protocol: Protocol) -> int:
    return len(found.columns) * len(found.networks) * len(protocol.heads) * (protocol.folds or 1) * protocol.seeds


def _plan(
    found: Extracted, protocol: Protocol, options: DepthOptions, counts: tuple[int, int, int | None]
) -> dict[str, Any]:
    """What a dry run says: columns, what is extracted, and each phase after that with the time that it may take."""
    images, classes, groups = counts
    cells = (protocol.folds or 1) * protocol.seeds
    joined = SETS * cells if len(found.columns) > 1 else 0
    return {
        "kind": "depth plan",
        **found.plan(),
        "what": images_of(counts, protocol.target_type),
        "images": images,
        "classes": classes,
        "groups": groups,
        "measurements": _measurements(found, protocol),
        "side_by_side": joined,
        "seconds": _outlook(found, protocol, options, images, classes),
        "not_estimated": not_estimated(protocol.heads),
        "protocol": protocol.text,
    }


def _outlook(
    found: Extracted, protocol: Protocol, options: DepthOptions, images: int, classes: int
) -> dict[str, float | None]:
    return outlook(
        protocol, found.columns, networks=len(found.networks), images=images, classes=max(classes, 1), jobs=options.jobs
    )


def _expected(found: Extracted, protocol: Protocol, options: DepthOptions, images: int, classes: int) -> dict[str, str]:
    """The same in words, to go behind the name of a phase."""
    seconds = _outlook(found, protocol, options, images, classes)
    left_out = not_estimated(protocol.heads)
    besides = f" (without {', '.join(left_out)})" if left_out else ""
    return {
        name: "" if value is None else f"; about {spoken(value)}{besides} if none of it is known yet"
        for name, value in seconds.items()
    }
