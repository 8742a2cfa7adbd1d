"""Features of a tuned network, computed from stored activations: a feature space of their own in the same store."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.engine import BATCH_TOLERANCE, worst_cosine
from featurepipe.backbones.loading import ALL
from featurepipe.backbones.pooling import Column
from featurepipe.backbones.tail import TailEngine, columns_above
from featurepipe.display import size
from featurepipe.errors import DiskFull, Message, Option, UsageError
from featurepipe.extraction.prepare import space_notes
from featurepipe.features.settings import Settings
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.store import FeatureStore
from featurepipe.store.choice import TUNED_FROM
from featurepipe.store.views import FeatureSet
from featurepipe.tuning.objective import Rows

SCORED = 256
"""Images whose features are computed at once."""
Kept = bool | tuple[str, ...]
"""What an option ``store_features`` asks for: nothing, the bottleneck, or also columns of some nodes, or of all blocks."""


def columns_kept(backbone: Backbone, cut: str, asked: Kept) -> list[Column]:
    """The columns of a tuned network that are stored: those asked for, and the bottleneck; none if none were.

    Args:
        backbone: The network, with whatever weights.
        cut: The node above which it is tuned.
        asked: `TuneOptions.store_features`. Of ``all``, as ``extract`` means it, what lies at the cut or above.

    Raises:
        UsageError: A node or a pooling is unknown, or lies below the cut; names those that can be stored.
    """
    if isinstance(asked, bool):
        return backbone.columns([]) if asked else []
    named = backbone.columns([text for text in asked if text != ALL] or [])
    every = columns_above(backbone, cut, backbone.columns([ALL]))
    below = [column for column in named if column not in columns_above(backbone, cut, named)]
    if below:
        choices = ", ".join(dict.fromkeys(column.node for column in every))
        raise UsageError(
            Message(
                Option("store_features", str(below[0])), f" lies below {cut}, or beside it, so it does not follow from the "
                f"activations there; the blocks that do: {choices}",
            )
        )  # fmt: skip
    return [*dict.fromkeys([*(every if ALL in asked else []), *named, *backbone.columns([])])]


@dataclass(frozen=True)
class FeaturesToStore:
    """What would be stored of a tuned network.

    Attributes:
        columns: Names of the columns.
        bytes: Of all images.
        free: On the disk of the store.
    """

    columns: Sequence[str]
    bytes: int
    free: int

    @classmethod
    def of(
        cls, store: FeatureStore, backbone: Backbone, columns: Sequence[Column], every: FeatureSet
    ) -> FeaturesToStore:
        """The columns of all images whose activations there are."""
        values = sum(math.prod(backbone.feature_shape(column)) for column in columns)
        free = shutil.disk_usage(store.path).free
        return cls([str(column) for column in columns], len(every) * values * every.dtype.itemsize, free)

    def check(self) -> None:
        """Refuses what does not fit, before anything is tuned.

        Raises:
            DiskFull: It does not.
        """
        if self.bytes > self.free:
            raise DiskFull(
                Message(
                    f"the tuned features take {size(self.bytes)}, and {size(self.free)} are free on the disk of the store; name "
                    "fewer nodes, or keep the bottleneck alone: ", Option("store_features", "true"),
                )
            )  # fmt: skip

    @property
    def text(self) -> str:
        """The same in words."""
        return f"tuned features to be stored: {', '.join(self.columns)}; {size(self.bytes)} at most, {size(self.free)} are free"

    def about(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"stored_features": {**asdict(self), "text": self.text}}


@dataclass(frozen=True)
class StoredFeatures:
    """The tuned network's features in the store.

    Attributes:
        space: Name of their feature space.
        columns: Names of the columns.
        images: How many images were computed now, each for the columns that it lacked.
        known: How many had all columns already.
        cosine: The worst cosine, over a sample, of features and those of activations that differ by a rounding more.
        tolerance: How far below 1 it may be.
        worst: The column that it is of.
    """

    space: str
    columns: tuple[str, ...]
    images: int
    known: int
    cosine: float
    tolerance: float
    worst: str

    @property
    def text(self) -> str:
        """The same in words."""
        of = f" of {self.worst}" if len(self.columns) > 1 else ""
        off = f"rounding of the activations moves them by {1 - self.cosine:.1e} of a cosine{of}, {self.tolerance:.0e} are allowed"
        if 1 - self.cosine > self.tolerance:
            return f"the tuned features were not stored: {off}; featurepipe extract --weights computes them from the images"
        what = f" ({', '.join(self.columns)})" if len(self.columns) > 1 else ""
        return (
            f"tuned features{what} of {self.images:,} images stored in {self.space}, {self.known:,} were there ({off})"
        )

    def about(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"stored_features": {**asdict(self), "columns": list(self.columns), "text": self.text}}


def store_features(
    store: FeatureStore, bundle: Bundle, every: FeatureSet, asked: Kept, snapshot: str | None, stop: Callable[[], bool]
) -> StoredFeatures:
    """Computes columns of a tuned network from the stored activations, for images that lack them, in one pass.

    They are features of the space that `featurepipe.extract` gives images with the bundle's weights, and heads, ``evaluate``,
    ``depth`` and ``drift`` take them. They differ from those by the rounding of the activations at the cut to the stored dtype.
    How much that is, is measured by rounding once more: where it is beyond `BATCH_TOLERANCE` in a column, nothing is stored.

    Args:
        store: Of the activations.
        bundle: The tuned network.
        every: The activations of all images of the dataset's snapshot.
        asked: Which columns; see `columns_kept`.
        snapshot: The snapshot; None for the current one.
        stop: Whether to stop; what was computed is kept.
    """
    backbone = load_backbone(bundle.backbone["name"], str(bundle.weights_file), like=bundle.backbone.get("like"))
    precision, cut = bundle.space["precision"], bundle.training["tuning"]["from"]
    columns = columns_kept(backbone, cut, asked)
    names = tuple(map(str, columns))
    engine = TailEngine(backbone, cut, columns, precision)
    settings = Settings.of_space(bundle.space, why="as the activations")
    notes = {**space_notes(backbone, settings), TUNED_FROM: every.space_fingerprint}
    cosines = _cosines_of_rounding(engine, names, every)
    worst = min(names, key=lambda name: cosines[name])
    found = partial(
        StoredFeatures, columns=names, cosine=cosines[worst], tolerance=BATCH_TOLERANCE[precision], worst=worst
    )
    if 1 - cosines[worst] > BATCH_TOLERANCE[precision]:
        return found(bundle.fingerprint[:12], images=0, known=0)
    with store.lock(shared=True):
        space = store.open_space(bundle.space, backbone=backbone.name, notes=notes)
        lacks = np.stack([~space.index([name]).contains(every.keys) for name in names], axis=1)
        facts = store.snapshot(every.origin.dataset, snapshot, columns=["id", "size", "mtime_ns"])
        assert facts is not None  # noqa: S101 - the activations are of its images
        at = pc.index_in(every.table["id"], value_set=facts["id"].combine_chunks())
        places = np.asarray(pc.fill_null(at, -1).to_numpy()).astype(np.int64)
        lacking = np.flatnonzero(lacks.any(axis=1) & (places >= 0))  # what was forgotten meanwhile stays so
        rows = lacking[np.sort(np.unique(every.keys64[lacking], return_index=True)[1])]
        sizes, times = (facts[column].to_numpy() for column in ("size", "mtime_ns"))
        done = 0
        with space.writer(store.new_run_id(), dataset=every.origin.dataset) as writer:
            for part in _alike(rows, lacks):
                if stop():
                    break
                values = engine(torch.from_numpy(every.read(np.float32, rows=part)))
                wanted = {
                    name: values[name] for name, is_lacking in zip(names, lacks[part[0]], strict=True) if is_lacking
                }
                at_ = places[part]
                writer.add(every.keys[part], list(every.ids[part]), sizes[at_], times[at_], wanted)
                done += len(part)
    return found(space.name, images=done, known=int((~lacks.any(axis=1)).sum()))


def _alike(rows: Rows, lacks: npt.NDArray[np.bool_]) -> Iterator[Rows]:
    """Parts of the rows, each of rows that lack the same columns."""
    if not len(rows):
        return
    _, kinds = np.unique(lacks[rows], axis=0, return_inverse=True)
    for kind in range(kinds.max() + 1):
        alike = rows[kinds.ravel() == kind]
        yield from (alike[start : start + SCORED] for start in range(0, len(alike), SCORED))


def _cosines_of_rounding(engine: TailEngine, names: Sequence[str], every: FeatureSet) -> dict[str, float]:
    """Of each column the worst cosine, over a sample, of what activations give, and what they give with one rounding more."""
    if every.dtype == np.float32:
        return dict.fromkeys(names, 1.0)
    rows = np.unique(np.linspace(0, len(every) - 1, min(len(every), 64)).round().astype(np.int64))
    values = every.read(np.float32, rows=rows)
    noise = np.random.default_rng(0).uniform(-1, 1, values.shape).astype(np.float32) * np.float32(2**-11)
    exact, rounded = (engine(torch.from_numpy(given)) for given in (values, values * (1 + noise)))
    return {name: worst_cosine(exact[name], rounded[name]) for name in names}
