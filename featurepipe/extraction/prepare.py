"""Everything that is settled before the first image: the network, its feature space, the columns and the plan."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from featurepipe.backbones import Backbone, Column, load_backbone, parse_column
from featurepipe.backbones.engine import NUMERICS, Engine
from featurepipe.backbones.precision import choose_precision
from featurepipe.errors import Reject, SourceError, UsageError
from featurepipe.extraction import auto
from featurepipe.extraction.plan import KeySet, Plan, make_plan
from featurepipe.extraction.stream import Loader, StageSeconds, decoder_for
from featurepipe.images import Source
from featurepipe.images.decode import DECODING
from featurepipe.store import FeatureStore, Space, differences

KNOWN_FILES = pa.schema([("id", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("key", pa.binary(32))])
SAMPLE = 32
"""Images on which precisions are compared."""


@dataclass(frozen=True)
class Options:
    """How to extract; each field is an argument of `featurepipe.extract`, where it is explained."""

    backbone: str = "resnet50"
    weights: str = "DEFAULT"
    seed: int = 0
    nodes: Sequence[str] = ("bottleneck",)
    precision: str = auto.AUTO
    dtype: str = auto.AUTO
    decode: str = auto.AUTO
    device: str = auto.AUTO
    batch_size: int | str = auto.AUTO
    workers: int | None = None
    max_rejects: int | str = "1%"


@dataclass(frozen=True)
class Machine:
    """Where and with how much the work runs; changes no feature beyond the batch tolerance."""

    device: str
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Job:
    """An extraction with everything settled."""

    source: Source
    dataset: str
    options: Options
    machine: Machine
    backbone: Backbone
    columns: Sequence[Column]
    settings: auto.Settings
    fields: Mapping[str, Any]
    space: Space | None
    why_new: str | None
    plan: Plan
    clock: StageSeconds
    built: Engine | None = None

    @property
    def existing_space(self) -> Space:
        """The feature space, which only a dry run may lack."""
        if self.space is None:
            raise RuntimeError("a dry run has no feature space to write to")
        return self.space

    def loader(self, missing: Callable[[bytes], tuple[str, ...] | Reject]) -> Loader:
        """Threads that read, decode, resize and crop the images for which ``missing`` names columns."""
        return _loader(self.source, missing, self.backbone, self.machine, self.settings.decode, self.clock)

    def engine(self, columns: Sequence[Column]) -> Engine:
        """The network for some of the columns, in the job's precision; the one built to compare precisions if it fits."""
        if self.built is not None and set(columns) == set(self.built.columns):
            return self.built
        return Engine(
            self.backbone,
            columns,
            precision=self.settings.precision,
            device=self.machine.device,
            batch_size=self.machine.batch_size,
        )


def prepare(
    source: Source,
    store: FeatureStore | None,
    dataset: str | None,
    options: Options,
    say: Callable[[str], None],
    *,
    dry_run: bool,
) -> Job:
    """Settles everything before the first image.

    Args:
        source: the images.
        store: where features go; None in a dry run on a store that does not exist yet.
        dataset: name of the snapshots, the source's own name when None.
        options: what the user asked for.
        say: told what was decided, one line at a time.
        dry_run: leave the store as it is.

    Raises:
        UsageError: an option is wrong; see the message.
        SourceError: the source holds no image.
        WeightsNotFound: the weights are not at hand.
    """
    asked = {name: getattr(options, name) for name in auto.CHOICES}
    auto.check(asked)
    machine = settle_machine(options)
    backbone = load_backbone(options.backbone, options.weights, seed=options.seed)
    listing = source.scan()
    if not listing.num_rows:
        raise SourceError(f"no images in {source.name}: nothing there has the suffix of an image. Check the path")
    name = dataset or dataset_name(source.name)
    clock = StageSeconds()

    spaces = held_spaces(store, backbone, name)
    columns = _columns(backbone, spaces, options.nodes)

    built: list[Engine | None] = []

    def measure() -> tuple[str, str]:
        sample = load_sample(source, listing, backbone, machine, np.arange(listing.num_rows), SAMPLE)
        choice, engine = choose_precision(backbone, columns, sample, machine.device, batch_size=machine.batch_size)
        built.append(engine)
        return choice.precision, choice.reason

    settings = auto.resolve(asked, [space.fields for space in spaces], measure)
    if settings.decode == "gpu" and machine.device == "cpu":
        raise UsageError(
            f"the store's features of {backbone.name} were decoded on a GPU, and here the device is cpu; "
            "--decode cpu starts another feature space"
        )
    fields = {**backbone.identity(), **settings.fields(), "decoding": dict(DECODING), "numerics": NUMERICS}
    space = next((space for space in spaces if not differences(space.fields, fields)), None)
    why_new = None if space is not None else _why_new(spaces, fields, backbone)
    if space is None and store is not None and not dry_run:
        space = store.open_space(fields, backbone=backbone.name, notes=_notes(backbone, settings))
    if space is not None and not dry_run:
        _note_map_shapes(space, backbone, columns)
    if why_new:
        say(why_new)
    for setting, value in settings.fields().items():
        say(f"{setting} {value}: {settings.why[setting]}")
    plan = _plan(listing, store, space, name, columns)
    engine = built[0] if built else None
    return Job(source, name, options, machine, backbone, columns, settings, fields, space, why_new, plan, clock, engine)


