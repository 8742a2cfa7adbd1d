"""Ctrl-C, SIGTERM and the end of a time budget as a request to stop at the next safe place."""

from __future__ import annotations

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType

from featurepipe.errors import Interrupted, UsageError

PATIENCE = 8.0
"""Seconds from a signal to the end of a process that may end at any moment but does not come to its next step in Python."""
AGAIN = 2.0
"""Seconds until a signal's exception is raised again where something has dropped the first one, as a ``__del__`` does."""

_Handler = Callable[[int, FrameType | None], object] | int | None
_ENDS = (signal.SIGINT, signal.SIGTERM)


class _Stopped(BaseException):
    """A signal ends the block: no `Exception`, since code that turns any error of one item into a reject would go on."""


class StopRequest:
    """Whether to stop at the next safe place, and why: a signal came, or the time is over.

    Args:
        deadline: value of `time.monotonic` from which on to stop; None for never.

    Attributes:
        signal_number: the signal that asked to stop, or None.
        deadline: as given.
        say: told why, when the process ends without coming back to its caller; by default standard error.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.signal_number: int | None = None
        self.deadline = deadline
        self.say: Callable[[str], object] = _print_error
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

        The block ends between two steps of Python. Where none comes within `PATIENCE`, as in a fit inside compiled code, the
        whole process ends with the exit code of the signal.

        Args:
            before: what has not begun yet, for the message.

        Raises:
            Interrupted: a signal came, perhaps earlier, or was met by a request of the block's own.
        """
        try:
            with self.raised():
                yield
        except Interrupted as error:
            raise Interrupted(
                f"{error} before {before}; nothing was changed. Run the same command again to begin",
                error.exit_code - 128,
            ) from None

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
        except _Stopped as stopped:
            raise Interrupted(str(stopped), self.signal_number or signal.SIGINT) from None
        finally:
            self._at_once = False

    @property
    def ends_at_once(self) -> bool:
        """Whether a block of `at_once` or `raised` is running."""
        return self._at_once

    def tell(self, text: str) -> None:
        """Says why the process ends."""
        self.say(text)

    def signalled(self, number: int) -> None:
        """Takes note of a signal."""
        self.signal_number = self.signal_number or number
        if self._at_once:
            self._check()

    def _check(self) -> None:
        if self.signal_number is not None:
            raise _Stopped(f"stopped by {self.name}")


def _print_error(text: str) -> None:
    print("featurepipe:", text, file=sys.stderr, flush=True)


class _Watch:
    """Ends what does not hear of a signal, from a thread that hears of it even while the main thread is in compiled code.

    Args:
        may_end: whether the process may end at any moment now.
        numbers: the signals.
        again: whether to raise the signal's exception once more every `AGAIN` seconds.
        say: told why the process ends.
    """

    def __init__(
        self, may_end: Callable[[], bool], numbers: Collection[int], say: Callable[[str], object], *, again: bool
    ) -> None:
        self._may_end, self._numbers, self._say, self._again = may_end, numbers, say, again
        self._pid, self._over = os.getpid(), threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.settimeout(0)
        self._thread = threading.Thread(target=self._run, name="featurepipe-signals", daemon=True)

    def __enter__(self) -> None:
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before, warn_on_full_buffer=self._before != -1)
        self._over.set()
        self._writer.close()
        if os.getpid() == self._pid:  # a fork has no such thread
            self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        number, deaf = self._first(), 0.0
        while number and not self._over.wait(AGAIN):
            deaf = deaf + AGAIN if self._may_end() else 0.0
            if deaf >= PATIENCE:
                self._end(number)
            if deaf and self._again:
                _thread.interrupt_main(signal.SIGTERM)  # not SIGINT, of which a second one means more

    def _first(self) -> int:
        """Waits for one of the signals; 0 when the block is over."""
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number in self._numbers:
                    return number
        return 0

    def _end(self, number: int) -> None:
        name = signal.Signals(number).name
        why = (
            f"stopped by {name}: what was under way did not come to an end within {PATIENCE:.0f} s, so the process ends"
        )
        last = threading.Thread(target=self._say, args=(why,), daemon=True)  # whoever is stuck may hold the log's lock
        last.start()
        last.join(1)
        os._exit(128 + number)


def _forget_watch() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)  # a fork has its own signals, and no thread that watches them


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_forget_watch)


@contextmanager
def ends_on_ctrl_c() -> Iterator[None]:
    """While the block runs, a Ctrl-C that Python does not come to hear ends the process after `PATIENCE`.

    For commands that leave nothing half done and so let a signal end them anywhere: SIGTERM does that by itself. A program with
    handlers of its own is left alone.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    with _Watch(lambda: True, {signal.SIGINT}, _print_error, again=False):
        yield


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """While the block runs, SIGINT and SIGTERM set the yielded request; a second SIGINT raises KeyboardInterrupt.

    After it the former handlers are back, and one that is the program's own is told of the signal.

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
    before = {number: signal.signal(number, ask) for number in _ENDS}
    try:
        with _Watch(lambda: request.ends_at_once, _ENDS, request.tell, again=True):
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _pass_on(request, before)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restores the handlers of SIGINT and SIGTERM after a block that may replace them, as the import of a library does."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere nobody can replace them
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by something that is not Python
                signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Threads that begin in the block, and their processes, take no SIGINT and SIGTERM.

    A terminal and systemd send those to all processes; this one hears them, and calls the work back with what it has.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # when it starts, it lets those signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pass_on(request: StopRequest, before: Mapping[signal.Signals, _Handler]) -> None:
    """Tells the program's own handler of the signal that it has not heard, as that of a block around ours."""
    number = request.signal_number
    handler = before.get(signal.Signals(number)) if number else None
    if number and callable(handler) and handler is not signal.default_int_handler:
        with suppress(_Stopped):  # one exception is under way, or the block came to its end
            handler(number, None)


def stopping(stop: StopRequest | None, time_budget: float | None) -> AbstractContextManager[StopRequest]:
    """What asks a command to stop: the caller's own request, or else signals and the end of a time budget.

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
