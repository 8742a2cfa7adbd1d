"""Executors on this machine, in this process or in processes that it starts; and which executor a command was asked for."""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from concurrent.futures import Executor as ProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from featurepipe.display import first_names
from featurepipe.errors import ClusterError, DiskFull, FeaturepipeError
from featurepipe.execution.executor import (
    LOOK_SECONDS,
    RETURN_SECONDS,
    Arrived,
    BoundedFlow,
    Executor,
    Function,
    MapOptions,
    TaskResult,
    Worker,
    WorkerFacts,
    to_stderr,
    told,
)
from featurepipe.execution.worker import gpu_names, installed, pickled, unpickled
from featurepipe.interrupt import signals_held

if TYPE_CHECKING:
    from featurepipe.heads.blocks import Blocks
    from featurepipe.store import FeatureSet, FeatureStore

S = TypeVar("S")
R = TypeVar("R")

HERE = "local"
"""The address of this process."""

SHARED_BYTES = 1 << 20
"""Arrays of a context from this size on lie in memory once for all processes."""

ALIGNMENT = 64
"""Bytes to whose multiples shared arrays are aligned, as NumPy's own are for vector instructions."""

A_PROCESS = "a process of this machine"

PARENT_SECONDS = 0.2
"""Seconds between looks of a process whether the one that started it is still there."""


class LocalExecutor(Executor):
    """Maps functions in this process: one shard after the other, objects handed on as they are, errors not tried again."""

    is_local = True
    threads = 0  # of a process; 0 for all of the machine

    def check(self, store: str | PathLike[str] | None = None) -> list[str]:
        """See `Executor`; there is nothing to refuse."""
        del store
        return [HERE]

    def workers(self) -> list[WorkerFacts]:
        """This process."""
        threads, gpus = self.most_threads(), len(gpu_names())
        return [WorkerFacts(HERE, "", socket.gethostname(), os.getpid(), threads, 0, gpus, installed())]

    def most_threads(self) -> int:
        """See `Executor`."""
        return self.threads or os.cpu_count() or 1

    def count(self) -> int:
        """One."""
        return 1

    def _results(
        self, function: Function[R], shards: Iterator[S], context: Any, options: MapOptions
    ) -> Generator[Arrived[S, R], None, None]:
        worker = Worker(threads=self.most_threads())
        for number in count(1):
            if options.stop():  # asked before a shard is pulled, which may take long
                return
            try:
                shard = next(shards)
            except StopIteration:
                return
            yield number, shard, TaskResult(HERE, value=function(context, shard, worker, options.stop, options.report))

    def each(self, question: Callable[[], Any]) -> dict[str, Any]:
        """See `Executor`; the processes of a machine all give the same answer."""
        try:
            return {HERE: question()}
        except Exception as error:  # noqa: BLE001  # an answer, as of workers elsewhere
            return {HERE: error}

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


