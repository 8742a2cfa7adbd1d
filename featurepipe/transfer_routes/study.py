"""What is settled of a comparison of routes: which can be taken and what they read; who is tested, who trains in each draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.from_user import check_trusted
from featurepipe.backbones.loading import ALL as EVERY
from featurepipe.backbones.tail import Tail, cuts, refuse_joined
from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, UsageError, pip_install
from featurepipe.extraction.extract import network_for
from featurepipe.features.reading import opened
from featurepipe.layer_depth.folds import LEFT_OUT, Codes, Fold, Positions, settle_elsewhere, with_choices
from featurepipe.layer_depth.sources import DEFAULT_STORE, ComparisonRequest, Extracted, source_options
from featurepipe.layer_depth.study import (
    PRETRAINED,
    DepthColumn,
    Protocol,
    Study,
    choose_columns,
    columns_of_space,
    learnable,
    with_roles_elsewhere,
)
from featurepipe.prediction.own_classes import LabelsOfClasses, told_apart
from featurepipe.progress import Silent
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.choice import choose_space
from featurepipe.store.feature_store import is_store
from featurepipe.store.options import RoleOptions
from featurepipe.store.roles import with_roles
from featurepipe.training.splits import TEST_FOLDS, hold_out_test, refuse_groups_across
from featurepipe.transfer_routes.options import (
    ALL,
    AS_IT_IS,
    AUTO,
    FROM_IMAGES,
    FULL,
    LAYERS,
    NO_CLASSES,
    SCRATCH,
    TAIL,
    RoutesOptions,
    cannot_be_taken,
)
from featurepipe.tuning.from_images import recorded_source

VERSION = 1
"""Goes up when the same settings would measure something else."""
FROZEN_AT = (0.4, 0.65, 0.85)
"""Shares of the network's operations at about which frozen nodes are compared with the bottleneck."""
CUT_AT = 0.65
"""Share of the network's operations at about which it is cut: what lies below is computed once."""
_NAMED = 3  # labels in an error


@dataclass
class RoutesPlan:
    """What is read of the network.

    Attributes:
        request: what is asked for, with the nodes and activations.
        bottleneck: the column of the bottleneck.
        cuts: the column of the activations at each cut.
        unable: routes that cannot be taken, and why.
        say: told of these, too.
        blocks: values of an image in the column of each block.
        lacking: columns of blocks that the store does not have.
    """

    request: ComparisonRequest
    bottleneck: str
    cuts: dict[str, str]
    unable: dict[str, str]
    say: Callable[[str], None]
    blocks: dict[str, int] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)

    def refuse(self, kind: str, why: str, options: RoutesOptions) -> None:
        """Leaves a route out, keeps and says why; one that was asked for by name is an error.

        Raises:
            UsageError: It was.
        """
        if options.routes is not None:
            raise cannot_be_taken(kind, why)
        self.unable[kind] = why
        self.say(f"without the route {kind}: {why}")


def _network_name(request: ComparisonRequest) -> str:
    store = DEFAULT_STORE if request.store is None else request.store
    return network_for(store, request.backbone, request.weights, Silent().say)  # the extraction says which


