"""Executors on this machine: in this process, or in processes that it starts."""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from concurrent.futures import Executor as ProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, Generic, TypeVar

from featurepipe.errors import ClusterError, DiskFull, FeaturepipeError, WorkerRefused
from featurepipe.execution.dispatch import LOOK_SECONDS, RETURN_SECONDS, Arrived, in_order, told
from featurepipe.execution.executor import Function, Report, Stop, Worker, WorkerFacts
from featurepipe.execution.worker import TaskResult, gpu_names, installed, pickled

S = TypeVar("S")
R = TypeVar("R")

HERE = "local"
"""The address of this process."""

SHARED_BYTES = 1 << 20
"""Arrays of a context from this size on lie in memory once for all processes."""

ALIGNMENT = 64
"""Bytes to whose multiples shared arrays are aligned, as NumPy's own are for vector instructions."""

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
        left = iter(shards)
        while not stop():  # asked before a shard is pulled, which may take long
            try:
                shard = next(left)
            except StopIteration:
                return
            yield shard, function(context, shard, worker, stop, report)

    def once(self, function: Function[R], shard: Any = None, *, context: Any = None) -> R:
        """See `Executor`."""
        with closing(self.map(function, [shard], context=context)) as results:
            return next(results)[1]

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
    """`featurepipe.execution.executor.Executor` in processes of this machine, which end with each `map` and with this process.

    Processes are joblib's loky. They take no signals: this process decides what becomes of the work.

    Args:
        processes: how many work at once.
        threads: that each of them may use.
    """

    def __init__(self, processes: int, *, threads: int = 1) -> None:
        self.processes, self.threads = processes, threads

    def workers(self) -> list[WorkerFacts]:
        """The processes as they will be; they have no ids before they work."""
        [here] = super().workers()
        return [replace(here, name=str(number), threads=self.threads) for number in range(self.processes)]

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
        in_flight: int = 2,
        lookahead: int | None = None,
        retries: int = 0,
        interruptible: bool = True,
    ) -> Generator[tuple[S, R], None, None]:
        """See `Executor`. Processes share large arrays of the context. Errors are not tried again.

        Raises:
            ClusterError: a process was killed.
            UsageError: the context cannot travel.
            DiskFull: there is no room for the context, neither in shared memory nor in the folder for temporary files.
        """
        del retries
        with _shared(context) as shared, self._pool(shared) as pool:
            flow = _Flow(self, pool, shared, function, iter(shards), report, in_flight, lookahead)
            try:
                results = flow.run(stop)
                for _, shard, result in in_order(results) if ordered else results:
                    for said in result.reported:
                        report(said)
                    yield shard, result.value  # type: ignore[misc]  # a value, since it is no error
            finally:
                flow.dismiss(RETURN_SECONDS if interruptible else 0.0)

    @contextmanager
    def _pool(self, shared: _Shared) -> Iterator[ProcessPool]:
        """Processes, started as they are needed and ended with the block, whatever they do."""
        from multiprocessing import resource_tracker

        from joblib.externals.loky import ProcessPoolExecutor

        resource_tracker.ensure_running()  # started later, it would let signals through that `_signals_held` holds back
        threads = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        given = os.getpid(), shared.folder
        pool = ProcessPoolExecutor(self.processes, initializer=_begin_process, initargs=given, env=threads)
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, kill_workers=True)


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
        try:
            return pickle.loads(pickle_, buffers=arrays)  # noqa: S301  # of our parent
        except (ImportError, AttributeError) as error:
            raise WorkerRefused(f"a process of this machine lacks what the work needs: {error}") from error


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


