"""What an executor is: it maps a function over shards of the work, in this process or on workers elsewhere."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any, Generic, NamedTuple, TypeVar

from featurepipe.display import displayed
from featurepipe.errors import ClusterError, FeaturepipeError

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
    alone: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, compare=False)

    def live(self, report: Report) -> Report:
        """Tells what counts only at once; from elsewhere it would come with the result, and is not told."""
        return report if self.is_local else bool

    def signed(self, line: str) -> str:
        """A line for the user that says which worker it comes from; lines of this process stay as they are."""
        return line if self.is_local else f"worker {self.name}: {line}"


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


@dataclass(frozen=True)
class TaskResult(Generic[R]):
    """What came of one attempt; exactly one of value, refused, error and begun says it.

    Attributes:
        worker: the address of the worker that made it.
        seconds: how long it took.
        value: what the work returned.
        refused: why this worker must not be used.
        error: an error that no other attempt would avoid.
        reported: what the function reported, and the caller was not told yet.
        begun: False for a task that was not begun, because a stop had been asked for.
    """

    worker: str
    seconds: float = 0.0
    value: R | None = None
    refused: str = ""
    error: FeaturepipeError | None = None
    begun: bool = True
    reported: Sequence[Any] = ()


Arrived = tuple[int, S, TaskResult[R]]
"""The number of a shard, from 1 on, the shard, and its result."""


@dataclass(frozen=True)
class MapOptions:
    """How shards are mapped; the fields are arguments of `Executor.map`."""

    stop: Stop = bool
    report: Report = bool
    in_flight: int = 2
    lookahead: int | None = None
    retries: int = 3
    interruptible: bool = True


MEMORY_USED = 0.6
"""Of a worker's memory limit: what tasks that go side by side may take; from there on Dask moves data to disk."""


