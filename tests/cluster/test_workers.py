"""Who the workers are, which are refused, and why."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import featurepipe.execution.worker as at_worker
from featurepipe.errors import ClusterError, StoreError, UsageError
from featurepipe.execution import DaskExecutor, Worker, connect
from featurepipe.execution import dask as dispatch
from featurepipe.store import FeatureStore
from featurepipe.store.gc import gc_store
from tests.thread_cluster import executor_on_threads


@contextmanager
def other_version(dask_executor: DaskExecutor, address: str, package: str, number: str) -> Iterator[None]:
    """While the block runs, one worker reports another version of a package."""

    def report() -> None:
        import featurepipe.execution.worker as module

        if not hasattr(module, "true_version"):
            module.true_version = module.version
        module.version = lambda name: number if name == package else module.true_version(name)
        module._refusal.cache_clear()

    def restore() -> None:
        import featurepipe.execution.worker as module

        module.version = module.true_version
        module._refusal.cache_clear()

    dask_executor.client.run(report, workers=[address])
    try:
        yield
    finally:
        dask_executor.client.run(restore, workers=[address])


@pytest.fixture
def other_versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes workers that are threads report other versions of a package."""
    found: dict[tuple[str, str], str] = {}

    def report(name: str) -> str:
        import distributed

        try:
            return found.get((distributed.get_worker().address, name)) or version(name)
        except ValueError:  # at the client
            return version(name)

    def set_version(address: str, package: str, number: str) -> None:
        found[address, package] = number

    monkeypatch.setattr(at_worker, "version", report)
    return set_version


def test_workers_say_who_they_are(dask_executor: DaskExecutor) -> None:
    workers = dask_executor.workers()
    assert sorted(worker.name for worker in workers) == ["0", "1"]
    assert len({worker.pid for worker in workers} - {os.getpid()}) == 2
    for worker in workers:
        assert (worker.threads, worker.memory_limit) == (1, 3 * 2**30)
        assert worker.versions["torch"] == version("torch")
        assert worker.versions["distributed"] == version("distributed")
        assert worker.gpus == len(at_worker.gpu_names())


@pytest.mark.parametrize(
    ("package", "number", "refused"),
    [
        ("featurepipe", "0.0.9", True),
        ("torch", "1.13.1+cu117", True),
        ("torch", ".".join(version("torch").split(".")[:2]) + ".99+cu126", False),
        ("numpy", "1.26.4", True),
        ("numpy", version("numpy").split(".")[0] + ".99", False),
        ("distributed", "2024.1.0", False),
    ],
)
def test_other_versions_are_refused_by_name(
    thread_executor: DaskExecutor, other_versions: Any, said: list[str], package: str, number: str, refused: bool
) -> None:
    first, second = thread_executor.addresses()
    name = next(worker.name for worker in thread_executor.workers() if worker.address == first)
    other_versions(first, package, number)
    assert sorted(thread_executor.check()) == sorted([second] if refused else [first, second])
    if refused:
        assert said == [
            f"worker {name} ({first}) is not used: it has {package} {number}, the client has {version(package)}"
        ]
    else:
        assert said == []


def test_a_late_worker_of_another_version_gets_no_task(dask_executor: DaskExecutor, said: list[str]) -> None:
    dask_executor.check()
    first, second = dask_executor.addresses()
    with other_version(dask_executor, first, "torch", "1.0"):

        def where(_context, n: int, _worker, stop, _report) -> str:
            from distributed import get_worker

            return str(get_worker().address)

        assert set(dict(dask_executor.map(where, range(8))).values()) == {second}
    assert list(dask_executor.refused) == [first]
    assert len(said) == 1


def test_all_refused_is_an_error_that_names_each(thread_executor: DaskExecutor, other_versions: Any) -> None:
    first, second = thread_executor.addresses()
    other_versions(first, "torch", "1.0")
    other_versions(second, "numpy", "1.26")
    with pytest.raises(
        ClusterError, match=rf"no worker .* can be used: .*{first}: it has torch 1.*{second}: it has numpy 1"
    ):
        thread_executor.check()


