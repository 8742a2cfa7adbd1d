"""A Dask client whose two workers are threads of the test's process, for what `DaskExecutor` and commands decide themselves.

All of our code runs: dispatch, refusals, contexts, row shards, what workers do. Functions, arguments and results are pickled.
What is missing is Dask's own: processes, connections, workers that are lost, actors and semaphores; and what only a
process has: an id, modules and memory of its own. `tests/execution/test_contract.py` holds for it as for the others.
"""

import asyncio
import itertools
import pickle
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from distributed import CancelledError

from featurepipe.execution import DaskExecutor

SECONDS = 60.0
"""After which a task that others wait for is taken to hang."""

MEMORY = 64 << 30
"""Bytes that each worker may use: more than the tests' process has."""


class Future:
    """What a task comes to: of `distributed.Future` what our code uses."""

    def __init__(self, key: str) -> None:
        self.key, self.status, self.value = key, "pending", None
        self._ended, self._changing = threading.Event(), threading.Lock()
        self._callbacks: list[Callable[[Future], object]] = []

    def end(self, status: str, value: Any = None) -> None:
        """Notes how the task has ended, the first time."""
        with self._changing:
            if self._ended.is_set():
                return
            self.status, self.value = status, value
            self._ended.set()
        for callback in self._callbacks:
            callback(self)

    def add_done_callback(self, callback: Callable[["Future"], object]) -> None:
        with self._changing:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def done(self) -> bool:
        """Whether the task has ended; waits for it, so that nobody needs `distributed.wait`."""
        return self._ended.wait(SECONDS)

    def kept(self) -> Any:
        """The result where it is; or the task's exception is raised."""
        assert self.done(), f"{self.key} did not end"
        if self.status == "cancelled":
            raise CancelledError(self.key)
        if self.status == "error":
            raise self.value
        return self.value

    def result(self, timeout: float | None = None) -> Any:
        """The result as it travels."""
        return pickle.loads(cloudpickle.dumps(self.kept()))

    def cancel(self) -> None:
        self.end("cancelled")

    def release(self) -> None:
        """It goes with the last that knows it."""


@dataclass(frozen=True)
class Task:
    """What a worker is to do.

    Attributes:
        future: of its result.
        content: the pickled function and arguments, the latter as (whether another task's result, value).
        awaited: whose results are arguments.
        retries: how often it is tried again.
        is_bound: whether only the worker that has it may do it.
    """

    future: Future
    content: bytes
    awaited: list[Future]
    retries: int
    is_bound: bool


class Worker:
    """A thread that does tasks one after the other; its attributes are those of `distributed.Worker`."""

    def __init__(self, number: int, scheduler: "Scheduler") -> None:
        self.name, self.address = str(number), f"tcp://127.0.0.1:{number + 2}"
        self.memory_manager, self.state = SimpleNamespace(memory_limit=MEMORY), SimpleNamespace(nthreads=1)
        self.tasks: list[Task] = []
        self.running: Task | None = None
        self.thread = threading.Thread(target=self._work, args=(scheduler,), name=f"worker {number}", daemon=True)

    def _work(self, scheduler: "Scheduler") -> None:
        _THREAD.worker = self
        while (task := scheduler.next_task(self)) is not None:
            self._do(task.future, task.content, task.awaited, task.retries)
            del task

    def processing(self) -> list[str]:
        """Keys of the tasks that it has."""
        return [task.future.key for task in (self.running, *self.tasks) if task is not None]

    def _do(self, future: Future, content: bytes, awaited: list[Future], retries: int) -> None:
        for left in range(retries, -1, -1):
            if future.status == "cancelled":
                return
            try:
                function, arguments = pickle.loads(content)
                values = iter([each.kept() for each in awaited])
                found = function(*(next(values) if is_result else value for is_result, value in arguments))
            except BaseException as error:  # noqa: BLE001  # which the client raises; those of pytest, too
                if not left or not isinstance(error, Exception):
                    future.end("error", error)
            else:
                future.end("finished", found)
                return

    def call(self, function: Callable[[], Any]) -> Any:
        """Calls a function beside the tasks."""
        _THREAD.worker = self
        try:
            return function()
        finally:
            del _THREAD.worker

    def identity(self) -> dict[str, Any]:
        return {"id": self.name, "nthreads": 1, "memory_limit": MEMORY, "host": socket.gethostname()}


_THREAD = threading.local()


