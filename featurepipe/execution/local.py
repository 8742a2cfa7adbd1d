"""Executors on this machine: in this process, or in processes that it starts."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from os import PathLike
from typing import Any, TypeVar

from featurepipe.errors import ClusterError
from featurepipe.execution.executor import Function, Report, Stop, Worker, WorkerFacts
from featurepipe.execution.worker import gpu_names, installed

S = TypeVar("S")
R = TypeVar("R")

HERE = "local"
"""The address of this process."""

PARENT_SECONDS = 0.2
"""Seconds between looks of a process whether the one that started it is still there."""


class LocalExecutor:
    """`featurepipe.execution.executor.Executor` in this process: one shard after the other, objects handed on as they are."""

    is_local = True

    def check(self, store: str | PathLike[str] | None = None) -> list[str]:
        """See `Executor`; there is nothing to refuse."""
        del store
        return [HERE]

    def workers(self) -> list[WorkerFacts]:
        """This process."""
        threads, gpus = os.cpu_count() or 1, len(gpu_names())
        return [WorkerFacts(HERE, "", socket.gethostname(), os.getpid(), threads, 0, gpus, installed())]

    def expected(self) -> int:
        """One."""
        return 1

    def map(
        self,
        function: Function[R],
        shards: Iterable[S],
        *,
        context: Any = None,
        stop: Stop = bool,
        report: Report = bool,
        ordered: bool = False,
        in_flight: int = 1,
        lookahead: int | None = None,
        retries: int = 0,
        interruptible: bool = True,
    ) -> Generator[tuple[S, R], None, None]:
        """See `Executor`. Errors are not tried again, and ``report`` is told at once."""
        del ordered, in_flight, lookahead, retries, interruptible
        worker = Worker(threads=os.cpu_count() or 1)
        for shard in shards:
            if stop():
                return
            yield shard, function(context, shard, worker, stop, report)

    def once(self, function: Function[R], shard: Any = None, *, context: Any = None) -> R:
        """See `Executor`."""
        return next(self.map(function, [shard], context=context))[1]

    def each(self, question: Callable[[], Any]) -> dict[str, Any]:
        """See `Executor`."""
        return {HERE: question()}

    def require(self, refusal: Callable[[], str]) -> None:
        """See `Executor`."""
        if why := refusal():
            raise ClusterError(f"this process cannot do it: {why}")

    def refuse(self, address: str, why: str) -> None:
        """Cannot be: nobody else is there.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"the only worker, {address}, cannot be refused: {why}")

    def rows(self, features: Any) -> Any:
        """The features as they are."""
        return features

    def describe(self) -> None:
        """Nothing: a record says by itself where it was made."""
        return

    def describe_workers(self) -> None:
        """Nothing, as `describe`."""
        return


class ProcessExecutor(LocalExecutor):
    """`featurepipe.execution.executor.Executor` in processes of this machine, which end with this one; by joblib's loky.

    ``stop`` is asked between results, and ends the processes.

    Args:
        processes: how many work at once.
        threads: that each of them may use.
    """

    def __init__(self, processes: int, *, threads: int = 1) -> None:
        self.processes, self.threads = processes, threads

    def expected(self) -> int:
        """See `Executor`."""
        return self.processes

    def map(
        self,
        function: Function[R],
        shards: Iterable[S],
        *,
        context: Any = None,
        stop: Stop = bool,
        report: Report = bool,
        ordered: bool = False,
        in_flight: int = 1,
        lookahead: int | None = None,
        retries: int = 0,
        interruptible: bool = True,
    ) -> Generator[tuple[S, R], None, None]:
        """See `Executor`. Large arrays of the context are shared by memory maps."""
        del in_flight, lookahead, retries, interruptible
        from joblib import Parallel, delayed, parallel_config

        how = "generator" if ordered else "generator_unordered"
        ends = {"initializer": end_with, "initargs": (os.getpid(),)}
        with parallel_config("loky", n_jobs=self.processes, inner_max_num_threads=self.threads, **ends):
            tasks = (delayed(_attempt)(function, context, shard, self.threads) for shard in shards)
            done: Iterator[tuple[S, R, list[Any]]] = Parallel(return_as=how)(tasks)
            for shard, result, reported in done:
                for said in reported:
                    report(said)
                yield shard, result
                if stop():
                    return


def _attempt(function: Function[R], context: Any, shard: S, threads: int) -> tuple[S, R, list[Any]]:
    reported: list[Any] = []
    worker = Worker(str(os.getpid()), threads, is_local=False)
    return shard, function(context, shard, worker, bool, reported.append), reported


def end_with(parent: int) -> None:
    """Ends this process as soon as its parent is another one than ``parent``: called in each process when it starts.

    A process that is killed cannot end those it has started. They would go on with their fits, beside those of the next call,
    for seconds or minutes, for nobody.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="featurepipe-parent", daemon=True).start()
