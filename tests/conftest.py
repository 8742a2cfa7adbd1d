"""Processes that start in milliseconds (a server has torch loaded, and forks for each), Dask workers, made-up datasets."""

import ctypes
import gc
import hashlib
import inspect
import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from PIL import Image as Picture
from sklearn.linear_model import LogisticRegression

from featurepipe.execution import DaskExecutor
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.layer_depth import measure
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.snapshots import SCHEMA

os.environ["FEATUREPIPE_CACHE"] = ""  # nothing is kept in the home of who runs the tests; inherited by processes

settings.register_profile("any machine", deadline=None)  # a busy machine is no counterexample
settings.load_profile("any machine")

NODE_SECONDS = 0.01
"""How long a comparison of layers times each node here: each forward of a few, and not a second of them."""


def sync_without_waiting() -> None:
    """Makes `os.fsync` of files and folders return at once: no test takes the power away, and a kill loses no page of the kernel.

    That is 15 waits for the disk in each test that writes to a store. What is synced, and in which order, tests see by
    functions of their own in its place. Bad descriptors, and what is no file, fail as ever.
    """
    real = os.fsync

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            real(descriptor)

    os.fsync = fsync


SERVER = (
    textwrap.dedent("""
    import gc, importlib, json, os, signal, stat, sys, threading, traceback
    from typing import Any
    import tqdm

    SYNC
    sync_without_waiting()

    # Its usual lock is one for all processes that come of this one, and stays taken when one is killed that has it.
    tqdm.tqdm.set_lock(threading.RLock())
    tqdm.tqdm.monitor_interval = 0  # no thread of its own, which could have the lock while this process forks
    import torch
    import featurepipe.cli, featurepipe.demo
    from featurepipe.backbones import load_backbone
    import featurepipe.extraction.extract, featurepipe.layer_depth.depth, featurepipe.layer_depth.measure
    import featurepipe.store.verify, featurepipe.store.compact, featurepipe.store.gc, featurepipe.store.arrays
    import featurepipe.store.exports
    import featurepipe.training.train, featurepipe.prediction.predict, featurepipe.evaluation.evaluate
    import featurepipe.heads.bundle.bundle, featurepipe.jobs.run, featurepipe.reporting.page
    import skops.io, sklearn.linear_model, scipy.stats, bokeh.embed, bokeh.plotting, dask.array  # seconds of each command
    import distributed.cli.dask_scheduler, distributed.cli.dask_worker

    torch.set_num_threads(1)
    featurepipe.layer_depth.measure.NODE_SECONDS = NODE_TIME
    load_backbone("lenet5", "none").columns(["c3"])  # what tracing loads
    gc.freeze()  # else the first collection in a fork would copy all pages of these modules
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            status = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
            print(status, flush=True)
            continue
        if "load" in order:
            for name in order["load"]:
                importlib.import_module(name)
            gc.freeze()
            print("loaded", flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        for descriptor, path in enumerate(["/dev/null", order["stdout"], order["stderr"]]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(order["seconds"])  # nothing here takes that long, even where four tests share two cores
        os.chdir(order["cwd"])
        sys.argv = ["featurepipe", *order["args"]]
        code = 0
        try:
            exec(compile(order["code"], "<test>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        threading._shutdown()  # waits for threads, as a usual end does; freeing all of torch takes seconds in a fork
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # a test that fills the disk: what Python could not say does not change how it ends
                pass
        os._exit(code)
""")
    .replace("NODE_TIME", str(NODE_SECONDS))
    .replace("SYNC", inspect.getsource(sync_without_waiting))
)
ROOT = Path(__file__).parent.parent
DASK = f"""
    import ctypes, signal, sys

    sys.path.insert(0, {str(ROOT)!r})  # what tests send may name their modules
    from distributed.cli.dask_{{role}} import main

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server, should the tests be killed
    main()
"""
FORKED_WORKERS = f"""
    import sys

    sys.path.insert(0, {str(ROOT)!r})
    from tests.forking import fork_dask_workers

    fork_dask_workers()
"""
"""Code of a process that will start Dask workers by nannies."""
MAIN = "import sys; from featurepipe.cli import main; sys.exit(main())"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first (a notebook takes a minute): no process is left alone with one at the end."""
    items.sort(
        key=lambda item: item.path.stem not in {"test_tutorials", "test_benchmarks", "test_readme", "test_pipelines"}
    )


def pytest_collection_finish() -> None:
    """Modules stay, so no search for garbage need walk through what they hold: a tenth of the time of a page.

    What a test leaves in circles is searched for less often than usual, which was a twentieth of the time of all tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(autouse=True, scope="session")
