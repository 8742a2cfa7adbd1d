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
from typing import TYPE_CHECKING, Any, TypeVar

from featurepipe.errors import ClusterError, FeaturepipeError
from featurepipe.execution.executor import RETURN_SECONDS, Report, Stop, TaskResult, Worker
from featurepipe.execution.worker import Attempt, ask_to_stop
from featurepipe.heads.row_shards import Rank

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.execution.row_shard import Placement
    from featurepipe.execution.worker_pool import WorkerPool

R = TypeVar("R")
Kept = list[
    list[tuple[Any, ...]]
]  # for each set of rows the shards at one worker, each the features and what is beside them

TRIES = 3
"""How often work is begun before it is given up."""

ANSWER_SECONDS = 60.0
"""How long the rendezvous may take to open, and workers to come back when one of them is lost."""

_LOOK_SECONDS = 1.0
_NEXT = (
    "Workers that do this together cannot go on without one of them: see their logs; if they ran out of memory, "
    "use more workers or give them more, and give the same command again"
)


class _Failed(Exception):
    """The work has to begin again; says why."""


@dataclass(frozen=True)
class _Gang:
    """Who works together.

    Attributes:
        pool: Whose workers.
        kept: What each of them has, by address.
        attempt: What each is to do with it.
    """

    pool: WorkerPool
    kept: dict[str, Kept]
    attempt: Attempt[Any]


def gang_run(
    pool: WorkerPool,
    work: Callable[..., R],
    rendezvous: Callable[[str, int], Any],
    sets: Sequence[Callable[[], Placement]],
) -> list[R]:
    """Has all workers that have a shard work at the same time; see `featurepipe.heads.row_shards.RowShards.gang_run`.

    Args:
        pool: whose workers.
        work: what each does.
        rendezvous: where they meet.
        sets: for each set of rows, tells where it is now.

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
                return _worked(_gang(pool, work, sets), rendezvous)
            except _Failed as failure:
                if tries == TRIES:
                    raise ClusterError(f"{failure}, for the {TRIES}th time. {_NEXT}") from failure.__cause__
                pool.say(f"{failure}; those that are left begin this again")


def _gang(pool: WorkerPool, work: Callable[..., Any], sets: Sequence[Callable[[], Placement]]) -> _Gang:
    """Those who are there now, each with the shards that it was given, and with those of workers that are gone."""
    pool.wait_for_workers()
    there, kept = pool.addresses(), dict[str, Kept]()
    for number, whole in enumerate(sets):
        placed = whole()
        for place, shard in enumerate(placed.places):
            worker = shard.worker if shard.worker in there else there[place % len(there)]
            kept.setdefault(worker, [[] for _ in sets])[number].append((placed.changes, *shard.kept))
    return _Gang(pool, kept, Attempt(partial(_ranked, work), None, pool.requirements, secrets.token_hex(8)))


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


def _worked(gang: _Gang, rendezvous: Callable[[str, int], Any]) -> list[Any]:
    """One try."""
    tasks: dict[str, Future[Any]] = {}
    opened: Any = None
    try:
        opened, told = _opened(gang, rendezvous)
        for number, (worker, kept) in enumerate(gang.kept.items()):
            rank = Rank(number, len(gang.kept), 1, told)
            tasks[worker] = gang.pool.scheduler.submit(
                gang.attempt, (rank, kept), workers=[worker], pure=False, retries=0
            )
        return _answers(gang.pool, tasks)
    finally:
        if opened is not None:
            _closed(gang, opened, list(tasks.values()))


def _opened(gang: _Gang, rendezvous: Callable[[str, int], Any]) -> tuple[Any, dict[str, Any]]:
    """The rendezvous, at the first of the workers, and what it tells."""
    from distributed.comm.addressing import get_address_host

    first = next(iter(gang.kept))
    made = gang.pool.scheduler.submit(
        rendezvous, get_address_host(first), len(gang.kept), actor=True, workers=[first], pure=False
    )
    _await(gang.pool, {first: made})
    try:
        opened = made.result(timeout=ANSWER_SECONDS)
        return opened, opened.told().result(timeout=ANSWER_SECONDS)
    except (TimeoutError, OSError, RuntimeError) as error:
        raise _Failed(
            f"worker {first} could not open a rendezvous for the others ({type(error).__name__}: {error})"
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


def _closed(gang: _Gang, opened: Any, tasks: list[Future[Any]]) -> None:
    """Sends everyone home: those who wait at the rendezvous, those who work, and those who have not begun."""
    from distributed import wait

    pool = gang.pool
    if pool.client.status != "running" or all(task.status == "finished" for task in tasks):
        return
    pool.each(partial(ask_to_stop, gang.attempt.flow), pool.addresses(), seconds=RETURN_SECONDS)
    with suppress(TimeoutError, OSError, RuntimeError):  # its worker may be the one that is lost
        opened.close().result(timeout=ANSWER_SECONDS)
    there = pool.addresses()
    running = [task for worker, task in zip(gang.kept, tasks, strict=False) if worker in there]
    deadline = time.monotonic() + ANSWER_SECONDS
    while not all(task.done() for task in running) and time.monotonic() < deadline:
        with suppress(TimeoutError, CancelledError):
            wait(running, timeout=_LOOK_SECONDS)
    for task in tasks:
        task.cancel()


def _ranked(
    work: Callable[..., R], _context: None, task: tuple[Rank, Kept], worker: Worker, stop: Stop, _report: Report
) -> R:
    """The work inside a worker's process."""
    from featurepipe.execution.row_shard import all_threads, changed

    rank, sets = task
    own = [[(changed(blocks, changes), *rows) for changes, blocks, *rows in shards] for shards in sets]
    with all_threads():
        return work(replace(rank, threads=worker.threads, stop=stop), *own)