class _Flow(Generic[S, R]):
    """Bounded dispatch of the shards of one `map` to processes."""

    def __init__(
        self,
        executor: ProcessExecutor,
        pool: ProcessPool,
        shared: _Shared,
        function: Function[R],
        shards: Iterator[S],
        report: Report,
        in_flight: int,
        lookahead: int | None,
    ) -> None:
        self.pool, self.shared, self.function, self.shards, self.report = pool, shared, function, shards, report
        self.threads = executor.threads
        self.room = in_flight * executor.processes
        self.ahead = None if lookahead is None else lookahead * executor.processes
        self.pending: dict[Future[TaskResult[R]], tuple[int, S]] = {}
        self.count = 0
        self.exhausted = False

    def run(self, stop: Stop) -> Iterator[Arrived[S, R]]:
        stopping = False
        while True:
            if not stopping and stop():
                stopping = self.exhausted = True
                self.shared.stop()
            self._fill()
            if not self.pending:
                return
            done = wait(self.pending, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED).done
            while done:  # so that no result is kept once it is yielded
                yield from self._take(done.pop())

    def _fill(self) -> None:
        while not self.exhausted and len(self.pending) < self.room and not self._is_held():
            try:
                shard = next(self.shards)
            except StopIteration:
                self.exhausted = True
                return
            self.count += 1
            task = pickled((self.function, shard))
            with self._reporting_the_killed(shard), _signals_held():  # it may start processes
                future = self.pool.submit(_attempt, task, self.shared, self.threads)
            self.pending[future] = self.count, shard

    def _is_held(self) -> bool:
        """Whether enough has been begun beyond the oldest shard without a result."""
        if self.ahead is None or not self.pending:
            return False
        return self.count - min(number for number, _ in self.pending.values()) >= self.ahead

    def _take(self, future: Future[TaskResult[R]]) -> Iterator[Arrived[S, R]]:
        number, shard = self.pending[future]
        with self._reporting_the_killed(shard):
            result = future.result()
        del self.pending[future]
        if result.error is not None:
            for said in result.reported:
                self.report(said)
            raise result.error
        if result.begun:
            yield number, shard, result

    @contextmanager
    def _reporting_the_killed(self, shard: S) -> Iterator[None]:
        try:
            yield
        except BrokenExecutor as error:
            begun = [told(shard) for _, shard in sorted(self.pending.values(), key=lambda one: one[0])] or [told(shard)]
            some = ", ".join(begun[:4]) + (f" and {len(begun) - 4} more" if len(begun) > 4 else "")
            self.pending.clear()
            raise ClusterError(
                f"a process of this machine was killed, or crashed, while {some} had been begun: the system ends processes when "
                "memory is short (see its log), or something in one of these crashes it. Use fewer processes at a time, or give "
                "the machine more memory, then give the same command again"
            ) from error

    def dismiss(self, seconds: float) -> None:
        """Calls back what is still under way, and waits a little for it; what does not come back ends with its process."""
        if self.pending:
            self.shared.stop()
            wait(self.pending, timeout=seconds)


def _attempt(task: bytes, shared: _Shared, threads: int) -> TaskResult[Any]:
    """One attempt in a process. Errors of ours are results, so that what was reported before them comes, too."""
    name, reported = str(os.getpid()), list[Any]()
    if shared.stopped():
        return TaskResult(name, begun=False)
    start, worker = time.perf_counter(), Worker(name, threads, is_local=False)
    try:
        context = _opened(shared)
        function, shard = _loaded(task)
        value = function(context, shard, worker, shared.stopped, reported.append)
    except FeaturepipeError as error:
        return TaskResult(name, error=error, reported=reported)
    return TaskResult(name, time.perf_counter() - start, value, reported=reported)


@lru_cache(maxsize=1)
def _opened(shared: _Shared) -> Any:
    """The context, of which a process has one object."""
    return shared.context()


def _loaded(task: bytes) -> tuple[Function[Any], Any]:
    try:
        function, shard = pickle.loads(task)  # noqa: S301  # of our parent
    except (ImportError, AttributeError) as error:
        raise WorkerRefused(f"a process of this machine lacks what the work needs: {error}") from error
    return function, shard


_KEPT_FROM_PROCESSES = (signal.SIGINT, signal.SIGTERM)
"""Signals that a terminal and a service manager send to all processes of a program."""


@contextmanager
def _signals_held() -> Iterator[None]:
    """Holds signals back while the block runs; processes that it starts inherit that, and keep it until `_begin_process`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_FROM_PROCESSES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_process(parent: int, folder: str) -> None:
    """Called in each process when it starts."""
    for number in _KEPT_FROM_PROCESSES:
        signal.signal(number, signal.SIG_IGN)
    end_with(parent, folder)


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