def planned(
    request: ComparisonRequest,
    options: RoutesOptions,
    labels: Any,
    extraction: Mapping[str, Any],
    say: Callable[[str], None],
) -> RoutesPlan:
    """Which columns of which nodes are read, of a store those that it has."""
    held: Mapping[str, Any] | None = None
    if is_store(request.source):
        kept = (
            request.source if isinstance(request.source, FeatureStore) else FeatureStore(request.source, create=False)
        )
        space = choose_space(kept, request.backbone, request.dataset or kept.only_dataset())
        if request.backbone != space.backbone:
            check_trusted(space.backbone, request.trust_code, named_by="the store")
        network, held = load_backbone(space.backbone, "none"), space.columns()
        every: Sequence[str] = columns_of_space(network, space, options.max_width)
    else:
        network, every = load_backbone(_network_name(request), request.weights), [AUTO]
    (bottleneck,) = map(str, network.columns(["bottleneck"]))
    plan = RoutesPlan(request, bottleneck, {}, {}, say)
    if held is not None and bottleneck not in held:
        raise UsageError(
            f"{kept.path} has no {bottleneck}, the bottleneck of {network.name}, which every route reads; it has "
            f"{', '.join(held)}. Give the images as the source, and the store with --store"
        )
    asked = [request.nodes] if isinstance(request.nodes, str) else list(request.nodes)
    some = choose_columns(network, every if asked == [AUTO] else asked, None, options.max_width)
    if asked == [AUTO]:
        some = _few(some)
    names = list(dict.fromkeys([*(column.column for column in some), bottleneck]))
    if AS_IT_IS in options.kinds and options.target_type != "multiclass":
        plan.refuse(AS_IT_IS, NO_CLASSES, options)
    if TAIL in options.kinds:
        _plan_cuts(plan, network, options, held)
    if LAYERS in options.kinds:
        _plan_blocks(plan, network, options, held)
    further = [column for column in (*plan.cuts.values(), *plan.blocks) if column not in names]
    plan.request = replace(request, nodes=names, further=list(dict.fromkeys(further)))
    is_random = network.is_random
    if held is not None:
        is_random = bool(space.notes.get("backbone", {}).get("random"))
    _plan_images(plan, network, options, None if held is None else kept, is_random=is_random)
    is_asked = options.routes is not None and AS_IT_IS in options.kinds
    # Other labels are joined to images that are known.
    if is_asked and held is None and labels is None and options.label is None:
        _plan_own_classes(plan, network, options, extraction)
    return plan


def _few(columns: Sequence[DepthColumn]) -> list[DepthColumn]:
    """The columns nearest to some shares of the network's operations."""
    near = [min(columns, key=lambda column: abs(column.cost - share)) for share in FROZEN_AT]
    return [column for column in columns if column in near]


def _plan_cuts(plan: RoutesPlan, network: Backbone, options: RoutesOptions, held: Mapping[str, Any] | None) -> None:
    if options.cuts != (AUTO,):
        for node in options.cuts:
            plan.cuts[node] = _tail_at(network, node).column
    else:
        usable = cuts(network)
        if not usable:
            why = f"{network.name} cannot be traced by torch.fx, so that it cannot be cut"
            plan.refuse(TAIL, _why_joined(network) or why, options)
            return
        columns = {node: _tail_at(network, node).column for node in usable}
        there = [node for node in usable if held is None or columns[node] in held] or usable
        node = min(there, key=lambda name: abs(network.node(name).cost - CUT_AT))
        plan.cuts[node] = columns[node]
    missing = [] if held is None else [column for column in plan.cuts.values() if column not in held]
    if missing:
        plan.cuts.clear()
        why = f"the store has no activations {', '.join(missing)}; give the images as the source, and the store with --store"
        plan.refuse(TAIL, why, options)


def _plan_blocks(plan: RoutesPlan, network: Backbone, options: RoutesOptions, held: Mapping[str, Any] | None) -> None:
    """The columns of all blocks, or those of them that a store has."""
    every = network.columns([EVERY])
    widths = {str(column): math.prod(network.feature_shape(column)) for column in every}
    plan.blocks = {column: width for column, width in widths.items() if held is None or column in held}
    plan.lacking = [column for column in widths if column not in plan.blocks]
    if len(plan.blocks) < 2:
        have = "one column has" if held is None else f"the store has {len(plan.blocks)} of the {len(widths)} columns of"
        why = f"{have} all blocks of {network.name}, and it takes two; give the images as the source, and the store with --store"
        plan.blocks = {}
        plan.refuse(LAYERS, why, options)


def _plan_own_classes(
    plan: RoutesPlan, network: Backbone, options: RoutesOptions, extraction: Mapping[str, Any]
) -> None:
    """Whether the labels of the images are among the network's own classes, before any is computed, if that was asked for."""
    with closing(opened(plan.request.source, source_options(extraction))) as images:
        listed = sorted({label for label in images.scan().column("label").to_pylist() if label is not None})
    classes = told_apart(network.classes)
    if listed and classes and isinstance(why := labels_meant(network, classes, listed, options), Message):
        plan.refuse(AS_IT_IS, why, options)


