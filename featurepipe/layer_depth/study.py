"""A comparison with everything settled: images, columns of the network, folds; and the cells that it asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from featurepipe.annotations import check_classes, column_named
from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, StoreError, UsageError
from featurepipe.heads.families import SHARED_PASSES
from featurepipe.heads.statistics.intervals import units_of
from featurepipe.layer_depth.folds import (
    ENOUGH_TO_CHOOSE,
    LEFT_OUT,
    Elsewhere,
    Fold,
    cross_validation,
    own_split,
    settle_elsewhere,
)
from featurepipe.layer_depth.journal import key_of
from featurepipe.layer_depth.options import ComparisonOptions
from featurepipe.layer_depth.probes import MEASURES, Data, Measure
from featurepipe.progress import announcer
from featurepipe.store import FeatureStore
from featurepipe.store.options import NO_GROUP, RoleOptions, is_file_of_groups
from featurepipe.store.roles import with_roles
from featurepipe.training.splits import quantile_bins, rarest_labels
from featurepipe.training.tuning import RULE

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone, Column
    from featurepipe.backbones.nodes import NodeInfo
    from featurepipe.store import FeatureSet, Space


AUTO = "auto"


@dataclass(frozen=True)
class DepthColumn:
    """A column and its place in the network.

    Attributes:
        column: ``node:pooling``.
        node: the node, as asked for.
        pooling: of its output.
        depth: position of the node in execution order.
        cost: share of the forward's operations done once the node is, 0 to 1.
        width: values per image.
    """

    column: str
    node: str
    pooling: str
    depth: int
    cost: float
    width: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def choose_columns(
    backbone: Backbone, nodes: str | Sequence[str], pooling: Sequence[str] | None, max_width: int
) -> list[DepthColumn]:
    """The columns to compare, in execution order.

    Args:
        backbone: the network; needs no weights.
        nodes: ``auto`` for its stages, or nodes, each ``NODE`` or ``NODE:POOLING``.
        pooling: poolings of nodes named without one; None for the one that keeps most cells within ``max_width`` values.
        max_width: values per image that a column may have at most, unless its gap alone has more.

    Raises:
        UsageError: a node or pooling is unknown, or nothing is left to compare.
    """
    from featurepipe.backbones.stages import bounded_pooling

    asked = [nodes] if isinstance(nodes, str) else list(nodes)
    names = [name for node in asked for name in (backbone.stages() if node == AUTO else [node])]
    requested = []
    for name in names:
        if ":" in name:
            requested.append(name)
            continue
        info = backbone.node(backbone.bottleneck if name == "bottleneck" else name)
        own = [bounded_pooling(info, max_width)] if pooling is None else _suiting(pooling, info)
        requested += [f"{name}:{kind}" for kind in own]
    written = [name for name in names if ":" in name]
    as_written = {str(column) for column in backbone.columns(written)} if written else set()
    placed = [_placed(backbone, column) for column in backbone.columns(requested)] if requested else []
    found = list({(c.depth, c.pooling): c for c in placed}.values())  # a node may have several names
    too_wide = [c for c in found if c.width > max_width and str(c.column) in as_written]
    if too_wide:
        raise UsageError(
            Message(
                f"{too_wide[0].column} has {too_wide[0].width:,} values an image, more than ",
                Option("max_width", max_width),
                " allows; allow more, or name a coarser pooling",
            )
        )
    kept = [c for c in found if c.width <= max_width or (pooling is None and c.pooling == "gap")]
    if len(kept) < 2:
        wide = ", ".join(f"{column.column} ({column.width:,})" for column in found)
        at_most = f"{len(kept)} of {wide} {'is' if len(kept) == 1 else 'are'} at most "
        have = (at_most, Option("max_width", max_width), " wide") if found else ("no node has such a pooling",)
        raise UsageError(
            Message("a comparison needs two columns or more, and ", *have, "; name more nodes or allow more values")
        )
    return sorted(kept, key=lambda column: (column.depth, column.width, column.column))


def columns_of_space(backbone: Backbone, space: Space, max_width: int) -> list[str]:
    """The columns that a store already holds, for a comparison that extracts nothing."""
    held: Mapping[str, Any] = space.columns()
    if not held:
        raise StoreError(
            f"{space.name} holds no features that can be read; run: featurepipe verify {space.path.parent.parent}"
        )
    columns = backbone.columns(list(held))
    kept = [str(column) for column in columns if held[str(column)].width <= max_width]
    if not kept:
        wide = ", ".join(f"{column} ({held[str(column)].width:,})" for column in columns)
        allowed = Option("max_width", max_width)
        raise UsageError(
            Message(f"every column of {space.name} is wider than ", allowed, f" allows: {wide}; allow more")
        )
    return kept


def _suiting(pooling: Sequence[str], info: NodeInfo) -> list[str]:
    """The poolings that a node can have: a vector has only one form, tokens no grid, a map of 3 x 3 no grid of 4 x 4."""
    from featurepipe.backbones.pooling import grid_of

    if len(info.shape) == 1:
        return ["gap"]
    sides = [size for axis, size in enumerate(info.shape, 1) if axis != info.channel_axis]
    fitting = []
    for kind in pooling:
        grid = grid_of(kind)
        if grid is None or (len(sides) == 2 and grid[1] <= sides[0] and grid[2] <= sides[1]):
            fitting.append(kind)
    return fitting


def _placed(backbone: Backbone, column: Column) -> DepthColumn:
    info = backbone.node(column.node)
    order = [node.name for node in backbone.nodes()]
    width = 1
    for size in backbone.feature_shape(column):
        width *= size
    return DepthColumn(str(column), column.node, column.pooling, order.index(info.name), info.cost, width)


Codes = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int64]

PRETRAINED, RANDOM = "pretrained", "random"
LEAST_OF_A_SIDE = 2
"""Images that must have a label, and that must not, for it to be compared: one to learn from and one to test on."""
PROTOCOL_VERSION = 5
"""Goes up when the same settings would measure something else."""


_MEASURED = {
    "multiclass": "",
    "multilabel": (
        " The measure is the mean average precision (the area under the interpolated curve, as in PASCAL VOC 2012) over the "
        "labels that the tested images have on both sides; unknown labels are left out."
    ),
    "continuous": " The measure is R2 on each part that is tested.",
}


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        heads: families, in the order of the answer; the first one's curve decides.
        folds: of the cross-validation; None for the dataset's own splits.
        seeds: how often the cross-validation is repeated, with new folds.
        target_type: of what is learned, a key of `featurepipe.layer_depth.probes.MEASURES`.
    """

    heads: Sequence[str]
    folds: int | None
    seeds: int
    target_type: str = "multiclass"

    @classmethod
    def of(cls, options: ComparisonOptions) -> Self:
        """As asked for."""
        return cls(options.families, None if options.split else options.folds, options.seeds, options.target_type)

    @property
    def measure(self) -> Measure:
        """What heads are compared by."""
        return MEASURES[self.target_type]

    @property
    def text(self) -> str:
        """How it was measured, in words."""
        fitted = (
            "Features are standardised by the training images, the head's parameters are chosen on training images set aside "
            f"(a fifth of them; several fifths in turn where one has fewer than {ENOUGH_TO_CHOOSE} images), "
            "and the head is fitted again on all of them."
        )
        if set(self.heads) & set(SHARED_PASSES):
            fitted += f" {RULE}"
        fitted += _MEASURED[self.target_type]
        if self.folds is not None:
            return (
                f"{self.folds}-fold cross-validation, {_times(self.seeds)}, on the images outside the split test, if there is "
                f"one; copies of one image, and images of one group, stay on one side. {fitted} All columns see the same folds."
            )
        return (
            f"Fitted on the split train and tested on the split test; training images that are copies of test images are left "
            f"out. {fitted} The recommendation looks at the test images: measure what you make of it on others."
        )


