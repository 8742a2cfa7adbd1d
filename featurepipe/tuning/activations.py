"""Where the activations come from: a store that has them, or images, which are extracted into one first."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.tail import Tail, TunedLayers, cuts, refuse_joined
from featurepipe.display import size
from featurepipe.errors import DiskFull, Message, Option, UsageError, unknown
from featurepipe.execution.executor import Executor
from featurepipe.extraction.extract import ITEM_BYTES, extract, network_for
from featurepipe.extraction.limits import EXTRACTION_GROUPS
from featurepipe.features.settings import Settings
from featurepipe.option_groups import declared
from featurepipe.progress import spoken
from featurepipe.store import FeatureStore
from featurepipe.store.choice import MIRRORED
from featurepipe.store.feature_store import is_store
from featurepipe.store.space import Space, extract_command, fingerprint
from featurepipe.store.views import FeatureSet
from featurepipe.training.cost import available_memory
from featurepipe.tuning.options import TuneOptions
from featurepipe.tuning.stored_features import columns_kept

_TIMED_STEPS = 2

Rows = npt.NDArray[np.int64]


class Activations:
    """Stored activations by row of the task; some of them are read once and held, if there is room in memory.

    Args:
        maps: (n, W).
        rows: (m,) positions, ascending, that are held.
        memory: Bytes that they may take; None for half of what is free in the process that reads them.
        mirrored: (n, W) of the images mirrored left to right, which half of the rows of a batch to learn from are taken of; None
            for images as they are.
    """

    scored: ClassVar[int] = 256

    def __init__(
        self, maps: FeatureSet, rows: Rows, memory: int | None = None, *, mirrored: FeatureSet | None = None
    ) -> None:
        self.maps, self.rows, self.memory, self.mirrored = maps, rows, memory, mirrored
        self._held: list[npt.NDArray[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": []}

    @property
    def _sides(self) -> list[FeatureSet]:
        return [self.maps] if self.mirrored is None else [self.maps, self.mirrored]

    @property
    def bytes(self) -> int:
        """Of the activations that are to be held."""
        return len(self.rows) * sum(side.shape[1] * side.dtype.itemsize for side in self._sides)

    @property
    def is_held(self) -> bool:
        """Whether they are read once."""
        allowed = available_memory() // 2 if self.memory is None else self.memory
        return bool(self._held) or 0 < self.bytes <= allowed

    def release(self) -> None:
        """Gives back the memory of what is held."""
        self._held = []

    def batches(self, parts: Sequence[Rows], draw: tuple[int, int] | None = None) -> Iterator[tuple[Tensor, Rows]]:
        """Activations of each part of the rows; to learn from, half of them those of mirrored images, if there are any."""
        if not self._held and self.is_held and all(np.isin(part, self.rows).all() for part in parts):
            self._held = [side.read(None, rows=self.rows) for side in self._sides]
        return _ahead(partial(self.read, draw=draw), parts)

    def read(self, rows: Rows, draw: tuple[int, int] | None = None) -> Tensor:
        """Activations (m, W), float32.

        Args:
            rows: Of the task.
            draw: What it follows from, beside the row, whether an image is mirrored; None for images as they are.
        """
        values = self._read(0, rows)
        if draw is None or self.mirrored is None:
            return values
        flips = np.array([np.random.default_rng([*draw, row]).random() < 0.5 for row in rows], bool)
        values[torch.from_numpy(flips)] = self._read(1, rows[flips])
        return values

    def _read(self, side: int, rows: Rows) -> Tensor:
        if self._held:
            places = np.searchsorted(self.rows, rows)
            if (self.rows.take(places, mode="clip") == rows).all():
                return torch.from_numpy(self._held[side][places]).float()
        return torch.from_numpy(self._sides[side].read(np.float32, rows=rows))


def _ahead(read: Callable[[Rows], Tensor], parts: Sequence[Rows]) -> Iterator[tuple[Tensor, Rows]]:
    """Parts of some rows as ``read`` gives them, each read while the one before is learned from."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, parts[0]) if parts else None
        for place, rows in enumerate(parts):
            if waiting is None:
                return
            inputs = waiting.result()
            waiting = pool.submit(read, parts[place + 1]) if place + 1 < len(parts) else None
            yield inputs, rows


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
        held = [name for name in known if name.endswith(":map")]
        there = f"; there are activations at {', '.join(name.removesuffix(':map') for name in held)}" if held else ""
        raise UsageError(
            f"{space.name} of {self.store.path} has no {column}, the activations that are tuned from{there}. Add them with: "
            f"{self._command(space, dataset, column)}"
        )

    def mirrored(self, space: Space, dataset: str, columns: Sequence[str]) -> Space:
        """The feature space of the same images mirrored.

        Args:
            space: Of the images as they are.
            dataset: Their name.
            columns: That it must have.

        Raises:
            UsageError: There is none, or it lacks a column; names the command that adds it.
        """
        wanted = fingerprint({**space.fields, MIRRORED: True})
        found = next((each for each in self.store.spaces() if each.fingerprint == wanted), None)
        for column in columns:
            if found is None or column not in found.columns():
                raise UsageError(
                    Message(
                        Option("augment", "flip"), f" learns from activations of mirrored images, too, and {self.store.path} "
                        f"has no {column} of them. Add them with: {self._command(space, dataset, column)} --mirrored",
                    )
                )  # fmt: skip
        if found is None:
            raise UsageError("no column was asked for")
        return found

    def _command(self, space: Space, dataset: str, column: str) -> str:
        """The command that adds activations, with the source if a run has told it."""
        command = extract_command(
            self.store.path, dataset=dataset, backbone=space.backbone, notes=space.notes, node=column
        )
        label = str(space.notes.get("backbone", {}).get("weights") or "DEFAULT")
        if label.startswith("file:"):
            command += " --weights FILE"
        elif "--weights" not in command and label != "DEFAULT":
            command += f" --weights {shlex.quote(label)}"
        runs = [run for run in self.store.runs() if run.get("dataset") == dataset]
        taken = [run for run in runs if isinstance(run.get("source"), str)]
        if taken:
            source = max(taken, key=lambda run: run["run_id"])["source"]
            command = command.replace(" SOURCE ", f" {shlex.quote(source)} ", 1)
        return command


