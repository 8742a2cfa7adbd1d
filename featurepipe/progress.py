"""Progress of long work: a bar on a terminal or in a notebook, a plain line every few seconds elsewhere, nothing when silent.

Where one step takes long, it is told all the same that the work goes on, and at what it is (`beating`). Everything goes to
standard error, so that standard output stays free for results.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from html import escape
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

from featurepipe.display import displayed

if TYPE_CHECKING:
    import rich.progress


_logger = logging.getLogger("featurepipe")
_SLOW = 0.1  # units a second, below which the seconds of each are shown
QUIET_SECONDS = 15.0
"""Without a word, after which it is said that the work goes on."""
_LOOK_SECONDS = 1.0


class Progress(Protocol):
    """Where a command tells how far it is."""

    def advance(self, images: int, bottleneck: str = "") -> None:
        """``images`` (or other units) more are finished; ``bottleneck`` is what the work waits for now, if known.

        With 0 units it says what the work is at, within the unit that is under way.
        """
        ...

    def say(self, message: str) -> None:
        """A line that the user should see, above the bar."""
        ...


@runtime_checkable
class TakesProgress(Protocol):
    """A stream that takes progress as numbers instead of lines, as a structured log does."""

    def progress(self, total: int, what: str, unit: str) -> Progress:
        """Begins work of ``total`` units."""
        ...


class Silent:
    """Shows nothing."""

    def advance(self, images: int, bottleneck: str = "") -> None:
        """Does nothing."""

    def say(self, message: str) -> None:
        """Does nothing."""


class StepsWithin:
    """Progress of the steps within one unit of work, told as what the work is at.

    Args:
        total: steps.
        at: told of each.
    """

    def __init__(self, total: int, at: Callable[[str], object]) -> None:
        self._total, self._at, self._done = total, at, 0

    def advance(self, images: int, bottleneck: str = "") -> None:
        """So many steps more were made."""
        self._done += images
        self._at(f"step {self._done:,} of {self._total:,}{f', {bottleneck}' if bottleneck else ''}")

    def say(self, message: str) -> None:
        """What there is to say of them."""
        self._at(message)


class Paced:
    """Counts, and tells every so often; what it tells, and where, subclasses say."""

    def __init__(self, total: int, what: str, unit: str, *, every: float, clock: Callable[[], float]) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self._steps = 0
        self._every, self._clock = every, clock
        self._start = self._last = self._moved = clock()
        self._at, self._lock = "", threading.Lock()

    def advance(self, images: int, bottleneck: str = "") -> None:
        """Counts, and tells when that was last done long enough ago."""
        with self._lock:
            self.done += images
            self._steps += images != 0
            now = self._moved = self._clock()
            self._at = "" if images else bottleneck
            if now - self._last >= self._every:
                self._last = now
                self.tell(self.done / max(now - self._start, 1e-9), bottleneck)

    def beat(self) -> None:
        """Tells that the work goes on, and for how long at what, where nothing was told for `QUIET_SECONDS`."""
        with self._lock:
            now = self._clock()
            if now - self._last >= max(self._every, QUIET_SECONDS):
                self._last = now
                so_long = spoken(now - self._moved)
                going = f"{self._at}, for {so_long}" if self._at else f"under way, nothing new for {so_long}"
                self.tell(self.done / max(now - self._start, 1e-9), going)

    def tell(self, rate: float, bottleneck: str) -> None:
        """Tells how far the work is, at so many units a second."""
        raise NotImplementedError

    @property
    def how_far(self) -> str:
        """What is done of it all, in words; of one unit that is under way there is nothing to count."""
        if self.total == 1 and not self.done:
            return self.what
        return f"{self.what}: {self.done:,} of {self.total:,} {self.unit}"


@contextmanager
def beating(progress: Paced) -> Iterator[None]:
    """While the block runs, tells every so often that the work goes on, from a thread, whatever the work is waiting for."""
    over = threading.Event()

    def beat() -> None:
        if hasattr(signal, "pthread_sigmask"):  # signals are for the threads that were there before
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not over.wait(_LOOK_SECONDS):
            try:
                progress.beat()
            except (OSError, ValueError):  # nobody reads it any more: whoever advances hears of it
                return

    thread = threading.Thread(target=beat, name="featurepipe-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Lines(Paced):
    """A plain line every few seconds, for logs and pipes."""

    def __init__(
        self,
        total: int,
        what: str,
        stream: IO[str],
        *,
        unit: str = "images",
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(total, what, unit, every=every, clock=clock)
        self._stream = stream

    def tell(self, rate: float, bottleneck: str) -> None:
        """Prints a line; without a rate up to one step, which has what is done once in it: imports, opening, warming up."""
        tail = f", {bottleneck}" if bottleneck else ""
        if self._steps < 2:
            self.say(f"{self.how_far}{tail}")
            return
        left = duration((self.total - self.done) / rate) if rate > 0 else "?"
        self.say(f"{self.how_far}, {_rate(rate, self.unit)}, {left} left{tail}")

    def say(self, message: str) -> None:
        """Prints one line."""
        print(displayed(message), file=self._stream, flush=True)


class Bar:
    """A rich progress bar with rate, time left and the current bottleneck."""

    def __init__(self, bar: rich.progress.Progress, task: rich.progress.TaskID, unit: str) -> None:
        self._bar, self._task, self._unit = bar, task, unit
        self._start, self._done = time.monotonic(), 0

    def advance(self, images: int, bottleneck: str = "") -> None:
        """Moves the bar."""
        self._done += images
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        self._bar.update(self._task, advance=images, bottleneck=displayed(bottleneck), rate=_rate(rate, self._unit))

    def say(self, message: str) -> None:
        """Prints one line above the bar."""
        self._bar.console.print(displayed(message), highlight=False, markup=False)


class NotebookBar(Paced):
    """A bar in a notebook's cell: one for all work that the cell does, as a page's own ``<progress>``, without scripts."""

    _cell: tuple[int, Any] | None = None  # the number of the cell that was run last, and what updates its bar

    def __init__(self, total: int, what: str, unit: str, shell: Any) -> None:
        super().__init__(total, what, unit, every=0.25, clock=time.monotonic)
        number = int(shell.execution_count)
        known = NotebookBar._cell
        self._handle = known[1] if known is not None and known[0] == number else None
        self._show(self.how_far)
        NotebookBar._cell = number, self._handle

    def tell(self, rate: float, bottleneck: str) -> None:
        """Moves the bar."""
        left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 and self._steps > 1 else ""
        self._show(", ".join(filter(None, (f"{self.how_far}{left}", bottleneck))))

    def say(self, message: str) -> None:
        """Prints one line on standard error, which a notebook shows below the bar."""
        print(displayed(message), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Shows how far it came, and in what time."""
        self._show(f"{self.how_far} in {spoken(self._clock() - self._start)}")

    def _show(self, line: str) -> None:
        shown: Any = importlib.import_module("IPython.display")
        bar = f'<progress value="{self.done}" max="{max(self.total, 1)}" style="width:16em;vertical-align:middle"></progress>'
        html = shown.HTML(f"<div>{bar} {escape(displayed(line))}</div>")
        if self._handle is None:
            self._handle = shown.display(html, display_id=True)
        else:
            self._handle.update(html)