def _why_joined(network: Backbone) -> str:
    """Why layers of several networks side by side are not tuned; empty for one network."""
    try:
        refuse_joined(network)
    except UsageError as error:
        return error.message
    return ""


def _plan_images(
    plan: RoutesPlan, network: Backbone, options: RoutesOptions, store: FeatureStore | None, *, is_random: bool
) -> None:
    """Whether images can be learned from."""
    wanted = [kind for kind in FROM_IMAGES if kind in options.kinds]
    if FULL in wanted and is_random:
        plan.refuse(FULL, f"the network's weights are random: tuning all of them is the route {SCRATCH}", options)
        wanted.remove(FULL)
    why = _why_joined(network)
    if not why and find_spec("lightning_fabric") is None:
        why = f"learning from images needs Lightning Fabric; run: {pip_install('tune')}"
    elif not why and store is not None and wanted:
        try:
            source, _ = recorded_source(store, plan.request.dataset or store.only_dataset())
            source.close()
        except UsageError as error:
            why = error.message
    if why:
        for kind in wanted:
            plan.refuse(kind, why, options)


def _tail_at(network: Backbone, node: str) -> Tail:
    try:
        return Tail(network, node)
    except UsageError as error:
        message = error.message
        parts = [
            Option("cuts", p.value) if isinstance(p, Option) and p.name == "from_node" else p for p in message.parts
        ]
        raise UsageError(Message(*parts)) from error


def labels_meant(
    network: Backbone, classes: Sequence[str], labels: list[str], options: RoutesOptions
) -> LabelsOfClasses | Message:
    """Which of the labels each of the network's own classes means; or why the network cannot answer all of them.

    A label that no class means would be wrong for every image: as for `featurepipe.evaluation.evaluate`, that is no comparison.
    """
    given = options.mapping
    found = LabelsOfClasses.by_name(classes, labels) if given is None else LabelsOfClasses.given(given, classes)
    missing = [label for label in labels if label not in found.labels]
    if not missing:
        return found
    what = (
        f"the name of a class that {network.name} was trained on" if given is None else "what the mapping calls a class"
    )
    many = len(missing)
    if many == len(labels):
        lead = f"none of the labels ({first_names(missing, _NAMED)}) is"
    else:
        lead = f"{many:,} of {len(labels):,} labels ({first_names(missing, _NAMED)}) {'is' if many == 1 else 'are'} not"
    return Message(f"{lead} {what}; which class means which label can be said with ", Option("mapping", "FILE.csv"))


@dataclass(frozen=True)
class DrawSize:
    """How many images train.

    Attributes:
        name: images of each class, or ``all``.
        images: that train, the mean over seeds.
        per_class: the mean over classes.
        per: what these are: classes, labels, or tenths of the numbers.
    """

    name: int | str
    images: float
    per_class: float
    per: str = "class"

    @property
    def text(self) -> str:
        """In words."""
        return f"all ({self.per_class:,.0f} a {self.per})" if self.name == ALL else f"{self.name:,} a {self.per}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"size": self.name, "images": self.images, "per_class": self.per_class, "text": self.text}