@dataclass(frozen=True)
class Study:
    """What is compared on what.

    Attributes:
        store: where the features are.
        dataset: the labelled images.
        elsewhere: images of another source that heads are tested on, too, or None.
        spaces: fingerprint of the feature space of each network: pretrained, and random if there is a control.
        columns: in execution order.
        protocol: how to measure.
        classes: names, sorted; those of several labels; none where a number is estimated.
        folds: who trains and who is tested, as positions among the labelled images.
        rows: positions of the labelled images in the dataset.
        images: those images, as a view of the first column.
        left_out: images that take no part, and why.
        snapshots: which snapshot of each dataset the positions are of, whatever is extracted meanwhile.
    """

    store: FeatureStore
    dataset: str
    elsewhere: Elsewhere | None
    spaces: Mapping[str, str]
    columns: Sequence[DepthColumn]
    protocol: Protocol
    classes: Sequence[str]
    folds: Sequence[Fold]
    rows: Positions
    images: FeatureSet
    left_out: Mapping[str, int]
    snapshots: Mapping[str, str]

    def data(self, network: str, columns: Sequence[str]) -> Data:
        """The features of some columns side by side, of the pretrained network or of the control."""
        features = self._view(self.dataset, network, columns).take(self.rows)
        kind, weights = self.protocol.target_type, self.images.weights
        if self.elsewhere is None:
            return Data(features, self.truth, None, np.empty(0, np.int64), kind, weights)
        shifted = self._view(self.elsewhere.dataset, network, columns).take(self.elsewhere.rows)
        return Data(features, self.truth, shifted, self.truth_of(self.elsewhere.images), kind, weights)

    @property
    def truth(self) -> npt.NDArray[Any]:
        """(n,) class of each labelled image, (n,) numbers, or (n, K) labels: 1 present, 0 absent, NaN unknown."""
        return self.truth_of(self.images)

    def truth_of(self, images: FeatureSet) -> npt.NDArray[Any]:
        """The same of some images of either source."""
        return images.codes(self.classes) if images.targets is None else images.targets

    @property
    def what(self) -> str:
        """How many images, and of what."""
        return what_of(len(self.images), self.classes, self.protocol.target_type)

    @property
    def measure(self) -> str:
        """Name of what heads are compared by."""
        return self.protocol.measure.name

    @property
    def networks(self) -> Sequence[str]:
        """``pretrained``, and ``random`` if there is a control."""
        return list(self.spaces)

    def key(self, network: str, columns: Sequence[str], **more: Any) -> str:
        """Names the measurements of some columns: the same images, labels, folds and space give the same name."""
        return key_of(
            version=PROTOCOL_VERSION,
            space=self.spaces[network],
            columns=list(columns),
            images=_digest(self.images),
            shifted=None if self.elsewhere is None else _digest(self.elsewhere.images),
            folds=self.protocol.folds,
            **more,
        )

    def key_without_folds(self, columns: Sequence[str], **more: Any) -> str:
        """Names what some columns of the pretrained network have to say of the images without any head."""
        return key_of(
            version=PROTOCOL_VERSION,
            space=self.spaces[PRETRAINED],
            columns=list(columns),
            images=_digest(self.images),
            **more,
        )

    @property
    def names(self) -> str:
        """Names the ids of all images, for findings that hold ids."""
        views = [self.images, *([self.elsewhere.images] if self.elsewhere else [])]
        return key_of(ids=[list(map(str, view.ids)) for view in views])

    def with_heads(self, heads: Sequence[str]) -> Study:
        """The same with other heads."""
        return replace(self, protocol=replace(self.protocol, heads=tuple(heads)))

    def width(self, column: str) -> int:
        """Values per image of a column that is compared."""
        return next(found.width for found in self.columns if found.column == column)

    def itemsize(self, column: str) -> int:
        """Bytes of one stored value."""
        return int(self._view(self.dataset, PRETRAINED, [column]).dtype.itemsize)

    @cached_property
    def units(self) -> npt.NDArray[np.uint64]:
        """(n,) what counts as one image in intervals: an image and its copies, or a group."""
        return self.images.units()

    @property
    def groups(self) -> int | None:
        """How many groups the images are of, one without a group counting as its own; None where they have none."""
        names = self.images.groups
        return None if names is None else int(units_of(names, len(names)).max()) + 1

    @property
    def test_share(self) -> float:
        """Test images for each training image, the mean over folds."""
        return float(np.mean([fold.test_share for fold in self.folds]))

    def _view(self, dataset: str, network: str, columns: Sequence[str]) -> FeatureSet:
        snapshot = self.snapshots[dataset]
        return self.store.features(dataset, node=list(columns), backbone=self.spaces[network], snapshot=snapshot)


