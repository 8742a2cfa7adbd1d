"""Ctrl-C and SIGTERM as a request to stop at the next safe place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal asked to stop, if any."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal_number is not None

    @property
    def name(self) -> str:
        """The signal's name, such as ``SIGTERM``."""
        return signal.Signals(self.signal_number).name if self.signal_number else ""


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, SIGINT and SIGTERM set the yielded request; a second SIGINT raises KeyboardInterrupt.

    Outside the main thread signals cannot be caught, and the request stays unset.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        if request() and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
