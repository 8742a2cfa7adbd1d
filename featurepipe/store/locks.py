"""Who may change the store, and how those who read it go on: locks for writers, and readers that start again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from featurepipe.errors import StoreError, StoreLocked, StoreMoved, UnknownSnapshot, UsageError, needs_posix
from featurepipe.progress import announcer
from featurepipe.store.atomic import has_other_names, open_file

NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems without locks answer to ``flock``."""
LOCK_SH, LOCK_EX, LOCK_NB = 1, 2, 4
"""Operations of ``flock``, shared, alone and without waiting, as Linux, macOS and BSD number them."""


def flock(descriptor: int, operation: int) -> None:
    """Does ``fcntl.flock``; a system that lacks the module, as Windows does, answers like a file system without locks.

    Raises:
        OSError: As ``fcntl.flock``.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOLCK, "this system has no flock") from None
    fcntl.flock(descriptor, operation)


def check_system() -> None:
    """Refuses systems on which a store cannot be opened without following links.

    Raises:
        StoreError: This is one.
    """
    if why := needs_posix("feature stores"):
        raise StoreError(why)


def locked(descriptor: int, operation: int) -> bool:
    """Does ``fcntl.flock``; returns whether there is a lock, which some network file systems and containers do not have.

    Raises:
        BlockingIOError: Someone else holds it, and ``operation`` says not to wait.
    """
    try:
        flock(descriptor, operation)
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

    Who holds it writes so into the lock, each into a slot of its own, and blanks the slot in the end: a job that runs for
    hours is named also after others have come and gone.

    Raises:
        StoreError: The lock is a link, or no file.
        StoreLocked: Someone else holds it in a way that excludes us (the message says who), or nobody can be excluded here.
    """
    path = store / ".lock"
    descriptor = open_file(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            if not locked(descriptor, (LOCK_SH if shared else LOCK_EX) | LOCK_NB):
                _without(store, shared=shared)
        except BlockingIOError as error:
            wish = "write into" if shared else "rewrite parts of"
            raise StoreLocked(
                f"cannot {wish} {store} now: another process holds its lock ({_held_by(descriptor)}); "
                "wait until it has finished, or stop it, then run again"
            ) from error
        with _signed(descriptor, shared=shared):
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


_SLOT, _SLOTS = 512, 16
"""Bytes of one holder's signature in a lock, and how many there is room for; one more that shares it stays unnamed."""


@contextlib.contextmanager
def _signed(descriptor: int, *, shared: bool) -> Iterator[None]:
    """Names this process in the lock while the block runs; who holds it alone also blanks what killed ones have left."""
    if not shared:
        sign_lock(descriptor, {}, _SLOT * _SLOTS)
    who = _holder()
    free = next((slot for slot, found in enumerate(_slots(descriptor)) if not found or _has_ended(found)), None)
    if free is not None:
        sign_lock(descriptor, who, _SLOT, free * _SLOT)
    try:
        yield
    finally:
        # Else another one took the same slot at the same moment.
        if free is not None and _slots(descriptor)[free] == who:
            sign_lock(descriptor, {}, _SLOT, free * _SLOT)


def _slots(descriptor: int) -> list[dict[str, Any]]:
    """What the lock's slots say; an empty dictionary for one that is blank, or of another program."""
    content = os.pread(descriptor, _SLOT * _SLOTS, 0).ljust(_SLOT * _SLOTS)
    return [_signature(content[start : start + _SLOT]) for start in range(0, len(content), _SLOT)]


def _signature(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
        return found if isinstance(found, dict) and {"pid", "host", "command", "since"} <= found.keys() else {}
    except (ValueError, RecursionError):
        return {}


def _has_ended(who: Mapping[str, Any]) -> bool:
    """Whether it is known that this process, one of this machine's, has ended: it was killed."""
    if who["host"] != socket.gethostname() or not isinstance(who["pid"], int):
        return False
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # someone else's process, or no number of one
        return False
    return False


def _held_by(descriptor: int) -> str:
    """Who holds the lock, as far as they have signed; some of them may hold it on other machines."""
    holders = [who for who in _slots(descriptor) if who and not _has_ended(who)]
    told = ("pid {pid} on {host}, {command}, since {since}".format(**who) for who in holders)
    return "; ".join(dict.fromkeys(told)) or "an unknown process"


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


def sign_lock(descriptor: int, who: Mapping[str, str | int], width: int, at: int = 0) -> None:
    """Writes into a lock who holds it, for people; not into one that has another name, which may be a file of the user's.

    Args:
        descriptor: Of the lock.
        who: What is written; nothing blanks what was there.
        width: Bytes that are written, blanks included.
        at: Where in the file.
    """
    if has_other_names(descriptor):
        return
    with contextlib.suppress(OSError):  # a full disk must not keep gc from freeing it
        os.pwrite(descriptor, (json.dumps(who) if who else "").ljust(width).encode(), at)


TRIES = 3
"""How often a command is begun: each time the store would have to be rewritten again, which happens once a night."""

_LESS = (StoreError, UsageError)
"""What a command raises where the store holds less than it needs; damage and locks have classes of their own."""

P = ParamSpec("P")
R = TypeVar("R")


def starts_again(command: Callable[P, R]) -> Callable[P, R]:
    """Makes a command that reads features begin anew when parts that it was about to read were moved or removed.

    Rows, labels and keys are then all of the snapshot that is current at the last beginning (or of the one asked for): what
    was read before is forgotten. Nobody needs a lock to read, so that a night never waits for somebody's training.

    Args:
        command: Writes nothing before it has read everything, or the same again. Its argument ``silent``, if it has one,
            says whether it may tell that it begins anew.

    Raises:
        StoreMoved: (When called) it happened ``TRIES`` times; or there is less than at the first beginning, so that nobody
            moved anything: then it is what was found missing first.
    """

    @wraps(command)
    def begun(*args: P.args, **options: P.kwargs) -> R:
        asked = {*map(str, args), *map(str, options.values())}
        first: StoreMoved | UnknownSnapshot | None = None
        number = 1
        while True:
            try:
                return command(*args, **options)
            except (StoreError, UsageError) as error:
                say = announcer(silent=bool(options.get("silent", False)))
                if first is not None and type(error) in _LESS:
                    say(f"nothing was moved: what is missing is not in the store; {error}")
                    raise first from error
                if not isinstance(error, StoreMoved | UnknownSnapshot) or number == TRIES:
                    raise
                if isinstance(error, UnknownSnapshot) and error.run_id in asked:
                    raise
                first, number = first or error, number + 1
                say(f"the store was rewritten meanwhile (compact or gc): starting again, try {number} of {TRIES}")

    return begun
