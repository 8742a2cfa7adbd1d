"""Tunes all layers from the images themselves, with random changes of them, from pretrained weights or from scratch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from featurepipe.backbones import load_backbone
from featurepipe.backbones.tail import State, Trunk, TunedLayers
from featurepipe.display import counted, size
from featurepipe.errors import DiskFull, Message, Option, SourceError, UsageError
from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor, executor_on
from featurepipe.extraction.extract import extract, network_for
from featurepipe.features.options import KEEP, REJECT, MachineOptions, SourceOptions, places
from featurepipe.features.reading import opened
from featurepipe.features.session import Decoding
from featurepipe.features.settings import Machine, Settings, settle_machine
from featurepipe.images import Source
from featurepipe.interrupt import stop_on_signals
from featurepipe.option_groups import declared
from featurepipe.progress import announcer, spoken
from featurepipe.store import FeatureStore, Space
from featurepipe.store.choice import choose_space
from featurepipe.store.feature_store import is_store
from featurepipe.store.rows import ArrayRows
from featurepipe.store.views import FeatureSet
from featurepipe.training.cost import available_memory
from featurepipe.training.train import unchanged
from featurepipe.tuning.activations import described, refuse_of_images, refuse_unknown, step_seconds
from featurepipe.tuning.augmentation import Augmentation, ImageExamples
from featurepipe.tuning.objective import Rows
from featurepipe.tuning.options import IMAGES, TuneOptions
from featurepipe.tuning.peers import ALONE, Peers, fabric_on, processes
from featurepipe.tuning.runs import drawn_network
from featurepipe.tuning.work import TuningWork, chosen, network_of, settled, tune_and_publish, why_tune

if TYPE_CHECKING:
    from lightning_fabric import Fabric

COPIES_ON_DISK = 10
"""A checkpoint holds the weights, AdamW's two means and the best weights, and is written beside the one before; then come two
files of weights."""
COPIES_IN_MEMORY = 7
"""Weights, gradients, AdamW's two means, the best, the first, and a checkpoint on its way."""


