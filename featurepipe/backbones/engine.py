"""The fast forward: uint8 images in, pooled float32 vectors of every requested column out."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from featurepipe.backbones import fusion
from featurepipe.backbones.loading import Backbone
from featurepipe.backbones.nodes import frozen_copy
from featurepipe.backbones.pooling import Column, pool
from featurepipe.display import counted
from featurepipe.errors import UsageError, unknown
from featurepipe.threads import pool_of

if TYPE_CHECKING:
    from featurepipe.backbones.graphs import MeasuredForward
    from featurepipe.backbones.openvino import OpenVinoNetwork

NUMERICS = 1
"""Version of our own arithmetic, part of the feature space: raise it when a change here changes features by more than
`BATCH_TOLERANCE`, and every cached feature is computed anew."""

BATCH_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 1e-3}
"""How far (1 - cosine, per image and column) a feature may move with the size and the company of its batch."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


PYTORCH, OPENVINO = ("pytorch", "openvino")
"""What runs a network."""

MOST_STREAMS = 8
"""Batches computed at once on a CPU, as each holds its activations in memory."""


class Pending(Protocol):
    """Features that are being computed; on CUDA the copy back may still be under way."""

    def result(self) -> dict[str, np.ndarray]:
        """Waits, and returns the features by column, each float32 (N, D)."""
        ...


