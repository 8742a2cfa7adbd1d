"""What a process of a cluster has for its work: a desk, a network that it loads once, the source as it travelled."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import platform
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch

from featurepipe.backbones import Backbone, Column, load_backbone
from featurepipe.backbones.engine import NUMERICS, Engine
from featurepipe.errors import SourceError, UsageError, WeightsNotFound, WorkerRefused
from featurepipe.extraction.auto import Settings
from featurepipe.extraction.estimate import sample_rate as time_sample
from featurepipe.extraction.history import History
from featurepipe.extraction.machine import Machine
from featurepipe.extraction.options import Options
from featurepipe.extraction.place import PrecisionMeasurement
from featurepipe.extraction.plan import KeySet, make_plan
from featurepipe.extraction.prepare import Job
from featurepipe.extraction.reading import GONE, PatientReader
from featurepipe.extraction.slices import Slice, Worked
from featurepipe.extraction.stream import StageSeconds
from featurepipe.extraction.wanted import Wanted
from featurepipe.images import Source
from featurepipe.images.decode import DECODING
from featurepipe.images.findings import ListingSummary
from featurepipe.images.listing import SCHEMA
from featurepipe.store import differences
from featurepipe.store.known_files import KNOWN_FILES
from featurepipe.store.writer import DEFAULT_PART_BYTES

TRIM_VARIABLE = "MALLOC_TRIM_THRESHOLD_"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_KEPT = 32 * 1024 * 1024
"""Bytes of the largest block that is not asked of the system, and given back to it, by itself; glibc's own limit."""

LEAST_PART_BYTES = 4 * 1024 * 1024
PART_SHARE = 32
"""A part that is being filled, and one that is being written, each hold at most this fraction of the worker's memory limit."""


@dataclass(frozen=True)
class Network:
    """A network as a worker loads it, once; hashable, so that a process knows whether it has it already.

    Attributes:
        backbone: its name, as the user wrote it.
        weights: as the user wrote them.
        seed: of a random control.
        columns: to compute.
        identity: what its features follow from besides precision, as canonical JSON; see `identity_of`.
        device: ``cpu`` or ``cuda``.
        batch_size: images in a forward.
    """

    backbone: str
    weights: str
    seed: int
    columns: tuple[Column, ...]
    identity: str
    device: str
    batch_size: int


@dataclass(frozen=True)
class Desk:
    """Where a slice is worked on.

    Attributes:
        worker: the worker's name.
        threads: cores that it may use.
        memory: its limit in bytes, 0 for none.
    """

    worker: str
    threads: int
    memory: int = 0

    def machine(self, network: Network, workers: int | None) -> Machine:
        """Device, batch size and threads here."""
        return Machine(network.device, network.batch_size, workers or self.threads)

    def worked(self, machine: Machine, seconds: float, clock: StageSeconds, **more: Any) -> Worked:
        """How this process fared with a slice; ``more`` is what else `Worked` says."""
        host, pid, stages = socket.gethostname(), os.getpid(), dict(clock.totals)
        return Worked(self.worker, host, pid, machine.device, machine.workers, seconds, stages, **more)

    @property
    def part_bytes(self) -> int:
        """What a part may hold: the usual, or less where memory is scarce."""
        share = self.memory // PART_SHARE if self.memory else DEFAULT_PART_BYTES
        return max(LEAST_PART_BYTES, min(DEFAULT_PART_BYTES, share))


@dataclass(frozen=True)
class Ready:
    """A network that is loaded, and what was built of it: by precision, and then by columns."""

    backbone: Backbone
    engines: defaultdict[str, dict[frozenset[Column], Engine]] = field(default_factory=lambda: defaultdict(dict))


@lru_cache(maxsize=1)
def load_network(network: Network, threads: int) -> Ready:
    """The network, loaded when a process first needs it, and checked.

    Args:
        network: what to load.
        threads: cores that it may use.

    Raises:
        WorkerRefused: it cannot be loaded here, or would compute other features.
    """
    if network.device.startswith("cuda") and not torch.cuda.is_available():
        raise WorkerRefused("it has no CUDA device, and this run computes on cuda")
    torch.set_num_threads(threads)
    keep_memory()
    try:
        backbone = load_backbone(network.backbone, network.weights, seed=network.seed)
        mine = identity_of(backbone)
    except (UsageError, WeightsNotFound) as error:
        raise WorkerRefused(f"it cannot load {network.backbone}: {error}") from error
    differing = differences(json.loads(network.identity), mine)
    if differing:
        raise WorkerRefused(f"its {network.backbone} would give other features: {', '.join(differing)} differs")
    return Ready(backbone)