@dataclass
class ImagesWork(TuningWork):
    """All layers of a network, tuned from images.

    Attributes:
        examples: The images of the task's rows.
        stored: The bottleneck features of these rows, if the store has them.
        gone: Rows that the source no longer lists.
        machine: Where it learns, and with how many threads it reads.
        launched: Lightning Fabric on the device, perhaps with other processes; None in a dry run.
    """

    examples: ImageExamples
    stored: FeatureSet | None
    gone: Rows
    machine: Machine
    launched: Fabric | None = field(default=None, repr=False)

    @property
    def fabric(self) -> Fabric | None:
        """On which devices, and in which precision."""
        return self.launched

    @property
    def column(self) -> str:
        """What goes in."""
        return "images"

    @property
    def settings(self) -> Settings:
        """Those of the store's features, with which the bundle computes its own; from scratch in float32."""
        found = super().settings
        return replace(found, precision="fp32") if self.is_scratch else found

    @property
    def precision(self) -> str:
        """The arithmetic of training."""
        return precision_of(self.options, self.machine)

    def text(self, *, seconds: float | None = None) -> str:
        """What is tuned on what, and how long an epoch takes if that was measured."""
        division, blocks, schedule = self.task.division, self.body.blocks(), self.schedule
        parameters = sum(value.numel() for value in self.body.parameters() if value.requires_grad)
        how = "from scratch" if self.is_scratch else f"from {self.backbone.weights}"
        lasts = f"; an epoch takes about {spoken(seconds)}, at most {schedule.epochs}" if seconds is not None else ""
        return (
            f"tuning all of {self.backbone.name} {how}: {parameters:,} weights in {counted(len(blocks), 'block')} on "
            f"{len(division.train):,} images, {len(division.validation):,} to choose by; {self.examples.augmentation.text}, "
            f"{f'{schedule.text}, ' if schedule.text else ''}BatchNorm {_trunk(self).batch_norm}, {self.precision} on "
            f"{self.machine.device}{_together()}{lasts}"
        )

    def about(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            **described(self.backbone, self.body),
            "scratch": self.is_scratch,
            "augmentation": self.examples.augmentation.about(),
            "batch_norm": _trunk(self).batch_norm,
            "mixed_precision": self.precision,
            "device": self.machine.device,
            **({"processes": processes()[1]} if processes()[1] > 1 else {}),
            **self.schedule.about(),
            "library": f"lightning-fabric {version('lightning-fabric')}",
            "unreadable": len(self.examples.lost),
            "measure": self.objective.measure,
        }

    @property
    def drawn(self) -> Callable[[int], State] | None:
        """From scratch, of every layer."""
        if not self.is_scratch:
            return super().drawn
        return partial(drawn_network, name=self.backbone.name, batch_norm=_trunk(self).batch_norm, outputs=self.outputs)

    @property
    def unreadable(self) -> dict[int, str]:
        """Why images could not be read, by row."""
        return self.examples.lost

    def examples_of(self, rows: Rows) -> ImageExamples:  # noqa: ARG002 - all are read when they are needed
        """The images by row."""
        return self.examples

    def fill_frozen(self, rows: Rows) -> Rows:
        """Takes the features of the network as it is from the store, or computes them."""
        if self.stored is None:
            return super().fill_frozen(rows)
        self.set_features(rows, self.stored.read(np.float32, rows=rows))
        return rows[:0]

    def first_head(self, say: Callable[[str], None]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The same without the images that are gone."""
        self.leave_out(self.gone, say)
        return super().first_head(say)

    def check_room(self, folder: Path, peers: Peers) -> None:
        """Refuses what fits neither in memory nor on the disk, or is too little for the processes, before anything is done."""
        size = self.schedule.batch_size
        peers.check(len(self.task.division.train), size)
        check_room(self.body, size, self.machine.device, folder, name=self.backbone.name, peers=peers)


def check_room(
    body: TunedLayers, batch_size: int, device: str, folder: Path, *, name: str, peers: Peers = ALONE
) -> None:
    """Refuses a tuning from images that fits neither in memory nor on the disk.

    Args:
        body: What is tuned.
        batch_size: Images a step.
        device: Where.
        folder: Checkpoints and weights go beside or into it.
        name: Of the network.
        peers: Who makes a step together; on a CPU they share the memory.

    Raises:
        UsageError: A step needs more memory than is free; names a batch size that does not.
        DiskFull: Checkpoints and weights need more than is free on the folder's disk.
    """
    weights = sum(value.numel() * value.element_size() for value in body.parameters())
    where = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free, need = shutil.disk_usage(where).free, COPIES_ON_DISK * weights
    if need > free:
        raise DiskFull(
            f"checkpoints and weights of {name} take up to {size(need)}, and {size(free)} are free on the disk of {where}; give "
            "a folder on another disk"
        )
    on_cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device if ":" in device else "cuda:0")[0] if on_cuda else available_memory()
    sharing = 1 if on_cuda else peers.here
    each, images = bytes_of_one(body), -(-batch_size * sharing // peers.world)
    left = free - sharing * COPIES_IN_MEMORY * weights
    step = size(each * images + sharing * COPIES_IN_MEMORY * weights)
    if left < each * images:
        fewer = left // each * peers.world // sharing
        remedy = Message("try ", Option("batch_size", str(fewer))) if fewer > 0 else "take a smaller network"
        raise UsageError(
            Message(
                f"a step of {batch_size} images takes about {step} of memory, and {size(free)} are free on {device}; ", remedy,
            )
        )  # fmt: skip


def machine_options(extraction: Mapping[str, Any]) -> MachineOptions:
    """Device and threads, out of the arguments of an extraction."""
    return MachineOptions(**{name: extraction[name] for name in ("device", "workers") if name in extraction})


def precision_of(options: TuneOptions, machine: Machine) -> str:
    """The arithmetic of training on a machine."""
    if options.mixed_precision is not None:
        return options.mixed_precision
    return "bf16" if machine.device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"


def _together() -> str:
    _, world = processes()
    return f", {world} processes together" if world > 1 else ""


def _trunk(work: TuningWork) -> Trunk:
    if not isinstance(work.body, Trunk):
        raise TypeError("all layers are tuned as a trunk")
    return work.body


def bytes_of_one(body: TunedLayers) -> int:
    """What a step keeps in memory for each image until its gradients are computed, measured on two."""
    held: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        held[value.data_ptr()] = value.numel() * value.element_size()
        return value

    parameters = {value.data_ptr() for value in body.parameters()}
    images = torch.zeros(2, *body.input_shape, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        features = body(images)
    del features
    return max(1, sum(amount for place, amount in held.items() if place not in parameters) // 2)


def images_work(
    source: Any,
    store: FeatureStore | str | PathLike[str] | None,
    options: TuneOptions,
    extraction: Mapping[str, Any],
    *,
    snapshot: str | None,
    ids: Collection[str] | None,
    beside: Path,
    executor: Executor,
    dry_run: bool,
    silent: bool,
    say: Callable[[str], None],
    fabric: Fabric | None = None,
) -> ImagesWork | dict[str, Any]:
    """Settles rows, labels, network and images, of a store whose images are read where they were extracted from, or of images.

    Images that are given are extracted first, with the bottleneck, so that labels, splits, keys and rejects are those of any
    other command; what the store has is not computed again.

    Args:
        source: A store, or images as `featurepipe.extract` takes them.
        store: Where features of images go; by default beside the bundle.
        options: Of the tuning.
        extraction: Further arguments of `featurepipe.extract`.
        snapshot: As in `featurepipe.train`.
        ids: Only these images; None for all.
        beside: The bundle's folder.
        executor: Who extracts.
        dry_run: Extract nothing.
        silent: Show no progress.
        say: Told what is done.
        fabric: Lightning's, launched; the first of its processes extracts.

    Returns:
        The work; in a dry run on images that are yet to be extracted, what is known without that.

    Raises:
        UsageError: The images are gone, or as `featurepipe.extract` and `featurepipe.train` raise.
        SourceError: The source cannot be listed.
    """
    refuse_unknown(extraction)
    peers = Peers(fabric)
    run: dict[str, Any] = {}
    if is_store(source):
        refuse_of_images(source, store, extraction, allowed=("device", "workers"))
        found = source if isinstance(source, FeatureStore) else FeatureStore(source, create=False)
        dataset = options.dataset or found.only_dataset()
        images, damaged = recorded_source(found, dataset)
        extraction = {**extraction, "damaged": damaged}
    else:
        target = beside.with_name(f"{beside.name}.features") if store is None else store
        asked = SourceOptions(**{name: extraction[name] for name in declared(SourceOptions) if name in extraction})
        weights = "DEFAULT" if options.weights is None else str(options.weights)

        def extracted() -> tuple[TuneOptions, dict[str, Any]]:
            named = replace(options, backbone=network_for(target, options.backbone, weights, say))
            return named, _extracted(
                source, target, named, extraction, executor, dry_run=dry_run, silent=silent, say=say
            )

        named, run = peers.from_first(extracted)
        dataset = run["dataset"]
        if dry_run and run["to_read"]:
            return _outlook(run, named, extraction)
        found = target if isinstance(target, FeatureStore) else FeatureStore(target, create=False)
        images = opened(source, asked)
    work = _settled(found, dataset, images, options, extraction, run, snapshot=snapshot, ids=ids, say=say)
    work.examples.workers = max(1, work.examples.workers // peers.here)
    work.launched = fabric
    return work


def recorded_source(store: FeatureStore, dataset: str) -> tuple[Source, str]:
    """Opens the source that a dataset was last extracted from, as it was opened then; says what became of damaged images.

    Raises:
        UsageError: It is gone, or was in memory.
    """
    runs = [run for run in store.runs() if run.get("dataset") == dataset and isinstance(run.get("source"), str)]
    if not runs:
        raise UsageError(Message(f"{store.path} does not say where the images of {dataset} are; ", *_give(store)))
    run = max(runs, key=lambda run: run["run_id"])
    known = run.get("options", {})
    given: dict[str, Any] = {name: known[name] for name in declared(SourceOptions) if name in known}
    asked = SourceOptions(**{**given, "only_under": places(given.get("only_under"))})
    try:
        return opened(run["source"], asked), str(known.get("damaged", REJECT))
    except (SourceError, UsageError) as error:
        raise UsageError(
            Message(
                f"the images of {dataset} were extracted from {run['source']}, which cannot be opened now (", error.message,
                "); ", *_give(store),
            )
        ) from error  # fmt: skip


def _give(store: FeatureStore) -> tuple[str | Option, ...]:
    return "give the images as the source, and the store with ", Option("store", str(store.path))


def _extracted(
    source: Any, store: FeatureStore | str | PathLike[str], options: TuneOptions, extraction: Mapping[str, Any],
    executor: Executor, *, dry_run: bool, silent: bool, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The record of the extraction of the bottleneck, or what a dry run estimates of it."""
    arguments = {
        **extraction,
        "dataset": options.dataset,
        "backbone": str(options.backbone),
        "weights": "DEFAULT" if options.weights is None else str(options.weights),
        "seed": options.seed,
        "cluster": executor,
    }
    where = store.path if isinstance(store, FeatureStore) else store
    say(f"the bottleneck of {arguments['backbone']}, for rows, labels and the first head, is kept in {where}")
    return extract(source, store, **arguments, dry_run=dry_run, silent=silent)


def _outlook(estimate: Mapping[str, Any], options: TuneOptions, extraction: Mapping[str, Any]) -> dict[str, Any]:
    """What a dry run says of images that are yet to be extracted."""
    weights = "DEFAULT" if options.weights is None else str(options.weights)
    backbone = load_backbone(str(options.backbone), weights, seed=options.seed)
    body = Trunk(backbone, options.batch_norm)
    schedule = options.schedule(estimate["listed"], is_scratch=backbone.is_random)
    step = step_seconds(body, schedule.batch_size)
    lasts = "" if estimate["seconds"] is None else f", in about {spoken(estimate['seconds'])}"
    text = f"{estimate['to_read']:,} of {estimate['listed']:,} images are to be extracted first{lasts}"
    machine = settle_machine(machine_options(extraction), "cpu")
    return {
        "dry_run": True,
        "extraction": {**estimate, "text": text},
        "tuning": {
            **described(backbone, body),
            "scratch": backbone.is_random,
            "augmentation": Augmentation.of(options.augment, backbone.preprocessing).about(),
            "batch_norm": body.batch_norm,
            "mixed_precision": precision_of(options, machine),
            "device": machine.device,
            **schedule.about(),
            "seconds_per_1000_images": 1000 / schedule.batch_size * step,
        },
    }


def _settled(
    store: FeatureStore, dataset: str, source: Source, options: TuneOptions, extraction: Mapping[str, Any],
    run: Mapping[str, Any], *, snapshot: str | None, ids: Collection[str] | None, say: Callable[[str], None],
) -> ImagesWork:  # fmt: skip
    is_scratch = options.weights == "none"
    space, column = _rows_of(store, dataset, run.get("fingerprint"), options, is_scratch=is_scratch)
    if is_scratch:
        backbone = load_backbone(options.backbone or space.backbone, "none", seed=options.seed)
    else:
        backbone, _ = network_of(space, options)
    body = Trunk(backbone, options.batch_norm)
    found = chosen(store.features(dataset, node=column, backbone=space.fingerprint, snapshot=snapshot), ids)
    task, recipe, objective = settled(store, found, body, options, snapshot=snapshot, say=say)
    held = task.features.rows
    positions = held.positions if isinstance(held, ArrayRows) else np.arange(len(task.features))
    listing, gone = located(source, task.features, say)
    settings = Settings.of_space(space.fields, why="as in the store")
    machine = settle_machine(machine_options(extraction), "cpu")
    examples = ImageExamples(
        source, listing, task.features.keys, backbone.preprocessing, Augmentation.of(options.augment, backbone.preprocessing),
        Decoding("cpu", settings.intensity, extraction.get("damaged") == KEEP), machine.workers,
    )  # fmt: skip
    stored = found.take(positions) if column == body.bottleneck and not backbone.is_random else None
    return ImagesWork(
        space,
        backbone,
        body,
        task,
        recipe,
        objective,
        options,
        IMAGES,
        examples=examples,
        stored=stored,
        gone=gone,
        machine=machine,
    )


def _rows_of(
    store: FeatureStore, dataset: str, fingerprint: str | None, options: TuneOptions, *, is_scratch: bool
) -> tuple[Space, str]:
    """A feature space that has the dataset's rows, and a column of it: the bottleneck where there is one, and for rows alone any.

    Raises:
        UsageError: None fits, or several do.
        StoreError: The store holds no features.
    """
    named = options.backbone if not is_scratch or any(s.backbone == options.backbone for s in store.spaces()) else None
    try:
        space = choose_space(store, fingerprint or named, dataset)
    except UsageError:
        if not is_scratch:
            raise
        space = next(space for space in store.spaces() if space.columns())  # whichever: its features are not taken
    columns = space.columns()
    bottleneck = f"{space.bottleneck or 'bottleneck'}:gap"
    if bottleneck in columns or not columns:
        return space, bottleneck
    return space, next(iter(columns))


def located(source: Source, features: FeatureSet, say: Callable[[str], None]) -> tuple[pa.Table, Rows]:
    """Returns the listing's entry of each row, and the rows that the source no longer lists.

    Raises:
        UsageError: It lists none of them.
    """
    listing = source.scan().combine_chunks()
    places = pc.index_in(features.table["id"].combine_chunks(), value_set=listing["id"].combine_chunks())
    gone = np.flatnonzero(np.asarray(places.is_null()))
    if len(gone) == len(features):
        raise UsageError(
            f"{source.location} lists none of the {len(features):,} images of {features.origin.dataset}, such as "
            f"{features.ids[0]!r}; give the source that they were extracted from"
        )
    if len(gone):
        is_ = "is" if len(gone) == 1 else "are"
        say(f"{counted(len(gone), 'image')} of {features.origin.dataset} {is_} not in {source.location} any more")
    return listing.select(["id", "locator", "size"]).take(pc.fill_null(places, 0)), gone


def finetune_images(
    source: Any,
    store: FeatureStore | str | PathLike[str] | None,
    options: TuneOptions,
    extraction: Mapping[str, Any],
    *,
    snapshot: str | None,
    ids: Collection[str] | None,
    folder: Path,
    cluster: Any,
    if_changed: bool,
    dry_run: bool,
    silent: bool,
    say: Callable[[str], None],
    start: float,
) -> dict[str, Any]:
    """The part of `featurepipe.finetune` for ``from_node="images"``; see there."""
    if options.store_features:
        raise UsageError(
            Message(
                Option("store_features", "true"), " is of stored activations; features of a network tuned from images are "
                f"extracted: featurepipe extract SOURCE --backbone NAME --weights {folder}/weights.safetensors",
            )
        )  # fmt: skip
    fabric = None if dry_run else launched(options, extraction)
    peers = Peers(fabric)
    if processes()[0]:  # the first one speaks, also in a dry run, where they do not meet
        silent, say = True, announcer(silent=True)
    with executor_on(None if dry_run or not peers.is_first else cluster, say=say) as executor:
        work = images_work(
            source, store, options, extraction, snapshot=snapshot, ids=ids, beside=folder, executor=executor,
            dry_run=dry_run, silent=silent, say=say, fabric=fabric,
        )  # fmt: skip
    if isinstance(work, dict):
        return work
    asked = {"why": peers.from_first(lambda: why_tune(work, folder, say))} if if_changed else {}
    if asked == {"why": []}:
        return unchanged(folder, work.task, work.inputs())
    peers.from_first(lambda: work.check_room(folder, peers))
    seconds = peers.from_first(work.epoch_seconds) / peers.world
    say(work.text(seconds=seconds))
    if dry_run:
        return {**work.task.as_dict(), "tuning": {**work.about(), "seconds_per_epoch": seconds}, **asked}
    if cluster is not None:
        say("layers are tuned from images in this process; the cluster computed what was to be extracted")
    here = LocalExecutor()
    with closing(work.examples.source), stop_on_signals() as stop:
        return {**tune_and_publish([work], folder, stop, here, start=start, silent=silent, say=say), **asked}


def launched(options: TuneOptions, extraction: Mapping[str, Any]) -> Fabric:
    """Lightning Fabric on the device that is asked for, with all processes that `torchrun` has started."""
    machine = settle_machine(machine_options(extraction), "cpu")
    return fabric_on(machine.device, precision_of(options, machine), together=True)
