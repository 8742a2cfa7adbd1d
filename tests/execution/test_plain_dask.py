"""What `DaskExecutor` has that `Client.map` and `as_completed` lack: each scenario runs on both, and plain Dask must fail it.

The day Dask passes one of these, our mechanism for it goes (docs/decisions/executors.md lists them).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask.config
import numpy as np
import pytest
from distributed import Client, KilledWorker, LocalCluster, as_completed, wait
from distributed.deploy.adaptive import Adaptive

from featurepipe.errors import ClusterError, SourceError, WorkerRefused
from featurepipe.execution import DaskExecutor, connect, row_shard, row_shards, spread
from featurepipe.execution import dask as dispatch
from featurepipe.execution.launchers import _one_task_a_worker
from tests.conftest import Processes, travelling
from tests.execution.test_contract import SECONDS, Context, mark, marks, wait_for

SOON = 1.0
"""Seconds after which what has not happened is taken not to happen."""


@pytest.fixture(scope="module", autouse=True)
def functions_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions of the tests are sent by value: other processes cannot import them."""
    import tests.execution.test_contract

    with travelling(request.module, tests.execution.test_contract):
        yield


def plain(
    client: Client, function: Callable[..., Any], shards: Iterable[Any], *, context: Any = None, retries: int = 0
) -> Iterator[tuple[Any, Any]]:
    """`Executor.map` with nothing but Dask's own functions; the function is told of no worker, stop or report."""
    listed = list(shards)

    def called(shard: Any, context: Any) -> Any:
        from distributed import get_worker

        return function(context, shard, get_worker(), bool, bool)

    futures = client.map(called, listed, context=context, retries=retries, pure=False)
    shard_of = dict(zip(futures, listed, strict=True))
    for future in as_completed(futures):
        yield shard_of[future], future.result()


@contextmanager
def in_this_process(workers: int = 2, **options: Any) -> Iterator[LocalCluster]:
    """A cluster whose workers are threads: they start, and can be taken away, in milliseconds."""
    here: dict[str, Any] = {
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "processes": False,
        "protocol": "tcp",
    }
    with LocalCluster(n_workers=workers, **{"threads_per_worker": 1} | here | options) as cluster:
        yield cluster


def lose(cluster: LocalCluster, address: str) -> None:
    """Takes a worker away as if it had been killed."""
    scheduler: Any = cluster.scheduler
    cluster.sync(scheduler.remove_worker, address, stimulus_id="a test", expected=False)


def happens(is_true: Callable[[], object], seconds: float = SOON) -> bool:
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# Which worker


def test_a_worker_that_is_not_fit_fails_no_shard(dask_executor: DaskExecutor, tmp_path: Path) -> None:
    def work(folder: Path, _n: int, worker: Any, *_: Any) -> str:
        if str(worker.name) == "0":
            raise WorkerRefused("its weights differ")
        wait_for((folder / "go").exists)  # a fit worker has work to do, and the other one is free at once
        return str(worker.name)

    with pytest.raises(WorkerRefused):  # with retries, too: they go to the worker that is free
        list(plain(dask_executor.client, work, range(8), context=tmp_path, retries=3))
    (tmp_path / "go").touch()
    assert dict(dask_executor.map(work, range(8), context=tmp_path)) == dict.fromkeys(range(8), "1")