def settle(
    store: FeatureStore,
    dataset: str,
    columns: Sequence[DepthColumn],
    protocol: Protocol,
    *,
    spaces: Mapping[str, str],
    shifted_dataset: str | None,
    labels: Any,
    roles: RoleOptions | None = None,
    say: Callable[[str], None] | None = None,
) -> Study:
    """Settles images and folds.

    Args:
        store: holds the features.
        dataset: the images to compare on.
        columns: what to compare.
        protocol: how.
        spaces: fingerprint of the feature space of each network.
        shifted_dataset: images of another source, or None.
        labels: labels to use instead of the dataset's, or None.
        roles: which column is what.
        say: told what the labels label, and what of them is not used.

    Raises:
        UsageError: the labels cannot be learned from, or the other source has no image of a known class.
    """
    say = say or announcer(silent=True)
    snapshots = {name: store.snapshot_ids(name)[-1] for name in (dataset, shifted_dataset) if name is not None}

    def view(name: str) -> FeatureSet:
        return store.features(name, columns[0].column, spaces[PRETRAINED], snapshot=snapshots[name])

    roles = roles or RoleOptions()
    every = with_roles(store, view(dataset), labels, roles, say, snapshot=snapshots[dataset])
    usable = every.mask(labelled=True)
    kept_away = np.zeros(len(every), np.bool_)
    if protocol.folds is not None:  # what a later test is made on must not have chosen the column
        kept_away = usable & (every.splits == "test")
    rows = np.flatnonzero(usable & ~kept_away)
    images, codes, classes = learnable(every.take(rows), say)
    known = images.mask(labelled=True)  # of the labels that are left
    rows, images, codes = rows[known], images.take(known), codes[known]
    folds = (
        cross_validation(images, codes, folds=protocol.folds, seeds=protocol.seeds)
        if protocol.folds is not None
        else own_split(images, codes, seeds=protocol.seeds, classes=images.targets is None)
    )
    elsewhere = None
    if shifted_dataset is not None:
        there = with_roles_elsewhere(
            store, view(shifted_dataset), labels, roles, images, snapshots[shifted_dataset], say
        )
        elsewhere = settle_elsewhere(shifted_dataset, there, dataset, images, classes, folds)
        folds = [replace(fold, counted=unseen) for fold, unseen in zip(folds, elsewhere.unseen, strict=True)]
    left_out = {
        "unlabelled": every.unlabelled + int((~known).sum()),
        "rejected": every.rejected,
        "kept_for_the_test": int(kept_away.sum()),
        "in_no_fold": len(images) - len(np.union1d(folds[0].train, folds[0].test)),
        **({"labels": len(every.target_names) - len(classes)} if images.target_names else {}),
        **(elsewhere.left_out if elsewhere else dict.fromkeys(LEFT_OUT, 0)),
    }
    study = Study(
        store, dataset, elsewhere, spaces, columns, protocol, classes, folds, rows, images, left_out, snapshots
    )
    if images.targets is not None:
        _check_measurable(study, say)
    return study