def keep_memory() -> None:
    """Has the C library keep what a batch frees for the next one.

    Dask's nanny sets ``MALLOC_TRIM_THRESHOLD_`` so that memory goes back to the system at once; a network on a CPU then takes
    every activation from the system anew, which was measured to cost twice the time of the forward itself. This undoes it, with
    the values at which glibc arrives by itself. Other C libraries have no such setting.
    """
    if TRIM_VARIABLE not in os.environ or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_KEPT)


def identity_of(backbone: Backbone) -> dict[str, Any]:
    """What a backbone's features follow from besides the settings (precision and the like): part of the feature space."""
    return {**backbone.identity(), "decoding": dict(DECODING), "numerics": NUMERICS}


@lru_cache(maxsize=1)
def open_travelled(content: bytes) -> Source:
    """The source that was pickled, opened once in this process.

    Raises:
        WorkerRefused: its code is not there.
    """
    try:
        source: Source = pickle.loads(content)  # noqa: S301  # from the client, which runs what it likes here anyway
    except (ImportError, AttributeError) as error:
        raise WorkerRefused(f"it cannot open the source: {error}") from error
    return source


@contextmanager
def needing(source: Source, probes: Sequence[bytes]) -> Iterator[Callable[[Iterable[str], int], None]]:
    """For as long as a slice is worked on: whoever loses the source is refused, since others perhaps can read it.

    Args:
        source: as this process reads it.
        probes: locators of images that can be read as long as the source is there.

    Yields:
        A function of why images could not be used, and of how many rows there were. It looks for the source if it seems that none
        at all could be read.

    Raises:
        WorkerRefused: this process cannot read the source.
    """

    def doubt(reasons: Iterable[str], rows: int) -> None:
        gone = [reason for reason in reasons if reason.startswith(GONE)]
        if gone and len(gone) == rows and probes:
            PatientReader(source, probed(probes)).check(gone[0])

    try:
        yield doubt
    except SourceError as error:
        raise WorkerRefused(f"it cannot read the source: {error}") from error


def probed(probes: Sequence[bytes]) -> pa.ChunkedArray:
    """Locators as a listing has them."""
    return pa.chunked_array([pa.array(probes, pa.binary())])


def job_of(network: Network, ready: Ready, source: Source, settings: Settings, machine: Machine) -> Job:
    """An extraction by this process, of nothing yet."""
    nothing = Wanted(None, network.columns)
    return Job(
        source=source,
        dataset="",
        options=Options(network.backbone, network.weights, network.seed),
        machine=machine,
        backbone=ready.backbone,
        columns=network.columns,
        settings=settings,
        fields={},
        space=None,
        why_new=None,
        wanted=nothing,
        plan=make_plan(SCHEMA.empty_table(), KNOWN_FILES.empty_table(), nothing, KeySet()),
        history=History(),
        gone=0,
        listing=ListingSummary.of(SCHEMA.empty_table()),
        clock=StageSeconds(),
        engines=ready.engines[settings.precision],
    )


def measure_precision(
    network: Network, source: bytes, workers: int | None, tried: str | None, intensity: str, sample: Slice, desk: Desk
) -> tuple[str, str]:
    """Compares a reduced precision with fp32 on some images, as `PrecisionMeasurement` does, in this process.

    Args:
        network: what computes.
        source: the source, pickled.
        workers: threads that read and decode, or None.
        tried: the reduced precision, None for what suits the device.
        intensity: with which images are decoded.
        sample: the images.
        desk: who does it.

    Raises:
        WorkerRefused: see `compute_slice`.
    """
    ready, machine = load_network(network, desk.threads), desk.machine(network, workers)
    columns = network.columns
    measure = PrecisionMeasurement(open_travelled(source), sample.table(), ready.backbone, columns, machine)
    precision, why = measure(tried, intensity)
    if measure.engine is not None:
        ready.engines[precision][frozenset(columns)] = measure.engine
    return precision, why


def sample_rate(
    network: Network, source: bytes, settings: Settings, workers: int | None, images: int, sample: Slice, desk: Desk
) -> tuple[float | None, int]:
    """Images per second of this process over so many of a sample, None without any usable one, and how many those were."""
    ready = load_network(network, desk.threads)
    job = job_of(network, ready, open_travelled(source), settings, desk.machine(network, workers))
    listing = sample.table()
    plan = make_plan(listing, KNOWN_FILES.empty_table(), job.wanted, KeySet())
    return time_sample(replace(job, plan=plan), images)
