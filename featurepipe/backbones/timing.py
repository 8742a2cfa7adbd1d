"""How long a network takes up to each of its nodes, measured with the engine that extraction uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from featurepipe.backbones.engine import DTYPES, Engine
from featurepipe.backbones.loading import Backbone
from featurepipe.errors import UsageError, unknown

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
            name: Engine(backbone, [columns[name]], precision=precision, device=device, batch_size=batch)
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