def test_workers_without_memory_are_told_of_and_not_waited_for(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PAUSED_SECONDS", 1.0)
    monkeypatch.setattr(dispatch, "RETURN_SECONDS", 0.1)
    memory = {"distributed.worker.memory.pause": 0.001, "distributed.worker.memory.monitor-interval": "50ms"}
    with (
        dask.config.set(memory),
        in_this_process(1, memory_limit="4GiB") as cluster,
        connect(cluster, say=said.append) as executor,
    ):
        wait_for(lambda: {worker.status.name for worker in cluster.scheduler.workers.values()} == {"paused"})
        future = executor.client.submit(int, pure=False)
        assert not happens(future.done)
        begun = time.monotonic()
        told = r"1 tasks are not done, the first: cat; no worker has the memory .* of its 4,096 MiB"
        with pytest.raises(ClusterError, match=told):
            list(executor.map(lambda *_: None, ["cat"]))
        assert time.monotonic() - begun >= 2 * dispatch.PAUSED_SECONDS  # one that is full for a moment is no reason
    assert said
    assert [line for line in said if "takes no task until it has more free" in line] == said


# How much at a time, and in which order


def test_shards_are_pulled_as_results_come(dask_executor: DaskExecutor) -> None:
    def shards() -> Iterator[int]:
        for n in range(12):
            pulled.append(len(found))
            yield n

    pulled: list[int] = []
    found: list[int] = []
    with pytest.raises(TypeError, match="no longer supports mapping over Iterators"):
        dask_executor.client.map(int, shards())
    for _, result in plain(dask_executor.client, lambda _c, n, *_: n, shards()):
        found.append(result)
    assert pulled == [0] * 12
    del pulled[:], found[:]
    for _, result in dask_executor.map(lambda _c, n, *_: n, shards()):
        found.append(result)
    assert all(seen >= n - 3 for n, seen in enumerate(pulled))  # two for each of two workers
    assert len(found) == 12


def test_few_results_wait_for_a_caller_who_takes_his_time(dask_executor: DaskExecutor) -> None:
    def held() -> int:
        return sum(dask_executor.client.run(lambda dask_worker: len(dask_worker.data)).values())

    def work(_context: Any, n: int, *_: Any) -> np.ndarray:
        return np.full(1000, n)

    with closing(dask_executor.map(work, range(20))) as results:
        next(results)
        time.sleep(SOON / 2)
        assert held() <= 4
    with closing(plain(dask_executor.client, work, range(20))) as results:
        next(results)
        assert happens(lambda: held() == 20, SECONDS)


def test_what_comes_early_is_bounded_and_comes_in_order(dask_executor: DaskExecutor, tmp_path: Path) -> None:
    def work(others: tuple[Path, int], n: int, *_: Any) -> int:
        folder, count = others
        if n:
            mark(folder, "done")
            return 0
        wait_for(lambda: marks(folder, "done") >= count)
        time.sleep(0.3)
        return marks(folder, "done")

    for folder in ("plain", "ours"):
        (tmp_path / folder).mkdir()
    results = list(plain(dask_executor.client, work, range(12), context=(tmp_path / "plain", 11)))
    assert results[-1] == (0, 11)
    bounds: dict[str, Any] = {"ordered": True, "in_flight": 9, "lookahead": 2}
    results = list(dask_executor.map(work, range(12), context=(tmp_path / "ours", 4), **bounds))
    assert results == [(0, 4), *((n, 0) for n in range(1, 12))]


# What comes of a shard


def straggles(folder: Path, n: int, _worker: Any, stop: Callable[[], bool], _report: Any) -> int:
    first = n or not marks(folder, "attempt")
    mark(folder, "attempt" if n == 0 else "other")
    if n == 0 and first:
        wait_for(lambda: stop() or (folder / "release").exists())
    return n


def test_a_straggler_is_begun_elsewhere(
    dask_executor: DaskExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "STRAGGLING", 0.2)
    for folder in (tmp_path / "plain", tmp_path / "ours"):
        folder.mkdir()
    assert len(list(dask_executor.map(straggles, range(4), context=tmp_path / "ours"))) == 4
    assert marks(tmp_path / "ours", "attempt") == 2
    with ThreadPoolExecutor() as thread:
        results = plain(dask_executor.client, straggles, range(4), context=tmp_path / "plain")
        running = thread.submit(list, results)
        wait_for(lambda: marks(tmp_path / "plain", "other") == 3)
        assert not happens(lambda: marks(tmp_path / "plain", "attempt") > 1)
        (tmp_path / "plain" / "release").touch()
        assert len(running.result()) == 4


def test_what_runs_comes_back_with_what_it_has(dask_executor: DaskExecutor, tmp_path: Path) -> None:
    def work(folder: Path, _n: int, _worker: Any, stop: Callable[[], bool], _report: Any) -> str:
        while not (stop() or (folder / "release").exists()):
            mark(folder, "beat")
            time.sleep(0.05)
        return "what it has"

    results = dask_executor.map(work, range(3), context=tmp_path, stop=lambda: marks(tmp_path, "beat") > 1)
    assert {result for _, result in results} == {"what it has"}
    before = marks(tmp_path, "beat")
    future = dask_executor.client.submit(work, tmp_path, 0, None, bool, bool, pure=False)
    wait_for(lambda: marks(tmp_path, "beat") > before)
    future.cancel()
    cancelled = marks(tmp_path, "beat")
    assert happens(lambda: marks(tmp_path, "beat") > cancelled + 3, SECONDS)  # it goes on, and nobody gets its result
    (tmp_path / "release").touch()
    with pytest.raises(CancelledError):
        future.result(timeout=SECONDS)


def test_errors_of_ours_are_results_and_others_are_tried_again(dask_executor: DaskExecutor, tmp_path: Path) -> None:
    def work(folder: Path, name: str, _worker: Any, _stop: Any, report: Callable[[str], object]) -> str:
        report(f"{name} is begun")
        mark(folder, name)
        if name.endswith("gone"):
            raise SourceError("no other attempt would find it")
        if marks(folder, name) < 3:
            raise OSError("the share does not answer")
        return "done"

    told: list[str] = []
    client, retrying = dask_executor.client, {"context": tmp_path, "retries": 3}
    assert list(dask_executor.map(work, ["ours"], **retrying)) == [("ours", "done")]
    with pytest.raises(SourceError):
        list(dask_executor.map(work, ["ours, gone"], report=told.append, **retrying))
    assert (marks(tmp_path, "ours, gone"), told) == (1, ["ours, gone is begun"])
    assert list(plain(client, work, ["plain"], **retrying)) == [("plain", "done")]
    with pytest.raises(SourceError):
        list(plain(client, work, ["plain, gone"], **retrying))
    assert marks(tmp_path, "plain, gone") == 4  # and what they reported is nowhere


def test_a_shard_that_ends_its_workers_is_named() -> None:
    def work(_context: Any, _name: str, *_: Any) -> None:
        time.sleep(0.3)

    def killer() -> None:
        for _ in range(2):
            wait_for(lambda: [worker for worker in cluster.scheduler.workers.values() if worker.processing])
            lose(cluster, next(worker.address for worker in cluster.scheduler.workers.values() if worker.processing))

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        in_this_process() as cluster,
        connect(cluster, say=lambda _: None) as executor,
        ThreadPoolExecutor() as thread,
    ):
        killing = thread.submit(killer)
        with pytest.raises(KilledWorker) as killed:
            list(plain(executor.client, work, ["bomb.jpg"]))
        assert "bomb.jpg" not in str(killed.value)
        with pytest.raises(ClusterError, match=r"every worker that began bomb\.jpg died of it"):
            list(executor.map(work, ["bomb.jpg"]))
        killing.result()


