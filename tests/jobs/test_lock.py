"""One run of a job at a time, with real processes: by the kernel's lock, and by a lease where there is none."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from featurepipe.errors import Interrupted, StoreLocked
from featurepipe.interrupt import StopRequest
from featurepipe.jobs import lock as holder
from featurepipe.jobs.lock import Holder, Lease, is_over, job_lock, runs_with_ends
from featurepipe.store import FeatureStore

HOLD = """
    import errno, os, sys, time
    from functools import partial
    from featurepipe.errors import FeaturepipeError
    from featurepipe.interrupt import StopRequest
    from featurepipe.jobs.lock import Lease
    from featurepipe.jobs.lock import job_lock
    from featurepipe.store import FeatureStore

    store, kind, interval = sys.argv[1:]

    def none(descriptor, operation):
        raise OSError(getattr(errno, kind), "no locks here")

    options = {"flock": none, "make_lease": partial(Lease, interval=float(interval), missed=5)} if kind != "flock" else {}
    try:
        with job_lock(FeatureStore(store), "nightly", StopRequest(), **options) as held:
            print("held", file=sys.stderr, flush=True)
            time.sleep(60)
    except FeaturepipeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


def no_locks(number, descriptor, operation):
    raise OSError(number, os.strerror(number))


def lock(store, *, kind="flock", interval=0.2, missed=5, job="nightly", **options):
    if kind != "flock":
        options["flock"] = partial(no_locks, getattr(errno, kind))
        options["make_lease"] = partial(Lease, interval=interval, missed=missed)
    return job_lock(store, job, options.pop("stop", StopRequest()), **options)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store")


@pytest.fixture
def hold(launcher, store):
    """Starts a process that holds the lock until it is killed; waits until it does, unless told otherwise."""
    processes = []

    def start(kind="flock", interval=0.2, *, wait=True):
        process = launcher.start(HOLD, [store.path, kind, interval])
        processes.append(process)
        if wait:
            wait_for(lambda: "held" in process.err())
        return process

    yield start
    for process in processes:
        if process._finished is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


def lease_numbers(store):
    return sorted(int(path.name.rpartition(".")[2]) for path in store.path.glob("jobs/nightly.lease.[0-9]*"))


@pytest.mark.parametrize("kind", ["flock", "ENOLCK"])
def test_the_second_is_refused_and_told_who_holds_it(hold, store, kind):
    first = hold(kind)
    second = hold(kind, wait=False).wait()
    assert second.code == 75
    assert f"job nightly is already running (pid {first.pid} on {os.uname().nodename}, since 2" in second.err
    with pytest.raises(StoreLocked, match=f"pid {first.pid} "), lock(store, kind=kind):
        pass
    with lock(store, kind=kind, job="weekly"):  # another job of the store is free to run
        pass


@pytest.mark.parametrize("kind", ["flock", "ENOLCK"])
def test_a_killed_holder_makes_way(hold, store, kind):
    for _ in range(3):
        process = hold(kind)
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
    started = time.monotonic()
    with lock(store, kind=kind, interval=60):  # a process of this machine that is dead need not be watched
        assert time.monotonic() - started < 40


@pytest.mark.parametrize("kind", ["flock", "ENOSYS"])
def test_given_back_at_the_end(store, kind):
    for _ in range(3):
        with lock(store, kind=kind):
            pass
    with pytest.raises(ZeroDivisionError), lock(store, kind=kind):
        1 / 0  # noqa: B018
    with lock(store, kind=kind) as held:
        assert not held.lost


