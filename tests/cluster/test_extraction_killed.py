"""Extraction over workers that are killed, stopped, slow or short of memory, and a scheduler or client that goes away."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import ClusterError
from featurepipe.execution import DaskExecutor, connect
from featurepipe.extraction import compute
from featurepipe.extraction.extract import extract
from featurepipe.extraction.shards import ShardSizes
from featurepipe.store import FeatureStore, verify_store

pytestmark = pytest.mark.slow

IMAGES = 240
NODES = ["c1.1:flatten"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(IMAGES):
        pixels = np.random.default_rng(n).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:04d}.png")
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 40 images."""
    monkeypatch.setattr(compute, "ShardSizes", lambda: ShardSizes(first=40, most=40))


def run(source: Any, store: Path, dask_executor: Any, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "dataset": "photos", "backbone": "lenet5", "weights": "none", "precision": "fp32", "batch_size": 4, "silent": True,
        "nodes": NODES, "workers": 1,
    }  # fmt: skip
    return extract(source, store, cluster=dask_executor, **{**defaults, **options})


def rows(store: Path) -> int:
    return sum(part.rows for space in FeatureStore(store).spaces() for part in space.parts())


def check_whole(store: Path, photos: Path, tmp_path: Path) -> None:
    """All features are there, and as one machine computes them."""
    assert verify_store(FeatureStore(store)).clean
    run(photos, tmp_path / "alone", None)
    mine, theirs = (FeatureStore(path).features("photos", NODES[0]) for path in (store, tmp_path / "alone"))
    assert list(mine.ids) == list(theirs.ids)
    assert len(mine.ids) == IMAGES
    np.testing.assert_allclose(mine.read(np.float32), theirs.read(np.float32), rtol=2e-3, atol=1e-4)


@contextmanager
def meanwhile(store: Path, count: int, action: Callable[[], None]) -> Any:
    """While the block runs, does something as soon as so many rows are committed."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not over.is_set():
            if store.exists() and sum(1 for _ in store.glob("spaces/*/parts/[!.]*.h5")) >= count:
                action()
                return
            time.sleep(0.02)

    over = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def small_parts(dask_executor: DaskExecutor) -> None:
    """Workers commit after every ten images."""

    def shrink() -> None:
        from featurepipe.extraction import compute

        compute.part_bytes = lambda worker: 90_000

    dask_executor.client.run(shrink)


def test_a_worker_killed_in_a_slice_loses_what_it_had_not_committed(
    own_executor: DaskExecutor, processes: Any, photos: Path, tmp_path: Path, slow_folder: Any
) -> None:
    small_parts(own_executor)
    store = tmp_path / "store"
    with meanwhile(store, 6, processes.workers[0].kill):
        record = run(slow_folder(photos, 0.02), store, own_executor)
    assert record["counts"] == {"listed": IMAGES, "computed": IMAGES, "known": 0, "rejected": 0, "read": IMAGES}
    assert record["status"] == "done"
    assert rows(store) == IMAGES  # nothing that was committed was computed again
    check_whole(store, photos, tmp_path)


def test_a_stopped_worker_does_not_stall_the_end(
    own_executor: DaskExecutor, processes: Any, photos: Path, tmp_path: Path, slow_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("featurepipe.execution.dask.RESULT_SECONDS", 1.0)  # each time that a result of its is asked for
    monkeypatch.setattr("featurepipe.execution.dask.RETURN_SECONDS", 2.0)  # for its answer at the end
    store, start = tmp_path / "store", time.monotonic()
    with meanwhile(store, 2, lambda: processes.workers[0].send(signal.SIGSTOP)):
        record = run(slow_folder(photos, 0.01), store, own_executor)
    assert record["counts"]["computed"] == IMAGES
    assert time.monotonic() < start + 120  # Dask gives it up for dead after five minutes
    check_whole(store, photos, tmp_path)


def test_a_slow_worker_does_not_stall_the_end(
    own_executor: DaskExecutor, processes: Any, photos: Path, tmp_path: Path, slow_folder: Any
) -> None:
    slow = own_executor.workers()[0].pid

    class SlowThere(slow_folder):
        def read(self, locator: bytes) -> Any:
            import time

            time.sleep(3 if os.getpid() == slow else 0.005)
            return self._source.read(locator)

    store, start = tmp_path / "store", time.monotonic()
    record = run(SlowThere(photos, 0), store, own_executor)
    assert record["counts"]["computed"] == IMAGES
    assert time.monotonic() < start + 60  # its shards alone take two minutes each
    check_whole(store, photos, tmp_path)


def test_a_killed_scheduler_is_said_and_the_same_command_goes_on(
    own_executor: DaskExecutor, processes: Any, photos: Path, tmp_path: Path, slow_folder: Any
) -> None:
    small_parts(own_executor)
    store = tmp_path / "store"
    start = time.monotonic()
    with meanwhile(store, 6, processes.scheduler.kill), pytest.raises(ClusterError, match="same command again"):
        run(slow_folder(photos, 0.02), store, own_executor)
    assert time.monotonic() < start + 40
    (failed,) = FeatureStore(store).runs()
    assert (failed["status"], failed["exit_code"]) == ("failed", 1)
    for worker in processes.workers:  # they end by themselves when their scheduler is gone
        worker.kill()
        worker.wait()
    kept = rows(store)
    assert 0 < kept < IMAGES
    rest = run(photos, store, None)
    assert rest["counts"] == {
        "listed": IMAGES,
        "computed": IMAGES - kept,
        "known": kept,
        "rejected": 0,
        "read": IMAGES - kept,
    }
    check_whole(store, photos, tmp_path)


CLIENT = """
    import os, sys
    from featurepipe.cli import main
    from featurepipe.extraction import compute
    from featurepipe.extraction.shards import ShardSizes

    compute.ShardSizes = lambda: ShardSizes(first=40, most=40)
    code = main()
    sys.stderr.flush()
    os._exit(code)  # freeing all of torch takes seconds, and is not what is timed
