"""What ``bench_scale`` measures, each in a process of its own: extractions of made-up images by workers that only answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

import featurepipe as fp
from benchmarks.alone import resident
from benchmarks.piles import DATASET, FOLDER_FILES, NETWORK, Pile, listing_of, random_keys
from featurepipe.execution.executor import TaskResult
from featurepipe.execution.local import LocalExecutor
from featurepipe.extraction.shards import COMPUTED, Shard, ShardResult, ShardRun
from featurepipe.images.listing import Row, table_of
from featurepipe.images.source import Source
from featurepipe.partitions import spilling
from featurepipe.store import FeatureStore

WORKERS = 64
NEW, GONE = 1000, 5000
"""One image in so many is new, or gone, in a later run."""
SECONDS_BETWEEN = 0.01
MB = 1e6

Work = Callable[[], Any]


class MadeUp(Source):
    """Images that are not there, listed as a folder's are: in the byte order of their ids, one row after the other.

    Args:
        count: of images.
        later: whether some are new and some are gone.
    """

    name, location = DATASET, "made-up"

    def __init__(self, count: int, *, later: bool) -> None:
        self._count, self._later = count, later

    def scan(self) -> pa.Table:
        """Lists them."""
        return table_of(self._rows())

    def _rows(self) -> Iterator[Row]:
        for number in range(self._count):
            label = f"class{number // FOLDER_FILES:05d}"
            id_ = f"{label}/{number:08d}.jpg"
            if not (self._later and number % GONE == 1):
                yield id_, label, None, 20_000 + number % 1000, number * 1000, id_.encode()
            if self._later and number % NEW == 0:
                id_ = f"{label}/{number:08d}_new.jpg"
                yield id_, label, None, 20_000, number * 1000, id_.encode()

    def read(self, locator: bytes) -> bytes:
        """Nobody asks for them."""
        raise NotImplementedError


class Answering(LocalExecutor):
    """Workers that answer at once as if every image had been computed, in the process that asks them."""

    is_local = False

    def expected(self) -> int:
        """As many as a cluster has."""
        return WORKERS

    def _results(self, function: Any, shards: Iterator[Any], context: Any, options: Any) -> Generator[Any, None, None]:
        del function, context, options
        for number, shard in enumerate(shards, 1):
            yield number, shard, TaskResult("made-up", value=_answer(shard))


def _answer(shard: Shard) -> ShardResult:
    keys = np.frombuffer(np.random.default_rng([7, shard.number]).bytes(32 * shard.rows), np.uint8)
    stages = dict.fromkeys(("read", "decode", "forward", "write"), 1.0)
    run = ShardRun("w", "nowhere", 1, "cpu", 1, shard.rows / 2500, stages)
    status, has_key = np.full(shard.rows, COMPUTED, np.uint16), np.ones(shard.rows, bool)
    return ShardResult(status, [("f6.1:gap",)], keys.reshape(-1, 32), has_key, {}, run)


def extraction(store: str, count: str, later: str, partition: str) -> Work:
    """A run over so many images; answers with its counts, and with the most memory that is in no file.

    Args:
        store: The store's folder.
        count: Of images.
        later: ``later`` if some are to be new and some gone.
        partition: Rows of a partition; 0 has everything in memory.
    """
    fp.load_backbone("lenet5", "none")
    source, executor = MadeUp(int(count), later=later == "later"), Answering()

    def work() -> dict[str, Any]:
        with Anonymous() as held, spilling(Path(store), int(partition) or 1 << 60):
            run = fp.extract(source, store, dataset=DATASET, cluster=executor, max_gone="50%", silent=True, **NETWORK)
        changes = {name: count for name, count in run["changes"].items() if count}
        return {"counts": run["counts"], "changes": changes, **held.figures()}

    return work


class Anonymous:
    """Watches the memory of this process that belongs to no file: what the system cannot take back without swapping."""

    def __enter__(self) -> Self:
        self.before = self.peak = resident("RssAnon")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN):
            self.peak = max(self.peak, resident("RssAnon"))

    def figures(self) -> dict[str, float]:
        """Megabytes before, and at most."""
        return {"anonymous_before_mb": round(self.before / MB), "anonymous_peak_mb": round(self.peak / MB)}


def build(folder: str, count: str) -> Work:
    """Makes a store without features, and one that has those of so many images, with their snapshot."""

    def work() -> None:
        rows, stores = int(count), Path(folder)
        (stores / "one").mkdir(parents=True, exist_ok=True)
        listing, keys = listing_of(rows), random_keys(rows)
        pile = Pile(stores, FeatureStore(stores / "full"), MadeUp.location)
        run_id = pile.store.new_run_id()
        pile.compute(run_id, listing, keys)
        pile.end(run_id, listing, keys)

    return work
