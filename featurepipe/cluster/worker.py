"""What runs inside a worker's process: what it is, whether it is fit, and one attempt at a task."""

from __future__ import annotations

import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from featurepipe.errors import FeaturepipeError, WorkerRefused

T = TypeVar("T")
R = TypeVar("R")

DIGITS = {"featurepipe": 3, "torch": 2, "torchvision": 2, "numpy": 1}
"""How many numbers of a version must agree between client and workers, by package."""


def installed() -> dict[str, str]:
    """Versions of what must agree, and of Python and Dask, in this process; packages that are missing are left out."""
    found = {"python": platform.python_version()}
    for name in (*DIGITS, "distributed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
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
class Terms:
    """What a worker must fulfil; it travels with every task, so that a worker that has come late is looked at, too.

    Attributes:
        versions: (package, version) pairs of the client.
        token: a file that every worker must see, or None.
        secret: what is in that file.
        source: a path that must exist, or None.
    """

    versions: tuple[tuple[str, str], ...]
    token: str | None = None
    secret: str = ""
    source: str | None = None

    def refusal(self) -> str:
        """Why this process is not fit; empty if it is."""
        mine = installed()
        for name, theirs in self.versions:
            digits = DIGITS.get(name)
            if digits and _start(mine.get(name, ""), digits) != _start(theirs, digits):
                return f"it has {name} {mine.get(name, '(not installed)')}, the client has {theirs}"
        if self.token and (why := self._unseen()):
            return why
        return "" if self.source is None or Path(self.source).exists() else f"it does not see the source {self.source}"

    def _unseen(self) -> str:
        token = Path(self.token or "")
        try:
            seen = token.read_text()
        except OSError as error:
            return f"it does not see the store {token.parent} ({error.strerror})"
        return "" if seen == self.secret else f"another folder is at {token.parent} there"


def _start(text: str, digits: int) -> list[str]:
    return text.partition("+")[0].split(".")[:digits]


@cache
def _refusal(terms: Terms) -> str:
    return terms.refusal()


@dataclass(frozen=True)
class Answer(Generic[R]):
    """What came of one attempt; exactly one of the last four says it.

    Attributes:
        worker: the address of the worker that made it.
        seconds: how long it took.
        value: what the work returned.
        refused: why this worker must not be used.
        error: an error that no other attempt would avoid.
        begun: False for a task that was not begun, because a stop had been asked for.
    """

    worker: str
    seconds: float = 0.0
    value: R | None = None
    refused: str = ""
    error: FeaturepipeError | None = None
    begun: bool = True


@dataclass(frozen=True)
class Attempt(Generic[T, R]):
    """A task's work as Dask runs it in a worker's thread.

    Attributes:
        work: what is done with the task.
        terms: what the worker must fulfil.
        flow: names the flow of tasks, for `ask_to_stop`.
    """

    work: Callable[[T], R]
    terms: Terms
    flow: str = field(default="")

    def __call__(self, task: T) -> Answer[R]:
        """One attempt. Errors of our own are answers, since trying again would not help; Dask tries again after others."""
        from distributed import get_worker

        worker = str(get_worker().address)
        if self.flow in _STOPPED:
            return Answer(worker, begun=False)
        if why := _refusal(self.terms):
            return Answer(worker, refused=why)
        start, before = time.perf_counter(), _FLOW.set(self.flow)
        try:
            value = self.work(task)
        except WorkerRefused as error:
            return Answer(worker, refused=str(error))
        except FeaturepipeError as error:
            return Answer(worker, error=error)
        finally:
            _FLOW.reset(before)
        return Answer(worker, time.perf_counter() - start, value)


_FLOW: ContextVar[str] = ContextVar("flow", default="")
_STOPPED: set[str] = set()  # of this process: Dask reaches a task that runs only by way of its process
_ALONE = threading.Lock()


def ask_to_stop(flow: str) -> None:
    """Run in a worker's process: tells the tasks of a flow to come back with what they have."""
    _STOPPED.add(flow)


def stop_of_task() -> Callable[[], bool]:
    """Called by a task in its own thread: a function, good in any thread, that tells whether the client wants it back.

    Example:
        >>> stop_of_task()()
        False
    """
    flow = _FLOW.get()
    return lambda: flow in _STOPPED


def this_worker() -> tuple[str, int, int]:
    """The worker that runs this task: its name, its threads, and its memory limit in bytes, 0 for none."""
    from distributed import get_worker

    worker = get_worker()
    return str(worker.name), int(worker.state.nthreads), int(worker.memory_manager.memory_limit or 0)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While the block runs, no other thread of this process is in such a block: for a network, which a process has once.

    Dask's workers may have several threads, each with a task of its own.
    """
    with _ALONE:
        yield