def test_a_store_that_workers_see_leaves_nothing_behind(tmp_path: Path) -> None:
    with executor_on_threads(print) as thread_executor:
        assert len(thread_executor.check(tmp_path)) == 2
        assert len(list(tmp_path.iterdir())) == 1  # for workers that come later
        assert len(thread_executor.check(tmp_path)) == 2
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_tidied_up_meanwhile_is_still_seen(thread_executor: DaskExecutor, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    store._make()
    assert len(thread_executor.check(store.path)) == 2
    assert gc_store(store).leftovers_removed == 0
    [shown] = store.path.glob(".cluster-*")
    shown.unlink()  # by whoever tidies up by hand
    assert len(thread_executor.check(store.path)) == 2
    os.utime(shown, (0, 0))  # as a client that was killed leaves it
    assert gc_store(store).leftovers_removed == 1


def test_a_store_that_no_worker_sees_is_an_error_before_any_work(
    thread_executor: DaskExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the workers see what the client sees, so the file is moved away as soon as it is there."""
    store = tmp_path / "store"
    store.mkdir()
    write = Path.write_text

    def elsewhere(path: Path, text: str) -> int:
        return write(path.with_name("elsewhere"), text)

    monkeypatch.setattr(Path, "write_text", elsewhere)
    with pytest.raises(ClusterError, match=f"does not see the store {store} "):
        thread_executor.check(store)


def test_another_folder_at_the_stores_path_is_refused(
    thread_executor: DaskExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def other(path: Path, text: str) -> int:
        return write(path, "another run's")

    monkeypatch.setattr(Path, "write_text", other)
    with pytest.raises(ClusterError, match=f"another folder is at {tmp_path} there"):
        thread_executor.check(tmp_path)


def test_a_store_that_cannot_be_written_is_an_error(thread_executor: DaskExecutor, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot write into the store .*nowhere: No such file"):
        thread_executor.check(tmp_path / "nowhere")


def test_a_scheduler_without_workers_is_an_error_after_a_while(tmp_path: Path, said: list[str]) -> None:
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        connect(cluster, say=said.append) as dask_executor,
    ):
        dask_executor.patience = 0.5
        with pytest.raises(
            ClusterError, match=r"no worker came to .* within 0\.5 s; start some, such as: dask worker tcp"
        ):
            dask_executor.check(tmp_path)


def test_a_worker_that_stands_still_is_waited_for_once(
    thread_executor: DaskExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of its results, and no result is lost when it goes on."""
    monkeypatch.setattr(dispatch, "RESULT_SECONDS", 0.2)
    monkeypatch.setattr(dispatch, "LOOK_SECONDS", 0.1)
    silent, waits, probes = thread_executor.addresses()[0], [], []
    result, each = thread_executor.result, thread_executor.each

    def stands_still() -> bool:
        return len(probes) < 3 and len(waits) < 20  # which the test fails for, instead of going on for ever

    def of_silent(future: Any) -> bool:
        return silent in thread_executor.scheduler.ask("who_has", keys=[future.key])[future.key]

    def result_or_none(future: Any, what: str, timeout: float | None = None) -> Any:
        if stands_still() and of_silent(future):
            waits.append(what)
            raise TimeoutError
        return result(future, what, timeout)

    def each_or_none(question: Any, addresses: Any = None, seconds: float | None = None) -> dict[str, Any]:
        if addresses == [silent]:
            probes.append(silent)
            if stands_still():
                return {silent: TimeoutError()}
        return each(question, addresses, seconds)

    monkeypatch.setattr(thread_executor, "result", result_or_none)
    monkeypatch.setattr(thread_executor, "each", each_or_none)

    def work(_context: None, n: int, worker: Worker, *_: Any) -> tuple[int, str]:
        time.sleep(0.02)
        return n * n, worker.name

    found = dict(thread_executor.map(work, range(16), in_flight=8, interruptible=False))
    assert {n: square for n, (square, _) in found.items()} == {n: n * n for n in range(16)}
    assert {name for _, name in found.values()} == {"0", "1"}
    assert len(waits) == 1
    assert len(probes) == 3


def test_what_was_given_stays_open(cluster_address: str) -> None:
    from distributed import Client

    with Client(cluster_address) as client:
        with connect(client, say=print) as dask_executor:
            assert dask_executor.client is client
            with connect(dask_executor) as same:
                assert same is dask_executor
        assert client.submit(sum, [1, 2]).result() == 3


def test_a_client_that_waits_for_nobody_is_refused(cluster_address: str) -> None:
    import asyncio

    from distributed import Client

    async def give() -> None:
        async with Client(cluster_address, asynchronous=True) as client:
            with (
                pytest.raises(UsageError, match=r"the Client is asynchronous.* give its scheduler's address"),
                connect(client),
            ):
                pass

    asyncio.run(give())


def test_a_client_that_is_closed_is_refused(cluster_address: str) -> None:
    from distributed import Client

    with Client(cluster_address) as client:
        pass
    with pytest.raises(ClusterError, match="the Client is closed; give one that is open"), connect(client):
        pass


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurepipe.execution.dask.CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(
            ClusterError,
            match=r"no scheduler answers at tcp://127\.0\.0\.1:9 .*is it running\? Start one with: dask",
        ),
        connect("tcp://127.0.0.1:9"),
    ):
        pass


def test_a_scheduler_file(cluster_address: str, tmp_path: Path) -> None:
    import json

    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": cluster_address}))
    with connect(str(file), say=print) as dask_executor:
        assert len(dask_executor.addresses()) == 2
    with (
        pytest.raises(ClusterError, match=r"scheduler file .*nothing\.json does not exist"),
        connect(tmp_path / "nothing.json"),
    ):
        pass


@pytest.mark.slow
def test_facts_are_asked_of_everyone_and_a_dead_one_is_left_out(
    dask_executor: DaskExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dask_executor._known()
    ghost: dict[str, Any] = dict(known) | {"tcp://127.0.0.1:9": next(iter(known.values()))}
    monkeypatch.setattr(dask_executor, "_known", lambda: ghost)
    for seconds in ("ANSWER_SECONDS", "LAST_SECONDS"):  # the living answer at once
        monkeypatch.setattr(f"featurepipe.execution.worker_pool.{seconds}", 3.0)
    assert {worker.address for worker in dask_executor.workers()} == set(known)


def test_a_scheduler_without_our_package_is_an_error_before_any_work(own_executor: DaskExecutor) -> None:
    def lose_package() -> None:
        import sys

        for name in list(sys.modules):
            if name.partition(".")[0] == "featurepipe":
                sys.modules[name] = None  # type: ignore[assignment]

    own_executor.client.run_on_scheduler(lose_package)
    with pytest.raises(ClusterError, match=r"the scheduler tcp://\S+ cannot read our tasks \(.*featurepipe"):
        own_executor.check()