@dataclass(frozen=True)
class ExtractionOutlook:
    """What a dry run says where the activations are yet to be computed.

    Attributes:
        store: Where they would go.
        tails: What would be tuned, by cut.
        backbone: The network.
        estimate: What `featurepipe.extract` estimates.
        need: Bytes that the store would grow by.
        free: Bytes that are free on its disk.
        mirrored: What `featurepipe.extract` estimates of mirrored images; None without them.
    """

    store: Path
    tails: Sequence[Tail]
    backbone: Backbone
    estimate: Mapping[str, Any]
    need: int
    free: int
    mirrored: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """How much is to be extracted, in words."""
        passes = [self.estimate] if self.mirrored is None else [self.estimate, self.mirrored]
        times = [each["seconds"] for each in passes]
        lasts = "" if None in times else f", in about {spoken(sum(times))}"
        flips = "" if self.mirrored is None else f", and {self.mirrored['to_read']:,} of them mirrored"
        return (
            f"activations of {self.backbone.name} at {self._nodes}: {self.estimate['to_read']:,} of "
            f"{self.estimate['listed']:,} images{flips} are to be extracted{lasts}; {size(self.need)} "
            f"({size(self.image_bytes)} an image) are kept in {self.store}, where {size(self.free)} are free"
        )

    @property
    def _nodes(self) -> str:
        return ", ".join(tail.node for tail in self.tails)

    @property
    def image_bytes(self) -> int:
        """Of the activations and the bottleneck of one image; of the mirrored one, too, if there is one."""
        return self._bytes_with(self.tails)

    def _bytes_with(self, tails: Sequence[Tail]) -> int:
        columns = [columns_of_tails(tails)]
        if self.mirrored is not None:
            columns.append([tail.column for tail in tails])
        return sum(_image_bytes(self.backbone, each, _itemsize(self.estimate)) for each in columns)

    def check(self) -> None:
        """Refuses activations that do not fit on the disk.

        Raises:
            DiskFull: They do not; names cuts that take less.
        """
        if self.need <= self.free:
            return
        images = self.need / self.image_bytes
        smaller = []
        for node in cuts(self.backbone):
            need = int(images * self._bytes_with([Tail(self.backbone, node)]))
            if need <= self.free:
                smaller.append(f"{node} ({size(need)})")
        other = f", or cut at {', '.join(smaller)}" if smaller else ""
        raise DiskFull(
            Message(
                f"the activations at {self._nodes} take {size(self.need)}, and {size(self.free)} are free on the disk of "
                f"{self.store}; give a folder on another disk with ", Option("store", "DIR"), other,
            )
        )  # fmt: skip

    def as_dict(self, options: TuneOptions) -> dict[str, Any]:
        """JSON values, with the time of an epoch from a few steps on noise."""
        schedule = options.schedule(self.estimate["listed"])
        sides = 1 if self.mirrored is None else 2
        tuned = [
            {
                **described(self.backbone, tail),
                "activations": sides
                * self.need
                * math.prod(tail.input_shape)
                * _itemsize(self.estimate)
                // self.image_bytes,
                **schedule.about(),
                "seconds_per_1000_images": 1000 / schedule.batch_size * step_seconds(tail, schedule.batch_size),
            }
            for tail in self.tails
        ]
        return {
            "dry_run": True,
            "store": str(self.store),
            "extraction": {**self.estimate, "bytes": self.need, "free": self.free, "text": self.text},
            "tuning": {**tuned[0], **({"activations": self.need} if len(tuned) == 1 else {"cuts": tuned})},
        }


