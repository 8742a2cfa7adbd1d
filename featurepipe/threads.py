"""Pools of threads that each use a fixed number of PyTorch's own threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


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