# The context


def test_a_context_is_opened_once_a_process_and_not_by_the_scheduler(
    dask_executor: DaskExecutor, tmp_path: Path
) -> None:
    def work(_context: Context, _n: int, *_: Any) -> int:
        time.sleep(0.02)
        return os.getpid()

    def opened(folder: str) -> tuple[int, int]:
        pids = {pid for _, pid in results}
        return sum(marks(tmp_path / folder, f"opened-{pid}") for pid in pids), marks(tmp_path / folder, "opened")

    for folder in ("plain", "ours"):
        (tmp_path / folder).mkdir()
    results = list(plain(dask_executor.client, work, range(8), context=Context(tmp_path / "plain")))
    assert opened("plain") == (8, 9)
    results = list(dask_executor.map(work, range(8), context=Context(tmp_path / "ours")))
    results += dask_executor.map(work, range(8), context=Context(tmp_path / "ours"))
    assert opened("ours") == (2, 2)


def test_a_large_context_does_not_pass_through_the_scheduler(dask_executor: DaskExecutor, tmp_path: Path) -> None:
    def sent() -> int:
        return int(dask_executor.client.scheduler_comm.byte_count)

    def work(context: bytes, _n: int, *_: Any) -> int:
        return len(context)

    content, before = os.urandom(4 << 20), sent()
    dask_executor.check(tmp_path)
    assert {size for _, size in dask_executor.map(work, range(4), context=content)} == {4 << 20}
    assert sent() - before < 1 << 16
    kept = dask_executor.client.submit(bytes, content, pure=False)
    assert dask_executor.client.submit(len, kept, pure=False).result() == 4 << 20
    assert sent() - before > 4 << 20


