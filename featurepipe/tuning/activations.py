"""Where the activations come from: a store that has them, or images, which are extracted into one first."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.tail import Tail, TunedLayers, cuts
from featurepipe.display import size
from featurepipe.errors import DiskFull, Message, Option, UsageError
from featurepipe.execution.executor import Executor
from featurepipe.extraction.extract import ITEM_BYTES, extract
from featurepipe.option_groups import declared
from featurepipe.progress import spoken
from featurepipe.store import FeatureStore
from featurepipe.store.feature_store import is_store
from featurepipe.store.space import Space, extract_command
from featurepipe.store.views import FeatureSet
from featurepipe.tuning.options import EXTRACTION_GROUPS, TuneOptions

DEFAULT_BACKBONE = "resnet50"
_TIMED_STEPS = 2

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Activations:
    """Stored activations by row of the task.

    Attributes:
        maps: (n, W).
        held: (m, W) those of ``rows``, in memory; None to read them from the store.
        rows: (m,) positions, ascending.
    """

    maps: FeatureSet
    held: npt.NDArray[Any] | None
    rows: Rows

    def read(self, rows: Rows) -> Tensor:
        """Activations (m, W), float32."""
        if self.held is None:
            return torch.from_numpy(self.maps.read(np.float32, rows=rows))
        return torch.from_numpy(self.held[np.searchsorted(self.rows, rows)]).float()


@dataclass(frozen=True)
class StoredActivations:
    """What a tuning reads.

    Attributes:
        store: The store.
        dataset: The dataset in it; None for its only one.
        space: Which feature space; None for the only one.
        extraction: The run record, where the images were extracted for this; None if the store was given.
    """

    store: FeatureStore
    dataset: str | None
    space: str | None
    extraction: Mapping[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        """What is returned of the extraction; nothing without one. Its paths are of this machine, and go into no bundle."""
        if self.extraction is None:
            return {}
        names = ("run_id", "source", "space", "counts", "images_per_second")
        told = {name: self.extraction[name] for name in names if name in self.extraction}
        return {"extraction": {"store": str(self.store.path), **told}}

    def check_column(self, space: Space, dataset: str, column: str) -> None:
        """Refuses a feature space without the activations.

        Raises:
            UsageError: It has none; names the command that adds them.
        """
        known = space.columns()
        if column in known:
            return
        store = self.store.path
        command = extract_command(store, dataset=dataset, backbone=space.backbone, notes=space.notes, node=column)
        label = str(space.notes.get("backbone", {}).get("weights") or "DEFAULT")
        if label.startswith("file:"):
            command += " --weights FILE"
        elif "--weights" not in command and label != "DEFAULT":
            command += f" --weights {shlex.quote(label)}"
        taken = [
            run for run in self.store.runs() if run.get("dataset") == dataset and isinstance(run.get("source"), str)
        ]
        if taken:
            command = command.replace(
                " SOURCE ", f" {shlex.quote(max(taken, key=lambda run: run['run_id'])['source'])} ", 1
            )
        held = [name for name in known if name.endswith(":map")]
        there = f"; there are activations at {', '.join(name.removesuffix(':map') for name in held)}" if held else ""
        raise UsageError(
            f"{space.name} of {store} has no {column}, the activations that are tuned from{there}. Add them with: {command}"
        )


@dataclass(frozen=True)
class ExtractionOutlook:
    """What a dry run says where the activations are yet to be computed.

    Attributes:
        store: Where they would go.
        tail: What would be tuned.
        backbone: The network.
        estimate: What `featurepipe.extract` estimates.
        need: Bytes that the store would grow by.
        free: Bytes that are free on its disk.
    """

    store: Path
    tail: Tail
    backbone: Backbone
    estimate: Mapping[str, Any]
    need: int
    free: int

    @property
    def text(self) -> str:
        """How much is to be extracted, in words."""
        seconds = self.estimate["seconds"]
        lasts = "" if seconds is None else f", in about {spoken(seconds)}"
        return (
            f"activations of {self.backbone.name} at {self.tail.node}: {self.estimate['to_read']:,} of "
            f"{self.estimate['listed']:,} images are to be extracted{lasts}; {size(self.need)} ({size(self.image_bytes)} an "
            f"image) are kept in {self.store}, where {size(self.free)} are free"
        )

    @property
    def image_bytes(self) -> int:
        """Of the activations and the bottleneck of one image."""
        return _image_bytes(self.backbone, [self.tail.column, self.tail.bottleneck], _itemsize(self.estimate))

    def check(self) -> None:
        """Refuses activations that do not fit on the disk.

        Raises:
            DiskFull: They do not; names cuts that take less.
        """
        if self.need <= self.free:
            return
        items = _itemsize(self.estimate)
        images = self.need / self.image_bytes
        smaller = []
        for node in cuts(self.backbone):
            tail = Tail(self.backbone, node)
            need = int(images * _image_bytes(self.backbone, [tail.column, tail.bottleneck], items))
            if need <= self.free:
                smaller.append(f"{node} ({size(need)})")
        other = f", or cut at {', '.join(smaller)}" if smaller else ""
        raise DiskFull(
            Message(
                f"the activations at {self.tail.node} take {size(self.need)}, and {size(self.free)} are free on the disk of "
                f"{self.store}; give a folder on another disk with ", Option("store", "DIR"), other,
            )
        )  # fmt: skip

    def as_dict(self, options: TuneOptions) -> dict[str, Any]:
        """JSON values, with the time of an epoch from a few steps on noise."""
        step = step_seconds(self.tail, options.batch_size)
        return {
            "dry_run": True,
            "store": str(self.store),
            "extraction": {**self.estimate, "bytes": self.need, "free": self.free, "text": self.text},
            "tuning": {
                **described(self.backbone, self.tail),
                "activations": self.need,
                "seconds_per_1000_images": 1000 / options.batch_size * step,
            },
        }


def described(backbone: Backbone, layers: TunedLayers) -> dict[str, Any]:
    """What is tuned, as JSON values."""
    return {
        "from": layers.node,
        "backbone": dict(backbone.description()),
        "blocks": list(layers.blocks()),
        "parameters": sum(value.numel() for value in layers.parameters() if value.requires_grad),
    }


def step_seconds(layers: TunedLayers, batch_size: int) -> float:
    """How long a step takes that learns from one batch, measured on noise; the weights stay."""
    inputs = torch.randn(batch_size, *layers.input_shape, generator=torch.Generator().manual_seed(0))
    fastest = math.inf
    for _ in range(_TIMED_STEPS):
        start = time.perf_counter()
        layers(inputs).square().mean().backward()
        fastest = min(fastest, time.perf_counter() - start)
    layers.zero_grad(set_to_none=True)
    return fastest


def stored_activations(
    source: Any,
    store: FeatureStore | str | PathLike[str] | None,
    options: TuneOptions,
    extraction: Mapping[str, Any],
    *,
    beside: Path,
    executor: Executor,
    dry_run: bool,
    silent: bool,
    say: Callable[[str], None],
) -> StoredActivations | ExtractionOutlook:
    """Finds the store that is given, or extracts what the images lack there.

    Args:
        source: A store, or images as `featurepipe.extract` takes them.
        store: Where the activations of images go; by default beside the bundle.
        options: Of the tuning.
        extraction: Further arguments of `featurepipe.extract`.
        beside: The bundle's folder.
        executor: Who extracts.
        dry_run: Extract nothing, and say what would be, unless nothing is missing.
        silent: Say nothing on the way.
        say: Told how much is extracted to where, before it is.

    Raises:
        UsageError: The source is a store, and something is given that is about images; or as `featurepipe.extract` raises.
        DiskFull: There is too little space for the activations.
    """
    if is_store(source):
        _refuse_of_images(source, store, extraction)
        found = source if isinstance(source, FeatureStore) else FeatureStore(source, create=False)
        return StoredActivations(found, options.dataset, options.backbone)
    target = beside.with_name(f"{beside.name}.features") if store is None else store
    name = options.backbone or DEFAULT_BACKBONE
    weights = "DEFAULT" if options.weights is None else str(options.weights)
    if isinstance(options.weights, Mapping):
        raise UsageError(
            "several files of weights are for feature spaces of a store; give the one of the images' network"
        )
    backbone = load_backbone(name, weights)
    tail = Tail(backbone, cut_of(options, backbone))
    arguments = {
        **extraction,
        "dataset": options.dataset,
        "backbone": name,
        "weights": weights,
        "nodes": [tail.column, tail.bottleneck],
        "cluster": executor,
    }
    estimate = extract(source, target, **arguments, dry_run=True, silent=True)
    path = target.path if isinstance(target, FeatureStore) else Path(target)
    need = sum(estimate["bytes_per_column"].values())
    outlook = ExtractionOutlook(path, tail, backbone, estimate, need, shutil.disk_usage(_existing(path)).free)
    if dry_run and estimate["to_read"]:
        say(outlook.text)
        return outlook
    if estimate["to_read"]:
        say(outlook.text)
        outlook.check()
    opened = target if isinstance(target, FeatureStore) else FeatureStore(target, create=not dry_run)
    if dry_run:
        return StoredActivations(opened, estimate["dataset"], options.backbone)
    record = extract(source, opened, **arguments, silent=silent)
    return StoredActivations(opened, record["dataset"], record["fingerprint"], record)


def cut_of(options: TuneOptions, network: Backbone) -> str:
    """The node where a network is cut.

    Raises:
        UsageError: None is given; names the choices.
    """
    if options.from_node is not None:
        return options.from_node
    usable = ", ".join(cuts(network)) or "no node: torch.fx cannot trace it"
    raise UsageError(
        Message(f"say where to cut {network.name}, with ", Option("from_node"), f"; it can be cut at {usable}")
    )


def _refuse_of_images(source: Any, store: Any, extraction: Mapping[str, Any]) -> None:
    """Refuses what would be ignored, since a store has no images."""
    defaults = {name: one.default for group in EXTRACTION_GROUPS for name, one in declared(group).items()}
    given = [name for name, value in extraction.items() if value != defaults.get(name, value)]
    given = (["store"] if store is not None else []) + given
    if given:
        where = source.path if isinstance(source, FeatureStore) else source
        raise UsageError(
            Message(
                f"{where} is a feature store, from which no image is read: leave ", *_listed(given),
                " out, or give the images as the source",
            )
        )  # fmt: skip


def _listed(names: list[str]) -> list[str | Option]:
    parts: list[str | Option] = []
    for name in names:
        parts += [", ", Option(name)] if parts else [Option(name)]
    return parts


def _existing(path: Path) -> Path:
    """The nearest folder on the way that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _itemsize(estimate: Mapping[str, Any]) -> int:
    return ITEM_BYTES[str(estimate["space"]["dtype"])]


def _image_bytes(backbone: Backbone, columns: list[str], itemsize: int) -> int:
    return sum(math.prod(backbone.feature_shape(column)) for column in backbone.columns(columns)) * itemsize
