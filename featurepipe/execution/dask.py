"""The executor on the workers of a Dask cluster, and its bounded dispatch of shards: as many in flight as they can use."""

from __future__ import annotations

import hashlib
import queue
import secrets
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from featurepipe.display import without_password
from featurepipe.errors import ClusterError, StoreError, UsageError
from featurepipe.execution.executor import (
    LOOK_SECONDS,
    RETURN_SECONDS,
    Arrived,
    BoundedFlow,
    Executor,
    Function,
    MapOptions,
    Room,
    TaskResult,
    to_stderr,
    told,
)
from featurepipe.execution.launchers import QUIET, ClusterTable, in_a_line, opened, read_spec
from featurepipe.execution.row_shards import SpreadFeatures, spread
from featurepipe.execution.worker import Attempt, Carried, ask_to_stop, pickled
from featurepipe.execution.worker_pool import WorkerPool

if TYPE_CHECKING:
    from distributed import Client, Future


S = TypeVar("S")
R = TypeVar("R")
INLINE_BYTES = 1 << 16
"""A context up to this size travels with every shard; a larger one is kept in a file of the store, for as long as it is used.

Dask could hold it as the result of a task, or scatter it. But it gives tasks to those workers first that have what they need,
and so all to one; and what it has scattered is lost with the workers that have it.
"""


class DaskExecutor(WorkerPool, Executor):
    """Maps functions on the workers of a Dask cluster. Made by `featurepipe.execution.connect`."""

    is_local = False

    def _results(
        self, function: Function[R], shards: Iterator[S], context: Any, options: MapOptions
    ) -> Generator[Arrived[S, R], None, None]:
        with self._carried(context) as carried:
            attempt = Attempt(function, carried, self.requirements, secrets.token_hex(8))
            yield from _Flow(self, shards, attempt, options).results()

    def side_by_side(self, room: Room) -> int:
        """See `Executor`."""
        tasks = [room.tasks(worker.threads, worker.memory_limit) for worker in self.workers()]
        least = min(tasks, default=0)
        return max(sum(tasks), self.expected() * least) if least else 0

    def read_once(self, read: Callable[[], Any]) -> Callable[[], Any]:
        """See `Executor`."""
        return read

    def rows(self, features: Any) -> SpreadFeatures:
        """See `Executor`."""
        return spread(features, self)

    def describe(self) -> dict[str, Any]:
        """See `Executor`."""
        return {"scheduler": self.address, "refused": dict(self.refused)}

    def describe_workers(self) -> dict[str, Any]:
        """See `Executor`."""
        workers = self.workers()
        return {
            "scheduler": without_password(self.address),
            "workers": len(workers),
            "threads": sum(worker.threads for worker in workers),
            "hosts": len({worker.host for worker in workers}),
        }

    @contextmanager
    def _carried(self, context: Any) -> Iterator[Carried | None]:
        """A context as it travels; its file is removed at the end of the block, or by `gc` should we be killed.

        Raises:
            UsageError: it cannot travel.
            StoreError: the store cannot be written.
        """
        if context is None:
            yield None
            return
        content = pickled(context)
        digest, token = hashlib.sha256(content).hexdigest(), self.requirements.token
        if len(content) <= INLINE_BYTES or token is None:
            yield Carried(digest, content)
            return
        file = Path(token).parent / f".context-{secrets.token_hex(8)}.tmp"
        try:
            try:
                file.write_bytes(content)
            except OSError as error:
                raise StoreError(f"cannot write into the store {file.parent}: {error.strerror}") from error
            yield Carried(digest, file=str(file))
        finally:
            with suppress(OSError):
                file.unlink(missing_ok=True)


CONNECT_SECONDS = 10.0


