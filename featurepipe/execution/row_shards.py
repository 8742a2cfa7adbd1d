"""Rows that workers keep, and sums over them: what `featurepipe.heads.row_shards` asks for, as ordinary Dask tasks.

What a worker keeps is the result of a task: if the worker dies, Dask has another one do that task again. Every task of a shard
prefers the worker that the shard was given to, and goes wherever Dask puts it when that worker is gone; workers that join later
are used by the next fit. Where none is left that had a shard, all are given out anew. A pass is one task a worker; sums are
added in pairs by the workers, and only the last one comes back.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import ClusterError, UsageError
from featurepipe.execution.executor import same
from featurepipe.execution.row_shard import (
    Change,
    PlacedShard,
    Placement,
    ask,
    begin,
    gang_run,
    keep,
    packed,
    unpacked,
)
from featurepipe.heads.blocks import Array, ArrayBlocks, SameShape, as_blocks
from featurepipe.lazy_names import former_method
from featurepipe.store.views import FeatureSet

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.execution.worker_pool import WorkerPool


WORKING = 0.2
"""Of a worker's memory limit: what a pass may take beside the features that are kept."""

_LARGE_BYTES = 1 << 16  # up to which a work goes with every task, which saves the time of a task before them
_KEYS = "row-shard-"  # with which the names of our tasks begin
_TRIES = 3  # how often all shards are given out before a fit is given up
_IDLE_LOOKS = 2
_LOOK_SECONDS = 1.0  # how often the workers are counted while an answer is awaited


class _Stuck(Exception):
    """Nobody is left whom Dask would give a task to: the workers that it prefers are gone, and all others came too late."""


