"""One run of a job at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from featurepipe.errors import StoreLocked
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.holder import Holder, named
from featurepipe.jobs.lease import Lease
from featurepipe.store import FeatureStore
from featurepipe.store.inside import made_folder, open_file
from featurepipe.store.locks import NO_LOCKS, sign_lock

FOLDER = "jobs"
"""Of the locks, in a store."""
_SIGNATURE = 512

Flock = Callable[[int, int], object]
MakeLease = Callable[..., Lease]


class Held(Protocol):
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
    flock: Flock = fcntl.flock,
    make_lease: MakeLease = Lease,
) -> Iterator[Held]:
    """Holds the lock of a job in a store, so that no second run of it begins anywhere.

    It is a kernel lock, which dies with its process, on whatever host the file system is mounted; where the file system has
    no locks, it is a `Lease`. A kernel lock is never waited for, a lease only until it is known whether its holder lives.

    Args:
        store: where the job keeps its features.
        job: its name.
        stop: ends the waiting.
        on_lost: called if a lease is taken over while we hold it.
        flock: `fcntl.flock`, or what a file system without locks makes of it.
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
    try:
        flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = named(Holder.read(os.pread(descriptor, _SIGNATURE, 0)))
        raise StoreLocked(f"{what} is already running ({who}); wait until it has finished, or stop it there") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    sign_lock(descriptor, Holder.here().as_dict(), _SIGNATURE)
    return True
