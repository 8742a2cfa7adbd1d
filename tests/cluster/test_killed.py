"""Workers and schedulers that are killed, stopped or refuse: what is done all the same, and what is said."""

import os
import signal
import threading
import time
from typing import Any

import pytest

from featurepipe.errors import ClusterError
from featurepipe.execution import DaskExecutor

# ruff: noqa: PT012 - the block kills while it waits for the error
pytestmark = pytest.mark.slow


def test_the_last_worker_gone_is_said_after_a_while(processes: Any, own_executor: DaskExecutor) -> None:
    own_executor.patience = 2

    def work(_context, n: int, _worker, stop, _report) -> None:
        time.sleep(0.2)

    with pytest.raises(
        ClusterError, match=r"no worker came .* within 2 s; \d+ tasks are not done, the first: \d+; start some"
    ):
        for _ in own_executor.map(work, range(50)):
            for worker in processes.workers:
                worker.kill()


def test_a_killed_scheduler_ends_the_run_soon(processes: Any, own_executor: DaskExecutor) -> None:
    def work(_context, n: int, _worker, stop, _report) -> None:
        time.sleep(0.2)

    with pytest.raises(ClusterError, match=r"gone, or does not answer; .* same command again: it goes on where it was"):
        for count, _ in enumerate(own_executor.map(work, range(500))):
            if count == 2:
                processes.scheduler.kill()
                killed = time.monotonic()
    assert time.monotonic() < killed + 30


def test_a_scheduler_that_hangs_ends_the_run_soon(
    processes: Any, own_executor: DaskExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurepipe.execution.worker_pool.SCHEDULER_SECONDS", 3.0)

    def work(_context, n: int, _worker, stop, _report) -> None:
        time.sleep(0.2)

    with pytest.raises(ClusterError, match="gone, or does not answer"):
        for count, _ in enumerate(own_executor.map(work, range(500))):
            if count == 2:
                processes.scheduler.send(signal.SIGSTOP)
                killed = time.monotonic()
    assert time.monotonic() < killed + 30


def test_a_scheduler_that_is_too_busy_for_a_while_is_waited_for(
    processes: Any, own_executor: DaskExecutor, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurepipe.execution.worker_pool.BUSY_SECONDS", 1.0)
    monkeypatch.setattr("featurepipe.execution.dask.RESULT_SECONDS", 0.5)
    goes_on = threading.Timer(5, processes.scheduler.send, [signal.SIGCONT])

    def work(_context, n: int, _worker, stop, _report) -> int:
        time.sleep(0.1)
        return n

    done = []
    for number, _ in own_executor.map(work, range(30)):
        done.append(number)
        if len(done) == 3:
            processes.scheduler.send(signal.SIGSTOP)
            goes_on.start()
    goes_on.join()
    assert sorted(done) == list(range(30))
    assert said == [f"the scheduler {processes.address} does not answer; waiting for it, at most 300 s"]


def test_a_worker_that_is_too_busy_for_a_while_is_not_refused(
    processes: Any, own_executor: DaskExecutor, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [silent] = [worker.address for worker in own_executor.workers() if worker.pid == processes.workers[0].pid]
    own_executor.check()  # the first answer takes a while
    monkeypatch.setattr("featurepipe.execution.worker_pool.ANSWER_SECONDS", 2.0)
    processes.workers[0].send(signal.SIGSTOP)
    goes_on = threading.Timer(5, processes.workers[0].send, [signal.SIGCONT])
    goes_on.start()
    assert len(own_executor.check()) == 2
    goes_on.join()
    assert said == [f"no answer from {silent}; waiting for it, at most 120 s"]


def test_a_worker_that_comes_later_gets_work(processes: Any, own_executor: DaskExecutor) -> None:
    def work(_context, n: int, _worker, stop, _report) -> int:
        time.sleep(0.2)
        return os.getpid()

    pids = set()
    for count, (_, pid) in enumerate(own_executor.map(work, range(60))):
        pids.add(pid)
        if count == 0:
            processes.add_worker()
            own_executor.wait_for_workers(3)
    assert len(pids) == 3