def get_worker() -> Worker:
    """`distributed.get_worker`, in the thread of a worker."""
    if not hasattr(_THREAD, "worker"):
        raise ValueError("no worker found")
    found: Worker = _THREAD.worker
    return found


class Scheduler:
    """Gives tasks to workers, and answers what a client asks."""

    address = "tcp://127.0.0.1:1"

    def __init__(self, count: int) -> None:
        self.workers = {worker.address: worker for worker in (Worker(number, self) for number in range(count))}
        self._changed, self._is_closed = threading.Condition(), False
        self._holders: dict[str, str] = {}
        for worker in self.workers.values():
            worker.thread.start()

    def add(self, task: Task, named: list[str]) -> None:
        """Gives a task to that of some workers, or of all, which has the least to do."""
        with self._changed:
            some = [self.workers[address] for address in named or self.workers]
            min(some, key=lambda worker: len(worker.processing())).tasks.append(task)
            self._changed.notify_all()

    def next_task(self, worker: Worker) -> Task | None:
        """A worker's own next task, or what another one may leave to it; waits for one. None at the end."""
        with self._changed:
            worker.running = None
            while not self._is_closed:
                left = (
                    one for one in self.workers.values() if one.running and any(not task.is_bound for task in one.tasks)
                )
                source = worker if worker.tasks else next(left, None)
                if source is not None:
                    place = 0 if source is worker else [task.is_bound for task in source.tasks].index(False)
                    worker.running = source.tasks.pop(place)
                    self._holders[worker.running.future.key] = worker.address
                    return worker.running
                self._changed.wait(SECONDS)
        return None

    def close(self) -> None:
        """Ends the workers once they have done what they have begun."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for worker in self.workers.values():
            worker.thread.join(SECONDS)
            assert not worker.thread.is_alive(), f"a task of worker {worker.name} does not come back"

    async def ncores(self, workers: None) -> dict[str, int]:
        return dict.fromkeys(self.workers, 1)

    async def identity(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {address: worker.identity() for address, worker in self.workers.items()}}

    async def who_has(self, keys: list[str]) -> dict[str, list[str]]:
        return {key: [self._holders[key]] for key in keys if key in self._holders}

    async def processing(self, workers: list[str] | None) -> dict[str, list[str]]:
        with self._changed:
            return {address: self.workers[address].processing() for address in (workers or self.workers)}


class Client:
    """Of `distributed.Client` what `DaskExecutor` uses."""

    status = "running"

    def __init__(self, count: int = 2) -> None:
        self.scheduler = Scheduler(count)
        self._numbers = itertools.count()

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        key: str = "",
        workers: Any = None,
        retries: int = 0,
        **_: Any,
    ) -> Future:
        """Begins a task."""
        future = Future(key or f"task-{next(self._numbers)}")
        marked = [(True, None) if isinstance(each, Future) else (False, each) for each in arguments]
        awaited = [each for each in arguments if isinstance(each, Future)]
        named = [workers] if isinstance(workers, str) else list(workers or ())
        task = Task(future, cloudpickle.dumps((function, marked)), awaited, retries, is_bound=bool(named))
        self.scheduler.add(task, named)
        return future

    def sync(self, function: Callable[[], Awaitable[Any]]) -> Any:
        return asyncio.run(function())  # type: ignore[arg-type]

    async def run(self, function: Callable[[], Any], workers: list[str]) -> dict[str, Any]:
        """Calls a function as each worker's process would."""
        return {address: await asyncio.to_thread(self.scheduler.workers[address].call, function) for address in workers}

    async def run_on_scheduler(self, function: Callable[[], Any]) -> Any:
        return function()

    def subscribe_topic(self, topic: str, handler: Callable[[Any], object]) -> None:
        """No worker is ended for its memory."""

    def unsubscribe_topic(self, topic: str) -> None:
        """See above."""


@contextmanager
def executor_on_threads(say: Callable[[str], None]) -> Iterator[DaskExecutor]:
    """An executor on two such workers, for as long as the block runs."""
    from featurepipe.execution import worker

    worker._refusal.cache_clear()
    contexts: dict[str, Any] = {}
    client: Any = Client()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distributed.get_worker", get_worker)
        patch.setattr(worker, "_CONTEXTS", contexts)
        executor = DaskExecutor(client, say=say)
        try:
            yield executor
        finally:
            executor.close()
            client.scheduler.close()
            for entry in contexts.values():
                getattr(entry.context, "close", bool)()