def _notebook() -> Any:
    """The shell of a notebook's kernel if this is one; else None. Nothing is imported to find that out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if hasattr(shell, "kernel") else None


def announcer(*, silent: bool = False) -> Callable[[str], None]:
    """A function that says one line: to the logger ``featurepipe``, and on standard error unless ``silent``."""
    if silent:
        return _logger.info
    shown = (
        sys.stderr.progress(0, "", "").say if isinstance(sys.stderr, TakesProgress) else Lines(0, "", sys.stderr).say
    )

    def say(message: str) -> None:
        _logger.info("%s", message)
        shown(message)

    return say


@contextmanager
def show(
    total: int, what: str, *, unit: str = "images", silent: bool = False, stream: IO[str] | None = None
) -> Iterator[Progress]:
    """Progress of ``total`` images, or other units, in the form that fits ``stream`` (standard error unless told otherwise)."""
    stream = stream or sys.stderr
    if silent:
        yield Silent()
        return
    shown: Progress
    if isinstance(stream, TakesProgress):
        shown = stream.progress(total, what, unit)
    elif stream is sys.stderr and (shell := _notebook()) is not None:
        shown = NotebookBar(total, what, unit, shell)
    elif not stream.isatty():
        shown = Lines(total, what, stream, unit=unit)
    else:
        with _bar(total, what, unit, stream) as bar:
            yield bar
        return
    with beating(shown) if isinstance(shown, Paced) else nullcontext():
        yield shown
    if isinstance(shown, NotebookBar):
        shown.close()


@contextmanager
def _bar(total: int, what: str, unit: str, stream: IO[str]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),  # which moves while nothing else does
        TimeRemainingColumn(),
        TextColumn("{task.fields[bottleneck]}", style="dim", markup=False),  # names may hold brackets
    )
    with RichProgress(*columns, console=Console(file=stream), refresh_per_second=4) as bar:
        task = bar.add_task(what, total=total, bottleneck="", rate="")
        yield Bar(bar, task, unit)


def _rate(rate: float, unit: str) -> str:
    """How fast it goes: units a second, or what each takes where that would be about none.

    Example:
        >>> _rate(12.34, "images"), _rate(1 / 12, "heads"), _rate(0, "heads")
        ('12.3 img/s', '12 s/head', '0.0 heads/s')
    """
    short = "img" if unit == "images" else unit
    if 0 < rate < _SLOW:
        return f"{1 / rate:,.0f} s/{short.removesuffix('s')}"
    return f"{rate:,.1f} {short}/s"


def spoken(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> spoken(0.3), spoken(12.4), spoken(96), spoken(3725.4)
        ('a second', '12 s', '1:36 min', '1:02:05 h')
    """
    if seconds < 1.5:
        return "a second"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{duration(seconds)} {'min' if seconds < 3599.5 else 'h'}"


def took(seconds: float) -> str:
    """Seconds that were measured, to a tenth where they are few.

    Example:
        >>> took(0.0021), took(0.31), took(12.4), took(96)
        ('0.002 s', '0.3 s', '12 s', '1:36 min')
    """
    few = f"{seconds:.1f} s" if seconds >= 0.095 else f"{seconds:.1g} s"
    return few if seconds < 9.95 else spoken(seconds)


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``, without a unit: for tables and clocks; in text take `spoken` or `took`.

    Example:
        >>> duration(3725.4)
        '1:02:05'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