def quick_timing() -> None:
    """Nodes are timed as long as it takes to see that they are; `tests/backbones/test_timing.py` tests the times."""
    measure.NODE_SECONDS = NODE_SECONDS


@pytest.fixture(autouse=True, scope="session")
def quick_syncing() -> None:
    """As in the processes that are started here."""
    sync_without_waiting()


@pytest.fixture(autouse=True)
def signals_left_alone() -> Iterator[None]:
    """No test, and no library that it imports, leaves a handler of a signal behind, on which a later test would depend."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@dataclass(frozen=True)
class Finished:
    """How a process ended: ``code`` is negative for a signal."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Process:
    def __init__(self, launcher: "Launcher", pid: int, folder: Path) -> None:
        self._launcher, self.pid, self._folder = launcher, pid, folder
        self._finished: Finished | None = None

    def err(self) -> str:
        """What it has written to standard error so far."""
        return (self._folder / "err").read_text()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def wait(self) -> Finished:
        if self._finished is None:
            code = int(self._launcher.ask({"wait": self.pid}))
            out, err = ((self._folder / name).read_text() for name in ("out", "err"))
            self._finished = Finished(code, out, err)
        return self._finished


class Launcher:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count, self._asking = folder, 0, threading.Lock()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._server.stdout.readline() == "ready\n"

    def ask(self, order: dict[str, Any]) -> str:
        with self._asking:
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
            return self._server.stdout.readline()

    def start(self, code: str, args: Sequence[object] = (), cwd: Path | None = None, *, seconds: int = 300) -> Process:
        """Starts a process that runs ``code`` with ``sys.argv[1:]`` as ``args``, and is ended after ``seconds``, unless 0."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        for name in ("out", "err"):  # it may be killed before it opens them
            (folder / name).touch()
        order = {"code": textwrap.dedent(code), "args": [str(arg) for arg in args], "cwd": str(cwd or folder)}
        order |= {"stdout": str(folder / "out"), "stderr": str(folder / "err"), "seconds": seconds}
        pid = int(self.ask(order))
        return Process(self, pid, folder)

    def load(self, *modules: str) -> None:
        """Imports modules in the server, so that no process started from now on need do so."""
        assert self.ask({"load": modules}) == "loaded\n"

    def close(self) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts processes that have torch and featurepipe loaded already."""
    launcher = Launcher(tmp_path_factory.mktemp("processes"))
    yield launcher
    launcher.close()


@pytest.fixture
def cli(launcher: Launcher) -> Callable[..., Finished]:
    """Runs the command line in a process of its own."""

    def run(*args: object, cwd: Path | None = None) -> Finished:
        return launcher.start(MAIN, args, cwd).wait()

    return run


# Workers of a Dask cluster, as processes on loopback


@contextmanager
def travelling(*modules: ModuleType) -> Iterator[None]:
    """While the block runs, functions of modules that other processes cannot import travel by value."""
    import cloudpickle

    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def without_privileges() -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which this thread is a user who may not read everything; skips the test where it cannot become one."""
    return _without_privileges


@contextmanager
def _without_privileges() -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("<Ii", 0x20080522, 0)
    before = ctypes.create_string_buffer(24)
    if os.geteuid():
        yield
        return
    if libc.capget(header, before):
        pytest.skip("capabilities cannot be read")
    dropped = bytearray(before.raw)
    dropped[0:4] = dropped[12:16] = bytes(4)  # only the effective ones, so that they can be taken up again
    if libc.capset(header, bytes(dropped)):
        pytest.skip("capabilities cannot be dropped")
    try:
        yield
    finally:
        assert not libc.capset(header, before.raw)


@pytest.fixture
def said() -> list[str]:
    """What an executor of the test has said."""
    return []


@pytest.fixture
def dask_executor(cluster_address: str, said: list[str]) -> Iterator[DaskExecutor]:
    """An executor on the two shared workers."""
    from featurepipe.execution import connect

    with connect(cluster_address, say=said.append) as dask_executor:
        yield dask_executor


@pytest.fixture
def thread_executor(said: list[str]) -> Iterator[DaskExecutor]:
    """An executor on two workers that are threads of this process: for what is neither Dask's nor a process' own."""
    from tests.thread_cluster import executor_on_threads

    with executor_on_threads(said.append) as thread_executor:
        yield thread_executor


class Processes:
    """What a user would start in terminals: `dask scheduler`, and `dask worker` so many times. Each can be killed."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.workers: list[Process] = []
        self.file = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self.file)
        )
        self._until(self._is_written)
        self.address = json.loads(self.file.read_text())["address"]

    def _start(self, role: str, *options: str) -> Process:
        return self.launcher.start(DASK.format(role=role), ["--no-dashboard", *options], self.folder, seconds=0)

    def add_worker(self, *options: str) -> None:
        name = str(len(self.workers))
        here = ("--host", "127.0.0.1", "--nthreads", "1", "--name", name, "--local-directory", str(self.folder))
        self.workers.append(self._start("worker", self.address, *here, "--no-nanny", *options))

    def _is_written(self) -> bool:
        """It is there some time before all that is in it."""
        return self.file.exists() and self.file.read_text().endswith("}")

    def _until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_true():
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.workers, self.scheduler]:
            with suppress(ProcessLookupError):
                process.send(signal.SIGCONT)
                process.kill()
            process.wait()


