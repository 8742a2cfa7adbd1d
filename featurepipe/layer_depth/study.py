"""A comparison with everything settled: images, columns of the network, folds; and the cells that it asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from featurepipe.annotations import check_classes
from featurepipe.errors import Message, Option, StoreError, UsageError
from featurepipe.heads.families import SHARED_PASSES
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
from featurepipe.layer_depth.probes import RULE, Data
from featurepipe.progress import announcer
from featurepipe.store import FeatureStore
from featurepipe.store.options import RowOptions
from featurepipe.store.roles import with_roles

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone, Column
    from featurepipe.backbones.measure import NodeInfo
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
    return [str(column) for column in backbone.columns(list(held)) if held[str(column)].width <= max_width]


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
PROTOCOL_VERSION = 5
"""Goes up when the same settings would measure something else."""


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        heads: families, in the order of the answer; the first one's curve decides.
        folds: of the cross-validation; None for the dataset's own splits.
        seeds: how often the cross-validation is repeated, with new folds.
    """

    heads: Sequence[str]
    folds: int | None
    seeds: int

    @classmethod
    def of(cls, options: ComparisonOptions) -> Self:
        """As asked for."""
        return cls(options.heads, None if options.split else options.folds, options.seeds)

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
        classes: names, sorted.
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
        if self.elsewhere is None:
            return Data(features, self.codes, None, np.empty(0, np.int64))
        shifted = self._view(self.elsewhere.dataset, network, columns).take(self.elsewhere.rows)
        return Data(features, self.codes, shifted, shifted.codes(self.classes))

    @property
    def codes(self) -> Codes:
        """(n,) class of each labelled image."""
        return self.images.codes(self.classes)

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
    roles: RowOptions | None = None,
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
        roles: which column is the class, and which the group.
        say: told what the labels label, and what of them is not used.

    Raises:
        UsageError: the labels cannot be learned from, or the other source has no image of a known class.
    """
    say = say or announcer(silent=True)
    snapshots = {name: store.snapshot_ids(name)[-1] for name in (dataset, shifted_dataset) if name is not None}

    def view(name: str) -> FeatureSet:
        return store.features(name, columns[0].column, spaces[PRETRAINED], snapshot=snapshots[name])

    every = with_roles(store, view(dataset), labels, roles or RowOptions(), say, snapshot=snapshots[dataset])
    usable = every.mask(labelled=True)
    kept_away = np.zeros(len(every), np.bool_)
    if protocol.folds is not None:  # what a later test is made on must not have chosen the column
        kept_away = usable & (every.splits == "test")
    rows = np.flatnonzero(usable & ~kept_away)
    images = every.take(rows)
    classes = images.classes
    if len(classes) < 2:
        raise UsageError(
            Message(
                f"dataset {dataset} has {len(images):,} labelled images of {len(classes)} classes; which layer tells classes "
                "apart can be said of two or more. Put images into folders named by class, or give ",
                Option("labels", "FILE.csv"),
            )
        )
    check_classes(classes, len(images), say)
    codes = images.codes(classes)
    folds = (
        cross_validation(images, codes, folds=protocol.folds, seeds=protocol.seeds)
        if protocol.folds is not None
        else own_split(images, codes, seeds=protocol.seeds)
    )
    elsewhere = (
        settle_elsewhere(shifted_dataset, view(shifted_dataset), dataset, images, classes, folds)
        if shifted_dataset is not None
        else None
    )
    left_out = {
        "unlabelled": every.unlabelled,
        "rejected": every.rejected,
        "kept_for_the_test": int(kept_away.sum()),
        "in_no_fold": len(images) - len(np.union1d(folds[0].train, folds[0].test)),
        **(elsewhere.left_out if elsewhere else dict.fromkeys(LEFT_OUT, 0)),
    }
    return Study(
        store, dataset, elsewhere, spaces, columns, protocol, classes, folds, rows, images, left_out, snapshots
    )


def _digest(images: FeatureSet) -> str:
    """Tells sets of labelled, split images apart."""
    columns = [images.labels, images.splits, *([] if images.groups is None else [images.groups])]
    parts = (images.keys.tobytes(), *("\0".join(map(str, column)).encode() for column in columns))
    return hashlib.sha256(b"\1".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _times(seeds: int) -> str:
    return "once" if seeds == 1 else f"repeated {seeds} times with new folds"
