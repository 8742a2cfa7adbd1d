"""Tasks in, answers out: as many in flight as the workers there can use, and no more."""

from __future__ import annotations

import queue
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from featurepipe.cluster.worker import Answer, Attempt, ask_to_stop
from featurepipe.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.cluster.team import Team

T = TypeVar("T")
R = TypeVar("R")

LOOK_SECONDS = 0.5
"""How often workers are counted and a stop is asked about while no answer comes."""

STRAGGLING = 3.0
"""At the end, a task that takes so many times the usual is begun a second time."""

MOST_REFUSALS = 16
"""Of one task; then something is wrong with more than a few workers."""


def results(
    team: Team,
    tasks: Iterator[T],
    work: Callable[[T], R],
    *,
    stop: Callable[[], bool] = bool,
    in_flight_per_worker: int = 2,
    ahead: int | None = None,
    retries: int = 3,
) -> Iterator[tuple[T, R]]:
    """Has tasks done by the workers, and yields each with its result as they complete.

    Dask chooses the worker, moves a task when its worker dies, and tries again after an error that may pass. A worker that
    `WorkerRefused` or the team's terms exclude is named, and its task is done elsewhere. At the end, a task that takes far longer
    than the others is begun a second time, and the first answer counts.

    Args:
        team: the workers.
        tasks: pulled only when there is room, so that a task may depend on results before.
        work: what a worker does with a task; it travels with each. While it runs, `stop_of_task` tells it when to come back.
        stop: whether to stop: nothing more is begun, and tasks under way come back with what they have.
        in_flight_per_worker: how many tasks a worker has, with the one that it works on.
        ahead: how many tasks may be begun for each worker from the oldest one without an answer on, for whoever has to put
            answers in order and must not hold too many of them; None for any number.
        retries: how often a task is tried again after an error.

    Raises:
        ClusterError: no worker is left, the scheduler is gone, or a task kills its workers.
        FeaturepipeError: what the work raised.
    """
    flow = _Flow(team, tasks, Attempt(work, team.terms, secrets.token_hex(8)), stop, in_flight_per_worker, ahead, retries)
    try:
        yield from flow.run()
    finally:
        flow.dismiss()


@dataclass
class _Pending(Generic[T]):
    """A task without an answer, and the attempts at it."""

    task: T
    since: float
    futures: list[Future] = field(default_factory=list)
    refusals: int = 0
    restricted: frozenset[str] = frozenset()