@pytest.fixture(scope="session")
def cluster_address(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler with two workers, shared by all tests that leave it whole."""
    from featurepipe.execution import connect

    with Processes(launcher, tmp_path_factory.mktemp("cluster")) as started:
        for _ in range(2):
            started.add_worker("--memory-limit", "3GiB")
        with connect(started.address) as dask_executor:
            dask_executor.wait_for_workers(2)
        yield started.address


@pytest.fixture
def processes(launcher: Launcher, tmp_path: Path) -> Iterator[Processes]:
    """A scheduler and two workers of the test's own, to kill."""
    folder = tmp_path / "processes"
    folder.mkdir()
    with Processes(launcher, folder) as started:
        started.add_worker()
        started.add_worker()
        yield started


@pytest.fixture
def own_executor(processes: Processes, said: list[str]) -> Iterator[DaskExecutor]:
    """An executor on the two workers of `processes`."""
    from featurepipe.execution import connect

    with connect(processes.address, say=said.append) as dask_executor:
        dask_executor.wait_for_workers(2)
        said.clear()  # on a slow machine: that it waits
        yield dask_executor


# Datasets of made-up images, as stage two finds them in a store

FIELDS = {"dtype": "float32", "net": "tiny", "precision": "fp32"}
CENTRES = {"cat": [2, 0, 0], "dog": [0, 2, 0], "emu": [0, 0, 2]}


@dataclass(frozen=True)
class Image:
    """One row of a dataset; images with the same ``content`` are copies of one another."""

    id: str
    content: str
    label: str | None
    split: str | None = None
    is_usable: bool = True

    @property
    def key(self) -> bytes:
        return hashlib.sha256(self.content.encode()).digest()

    def features(self) -> np.ndarray:
        """Three values that follow from the content: near the centre of the class that it starts with, but noisy."""
        noise = np.random.default_rng(int.from_bytes(self.key[8:16])).normal(size=3)
        return (np.array(CENTRES[self.content.split("-")[0]]) + noise).astype(np.float32)


def keys64(images: list[Image]) -> np.ndarray:
    return np.array([int.from_bytes(image.key[:8], "little") for image in images], np.uint64)


def images(split: str | None, count: int = 40, start: int = 0) -> list[Image]:
    """``count`` different images of each class."""
    numbers = range(start, start + count)
    return [Image(f"{split}/{name}/{i}.png", f"{name}-{split}-{i}", name, split) for name in CENTRES for i in numbers]


class Datasets:
    """Writes datasets of made-up images, and bundles trained on some of them."""

    image, images, keys64 = staticmethod(Image), staticmethod(images), staticmethod(keys64)

    def __init__(self, folder: Path) -> None:
        self.store = FeatureStore(folder / "store")

    def write(self, rows: list[Image], name: str = "zoo", fields: dict[str, Any] = FIELDS) -> None:
        space = self.store.open_space(fields, backbone="tiny", notes={"aliases": {"bottleneck": "b"}})
        usable = list({row.key: row for row in rows if row.is_usable}.values())
        values = np.stack([row.features() for row in usable])
        run_id = self.store.new_run_id()
        with space.writer(run_id) as writer:
            writer.add(
                np.stack([np.frombuffer(row.key, np.uint8) for row in usable]), [row.id for row in usable],
                np.arange(len(usable)), np.arange(len(usable)), {"a:gap": values[:, :1], "b:gap": values[:, 1:]},
            )  # fmt: skip
        columns = {
            "id": [row.id for row in rows],
            "key": [row.key for row in rows],
            "label": [row.label for row in rows],
            "split": [row.split for row in rows],
            "size": [1] * len(rows),
            "mtime_ns": [1] * len(rows),
            "status": ["ok" if row.is_usable else "rejected" for row in rows],
            "reason": [None if row.is_usable else "truncated: ends early" for row in rows],
        }
        self.store.write_snapshot(name, run_id, pa.table(columns, schema=SCHEMA))

    def features(self, name: str = "zoo") -> FeatureSet:
        return self.store.features(name, node=["a:gap", "b:gap"])

    def bundle(self, trained_on: list[Image], fields: dict[str, Any] = FIELDS) -> Bundle:
        """A logistic head fitted to these images."""
        from featurepipe.store import fingerprint

        head = LogisticRegression().fit(np.stack([i.features() for i in trained_on]), [i.label for i in trained_on])
        return Bundle(
            backbone={"name": "tiny", "weights": "none", "seed": 3, "description": {}},
            space=fields,
            fingerprint=fingerprint(fields),
            columns=("a:gap", "b:gap"),
            family="logistic",
            params={},
            head=head,
            classes=tuple(head.classes_),
            temperature=None,
            metrics={},
            training={},
            seen=keys64(trained_on),
        )


@pytest.fixture(scope="session")
def noisy_jpeg() -> Callable[..., bytes]:
    """Makes JPEGs, whole ones and those of a copy that stopped after a third, which libjpeg can only repair."""

    def make(seed: int, *, damaged: bool = False) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), np.uint8)
        Picture.fromarray(pixels).save(buffer, "JPEG")
        payload = buffer.getvalue()
        third = len(payload) // 3
        return payload[:third] + bytes(len(payload) - third - 2) + payload[-2:] if damaged else payload

    return make


