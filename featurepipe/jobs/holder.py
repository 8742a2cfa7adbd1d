"""Who holds a job's lock, as it is written into the lock's file for others to read."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from featurepipe import records

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