class Room(NamedTuple):
    """What tasks that go side by side take, in bytes: what all of a process share, and what each takes beside it."""

    shared: int
    each: int

    def tasks(self, threads: int, memory_limit: int) -> int:
        """How many there may be at a time in a worker with so many threads, and so much memory, 0 for any."""
        if not memory_limit:
            return threads
        return min(threads, max(0, int(MEMORY_USED * memory_limit - self.shared) // self.each))


class Executor(ABC):
    """Maps functions over shards.

    A context is what all shards of a `map` have in common: an object that can be pickled, and whose pickle leaves out what a
    process loads for itself. `LocalExecutor` hands it on as it is; elsewhere each process opens it once, and knows it by the
    digest of its bytes. If it has a method ``close``, a process elsewhere calls that when it needs the context no longer.

    Attributes:
        is_local: whether the work runs in this process, or in processes of this machine that it starts.
    """

    is_local: bool

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
            report: told what the function reports, before the shard is yielded; in this process at once.
            ordered: whether shards, and what is reported of them, come in their order. Those that come early wait, so give
                ``lookahead`` too. Once stopped, shards up to the first that was not begun are yielded.
            in_flight: shards that a worker has, with the one that it works on.
            lookahead: how many shards may be begun for each worker from the oldest unfinished one on, for whoever puts results
                in order and must not hold too many of them; None for any number.
            retries: how often a shard is tried again after an error that is not ours; on this machine, none is.
            interruptible: whether the function heeds ``stop``. One that does not is never begun a second time beside the first.

        Raises:
            ClusterError: no worker is left, the scheduler is gone, or a shard kills its workers or processes.
            UsageError: the context cannot travel.
            DiskFull: there is no room for a context that processes of this machine share.
            FeaturepipeError: what the function raised, after what it had reported.
        """
        options = MapOptions(stop, report, in_flight, lookahead, retries, interruptible)
        with closing(self._results(function, iter(shards), context, options)) as arrived:
            results = _without_errors(arrived, report)
            for _, shard, result in in_order(results) if ordered else results:
                for said in result.reported:
                    report(said)
                yield shard, result.value  # type: ignore[misc]  # a value, since it is neither refused nor an error

    def once(self, function: Function[R], shard: Any = None, *, context: Any = None) -> R:
        """Has any one worker do one shard."""
        with closing(self.map(function, [shard], context=context)) as results:
            for _, result in results:
                return result
        raise ClusterError("no worker answered; give the same command again")

    @abstractmethod
    def _results(
        self, function: Function[R], shards: Iterator[S], context: Any, options: MapOptions
    ) -> Generator[Arrived[S, R], None, None]:
        """The results of shards as they arrive, errors of the function among them."""

    @abstractmethod
    def check(self, store: str | PathLike[str] | None = None) -> object:
        """Refuses workers that are not fit: of other versions, or that do not see the store.

        Raises:
            ClusterError: none is left.
        """

    @abstractmethod
    def workers(self) -> Sequence[WorkerFacts]:
        """The workers that are there now; each is asked who it is."""

    @abstractmethod
    def count(self) -> int:
        """How many workers are there now."""

    def most_threads(self) -> int:
        """How many threads a worker has at most, which is how many tasks one elsewhere takes at the same time."""
        return max((worker.threads for worker in self.workers()), default=1)

    def expected(self) -> int:
        """How many workers to count on: those that are there, or may yet come; at least 1."""
        return max(self.count(), 1)

    @abstractmethod
    def each(self, question: Callable[[], Any]) -> Mapping[str, Any]:
        """Has each worker's process call a function, beside its work: answers, or exceptions instead, by address."""

    @abstractmethod
    def require(self, refusal: Callable[[], str]) -> None:
        """Refuses workers that say why they are not fit for some work, before any of it; one too busy to answer stays.

        Args:
            refusal: called in each worker's process; empty if nothing speaks against it.

        Raises:
            ClusterError: none is left.
        """

    @abstractmethod
    def refuse(self, address: str, why: str) -> None:
        """Uses a worker no longer, and says so."""

    def side_by_side(self, room: Room) -> int:
        """How many tasks workers elsewhere can do at the same time, one a thread; 0 if one is too much for the smallest's memory.

        Of a cluster that grows with its work, the workers that may yet come count, too.
        """
        del room
        return 0

    def read_once(self, read: Callable[[], Any]) -> Callable[[], Any]:
        """What processes read alike, for a context: read now, since those of this machine share it; elsewhere by each of them."""
        return partial(same, read())

    def rows(self, features: Any) -> Any:
        """Features where heads learn from them: as they are, or spread over the workers."""
        return features

    def describe(self) -> dict[str, Any] | None:
        """The scheduler and the refused workers, for a record; None for this process, of which a record says it by itself."""
        return None

    def describe_workers(self) -> dict[str, Any] | None:
        """The scheduler, and how many workers, threads and hosts there are, for a bundle; None for this process."""
        return None


def same(value: Any) -> Any:
    """What it is given."""
    return value


def _without_errors(results: Iterable[Arrived[S, R]], report: Report) -> Iterator[Arrived[S, R]]:
    """Results of tasks that were begun, up to the first with an error, which is raised once its reports are told."""
    for number, shard, result in results:
        if result.error is not None:
            for said in result.reported:
                report(said)
            raise result.error
        if result.begun:
            yield number, shard, result


def in_order(results: Iterable[Arrived[S, R]]) -> Iterator[Arrived[S, R]]:
    """Results by their numbers; those that come early wait, and those after one that never comes are dropped."""
    waiting: dict[int, Arrived[S, R]] = {}
    following = 1
    for arrived in results:
        waiting[arrived[0]] = arrived
        while following in waiting:
            yield waiting.pop(following)
            following += 1


LOOK_SECONDS = 0.5
"""How often workers are counted and a stop is asked about while no answer comes."""

RETURN_SECONDS = 10.0
"""How long tasks that are no longer wanted may take to come back with what they have."""

P = TypeVar("P")


class BoundedFlow(ABC, Generic[S, P, R]):
    """Begins shards only while there is room for them: a flow never holds more than its workers can use.

    Args:
        shards: pulled when there is room.
        options: bounds of the flow.

    Attributes:
        pending: what was begun and has no result, by the number of its shard.
        count: the number of the shard begun last.
        exhausted: whether nothing more is begun.
    """

    def __init__(self, shards: Iterator[S], options: MapOptions) -> None:
        self.shards, self.options = shards, options
        self.pending: dict[int, P] = {}
        self.count = 0
        self.exhausted = False

    def results(self) -> Generator[Arrived[S, R], None, None]:
        """Yields results as they arrive; whatever ends it, what is under way is called back."""
        try:
            yield from self.run()
        finally:
            self.dismiss()

    @abstractmethod
    def run(self) -> Iterator[Arrived[S, R]]:
        """Begins shards and yields their results, until all are done or a stop is asked for."""

    @abstractmethod
    def dismiss(self) -> None:
        """Calls back what is still under way, and waits a little for it."""

    @abstractmethod
    def begin(self, number: int, shard: S) -> None:
        """Begins a shard, and enters it into ``pending``."""

    @abstractmethod
    def usable(self) -> int:
        """How many workers to count on."""

    def fill(self) -> None:
        """Begins shards while there is room."""
        room = self.options.in_flight * self.usable()
        while not self.exhausted and len(self.pending) < room and not self.is_held():
            try:
                shard = next(self.shards)
            except StopIteration:
                self.exhausted = True
                return
            self.count += 1
            self.begin(self.count, shard)

    def is_held(self) -> bool:
        """Whether enough has been begun beyond the oldest shard without a result."""
        lookahead = self.options.lookahead
        if lookahead is None or not self.pending:
            return False
        return self.count - min(self.pending) >= lookahead * self.usable()


def told(task: object) -> str:
    """A task in a message."""
    text = str(task)
    return text if len(text) <= 200 else f"{text[:200]}..."


def to_stderr(text: str) -> None:
    """Where messages of an executor go by default."""
    print(displayed(text), file=sys.stderr)