@pytest.fixture
def zoo(tmp_path: Path) -> Datasets:
    return Datasets(tmp_path)


# Images whose features are given

MADE_UP = {"dtype": "float32", "net": "made-up", "precision": "fp32"}


def key_of(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


class Pile:
    """A pile of images, by id, that changes from run to run; those with the same content are copies and share their features."""

    def __init__(self, path: Path) -> None:
        self.store = FeatureStore(path)
        self.images: dict[str, dict[str, Any]] = {}

    def add(
        self,
        content: str,
        *,
        name: str = "",
        label: str | None = None,
        split: str | None = None,
        group: str | None = None,
    ) -> None:
        """Adds an image; its id is its content unless told otherwise."""
        self.images[name or content] = {"content": content, "label": label, "split": split, "group": group}

    def night(self, features: dict[str, dict[str, np.ndarray]] | None = None, fields: dict[str, Any] = MADE_UP) -> str:
        """Writes features (column, content, values) that come with this night, and a snapshot; its run id."""
        run_id = self.store.new_run_id()
        space = self.store.open_space(fields, backbone="made-up", notes={"aliases": {"bottleneck": "b"}})
        for column, rows in (features or {}).items():
            with space.writer(self.store.new_run_id()) as writer:
                keys = np.stack([np.frombuffer(key_of(content), np.uint8) for content in rows])
                numbers = np.arange(len(rows))
                writer.add(keys, list(rows), numbers, numbers, {column: np.stack(list(rows.values())).astype("f4")})
        self.snapshot(run_id)
        return run_id

    def snapshot(self, run_id: str) -> None:
        rows = list(self.images.values())
        table = {
            "id": list(self.images),
            "key": [key_of(row["content"]) for row in rows],
            "label": [row["label"] for row in rows],
            "split": [row["split"] for row in rows],
            "size": [1] * len(rows),
            "mtime_ns": [1] * len(rows),
            "status": ["rejected" if row["content"].startswith("broken") else "ok" for row in rows],
            "reason": [None] * len(rows),
        }
        made = pa.table(table, schema=SCHEMA)
        if any(row["group"] for row in rows):
            made = made.append_column("column:patient", pa.array([row["group"] for row in rows], pa.string()))
        self.store.write_snapshot("pile", run_id, made)

    def add_rows(
        self, names: Sequence[str], values: np.ndarray, groups: Sequence[str | None] = ()
    ) -> dict[str, np.ndarray]:
        """Adds images; what ``night`` takes for one column."""
        for name, group in zip(names, groups or [None] * len(names), strict=True):
            self.add(name, group=group)
        return dict(zip(names, values, strict=True))


@pytest.fixture
def pile(tmp_path: Path) -> Pile:
    return Pile(tmp_path / "store")
