"""Bounded dispatch of shards to the workers of a pool: as many in flight as the workers there can use, and no more."""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from featurepipe.errors import ClusterError
from featurepipe.execution.executor import (
    LOOK_SECONDS,
    RETURN_SECONDS,
    Arrived,
    BoundedFlow,
    MapOptions,
    TaskResult,
    told,
)
from featurepipe.execution.worker import Attempt, ask_to_stop
from featurepipe.execution.worker_pool import WorkerPool

if TYPE_CHECKING:
    from distributed import Future


S = TypeVar("S")
R = TypeVar("R")

STRAGGLING = 3.0
"""At the end, a task that takes so many times the usual is begun a second time."""

RESULT_SECONDS = 10.0
"""How long to wait for a result that is there; a worker that dies just then has it computed anew elsewhere."""

PAUSED_SECONDS = 30.0
"""From when on workers are looked at that send nothing: one whose memory is nearly full takes no task, and does not say so."""

MOST_REFUSALS = 16
"""Of one task; then something is wrong with more than a few workers."""


def dispatch(
    pool: WorkerPool, shards: Iterator[S], attempt: Attempt[R], options: MapOptions
) -> Generator[Arrived[S, R], None, None]:
    """Has shards done by the workers, and yields their results as they arrive; see `Executor.map`.

    Dask chooses the worker, moves a task when its worker dies, and tries again after an error that may pass. A worker that
    `WorkerRefused` or the pool's requirements exclude is named, and its shard is done elsewhere. At the end, a shard that takes
    far longer than the others is begun a second time, and the first result counts.

    Args:
        pool: the workers.
        shards: pulled only when there is room.
        attempt: what a worker does with a shard.
        options: bounds of the flow, and when to stop. What does not heed ``stop`` is not waited for once it is not wanted.

    Raises:
        ClusterError: no worker is left, the scheduler is gone, or a shard kills its workers.
    """
    return _Flow(pool, shards, attempt, options).results()


@dataclass
class _Pending(Generic[S]):
    """A shard without a result, and the attempts at it."""

    shard: S
    since: float
    futures: list[Future[TaskResult[Any]]] = field(default_factory=list)
    attempts: int = 0
    refusals: int = 0
    restricted: frozenset[str] = frozenset()