@contextmanager
def connect(spec: Any, *, say: Callable[[str], None] = to_stderr) -> Iterator[DaskExecutor]:
    """Connects to a cluster, or starts one, for as long as the block runs.

    Args:
        spec: a `distributed.Client` or cluster object; the scheduler's address (`tcp://host:8786`) or its file (`.json`);
            `local:2` for two processes here; a TOML file with a `[cluster]` table, or that table; or a `DaskExecutor`.
        say: where messages go; by default to standard error.

    Yields:
        The executor. What was opened here is closed at the end; a client or cluster that was given stays open.

    Raises:
        UsageError: the spec is none of these, or is for use with `await`.
        ClusterError: nobody answers at the address, the client is closed, or the cluster cannot be started.
    """
    from distributed import Client

    if getattr(spec, "asynchronous", False):
        raise UsageError(
            f"the {type(spec).__name__} is asynchronous, and waiting for it would block the loop that it runs in; give its "
            "scheduler's address, from a thread of its own (asyncio.to_thread), or one without asynchronous=True"
        )
    if isinstance(spec, DaskExecutor):
        yield spec
        return
    table = ClusterTable(kind="local")
    with ExitStack() as stack:
        if isinstance(spec, Client):
            client = spec
            if client.status == "closed":
                raise ClusterError("the Client is closed; give one that is open, or its scheduler's address")
        else:
            stack.enter_context(_quiet())
            where = {"address": spec}
            if not hasattr(spec, "scheduler_address"):
                table = read_spec(spec)
                where = stack.enter_context(opened(table))
            client = stack.enter_context(_client(where))
        executor = DaskExecutor(client, say=say, patience=table.patience, most=table.most)
        yield stack.enter_context(closing(executor))


