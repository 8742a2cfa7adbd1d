"""Ctrl-C, SIGTERM and the end of a time budget as a request to stop at the next safe place."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

from featurepipe.errors import Interrupted, UsageError


class StopRequest:
    """Whether to stop at the next safe place, and why: a signal came, or the time is over.

    Args:
        deadline: value of `time.monotonic` from which on to stop; None for never.

    Attributes:
        signal_number: the signal that asked to stop, or None.
        deadline: as given.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.signal_number: int | None = None
        self.deadline = deadline
        self._at_once = False

    @classmethod
    def after(cls, seconds: float | None) -> StopRequest:
        """A request whose time is over ``seconds`` from now; None for never."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal_number is not None or self.out_of_time

    @property
    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def name(self) -> str:
        """The signal's name, such as ``SIGTERM``; empty when none came."""
        return signal.Signals(self.signal_number).name if self.signal_number else ""

    @contextmanager
    def at_once(self, before: str) -> Iterator[None]:
        """While the block runs, a signal ends it there and then: for long work that leaves nothing half done.

        Args:
            before: what has not begun yet, for the message.

        Raises:
            Interrupted: a signal came, perhaps earlier, or was met by a request of the block's own.
        """
        try:
            with self.raised():
                yield
        except Interrupted as error:
            raise Interrupted(f"{error} before {before}; nothing was changed", error.exit_code - 128) from None

    @contextmanager
    def raised(self) -> Iterator[None]:
        """While the block runs, a signal raises `Interrupted` there and then: for work that keeps what is finished as it goes.

        Raises:
            Interrupted: a signal came, perhaps earlier.
        """
        self._at_once = True
        try:
            self._check()
            yield
        finally:
            self._at_once = False

    def signalled(self, number: int) -> None:
        """Takes note of a signal."""
        self.signal_number = number
        if self._at_once:
            self._check()

    def _check(self) -> None:
        if self.signal_number is not None:
            raise Interrupted(f"stopped by {self.name}", self.signal_number)


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """While the block runs, SIGINT and SIGTERM set the yielded request; a second SIGINT raises KeyboardInterrupt.

    Outside the main thread signals cannot be caught, and only a deadline can set the request.

    Args:
        request: what to set and yield, such as one with a deadline; by default a new one.
    """
    request = request or StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        if request.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signalled(number)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopping(stop: StopRequest | None, time_budget: float | None) -> AbstractContextManager[StopRequest]:
    """What asks a verb to stop: the caller's own request, or else signals and the end of a time budget.

    Args:
        stop: the caller's request, if it handles signals and time itself.
        time_budget: seconds from now, or None.

    Raises:
        UsageError: both are given, or the budget is no positive number.
    """
    if time_budget is not None and not time_budget > 0:
        raise UsageError(f"time_budget {time_budget!r} must be a positive number of seconds")
    if stop is None:
        return stop_on_signals(StopRequest.after(time_budget))
    if time_budget is not None:
        raise UsageError("stop and time_budget were both given; give the request its own deadline instead")
    return nullcontext(stop)
