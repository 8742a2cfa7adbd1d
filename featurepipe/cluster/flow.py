"""Tasks in, answers out: as many in flight as the workers there can use, and no more."""

from __future__ import annotations

import queue
import secrets
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
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

RETURN_SECONDS = 10.0
"""How long tasks that are no longer wanted may take to come back with what they have."""

RESULT_SECONDS = 10.0
"""How long to wait for a result that is there; a worker that dies just then has it computed anew elsewhere."""

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
    interruptible: bool = True,
) -> Generator[tuple[T, R], None, None]:
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
        interruptible: whether tasks come back when they are told to. Those that do not are never begun a second time beside the
            first, since that would go on to its end, and are not waited for when they are no longer wanted.

    Raises:
        ClusterError: no worker is left, the scheduler is gone, or a task kills its workers.
        FeaturepipeError: what the work raised.
    """
    attempt = Attempt(work, team.terms, secrets.token_hex(8))
    flow = _Flow(team, tasks, attempt, stop, in_flight_per_worker, ahead, retries, interruptible)
    try:
        yield from flow.run()
    finally:
        flow.dismiss()


@dataclass
class _Pending(Generic[T]):
    """A task without an answer, and the attempts at it."""

    task: T
    since: float
    futures: list[Future[Answer[Any]]] = field(default_factory=list)
    attempts: int = 0
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
        interruptible: bool,
    ) -> None:
        self.team, self.tasks, self.attempt, self.stop = team, iter(tasks), attempt, stop
        self.per_worker, self.ahead, self.retries = per_worker, ahead, retries
        self.interruptible = interruptible
        self.pending: dict[int, _Pending[T]] = {}
        self.done: queue.SimpleQueue[tuple[int, Future[Answer[R]]]] = queue.SimpleQueue()
        self.seconds: list[float] = []
        self.workers: list[str] = []
        self.count = 0
        self.exhausted = self.stopping = self.late = False
        self.alone_since = time.monotonic()
        self.next_look = 0.0

    def run(self) -> Iterator[tuple[T, R]]:
        while True:
            self._look()
            self._fill()
            if not self.pending:
                return
            for number, future in self._arrived():
                yield from self._take(number, future)

    def _look(self) -> None:
        """Every so often: counts the workers, passes on a stop, helps what is stuck."""
        self.team.scheduler.check()
        if self.stop() and not self.stopping:
            self.stopping = self.exhausted = True
            self.next_look = 0.0
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_SECONDS
        self._count_workers()
        if self.stopping:
            self._call_back()
            return
        self._free_the_stuck()
        if self.interruptible and (self.exhausted or self._is_held()):
            self._double_stragglers()

    def _count_workers(self) -> None:
        before, self.workers = self.workers, self.team.addresses()
        for address in set(before).difference(self.workers, self.team.refused):
            self.team.note_gone(address)
        if self.workers:
            self.alone_since = time.monotonic()
        elif self.pending and time.monotonic() - self.alone_since > self.team.patience:
            raise self.team.no_worker(
                f"{len(self.pending)} tasks are not done, the first: {_told(self._oldest().task)}"
            )

    def _oldest(self) -> _Pending[T]:
        return self.pending[min(self.pending)]

    def _call_back(self) -> None:
        """Tells running tasks to come back, also in workers that have just come; what no worker has is given up."""
        if not self.workers:
            self.pending.clear()
        self.team.ask(partial(ask_to_stop, self.attempt.flow), self.workers, seconds=RETURN_SECONDS)

    def _fill(self) -> None:
        room = self.per_worker * self._usable()
        while not self.exhausted and len(self.pending) < room and not self._is_held():
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
        pending.attempts += 1
        work = getattr(self.attempt.work, "func", self.attempt.work)  # of a partial
        key = f"{getattr(work, '__name__', 'task')}-{self.attempt.flow}-{number}-{pending.attempts}"
        future = self.team.scheduler.submit(
            self.attempt, pending.task, key=key, workers=workers or None, retries=self.retries, pure=False
        )
        pending.futures.append(future)
        self._await(number, future)

    def _await(self, number: int, future: Future[Answer[R]]) -> None:
        future.add_done_callback(lambda future: self.done.put((number, future)))

    def _arrived(self) -> list[tuple[int, Future[Answer[R]]]]:
        """What has come in, after a short wait if nothing has."""
        found: list[tuple[int, Future[Answer[R]]]] = []
        try:
            found.append(self.done.get(timeout=LOOK_SECONDS))
            while True:
                found.append(self.done.get_nowait())
        except queue.Empty:
            return found

    def _take(self, number: int, future: Future[Answer[R]]) -> Iterator[tuple[T, R]]:
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
        if answer.error is not None:
            raise answer.error
        if answer.begun:
            self.seconds.append(answer.seconds)
            yield pending.task, answer.value  # type: ignore[misc]  # a value, since it is neither refused nor an error

    def _answer(self, pending: _Pending[T], future: Future[Answer[R]]) -> Answer[R] | None:
        """What an attempt has come to; None if its worker has just died, and Dask makes it again."""
        from distributed import CancelledError, KilledWorker

        try:
            return future.result(timeout=RESULT_SECONDS)
        except CancelledError as error:
            raise self.team.scheduler.lost() from error  # by Dask, as soon as the connection breaks
        except KilledWorker as error:
            raise ClusterError(
                f"every worker that began {_told(pending.task)} died of it, {error.allowed_failures + 1} in all, the last "
                f"{error.last_worker.address}: it needs more memory than they have, or something in it crashes them. "
                "See the workers' logs; what was committed stands"
            ) from error
        except OSError as error:
            if future.status == "error":
                raise  # the work's own
            if isinstance(error, TimeoutError):
                return None
            raise self.team.scheduler.lost() from error

    def _elsewhere(self, number: int, future: Future[Answer[R]], answer: Answer[R]) -> None:
        """Has a task done by another worker than the one that is refused."""
        pending = self.pending[number]
        self.team.refuse(answer.worker, answer.refused)
        pending.refusals += 1
        pending.futures.remove(future)
        if pending.refusals > MOST_REFUSALS:
            raise self.team.no_worker()
        self.next_look = 0.0

    def _free_the_stuck(self) -> None:
        """Tasks that only certain workers may do are given to others when all of those are gone."""
        for number, pending in self.pending.items():
            if pending.restricted and not pending.restricted.intersection(self.workers):
                gone, pending.futures = pending.futures, []
                for future in gone:
                    future.cancel()
            if self.workers and not pending.futures:
                self._submit(number)

    def _double_stragglers(self) -> None:
        if not self.seconds:
            return
        patience = STRAGGLING * max(statistics.median(self.seconds), 1.0)
        late = [n for n, p in self.pending.items() if len(p.futures) == 1 and time.monotonic() - p.since > patience]
        if not late:
            return
        free = self.team.idle(self.workers)
        for number in late[: len(free)]:
            self._submit(number, free)

    def dismiss(self) -> None:
        """Calls back what is still under way and waits a little for it, so that it commits what it has."""
        if not (self.pending or self.late) or self.team.scheduler.is_lost:
            return
        workers = self.team.addresses()
        self.team.ask(partial(ask_to_stop, self.attempt.flow), workers, seconds=RETURN_SECONDS)
        futures = [future for pending in self.pending.values() for future in pending.futures]
        deadline = time.monotonic() + (RETURN_SECONDS if workers and self.interruptible else 0)
        while time.monotonic() < deadline and not all(future.done() for future in futures):
            time.sleep(0.05)
        for future in futures:
            future.cancel()


def _told(task: object) -> str:
    """A task in a message."""
    text = str(task)
    return text if len(text) <= 200 else f"{text[:200]}..."
