"""What runs inside a worker's process: what it is, whether it is fit, and one attempt at a task."""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from featurepipe.errors import FeaturepipeError, UsageError, WorkerRefused
from featurepipe.execution.executor import Function, TaskResult, Worker

R = TypeVar("R")

DIGITS = {"featurepipe": 3, "torch": 2, "torchvision": 2, "numpy": 1}
"""How many numbers of a version must agree between client and workers, by package."""


def dask_setup(_worker: object) -> None:
    """Called by Dask in each worker's process that is started on this machine, which loads this module first.

    Standard output belongs to the client's result alone.
    """
    os.dup2(2, 1)


def installed() -> dict[str, str]:
    """Versions of what must agree, and of Python and Dask, in this process; packages that are missing are left out."""
    found = {"python": platform.python_version()}
    for name in (*DIGITS, "distributed"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def gpu_names() -> list[str]:
    """The NVIDIA devices that this process may use, as CUDA_VISIBLE_DEVICES names them; told without loading CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip() not in {"", "-1", "NoDevFiles"}]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


def facts() -> dict[str, Any]:
    """What a worker's process says of itself."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "gpus": len(gpu_names()), "versions": installed()}


@dataclass(frozen=True)
class Requirements:
    """What a worker must fulfil; it travels with every task, so that a worker that has come late is looked at, too.

    Attributes:
        versions: (package, version) pairs of the client.
        token: a file that every worker must see, or None.
        secret: what is in that file.
    """

    versions: tuple[tuple[str, str], ...]
    token: str | None = None
    secret: str = ""

    def refusal(self) -> str:
        """Why this process is not fit; empty if it is."""
        mine = installed()
        for name, theirs in self.versions:
            digits = DIGITS.get(name)
            if digits and _start(mine.get(name, ""), digits) != _start(theirs, digits):
                return f"it has {name} {mine.get(name, '(not installed)')}, the client has {theirs}"
        if not self.token:
            return ""
        token = Path(self.token)
        try:
            seen = token.read_text()
        except OSError as error:
            return f"it does not see the store {token.parent} ({error.strerror})"
        return "" if seen == self.secret else f"another folder is at {token.parent} there"


def _start(text: str, digits: int) -> list[str]:
    return text.partition("+")[0].split(".")[:digits]


@cache
def _refusal(requirements: Requirements) -> str:
    return requirements.refusal()


def pickled(context: Any, buffers: Callable[[pickle.PickleBuffer], object] | None = None) -> bytes:
    """A context as it travels.

    Args:
        context: to pickle.
        buffers: takes arrays out of the pickle, as the ``buffer_callback`` of `pickle.dumps`.

    Raises:
        UsageError: it holds what cannot travel.
    """
    import cloudpickle  # type: ignore[import-untyped,unused-ignore]

    try:
        content: bytes = cloudpickle.dumps(context, protocol=5, buffer_callback=buffers)
    except (TypeError, ValueError, AttributeError, pickle.PicklingError) as error:
        raise UsageError(
            f"what the work needs ({type(context).__name__}) cannot be sent to another process ({error}); leave out of it what "
            "only this process has, such as open files, locks and connections, or work in this process"
        ) from error
    return content


def unpickled(content: bytes | memoryview, buffers: Sequence[memoryview] = (), *, who: str = "it") -> Any:
    """What was `pickled` by the client, or parent, of this process, who runs what it likes here.

    Raises:
        WorkerRefused: its code is not there.
    """
    try:
        return pickle.loads(content, buffers=buffers)  # noqa: S301  # see above
    except (ImportError, AttributeError) as error:
        raise WorkerRefused(f"{who} lacks what the work needs: {error}") from error


@dataclass(frozen=True)
class Carried:
    """A context on its way to workers: pickled, and known by what it holds.

    Attributes:
        digest: SHA-256 of the pickle.
        content: the pickle, or None if it is in a file.
        file: a file that all workers see, or None.
    """

    digest: str
    content: bytes | None = field(default=None, compare=False, repr=False)
    file: str | None = field(default=None, compare=False)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """The context, of which a process has one object, for as long as a task uses it.

        Of contexts that no task uses, those used last stay open for the next `map`; one that goes is closed, if it can be.

        Raises:
            WorkerRefused: its code or its file is not there.
        """
        closing: list[Any] = []
        with _OPENING:
            entry = _CONTEXTS.pop(self.digest, None)
            if entry is None:
                closing = _evicted()
                entry = _OpenContext(unpickled(self._bytes()))
            _CONTEXTS[self.digest] = entry  # as the one used last
            entry.users += 1
        for context in closing:
            with suppress(OSError):  # of storage that is gone; the next work does not need it
                getattr(context, "close", bool)()
        try:
            yield entry.context
        finally:
            with _OPENING:
                entry.users -= 1

    def _bytes(self) -> bytes:
        if self.file is None:
            return self.content or b""
        try:
            content = Path(self.file).read_bytes()
        except OSError as error:
            raise WorkerRefused(f"it does not see {self.file} ({error.strerror})") from error
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise WorkerRefused(f"it sees something else at {self.file}")
        return content


MOST_CONTEXTS = 2
"""Contexts that a process keeps open: of the work before and of that now. More only while tasks use more."""


@dataclass
class _OpenContext:
    """A context that this process has opened, and the number of tasks that use it now."""

    context: Any
    users: int = 0


def _evicted() -> list[Any]:
    """Removes contexts that no task uses, until there is room for one more."""
    idle = [digest for digest, entry in _CONTEXTS.items() if not entry.users]
    excess = max(0, len(_CONTEXTS) + 1 - MOST_CONTEXTS)
    return [_CONTEXTS.pop(digest).context for digest in idle[:excess]]


_CONTEXTS: dict[str, _OpenContext] = {}
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Attempt(Generic[R]):
    """A shard's work as Dask runs it in a worker's thread.

    Attributes:
        function: see `featurepipe.execution.executor.Function`.
        context: what all shards have in common, or None.
        requirements: what the worker must fulfil.
        flow: names the flow of shards, for `ask_to_stop`.
    """

    function: Function[R]
    context: Carried | None
    requirements: Requirements
    flow: str = field(default="")

    def __call__(self, shard: Any) -> TaskResult[R]:
        """One attempt. Errors of our own are results, since trying again would not help; Dask tries again after others."""
        from distributed import get_worker

        address = str(get_worker().address)
        if self._stopped():
            return TaskResult(address, begun=False)
        if why := _refusal(self.requirements):
            return TaskResult(address, refused=why)
        start, reported = time.perf_counter(), list[Any]()
        try:
            with nullcontext() if self.context is None else self.context.opened() as context:
                value = self.function(context, shard, this_worker(), self._stopped, reported.append)
        except WorkerRefused as error:
            return TaskResult(address, refused=error.message)
        except FeaturepipeError as error:
            return TaskResult(address, error=error, reported=reported)
        return TaskResult(address, time.perf_counter() - start, value, reported=reported)

    def _stopped(self) -> bool:
        """Whether the client wants the flow's tasks back; good in any thread of this process."""
        return self.flow in _STOPPED


_STOPPED: set[str] = set()  # of this process: Dask reaches a task that runs only by way of its process
_ALONE = threading.Lock()  # Dask's workers may have several threads, each with a task of its own


def ask_to_stop(flow: str) -> None:
    """Run in a worker's process: tells the tasks of a flow to come back with what they have."""
    _STOPPED.add(flow)


def this_worker() -> Worker:
    """The worker of Dask's that runs this task."""
    from distributed import get_worker

    worker = get_worker()
    limit = int(worker.memory_manager.memory_limit or 0)
    return Worker(str(worker.name), int(worker.state.nthreads), limit, is_local=False, alone=lambda: _ALONE)
