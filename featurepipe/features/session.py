"""A session: a frozen network, the settings of its features, and the machine that computes them."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from featurepipe.backbones import Backbone, Column, Preprocessing, load_backbone
from featurepipe.backbones.engine import (
    ENOUGH_IMAGES,
    NUMERICS,
    PYTORCH,
    Engine,
    choose_precision,
    openvino_is_installed,
)
from featurepipe.errors import FeaturepipeError, Message, Reject, UsageError, WeightsNotFound, WorkerRefused
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.features.loader import Decoder, Loader, StageSeconds
from featurepipe.features.options import AUTO, DamageOptions, MachineOptions, Options
from featurepipe.features.settings import Machine, Settings, settle_machine
from featurepipe.images import Source
from featurepipe.images.decode import DECODING, try_decode
from featurepipe.images.intensity import parse_intensity
from featurepipe.images.regions import Region, image_of
from featurepipe.images.scaling import ROUTES, Scaling
from featurepipe.partitions import take
from featurepipe.store import differences
from featurepipe.store.space import canonical_json

AT_ONCE = 16
"""Images that are decoded before precisions are compared on them: mostly the first ones tell that a precision will not do."""

LARGEST_SOURCE = 4 * 1024 * 1024
"""Bytes of a source that travels to workers: paths and names are far below, a pile of arrays in memory is above."""

TRIM_VARIABLE = "MALLOC_TRIM_THRESHOLD_"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_KEPT = 32 * 1024 * 1024
"""Bytes of the largest block that is not asked of the system, and given back to it, by itself; glibc's own limit."""


