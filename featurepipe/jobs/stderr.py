"""What libraries write to standard error by themselves, past Python, line by line."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

EVERY = 0.5
"""Seconds between two looks at what was written."""
_STDERR = 2


class Captured(NamedTuple):
    """The real standard error as a stream, and what ends the capture: afterwards every line is told."""

    stream: IO[str]
    end: Callable[[], None]


@contextmanager
def captured_stderr(tell: Callable[[str], None]) -> Iterator[Captured]:
    """What anyone writes to the descriptor of standard error is told line by line instead, until the capture or the block ends.

    A file takes it, not a pipe: a library that writes while it holds the interpreter's lock would wait for ever for a reader
    that waits for the lock.

    Args:
        tell: called with each line that is not blank, from a thread of this function's own, and at the end from the caller's.

    Yields:
        The stream of Python, where that is no descriptor and nothing is captured.
    """
    try:
        is_descriptor = sys.stderr.fileno() == _STDERR
    except (AttributeError, OSError, ValueError, io.UnsupportedOperation):  # none, closed, or a stand-in
        is_descriptor = False
    if not is_descriptor:
        yield Captured(sys.stderr, lambda: None)
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file, open(os.dup(_STDERR), "w", buffering=1, encoding="utf-8") as real:
        tail, over = _Tail(file.fileno(), tell), threading.Event()
        thread = threading.Thread(target=tail.follow, args=(over,), name="featurepipe-stderr", daemon=True)

        def end() -> None:
            if not over.is_set():
                os.dup2(real.fileno(), _STDERR)
                over.set()
                thread.join()
                tail.look(to_the_end=True)

        os.dup2(file.fileno(), _STDERR)
        thread.start()
        try:
            yield Captured(real, end)
        finally:
            end()


class _Tail:
    """Tells the lines of a file that grows."""

    def __init__(self, descriptor: int, tell: Callable[[str], None]) -> None:
        self._descriptor, self._tell = descriptor, tell
        self._position, self._rest = 0, b""

    def follow(self, over: threading.Event) -> None:
        """Looks now and then until it is over."""
        while not over.wait(EVERY):
            self.look()

    def look(self, *, to_the_end: bool = False) -> None:
        """Tells the lines that are new; the last one, if it is unfinished, only at the end."""
        while found := os.pread(self._descriptor, 1 << 16, self._position):
            self._position += len(found)
            *lines, self._rest = (self._rest + found).split(b"\n")
            for line in lines:
                self._say(line)
        if to_the_end:
            self._say(self._rest)

    def _say(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self._tell(text)