class _Flow(BoundedFlow[S, _Pending[S], R], Generic[S, R]):
    def __init__(self, pool: WorkerPool, shards: Iterator[S], attempt: Attempt[R], options: MapOptions) -> None:
        super().__init__(shards, options)
        self.pool, self.attempt = pool, attempt
        self.done: queue.SimpleQueue[tuple[int, Future[TaskResult[R]]]] = queue.SimpleQueue()
        self.seconds: list[float] = []
        self.workers: list[str] = []
        self.stopping = self.late = False
        self.alone_since = time.monotonic()
        self.next_look = 0.0
        self.next_look_at_paused = time.monotonic() + PAUSED_SECONDS
        self.were_paused = False

    def run(self) -> Iterator[Arrived[S, R]]:
        while True:
            self._look()
            self.fill()
            if not self.pending:
                return
            for number, future in self._arrived():
                yield from self._take(number, future)

    def _look(self) -> None:
        """Every so often: counts the workers, passes on a stop, helps what is stuck."""
        self.pool.scheduler.check()
        if self.options.stop() and not self.stopping:
            self.stopping = self.exhausted = True
            self.next_look = 0.0
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_SECONDS
        self._count_workers()
        if self.stopping:
            self._call_back()
            return
        self._look_at_paused()
        self._free_the_stuck()
        if self.options.interruptible and (self.exhausted or self.is_held()):
            self._double_stragglers()

    def _count_workers(self) -> None:
        before, self.workers = self.workers, self.pool.addresses()
        gone = set(before).difference(self.workers, self.pool.refused)
        for address in gone:
            self.pool.note_gone(address)
        if (
            gone
        ):  # Dask begins their tasks anew; what kills workers would kill twice as many if it were doubled meanwhile
            for pending in self.pending.values():
                pending.since = time.monotonic()
        if self.workers:
            self.alone_since = time.monotonic()
        elif self.pending and time.monotonic() - self.alone_since > self.pool.patience:
            raise self.pool.no_worker(
                f"{len(self.pending)} tasks are not done, the first: {told(self._oldest().shard)}"
            )

    def _look_at_paused(self) -> None:
        """Tells of workers that have no memory left to begin a task with.

        Raises:
            ClusterError: none of the workers has, at two looks one after the other.
        """
        if not self.pending or time.monotonic() < self.next_look_at_paused:
            return
        self.next_look_at_paused = time.monotonic() + PAUSED_SECONDS
        paused = self.pool.paused(self.workers)
        are_paused = len(paused) == len(self.workers) > 0
        if are_paused and self.were_paused:
            raise ClusterError(
                f"{len(self.pending)} tasks are not done, the first: {told(self._oldest().shard)}; no worker has the memory to "
                f"begin one: {'; '.join(paused)}. Give workers more memory, or start fewer on a machine, and give the same "
                "command again: it goes on where it was"
            )
        self.were_paused = are_paused

    def _oldest(self) -> _Pending[S]:
        return self.pending[min(self.pending)]

    def _call_back(self) -> None:
        """Tells running tasks to come back, also in workers that have just come; what no worker has or may do is given up."""
        self._drop_the_stuck()
        self.pending = {number: pending for number, pending in self.pending.items() if self.workers and pending.futures}
        self.pool.each(partial(ask_to_stop, self.attempt.flow), self.workers, seconds=RETURN_SECONDS)

    def usable(self) -> int:
        return max(len(self.workers), self.pool.most, 1)

    def begin(self, number: int, shard: S) -> None:
        self.pending[number] = _Pending(shard, time.monotonic())
        self._submit(number)

    def _submit(self, number: int, workers: list[str] | None = None) -> None:
        pending = self.pending[number]
        if workers is None and self.pool.refused:
            workers = self.workers
            pending.restricted = frozenset(workers)
        pending.attempts += 1
        function = getattr(self.attempt.function, "func", self.attempt.function)  # of a partial
        key = f"{getattr(function, '__name__', 'task')}-{self.attempt.flow}-{number}-{pending.attempts}"
        future = self.pool.scheduler.submit(
            self.attempt, pending.shard, key=key, workers=workers or None, retries=self.options.retries, pure=False
        )
        pending.futures.append(future)
        self._await(number, future)

    def _await(self, number: int, future: Future[TaskResult[R]]) -> None:
        future.add_done_callback(lambda future: self.done.put((number, future)))

    def _arrived(self) -> list[tuple[int, Future[TaskResult[R]]]]:
        """What has come in, after a short wait if nothing has."""
        found: list[tuple[int, Future[TaskResult[R]]]] = []
        try:
            found.append(self.done.get(timeout=LOOK_SECONDS))
            while True:
                found.append(self.done.get_nowait())
        except queue.Empty:
            return found

    def _take(self, number: int, future: Future[TaskResult[R]]) -> Iterator[Arrived[S, R]]:
        self.next_look_at_paused, self.were_paused = time.monotonic() + PAUSED_SECONDS, False
        pending = self.pending.get(number)
        if pending is None or future not in pending.futures:
            return  # another attempt was first
        answer = self._answer(pending, future)
        if answer is None:
            self._await(number, future)
            return
        if answer.refused:
            self._elsewhere(number, future, answer)
            return
        del self.pending[number]
        for other in pending.futures:
            if other is not future:
                other.cancel()
                self.late = True
        if answer.begun and answer.error is None:
            self.seconds.append(answer.seconds)
        yield number, pending.shard, answer

    def _answer(self, pending: _Pending[S], future: Future[TaskResult[R]]) -> TaskResult[R] | None:
        """What an attempt has come to; None if its worker has just died, and Dask makes it again."""
        try:
            return self.pool.result(future, told(pending.shard), RESULT_SECONDS)
        except OSError as error:
            if future.status == "error":
                raise  # the work's own
            if isinstance(error, TimeoutError):
                return None
            raise self.pool.scheduler.lost() from error

    def _elsewhere(self, number: int, future: Future[TaskResult[R]], answer: TaskResult[R]) -> None:
        """Has a task done by another worker than the one that is refused."""
        pending = self.pending[number]
        self.pool.refuse(answer.worker, answer.refused)
        pending.refusals += 1
        pending.futures.remove(future)
        if pending.refusals > MOST_REFUSALS:
            raise self.pool.no_worker()
        self.next_look = 0.0

    def _free_the_stuck(self) -> None:
        """Gives tasks to others that only certain workers may do, when all of those are gone."""
        self._drop_the_stuck()
        for number, pending in self.pending.items():
            if self.workers and not pending.futures:
                self._submit(number)

    def _drop_the_stuck(self) -> None:
        """Cancels attempts that only certain workers may make, when all of those are gone."""
        for pending in self.pending.values():
            if pending.restricted and not pending.restricted.intersection(self.workers):
                gone, pending.futures = pending.futures, []
                for future in gone:
                    future.cancel()

    def _double_stragglers(self) -> None:
        if not self.seconds:
            return
        patience = STRAGGLING * max(statistics.median(self.seconds), 1.0)
        late = [n for n, p in self.pending.items() if len(p.futures) == 1 and time.monotonic() - p.since > patience]
        if not late:
            return
        free = self.pool.idle(self.workers)
        for number in late[: len(free)]:
            self._submit(number, free)

    def dismiss(self) -> None:
        """See `BoundedFlow`; so it commits what it has."""
        if not (self.pending or self.late) or self.pool.scheduler.is_lost:
            return
        workers = self.pool.addresses()
        self.pool.each(partial(ask_to_stop, self.attempt.flow), workers, seconds=RETURN_SECONDS)
        futures = [future for pending in self.pending.values() for future in pending.futures]
        deadline = time.monotonic() + (RETURN_SECONDS if workers and self.options.interruptible else 0)
        while time.monotonic() < deadline and not all(future.done() for future in futures):
            time.sleep(0.05)
        for future in futures:
            future.cancel()
