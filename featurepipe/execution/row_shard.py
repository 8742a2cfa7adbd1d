"""What happens inside the workers that keep rows: one shard of them, and work that all do at once, talking to each other.

Dask alone would do such tasks one after the other, or move one of them to another worker, and the rest would wait for ever. So
each is bound to its worker, and if one is lost the work as a whole is begun again with those that are left.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from featurepipe.display import bytes_of
from featurepipe.errors import ClusterError, FeaturepipeError, WorkerRefused
from featurepipe.execution.executor import RETURN_SECONDS, Report, Stop, TaskResult, Worker
from featurepipe.execution.worker import Attempt, Requirements, ask_to_stop
from featurepipe.heads.blocks import Array, Blocks, SameShape, in_memory
from featurepipe.heads.row_shards import Rank

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.execution.worker_pool import WorkerPool


Change = Callable[[Blocks], Blocks]

KEPT = 0.5
"""Of a worker's memory limit: features are kept while its process, with them, takes no more."""

_KEEPING = threading.Lock()  # else two shards that move to one worker would both find room for one


@dataclass(frozen=True)
class StoredRows(SameShape):
    """Some neighbouring rows of features as ``Blocks``, read from where they are stored.

    Attributes:
        source: The rows.
        first: The number of the first of them among all rows.
    """

    source: Any
    first: int

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Reads some of the rows, numbered from 0."""
        return np.asarray(self.source.read(dtype, rows=rows))


@dataclass(frozen=True)
class PlacedShard:
    """One worker's shard.

    Attributes:
        worker: The address of the worker that it was given to.
        rows: Which of all rows.
        kept: The features, and the arrays beside them; None for an array that is None.
    """

    worker: str
    rows: slice
    kept: tuple[Future[Any] | None, ...]


@dataclass(frozen=True)
class Placement:
    """Where the shards are.

    Attributes:
        places: The shards, in the order of the rows.
        memory: Bytes that a work may take at a worker, beside the features; None where workers have no limit.
        changes: What is done to features as they are read.
    """

    places: tuple[PlacedShard, ...]
    memory: int | None
    changes: tuple[Change, ...] = ()


def begin(source: Any, first: int, requirements: Requirements) -> StoredRows:
    """The shard as its worker begins with it.

    Raises:
        WorkerRefused: The worker must not be used.
    """
    why = requirements.refusal()
    if why:
        raise WorkerRefused(f"a shard of the features came to a worker that must not be used: {why}")
    return StoredRows(source, first)


def keep(changes: tuple[Change, ...], dtype: np.dtype[Any], memory: int | str | None, shard: Blocks) -> Blocks:
    """The shard's features in memory as ``dtype``; as they are stored if only that fits; else as they are, to be read anew.

    Args:
        changes: What is done to them as they are read.
        dtype: To compute in.
        memory: What the user lets the fit take; half of it is for these.
        shard: As stored.
    """
    with _KEEPING, all_threads():
        room = room_here() if memory is None else min(room_here(), bytes_of(memory) // 2)
        blocks = changed(shard, changes)
        if bytes_as(blocks, dtype) <= room:
            return in_memory(blocks, dtype)
        if bytes_as(shard, shard.dtype) <= room:
            return changed(in_memory(shard, shard.dtype), changes)
        return blocks


def ask(order: bytes, changes: tuple[Change, ...], shard: Blocks, *rows: Array | None) -> Any:
    """Has a work, which comes pickled, done on the shard, by as many threads as the worker has."""
    from distributed.protocol.pickle import loads

    work = loads(order)
    with all_threads():
        return work(changed(shard, changes), *rows)


def packed(array: Array) -> tuple[Array, int, np.dtype[Any]]:
    """An array (..., m) as it travels: zeros and ones as bits, other whole numbers in the smallest dtype.

    Returns:
        What `unpacked` takes.
    """
    rows, dtype = array.shape[-1], array.dtype
    if np.logical_or(array == 0, array == 1).all():
        return np.packbits(array.astype(bool), axis=-1), rows, dtype
    if dtype.kind in "iu":
        least, most = np.min_scalar_type(array.min()), np.min_scalar_type(array.max())
        array = array.astype(np.result_type(least, most))
    return np.ascontiguousarray(array), 0, dtype


def unpacked(array: Array, bits: int, dtype: np.dtype[Any]) -> Array:
    """Floats as they were, and whole numbers in whatever dtype holds them.

    Args:
        array: As it has travelled.
        bits: How many on the last axis, if it holds bits; else 0.
        dtype: Of what was sent.
    """
    if bits:
        return np.unpackbits(array, axis=-1, count=bits).astype(np.uint8 if dtype.kind in "iu" else dtype, copy=False)
    return array


def changed(blocks: Blocks, changes: tuple[Change, ...]) -> Blocks:
    """The blocks as they are read through all changes."""
    for change in changes:
        blocks = change(blocks)
    return blocks


def bytes_as(blocks: Blocks, dtype: npt.DTypeLike) -> int:
    """What they take in memory."""
    return blocks.shape[0] * blocks.shape[1] * np.dtype(dtype).itemsize


def room_here() -> int:
    """Bytes that this worker's process may take for features, now."""
    import psutil  # type: ignore[import-untyped,unused-ignore]
    from distributed import get_worker
    from distributed.system import MEMORY_LIMIT

    limit = get_worker().memory_manager.memory_limit or MEMORY_LIMIT
    return int(KEPT * limit) - int(psutil.Process().memory_info().rss)


def all_threads() -> AbstractContextManager[Any]:
    """Lets matrix products use all threads of the worker, for which Dask allows them one, as if each had a task."""
    from distributed import get_worker

    limited: AbstractContextManager[Any] = _libraries().limit(limits=get_worker().state.nthreads)
    return limited


@cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # looking for them takes milliseconds


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
                    raise ClusterError(f"{failure}, at the last of {TRIES} tries. {_NEXT}") from failure.__cause__
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
    rank, sets = task
    own = [[(changed(blocks, changes), *rows) for changes, blocks, *rows in shards] for shards in sets]
    with all_threads():
        return work(replace(rank, threads=worker.threads, stop=stop), *own)