@contextmanager
def _client(where: dict[str, Any]) -> Iterator[Client]:
    from distributed import Client

    at = " ".join(map(str, where.values()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatched versions")  # we look at versions ourselves
            client = Client(**where, timeout=CONNECT_SECONDS)
    except TypeError as error:  # Dask's, when it was told of no certificate
        raise ClusterError(
            f"{at} takes certificates, and none is set here: Dask reads them from its configuration "
            "(distributed.comm.tls.ca-file, .client.cert, .client.key), or from DASK_DISTRIBUTED__COMM__TLS__CA_FILE and so on; "
            "see SECURITY.md"
        ) from error
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"no scheduler answers at {at} ({in_a_line(error)}); is it running? Start one with: dask scheduler, "
            "and workers with: dask worker ADDRESS"
        ) from error
    try:
        yield client
    finally:
        with suppress(TimeoutError):
            client.close(timeout=5)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Dask's own log lines back while an executor is at work: what a user has to know, we say."""
    from distributed.utils import silence_logging_cmgr

    with ExitStack() as stack:
        for root in ("distributed", "tornado", "asyncio"):
            stack.enter_context(silence_logging_cmgr(level=QUIET, root=root))
        yield


ExecutorWhenNeeded: TypeAlias = "Callable[[], DaskExecutor | None]"
"""Gives the executor of a cluster; None where all is done in this process."""


@contextmanager
def executor_when_needed(cluster: Any, say: Callable[[str], None]) -> Iterator[ExecutorWhenNeeded]:
    """One executor for several commands, connected to when it is first needed.

    If its scheduler goes away, the next command that asks is given another.

    Args:
        cluster: what `connect` takes; None for this process.
        say: where messages go.

    Yields:
        A function that gives the executor; it raises `ClusterError` if that cannot be done.
    """
    with ExitStack() as stack:
        known: list[DaskExecutor] = []

        def executor() -> DaskExecutor | None:
            if cluster is not None and (not known or known[-1].scheduler.is_lost):
                known.append(stack.enter_context(connect(cluster, say=say)))
            return known[-1] if known else None

        yield executor


def in_this_process() -> None:
    """No executor of a cluster: all is done in this process."""


def cluster_name(cluster: Any) -> str | None:
    """Names what `connect` takes, for people and for a bundle: no password, no folder of this machine.

    Example:
        >>> cluster_name("tls://me:secret@head:8786"), cluster_name("/home/me/slurm.toml"), cluster_name({"kind": "ssh"})
        ('tls://head:8786', 'slurm.toml', 'ssh')
    """
    if cluster is None or (isinstance(cluster, Executor) and cluster.is_local):
        return None
    if isinstance(cluster, Mapping):
        cluster = cluster.get("scheduler") or cluster.get("kind")
    for name in ("address", "scheduler_address"):  # of a DaskExecutor and of a Dask cluster
        cluster = getattr(cluster, name, cluster)
    scheduler = getattr(cluster, "scheduler", None)  # of a Client
    text = str(cluster if scheduler is None else scheduler.address)
    return without_password(text) if "://" in text else Path(text).name


STRAGGLING = 3.0
"""At the end, a task that takes so many times the usual is begun a second time."""

RESULT_SECONDS = 10.0
"""How long to wait for a result that is there, and until a worker that did not hand one over is asked again."""

PAUSED_SECONDS = 30.0
"""From when on workers are looked at that send nothing: one whose memory is nearly full takes no task, and does not say so."""

MOST_REFUSALS = 16
"""Of one task; then something is wrong with more than a few workers."""


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
    """Dask chooses the worker, moves a task when its worker dies, and tries again after an error that may pass.

    A worker that `WorkerRefused` or the pool's requirements exclude is named, and its shard is done elsewhere. At the end, a
    shard that takes far longer than the others is begun a second time, and the first result counts.
    """

    def __init__(self, pool: WorkerPool, shards: Iterator[S], attempt: Attempt[R], options: MapOptions) -> None:
        super().__init__(shards, options)
        self.pool, self.attempt = pool, attempt
        self.done: queue.SimpleQueue[tuple[int, Future[TaskResult[R]]]] = queue.SimpleQueue()
        self.seconds: list[float] = []
        self.workers: list[str] = []
        self.stopping = self.late = False
        self.aside: list[tuple[int, Future[TaskResult[R]]]] = []  # results that could not be had
        self.silent: dict[str, float] = {}  # workers that did not hand one over, and when they are asked again
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
        aside, self.aside = self.aside, []
        for number, future in aside:
            self._await(number, future)
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
        if gone:  # Dask begins their tasks anew; doubled meanwhile, what kills workers would kill twice as many
            for pending in self.pending.values():
                pending.since = time.monotonic()
        if self.workers:
            self.alone_since = time.monotonic()
        elif self.pending and time.monotonic() - self.alone_since > self.pool.patience:
            raise self.pool.no_worker(self._undone())

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
                f"{self._undone()}; no worker has the memory to begin one: {'; '.join(paused)}. Give workers more memory, or "
                "start fewer on a machine, and give the same command again: it goes on where it was"
            )
        self.were_paused = are_paused

    def _undone(self) -> str:
        return f"{len(self.pending)} tasks are not done, the first: {told(self.pending[min(self.pending)].shard)}"

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
        pending = self.pending.get(number)
        if pending is None or future not in pending.futures:
            return  # another attempt was first
        answer = None if self._is_silent(future) else self._answer(pending, future)
        if answer is None:
            self.aside.append((number, future))
            return
        self.next_look_at_paused, self.were_paused = time.monotonic() + PAUSED_SECONDS, False
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
        """What an attempt has come to; None if its worker does not answer, or has died, and Dask makes it again."""
        try:
            return self.pool.result(future, told(pending.shard), RESULT_SECONDS)
        except OSError as error:
            if future.status == "error":
                raise  # the work's own
            if isinstance(error, TimeoutError):
                self.silent |= dict.fromkeys(self._holders(future), 0.0)
                return None
            raise self.pool.scheduler.lost() from error

    def _holders(self, future: Future[TaskResult[R]]) -> list[str]:
        return list(self.pool.scheduler.ask("who_has", keys=[future.key]).get(str(future.key), ()))

    def _is_silent(self, future: Future[TaskResult[R]]) -> bool:
        """Whether the worker that has a result did not hand over another one and does not answer, as it is asked now and then.

        Else each result of a worker that stands still would hold the client up by `RESULT_SECONDS`.
        """
        holders = self._holders(future) if self.silent else []
        for address in self.silent.keys() & holders:
            if time.monotonic() >= self.silent[address]:
                del self.silent[address]
                if isinstance(self.pool.each(bool, [address], LOOK_SECONDS)[address], Exception):
                    self.silent[address] = time.monotonic() + RESULT_SECONDS
        return bool(self.silent.keys() & holders)

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
        free = self.pool.idle(set(self.workers).difference(self.silent))
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
