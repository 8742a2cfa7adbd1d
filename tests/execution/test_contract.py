"""The contract of `featurepipe.execution.Executor`: one suite over this process, its processes, and a Dask cluster.

It holds for `DaskExecutor` on threads of this process, too, on which other tests stand.

Where executors rightly differ, `Kind` says how, and the tests expect just that.
"""

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurepipe.errors import (
    ClusterError,
    FeaturepipeError,
    Interrupted,
    SourceError,
    StoreError,
    StoreLocked,
    UnknownSnapshot,
    UsageError,
    WorkerRefused,
)
from featurepipe.execution import DaskExecutor, Executor, LocalExecutor, ProcessExecutor
from featurepipe.execution.executor import TaskResult, in_order
from featurepipe.execution.local import THREAD_VARIABLES
from featurepipe.execution.worker import Carried, gpu_names, pickled
from tests.conftest import travelling
from tests.thread_cluster import MEMORY

SECONDS = 60.0
"""After which a shard that waits for something gives up, and its test fails."""


@dataclass(frozen=True)
class Kind:
    """How one executor differs from the others.

    Attributes:
        name: of the executor.
        workers: processes that work.
        ahead: shards begun beyond the one that is yielded, with ``in_flight=2``.
        pickles: how often one `map` pickles its context.
        retries: whether errors that are not ours are tried again.
        others: whether a worker that refuses has others beside it, which do its shards.
        remembers: whether processes outlive a `map`, and know a context again.
    """

    name: str
    workers: int
    ahead: int
    pickles: int
    retries: bool = False
    others: bool = False
    remembers: bool = False


LOCAL = Kind("LocalExecutor", workers=1, ahead=0, pickles=0)
PROCESSES = Kind("ProcessExecutor", workers=2, ahead=3, pickles=1)
DASK = Kind("DaskExecutor", workers=2, ahead=3, pickles=1, retries=True, others=True, remembers=True)
THREADS = replace(DASK, name="DaskExecutor on threads")
ELSEWHERE = pytest.mark.parametrize("kind", [PROCESSES, DASK], ids=lambda kind: kind.name)
ON_THREADS = pytest.mark.parametrize("kind", [THREADS], ids=lambda kind: kind.name)