@dataclass(frozen=True)
class NetworkName:
    """A network as any process can load it; hashable, so that a process knows whether it has it already.

    Attributes:
        backbone: its name, as the user wrote it.
        weights: as the user wrote them.
        seed: of a random control.
        identity: what its features follow from besides the settings, as canonical JSON; see `identity_of`.
    """

    backbone: str
    weights: str
    seed: int
    identity: str

    @classmethod
    def of(cls, backbone: Backbone, weights: str, seed: int, *, name: str | None = None) -> Self:
        """A network that was loaded here, from weights as they were asked for, by its own name or another one."""
        weights = str(Path(weights).absolute()) if Path(weights).is_file() else weights
        return cls(name or backbone.name, weights, seed, canonical_json(identity_of(backbone)))


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in this process, and the engines built of it: by precision and name of the engine, and then by columns."""

    backbone: Backbone
    engines: defaultdict[tuple[str, str], dict[frozenset[Column], Engine]] = field(
        default_factory=lambda: defaultdict(dict)
    )


_REJECTED = DamageOptions()


@dataclass(frozen=True)
class Session:
    """All that turns images into features.

    Its pickle names the network. A process that opens it loads the network in `at`, and refuses if its features would differ.

    Attributes:
        network: how another process loads it.
        columns: to compute.
        machine: device, batch size and threads.
        workers: threads that read and decode as asked for; None for as many as a worker may use.
        settings: precision, stored dtype, decode route and intensity; None before they are settled.
        damage: what becomes of JPEGs that libjpeg could only repair.
        loaded: the network in this process, if it is loaded.
    """

    network: NetworkName
    columns: tuple[Column, ...]
    machine: Machine
    workers: int | None = None
    settings: Settings | None = None
    damage: DamageOptions = _REJECTED
    loaded: LoadedNetwork | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        columns: Sequence[Column],
        machine: Machine,
        options: Options,
        *,
        loaded: LoadedNetwork | None = None,
    ) -> Self:
        """A session of a network that this process has loaded."""
        name = NetworkName.of(backbone, options.weights, options.seed, name=options.backbone)
        damage, loaded = DamageOptions.of(options), loaded or LoadedNetwork(backbone)
        return cls(name, tuple(columns), machine, options.workers, damage=damage, loaded=loaded)

    @classmethod
    def of_space(
        cls,
        space: Mapping[str, Any],
        columns: Sequence[str],
        machine: MachineOptions,
        asked: Options,
        *,
        why: str,
        refuse: Callable[[Backbone, list[str]], FeaturepipeError],
        like: str | None = None,
        loaded: Backbone | None = None,
    ) -> Self:
        """A session whose features are those of a feature space.

        Args:
            space: The fields of the feature space.
            columns: To compute.
            machine: On what the network runs.
            asked: Its name, weights and seed; threads that read; what becomes of damaged JPEGs.
            why: Where the settings come from, for messages.
            refuse: Makes the error for a network that gives other features here, and the fields that differ.
            like: As `load_backbone` takes it.
            loaded: The network, if this process has it already.

        Raises:
            FeaturepipeError: What ``refuse`` makes.
            WeightsNotFound: The network's weights are not at hand.
        """
        settings = Settings.of_space(space, why=why)
        settled = settle_machine(machine, settings.decode)
        network = loaded or load_backbone(asked.backbone, asked.weights, seed=asked.seed, like=like)
        changed = differences(space, {**network.identity(), **settings.fields(), "numerics": NUMERICS})
        if changed:
            raise refuse(network, changed)
        named = replace(asked, backbone=network.name)
        return replace(cls.of(network, network.columns(list(columns)), settled, named), settings=settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return Session, (self.network, self.columns, self.machine, self.workers, self.settings, self.damage)

    @contextmanager
    def at(self, worker: Worker) -> Iterator[Session]:
        """The session in the process of a worker, with its network loaded, alone on all its cores.

        Raises:
            WorkerRefused: the network cannot be loaded there, or would compute other features.
        """
        if worker.is_local:
            yield self
            return
        with alone_on_all_cores(worker):
            loaded = load_network(self.network, self.machine.device)
            yield replace(self, machine=replace(self.machine, workers=self.workers or worker.threads), loaded=loaded)

    @property
    def backbone(self) -> Backbone:
        """The network; see `network_here`."""
        return self.network_here.backbone

    @property
    def network_here(self) -> LoadedNetwork:
        """The network and the engines built of it, in this process.

        Raises:
            RuntimeError: it is not loaded.
        """
        if self.loaded is None:
            raise RuntimeError("the session's network is not loaded in this process; enter Session.at")
        return self.loaded

    @property
    def settled(self) -> Settings:
        """The settings.

        Raises:
            RuntimeError: they are not settled.
        """
        if self.settings is None:
            raise RuntimeError("the session's settings are not settled")
        return self.settings

    def loader(
        self,
        source: Source,
        missing: Callable[[bytes], tuple[str, ...] | Reject],
        clock: StageSeconds,
    ) -> Loader:
        """Threads that read, decode, resize and crop the images for which ``missing`` names columns."""
        decoding = Decoding(self.settled.decode, self.settled.intensity, self.damage.keep_damaged)
        return loader_for(source, missing, self.backbone, self.machine, decoding, clock, mirrored=self.settled.mirrored)

    def engine(self, columns: Sequence[Column]) -> Engine:
        """The network for some of the columns, in the settled precision; built once."""
        precision, wanted, name = self.settled.precision, frozenset(columns), self._engine
        engines = self.network_here.engines[precision, name]
        if wanted not in engines:
            engines[wanted] = Engine(
                self.backbone,
                columns,
                precision=precision,
                device=self.machine.device,
                batch_size=self.machine.batch_size,
                engine=name,
            )
        return engines[wanted]

    def for_images(self, images: int, held: str | None = None) -> Self:
        """The same with the engine settled; see `featurepipe.features.settings.Machine.for_images`."""
        machine = self.machine.for_images(images, held)
        return replace(self, machine=machine if self.settled.precision == "fp32" else replace(machine, engine=PYTORCH))

    def runtime(self) -> dict[str, str]:
        """What runs the network: the engine and, once it has run in this process, its version, and why it is not another."""
        built = self.loaded.engines[self.settled.precision, self._engine] if self.loaded and self.settings else {}
        return next((dict(engine.runtime) for engine in built.values()), {"engine": self._engine})

    @property
    def _engine(self) -> str:
        return PYTORCH if self.machine.engine == AUTO else self.machine.engine


@dataclass(frozen=True)
class Sample:
    """Some rows of a listing, of which the first usable images are taken.

    Attributes:
        listing: with the rows.
        rows: int64, which of them, in order.
        images: how many usable ones are wanted.
    """

    listing: pa.Table
    rows: np.ndarray
    images: int

    def __reduce__(self) -> tuple[Any, ...]:
        chosen = self.rows[: 4 * self.images]
        rows = np.arange(len(chosen))
        taken = take(self.listing.select(["id", "size", "mtime_ns", "locator"]), chosen)
        copied = taken.take(pa.array(rows))  # a slice would travel with all that it is a slice of
        return Sample, (copied, rows, self.images)


@dataclass(frozen=True)
class SampleContext:
    """What samples of a source are computed with."""

    session: Session
    source: Source

    @classmethod
    def on(cls, executor: Executor, session: Session, source: Source) -> Self:
        """The context for an executor.

        Raises:
            UsageError: the source cannot travel to its workers.
        """
        if not executor.is_local:
            check_travels(source)
        return cls(session, source)

    def load(self, session: Session, sample: Sample, intensity: str) -> torch.Tensor:
        """The usable images: uint8 (n, C, h, w)."""
        found = list(self._usable(session, session.machine, sample, intensity))
        shape = session.backbone.preprocessing.input_shape
        return torch.stack(found) if found else torch.zeros((0, *shape), dtype=torch.uint8)

    def batches(self, session: Session, sample: Sample, intensity: str) -> Generator[torch.Tensor, None, None]:
        """The usable images, some at a time, as they are asked for: each uint8 (n, C, h, w)."""
        machine = replace(session.machine, batch_size=min(session.machine.batch_size, AT_ONCE))  # reads less ahead
        with closing(self._usable(session, machine, sample, intensity)) as found:
            while some := list(islice(found, AT_ONCE)):
                yield torch.stack(some)

    def _usable(
        self, session: Session, machine: Machine, sample: Sample, intensity: str
    ) -> Generator[torch.Tensor, None, None]:
        """The usable images one by one: each uint8 (C, h, w)."""
        decoding = Decoding("cpu", intensity)
        loader = loader_for(self.source, lambda _key: ("sample",), session.backbone, machine, decoding, StageSeconds())
        with closing(loader.load(sample.listing, sample.rows[: 4 * sample.images])) as batches:
            found = (image.pixels for batch in batches for image in batch if image.pixels is not None)
            yield from islice(found, sample.images)

    def close(self) -> None:
        """Closes the source, in a process elsewhere that needs it no longer."""
        self.source.close()


@contextmanager
def alone_on_all_cores(worker: Worker) -> Iterator[None]:
    """While the block runs, PyTorch has all threads of the worker, and no other task of its process is in such a block."""
    with worker.alone():
        if not worker.is_local:
            torch.set_num_threads(worker.threads)  # of this thread
        yield


def check_travels(source: Source) -> None:
    """Checks that workers elsewhere can read a source.

    Raises:
        UsageError: it cannot travel, since it holds images, or something of this process.
    """
    import cloudpickle  # type: ignore[import-untyped]

    remedy = (
        "on a cluster, images come from where every worker can read them: a folder, a manifest, archives, "
        "array files (.npz, .h5), or a URL"
    )
    if source.location.startswith("memory://"):
        raise UsageError(f"{source.location} is in this process' memory, where no worker can read it; {remedy}")
    try:
        content: bytes = cloudpickle.dumps(source)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the source {source.location} cannot be sent to workers ({error}); {remedy}") from error
    if len(content) > LARGEST_SOURCE:
        raise UsageError(
            f"the source {source.location} holds {len(content) / 2**20:,.0f} MiB in memory, which would travel to the "
            f"workers with the work; {remedy}"
        )


def settle_machine_for(executor: Executor, options: MachineOptions, decode: str = AUTO) -> Machine:
    """Settles device, batch size and threads for whoever computes. All compute on one kind of device: CUDA if any has it.

    Raises:
        UsageError: no worker has the device asked for, or the request makes no sense.
    """
    answers = executor.each(torch.cuda.is_available)
    machine = settle_machine(
        options,
        decode,
        has_cuda=any(has is True for has in answers.values()),
        has_openvino=all(has is True for has in executor.each(openvino_is_installed).values()),
        cpus=executor.most_threads(),
    )
    if machine.device.startswith("cuda"):
        for address, has in answers.items():
            if has is False:
                executor.refuse(address, "it has no CUDA device, and this run computes on cuda")
    return machine


def measure_precision(
    context: SampleContext, asked: tuple[Sample, str | None, str], worker: Worker, _stop: Stop, _report: Report
) -> tuple[str, str]:
    """Compares a reduced precision with fp32 on some images; see `featurepipe.features.settings.MeasurePrecision`.

    Args:
        context: the session, whose settings are not settled yet, and the source.
        asked: the images; the reduced precision, None for what suits the device; the intensity with which images are decoded.
        worker: who does it.

    Returns:
        The precision to take, and why. What was built for it is kept in the session.
    """
    sample, tried, intensity = asked
    with context.session.at(worker) as session:
        device, batch_size = session.machine.device, session.machine.batch_size
        with closing(context.batches(session, sample, intensity)) as found:
            enough = (
                ENOUGH_IMAGES if tried is None else 1
            )  # a store's precision is kept on few images, too, if all agree
            batches = found if len(sample.rows) >= enough else ()
            choice, engine = choose_precision(
                session.backbone, session.columns, batches, device, tried=tried, batch_size=batch_size, enough=enough
            )
        if engine is not None:
            session.network_here.engines[choice.precision, PYTORCH][frozenset(session.columns)] = engine
    return choice.precision, choice.reason


def sample_rate(
    context: SampleContext, sample: Sample, worker: Worker, _stop: Stop, _report: Report
) -> tuple[float | None, int]:
    """Images per second that a worker loads and computes, None without a usable image; and how many the sample has."""
    with context.session.at(worker) as session:
        intensity = session.settled.intensity
        images = context.load(session, sample, intensity)
        if not len(images):
            return None, 0
        engine = session.engine(session.columns)
        engine(images)  # the first call pays for set-up
        start = time.perf_counter()
        again = context.load(session, sample, intensity)
        engine(again)
        return len(again) / (time.perf_counter() - start), len(images)


@lru_cache(maxsize=1)
def load_network(network: NetworkName, device: str) -> LoadedNetwork:
    """The network, loaded when a worker's process first needs it, and checked.

    Raises:
        WorkerRefused: it cannot be loaded here, or would compute other features.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise WorkerRefused("it has no CUDA device, and this run computes on cuda")
    keep_memory()
    try:
        backbone = load_backbone(network.backbone, network.weights, seed=network.seed)
        mine = identity_of(backbone)
    except (UsageError, WeightsNotFound) as error:
        raise WorkerRefused(Message(f"it cannot load {network.backbone}: ", error.message)) from error
    differing = differences(json.loads(network.identity), mine)
    if differing:
        raise WorkerRefused(f"its {network.backbone} would give other features: {', '.join(differing)} differs")
    return LoadedNetwork(backbone)


