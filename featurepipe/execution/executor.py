"""What an executor is: it maps a function over shards of the work, in this process or on workers elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, TypeVar

C = TypeVar("C")
S = TypeVar("S")
R = TypeVar("R")

Stop = Callable[[], bool]
"""Whether the work is to come back with what it has."""
Report = Callable[[Any], object]
"""Told of progress: at once where work runs in this process, and with the shard's result where it runs elsewhere."""
Function = Callable[[Any, Any, "Worker", Stop, Report], R]
"""What is mapped: called with (context, shard, worker, stop, report). It is the same function whatever executor runs it, and a
function of a module or a `functools.partial` of one, so that it can travel."""


@dataclass(frozen=True)
class Worker:
    """The process that works on a shard, as the work sees it.

    Attributes:
        name: as its cluster calls it; empty for this process.
        threads: cores that it may use.
        memory: its limit in bytes, 0 for none.
        is_local: whether it is the process that asked for the work. Other processes have one thread a task at the same time.
        alone: a block in which no other task of the process runs: for a network, which a process has once.
    """

    name: str = ""
    threads: int = 1
    memory: int = 0
    is_local: bool = True
    alone: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, compare=False)


@dataclass(frozen=True)
class WorkerFacts:
    """A worker that is there, as the client sees it.

    Attributes:
        address: such as ``tcp://10.0.0.7:40123``; ``local`` for this process.
        name: as Dask calls it.
        host: its machine.
        pid: its process.
        threads: tasks that it takes at once, and threads that one task may use.
        memory_limit: bytes, 0 for none.
        gpus: NVIDIA devices that it sees.
        versions: of python, featurepipe, torch, torchvision, numpy, distributed.
    """

    address: str
    name: str
    host: str
    pid: int
    threads: int
    memory_limit: int
    gpus: int
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name} ({self.address}, {self.host})"


class Executor(Protocol):
    """Maps functions over shards.

    A context is what all shards of a `map` have in common: an object that can be pickled, and whose pickle leaves out what a
    process loads for itself. `LocalExecutor` hands it on as it is; elsewhere each process opens it once, and knows it by the
    digest of its bytes. If it has a method ``close``, a process elsewhere calls that when it needs the context no longer.

    Attributes:
        is_local: whether the work runs in this process, or in processes of this machine that it starts.
    """

    is_local: bool

    def check(self, store: str | PathLike[str] | None = None) -> object:
        """Refuses workers that are not fit: of other versions, or that do not see the store.

        Raises:
            ClusterError: none is left.
        """

    def workers(self) -> Sequence[WorkerFacts]:
        """The workers that are there now."""

    def expected(self) -> int:
        """How many workers to count on: those that are there, or may yet come; at least 1."""

    def map(
        self,
        function: Function[R],
        shards: Iterable[S],
        *,
        context: Any = None,
        stop: Stop = bool,
        report: Report = bool,
        ordered: bool = False,
        in_flight: int = 2,
        lookahead: int | None = None,
        retries: int = 3,
        interruptible: bool = True,
    ) -> Generator[tuple[S, R], None, None]:
        """Yields each shard with what the function returned, as they complete.

        Args:
            function: what is done with a shard.
            shards: pulled only when there is room, so that a shard may depend on results before.
            context: what all shards have in common.
            stop: whether to stop: nothing more is begun, and what is under way comes back with what it has.
            report: told what the function reports, before the shard is yielded.
            ordered: whether shards, and what is reported of them, come in their order. Those that come early wait, so give
                ``lookahead`` too. Once stopped, shards up to the first that was not begun are yielded.
            in_flight: shards that a worker has, with the one that it works on.
            lookahead: how many shards may be begun for each worker from the oldest unfinished one on, for whoever puts results
                in order and must not hold too many of them; None for any number.
            retries: how often a shard is tried again after an error that is not ours.
            interruptible: whether the function heeds ``stop``. One that does not is never begun a second time beside the first.

        Raises:
            ClusterError: no worker is left, the scheduler is gone, or a shard kills its workers.
            UsageError: the context cannot travel.
            FeaturepipeError: what the function raised, after what it had reported.
        """

    def once(self, function: Function[R], shard: Any = None, *, context: Any = None) -> R:
        """Has any one worker do one shard."""

    def each(self, question: Callable[[], Any]) -> Mapping[str, Any]:
        """Has each worker's process call a function, beside its work: answers, or exceptions instead, by address."""

    def require(self, refusal: Callable[[], str]) -> None:
        """Refuses workers that say why they are not fit for some work, before any of it; one too busy to answer stays.

        Args:
            refusal: called in each worker's process; empty if nothing speaks against it.

        Raises:
            ClusterError: none is left.
        """

    def refuse(self, address: str, why: str) -> None:
        """Uses a worker no longer, and says so."""

    def rows(self, features: Any) -> Any:
        """Features where heads learn from them: as they are, or spread over the workers."""

    def describe(self) -> dict[str, Any] | None:
        """The scheduler and the refused workers, for a record; None for this process."""

    def describe_workers(self) -> dict[str, Any] | None:
        """The scheduler, and how many workers, threads and hosts there are, for a bundle; None for this process."""