@pytest.fixture(scope="module", autouse=True)
def functions_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions of this module are sent by value: other processes cannot import it."""
    with travelling(request.module):
        yield


@pytest.fixture(params=[LOCAL, PROCESSES, DASK, THREADS], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def executor(kind: Kind, request: pytest.FixtureRequest) -> Executor:
    if kind is LOCAL:
        return LocalExecutor()
    if kind is PROCESSES:
        return ProcessExecutor(2)
    dask_executor: DaskExecutor = request.getfixturevalue("dask_executor" if kind is DASK else "thread_executor")
    dask_executor.patience = 2.0  # with those that are left, when workers refuse
    return dask_executor


def wait_for(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def marks(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


def mark(folder: Path, name: str) -> None:
    (folder / f"{name}-{os.urandom(6).hex()}").touch()


def square(_context, n, _worker, _stop, _report):
    return n * n


def until_stopped(folder: Path, _context, _n, _worker, stop, _report):
    mark(folder, "begun")
    wait_for(stop)
    mark(folder, "ended")
    return "stopped"


# Results and their order


def test_every_shard_comes_once_with_its_result(executor: Executor, kind: Kind) -> None:
    assert sorted(executor.map(square, range(12))) == [(n, n * n) for n in range(12)]
    assert list(executor.map(square, [])) == []
    assert executor.once(square, 7) == 49
    assert executor.expected() == executor.count() == len(executor.workers()) == kind.workers
    memory = {DASK: 3 << 30, THREADS: MEMORY}.get(kind, 0)
    assert {worker.memory_limit for worker in executor.workers()} == {memory}


def test_results_and_reports_come_in_order(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    def work(folder, n, _worker, _stop, report):
        if n == 0 and kind.workers > 1:
            wait_for((folder / "1").exists)  # so the second is done before the first
        report(f"line {n}")
        report({"of": n})
        (folder / str(n)).touch()
        return n

    events: list[Any] = []
    for _, n in executor.map(work, range(6), context=tmp_path, ordered=True, report=events.append):
        events.append(n)
    assert events == [event for n in range(6) for event in (f"line {n}", {"of": n}, n)]


def test_results_come_as_they_complete(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    def work(folder, n, _worker, _stop, _report):
        if n == 0 and kind.workers > 1:
            wait_for((folder / "told").exists)
        return n

    found = []
    for n, _ in executor.map(work, range(3), context=tmp_path):
        found.append(n)
        (tmp_path / "told").touch()
    assert sorted(found) == [0, 1, 2]
    assert (found[0] == 0) == (kind is LOCAL)


def test_results_behind_a_gap_are_dropped() -> None:
    """A shard that was not begun, because of a stop, ends what comes in order."""
    results = [(number, f"shard {number}", TaskResult("w", value=number)) for number in (2, 1, 5, 4)]
    assert [number for number, _, _ in in_order(results)] == [1, 2]


# What is in flight


def test_shards_are_pulled_only_when_there_is_room(executor: Executor, kind: Kind) -> None:
    pulled: list[int] = []

    def shards():
        for n in range(16):
            pulled.append(n)
            yield n

    for seen, _ in enumerate(executor.map(square, shards(), in_flight=2), 1):
        assert len(pulled) <= seen + kind.ahead
    assert pulled == list(range(16))


def test_a_shard_may_depend_on_results_before(executor: Executor) -> None:
    found: list[int] = []

    def shards():
        yield 1
        for _ in range(8):
            yield len(found)  # 0 as long as nothing has come

    found.extend(result for _, result in executor.map(square, shards(), in_flight=1))
    assert len(found) == 9


def test_lookahead_bounds_what_is_begun_beyond_the_oldest(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    others = 0 if kind is LOCAL else 2 * kind.workers

    def work(folder, n, _worker, _stop, _report):
        if n == 0:
            wait_for(lambda: marks(folder, "done") >= others)
            time.sleep(0.6)  # for what might be begun too early
        else:
            mark(folder, "done")
        return n

    pulled: list[int] = []
    shards = (pulled.append(n) or n for n in range(12))
    counts = [len(pulled) for _ in executor.map(work, shards, context=tmp_path, ordered=True, in_flight=9, lookahead=2)]
    assert counts[0] == 1 + others
    assert len(counts) == 12


def test_results_are_not_kept(executor: Executor, kind: Kind) -> None:
    def work(_context, n, _worker, _stop, _report):
        return np.full(1000, n)

    seen: list[weakref.ref[Any]] = []
    for _, result in executor.map(work, range(30), in_flight=2):
        seen.append(weakref.ref(result))
        del result
        assert sum(one() is not None for one in seen) <= kind.ahead + 1
    assert len(seen) == 30


# Stop, and the end


def test_a_stop_brings_back_what_runs_and_begins_no_more(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    work = partial(until_stopped, tmp_path)
    found = list(executor.map(work, range(9), stop=lambda: marks(tmp_path, "begun") > 0, ordered=True))
    assert [n for n, _ in found] == list(range(len(found)))
    assert 1 <= len(found) <= kind.workers
    assert {result for _, result in found} == {"stopped"}
    assert marks(tmp_path, "begun") == marks(tmp_path, "ended") <= kind.workers


def test_a_stop_at_once_begins_nothing(executor: Executor) -> None:
    pulled: list[int] = []
    assert list(executor.map(square, (pulled.append(n) for n in range(3)), stop=lambda: True)) == []
    assert pulled == []


def test_closed_early_leaves_nothing_running(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    def work(folder, n, *others):
        return n if n == 0 else until_stopped(folder, None, n, *others)

    with closing(executor.map(work, range(9), context=tmp_path)) as results:
        assert next(results) == (0, 0)
        wait_for(lambda: marks(tmp_path, "begun") >= kind.workers - 1)
    assert marks(tmp_path, "begun") == marks(tmp_path, "ended") <= kind.workers
    assert children() == []


@ELSEWHERE
def test_an_error_calls_back_what_runs(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    def work(folder, n, *others):
        if n == 1:
            return until_stopped(folder, None, n, *others)
        wait_for(lambda: marks(folder, "begun"))
        raise SourceError("the share is gone")

    with pytest.raises(SourceError):
        list(executor.map(work, range(2), context=tmp_path))
    assert marks(tmp_path, "ended") == 1


def children() -> list[str]:
    """Processes of loky that this one has started."""
    of_me = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in of_me if "LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes().decode()]


# Errors


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (SourceError("no images in 7", "a second line"), 1),
        (UnknownSnapshot("no such snapshot", "run-7"), 2),
        (StoreLocked("someone writes"), 75),
        (Interrupted("stopped", signal.SIGTERM), 143),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_ours_come_as_they_are(executor: Executor, error: Any, exit_code: int) -> None:
    def work(_context, _n, _worker, _stop, report):
        report("just before")
        raise error

    told: list[str] = []
    with pytest.raises(type(error)) as raised:
        list(executor.map(work, [7], report=told.append))
    assert (raised.value.lines, raised.value.exit_code) == (error.lines, exit_code)
    assert vars(raised.value) == vars(error)
    assert told == ["just before"]


def test_other_errors_are_tried_again_where_they_may_pass(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    def work(folder, succeeds_at, *_):
        mark(folder, succeeds_at)
        if marks(folder, succeeds_at) < int(succeeds_at):
            raise OSError(errno.EIO, "the share does not answer")
        return "done"

    if kind.retries:
        assert list(executor.map(work, ["4"], context=tmp_path)) == [("4", "done")]  # by default three times
    with pytest.raises(OSError, match="the share does not answer") as raised:
        list(executor.map(work, ["9"], context=tmp_path, retries=1))
    assert raised.value.errno == errno.EIO
    assert marks(tmp_path, "9") == (2 if kind.retries else 1)


def test_an_error_of_the_shards_comes_as_it_is(executor: Executor) -> None:
    def shards():
        yield 1
        raise SourceError("the listing ends early")

    with pytest.raises(SourceError, match="ends early"):
        list(executor.map(square, shards()))


def test_each_process_is_asked(executor: Executor, kind: Kind) -> None:
    assert all(isinstance(pid, int) for pid in executor.each(os.getpid).values())
    [*answers] = executor.each(partial(int, "no number")).values()
    assert {type(answer) for answer in answers} == {ValueError}
    assert len(answers) == (2 if kind.others else 1)


# The context


class Context:
    """Notes in a folder how often it is pickled, opened and closed."""

    def __init__(self, folder: Path, content: Any = None) -> None:
        self.folder, self.content = folder, content

    def __reduce__(self):
        mark(self.folder, "pickled")
        return open_context, (self.folder, self.content)

    def close(self) -> None:
        mark(self.folder, f"closed-{os.getpid()}")


def open_context(folder: Path, content: Any) -> Context:
    mark(folder, f"opened-{os.getpid()}")
    return Context(folder, content)


class Unclosable(Context):
    """Has something to complain of when it is closed."""

    def __reduce__(self):
        return Unclosable, (self.folder, self.content)

    def close(self) -> None:
        super().close()
        raise self.content


def which(context, _n, _worker, _stop, _report):
    time.sleep(0.02)  # so that both workers take part
    return os.getpid(), id(context)


def test_a_process_has_one_object_of_a_context(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    context = Context(tmp_path, b"small")
    results = {result for _, result in executor.map(which, range(12), context=context)}
    assert marks(tmp_path, "pickled") == kind.pickles
    assert len({pid for pid, _ in results}) == len(results) <= kind.workers  # one object a process
    for pid, _ in results:
        assert marks(tmp_path, f"opened-{pid}") == (0 if kind is LOCAL else 1)
    if kind is LOCAL:
        assert results == {(os.getpid(), id(context))}
    assert marks(tmp_path, f"closed-{os.getpid()}") == 0  # its owner closes it


def test_equal_contexts_are_opened_once_and_changed_ones_anew(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    def ask(content: str) -> set[int]:
        return {pid for _, (pid, _) in executor.map(which, range(8), context=Context(tmp_path, content))}

    asked = [ask("one"), ask("one"), ask("another")]
    opened = {pid: marks(tmp_path, f"opened-{pid}") for pids in asked for pid in pids}
    if kind.remembers:
        assert all(1 <= count <= 2 for count in opened.values())
        assert all(opened[pid] == 2 for pid in asked[2].intersection(*asked[:2]))
    else:
        assert set(opened.values()) == {0 if kind is LOCAL else 1}


def test_large_contexts_arrive_whole_and_leave_nothing_behind(executor: Executor, kind: Kind, tmp_path: Path) -> None:
    executor.check(tmp_path)
    before = sorted(tmp_path.iterdir())
    array = np.arange(400_000, dtype=np.float64)  # 3 MiB
    odd = np.arange(300_001, dtype=np.float32)[1:]
    context = {"array": array, "columns": array.reshape(4, -1).T, "odd": odd, "lines": ["text"] * 9}

    def work(context, n, *_):
        return float(context["array"].sum() + context["columns"].sum() + context["odd"][n] + len(context["lines"]))

    assert dict(executor.map(work, range(3), context=context)) == {n: work(context, n) for n in range(3)}
    assert sorted(tmp_path.iterdir()) == before


def test_processes_share_the_large_arrays_of_a_context() -> None:
    def work(context, _n, *_):
        return context.flags.writeable, context.flags.aligned, context.ctypes.data % 64

    [(_, result)] = ProcessExecutor(1).map(work, [0], context=np.zeros(1 << 20))
    assert result == (False, True, 0)  # pages of the file
    [(_, result)] = ProcessExecutor(1).map(work, [0], context=np.zeros(1 << 10))
    assert result[:2] == (True, True)


@pytest.mark.parametrize(("options", "threads"), [({}, 1), ({"threads": 3}, 3)])
def test_processes_may_use_the_threads_that_they_are_given(options: dict[str, int], threads: int) -> None:
    def work(_context, _n, worker, *_):
        return worker.threads, {os.environ.get(name) for name in THREAD_VARIABLES}

    executor = ProcessExecutor(1, **options)
    assert [worker.threads for worker in executor.workers()] == [threads]
    assert list(executor.map(work, [0])) == [(0, (threads, {str(threads)}))]


@ELSEWHERE
def test_a_context_that_cannot_travel_is_a_users_mistake(executor: Executor, kind: Kind) -> None:
    with pytest.raises(UsageError, match=r"what the work needs \(lock\) cannot be sent to another process .*lock"):
        list(executor.map(square, [1], context=threading.Lock()))


def test_a_context_that_cannot_travel_does_here() -> None:
    assert list(LocalExecutor().map(square, [2], context=threading.Lock())) == [(2, 4)]


@ELSEWHERE
def test_an_error_while_the_context_is_pickled_comes_as_it_is(executor: Executor, kind: Kind) -> None:
    class Refuses:
        def __reduce__(self):
            raise StoreError("the part is gone")

    with pytest.raises(StoreError, match="the part is gone"):
        list(executor.map(square, [1], context=Refuses()))


@ELSEWHERE
def test_a_context_whose_code_is_missing_is_refused(
    executor: Executor, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_at_the_client.py").write_text("class Thing: pass")
    with monkeypatch.context() as path:
        path.syspath_prepend(tmp_path)
        import only_at_the_client
    try:
        with pytest.raises(ClusterError, match=r"lacks what the work needs: .*only_at_the_client"):
            list(executor.map(square, [1], context=only_at_the_client.Thing()))
    finally:
        del sys.modules["only_at_the_client"]


@ELSEWHERE
def test_a_context_of_a_class_that_another_version_lacks_is_refused(
    executor: Executor, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    import featurepipe.display

    thing = type("Thing", (), {"__module__": "featurepipe.display"})
    monkeypatch.setattr(featurepipe.display, "Thing", thing, raising=False)
    with pytest.raises(ClusterError if kind is DASK else WorkerRefused, match=r"lacks what the work needs: .*Thing"):
        list(executor.map(square, [1], context=thing()))


@ON_THREADS
@pytest.mark.parametrize("fate", ["removed", "replaced"])
def test_a_file_that_is_not_the_contexts_is_refused(executor: Executor, tmp_path: Path, fate: str) -> None:
    executor.check(tmp_path)

    def shards():
        [file] = tmp_path.glob(".context-*")
        file.unlink() if fate == "removed" else file.write_bytes(b"another run's")
        yield 1

    why = "does not see .*context" if fate == "removed" else "sees something else at .*context"
    with pytest.raises(ClusterError, match=rf"no worker .* can be used: .*{why}"):
        list(executor.map(square, shards(), context=os.urandom(1 << 17)))
    assert list(tmp_path.glob(".context-*")) == []


@ON_THREADS
def test_a_context_that_finds_no_room_leaves_nothing(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    executor.check(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="No space left"):
        list(executor.map(square, [1], context=os.urandom(1 << 17)))
    assert list(tmp_path.glob(".context-*")) == []


def carried(context: Context) -> Carried:
    content = pickled(context)
    return Carried(str(hash(content)), content)


@pytest.fixture
def _no_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurepipe.execution.worker._CONTEXTS", {})


@pytest.mark.usefixtures("_no_contexts")
def test_contexts_that_are_not_needed_are_closed_and_those_in_use_are_not(tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / str(n)).mkdir()
    first, *others = (carried(Context(tmp_path / str(n))) for n in range(4))

    def closed() -> list[int]:
        return [marks(tmp_path / str(n), "closed") for n in range(4)]

    with first.opened() as used:
        for one in others:
            with one.opened():
                pass
        assert closed() == [0, 1, 1, 0]
        with first.opened() as again:
            assert again is used
    with others[0].opened():
        assert closed() == [0, 1, 1, 1]  # the first was used last
    assert marks(tmp_path / "0", "opened") == 1


@pytest.mark.usefixtures("_no_contexts")
def test_a_context_of_two_tasks_stays_open_until_both_have_ended(tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / str(n)).mkdir()
    shared, *others = (carried(Context(tmp_path / str(n))) for n in range(4))

    def come(*contexts: Carried) -> list[int]:
        for one in contexts:
            with one.opened():
                pass
        return [marks(tmp_path / str(n), "closed") for n in range(4)]

    with shared.opened():
        with pytest.raises(SourceError), shared.opened():  # a task that fails has ended, too
            raise SourceError("the share is gone")
        assert come(*others) == [0, 1, 1, 0]
    assert come(*others[:2]) == [1, 1, 1, 1]
    assert [marks(tmp_path / str(n), "opened") for n in range(4)] == [1, 2, 2, 1]


@pytest.mark.usefixtures("_no_contexts")
def test_a_context_whose_storage_is_gone_does_not_keep_the_next_from_opening(tmp_path: Path) -> None:
    for name in ("gone", "broken"):
        (tmp_path / name).mkdir()
    gone = carried(Unclosable(tmp_path / "gone", OSError(errno.ESTALE, "stale file handle")))
    broken = carried(Unclosable(tmp_path / "broken", ValueError("a mistake in the code")))
    third, fourth = (Carried(name, pickled(name)) for name in ("third", "fourth"))
    for one in (gone, broken):
        with one.opened():
            pass
    with third.opened() as context:
        assert context == "third"
    assert marks(tmp_path / "gone", "closed") == 1
    with pytest.raises(ValueError, match="a mistake in the code"), fourth.opened():
        pass


@pytest.mark.usefixtures("_no_contexts")
def test_threads_of_a_process_get_the_same_object(tmp_path: Path) -> None:
    one, found, together = carried(Context(tmp_path)), [], threading.Barrier(8)

    def take() -> None:
        together.wait()
        with one.opened() as context:
            found.append(context)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == marks(tmp_path, "opened") == 1


# Workers that refuse, are killed, or are slow


def test_a_worker_that_refuses_is_named_once_and_its_shards_are_done_elsewhere(
    executor: Executor, kind: Kind, request: pytest.FixtureRequest
) -> None:
    def work(bad, n, worker, _stop, _report):
        time.sleep(0.02)
        if bad in {worker.name, "all"}:
            raise WorkerRefused("its weights differ")
        return worker.name

    if not kind.others:
        with pytest.raises(WorkerRefused, match="its weights differ"):
            list(executor.map(work, range(3), context="all"))
        return
    said = request.getfixturevalue("said")
    found = dict(executor.map(work, range(12), context="0"))
    assert found == dict.fromkeys(range(12), "1")
    [line] = said
    assert line.startswith("worker 0 (")
    assert line.endswith(") is not used: its weights differ")
    with pytest.raises(ClusterError, match=r"no worker .* can be used: .*weights differ.*weights differ"):
        list(executor.map(work, range(3), context="all"))


@ON_THREADS
def test_a_worker_that_refuses_while_the_run_stops_does_not_keep_it(executor: Executor, tmp_path: Path) -> None:
    def work(folder, _n, _worker, stop, _report):
        mark(folder, "begun")
        wait_for(stop)
        raise WorkerRefused("it has lost the store")

    stop = lambda: marks(tmp_path, "begun") > 1  # noqa: E731
    assert list(executor.map(work, range(2), context=tmp_path, stop=stop)) == []


def kills(_context, name, *_):
    if name == "bomb.jpg":
        os.kill(os.getpid(), signal.SIGKILL)
    return name


@pytest.mark.slow
def test_a_killed_process_is_a_clear_error() -> None:
    with pytest.raises(ClusterError, match=r"was killed, or crashed, while .*bomb\.jpg.* had been begun: .* memory"):
        list(ProcessExecutor(2).map(kills, ["a", "bomb.jpg", "b"]))
    assert children() == []
    assert list(ProcessExecutor(2).map(kills, ["a"])) == [("a", "a")]


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_named(processes: Any, own_executor: DaskExecutor) -> None:
    for _ in range(4):
        processes.add_worker()
    own_executor.wait_for_workers(6)
    told = r"every worker that began bomb\.jpg died of it, 4 in all, the last tcp://.*committed stands"
    with pytest.raises(ClusterError, match=told):
        list(own_executor.map(kills, ["a", "b", "bomb.jpg", "c"]))


@pytest.mark.slow
def test_a_killed_workers_shards_are_done_elsewhere(
    own_executor: DaskExecutor, processes: Any, said: list[str]
) -> None:
    def work(_context, n, *_):
        time.sleep(0.1)
        return n

    found = []
    for n, _ in own_executor.map(work, range(20)):
        found.append(n)
        if len(found) == 3:
            processes.workers[0].kill()
    assert sorted(found) == list(range(20))
    [line] = said
    assert line.endswith("is gone; what it was doing is done elsewhere")


@ON_THREADS
@pytest.mark.parametrize("interruptible", [True, False])
def test_a_straggler_is_begun_again_only_if_it_can_be_called_back(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible: bool
) -> None:
    def work(folder, n, _worker, stop, _report):
        first = n or not marks(folder, "attempt")
        mark(folder, "attempt" if n == 0 else "other")
        if n == 0 and first:
            wait_for(stop if interruptible else (folder / "long").exists)
        return n

    def release() -> None:
        wait_for(lambda: marks(tmp_path, "other") == 5)
        time.sleep(1.5)  # three looks at what is late
        (tmp_path / "long").touch()

    monkeypatch.setattr("featurepipe.execution.dask.STRAGGLING", 0.2)
    releases = threading.Thread(target=release)
    releases.start()
    once = executor.map(
        work, range(6), context=tmp_path, interruptible=interruptible, retries=0
    )  # Dask's own would hide ours
    found = sorted(n for n, _ in once)
    releases.join()
    assert found == list(range(6))
    assert marks(tmp_path, "attempt") == (2 if interruptible else 1)


# Signals

PROGRAM = """
import sys, time
from featurepipe.execution import ProcessExecutor
from featurepipe.interrupt import stop_on_signals

