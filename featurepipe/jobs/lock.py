"""One run of a job at a time: a kernel lock, or a lease on file systems without locks.

Such a lock is a lease (Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache
consistency", SOSP 1989): it lasts as long as it is renewed. No clock is compared with another one. Whoever finds a lease
watches it, and takes over when it has not been renewed for a while by the watcher's own monotonic clock; neither a clock that
jumps nor the server's time stamps have a say.

Files are numbered, ``nightly.lease.7``, and the greatest number counts. To take over is to create the next one, which
the file system lets exactly one process do. The last file stays when the lease is given back, so that numbers never return.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from featurepipe import records
from featurepipe.errors import Interrupted, StoreError, StoreLocked
from featurepipe.interrupt import StopRequest
from featurepipe.store import FeatureStore
from featurepipe.store.atomic import entries, made_folder, open_file, read_file
from featurepipe.store.locks import LOCK_EX, LOCK_NB, LOCK_SH, NO_LOCKS, sign_lock
from featurepipe.store.locks import flock as flock_of_system

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """A process that holds, or held, a lock.

    Attributes:
        host: the machine's name.
        place: what tells whose process numbers these are: two containers may have one host name, and each its pid 1;
            so may two machines, which differ in their boot's id.
        pid: the process.
        since: when it took the lock, for people; nothing is decided by it, as clocks of hosts differ and jump.
    """

    host: str
    place: str
    pid: int
    since: str

    @classmethod
    def here(cls) -> Holder:
        """This process, now."""
        return cls(socket.gethostname(), _place(), os.getpid(), records.now())

    @classmethod
    def read(cls, text: bytes) -> Holder | None:
        """The holder that a lock's file names; None if it names none."""
        try:
            found = json.loads(text)
            return cls(str(found["host"]), str(found["place"]), int(found["pid"]), str(found["since"]))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return None

    def as_dict(self) -> dict[str, str | int]:
        """Plain JSON values."""
        return asdict(self)

    def is_dead(self) -> bool:
        """Whether this process was one of this machine's, and has ended; false where that cannot be told."""
        if self.place != _place():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # someone else's process, or no number of one
            return False
        return False


def named(holder: Holder | None) -> str:
    """A holder in a message."""
    return f"pid {holder.pid} on {holder.host}, since {holder.since}" if holder else "an unknown process"