class WorkerRowShards:
    """`featurepipe.heads.row_shards.RowShards` of a pool's workers.

    Args:
        pool: Whose workers they are.
        place: Gives the workers their shards; called again if Dask cannot go on without workers that are gone.
    """

    def __init__(self, pool: WorkerPool, place: Callable[[], Placement]) -> None:
        self.pool, self._place = pool, place
        self._placed = place()

    @property
    def places(self) -> tuple[PlacedShard, ...]:
        """The shards, in the order of the rows."""
        return self._placed.places

    @property
    def memory(self) -> int | None:
        """Bytes that a work may take at a worker, beside the features; None where workers have no limit."""
        return self._placed.memory

    @property
    def rows(self) -> int:
        """How many there are in all shards."""
        return int(self.places[-1].rows.stop)

    def whole(self) -> Placement:
        """Where the shards are; those of workers that are gone are given out anew."""
        if self._gone():
            self._placed = self._place()
        return self._placed

    def through(self, change: Change) -> WorkerRowShards:
        """The same rows, changed row by row as they are read."""

        def place() -> Placement:
            placed = self.whole()
            return replace(placed, changes=(*placed.changes, change))

        return WorkerRowShards(self.pool, place)

    def kept(self, dtype: npt.DTypeLike, memory: int | str | None) -> WorkerRowShards:
        """The same rows in the workers' memory where they fit: as ``dtype``, else as they are stored."""

        def place() -> Placement:
            placed, wanted = self.whole(), np.dtype(dtype)
            places = tuple(
                replace(at, kept=(self._submit(at, keep, placed.changes, wanted, memory, at.kept[0]), *at.kept[1:]))
                for at in placed.places
            )
            return Placement(places, placed.memory)

        return WorkerRowShards(self.pool, place)

    def beside(self, *rows: Array | None) -> WorkerRowShards:
        """The same rows with further arrays (..., n); each worker is sent its own part, once."""

        def sent(at: PlacedShard, array: Array | None) -> Future[Any] | None:
            if array is None:
                return None
            return self._submit(at, unpacked, *packed(array[..., at.rows]))

        def place() -> Placement:
            placed = self.whole()
            places = (replace(at, kept=(*at.kept, *(sent(at, array) for array in rows))) for at in placed.places)
            return replace(placed, places=tuple(places))

        return WorkerRowShards(self.pool, place)

    def reduce(self, work: Callable[..., Any]) -> Any:
        """The sum of what the work returns of each shard; workers add."""

        def ask_and_add() -> Any:
            sums = self._asked(work)
            while len(sums) > 1:
                pairs = [sums[start : start + 2] for start in range(0, len(sums), 2)]
                sums = [self._submit(None, _add, *pair) if pair[1:] else pair[0] for pair in pairs]
            return self._result(sums[0])

        return self._until_done(ask_and_add)

    def map(self, work: Callable[..., Any]) -> list[Any]:
        """What the work returns of each shard, in the order of the rows."""
        found: list[Any] = self._until_done(lambda: [self._result(future) for future in self._asked(work)])
        return found

    def gang_run(
        self, work: Callable[..., Any], rendezvous: Callable[[str, int], Any], *others: WorkerRowShards
    ) -> list[Any]:
        """Has all workers work at the same time; see `featurepipe.execution.row_shard`."""
        return gang_run(self.pool, work, rendezvous, [rows.whole for rows in (self, *others)])

    def _until_done(self, attempt: Callable[[], Any]) -> Any:
        for _ in range(_TRIES):
            try:
                return attempt()
            except _Stuck:
                self.pool.say("workers that kept features are gone; those that are there now read them again")
                self.whole()
        raise ClusterError(
            f"the workers that kept features were lost {_TRIES} times; if they ran out of memory (see their logs), use more "
            "workers or give them more, then give the same command again"
        )

    def _gone(self) -> bool:
        return not {place.worker for place in self.places} <= set(self.pool.addresses())

    def _asked(self, work: Callable[..., Any]) -> list[Future[Any]]:
        """One task a shard. A large order travels to one worker, and from there to the others."""
        from distributed.protocol.pickle import dumps

        order: Any = dumps(work)
        if len(order) > _LARGE_BYTES:
            order = self._submit(self.places[0], same, order)  # as a task's result, which Dask can make again
        return [self._submit(place, ask, order, self._placed.changes, *place.kept) for place in self.places]

    def _submit(self, place: PlacedShard | None, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return submitted(self.pool, place.worker if place else None, function, *arguments)

    def _result(self, future: Future[Any]) -> Any:
        """Waits for an answer for as long as there is a cluster."""
        self._wait(future)
        return self.pool.result(future, "a shard of the features")

    def _wait(self, future: Future[Any]) -> None:
        from distributed import CancelledError, wait

        alone_since, idle = time.monotonic(), 0
        while not future.done():
            try:
                wait(future, timeout=_LOOK_SECONDS)
            except CancelledError:
                return  # as its result will say
            except TimeoutError:
                if self.pool.addresses():
                    alone_since = time.monotonic()
                    idle = idle + 1 if self._gone() and not self._busy() else 0
                elif time.monotonic() - alone_since > self.pool.patience:
                    raise self.pool.no_worker() from None
                if idle == _IDLE_LOOKS:
                    raise _Stuck from None

    def _busy(self) -> bool:
        """Whether a worker does anything for us or for others like us."""
        keys = self.pool.scheduler.ask("processing", workers=None).values()
        return any(str(key).startswith(_KEYS) for some in keys for key in some)


def submitted(pool: WorkerPool, worker: str | None, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """A task that prefers a worker, if one is named."""
    preferred: dict[str, Any] = {} if worker is None else {"workers": worker, "allow_other_workers": True}
    key = f"{_KEYS}{function.__name__.strip('_')}-{secrets.token_hex(16)}"
    return pool.scheduler.submit(function, *arguments, key=key, **preferred)


def _add(one: Any, other: Any) -> Any:
    return one + other


_NEAR = 0.05  # of a shard: a part's end as near as this to where a shard would end is taken instead


def spread(features: Any, pool: WorkerPool) -> SpreadFeatures:
    """Spreads features over the workers of a pool; nothing is read yet.

    Args:
        features: (n, D) ``FeatureSet`` of a store that the workers see, or other ``Blocks`` that can be pickled and have
            ``take``; arrays travel to the workers.
        pool: From `connect`.

    Example:
        >>> with connect("tcp://head:8786") as pool:            # doctest: +SKIP
        ...     X = spread(store.features("photos"), pool)
        ...     head = make_head("logistic", out_of_core=True).fit(X)
    """
    return SpreadFeatures(features, pool)


class SpreadFeatures(SameShape):
    """``Blocks`` whose rows a pool's workers keep, in contiguous shards, one a worker.

    Shards are cut when they are first needed, and again when a later fit finds other workers; within a fit they stay, so that
    each worker goes on with what it has in memory. A fit keeps features there while a worker's process takes no more than half
    of its memory limit with them (`featurepipe.execution.row_shard.KEPT`); elsewhere each pass reads them block by block.

    Attributes:
        features: What is spread.
        source: The same as blocks.
        pool: Over whose workers.
    """

    def __init__(self, features: Any, pool: WorkerPool) -> None:
        self.features, self.pool = features, pool
        self.source: Any = as_blocks(features)
        self._shards: WorkerRowShards | None = None

    def __repr__(self) -> str:
        return f"<{self.features!r} spread over {self.pool.address}>"

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def labels(self) -> Any:
        """(n,) labels that the features carry, or None."""
        return getattr(self.features, "labels", None)

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Reads rows here, not at the workers."""
        return np.asarray(self.source.read(dtype, rows=rows))

    def take(self, positions: Any) -> SpreadFeatures:
        """Some rows (positions in any order, a mask, a slice), spread over the same pool."""
        take = getattr(self.features, "take", None)
        if take is None or isinstance(self.features, np.ndarray):
            return SpreadFeatures(self.source.read(None, rows=positions), self.pool)
        return SpreadFeatures(take(positions), self.pool)

    def __getitem__(self, positions: Any) -> SpreadFeatures:
        """Does what ``take`` does, as scikit-learn cuts folds."""
        rows = positions[0] if isinstance(positions, tuple) and positions[1:] == (...,) else positions
        return self.take(rows)

    __iter__ = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Refuses to be read into memory unasked."""
        raise UsageError(
            "features that are spread over a cluster are not in memory here; fit a head that works where they are: "
            "make_head(..., out_of_core=True)"
        )

    def row_shards(self) -> WorkerRowShards:
        """The shards, one for each worker that is there now.

        Raises:
            ClusterError: No worker is there, or none comes in time.
        """
        there = frozenset(self.pool.addresses())
        if self._shards is None or there != {place.worker for place in self._shards.places}:
            self._shards = WorkerRowShards(self.pool, self._placed)
        return self._shards

    shared = former_method("shared", "row_shards")

    def _placed(self) -> Placement:
        self.pool.wait_for_workers()
        workers = sorted(self.pool.workers(), key=lambda worker: (len(worker.name), worker.name))
        rows = self.shape[0]
        edges = cuts(rows, min(len(workers), max(1, rows)), self._part_starts())
        places = [
            PlacedShard(worker.address, slice(start, stop), (self._begun(worker.address, start, stop),))
            for worker, start, stop in zip(workers, edges[:-1], edges[1:], strict=False)
        ]
        limits = [worker.memory_limit for worker in workers if worker.memory_limit]
        return Placement(tuple(places), int(WORKING * min(limits)) if limits else None)

    def _begun(self, worker: str, start: int, stop: int) -> Future[Any]:
        source, requirements = self._rows(slice(start, stop)), self.pool.requirements
        return submitted(self.pool, worker, begin, source, start, requirements)

    def _rows(self, place: slice) -> Any:
        """Some rows as they travel: of a store's features only where they lie, without ids, labels and keys."""
        if isinstance(self.features, FeatureSet):
            return self.features.rows.take(place)
        if isinstance(self.source, ArrayBlocks):
            return ArrayBlocks(self.source.array[place])
        return self.features.take(place)

    def _part_starts(self) -> npt.NDArray[np.int64]:
        if isinstance(self.features, FeatureSet):
            return self.features.rows.part_starts()
        return np.empty(0, np.int64)


def cuts(rows: int, shards: int, starts: npt.NDArray[np.int64]) -> list[int]:
    """Where to cut rows into shards of about the same size: where a part of the store begins, if that is near.

    Example:
        >>> cuts(100, 2, np.array([30, 49])), cuts(100, 3, np.array([30]))
        ([0, 49, 100], [0, 33, 67, 100])
    """
    even = np.linspace(0, rows, shards + 1).round().astype(np.int64)
    for place in range(1, shards):
        near = starts[np.abs(starts - even[place]) <= _NEAR * rows / shards]
        if len(near):
            even[place] = near[np.abs(near - even[place]).argmin()]
    return [int(edge) for edge in even]