@dataclass(frozen=True)
class RoutesStudy:
    """What is compared on what.

    Attributes:
        every: images, columns and truth of all images, and those of another source; its fold has every training image.
        draws: the fold of each size and seed; all have the same test images.
        sizes: ascending; the last one is what the user has, where that is asked for.
        division: how images were divided into those that train and those that are tested, in words.
        bins: how many kinds of images a draw has as many of.
    """

    every: Study
    draws: Mapping[tuple[int | str, int], Fold]
    sizes: Sequence[DrawSize]
    division: str
    bins: int

    def of(self, size: int | str) -> Study:
        """The same with the folds of one size, one for each seed."""
        folds = [fold for (own, _), fold in self.draws.items() if own == size]
        return replace(self.every, folds=folds)

    @property
    def test(self) -> Positions:
        """Rows that are tested."""
        return self.every.folds[0].test

    @property
    def pool(self) -> Positions:
        """Rows from which those that train are drawn."""
        return self.every.folds[0].train

    @property
    def per(self) -> str:
        """What a size counts the images of."""
        return PER[self.every.protocol.target_type]

    @property
    def text(self) -> str:
        """How it was measured, in words."""
        seeds, kind = self.every.protocol.seeds, self.every.protocol.target_type
        return (
            f"{self.division}. Every route is tested on the same {len(self.test):,} images. For each size, images are drawn "
            f"{'once' if seeds == 1 else f'{seeds} times'} from the other {len(self.pool):,}, as many {PER_LONG[kind]} "
            "where it has them, whole groups together where there are groups, copies of an image together; a larger draw holds "
            "the smaller one of its seed. A fifth of a draw is set aside to choose parameters and when to stop."
        )

    def about(self) -> dict[str, Any]:
        """What is learned of how many images, and how it is measured, as JSON values."""
        every = self.every
        return {
            "target_type": every.protocol.target_type,
            "measure": every.measure,
            "classes": list(every.classes),
            "images": len(every.images),
            "counts": {
                "test": len(self.test),
                "train": len(self.pool),
                "shifted": 0 if every.elsewhere is None else len(every.elsewhere.rows),
                **every.left_out,
            },
            "per": self.per,
            "protocol": self.text,
        }


PER = {"multiclass": "class", "multilabel": "label", "continuous": "tenth of the numbers"}
PER_LONG = {
    "multiclass": "of each class",
    "multilabel": "of each label (an image counts for the rarest label that it has)",
    "continuous": "of each tenth of the numbers",
}


def settle_routes(found: Extracted, options: RoutesOptions, labels: Any, say: Callable[[str], None]) -> RoutesStudy:
    """Settles images, test images and draws.

    Args:
        found: where the columns are.
        options: what is asked for.
        labels: labels to use instead of the dataset's, or None.
        say: told what the labels label, what of them is not used, and which sizes are larger than what there is.

    Raises:
        UsageError: the labels cannot be learned from, a size leaves no image to choose by, or the other source has no image of a
            known class.
    """
    store, dataset, shifted = found.store, found.dataset, found.shifted_dataset
    snapshots = {name: store.snapshot_ids(name)[-1] for name in (dataset, shifted) if name is not None}
    families = ("ridge",) if options.target_type == "continuous" else ("logistic",)
    protocol = Protocol(families, None, options.seeds, options.target_type)

    def view(name: str) -> FeatureSet:
        return store.features(name, found.columns[0].column, found.spaces[PRETRAINED], snapshot=snapshots[name])

    roles = RoleOptions.of(options)
    every = with_roles(store, view(dataset), labels, roles, say, snapshot=snapshots[dataset])
    rows = np.flatnonzero(every.mask(labelled=True))
    images, codes, classes = learnable(every.take(rows), say)
    known = images.mask(labelled=True)  # of the labels that are left
    rows, images, codes = rows[known], images.take(known), codes[known]
    pool, test, division = _divided(images, codes, options)
    fold = Fold(0, 0, pool, pool[:0], test)
    elsewhere = None
    if shifted is not None:
        there = with_roles_elsewhere(store, view(shifted), labels, roles, images, snapshots[shifted], say)
        elsewhere = settle_elsewhere(shifted, there, dataset, images, classes, [fold])
    left_out = {
        "unlabelled": every.unlabelled + int((~known).sum()),
        "rejected": every.rejected,
        "in_no_draw": len(images) - len(pool) - len(test),
        **(elsewhere.left_out if elsewhere else dict.fromkeys(LEFT_OUT, 0)),
    }
    study = Study(
        store,
        dataset,
        elsewhere,
        found.spaces,
        found.columns,
        protocol,
        classes,
        [fold],
        rows,
        images,
        left_out,
        snapshots,
    )
    truth = study.truth
    if options.target_type != "multiclass":
        contributions = protocol.measure.contributions(np.zeros(truth[test].shape), truth[test])
        if np.isnan(contributions).any():
            raise UsageError(
                f"the {len(test):,} test images of dataset {dataset} have no label on both sides, or one and the same "
                "number; give more images"
            )
    sizes = _sizes(codes[pool], options.sizes, PER[options.target_type], say)
    draws = {
        (size, seed): _draw(images, codes, pool, test, size, seed, dataset)
        for size in sizes
        for seed in range(options.seeds)
    }
    bins = len(np.unique(codes[pool]))
    per = PER[options.target_type]
    return RoutesStudy(study, draws, [_told(size, draws, bins, per) for size in sizes], division, bins)


