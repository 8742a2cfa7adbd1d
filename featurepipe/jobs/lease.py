"""A lock for file systems without locks: a file that its holder rewrites every few seconds.

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
import threading
import time
from collections.abc import Callable
from pathlib import Path

from featurepipe.errors import Interrupted, StoreLocked
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.holder import Holder, named
from featurepipe.store.inside import entries, read_file

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
