"""What ``bench_cluster`` measures with: a scheduler and workers as processes, their traffic, and work for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import counted
from benchmarks.piles import listing_of, random_keys
from featurepipe.execution import DaskExecutor, connect
from featurepipe.extraction.shards import COMPUTED, Shard, ShardResult, ShardRun
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.keys import keys_to_arrow

ROOT = Path(__file__).parent.parent
START_SECONDS = 60


@contextmanager
def executor_of(folder: Path, workers: int, memory: str) -> Iterator[DaskExecutor]:
    """A scheduler and workers of one thread each, as one would start them in terminals, and a client of them.

    Args:
        folder: For their files.
        workers: How many.
        memory: Limit of each; Dask ends a worker that takes more.
    """
    folder.mkdir()
    file = folder / "scheduler.json"
    processes = [_start(folder, "scheduler", "--port", "0", "--scheduler-file", str(file))]
    try:
        _until(file.exists)
        address = json.loads(file.read_text())["address"]
        for number in range(workers):
            own = ("--name", f"w{number}", "--memory-limit", memory, "--local-directory", str(folder))
            processes.append(_start(folder, "worker", address, "--nthreads", "1", *own))
        with connect(address, say=lambda text: print(text, file=sys.stderr)) as executor:
            executor.wait_for_workers(workers)
            yield executor
    finally:
        for process in processes[::-1]:
            process.terminate()
        for process in processes:
            process.wait()


def _start(folder: Path, role: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"distributed.cli.dask_{role}", "--no-dashboard", "--host", "127.0.0.1"]
    command += ["--preload", "benchmarks.counted", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / f"{role}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=env)


def _until(is_true: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise SystemExit("the scheduler did not start")
        time.sleep(0.02)


@dataclass
class Traffic:
    """What processes have sent and received, their messages, and their processor seconds, within a stretch of time.

    Attributes:
        scheduler: Its counts.
        client: The client's.
        workers: The workers', together.
        seconds: How long the stretch was.
        waiting: Bytes through the scheduler that were taken off, as they go at all times.
    """

    scheduler: dict[str, float]
    client: dict[str, float]
    workers: dict[str, float]
    seconds: float
    waiting: float = 0.0

    def __sub__(self, other: Traffic) -> Traffic:
        """What came after another one."""
        return Traffic(
            _less(self.scheduler, other.scheduler),
            _less(self.client, other.client),
            _less(self.workers, other.workers),
            self.seconds - other.seconds,
        )

    def less(self, idle: Traffic) -> Traffic:
        """Without what goes on at all times: the part of another stretch that would fall into this one."""
        share = self.seconds / idle.seconds
        return Traffic(
            _less(self.scheduler, idle.scheduler, share),
            _less(self.client, idle.client, share),
            _less(self.workers, idle.workers, share),
            self.seconds,
            idle.through * share,
        )

    @property
    def through(self) -> float:
        """Bytes that the scheduler received and sent: what passes on counts twice."""
        return self.scheduler["received"] + self.scheduler["sent"]


def _less(mine: dict[str, float], theirs: dict[str, float], share: float = 1.0) -> dict[str, float]:
    return {name: value - share * theirs[name] for name, value in mine.items()}


class Meter:
    """Measures traffic, without its own questions."""

    def __init__(self, executor: DaskExecutor) -> None:
        self._client = executor.client
        self._now()
        first = self._now()
        self._own = self._now() - first  # what a question costs

    def start(self) -> None:
        """Begins a stretch."""
        self._before = self._now()

    def stop(self) -> Traffic:
        """Ends it."""
        return self._now() - self._before - self._own

    def _now(self) -> Traffic:
        of_workers = list(self._client.run(counted.counts).values())
        workers = {name: sum(one[name] for one in of_workers) for name in of_workers[0]}
        scheduler = self._client.run_on_scheduler(counted.counts)
        return Traffic(scheduler, counted.counts(), workers, time.perf_counter())


def idle(executor: DaskExecutor, meter: Meter, seconds: float) -> Traffic:
    """The traffic of an executor that waits for a task which does nothing."""
    meter.start()
    list(executor.map(sleep, [seconds]))
    return meter.stop()


def features_of(names: list[str], backbone: str, weights: str) -> np.ndarray:
    """What a user sends to workers: features (n, D) of some files by a network that each process loads once."""
    import torch
    from PIL import Image

    network, transform = _network(backbone, weights)
    batch = torch.stack([transform(Image.open(name).convert("RGB")) for name in names])
    with torch.inference_mode():
        features: np.ndarray = network(batch)["features"].flatten(1).numpy()
    return features


@lru_cache(maxsize=1)
def _network(name: str, weights: str) -> tuple[Any, Any]:
    import torch
    from torchvision.models.feature_extraction import create_feature_extractor

    from benchmarks.bench_extract import transform_of
    from featurepipe.backbones import load_backbone

    torch.set_num_threads(1)
    backbone = load_backbone(name, weights)
    network = create_feature_extractor(backbone.module, return_nodes={backbone.bottleneck: "features"})
    return network, transform_of(name, backbone)


def sleep(_context: None, seconds: float, *_: Any) -> None:
    """A task that waits."""
    time.sleep(seconds)


def answer_only(_context: None, piece: Shard, *_: Any) -> ShardResult:
    """Answers as if every image of a shard had been computed: what is left is the cost of handing out and booking."""
    start = time.perf_counter()
    rows = piece.table().num_rows
    keys = np.frombuffer(np.random.default_rng(piece.number).bytes(32 * rows), np.uint8).reshape(rows, 32)
    status = np.full(rows, COMPUTED, np.uint16)
    seconds = time.perf_counter() - start
    stages = dict.fromkeys(("read", "decode", "forward", "write"), seconds)
    run = ShardRun("nobody", "nowhere", os.getpid(), "cpu", 1, seconds, stages)
    return ShardResult(status, [("layer4:gap",)], keys, np.ones(rows, bool), {}, run)


def nothing(*_shard: Any) -> float:
    """What an empty pass does with a shard."""
    return 0.0


MADE_UP = {"backbone": "made-up", "dtype": "float16"}
NOISE = 16_384
"""Rows that differ; further ones are the same values in another order of the columns."""


def fill_store(path: Path, rows: int, width: int, classes: int) -> FeatureSet:
    """A store of made-up float16 features of overlapping classes, as extraction would have left it."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((NOISE, width), dtype=np.float32)
    centres = 0.12 * rng.standard_normal((classes, width), dtype=np.float32)
    codes, keys, listing = rng.integers(0, classes, rows), random_keys(rows), listing_of(rows)
    store = FeatureStore(path)
    run_id = store.new_run_id()
    space = store.open_space(MADE_UP, backbone="made-up", notes={"aliases": {"bottleneck": "last"}})
    with space.writer(run_id, dataset="made-up") as writer:
        for start in range(0, rows, NOISE):
            facts = listing.slice(start, NOISE)
            place = slice(start, start + len(facts))
            values = noise[: len(facts), rng.permutation(width)] + centres[codes[place]]
            stats = facts["size"].to_numpy(), facts["mtime_ns"].to_numpy()
            writer.add(keys[place], facts["id"].to_pylist(), *stats, {"last:gap": values})
    columns = {name: listing[name] for name in ("id", "split", "size", "mtime_ns")}
    status = pa.array(["ok"]).take(pa.array(np.zeros(rows, np.int8)))
    columns |= {"label": pa.array([f"class{code}" for code in range(classes)]).take(pa.array(codes))}
    columns |= {"key": keys_to_arrow(keys), "status": status, "reason": pa.nulls(rows, pa.string())}
    store.write_snapshot("made-up", run_id, pa.table(columns))
    return store.features("made-up")


def opened(store: str) -> Callable[[], int]:
    """What the client of a fit has in memory of the rows: where they are, and their labels."""
    return lambda: len(FeatureStore(store).features("made-up").labels)