# The scheduler and signals


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_given_up(
    processes: Processes, own_executor: DaskExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurepipe.execution.worker_pool.SCHEDULER_SECONDS", 1.0)

    def work(_context: Any, n: int, *_: Any) -> int:
        time.sleep(0.05)
        return n

    running = threading.Thread(target=lambda: [*plain(own_executor.client, work, range(9))], daemon=True)
    results = own_executor.map(work, range(500))
    next(results)
    processes.scheduler.send(signal.SIGSTOP)
    running.start()
    with pytest.raises(ClusterError, match="gone, or does not answer"):
        list(results)
    running.join(SOON)
    assert running.is_alive()  # and waits as long as the scheduler's process is there
    processes.scheduler.send(signal.SIGCONT)
    running.join(SECONDS)


@pytest.mark.slow
def test_a_frozen_worker_is_waited_for_once_and_its_results_are_computed_anew(
    processes: Processes, own_executor: DaskExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It freezes with ten results that are done; a wait for each, or a task begun anew on it, would take longer."""
    monkeypatch.setattr(dispatch, "RESULT_SECONDS", 8.0)
    monkeypatch.setattr(dispatch, "RETURN_SECONDS", 1.0)

    def work(_context: Any, n: int, *_: Any) -> int:
        time.sleep(0.1)
        return n * n

    with Client(processes.address) as client:
        kept = client.map(partial(work, None), range(8), pure=False)
        wait(kept)
        results = own_executor.map(work, range(20), in_flight=10)
        found = dict([next(results)])
        time.sleep(5.0)  # in which the others are done
        processes.workers[0].send(signal.SIGSTOP)
        begun = time.monotonic()
        found |= dict(results)
        assert time.monotonic() - begun < 40
        assert found == {n: n * n for n in range(20)}
        running = threading.Thread(target=client.gather, args=(kept,), daemon=True)
        running.start()
        running.join(SOON)
        assert running.is_alive()  # plain Dask waits for as long as the worker's process is there
        processes.workers[0].send(signal.SIGCONT)
        running.join(SECONDS)
        assert not running.is_alive()


@pytest.mark.slow
def test_ctrl_c_does_not_end_workers() -> None:
    def ends(executor: DaskExecutor, seconds: float) -> bool:
        [pid] = executor.client.run(os.getpid).values()
        os.kill(pid, signal.SIGINT)
        return happens(lambda: not executor.addresses(), seconds)

    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    with LocalCluster(**options) as cluster, connect(cluster, say=lambda _: None) as executor:
        assert ends(executor, SECONDS)  # on a busy machine it takes some
    with connect("local:1", say=lambda _: None) as executor:
        executor.wait_for_workers()
        assert not ends(executor, 3 * SOON)


# Gangs, rows at workers, clusters that grow


def meets(folder: Path, name: str) -> None:
    """The work of one rank of two: it needs the other, at the same time."""
    mark(folder, name)
    wait_for(lambda: marks(folder, name) == 2 or (folder / "release").exists())


class Rendezvous:
    def __init__(self, host: str, count: int) -> None:
        self.count = count

    def told(self) -> dict[str, Any]:
        return {"count": self.count}

    def close(self) -> None:
        pass


def test_gangs_do_not_wait_for_each_other_for_ever(
    dask_executor: DaskExecutor, cluster_address: str, tmp_path: Path
) -> None:
    client, tasks = dask_executor.client, []
    for name, worker in zip(("one", "other"), dask_executor.addresses(), strict=True):  # each has one of the workers
        tasks.append(client.submit(meets, tmp_path, name, workers=[worker], pure=False))
        wait_for(partial(marks, tmp_path, name))
    tasks += [client.submit(meets, tmp_path, name, pure=False) for name in ("one", "other")]
    assert not happens(lambda: any(task.done() for task in tasks))
    assert (marks(tmp_path, "one"), marks(tmp_path, "other")) == (1, 1)
    (tmp_path / "release").touch()
    wait(tasks, timeout=SECONDS)
    (tmp_path / "release").unlink()

    def together(executor: DaskExecutor, name: str) -> list[int]:
        rows = spread(np.zeros((8, 1), np.float32), executor).row_shards()
        return rows.gang_run(partial(ranked, tmp_path, name), Rendezvous)

    with connect(cluster_address, say=lambda _: None) as other, ThreadPoolExecutor() as threads:
        running = threads.submit(together, other, "gang of another")
        assert together(dask_executor, "gang of ours") == running.result(SECONDS) == [0, 1]


def ranked(folder: Path, name: str, rank: Any, *_rows: Any) -> int:
    meets(folder, name)
    return int(rank.rank)


def test_a_gang_that_loses_a_worker_begins_again_with_those_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_shard, "_LOOK_SECONDS", 0.1)
    said: list[str] = []
    with (
        in_this_process(3) as cluster,
        connect(cluster, say=said.append) as executor,
        ThreadPoolExecutor() as thread,
    ):
        _, lost_first, lost_next = executor.addresses()
        task = executor.client.submit(meets, tmp_path, "plain", workers=[lost_first], pure=False)
        wait_for(lambda: marks(tmp_path, "plain"))
        lose(cluster, lost_first)
        (tmp_path / "release").touch()
        assert not happens(task.done)  # and whoever wants to meet it waits, too
        rows = spread(np.arange(8, dtype=np.float32)[:, None], executor).row_shards()
        ours = thread.submit(rows.gang_run, partial(sum_when_seated, tmp_path), Rendezvous)
        wait_for(lambda: marks(tmp_path, "rank-of-2") == 2)
        lose(cluster, lost_next)
        assert ours.result(SECONDS) == [28.0]
    assert said == [f"worker {lost_next} was lost; those that are left begin this again"]


def sum_when_seated(folder: Path, rank: Any, shards: Any) -> float:
    """The sum of the rows of all shards here; where two sit together, they wait to be sent home."""
    mark(folder, f"rank-of-{rank.world_size}")
    if rank.world_size == 2:
        wait_for(rank.stop)
    return sum(total(blocks) for blocks, *_ in shards)


def test_what_fails_because_a_worker_is_lost_is_said_to_be_lost(dask_executor: DaskExecutor) -> None:
    """A rank that others have left fails with an error of its own, often before its scheduler has noticed."""
    [first, last] = dask_executor.addresses()
    tasks = {
        first: dask_executor.client.submit(int, "no number", workers=[first], pure=False),
        last: dask_executor.client.submit(int, workers=[last], pure=False),
    }
    seen = iter([[first, last], [first]])
    pool: Any = SimpleNamespace(addresses=lambda: next(seen))
    with pytest.raises(row_shard._Failed, match=f"^worker {last} was lost$") as failed:
        row_shard._await(pool, tasks)
    assert isinstance(failed.value.__cause__, ValueError)
    pool = SimpleNamespace(addresses=lambda: [first, last])
    with pytest.raises(row_shard._Failed, match=rf"^worker {first} failed \(ValueError: invalid literal"):
        row_shard._await(pool, tasks)
    tasks[last].cancel()  # as Dask's client does with all that it awaits when the scheduler goes
    pool.scheduler = SimpleNamespace(lost=lambda: ClusterError("the scheduler is gone"))
    with pytest.raises(ClusterError, match="the scheduler is gone"):
        row_shard._await(pool, {last: tasks[last]})


def test_rows_move_to_workers_that_came_when_all_others_had_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_shards, "_LOOK_SECONDS", 0.1)
    said: list[str] = []
    with (
        in_this_process() as cluster,
        connect(cluster, say=said.append) as executor,
        ThreadPoolExecutor() as thread,
    ):
        first = executor.addresses()
        kept = [executor.client.submit(int, workers=[one], allow_other_workers=True, pure=False) for one in first]
        rows = spread(np.arange(8, dtype=np.float32)[:, None], executor).row_shards().kept(np.float32, None)
        assert rows.reduce(total) == 28
        cluster.scale(0)
        wait_for(lambda: not executor.addresses())
        ours = thread.submit(rows.reduce, total)
        assert not happens(ours.done, 0.5)  # it waits for workers
        cluster.scale(2)
        wait_for(lambda: len(executor.addresses()) == 2)
        assert ours.result(SECONDS) == 28
        assert not happens(lambda: any(future.done() for future in kept), SOON / 2)
    assert said == ["workers that kept features are gone; those that are there now read them again"]


def total(blocks: Any) -> float:
    return float(blocks.read().sum())


def test_a_cluster_that_grows_has_a_worker_for_each_task(tmp_path: Path) -> None:
    def grows_to(kind: type) -> int:
        return int(cluster.sync(cluster.adapt(minimum=1, maximum=8, Adaptive=kind, interval="1h").target))

    with in_this_process(1, threads_per_worker=4) as cluster, Client(cluster) as client:
        futures = client.map(lambda n, folder: wait_for((folder / "go").exists), range(8), folder=tmp_path)
        wait_for(lambda: sum(len(worker.processing) for worker in cluster.scheduler.workers.values()))
        assert grows_to(Adaptive) == 1
        assert grows_to(_one_task_a_worker()) == 8
        (tmp_path / "go").touch()
        wait(futures, timeout=SECONDS)