def columns_of_tails(tails: Sequence[Tail]) -> list[str]:
    """The columns that tuning reads: the activations of each cut, and the bottleneck."""
    return [*(tail.column for tail in tails), tails[0].bottleneck]


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
        refuse_of_images(source, store, extraction)
        found = source if isinstance(source, FeatureStore) else FeatureStore(source, create=False)
        return StoredActivations(found, options.dataset, options.backbone)
    refuse_unknown(extraction)
    target = beside.with_name(f"{beside.name}.features") if store is None else store
    weights = "DEFAULT" if options.weights is None else str(options.weights)
    name = network_for(target, options.backbone, weights, say)
    if isinstance(options.weights, Mapping):
        raise UsageError(
            "several files of weights are for feature spaces of a store; give the one of the images' network"
        )
    backbone = load_backbone(name, weights)
    tails = [Tail(backbone, cut) for cut in cuts_of(options, backbone)]
    for tail in tails:  # before hours of work, not after
        columns_kept(backbone, tail.node, options.store_features)
    arguments = {
        **extraction,
        "dataset": options.dataset,
        "backbone": name,
        "weights": weights,
        "nodes": columns_of_tails(tails),
        "cluster": executor,
    }
    estimate = extract(source, target, **arguments, dry_run=True, silent=True)
    estimates, flipped = [estimate], None
    if options.flips:
        settings = Settings.of_space(estimate["space"], why="as of the images as they are").values()
        flipped = {**arguments, **settings, "nodes": [tail.column for tail in tails], "mirrored": True}
        estimates.append(extract(source, target, **flipped, dry_run=True, silent=True))
    path = target.path if isinstance(target, FeatureStore) else Path(target)
    need = sum(sum(each["bytes_per_column"].values()) for each in estimates)
    free = shutil.disk_usage(_existing(path)).free
    outlook = ExtractionOutlook(path, tails, backbone, estimate, need, free, *estimates[1:])
    if any(each["to_read"] for each in estimates):
        say(outlook.text)
        if dry_run:
            return outlook
        outlook.check()
    opened = target if isinstance(target, FeatureStore) else FeatureStore(target, create=not dry_run)
    if dry_run:
        return StoredActivations(opened, estimate["dataset"], options.backbone)
    record = extract(source, opened, **arguments, silent=silent)
    if flipped is not None:
        extract(source, opened, **flipped, silent=silent)
    return StoredActivations(opened, record["dataset"], record["fingerprint"], record)


def cuts_of(options: TuneOptions, network: Backbone) -> tuple[str, ...]:
    """The nodes where a network is cut.

    Raises:
        UsageError: None is given; names the choices. Or it is several networks side by side.
    """
    refuse_joined(network)
    if options.cuts:
        return options.cuts
    usable = ", ".join(cuts(network)) or "no node: torch.fx cannot trace it"
    raise UsageError(
        Message(f"say where to cut {network.name}, with ", Option("from_node"), f"; it can be cut at {usable}")
    )


def refuse_unknown(extraction: Mapping[str, Any]) -> None:
    """Refuses what is no option of extraction, or what `finetune` has an option of its own for.

    Raises:
        UsageError: There is such a thing; names the choices.
    """
    choices = [name for group in EXTRACTION_GROUPS for name in declared(group)]
    for name in extraction:
        if name not in choices:
            raise unknown("argument", name, choices, where="extraction")


def refuse_of_images(source: Any, store: Any, extraction: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """Refuses what would be ignored, since a store has no images."""
    defaults = {name: one.default for group in EXTRACTION_GROUPS for name, one in declared(group).items()}
    given = [name for name, value in extraction.items() if name not in allowed and value != defaults.get(name, value)]
    given = (["store"] if store is not None else []) + given
    if given:
        where = source.path if isinstance(source, FeatureStore) else source
        raise UsageError(
            Message(
                f"{where} is a feature store, whose images are as they were extracted: leave ", *_listed(given),
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