def learnable(images: FeatureSet, say: Callable[[str], None]) -> tuple[FeatureSet, Codes, Sequence[str]]:
    """The images with the targets that can be learned, codes by which they are dealt evenly, and the names of what is told apart.

    Raises:
        UsageError: There is one class, no number that differs from another, or no label with images of both sides.
    """
    dataset, count = images.origin.dataset, f"{len(images):,}"
    if images.target_names:
        truth = np.asarray(images.targets, np.float32)
        least = np.minimum((truth == 1).sum(axis=0), (truth == 0).sum(axis=0))
        names = [name for name, few in zip(images.target_names, least, strict=True) if few >= LEAST_OF_A_SIDE]
        left = [name for name in images.target_names if name not in names]
        if left:
            some = f"fewer than {LEAST_OF_A_SIDE} images with them, or without: {first_names(left)}"
            say(f"{counted(len(left), 'label')} of {len(images.target_names):,} left out, {some}")
        if not names:
            raise UsageError(
                f"none of the {len(images.target_names):,} labels of dataset {dataset} has {LEAST_OF_A_SIDE} images that have "
                f"it and {LEAST_OF_A_SIDE} that do not; give more images, or check the columns"
            )
        kept = truth[:, [images.target_names.index(name) for name in names]]
        return images.with_column("target", kept, names=names), rarest_labels(kept), names
    if images.targets is not None:
        numbers = np.asarray(images.targets, np.float64)
        if not len(numbers) or numbers.min() == numbers.max():
            what = f"all the same, {numbers[0]:g}" if len(numbers) else "none"
            raise UsageError(
                f"the {count} numbers of dataset {dataset} are {what}; check the column, or give more images"
            )
        return images, quantile_bins(numbers), ()
    classes = images.classes
    if len(classes) < 2:
        raise UsageError(
            Message(
                f"dataset {dataset} has {count} labelled images of {len(classes)} classes; which layer tells classes "
                "apart can be said of two or more. Put images into folders named by class, or give ",
                Option("labels", "FILE.csv"),
            )
        )
    check_classes(classes, len(images), say)
    return images, images.codes(classes), classes