@contextmanager
def executor_on(cluster: Any, *, say: Callable[[str], None] = to_stderr) -> Iterator[Executor]:
    """The executor of a cluster, which stays connected for as long as the block runs; without one, this process.

    Args:
        cluster: what `featurepipe.execution.connect` takes, or an executor; None for this process.
        say: where messages go.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if cluster is None or isinstance(cluster, LocalExecutor):
        yield cluster or LocalExecutor()
        return
    from featurepipe.execution.dask import connect  # in here, for work in this process needs nothing of Dask

    with connect(cluster, say=say) as executor:
        yield executor


@contextmanager
def features_at(
    cluster: Any, features: FeatureSet, store: FeatureStore, say: Callable[[str], None]
) -> Iterator[Blocks]:
    """Features where heads work on them: as they are, or spread over a cluster's workers for as long as the block runs.

    Args:
        cluster: what `featurepipe.execution.connect` takes; None for here.
        features: some of the store's.
        store: which workers must see under the same path.
        say: where messages go.

    Raises:
        ClusterError: there is no such cluster, or none of its workers can be used.
    """
    with executor_on(cluster, say=say) as executor:
        executor.check(store.path)
        yield executor.rows(features)


class ProcessExecutor(LocalExecutor):
    """Maps functions in processes of this machine, which end with each `map` and with this process.

    Processes are joblib's loky, and share large arrays of the context. They take no signals: this process decides what becomes
    of the work. Errors are not tried again.

    Args:
        processes: how many work at once.
        threads: that each of them may use.
    """

    def __init__(self, processes: int, *, threads: int = 1) -> None:
        self.processes, self.threads = processes, threads

    def workers(self) -> list[WorkerFacts]:
        """The processes as they will be; they have no ids before they work."""
        [here] = super().workers()
        return [replace(here, name=str(number)) for number in range(self.processes)]

    def count(self) -> int:
        """See `Executor`."""
        return self.processes

    def _results(
        self, function: Function[R], shards: Iterator[S], context: Any, options: MapOptions
    ) -> Generator[Arrived[S, R], None, None]:
        with _shared(context) as shared, self._pool(shared) as pool:
            yield from _Flow(self, pool, shared, function, shards, options).results()

    @contextmanager
    def _pool(self, shared: _Shared) -> Iterator[ProcessPool]:
        """Processes, started as they are needed and ended with the block, whatever they do."""
        from joblib.externals.loky import ProcessPoolExecutor

        threads = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        given = os.getpid(), shared.folder
        pool = ProcessPoolExecutor(self.processes, initializer=end_with, initargs=given, env=threads)
        queue = pool._call_queue  # noqa: SLF001  # whose thread loky does not wait for: see below
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, kill_workers=True)
            queue._reader.close()  # noqa: SLF001  # what the thread may still write is for nobody
            if queue._thread:  # noqa: SLF001  # else the program's end may end it with a semaphore half given back
                queue._thread.join(RETURN_SECONDS)  # noqa: SLF001


THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
"""What libraries read, when they are loaded, to know how many threads they may start."""


@dataclass(frozen=True)
class _Shared:
    """What the processes of one `map` have in common, in a folder.

    Attributes:
        folder: where it is; a file ``stop`` appears in it when the work is to come back.
        ends: where the pickle of the context ends in the file ``context``, and the arrays after it; empty without a context.
    """

    folder: str
    ends: tuple[tuple[int, int], ...]

    def stopped(self) -> bool:
        """Whether the work is to come back."""
        return os.path.exists(os.path.join(self.folder, "stop"))  # noqa: PTH110, PTH118  # asked for every image: 2 us, not 10

    def stop(self) -> None:
        """Has the work come back."""
        (Path(self.folder) / "stop").touch()

    def context(self) -> Any:
        """The context; its large arrays are read-only and the pages of the file, which all processes share."""
        if not self.ends:
            return None
        with (Path(self.folder) / "context").open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        pickle_, *arrays = (content[start:stop] for start, stop in self.ends)
        return unpickled(pickle_, arrays, who=A_PROCESS)


@contextmanager
def _shared(context: Any) -> Iterator[_Shared]:
    """A folder with the context, which is there as long as the block runs; if we are killed, a process removes it."""
    arrays: list[pickle.PickleBuffer] = []

    def large(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < SHARED_BYTES:
            return True  # stays in the pickle
        arrays.append(buffer)
        return False

    pieces: list[bytes | memoryview] = []
    if context is not None:
        pieces = [pickled(context, large), *(array.raw() for array in arrays)]
    folder = _folder_for(sum(map(len, pieces)))
    try:
        yield _Shared(folder, _written(Path(folder) / "context", pieces))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder_for(size: int) -> str:
    """A new folder in shared memory if there is plenty, else where temporary files go."""
    memory = Path("/dev/shm")  # noqa: S108  # a folder of its own is made in it
    has_room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * size
    return tempfile.mkdtemp(prefix="featurepipe-", dir=memory if has_room else None)


def _written(path: Path, pieces: Sequence[bytes | memoryview]) -> tuple[tuple[int, int], ...]:
    ends: list[tuple[int, int]] = []
    try:
        with path.open("wb") as file:
            for piece in pieces:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                start = file.tell()
                file.write(piece)
                ends.append((start, file.tell()))
    except OSError as error:
        size = sum(map(len, pieces)) / 2**20
        raise DiskFull(
            f"cannot write {size:,.0f} MiB, which processes of this machine share, to {path.parent} ({error.strerror}); "
            "set TMPDIR to a folder with more space, or use one process"
        ) from error
    return tuple(ends)


class _Flow(BoundedFlow[S, tuple[S, "Future[TaskResult[R]]"], R], Generic[S, R]):
    """The shards of one `map` on their way to processes and back."""

    def __init__(
        self,
        executor: ProcessExecutor,
        pool: ProcessPool,
        shared: _Shared,
        function: Function[R],
        shards: Iterator[S],
        options: MapOptions,
    ) -> None:
        super().__init__(shards, options)
        self.executor, self.pool, self.shared, self.function = executor, pool, shared, function

    def run(self) -> Iterator[Arrived[S, R]]:
        stopping = False
        while True:
            if not stopping and self.options.stop():
                stopping = self.exhausted = True
                self.shared.stop()
            self.fill()
            if not self.pending:
                return
            numbers = {future: number for number, (_, future) in self.pending.items()}
            done = wait(numbers, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED).done
            while done:  # so that no result is kept once it is yielded
                yield self._take(numbers.pop(done.pop()))

    def usable(self) -> int:
        return self.executor.processes

    def begin(self, number: int, shard: S) -> None:
        task = pickled((self.function, shard))
        with self._reporting_the_killed(shard), signals_held():  # it may start processes
            self.pending[number] = shard, self.pool.submit(_attempt, task, self.shared, self.executor.threads)

    def _take(self, number: int) -> Arrived[S, R]:
        shard, future = self.pending[number]
        with self._reporting_the_killed(shard):
            result = future.result()
        del self.pending[number]
        return number, shard, result

    @contextmanager
    def _reporting_the_killed(self, shard: S) -> Iterator[None]:
        try:
            yield
        except BrokenExecutor as error:
            begun = [told(shard) for _, (shard, _) in sorted(self.pending.items())] or [told(shard)]
            some = first_names(begun, 4)
            self.pending.clear()
            raise ClusterError(
                f"a process of this machine was killed, or crashed, while {some} had been begun: the system ends processes when "
                "memory is short (see its log), or something in one of these crashes it. Use fewer processes at a time, or give "
                "the machine more memory, then give the same command again"
            ) from error

    def dismiss(self) -> None:
        """See `BoundedFlow`; what does not come back ends with its process."""
        if self.pending:
            self.shared.stop()
            wait([future for _, future in self.pending.values()], RETURN_SECONDS if self.options.interruptible else 0.0)


def _attempt(task: bytes, shared: _Shared, threads: int) -> TaskResult[Any]:
    """One attempt in a process. Errors of ours are results, so that what was reported before them comes, too."""
    name, reported = str(os.getpid()), list[Any]()
    if shared.stopped():
        return TaskResult(name, begun=False)
    start, worker = time.perf_counter(), Worker(name, threads, is_local=False)
    try:
        context = _opened(shared)
        function, shard = unpickled(task, who=A_PROCESS)
        value = function(context, shard, worker, shared.stopped, reported.append)
    except FeaturepipeError as error:
        return TaskResult(name, error=error, reported=reported)
    return TaskResult(name, time.perf_counter() - start, value, reported=reported)


@lru_cache(maxsize=1)
def _opened(shared: _Shared) -> Any:
    """The context, of which a process has one object."""
    return shared.context()


def end_with(parent: int, folder: str = "") -> None:
    """Ends this process as soon as its parent is another one than ``parent``, and removes a folder that the parent has left.

    A process that is killed cannot end those it has started. They would go on with their fits, beside those of the next call,
    for seconds or minutes, for nobody.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="featurepipe-parent", daemon=True).start()
