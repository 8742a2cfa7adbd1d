"""Who may change the store: any number of writers, or one that rewrites it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from featurepipe.errors import StoreLocked


@contextlib.contextmanager
def store_lock(store: Path, *, shared: bool) -> Iterator[None]:
    """Holds the lock of a store; never waits.

    Writers (``extract``) share it, those that rewrite parts (``compact``, ``gc``) hold it alone. The kernel drops it
    when a process dies, so there are no stale locks.

    Raises:
        StoreLocked: Someone else holds it in a way that excludes us; the message says who took it last.
    """
    path = store / ".lock"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = _last_taken_by(descriptor)
            wish = "write into" if shared else "rewrite parts of"
            raise StoreLocked(
                f"cannot {wish} {store} now: another process holds its lock (last taken by {who}); "
                "wait until it has finished, or stop it, then run again"
            ) from error
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _last_taken_by(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return "pid {pid} on {host}, {command}, since {since}".format(**who)
    except (ValueError, KeyError, TypeError):  # never signed, or by another program
        return "an unknown process"


def _command() -> str:
    program = Path(sys.argv[0]).name
    return " ".join(["featurepipe" if program == "__main__.py" else program, *sys.argv[1:2]])


def _sign(descriptor: int) -> None:
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": _command(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk must not keep gc from freeing it
        os.pwrite(descriptor, json.dumps(who).ljust(512).encode(), 0)