def with_roles_elsewhere(
    store: FeatureStore,
    found: FeatureSet,
    labels: Any,
    roles: RoleOptions,
    images: FeatureSet,
    snapshot: str,
    say: Callable[[str], None],
) -> FeatureSet:
    """Images of the other source with the same roles: of its manifest's columns, targets also of the labels file, by id.

    A class whose column it lacks is its own label. A group whose column it lacks it has not.
    """
    dataset = found.origin.dataset
    kept = store.further_columns(dataset, snapshot)
    label = roles.label if roles.label is None or column_named(roles.label, kept) else None
    if label != roles.label:
        say(f"dataset {dataset} has no column {roles.label}: its own labels are taken")
    group = roles.group
    if group is not None and group != NO_GROUP and not is_file_of_groups(group) and not column_named(group, kept):
        say(f"dataset {dataset} has no column {group}: its images are each for themselves")
        group = NO_GROUP
    asked = RoleOptions(label=label, group=group, target=roles.target, multilabel=roles.multilabel)
    wanted = [roles.target] if roles.target else list(roles.multilabel or ())
    own = all(column_named(name, kept) or name.lower() == "label" for name in wanted)
    found = with_roles(store, found, None if own else labels, asked, say, snapshot=snapshot)
    if not roles.multilabel:
        return found
    given = np.asarray(found.targets, np.float32)
    truth = np.full((len(found), len(images.target_names)), np.nan, np.float32)
    for place, name in enumerate(images.target_names):
        if name in found.target_names:
            truth[:, place] = given[:, found.target_names.index(name)]
    others = sorted(set(found.target_names) - set(images.target_names))
    if others:
        say(f"labels of {dataset} that are not compared: {first_names(others)}")
    return found.with_column("target", truth, names=images.target_names)


def _check_measurable(study: Study, say: Callable[[str], None]) -> None:
    """Sees that there is something to measure in every part that is tested, and says how many labels lack a side in some.

    Raises:
        UsageError: There is a fold without.
    """
    contributions, truth = study.protocol.measure.contributions, study.truth
    for fold in study.folds:
        for rows, what in ((fold.test, "tested"), (fold.choose, "set aside to choose by"), (fold.fit, "learned from")):
            if np.isnan(contributions(np.zeros(truth[rows].shape), truth[rows])).any():
                raise UsageError(
                    Message(
                        f"the {len(rows):,} images that are {what} in a fold have no label on both sides, or one and the same "
                        "number; give more images or fewer ",
                        Option("folds"),
                    )
                )
    there = study.elsewhere
    if (
        there is not None
        and np.isnan(contributions(np.zeros(study.truth_of(there.images).shape), study.truth_of(there.images))).any()
    ):
        raise UsageError(f"the images of {there.dataset} have no label on both sides, or one and the same number")
    if truth.ndim == 2:
        lacking = {
            name
            for fold in study.folds
            for name, column in zip(study.classes, truth[fold.test].T, strict=True)
            if not ((column == 1).any() and (column == 0).any())
        }
        if lacking:
            say(
                f"{counted(len(lacking), 'label')} lack images of a side in some folds, and do not count there: "
                f"{first_names(sorted(lacking))}"
            )


def _digest(images: FeatureSet) -> str:
    """Tells sets of labelled, split images apart."""
    columns = [images.labels, images.splits, *([] if images.groups is None else [images.groups])]
    parts = (images.keys.tobytes(), *("\0".join(map(str, column)).encode() for column in columns))
    roles = [] if images.targets is None else [json.dumps(images.target_names).encode(), images.targets.tobytes()]
    roles += [] if images.weights is None else [b"weights", images.weights.tobytes()]
    return hashlib.sha256(b"\1".join(hashlib.sha256(part).digest() for part in (*parts, *roles))).hexdigest()


def what_of(images: int, classes: Sequence[str], target_type: str) -> str:
    """How many images, and of what."""
    kind = {"multiclass": f"of {len(classes)} classes", "multilabel": f"with {counted(len(classes), 'label')}"}
    return f"{images:,} images {kind.get(target_type, 'with a number')}"


def images_of(counts: tuple[int, int, int | None], target_type: str) -> str:
    """How many images, of what, and in how many groups, from `featurepipe.layer_depth.sources.counts_of`."""
    images, classes, groups = counts
    if not images:
        return "no image has a label; give some with --labels FILE.csv"
    return what_of(images, [""] * classes, target_type) + (f", in {counted(groups, 'group')}" if groups else "")


def _times(seeds: int) -> str:
    return "once" if seeds == 1 else f"repeated {seeds} times with new folds"