def _place() -> str:
    """The host's name, what its kernel was given when it started (for hosts of one name), and the container's processes."""
    try:
        linux = [_BOOT_ID.read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:  # another system
        linux = []
    return " ".join([socket.gethostname(), *linux])


INTERVAL = 5.0
"""Seconds between two renewals."""
MISSED = 6
"""Renewals that a living holder may miss: a server that restarts, a machine that swaps."""


class Lease:
    """The right to run a job, on a file system without locks.

    Args:
        path: what the files' names begin with; the folder is there.
        interval: seconds between two renewals; the same for all who share the lease.
        missed: after how many intervals without a renewal a lease has lapsed.
        on_lost: called, in another thread, if someone else took the lease over while we still hold it: after this machine
            was suspended, or cut off from the file system.

    Attributes:
        lost: whether that has happened.
    """

    def __init__(
        self, path: Path, *, interval: float = INTERVAL, missed: int = MISSED, on_lost: Callable[[], object] = bool
    ) -> None:
        self._path, self._interval, self._patience, self._on_lost = path, interval, interval * missed, on_lost
        self._token, self._holder = secrets.token_hex(8), Holder.here()
        self._number = self._beats = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="featurepipe-lease", daemon=True)
        self.lost = False

    def take(self, what: str, stop: StopRequest) -> None:
        """Takes the lease, if need be after watching whether another holder still lives.

        Args:
            what: what is locked, for the message.
            stop: ends the watching.

        Raises:
            StoreLocked: someone else holds it, and lives.
            Interrupted: stopped while watching.
        """
        while True:
            number, content = self._newest()
            if number and not self._is_free(content) and not self._has_lapsed(number, content, what, stop):
                continue
            if self._create(number + 1):
                self._thread.start()
                return

    def is_free(self) -> bool:
        """Whether the last holder has given the lease back or is known to be dead; a lapsed one nobody knows without watching."""
        number, content = self._newest()
        return bool(number) and self._is_free(content)

    def give_back(self) -> None:
        """Ends the renewals and lets the next one in at once."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):  # then it lapses
                self._write(released=True)

    def _newest(self) -> tuple[int, bytes]:
        """The greatest number and what its file holds; 0 if there is none."""
        number = max((0, *self._numbers()))
        try:
            return number, read_file(self._file(number), 1 << 16) if number else b""
        except FileNotFoundError:  # taken over since
            return self._newest()

    def _numbers(self) -> list[int]:
        begin = f"{self._path.name}."
        names = (entry.name for entry in entries(self._path.parent))
        ends = (name.removeprefix(begin) for name in names if name.startswith(begin))
        return [int(end) for end in ends if end.isdecimal()]

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _is_free(self, content: bytes) -> bool:
        holder = Holder.read(content)
        return holder is not None and (json.loads(content).get("released") is True or holder.is_dead())

    def _has_lapsed(self, number: int, content: bytes, what: str, stop: StopRequest) -> bool:
        """Watches a lease: whether it was not renewed for long enough; false when there is a newer one now.

        Raises:
            StoreLocked: it was renewed.
        """
        until = time.monotonic() + self._patience
        while time.monotonic() < until:
            time.sleep(min(0.5, self._interval / 4))
            if stop.signal_number:
                raise Interrupted(f"stopped by {stop.name} while waiting for {what}", stop.signal_number)
            newest, now = self._newest()
            if newest != number:
                return False
            if now != content:
                raise StoreLocked(
                    f"{what} is already running ({named(Holder.read(now))}); wait until it has finished, or stop it there"
                )
        return True

    def _create(self, number: int) -> bool:
        """Takes over as number ``number``; false if another process was faster."""
        try:
            os.close(os.open(self._file(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            return False
        self._number = number
        self._write()
        if max(self._numbers()) != number:  # we were so slow that others have come and gone in the meantime
            self._file(number).unlink(missing_ok=True)
            return False
        for old in self._numbers():
            if old < number:
                self._file(old).unlink(missing_ok=True)
        return True

    def _write(self, *, released: bool = False) -> None:
        """Renews the lease; by a rename, so that nobody reads half of it."""
        self._beats += 1
        content = {**self._holder.as_dict(), "token": self._token, "beats": self._beats, "released": released}
        new = self._path.with_name(f"{self._path.name}.new-{self._token}")
        try:
            new.write_text(json.dumps(content))
            new.replace(self._file(self._number))
        finally:
            new.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(self._interval):
            with contextlib.suppress(OSError):  # no space, no server: tried again, until others take us for dead
                if max((0, *self._numbers())) > self._number:
                    self.lost = True
                    self._on_lost()
                    return
                self._write()


FOLDER = "jobs"
"""Of the locks, in a store."""
_SIGNATURE = 512
_LOOKS = (0.01, 0.04, 0.15)
"""Seconds after which a lock that is held is tried again: `is_over` holds one for microseconds."""

Flock = Callable[[int, int], object]
MakeLease = Callable[..., Lease]


class HeldLock(Protocol):
    """A lock that is held.

    Attributes:
        lost: whether another host has taken it over, which only a lease allows.
    """

    lost: bool


class _Kernel:
    """A kernel lock, which cannot be lost."""

    lost = False


@contextlib.contextmanager
def job_lock(
    store: FeatureStore,
    job: str,
    stop: StopRequest,
    *,
    on_lost: Callable[[], object] = bool,
    flock: Flock = flock_of_system,
    make_lease: MakeLease = Lease,
) -> Iterator[HeldLock]:
    """Holds the lock of a job in a store, so that no second run of it begins anywhere.

    It is a kernel lock, which dies with its process, on whatever host the file system is mounted; where the file system has
    no locks, it is a `Lease`. A kernel lock is waited for no longer than somebody may look at it (`is_over`), a lease only
    until it is known whether its holder lives.

    Args:
        store: where the job keeps its features.
        job: its name.
        stop: ends the waiting.
        on_lost: called if a lease is taken over while we hold it.
        flock: `flock_of_system`, or what a file system without locks makes of it.
        make_lease: `Lease`, with other intervals for instance.

    Raises:
        StoreError: the lock, or its folder, is a link.
        StoreLocked: a run of this job has not ended; the message says where.
        Interrupted: stopped while waiting.
    """
    path = _folder(store) / f"{job}.lock"
    descriptor = open_file(path, os.O_CREAT | os.O_RDWR)
    try:
        if _take(descriptor, f"job {job}", flock):
            yield _Kernel()
            return
        lease = make_lease(path.with_suffix(".lease"), on_lost=on_lost)
        lease.take(f"job {job}", stop)
        try:
            yield lease
        finally:
            lease.give_back()
    finally:
        os.close(descriptor)


def _folder(store: FeatureStore) -> Path:
    with store.lock(shared=True):  # makes the store, and refuses now what extract() would refuse later
        return made_folder(store.path / FOLDER)


def _take(descriptor: int, what: str, flock: Flock) -> bool:
    """Takes the kernel lock; false where there is none to be had."""
    waits = iter(_LOOKS)
    while True:
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            if (seconds := next(waits, None)) is None:
                who = named(Holder.read(os.pread(descriptor, _SIGNATURE, 0)))
                raise StoreLocked(
                    f"{what} is already running ({who}); wait until it has finished, or stop it there"
                ) from error
            time.sleep(seconds)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        else:
            sign_lock(descriptor, Holder.here().as_dict(), _SIGNATURE)
            return True


def is_over(store: FeatureStore, job: str, *, flock: Flock = flock_of_system) -> bool:
    """Whether it is known that no run of a job goes on in a store, by the test that lets the next run begin.

    That is so if its kernel lock is free, or where there are no locks, if its lease was given back or its holder was a process
    of this machine that has ended. Nothing is written.

    Args:
        store: where the job keeps its features.
        job: its name.
        flock: as in `job_lock`.
    """
    path = store.path / FOLDER / f"{job}.lock"
    if path.name != f"{job}.lock":  # a name of a stranger's record, which leads elsewhere
        return False
    try:
        descriptor = open_file(path)
    except (OSError, ValueError, StoreError):  # nobody can tell
        return False
    try:
        flock(descriptor, LOCK_SH | LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS and _is_free(path.with_suffix(".lease"))
    else:
        return True
    finally:
        os.close(descriptor)


def _is_free(lease: Path) -> bool:
    try:
        return Lease(lease).is_free()
    except (OSError, StoreError):
        return False


def runs_with_ends(store: FeatureStore, runs: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The records of all runs, oldest first, in which a run that was killed is not running any longer.

    The next run of the job writes that down; until then it is known from the job's lock (see `is_over`).
    """
    runs = store.runs() if runs is None else runs
    open_ones = {run["run_id"]: str(run.get("job")) for run in runs if run.get("status") == records.RUNNING}
    over = {job for job in set(open_ones.values()) if is_over(store, job)}
    if not over:
        return runs
    # Read again: one that has ended since then wrote so before it gave its lock back.
    killed = {run_id for run_id, job in open_ones.items() if job in over}
    return [
        {**run, "status": records.KILLED} if run.get("status") == records.RUNNING and run["run_id"] in killed else run
        for run in store.runs()
    ]