"""
SLOW_READS = """
    import time
    from featurepipe.images.folder import FolderSource

    read = FolderSource.read
    FolderSource.read = lambda self, locator: (time.sleep(0.02), read(self, locator))[1]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_seconds_with_everything_committed(
    own_executor: DaskExecutor, processes: Any, photos: Path, tmp_path: Path, number: signal.Signals
) -> None:
    own_executor.client.run(exec, textwrap.dedent(SLOW_READS), {})
    store = tmp_path / "store"
    command = [
        sys.executable, "-c", textwrap.dedent(CLIENT), "extract", str(photos), "--store", str(store), "--backbone", "lenet5",
        "--weights", "none", "--precision", "fp32", "--workers", "1", "--scheduler", processes.address,
    ]  # fmt: skip
    client = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    asked = []
    with meanwhile(store, 1, lambda: (asked.append(time.monotonic()), client.send_signal(number))):
        _, said = client.communicate(timeout=150)
    assert time.monotonic() < asked[0] + 15  # two seconds on a quiet machine
    assert client.returncode == 128 + number, said
    assert f"stopped by {number.name}" in said
    (record,) = FeatureStore(store).runs()
    assert record["status"] == "interrupted"
    assert record["counts"]["computed"] == rows(store) > 0
    assert rows(store) < IMAGES
    rest = run(photos, store, own_executor, nodes="bottleneck")
    assert rest["counts"]["computed"] == IMAGES - record["counts"]["computed"]


def test_a_killed_client_leaves_a_store_that_goes_on(
    own_executor: DaskExecutor, processes: Any, photos: Path, tmp_path: Path
) -> None:
    own_executor.client.run(exec, textwrap.dedent(SLOW_READS), {})
    store = tmp_path / "store"
    command = [
        sys.executable, "-c", textwrap.dedent(CLIENT), "extract", str(photos), "--store", str(store), "--backbone", "lenet5",
        "--weights", "none", "--precision", "fp32", "--workers", "1", "--node", NODES[0], "--scheduler", processes.address,
    ]  # fmt: skip
    client = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    with meanwhile(store, 2, client.kill):
        client.wait()
    record = run(photos, store, own_executor)
    assert record["counts"]["listed"] == IMAGES == record["counts"]["computed"] + record["counts"]["known"]
    assert record["counts"]["known"] >= 80
    check_whole(store, photos, tmp_path)


def test_four_workers_on_few_cores(
    processes: Any, own_executor: DaskExecutor, photos: Path, tmp_path: Path, slow_folder: Any
) -> None:
    processes.add_worker()
    processes.add_worker()
    own_executor.wait_for_workers(4)
    record = run(slow_folder(photos, 0.01), tmp_path / "store", own_executor)
    assert record["counts"]["computed"] == IMAGES
    assert len(record["cluster"]["workers"]) == 4
    check_whole(tmp_path / "store", photos, tmp_path)


def test_a_worker_that_comes_later_takes_part(
    processes: Any,
    own_executor: DaskExecutor,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slow_folder: Any,
) -> None:
    monkeypatch.setattr(compute, "ShardSizes", lambda: ShardSizes(first=10, most=10))
    store, come = tmp_path / "store", tmp_path / "come"

    first = {worker.pid for worker in own_executor.workers()}

    class Waiting(slow_folder):
        def read(self, locator: bytes) -> Any:
            import os
            import time

            if os.getpid() not in first:
                come.touch()
            time.sleep(0.02 if come.exists() else 0.3)
            return self._source.read(locator)

    with meanwhile(store, 1, processes.add_worker):
        record = run(Waiting(photos, 0), store, own_executor)
    assert len(record["cluster"]["workers"]) == 3


def test_a_worker_without_memory_is_started_again_and_all_is_computed(
    photos: Path, tmp_path: Path, slow_folder: Any
) -> None:
    """Its process holds more than its limit allows as soon as it has begun; Dask ends it, and others go on."""
    from distributed import LocalCluster

    store, eaten = tmp_path / "store", tmp_path / "eaten"

    class Hungry(slow_folder):
        def read(self, locator: bytes) -> Any:
            import time

            try:
                eaten.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                self.memory = bytearray(b"x") * (900 << 20)
                time.sleep(5)
            return super().read(locator)

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        memory_limit="1200MiB", silence_logs=50,
    ) as cluster, connect(cluster.scheduler_address, say=lambda _: None) as dask_executor:  # fmt: skip
        before = {worker.pid for worker in dask_executor.workers()}
        record = run(Hungry(photos, 0.01), store, dask_executor)
        after = {worker.pid for worker in dask_executor.workers()}
    assert eaten.exists()
    assert len(before & after) == 1
    assert record["counts"]["computed"] == IMAGES
    check_whole(store, photos, tmp_path)
