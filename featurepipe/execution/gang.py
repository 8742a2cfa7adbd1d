"""Work that all workers do at the same time and whose processes talk to each other, as when they grow trees together.

Dask alone would do such tasks one after the other, or move one of them to another worker, and the rest would wait for ever. So
each is bound to its worker, and if one is lost the work as a whole is begun again with those that are left.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from featurepipe.errors import ClusterError, FeaturepipeError
from featurepipe.execution.dispatch import RETURN_SECONDS
from featurepipe.execution.executor import Report, Stop, Worker
from featurepipe.execution.worker import Attempt, TaskResult, ask_to_stop
from featurepipe.heads.shares import Seat

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.execution.row_shard import Placed
    from featurepipe.execution.worker_pool import WorkerPool

R = TypeVar("R")
Kept = list[
    list[tuple[Any, ...]]
]  # for each set of rows the shares at one worker, each the features and what is beside them

TRIES = 3
"""How often work is begun before it is given up."""

ANSWER_SECONDS = 60.0
"""How long the desk may take to open, and workers to come back when one of them is lost."""

_LOOK_SECONDS = 1.0
_NEXT = (
    "Workers that do this together cannot go on without one of them: see their logs; if they ran out of memory, "
    "use more workers or give them more, and give the same command again"
)


class HasRows(Protocol):
    """Rows that workers keep, such as `featurepipe.execution.row_shards.WorkerShares`."""

    def whole(self) -> Placed:
        """Where the rows are now."""


class _Failed(Exception):
    """The work has to begin again; says why."""


@dataclass(frozen=True)
class _Party:
    """Who works together.

    Attributes:
        pool: Whose workers.
        kept: What each of them has, by address.
        attempt: What each is to do with it.
    """

    pool: WorkerPool
    kept: dict[str, Kept]
    attempt: Attempt[Any]


def together(
    pool: WorkerPool, work: Callable[..., R], desk: Callable[[str, int], Any], sets: Sequence[HasRows]
) -> list[R]:
    """Has all workers that have a share work at the same time; see `featurepipe.heads.shares.Shares.at_once`.

    Raises:
        ClusterError: Workers were lost again and again, or the scheduler is.
        FeaturepipeError: What the work raised.
    """
    tries = 0
    # An actor asks for the current client, and a program may have several.
    with pool.client.as_current(), _alone(pool):
        while True:
            tries += 1
            try:
                return _worked(_party(pool, work, sets), desk)
            except _Failed as failure:
                if tries == TRIES:
                    raise ClusterError(f"{failure}, for the {TRIES}th time. {_NEXT}") from failure.__cause__
                pool.say(f"{failure}; those that are left begin this again")


def _party(pool: WorkerPool, work: Callable[..., Any], sets: Sequence[HasRows]) -> _Party:
    """Those who are there now, each with the shares that it was given, and with those of workers that are gone."""
    pool.wait_for_workers()
    there, kept = pool.addresses(), dict[str, Kept]()
    for number, shares in enumerate(sets):
        placed = shares.whole()
        for place, share in enumerate(placed.places):
            worker = share.worker if share.worker in there else there[place % len(there)]
            kept.setdefault(worker, [[] for _ in sets])[number].append((placed.changes, *share.kept))
    return _Party(pool, kept, Attempt(partial(_seated, work), None, pool.requirements, secrets.token_hex(8)))


@contextmanager
def _alone(pool: WorkerPool) -> Iterator[None]:
    """Lets one such work at a time run on a cluster: two that each have half of the workers would wait for ever."""
    from distributed import Semaphore

    with pool.scheduler.reaching():
        client = pool.client  # whose end is the end of the lease, too
        permit = Semaphore(1, "featurepipe-together", scheduler_rpc=client.scheduler, loop=client.loop)
        if not permit.acquire(timeout=5):
            pool.say("all workers are needed at the same time; waiting for someone else who has them")
            while not permit.acquire(timeout=ANSWER_SECONDS):
                pool.addresses()  # as long as there is a scheduler
    try:
        yield
    finally:
        if pool.client.status == "running":
            permit.release()


def _worked(party: _Party, desk: Callable[[str, int], Any]) -> list[Any]:
    """One try."""
    tasks: dict[str, Future[Any]] = {}
    opened: Any = None
    try:
        opened, told = _opened(party, desk)
        for number, (worker, kept) in enumerate(party.kept.items()):
            seat = Seat(number, len(party.kept), 1, told)
            tasks[worker] = party.pool.scheduler.submit(
                party.attempt, (seat, kept), workers=[worker], pure=False, retries=0
            )
        return _answers(party.pool, tasks)
    finally:
        if opened is not None:
            _closed(party, opened, list(tasks.values()))


def _opened(party: _Party, desk: Callable[[str, int], Any]) -> tuple[Any, dict[str, Any]]:
    """The desk, at the first of the workers, and what it tells."""
    from distributed.comm.addressing import get_address_host

    first = next(iter(party.kept))
    made = party.pool.scheduler.submit(
        desk, get_address_host(first), len(party.kept), actor=True, workers=[first], pure=False
    )
    _await(party.pool, {first: made})
    try:
        opened = made.result(timeout=ANSWER_SECONDS)
        return opened, opened.told().result(timeout=ANSWER_SECONDS)
    except (TimeoutError, OSError, RuntimeError) as error:
        raise _Failed(
            f"worker {first} could not open a desk for the others ({type(error).__name__}: {error})"
        ) from error


def _answers(pool: WorkerPool, tasks: dict[str, Future[Any]]) -> list[Any]:
    """What all came back with."""
    _await(pool, tasks)
    answers: list[TaskResult[Any]] = [task.result() for task in tasks.values()]
    for answer in answers:
        if answer.refused:
            pool.refuse(answer.worker, answer.refused)
    if any(answer.refused for answer in answers):
        raise _Failed("a worker is not used")
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise _cause(errors)
    return [answer.value for answer in answers]


def _await(pool: WorkerPool, tasks: dict[str, Future[Any]]) -> None:
    """Waits until all tasks are done.

    Raises:
        _Failed: one cannot be: its worker is lost, or it failed in a way that another try may avoid.
    """
    from distributed import wait

    done = False
    while not done:
        lost = set(tasks).difference(pool.addresses())
        if lost:
            raise _Failed(f"worker {', '.join(sorted(lost))} was lost")
        with suppress(TimeoutError, CancelledError):
            wait(list(tasks.values()), timeout=_LOOK_SECONDS)
        done = all(task.done() for task in tasks.values())
        for worker, task in tasks.items():
            if task.status in {"cancelled", "lost"}:
                raise pool.scheduler.lost()
            if task.status == "error":
                error = task.exception()
                lost = set(tasks).difference(pool.addresses())  # whose end is why others fail
                if lost:
                    raise _Failed(f"worker {', '.join(sorted(lost))} was lost") from error
                raise _Failed(f"worker {worker} failed ({type(error).__name__}: {_line(error)})") from error


def _cause(errors: Sequence[FeaturepipeError]) -> FeaturepipeError:
    """What was wrong, rather than what others say of it."""
    return next((error for error in errors if not isinstance(error, ClusterError)), errors[0])


def _line(error: BaseException | None) -> str:
    """The last line of xgboost's and others' long messages that says something."""
    lines = [
        line.strip()
        for line in str(error).splitlines()
        if line.strip() and not line.strip().startswith(("[bt]", "Stack"))
    ]
    return lines[-1] if lines else ""


def _closed(party: _Party, opened: Any, tasks: list[Future[Any]]) -> None:
    """Sends everyone home: those who wait at the desk, those who work, and those who have not begun."""
    from distributed import wait

    pool = party.pool
    if pool.client.status != "running" or all(task.status == "finished" for task in tasks):
        return
    pool.each(partial(ask_to_stop, party.attempt.flow), pool.addresses(), seconds=RETURN_SECONDS)
    with suppress(TimeoutError, OSError, RuntimeError):  # its worker may be the one that is lost
        opened.close().result(timeout=ANSWER_SECONDS)
    there = pool.addresses()
    running = [task for worker, task in zip(party.kept, tasks, strict=False) if worker in there]
    deadline = time.monotonic() + ANSWER_SECONDS
    while not all(task.done() for task in running) and time.monotonic() < deadline:
        with suppress(TimeoutError, CancelledError):
            wait(running, timeout=_LOOK_SECONDS)
    for task in tasks:
        task.cancel()


def _seated(
    work: Callable[..., R], _context: None, task: tuple[Seat, Kept], worker: Worker, stop: Stop, _report: Report
) -> R:
    """The work inside a worker's process."""
    from featurepipe.execution.row_shard import all_threads, changed

    seat, sets = task
    own = [[(changed(blocks, changes), *rows) for changes, blocks, *rows in shares] for shares in sets]
    with all_threads():
        return work(replace(seat, threads=worker.threads, stop=stop), *own)