class _Flow(Generic[T, R]):
    def __init__(
        self,
        team: Team,
        tasks: Iterator[T],
        attempt: Attempt[T, R],
        stop: Callable[[], bool],
        per_worker: int,
        ahead: int | None,
        retries: int,
    ) -> None:
        self.team, self.tasks, self.attempt, self.stop = team, iter(tasks), attempt, stop
        self.per_worker, self.ahead, self.retries = per_worker, ahead, retries
        self.pending: dict[int, _Pending[T]] = {}
        self.done: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self.seconds: list[float] = []
        self.workers: list[str] = []
        self.count = 0
        self.exhausted = self.stopping = False
        self.alone_since = time.monotonic()

    def run(self) -> Iterator[tuple[T, R]]:
        while True:
            self._look()
            self._fill()
            if not self.pending:
                return
            for number, future in self._arrived():
                yield from self._take(number, future)

    def _look(self) -> None:
        """Counts the workers, passes on a stop, helps what is stuck."""
        self.workers = self.team.addresses()
        if self.workers:
            self.alone_since = time.monotonic()
        elif time.monotonic() - self.alone_since > self.team.patience:
            raise self.team.no_worker()
        if self.stop():
            self.stopping = self.exhausted = True
            self.team.ask(_Stop(self.attempt.flow), self.workers)
        self._free_the_stuck()
        if (self.exhausted or self._is_held()) and not self.stopping:
            self._double_stragglers()

    def _fill(self) -> None:
        room = self.per_worker * self._usable()
        while not self.exhausted and len(self.pending) < room and not self._is_held() and not self.stop():
            try:
                task = next(self.tasks)
            except StopIteration:
                self.exhausted = True
                return
            self.count += 1
            self.pending[self.count] = _Pending(task, time.monotonic())
            self._submit(self.count)

    def _usable(self) -> int:
        return max(len(self.workers), self.team.most, 1)

    def _is_held(self) -> bool:
        """Whether enough has been begun beyond the oldest task without an answer."""
        if self.ahead is None or not self.pending:
            return False
        return self.count - min(self.pending) >= self.ahead * self._usable()

    def _submit(self, number: int, workers: list[str] | None = None) -> None:
        pending = self.pending[number]
        if workers is None and self.team.refused:
            workers = self.workers
            pending.restricted = frozenset(workers)
        key = f"{getattr(self.attempt.work, '__name__', 'task')}-{self.attempt.flow}-{number}-{len(pending.futures)}-{pending.refusals}"
        with self.team.reaching():
            future = self.team.client.submit(
                self.attempt, pending.task, key=key, workers=workers or None, retries=self.retries, pure=False
            )
        pending.futures.append(future)
        future.add_done_callback(lambda future: self.done.put((number, future)))

    def _arrived(self) -> list[tuple[int, Future]]:
        """What has come in, after a short wait if nothing has."""
        found = []
        try:
            found.append(self.done.get(timeout=LOOK_SECONDS))
            while True:
                found.append(self.done.get_nowait())
        except queue.Empty:
            return found

    def _take(self, number: int, future: Future) -> Iterator[tuple[T, R]]:
        pending = self.pending.get(number)
        if pending is None or future not in pending.futures:
            return  # another attempt was first
        answer = self._answer(pending, future)
        if answer.refused:
            self._elsewhere(number, future, answer)
            return
        del self.pending[number]
        for other in pending.futures:
            if other is not future:
                other.cancel()
        if answer.error is not None:
            raise answer.error
        if answer.begun:
            self.seconds.append(answer.seconds)
            yield pending.task, answer.value  # type: ignore[misc]  # a value, since it is neither refused nor an error

    def _answer(self, pending: _Pending[T], future: Future) -> Answer[R]:
        from distributed import KilledWorker

        if future.status == "cancelled":
            raise self.team.lost()
        try:
            answer: Answer[R] = future.result()
        except KilledWorker as error:
            raise ClusterError(
                f"{pending.task} ended {error.allowed_failures + 1} workers, the last {error.last_worker.address}: it needs more memory "
                "than they have, or its images crash a decoder. See the workers' logs; what was committed stands"
            ) from error
        return answer

    def _elsewhere(self, number: int, future: Future, answer: Answer[R]) -> None:
        """Has a task done by another worker than the one that is refused."""
        pending = self.pending[number]
        self.team.refuse(answer.worker, answer.refused)
        pending.refusals += 1
        pending.futures.remove(future)
        if pending.refusals > MOST_REFUSALS:
            raise self.team.no_worker()
        self.workers = self.team.addresses()
        self._when_possible(number)

    def _when_possible(self, number: int) -> None:
        if self.workers and not self.pending[number].futures:
            self._submit(number)

    def _free_the_stuck(self) -> None:
        """Tasks that only certain workers may do are given to others when all of those are gone."""
        for number, pending in self.pending.items():
            if pending.restricted and not pending.restricted.intersection(self.workers):
                for future in pending.futures:
                    future.cancel()
                pending.futures.clear()
            self._when_possible(number)

    def _double_stragglers(self) -> None:
        idle = len(self.workers) - len(self.pending)
        if idle <= 0 or not self.seconds:
            return
        patience = STRAGGLING * max(statistics.median(self.seconds), 1.0)
        late = [n for n, p in self.pending.items() if len(p.futures) == 1 and time.monotonic() - p.since > patience]
        if not late:
            return
        with self.team.reaching():
            busy = self.team.client.processing(self.workers)
        free = [address for address in self.workers if not busy.get(address)]
        for number in late[: len(free)]:
            self._submit(number, free)

    def dismiss(self) -> None:
        """Tells workers that nothing more is wanted of this flow."""
        if not self.pending or self.team.client.status != "running":
            return
        self.team.ask(_Stop(self.attempt.flow), self.workers)
        for pending in self.pending.values():
            for future in pending.futures:
                future.cancel()


@dataclass(frozen=True)
class _Stop:
    flow: str

    def __call__(self) -> Any:
        ask_to_stop(self.flow)