def identity_of(backbone: Backbone) -> dict[str, Any]:
    """What a backbone's features follow from besides the settings (precision and the like): part of the feature space."""
    return {**backbone.identity(), "decoding": dict(DECODING), "numerics": NUMERICS}


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


@dataclass(frozen=True)
class Decoding:
    """How bytes become pixels.

    Attributes:
        route: ``cpu``; or for JPEGs ``gpu`` or ``scaled=N``, see `featurepipe.images.scaling.parse_route`.
        intensity: which values are black and white in images of more than eight bits.
        keep_damaged: whether JPEGs are kept that libjpeg could only repair; else they are rejects.
    """

    route: str
    intensity: str
    keep_damaged: bool = False


def decoder_for(decoding: Decoding, preprocessing: Preprocessing, device: str) -> Decoder:
    """The decoder of a decode route: ``cpu``, or ``gpu`` for JPEGs on the CUDA device and the CPU for all else.

    Raises:
        UsageError: the intensity or the route is unknown.
    """
    scale, keep_damaged, colour = parse_intensity(decoding.intensity), decoding.keep_damaged, preprocessing.colour
    if decoding.route == "gpu":
        from featurepipe.images.decode_gpu import decode_batch

        return lambda payloads, claim: decode_batch(
            [*map(image_of, payloads)],
            colour=colour, device=device, intensity=scale, keep_damaged=keep_damaged, claim=claim,
        )  # fmt: skip
    # A region is a part of its image, and needs more of its pixels than the image itself would.
    scaling = None if decoding.route in ROUTES else Scaling.of(decoding.route, preprocessing.resize)
    return lambda payloads, claim: (
        try_decode(
            image_of(payload), colour=colour, intensity=scale, keep_damaged=keep_damaged, claim=claim,
            scaling=None if isinstance(payload, Region) else scaling,
        )
        for payload in payloads
    )  # fmt: skip


def loader_for(
    source: Source,
    missing: Callable[[bytes], tuple[str, ...] | Reject],
    backbone: Backbone,
    machine: Machine,
    decoding: Decoding,
    clock: StageSeconds,
    *,
    mirrored: bool = False,
) -> Loader:
    """A loader of what a backbone wants, with a window of four batches."""
    preprocessing = backbone.preprocessing

    def prepare(pixels: torch.Tensor, _row: int) -> torch.Tensor:
        return preprocessing.resize_crop(pixels.flip(-1) if mirrored else pixels)

    return Loader(
        source,
        missing,
        decoder_for(decoding, preprocessing, machine.device),
        prepare,
        clock=clock,
        workers=machine.workers,
        window=4 * machine.batch_size,
    )