def _divided(images: FeatureSet, codes: Codes, options: RoutesOptions) -> tuple[Positions, Positions, str]:
    """Rows that may train, rows that are tested, and how they were divided."""
    rows, splits = np.arange(len(images)), images.splits
    if (splits == "test").any():
        test, pool = np.flatnonzero(splits == "test"), np.flatnonzero(splits != "test")
        refuse_groups_across(images, {"train": pool, "test": test})
        copies = np.isin(images.keys64[pool], images.keys64[test])
        pool, text = pool[~copies], "Tested are images of the dataset's split test"
        text += f"; {counted(int(copies.sum()), 'copied image')} of them do not train" if copies.any() else ""
    else:
        pool, test = hold_out_test(images, codes, rows, seed=0)
        what = "image" if images.groups is None else "image, by group,"
        text = f"The dataset has no split test: every {TEST_FOLDS}th {what} is held out"
    if options.target_type == "multiclass":
        test = test[np.isin(codes[test], codes[pool])]
    if options.test_images is not None and len(test) > options.test_images:
        parts = -(-len(test) // options.test_images)
        test = np.sort(
            _ranked(images, codes, test, seed=0, per_class=-(-options.test_images // len(np.unique(codes[test]))))
        )
        text += f"; {len(test):,} of them, about every {parts}th, drawn by class"
    if not len(test) or len(np.unique(codes[pool])) < 2:
        raise UsageError(
            f"{len(images):,} labelled images of dataset {images.origin.dataset} are too few: they leave no image to test, or "
            "fewer than two classes to learn; give more images"
        )
    return pool, test, text


def _ranked(images: FeatureSet, codes: Codes, rows: Positions, *, seed: int, per_class: int | None) -> Positions:
    """Some rows of each class: those of whole groups, or else images, in an order that a seed draws; all without a number."""
    if per_class is None:
        return rows
    rng = np.random.default_rng(seed)
    _, unit = np.unique(images.units()[rows], return_inverse=True)
    rank = rng.permutation(int(unit.max(initial=0)) + 1)[unit]
    order = np.lexsort((rng.permutation(len(rows)), rank, codes[rows]))
    ordered = codes[rows][order]
    place = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
    return np.sort(rows[order[place < per_class]])


def _sizes(codes: Codes, asked: Sequence[int | str], per: str, say: Callable[[str], None]) -> list[int | str]:
    """The sizes that are smaller than what there is, ascending, then ``all``."""
    largest = int(np.bincount(codes).max())
    numbers = sorted(size for size in asked if isinstance(size, int))
    kept = [size for size in numbers if size < largest]
    if left := [f"{size:,}" for size in numbers if size >= largest]:
        say(f"sizes {', '.join(left)} are all images: no {per} has more than {largest:,} that train")
    has_all = ALL in asked or len(kept) < len(numbers)
    return [*kept, *([ALL] if has_all else [])]


def _draw(
    images: FeatureSet, codes: Codes, pool: Positions, test: Positions, size: int | str, seed: int, dataset: str
) -> Fold:
    rows = _ranked(images, codes, pool, seed=seed, per_class=None if size == ALL else int(size))
    fold = with_choices(images, codes, rows, test, seed, 0, 0)
    if not len(fold.choose) or len(np.unique(codes[fold.fit])) < 2:
        raise UsageError(
            Message(
                f"{len(rows):,} training images of dataset {dataset} leave no image to choose parameters by, or fewer than two "
                "classes to learn from; give more images", *(() if size == ALL else (", or larger ", Option("sizes"))),
            )
        )  # fmt: skip
    return fold


def _told(size: int | str, draws: Mapping[tuple[int | str, int], Fold], bins: int, per: str) -> DrawSize:
    images = float(np.mean([len(fold.train) for (own, _), fold in draws.items() if own == size]))
    return DrawSize(size, images, images / bins, per)
