"""Shards of a listing: what a worker is given at a time, how large it is, and what comes back."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from featurepipe.errors import FeaturepipeError
from featurepipe.images.regions import LARGEST_TASK, is_of_one_image
from featurepipe.partitions import release, take

if TYPE_CHECKING:  # a worker that has little memory, and the scheduler, read shards without loading PyTorch
    from featurepipe.execution.executor import Worker
    from featurepipe.features.loader import StageSeconds
    from featurepipe.features.settings import Machine

COLUMNS = ("id", "size", "mtime_ns", "locator")
"""What a worker needs to know of an image; its label and split stay with the client."""

FEW = 32
"""Images that no shard is cut below, before there is a measured rate."""

UNTOUCHED, KNOWN, REJECTED, COMPUTED = range(4)
"""What became of a row; ``COMPUTED + n`` is computed for the shard's n-th set of columns."""


@dataclass(frozen=True)
class Shard:
    """Some of the rows that are to be read; small enough to travel.

    Attributes:
        number: counts the shards of a run; the parts of a shard are named by it.
        start: place of its first row among those to be read.
        rows: how many rows.
        listing: `COLUMNS` of them as compressed Arrow bytes.
    """

    number: int
    start: int
    rows: int
    listing: bytes = field(repr=False)

    @classmethod
    def of(cls, number: int, start: int, listing: pa.Table) -> Self:
        """Packs rows of a listing."""
        return cls(number, start, listing.num_rows, packed(listing.select(COLUMNS)))

    @classmethod
    def whole(cls, rows: int) -> Self:
        """All that a run reads, for the process that has the listing."""
        return cls(0, 0, rows, b"")

    def __str__(self) -> str:
        return f"shard {self.number} ({self.rows:,} images)"

    @property
    def name(self) -> str:
        """What the names of its parts have in common."""
        return f"s{self.number:06d}"

    def table(self) -> pa.Table:
        """Its rows."""
        return unpacked(self.listing)


@dataclass(frozen=True)
class ShardRun:
    """How a worker fared with a shard; `ShardResult.error` tells if it did not come to the end.

    Attributes:
        worker: its name.
        host: its machine.
        pid: its process.
        device: where its network ran.
        threads: that read and decoded.
        seconds: of the whole shard.
        stages: seconds per stage.
        parts: parts committed.
        bytes: of these.
        tried_again: images that could be read only at a further try.
        remarks: how many images were decoded in which way that is to be said, see `Loaded.remarks`.
    """

    worker: str
    host: str
    pid: int
    device: str
    threads: int
    seconds: float
    stages: Mapping[str, float]
    parts: int = 0
    bytes: int = 0
    tried_again: int = 0
    remarks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def by(cls, worker: Worker, machine: Machine, seconds: float, clock: StageSeconds, **more: Any) -> Self:
        """How this process fared; ``more`` are parts, bytes and the like."""
        host, stages = socket.gethostname(), dict(clock.totals)
        return cls(worker.name, host, os.getpid(), machine.device, machine.workers, seconds, stages, **more)


@dataclass(frozen=True)
class ShardResult:
    """What became of each row of a shard: metadata only, since features went to the store.

    Attributes:
        status: uint16 (rows,), see `COMPUTED`.
        kinds: the sets of columns that were computed.
        keys: uint8 (n, 32), of the rows that could be read.
        has_key: bool (rows,), which rows those are.
        reasons: why rows were rejected.
        run: who did it, and how long it took.
        damage: what is wrong with rows that were kept although they are damaged.
        error: what ended it early, after everything read had been committed; None if it is complete or was told to stop.
    """

    status: np.ndarray = field(repr=False)
    kinds: Sequence[tuple[str, ...]]
    keys: np.ndarray = field(repr=False)
    has_key: np.ndarray = field(repr=False)
    reasons: Mapping[int, str]
    run: ShardRun
    error: FeaturepipeError | None = None
    damage: Mapping[int, str] = field(default_factory=dict)


class ShardSizes:
    """How many images the next shard has: first few, then as many as take a while, and fewer towards the end.

    A shard should take long beside what it costs to hand it out, and short beside the whole run, since a shard is what a
    killed worker has done again and what the last workers wait for. So the rest is cut into several shards for each worker
    (guided self-scheduling, Polychronopoulos and Kuck 1987), between bounds in seconds.

    Args:
        first: images in the shards before there is a measured rate.
        longest: seconds that a shard should take at most.
        shortest: seconds that a shard should take at least, unless it is more than an even share of what is left.
        least: seconds that any shard but the last should take.
        most: images in any shard; they travel together.
        per_worker: shards for each worker that the rest is cut into.
    """

    def __init__(
        self,
        first: int = 256,
        longest: float = 90.0,
        shortest: float = 4.0,
        least: float = 1.0,
        most: int = 65_536,
        per_worker: int = 3,
    ) -> None:
        self._first, self._longest, self._shortest, self._least = first, longest, shortest, least
        self._most, self._per_worker = most, per_worker
        self._rate = 0.0

    def note(self, images: int, seconds: float) -> None:
        """Takes note of a shard that is done; the latest ones count most."""
        rate = images / max(seconds, 1e-3)
        self._rate = rate if not self._rate else (self._rate + rate) / 2

    def next(self, left: int, workers: int) -> int:
        """Images in the next shard, of ``left`` for ``workers``; at least one."""
        even = -(-left // max(workers, 1))  # nobody should wait at the end for one who took more
        if not self._rate:
            size = min(self._first, max(even, FEW))
        else:
            fair = max(even // self._per_worker, int(self._shortest * self._rate))
            size = min(fair, int(self._longest * self._rate), max(even, int(self._least * self._rate)))
        return max(1, min(size, self._most, left))


def cut(listing: pa.Table, todo: np.ndarray, sizes: ShardSizes, workers: Iterator[int]) -> Iterator[Shard]:
    """Cuts the rows to be read into shards, each when it is asked for.

    Regions of one image that follow each other stay together, since a shard decodes it anew; at most `LARGEST_TASK` of them, as
    many as one decode serves.

    Args:
        listing: of the source.
        todo: int64, the rows to read.
        sizes: tells how large the next one is.
        workers: how many there are now.
    """
    listed = listing.select(COLUMNS)
    start = number = 0
    while start < len(todo):
        count = sizes.next(len(todo) - start, next(workers))
        count += _of_last_image(take(listed["locator"], todo[start + count - 1 :][: LARGEST_TASK + 1]))
        yield Shard.of(number, start, take(listed, todo[start : start + count]))
        release()
        start, number = start + count, number + 1


def _of_last_image(locators: pa.ChunkedArray) -> int:
    """How many rows after the first are regions of the same image; none if they go on beyond those given."""
    last, *others = locators.to_pylist()
    more = next((n for n, other in enumerate(others) if not is_of_one_image(last, other)), len(others))
    return 0 if more == LARGEST_TASK else more


def packed(table: pa.Table) -> bytes:
    """A table as Arrow's stream format; compressed, since ids and locators are much alike."""
    sink = pa.BufferOutputStream()
    codec = next((codec for codec in ("zstd", "lz4") if pa.Codec.is_available(codec)), None)
    table = table.combine_chunks()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def unpacked(content: bytes) -> pa.Table:
    """The table that was packed."""
    with pa.ipc.open_stream(pa.py_buffer(content)) as stream:
        return stream.read_all()
