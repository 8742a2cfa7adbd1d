"""Stage one: images go once through a frozen network, and their features are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from featurepipe.backbones import Column, default_backbone, load_backbone
from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor, executor_on
from featurepipe.extraction.compute import compute
from featurepipe.extraction.limits import ExtractionOptions
from featurepipe.extraction.prepare import ExtractionSpec, prepare
from featurepipe.extraction.publish import begin_run, publish, recorded
from featurepipe.features.options import AUTO, REJECT, Places, places
from featurepipe.features.reading import opened
from featurepipe.features.session import Sample, SampleContext, sample_rate
from featurepipe.interrupt import StopRequest, stopping
from featurepipe.partitions import partitions, spilling
from featurepipe.progress import announcer, show
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore

TIMED_SAMPLE = 64
"""Images that a dry run times."""


@shown_as("extract")
def extract(
    source: Any,
    store: FeatureStore | str | PathLike[str],
    *,
    dataset: str | None = None,
    backbone: str = "auto",
    weights: str = "DEFAULT",
    seed: int = 0,
    nodes: str | Sequence[str] = ("bottleneck",),
    precision: str = "auto",
    dtype: str = "auto",
    decode: str = "auto",
    intensity: str = "auto",
    mirrored: bool = False,
    device: str = "auto",
    batch_size: int | str = "auto",
    workers: int | None = None,
    engine: str = "auto",
    max_rejects: int | str = "1%",
    max_gone: int | str | None = None,
    min_free: int | str | None = None,
    retry_rejects: bool = False,
    damaged: str = REJECT,
    only_under: Places = None,
    path_column: str | None = None,
    box: str | None = None,
    box_unit: str = "pixels",
    box_margin: float = 0.0,
    images: str | PathLike[str] | None = None,
    frames: str = "first",
    time_budget: float | None = None,
    stop: StopRequest | None = None,
    dry_run: bool = False,
    silent: bool = False,
    cluster: Any = None,
) -> dict[str, Any]:
    """Computes the features that the store lacks for the images of a source, and records what the source held.

    Images that were seen before cost nothing: unchanged files are not read, and moved, copied or relabelled ones are
    recognised by their bytes. A run may be stopped or killed at any moment; the next one goes on from there.

    Args:
        source: anything `featurepipe.images.open_source` takes: a folder, a manifest, an archive, arrays, a URL.
        store: the feature store or its path, made when it does not exist.
        dataset: name for the snapshot of the source; by default the source's own name.
        backbone: a name that ``featurepipe backbones`` lists, ``timm/NAME``, ``package.module:factory``, or ``auto``:
            ``resnet50``, or ``efficientnet_lite0`` where the store has only that, or only its weights are at hand.
        weights: a weights enum of torchvision, ``DEFAULT``, a file with the network's tensors (a state dict, checkpoint or
            .safetensors), or ``none`` for a random control network.
        seed: of the random control network.
        nodes: what to keep, each ``NODE`` or ``NODE:POOLING``; ``bottleneck`` is what feeds the classifier.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: what the store holds, else the fastest that agrees with fp32.
        dtype: stored dtype, ``float16``, ``float32`` or ``auto``.
        decode: where JPEGs are decoded, ``cpu``, ``gpu`` or ``auto``; or ``scaled``, ``scaled=N``: on the CPU, at a part of
            their size that is N times (by default twice) what they are resized to, or more.
        intensity: which values are black and white in images of more than eight bits: ``declared`` (what the file declares,
            else the range of its numbers, but a reject if the values fill less than a sixteenth of it), ``full``,
            ``bits=N`` (0 to 2^N - 1), ``window=LO:HI``, ``minmax`` (of each image), ``high-byte`` (as version 1), or
            ``auto``: as in the store, else ``declared``.
        mirrored: compute features of the images mirrored left to right: a feature space of its own, with the settings of the
            one beside it, which is taken only where it is named. `featurepipe.finetune` learns from it with ``augment="flip"``.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        batch_size: images per forward, or ``auto``.
        workers: threads that read and decode; by default one per CPU, at most 16.
        engine: what runs fp32 networks on a CPU: ``pytorch``, ``openvino``, or ``auto``: as in the store, else OpenVINO where it
            is installed and 1,000 images or more are to be computed. Features agree to a relative distance of 1e-5.
        max_rejects: unusable images to tolerate, a number or a share such as ``"1%"``.
        max_gone: images of the dataset's last snapshot that may be gone from the source, a number or a share such as
            ``"50%"``; by default any number but all. Only ``"100%"`` tolerates an empty source.
        min_free: space that must stay free on the store's disk, in bytes or such as ``"20GB"``.
        retry_rejects: try images again whose bytes were rejected before.
        damaged: what becomes of a JPEG of which libjpeg could only repair what was left: ``reject``, or ``keep``, then the
            run record lists it under ``damaged``.
        only_under: a folder, the URL of one, or several: of what a manifest names, or a link leads to, only files below them
            are read, all others are rejects; see `featurepipe.images.open_source`.
        path_column: the column of a manifest that holds the paths; by default ``path``, ``file``, ``filename`` or ``image``.
        box: the column of a manifest's boxes, or four as ``x,y,w,h``; ``none`` for whole images; by default ``box`` or ``bbox``.
        box_unit: ``pixels``, or ``share`` of the upright image's width and height.
        box_margin: added to each side of a box, as a share of its longer side.
        images: folder, its URL, or archive with the images of a manifest or COCO file; by default beside it.
        frames: ``first`` of a DICOM file of several frames, or ``all``: items ``path#1``, ``path#2``, ..., one group.
        time_budget: seconds after which to stop; what is left is for the next run.
        stop: the caller's own request to stop, if it handles signals itself; it brings its own deadline, so give no
            ``time_budget`` then.
        dry_run: estimate images, time and bytes; change nothing.
        silent: show no progress and say nothing.
        cluster: whose workers compute, anything `featurepipe.execution.connect` takes: a scheduler's address, ``"local:2"``, a
            `distributed.Client`, ... They all must see the store and the source; by default this process computes.

    Returns:
        The run record (also kept in the store's ``runs/``), or with ``dry_run`` the estimate, as plain JSON values. Its
        ``status`` is ``done``, or ``out of time`` when the deadline passed first; then there is no snapshot.

    Raises:
        UsageError: an argument is wrong.
        SourceError: the source cannot be listed, holds no image, or lacks more than ``max_gone`` allows; or it went away
            during the run, then all that had been read was computed and committed.
        WeightsNotFound: the weights are not at hand.
        TooManyRejects: more images were unusable than ``max_rejects``; features are kept, no snapshot is written.
        DiskFull: less than ``min_free`` is free, or nothing; everything computed before was committed.
        Interrupted: SIGINT or SIGTERM; everything in flight was committed.
        ClusterError: the cluster cannot be reached or used, or went away; everything its workers committed is kept.
    """
    options = ExtractionOptions(
        backbone=backbone,
        weights=weights,
        seed=seed,
        nodes=(nodes,) if isinstance(nodes, str) else tuple(nodes),
        precision=precision,
        dtype=dtype,
        decode=decode,
        intensity=intensity,
        mirrored=mirrored,
        device=device,
        batch_size=batch_size,
        workers=workers,
        engine=engine,
        max_rejects=max_rejects,
        max_gone=max_gone,
        min_free=min_free,
        retry_rejects=retry_rejects,
        damaged=damaged,
        only_under=places(only_under),
        path_column=path_column,
        box=box,
        box_unit=box_unit,
        box_margin=box_margin,
        images=None if images is None else str(images),
        frames=frames,
        time_budget=time_budget,
    )
    stops = stopping(stop, options.time_budget)
    say = announcer(silent=silent)
    with closing(opened(source, options)) as found, executor_on(cluster, say=say) as executor:
        options = replace(options, backbone=network_for(store, options.backbone, options.weights, say))
        settle = partial(prepare, dataset=dataset, options=options, say=say)
        if dry_run:
            executor.check()
            held = existing_store(store)
            with spilling(Path(str(store)) if held is None else held.path):
                job = settle(found, held, dry_run=True, executor=executor)
                return estimate(job, TIMED_SAMPLE, executor).as_dict()
        target = store if isinstance(store, FeatureStore) else FeatureStore(store)
        with target.lock(shared=True), spilling(target.path), stops as asked:
            floor = options.floor(target.path)
            floor.check()
            with asked.at_once(before="the first image"):
                executor.check(target.path)
                job = settle(found, target, dry_run=False, executor=executor)
            run = begin_run(target, job)
            with recorded(run):
                with show(len(job.plan.todo), "extract", silent=silent) as progress:
                    compute(job, executor, run.id, run.ledger, lambda: asked() or floor(), progress)
                return publish(run, asked, floor)


def network_for(
    store: FeatureStore | str | PathLike[str], name: str | None, weights: str, say: Callable[[str], None]
) -> str:
    """The network that is asked for, or the usual one (see `featurepipe.backbones.loading.default_backbone`).

    Raises:
        UsageError: Its name, or that of the weights, is unknown: said before there is a store.
    """
    if name is not None and name != AUTO:
        if ":" not in name:  # a user's own code runs once, when its turn comes
            load_backbone(name, weights)
        return name
    kept = existing_store(store)
    return default_backbone(weights, {space.backbone for space in kept.spaces()} if kept else (), say)


def existing_store(store: FeatureStore | str | PathLike[str]) -> FeatureStore | None:
    """The store, or None when there is none yet; a dry run makes none."""
    if isinstance(store, FeatureStore):
        return store
    path = Path(store)
    is_new = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    return None if is_new else FeatureStore(path)


ITEM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Estimate:
    """The answer of ``--dry-run``.

    Attributes:
        dataset: name of the snapshots.
        listed: images in the source.
        known: images that need nothing.
        rejected: images that were rejected before and have not changed.
        to_read: images that would be read; among them are moved and copied ones, which cost a read but no forward.
        gone: images of the last snapshot, by their ids, that the source no longer lists.
        lost_labels: those that two images or more of the last snapshot had and none has any more, with how many had each.
        warnings: what is odd about that.
        new: of these, images never seen under this name, size and time; the others lack a column.
        seconds: expected duration, or None when nothing could be sampled.
        images_per_second: measured on the sample, or None.
        sampled: images in the timed sample.
        bytes_per_column: bytes of features that each column would add, if no image is a copy of another.
        settings: of the feature space, ``value`` and ``why`` of each, as run records have them.
        space: the feature space that would be used.
        new_space: whether it would be a new one, and why.
        listing: what the source lists, ignores and guesses; see `ListingSummary`.
    """

    dataset: str
    listed: int
    known: int
    rejected: int
    to_read: int
    new: int
    gone: int
    lost_labels: dict[str, int]
    warnings: list[str]
    seconds: float | None
    images_per_second: float | None
    sampled: int
    bytes_per_column: dict[str, int]
    settings: dict[str, dict[str, str]]
    space: dict[str, Any]
    new_space: str | None
    listing: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"dry_run": True, **asdict(self)}


def estimate(job: ExtractionSpec, sample_size: int, executor: Executor | None = None) -> Estimate:
    """Times a sample of the images that would be read where they would be computed (by default here), and extrapolates."""
    plan = job.plan
    executor = executor or LocalExecutor()
    sample = Sample(plan.listing, plan.todo, sample_size)
    rate, sampled = executor.once(sample_rate, sample, context=SampleContext.on(executor, job.session, job.source))
    if rate is not None:
        rate *= max(executor.count(), 1)  # the others are taken to be as fast
    return Estimate(
        dataset=job.dataset,
        listed=plan.listing.num_rows,
        known=plan.known,
        rejected=len(plan.rejected),
        to_read=len(plan.todo),
        new=int((~plan.has_key).sum()),
        gone=job.losses.gone,
        lost_labels=dict(job.losses.labels),
        warnings=list(job.losses.warnings(job.options.max_gone)),
        seconds=len(plan.todo) / rate if rate else (None if len(plan.todo) else 0.0),
        images_per_second=rate,
        sampled=sampled,
        bytes_per_column={
            str(column): _lacking(job, column) * _bytes_per_image(job, column) for column in job.session.columns
        },
        settings=job.session.settled.as_dict(),
        space=dict(job.fields),
        new_space=job.why_new,
        listing=job.listing.as_dict(),
    )


def _lacking(job: ExtractionSpec, column: Column) -> int:
    """How many of the images to read lack the column, as far as their keys are known."""
    todo = job.plan.todo
    if job.space is None:
        return len(todo)
    index, held = job.space.index([str(column)]), 0
    for part in partitions(len(todo)):
        known = todo[part][job.plan.has_key[todo[part]]]
        held += int(index.contains(job.plan.keys[known]).sum())
    return len(todo) - held


def _bytes_per_image(job: ExtractionSpec, column: Column) -> int:
    return math.prod(job.session.backbone.feature_shape(column)) * ITEM_BYTES[job.session.settled.dtype]