@pytest.mark.parametrize("kind", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_lease_where_there_are_no_locks(store, kind):
    with lock(store, kind=kind):
        assert lease_numbers(store) == [1]
        found = json.loads((store.path / "jobs/nightly.lease.1").read_bytes())
        assert (found["pid"], found["host"], found["released"]) == (os.getpid(), os.uname().nodename, False)
        with pytest.raises(StoreLocked, match="already running"), lock(store, kind=kind):
            pass


def test_other_errors_are_not_taken_for_a_lack_of_locks(store):
    with pytest.raises(OSError, match="Input/output"), lock(store, flock=partial(no_locks, errno.EIO)):
        pass


def test_one_of_many_that_start_at_once_wins(hold, store):
    processes = [hold("ENOLCK", wait=False) for _ in range(8)]
    wait_for(lambda: sum("already running" in process.err() for process in processes) == 7)
    assert sum("held" in process.err() for process in processes) == 1
    assert len(lease_numbers(store)) == 1


def test_one_of_many_takes_over(hold, store):
    """All find the same dead lease, and wait for it alike."""
    elsewhere(store, 4)
    processes = [hold("ENOLCK", wait=False) for _ in range(8)]
    wait_for(lambda: sum("already running" in process.err() for process in processes) == 7)
    assert sum("held" in process.err() for process in processes) == 1
    assert lease_numbers(store) == [5]


def elsewhere(store, number, **content):
    """A lease of another host."""
    with store.lock(shared=True):
        (store.path / "jobs").mkdir(exist_ok=True)
    path = store.path / f"jobs/nightly.lease.{number}"
    holder = {"host": "other", "place": "other pid:[1]", "pid": os.getpid(), "since": "2030-01-01T00:00:00+00:00"}
    path.write_text(json.dumps({**holder, "token": "t", "beats": 1, "released": False, **content}))
    return path


def test_a_lease_that_is_not_renewed_lapses(store):
    elsewhere(store, 1)
    started = time.monotonic()
    with lock(store, kind="ENOLCK", interval=0.1, missed=4):
        assert time.monotonic() - started >= 0.4
        assert lease_numbers(store) == [2]


def test_a_lease_that_is_renewed_does_not(store):
    path = elsewhere(store, 1)
    renew = threading.Timer(0.2, lambda: elsewhere(store, 1, beats=2))
    renew.start()
    with pytest.raises(StoreLocked, match="on other, since 2030"), lock(store, kind="ENOLCK", interval=0.1, missed=40):
        pass
    renew.join()
    assert json.loads(path.read_bytes())["beats"] == 2


@pytest.mark.parametrize("years", [-30, 30])
def test_no_clock_has_a_say(store, monkeypatch, years):
    """Neither the time stamps of files nor the time that a lease names; a living holder is found alive, a dead one dead."""
    path = elsewhere(store, 1, since=f"{2026 + years}-01-01T00:00:00+00:00")
    jumped = time.time() + years * 365 * 86400
    os.utime(path, (jumped, jumped))
    monkeypatch.setattr(time, "time", lambda: jumped)
    started = time.monotonic()
    with lock(store, kind="ENOLCK", interval=0.1, missed=4):
        assert time.monotonic() - started >= 0.4
        monkeypatch.undo()  # the clock jumps while we hold it
        with pytest.raises(StoreLocked), lock(store, kind="ENOLCK", interval=0.1, missed=100):
            pass


def test_a_lease_that_was_released_is_free_at_once(store):
    elsewhere(store, 7, released=True)
    with lock(store, kind="ENOLCK", interval=60):
        assert lease_numbers(store) == [8]
    with lock(store, kind="ENOLCK", interval=60):
        assert lease_numbers(store) == [9]


def test_a_lease_half_born_lapses_too(store):
    """Its holder was killed between making the file and signing it."""
    elsewhere(store, 1).write_bytes(b"")
    with lock(store, kind="ENOLCK", interval=0.05):
        assert lease_numbers(store) == [2]


def test_a_suspended_holder_learns_that_it_lost(store):
    lost = threading.Event()
    with lock(store, kind="ENOLCK", on_lost=lost.set) as held:
        elsewhere(store, 2)  # another host took over while we were suspended
        assert lost.wait(60)
        assert held.lost
    assert lease_numbers(store) == [1, 2]
    assert json.loads((store.path / "jobs/nightly.lease.2").read_bytes())["host"] == "other"  # and stays its


def test_a_latecomer_does_not_take_an_old_number(store):
    """It was suspended between its decision and its deed, and others have come and gone in the meantime."""
    elsewhere(store, 3)
    lease = Lease(store.path / "jobs/nightly.lease")
    assert not lease._create(2)
    assert lease_numbers(store) == [3]


def test_watching_can_be_stopped(store):
    elsewhere(store, 1)
    stop = StopRequest()
    threading.Timer(0.1, lambda: setattr(stop, "signal_number", signal.SIGTERM)).start()
    started = time.monotonic()
    with pytest.raises(Interrupted) as caught, lock(store, kind="ENOLCK", interval=60, stop=stop):
        pass
    assert caught.value.exit_code == 143
    assert time.monotonic() - started < 40


def test_a_holder_that_cannot_write_for_a_while_goes_on(store, monkeypatch):
    with lock(store, kind="ENOLCK", interval=0.02) as held:
        beats = lambda: json.loads((store.path / "jobs/nightly.lease.1").read_bytes())["beats"]  # noqa: E731
        folder = store.path / "jobs"
        folder.rename(store.path / "away")
        time.sleep(0.1)
        (store.path / "away").rename(folder)
        before = beats()
        wait_for(lambda: beats() > before)
        assert not held.lost


def test_names_that_begin_alike_are_kept_apart(store):
    with lock(store, kind="ENOLCK", job="a"), lock(store, kind="ENOLCK", job="a.lease"):
        pass
    assert {path.name for path in (store.path / "jobs").iterdir()} == {
        "a.lock", "a.lease.1", "a.lease.lock", "a.lease.lease.1",
    }  # fmt: skip


def test_processes_of_other_places_are_not_judged_by_their_number():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = process.pid
    here = Holder.here()
    assert not here.is_dead()
    assert Holder(here.host, here.place, dead, "").is_dead()
    assert not Holder(here.host, "another container", dead, "").is_dead()
    assert Holder.read(b"") is None
    assert Holder.read(json.dumps(here.as_dict()).encode()) == here


def test_hosts_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """Two machines called localhost, each in its first pid namespace: the boot's id differs."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "boot_id").write_text("11111111-2222-3333-4444-555555555555\n")
    monkeypatch.setattr(holder, "_BOOT_ID", tmp_path / "boot_id")
    there = Holder(Holder.here().host, Holder.here().place, process.pid, "")
    assert there.is_dead()
    (tmp_path / "boot_id").write_text("66666666-7777-8888-9999-000000000000\n")
    assert Holder.here().host == there.host
    assert not there.is_dead()


def flock_of(kind):
    return {} if kind == "flock" else {"flock": partial(no_locks, getattr(errno, kind))}


@pytest.mark.parametrize("kind", ["flock", "ENOLCK"])
def test_whether_a_run_is_over_is_known_without_taking_the_lock(hold, store, kind):
    assert not is_over(store, "nightly", **flock_of(kind))  # nobody knows of such a job
    first = hold(kind)
    assert not is_over(store, "nightly", **flock_of(kind))
    first.send(signal.SIGKILL)
    first.wait()
    files = {path.name: path.read_bytes() for path in (store.path / "jobs").iterdir()}
    assert is_over(store, "nightly", **flock_of(kind))
    assert {path.name: path.read_bytes() for path in (store.path / "jobs").iterdir()} == files
    with lock(store, kind=kind):
        assert not is_over(store, "nightly", **flock_of(kind))
    assert is_over(store, "nightly", **flock_of(kind))


def test_a_lease_of_another_machine_is_not_judged(store):
    with lock(store, kind="ENOLCK"):
        (lease,) = (store.path / "jobs").glob("nightly.lease.*")
        theirs = {**json.loads(lease.read_bytes()), "place": "another", "released": False, "pid": 1}
    lease.write_text(json.dumps(theirs))
    assert not is_over(store, "nightly", **flock_of("ENOLCK"))
    lease.write_text("{")
    assert not is_over(store, "nightly", **flock_of("ENOLCK"))


def test_names_and_links_of_strangers_are_not_followed(store, tmp_path):
    with lock(store):
        pass
    (tmp_path / "outside.lock").touch()
    (store.path / "jobs" / "linked.lock").symlink_to(tmp_path / "outside.lock")
    for job in ("linked", "../../outside", "x\0y", "", "."):
        assert not is_over(store, job)


def test_somebody_who_looks_keeps_no_run_from_beginning(store, monkeypatch):
    """The lock is held for microseconds then; a run that begins at that moment tries again."""
    tries = []

    def flock(descriptor, operation):
        tries.append(operation)
        if len(tries) < 3:
            raise BlockingIOError(errno.EAGAIN, "held")

    with job_lock(store, "nightly", StopRequest(), flock=flock):
        assert len(tries) == 3


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(store, monkeypatch):
    with lock(store):
        pass
    record = {"run_id": "R1", "command": "run", "job": "nightly", "status": "running"}
    others = {"R2": "done", "R3": "running"}
    store.write_run(record)
    store.write_run({**record, "run_id": "R2", "status": others["R2"]})
    store.write_run({**record, "run_id": "R3", "job": "weekly"})  # nobody knows
    assert {run["run_id"]: run["status"] for run in runs_with_ends(store)} == {"R1": "killed", **others}

    def ends(store, job):
        if job == "nightly":
            store.write_run({**record, "status": "done"})
            store.write_run({**record, "run_id": "R4"})  # and the next one has begun
        return is_over(store, job)

    monkeypatch.setattr(holder, "is_over", ends)
    found = {run["run_id"]: run["status"] for run in runs_with_ends(store)}
    assert found == {"R1": "done", "R4": "running", **others}