class Engine:
    """A frozen network made ready for one device and precision.

    On a CPU several batches run at once, each in one thread ("streams"), instead of one batch in all threads: nothing
    waits at the end of each layer for the slowest core, which decoding images beside it makes slow time and again, and a
    batch gives the same bits however many cores there are (figures in docs/decisions/batch-per-core.md). On CUDA one batch
    computes while the next is copied.

    Args:
        backbone: the network.
        columns: what to compute, all in one forward that stops at the deepest node.
        precision: ``fp32``, ``bf16`` or ``fp16``, the dtype of weights and activations; pooling is always float32.
        device: a torch device such as ``cpu`` or ``cuda:0``.
        batch_size: the most images in one forward, which oneDNN packs its weights for.
        engine: ``pytorch``, or ``openvino`` to run fp32 on a CPU by OpenVINO where that gives the same features.
        graphs: whether a CUDA graph may run full batches, if it gives the same features and is faster on the first of them.

    Attributes:
        streams: how many batches can be computed at once; keep one more than that submitted.
    """

    def __init__(
        self,
        backbone: Backbone,
        columns: Sequence[Column],
        *,
        precision: str = "fp32",
        device: str = "cpu",
        batch_size: int = 16,
        engine: str = PYTORCH,
        graphs: bool = True,
    ) -> None:
        self.backbone = backbone
        self.columns = tuple(columns)
        self.precision = precision
        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        self.largest_batch = batch_size
        nodes = list(dict.fromkeys(column.node for column in self.columns))
        cores = torch.get_num_threads()
        streams = 1 if self.device.type != "cpu" else min(cores, MOST_STREAMS)
        self._converted, self._runtime = self._convert(nodes, streams) if engine == OPENVINO else (None, _pytorch())
        self._network = None if self._converted else self._prepare(nodes, batch_size)
        # Of a converted network known without the trace, which a kept one does without.
        self._axes = self._converted.axes if self._converted else {n: backbone.channel_axis(n) for n in nodes}
        if isinstance(self._network, HookedNetwork):
            streams = 1  # code of others may keep activations on itself
        on_cpu = self.device.type == "cpu"
        self._pool = pool_of(streams, "featurepipe-forward", each=cores // streams) if on_cpu else None
        self._upload: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.streams = streams
        self._measured: MeasuredForward | None = None
        if self.device.type == "cuda" and graphs and not isinstance(self._network, HookedNetwork):
            from featurepipe.backbones.graphs import MeasuredForward

            self._measured = MeasuredForward(self._eager, batch_size, self._agree)

    @property
    def runtime(self) -> dict[str, str]:
        """What runs the network: ``engine``, its ``version``, and ``reason`` where OpenVINO was wanted and does not.

        On CUDA, once a full batch has come, ``forward``: whether batches run as they are or as a CUDA graph, and why.
        """
        choice = self._measured.choice if self._measured else None
        return self._runtime if choice is None else {**self._runtime, "forward": choice}

    def submit(self, batch: torch.Tensor) -> Pending:
        """Starts the forward of a uint8 batch (N, C, H, W) that lies in main memory, and returns at once.

        When the device runs out of memory the batch is halved, and stays halved for later calls.
        """
        results: list[Pending] = []
        start = 0
        while start < len(batch):
            piece = batch[start : start + self.largest_batch]
            try:
                results.append(
                    _Future(self._pool.submit(self._forward, piece)) if self._pool else self._start_copy(piece)
                )
            except torch.OutOfMemoryError:
                if len(piece) == 1:
                    raise
                torch.cuda.empty_cache()
                self.largest_batch = max(1, len(piece) // 2)
                continue
            start += len(piece)
        return results[0] if len(results) == 1 else _Pieces(results)

    def __call__(self, batch: torch.Tensor) -> dict[str, np.ndarray]:
        """Features of a uint8 batch (N, C, H, W) by column name, each float32 (N, D); spread evenly over the streams."""
        share = max(1, min(self.largest_batch, -(-len(batch) // self.streams)))
        return _Pieces([self.submit(batch[at : at + share]) for at in range(0, len(batch), share)]).result()

    def _convert(self, nodes: list[str], streams: int) -> tuple[OpenVinoNetwork | None, dict[str, str]]:
        """The network in OpenVINO, or None; and what runs it then, with the reason."""
        if self.device.type != "cpu" or self.precision != "fp32":
            return None, _pytorch(f"OpenVINO runs fp32 on a CPU, this is {self.precision} on {self.device.type}")
        if not openvino_is_installed():
            return None, _pytorch("OpenVINO is not installed; see featurepipe doctor")
        from featurepipe.backbones.openvino import NotConvertedError, network_of

        try:
            network = network_of(self.backbone, nodes, streams)
        except NotConvertedError as error:
            return None, _pytorch(str(error))
        return network, {"engine": OPENVINO, "version": version(OPENVINO)}

    def _prepare(self, nodes: list[str], batch_size: int) -> nn.Module:
        graph = self.backbone.graph(nodes)
        if graph is None:
            return self._placed(HookedNetwork(frozen_copy(self.backbone.module), nodes))
        graph = frozen_copy(graph)
        fusion.fold_batch_norm(graph)
        self._placed(graph)
        if self.device.type == "cpu" and fusion.can_fuse_onednn(self.dtype):
            image = torch.zeros((1, *self.backbone.preprocessing.input_shape), dtype=self.dtype)
            fusion.fuse_onednn(graph, image.contiguous(memory_format=torch.channels_last), batch_size)
        return graph

    def _placed(self, network: nn.Module) -> nn.Module:
        network.to(device=self.device, dtype=self.dtype)
        for parameter in network.parameters():
            if (
                parameter.dim() == 4
            ):  # Module.to fails at buffers of 5, which a trace may have, such as that of timm's Swin
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return network

    def _start_copy(self, batch: torch.Tensor) -> Pending:
        """Uploads from pinned memory in a stream of its own, beside the forward of the batch before."""
        if batch.device.type == "cpu":
            with torch.cuda.stream(self._upload):
                batch = batch.pin_memory().to(self.device, non_blocking=True)
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self._upload)
            batch.record_stream(computing)
        return _Copied(self._forward(batch))

    @torch.inference_mode()
    def _forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._converted is not None:
            with self._converted.activations(batch) as activations:
                return {name: values.clone() for name, values in self._pooled(activations).items()}
        return self._measured(batch) if self._measured else self._eager(batch)

    @torch.inference_mode()
    def _eager(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._network is None:
            raise RuntimeError("the engine has no network")
        images = self.backbone.preprocessing.normalise(batch, self.dtype).contiguous(memory_format=torch.channels_last)
        return self._pooled(self._network(images))

    def _agree(self, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
        """Whether features differ by no more than batches of two sizes may."""
        pairs = ((expected[name].cpu().numpy(), found[name].cpu().numpy()) for name in expected)
        return all(1 - worst_cosine(one, other) <= BATCH_TOLERANCE[self.precision] for one, other in pairs)

    def _pooled(self, activations: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            str(c): pool(activations[c.node], c.pooling, channel_axis=self._axes[c.node]).flatten(1)
            for c in self.columns
        }


def openvino_is_installed() -> bool:
    """Whether OpenVINO is there, which this does not import."""
    return find_spec(OPENVINO) is not None


def _pytorch(reason: str | None = None) -> dict[str, str]:
    """What runs a network, where that is PyTorch."""
    return {"engine": PYTORCH, "version": torch.__version__, **({} if reason is None else {"reason": reason})}


class HookedNetwork(nn.Module):
    """Runs a network that cannot be traced, keeps the outputs of some modules, and stops after the last of them.

    One forward at a time: the network may be anyone's code, and the kept outputs are its state.
    """

    def __init__(self, module: nn.Module, nodes: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._kept: dict[str, torch.Tensor] = {}
        self._wanted = len(nodes)
        for node in nodes:
            module.get_submodule(node).register_forward_hook(self._keeper(node))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Activations by node, for images (N, C, H, W)."""
        self._kept = {}
        with contextlib.suppress(_AllKeptError):
            self.module(x)
        kept, self._kept = self._kept, {}
        return kept

    def _keeper(self, node: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if node not in self._kept:
                self._kept[node] = output.clone()  # what follows may overwrite it in place
            if len(self._kept) == self._wanted:
                raise _AllKeptError

        return keep


class _AllKeptError(Exception):
    """Ends a forward early."""


class _Future:
    """Features that a stream computes."""

    def __init__(self, future: Future[dict[str, torch.Tensor]]) -> None:
        self._future = future

    def result(self) -> dict[str, np.ndarray]:
        return {name: values.numpy() for name, values in self._future.result().items()}


class _Copied:
    """Features on their way from the device into pinned memory."""

    def __init__(self, pooled: dict[str, torch.Tensor]) -> None:
        self._host = {
            name: torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            for name, values in pooled.items()
        }
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def result(self) -> dict[str, np.ndarray]:
        self._copied.synchronize()
        return {name: values.numpy() for name, values in self._host.items()}


class _Pieces:
    def __init__(self, pieces: list[Pending]) -> None:
        self._pieces = pieces

    def result(self) -> dict[str, np.ndarray]:
        parts = [piece.result() for piece in self._pieces]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


WORST_COSINE = 0.999
"""What reduced precision must keep to: of fewer than one image in 1,000 features agree with fp32 less than this."""

DEMANDED_COSINE = round(1 - (1 - WORST_COSINE) / 20, 5)
"""What every compared image must keep to for that: a twentieth of the allowed distance, as some images are far worse than most
(figures in docs/decisions/auto-settings.md)."""

ENOUGH_IMAGES = 128
"""Images that are compared before reduced precision is kept; with fewer there is too little evidence, and little to gain."""


@dataclass(frozen=True)
class PrecisionChoice:
    """What `choose_precision` decided, and on which evidence.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        tried: the reduced precision that was compared with fp32, or None when the device has none worth trying.
        worst_cosine: the least cosine between its features and fp32's over all sample images and columns; None without one.
        images: how many images were compared.
    """

    precision: str
    tried: str | None = None
    worst_cosine: float | None = None
    images: int = 0

    @property
    def reason(self) -> str:
        """One sentence for the log."""
        if self.tried is None:
            return "this device has no faster precision worth trying"
        if self.worst_cosine is None:
            return f"there are too few images to compare {self.tried} with fp32 on, {ENOUGH_IMAGES} are needed"
        if self.precision == self.tried:
            verdict = "kept"
        elif self.worst_cosine >= DEMANDED_COSINE:
            verdict = f"not kept, as {ENOUGH_IMAGES} images must agree; fp32 instead"
        else:
            verdict = f"not kept, the bound is {DEMANDED_COSINE}; fp32 instead"
        worst, images = _digits(self.worst_cosine), counted(self.images, "image")
        agrees = "disagrees with fp32, with" if self.worst_cosine < DEMANDED_COSINE else "agrees with fp32 to"
        return f"{self.tried} {agrees} a worst cosine of {worst} over {images}: {verdict}"


def _digits(cosine: float) -> str:
    """A cosine with as many digits as tell on which side of the bound it is, at least 5."""
    texts = (f"{cosine:.{digits}f}" for digits in range(5, 17))
    return next(
        (text for text in texts if (float(text) >= DEMANDED_COSINE) == (cosine >= DEMANDED_COSINE)), repr(cosine)
    )


def reduced_precision(device: str) -> str | None:
    """The reduced precision that ``device`` runs fast: fp16 on CUDA, bf16 on CPUs with bf16 instructions, else None."""
    if torch.device(device).type == "cuda":
        return "fp16"
    return "bf16" if cpu_has_bf16() else None


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX), not by emulation."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")):
        return True
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def choose_precision(
    backbone: Backbone,
    columns: Sequence[Column],
    sample: Iterable[torch.Tensor],
    device: str,
    *,
    tried: str | None = None,
    batch_size: int = 16,
    enough: int = ENOUGH_IMAGES,
) -> tuple[PrecisionChoice, Engine | None]:
    """Compares the device's reduced precision with fp32 on sample images, until one differs too much or enough agree.

    Args:
        backbone: the network.
        columns: the columns whose features must agree.
        sample: batches of uint8 images (N, C, H, W), resized and cropped; no more are taken than are needed.
        device: where the network will run.
        tried: the reduced precision to compare; by default the device's own (`reduced_precision`).
        batch_size: as in `Engine`.
        enough: images without which the reduced precision is not kept. After `ENOUGH_IMAGES` no more are compared.

    Returns:
        The reduced precision where there are enough images and the worst cosine with fp32, over these and all columns,
        is at least `DEMANDED_COSINE`, else fp32; and the engine that was built for the chosen precision, if one was, so that
        nobody builds it twice.
    """
    tried = tried or reduced_precision(device)
    if tried is None:
        return PrecisionChoice("fp32"), None
    engines: dict[str, Engine] = {}
    images, worst = 0, 1.0
    for batch in sample:
        for precision in ("fp32", tried) if not engines else ():
            engines[precision] = Engine(backbone, columns, precision=precision, device=device, batch_size=batch_size)
        expected, found = engines["fp32"](batch), engines[tried](batch)
        worst = min(worst, *(worst_cosine(expected[name], found[name]) for name in expected))
        images += len(batch)
        if worst < DEMANDED_COSINE or images >= ENOUGH_IMAGES:
            break
    if not images:
        return PrecisionChoice("fp32", tried), None
    kept = worst >= DEMANDED_COSINE and images >= enough
    choice = PrecisionChoice(tried if kept else "fp32", tried, worst, images)
    return choice, engines[choice.precision]


def worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine between rows of two (N, D) arrays; two zero rows agree, NaN agrees with nothing."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    cosines = np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0))
    return float(np.nan_to_num(cosines, nan=-1.0).min())


LEAST_ROUNDS = 3
MOST_BYTES = 2 * 2**30
"""Of weights, in the copies of the network that take turns."""

_IN_A_ROW = 4  # batches on CUDA, where one is copied while another is computed


@dataclass(frozen=True)
class NodeTimes:
    """What ``node_times`` measured.

    Attributes:
        milliseconds: Per image, for each name as given: the median over rounds.
        waited: Of the time in which this process could have computed, the share that it waited for a core: near 0 on an idle
            machine. 0 where the system does not tell.
    """

    milliseconds: dict[str, float]
    waited: float


def node_times(
    backbone: Backbone,
    nodes: Iterable[str],
    *,
    precision: str = "fp32",
    device: str = "cpu",
    batch: int = 16,
    seconds: float = 1.0,
) -> NodeTimes:
    """Measures the forward of a network that is stopped at each of these nodes.

    A time includes what extraction does with a batch that is ready: the copy to the device, normalisation, the forward
    up to the node on all cores, average pooling (or the pooling given), the copy back. It does not include reading,
    decoding and resizing of images nor writing of features, which run beside it, nor the network's preparation and the
    first forwards. The nodes take turns, so that noise hits all alike; those of a large network, whose copies would fill the
    memory, do so a few at a time. Times are reported as measured: a deeper node's may come out smaller by chance.

    Args:
        backbone: The network; random images of its input size are fed to it.
        nodes: Names of nodes or modules, ``bottleneck``, or columns ``node:pooling``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        device: A torch device such as ``cpu`` or ``cuda:0``.
        batch: Images per forward; a few are enough for a slow network on a CPU.
        seconds: About how long each node is measured, but no less than four forwards on every core: one to warm up, and
            three that count.

    Returns:
        The times, and how much others disturbed them.

    Raises:
        UsageError: A node or the precision is unknown, or the batch holds no image.
        WeightsNotFound: The weights are not at hand and cannot be downloaded.
    """
    if precision not in DTYPES:
        raise unknown("precision", precision, DTYPES)
    if batch < 1:
        raise UsageError(f"batch {batch} must be a number from 1, such as 16")
    columns = {name: backbone.columns([name])[0] for name in nodes}
    times: dict[str, float] = {}
    computed = waited = 0.0
    for group in _groups(list(columns), backbone):
        engines = {
            name: Engine(
                backbone, [columns[name]], precision=precision, device=device, batch_size=batch, graphs=False
            )  # a graph each would take memory, and time to choose
            for name in group
        }
        before = _computed_and_waited()
        rounds = _rounds(engines, batch, seconds * len(group))
        times.update({name: statistics.median(took[name] for took in rounds) for name in group})
        after = _computed_and_waited()
        computed, waited = computed + after[0] - before[0], waited + after[1] - before[1]
    return NodeTimes(times, waited / (computed + waited) if computed + waited > 0 else 0.0)


def _groups(names: Sequence[str], backbone: Backbone) -> Iterator[Sequence[str]]:
    """The nodes that are measured side by side."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in backbone.module.parameters())
    size = max(1, MOST_BYTES // max(1, weights))
    for at in range(0, len(names), size):
        yield names[at : at + size]


def _rounds(engines: dict[str, Engine], batch: int, seconds: float) -> list[dict[str, float]]:
    """Milliseconds per image of every engine in each round, after one round that warms up."""
    shape = next(iter(engines.values())).backbone.preprocessing.input_shape
    images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rounds: list[dict[str, float]] = []
    for engine in engines.values():
        _milliseconds(engine, images)
    end = time.perf_counter() + seconds
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() < end:
        rounds.append({name: _milliseconds(engine, images) for name, engine in engines.items()})
    return rounds


def _milliseconds(engine: Engine, images: torch.Tensor) -> float:
    batches = engine.streams if engine.device.type == "cpu" else _IN_A_ROW
    start = time.perf_counter()
    for pending in [engine.submit(images) for _ in range(batches)]:
        pending.result()
    return 1000 * (time.perf_counter() - start) / (batches * len(images))


def _computed_and_waited() -> tuple[float, float]:
    """Seconds that the threads of this process have been on a core, and have waited for one (Linux; else zeros)."""
    seconds = [0.0, 0.0]
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            counts = file.read_text().split()[:2]
        except OSError:
            continue  # the thread has ended
        seconds = [total + int(count) / 1e9 for total, count in zip(seconds, counts, strict=True)]
    return seconds[0], seconds[1]
