"""Who may change the store: any number of writers, or one that rewrites it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from featurepipe.errors import StoreLocked
from featurepipe.store.inside import has_other_names, open_file

NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems without locks answer to ``flock``."""


def locked(descriptor: int, operation: int) -> bool:
    """Does ``fcntl.flock``; returns whether there is a lock, which some network file systems and containers do not have.

    Raises:
        BlockingIOError: Someone else holds it, and ``operation`` says not to wait.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


@contextlib.contextmanager
def store_lock(store: Path, *, shared: bool) -> Iterator[None]:
    """Holds the lock of a store; never waits.

    Writers (``extract``) share it, those that rewrite parts (``compact``, ``gc``) hold it alone. The kernel drops it
    when a process dies, so there are no stale locks.

    On a file system without locks writers go on, with a warning: they never need each other's absence. Nobody can know
    there that no one writes, so nothing is rewritten.

    Raises:
        StoreError: The lock is a link, or no file.
        StoreLocked: Someone else holds it in a way that excludes us (the message says who took it last), or nobody can be
            excluded here.
    """
    path = store / ".lock"
    descriptor = open_file(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            if not locked(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
                _without(store, shared=shared)
        except BlockingIOError as error:
            who = _last_taken_by(descriptor)
            wish = "write into" if shared else "rewrite parts of"
            raise StoreLocked(
                f"cannot {wish} {store} now: another process holds its lock (last taken by {who}); "
                "wait until it has finished, or stop it, then run again"
            ) from error
        sign_lock(descriptor, _holder(), 512)
        yield
    finally:
        os.close(descriptor)


def _without(store: Path, *, shared: bool) -> None:
    """Where there are no locks: warns a writer (once a process, as Python does), refuses those that rewrite."""
    if not shared:
        raise StoreLocked(
            f"cannot rewrite parts of {store}: its file system has no locks (flock), so nobody can tell whether someone is "
            "writing into it; copy the store to a disk with locks and do it there, or mount this one with locks"
        )
    text = f"the file system of {store} has no locks (flock): adding features works, compact and gc do not"
    warnings.warn(text, stacklevel=2)


def _last_taken_by(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return "pid {pid} on {host}, {command}, since {since}".format(**who)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):  # never signed, or by another program
        return "an unknown process"


def _command() -> str:
    program = Path(sys.argv[0]).name
    return " ".join(["featurepipe" if program == "__main__.py" else program, *sys.argv[1:2]])


def _holder() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": _command(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sign_lock(descriptor: int, who: Mapping[str, str | int], width: int) -> None:
    """Writes into a lock who holds it, for people; not into one that has another name, which may be a file of the user's."""
    if has_other_names(descriptor):
        return
    with contextlib.suppress(OSError):  # a full disk must not keep gc from freeing it
        os.pwrite(descriptor, json.dumps(who).ljust(width).encode(), 0)
