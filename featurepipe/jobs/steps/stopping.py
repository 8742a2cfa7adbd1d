"""Ending with the time budget what has no safe places of its own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class _OutOfTimeError(Exception):
    """The deadline passed."""


def within_time(deadline: float | None, work: Callable[[], dict[str, Any]], otherwise: str) -> dict[str, Any]:
    """Does work that the deadline breaks off at once.

    Only for work that may be killed at any moment, because it puts everything in its place at its very end or goes on from
    what it has: training, comparing layers, merging parts. It is broken off between two steps of Python; a fit inside
    compiled code ends first.

    Args:
        deadline: value of `time.monotonic`, None for never; only the main thread can be broken off.
        work: what to do.
        otherwise: what becomes of it when there is no time left, for the summary.

    Returns:
        What ``work`` does, or why it is ``skipped``.
    """
    try:
        with _alarm(deadline):
            return work()
    except _OutOfTimeError:
        why = f"no time was left: {otherwise}"
        return {"skipped": why, "warnings": [why]}


@contextmanager
def _alarm(deadline: float | None) -> Iterator[None]:
    if deadline is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number: int, _frame: FrameType | None) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # someone else's alarm, which comes a little later now
        signal.signal(signal.SIGALRM, before)