def settle_machine(options: Options) -> Machine:
    """Resolves device, batch size and worker threads."""
    device = options.device
    if device == auto.AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {options.device!r}; choices: auto, cpu, cuda, cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {options.device!r}: this PyTorch sees no CUDA device. See: featurepipe doctor")
    if options.decode == "gpu" and device == "cpu":
        raise UsageError("decode 'gpu' needs --device cuda; here the device is cpu")
    batch_size = options.batch_size
    if batch_size == auto.AUTO:
        batch_size = 16 if device == "cpu" else 256
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UsageError(f"batch size {options.batch_size!r} must be 'auto' or a number from 1")
    workers = min(os.cpu_count() or 2, 16) if options.workers is None else options.workers
    if workers < 1:
        raise UsageError(f"workers {workers} must be a number from 1")
    return Machine(device, int(batch_size), workers)


def dataset_name(source_name: str) -> str:
    """A source's name as a dataset name: letters, digits, ``.``, ``_`` and ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source_name).strip("-.") or "images"


def held_spaces(store: FeatureStore | None, backbone: Backbone, dataset: str) -> list[Space]:
    """The store's feature spaces of this backbone: those this dataset used last first, then the rest."""
    if store is None:
        return []
    identity = backbone.identity()
    same = [space for space in store.spaces() if all(space.fields.get(k) == v for k, v in identity.items())]
    used = [run.get("fingerprint") for run in reversed(store.runs()) if run.get("dataset") == dataset]
    return sorted(same, key=lambda space: used.index(space.fingerprint) if space.fingerprint in used else len(used))


def load_sample(
    source: Source, listing: pa.Table, backbone: Backbone, machine: Machine, rows: np.ndarray, images: int
) -> torch.Tensor:
    """The first usable images among ``rows``: uint8 (n, C, h, w) with n <= ``images``."""
    found: list[torch.Tensor] = []
    loader = _loader(source, lambda _key: ("sample",), backbone, machine, "cpu", StageSeconds())
    with closing(loader.load(listing, rows[: 4 * images])) as batches:
        for batch in batches:
            found += [image.pixels for image in batch if image.pixels is not None]
            if len(found) >= images:
                break
    return (
        torch.stack(found[:images])
        if found
        else torch.zeros((0, *backbone.preprocessing.input_shape), dtype=torch.uint8)
    )


def _loader(
    source: Source,
    missing: Callable[[bytes], tuple[str, ...] | Reject],
    backbone: Backbone,
    machine: Machine,
    route: str,
    clock: StageSeconds,
) -> Loader:
    preprocessing = backbone.preprocessing
    return Loader(
        source,
        missing,
        decoder_for(route, preprocessing.colour, machine.device),
        preprocessing.resize_crop,
        clock=clock,
        workers=machine.workers,
        window=4 * machine.batch_size,
    )


def _columns(backbone: Backbone, spaces: Sequence[Space], nodes: Sequence[str]) -> Sequence[Column]:
    """The wanted columns; from what the store holds where it has them all, which saves tracing the network."""
    for space in spaces:
        aliases = space.notes.get("aliases", {})
        columns = [parse_column(node) for node in nodes]
        columns = [Column(aliases.get(column.node, column.node), column.pooling) for column in columns]
        if {str(column) for column in columns} <= set(space.columns()):
            return list(dict.fromkeys(columns))
    return backbone.columns(nodes)


def _plan(
    listing: pa.Table, store: FeatureStore | None, space: Space | None, dataset: str, columns: Sequence[Column]
) -> Plan:
    """Joins the listing with the last snapshot, and with the parts too where that leaves files unexplained."""
    if store is None or space is None:
        return make_plan(listing, KNOWN_FILES.empty_table(), KeySet(), KeySet())
    have = space.index([str(column) for column in columns])
    rejected = KeySet(key for key in space.rejects()["key"].to_pylist() if key)
    snapshot = store.snapshot(dataset)
    known = KNOWN_FILES.empty_table() if snapshot is None else _with_key(snapshot)
    plan = make_plan(listing, known, have, rejected)
    if plan.has_key.all():
        return plan
    return make_plan(listing, pa.concat_tables([_with_key(space.known_files(dataset=dataset)), known]), have, rejected)


def _with_key(files: pa.Table) -> pa.Table:
    files = files.select(KNOWN_FILES.names)
    return files.filter(files["key"].is_valid()).cast(KNOWN_FILES)


def _why_new(spaces: Sequence[Space], fields: Mapping[str, Any], backbone: Backbone) -> str:
    if not spaces:
        return f"starting a new feature space: the store holds none for {backbone.name} with these weights and preprocessing"
    changed = ", ".join(differences(spaces[0].fields, fields))
    return f"starting a new feature space: {changed} differs from {spaces[0].name}, so no feature there can be reused"


def _note_map_shapes(space: Space, backbone: Backbone, columns: Sequence[Column]) -> None:
    """Writes down what to reshape the rows of ``map`` columns to, since the store keeps vectors."""
    known = space.notes.get("map_shapes", {})
    new = {str(c): backbone.feature_shape(c) for c in columns if c.pooling == "map" and str(c) not in known}
    if new:
        space.update_notes({"map_shapes": {**known, **new}})


def _notes(backbone: Backbone, settings: auto.Settings) -> dict[str, Any]:
    return {
        "backbone": backbone.description(),
        "aliases": {"bottleneck": backbone.bottleneck},
        "resolved": dict(settings.why),
    }
