"""Pools of threads that each use a fixed number of PyTorch's own threads; of one kind, threads may be given up."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

Task = Callable[[], None]


def pool_of(workers: int, name: str, *, each: int = 1) -> ThreadPoolExecutor:
    """Starts ``workers`` threads in which a PyTorch operation may use ``each`` cores.

    All threads are running when this returns. PyTorch gives threads that are born later what was set last, in any thread, so
    the caller's own number is set again at the end.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(each)
        started.wait()

    pool = ThreadPoolExecutor(workers, name, initializer=start)
    for _ in range(workers):
        pool.submit(bool)
    started.wait()
    torch.set_num_threads(before)
    return pool


class GivenUp(BaseException):
    """Raised in a thread whose task nobody waits for any more."""


class LoadingThreads:
    """Threads that run tasks in the order given, of which one that does not come back can be given up and replaced.

    They are daemons, so that a thread that is stuck in a library holds up neither the run nor the end of the process, which
    `concurrent.futures` would let it do.

    Args:
        workers: how many threads.
        name: of the threads.
    """

    def __init__(self, workers: int, name: str) -> None:
        self._name, self._queue = name, queue.SimpleQueue[Task | None]()
        self._threads: list[threading.Thread] = []
        before = torch.get_num_threads()
        for _ in range(workers):
            self._start(None)
        torch.set_num_threads(before)

    def submit(self, task: Task) -> None:
        """Has a task run when its turn comes; it deals with its own exceptions."""
        self._queue.put(task)

    def replace(self, stuck: threading.Thread, task: Task) -> None:
        """Gives up a thread, and starts another one with ``task``.

        The thread ends with `GivenUp` at its next step in Python; one that is in a library's loop, when that returns.
        """
        if stuck in self._threads:
            self._threads.remove(stuck)
            _give_up(stuck)
        before = torch.get_num_threads()
        self._start(task)
        torch.set_num_threads(before)

    def close(self, patience: float) -> None:
        """Drops the tasks that have not begun, waits for the others so many seconds in all, and gives up the rest."""
        while not self._queue.empty():
            self._queue.get()
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for thread in self._threads:
            if thread.is_alive():  # in a loop of Python it would take time from what is still to be done
                _give_up(thread)

    def _start(self, first: Task | None) -> None:
        # PyTorch gives threads that are born later what was set last, in any thread: so this waits until it is set.
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started, first), name=self._name, daemon=True)
        self._threads.append(thread)
        thread.start()
        started.wait()

    def _run(self, started: threading.Event, task: Task | None) -> None:
        torch.set_num_threads(1)
        started.set()
        # Twice, since a task may notice by itself that it was given up, just before the exception from outside arrives.
        with suppress(GivenUp), suppress(GivenUp):
            task = task or self._queue.get()
            while task is not None:
                task()
                task = self._queue.get()


def _give_up(thread: threading.Thread) -> None:
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(GivenUp))
