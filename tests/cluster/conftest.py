"""A scheduler and workers as processes on loopback."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from distributed import LocalCluster

from featurepipe.execution import DaskExecutor, connect
from featurepipe.images import open_source


@pytest.fixture(scope="module", autouse=True)
def functions_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions of the test module are sent to workers by value: they cannot import it."""
    modules = (request.module, sys.modules[__name__])
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@contextmanager
def local_cluster(workers: int = 2, **options: Any) -> Iterator[LocalCluster]:
    """A scheduler and worker processes that end with the block."""
    given = {"threads_per_worker": 1, "memory_limit": "3GiB", "silence_logs": 50} | options
    with LocalCluster(
        n_workers=workers, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0", **given
    ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    """A scheduler with two workers, shared by all tests that leave it whole."""
    with local_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def said() -> list[str]:
    """What a team of the test has said."""
    return []


@pytest.fixture
def team(cluster_address: str, said: list[str]) -> Iterator[DaskExecutor]:
    """A team of the two shared workers."""
    with connect(cluster_address, say=said.append) as team:
        yield team


class SlowFolder:
    """A folder whose images take a while: all of them, or those with some text in their path."""

    def __init__(self, path: Path, seconds: float | dict[str, float]) -> None:
        self._source = open_source(path)
        self._seconds = seconds if isinstance(seconds, dict) else {"": seconds}
        self.name, self.location = self._source.name, self._source.location

    def scan(self) -> Any:
        return self._source.scan()

    def read(self, locator: bytes) -> Any:
        time.sleep(next((wait for text, wait in self._seconds.items() if text.encode() in locator), 0))
        return self._source.read(locator)

    def close(self) -> None:
        self._source.close()


@pytest.fixture
def slow_folder() -> type[SlowFolder]:
    """A source that takes its time, wherever it is read."""
    return SlowFolder


class Processes:
    """What a user would start in terminals: `dask scheduler`, and `dask worker` so many times. Each can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workers = folder, []
        self.file = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self.file)
        )
        self._until(self._is_written)
        self.address = json.loads(self.file.read_text())["address"]

    def _start(self, role: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{role}", "--no-dashboard", *options]
        with (self.folder / f"{role}-{len(self.workers)}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder)

    def add_worker(self, *options: str) -> None:
        name = f"worker-{len(self.workers)}"
        here = ("--host", "127.0.0.1", "--nthreads", "1", "--name", name, "--local-directory", str(self.folder))
        self.workers.append(self._start("worker", self.address, *here, "--no-nanny", *options))

    def _is_written(self) -> bool:
        """It is there some time before all that is in it."""
        return self.file.exists() and self.file.read_text().endswith("}")

    def _until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not is_true():
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.02)

    def end(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """A scheduler and two workers of the test's own, to kill."""
    folder = tmp_path / "processes"
    folder.mkdir()
    started = Processes(folder)
    try:
        started.add_worker()
        started.add_worker()
        yield started
    finally:
        started.end()


@pytest.fixture
def own_team(processes: Processes, said: list[str]) -> Iterator[DaskExecutor]:
    """A team of the two workers of `processes`."""
    with connect(processes.address, say=said.append) as team:
        team.wait_for_workers(2)
        said.clear()  # on a slow machine: that it waits
        yield team