def work(_context, n, _worker, stop, _report):
    for _ in range(2000 if n else 1):
        if stop():
            return "stopped"
        time.sleep(0.05)
    return "done"

if __name__ == "__main__":
    with stop_on_signals() as stop:
        for n, result in ProcessExecutor(2).map(work, range(30), stop=stop):
            print(n, result, flush=True)
    print("asked to stop:", stop(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_program_calls_the_work_back(number: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "program.py"], cwd=tmp_path, stdout=out, stderr=err, start_new_session=True
        )
    try:
        wait_for(lambda: "0 done" in (tmp_path / "out").read_text() or process.poll() is not None)
        os.killpg(process.pid, number)
        code = process.wait(SECONDS)
    finally:
        process.kill()
    assert (tmp_path / "err").read_text() == ""
    first, *others, last = (tmp_path / "out").read_text().splitlines()
    assert (first, last, code) == ("0 done", "asked to stop: True", 0)
    assert 1 <= len(others) <= 2
    assert all(line.endswith(" stopped") for line in others)
    assert (tmp_path / "err").read_text() == ""


SLOW_PROGRAM = """
import importlib, sys, threading, time
from joblib.externals.loky.backend import queues, resource_tracker
from featurepipe.execution import ProcessExecutor

synchronize = importlib.import_module("joblib.externals.loky.backend.synchronize")
feed = queues.Queue._feed

def slowly_fed(*given):
    feed(*given)
    time.sleep(0.4)  # as where the system gives the processor to others

def slowly_given_back(name):
    synchronize.sem_unlink(name)
    if threading.current_thread().name == "QueueFeederThread":
        time.sleep(0.4)
    resource_tracker.unregister(name, "semlock")

def work(_context, n, _worker, _stop, _report):
    return len(n)

if __name__ == "__main__":
    queues.Queue._feed = staticmethod(slowly_fed)
    synchronize.SemLock._cleanup = staticmethod(slowly_given_back)
    with_many = ProcessExecutor(2).map(work, (b"x" * (1 << 20) for _ in range(9)))  # more than the queue's pipe holds
    print(next(with_many)[1], flush=True)
    start = time.monotonic()
    with_many.close()
    print(time.monotonic() - start < 5, sorted(n for _, n in ProcessExecutor(2).map(work, ["a", "bb", "ccc"])))
    print([thread.name for thread in threading.enumerate() if thread.name == "QueueFeederThread"], flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", ["0", "0.5"])
def test_loky_ends_before_the_program_and_leaves_no_semaphore(seconds: str, tmp_path: Path) -> None:
    """Its thread that feeds the processes is a daemon that nobody waits for, and gives semaphores back as it ends."""
    (tmp_path / "program.py").write_text(SLOW_PROGRAM)
    command = [sys.executable, "program.py", seconds]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{1 << 20}\nTrue [1, 2, 3]\n[]\n", "")


def test_every_error_of_ours_survives_the_way_between_processes() -> None:
    import featurepipe.errors

    kinds = [
        kind
        for kind in vars(featurepipe.errors).values()
        if isinstance(kind, type) and issubclass(kind, FeaturepipeError)
    ]
    assert len(kinds) > 15
    for kind in kinds:
        error = kind("a line", signal.SIGTERM if kind is Interrupted else "another")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args, vars(again)) == (type(error), error.args, vars(error))


@pytest.mark.parametrize(("named", "gpus"), [("4,GPU-7", ["4", "GPU-7"]), (" 0 ,,-1,NoDevFiles", ["0"]), ("", [])])
def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch, named: str, gpus: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpu_names() == gpus
    assert [worker.gpus for worker in LocalExecutor().workers()] == [len(gpus)]
