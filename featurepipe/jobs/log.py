"""What a run of a job says while it works, and what libraries write to standard error meanwhile: as text or as JSON lines."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from typing import IO, Any, Literal, NamedTuple

from featurepipe.display import displayed
from featurepipe.jobs.text import step_name, told
from featurepipe.progress import Paced, Progress
from featurepipe.records import SUCCESS

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


LogFormat = Literal["text", "json"]
Level = Literal["info", "warning", "error"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")
PROGRESS_SECONDS = 30.0
"""How often progress is logged in the JSON form."""

_OF_A_RUN = ("status", "exit_code", "counts", "changes", "seconds", "images_per_second", "store_bytes", "free_bytes")
_MESSAGE, _PROGRESS, _OUTPUT = "message", "progress", "output"


class JobLog:
    """Events of one run of a job, with what they are about.

    Attributes:
        logger: where they go.
        fields: what every event carries: ``job``, and inside ``about`` more.
    """

    def __init__(self, logger: logging.Logger, **fields: Any) -> None:
        self.logger = logger
        self.fields = fields

    def say(self, text: str) -> None:
        """A line for people."""
        self.event(_MESSAGE, text)

    def warn(self, text: str) -> None:
        """A line that people should not miss."""
        self.event(_MESSAGE, text, level="warning")

    def event(self, event: str, text: str = "", *, level: Level = "info", **numbers: Any) -> None:
        """Logs something that happened.

        Args:
            event: its name, for machines.
            text: what people read; without one the text form leaves the event out.
            level: how grave it is.
            numbers: what belongs to it, as JSON values.
        """
        about = {"event": event, **self.fields, **numbers}
        self.logger.log(logging.getLevelNamesMapping()[level.upper()], "%s", text, extra={"about": about})

    def step_ended(self, entry: Mapping[str, Any]) -> None:
        """Logs what became of a step, with the numbers that its result has.

        Args:
            entry: as in the ``steps`` of a run record.
        """
        result = entry.get("result") or {}
        numbers = {name: value for name, value in result.items() if _is_number(value)}
        text = f"{step_name(entry)}: {entry['status']}: {told(entry)}".removesuffix(": ")
        level: Level = "error" if "error" in entry else "info"
        facts: dict[str, Any] = {name: entry[name] for name in ("status", "seconds", "error_type") if name in entry}
        facts |= {**numbers, "step": step_name(entry)}
        self.event("step ended", text, level=level, **facts)
        for warning in result.get("warnings", ()):
            self.warn(warning)

    def run_ended(self, record: Mapping[str, Any]) -> None:
        """Logs how a run ended, with its numbers; the text form leaves that to the summary."""
        level: Level = "info" if record["exit_code"] in SUCCESS else "error"
        numbers: dict[str, Any] = {name: record.get(name) for name in _OF_A_RUN}
        self.event("run ended", level=level, **numbers)

    @contextmanager
    def about(self, **fields: Any) -> Iterator[None]:
        """What is logged while the block runs carries these fields too, such as ``run_id`` or ``step``."""
        before = self.fields
        self.fields = {**before, **fields}
        try:
            yield
        finally:
            self.fields = before


@contextmanager
def job_log(
    job: str, *, log_format: LogFormat = "text", silent: bool = False, stream: IO[str] | None = None
) -> Iterator[JobLog]:
    """Opens the log of one run on standard error.

    In the JSON form standard error holds nothing else while the block runs: what commands say becomes the event ``message``,
    the progress of long work ``progress`` with its numbers, and what anyone else prints there (Python's warnings, a user's
    network, a library in C) ``output``. So commands need not be told to be silent.

    Args:
        job: the job's name.
        log_format: ``text`` or ``json``. A JSON line has ``time`` (UTC), ``level``, ``event``, ``job``, then ``run_id`` and
            ``step`` where there are any, ``text``, and the event's numbers.
        silent: log nothing.
        stream: where to, standard error by default.
    """
    log = JobLog(logging.getLogger(f"featurepipe.jobs.{job}"), job=job)
    captured = None
    with ExitStack() as stack:
        if log_format == "json" and not silent and stream is None:
            captured = stack.enter_context(captured_stderr(lambda line: log.event(_OUTPUT, line)))
            stream = captured.stream
        handler = logging.NullHandler() if silent else _Handler(stream or sys.stderr, log_format)
        stack.enter_context(_only_to(handler, log.logger))
        if captured is not None:
            stack.callback(captured.end)  # before the handler goes
        if log_format == "json" and not silent:
            output = _LoggedOutput(log)
            if sys.stdout is sys.stderr:  # as the command line has it, to keep its result apart
                stack.enter_context(redirect_stdout(output))
            stack.enter_context(redirect_stderr(output))
        yield log


@contextmanager
def _only_to(handler: logging.Handler, logger: logging.Logger) -> Iterator[None]:
    """Sends a logger's events to one handler, and to none of its parents': what they print would be logged again."""
    before = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.propagate = before[0]
        logger.setLevel(before[1])
        logger.removeHandler(handler)


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or a table of numbers such as counts."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(inner, int | float) for inner in value.values())
    return isinstance(value, int | float)


class _Handler(logging.StreamHandler[IO[str]]):
    def __init__(self, stream: IO[str], log_format: LogFormat) -> None:
        super().__init__(stream)
        self.setFormatter(_JsonLine() if log_format == "json" else _PlainLine())
        if log_format == "text":
            self.addFilter(lambda record: bool(record.getMessage()))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A log that nobody can read any more must not end the night."""


class _PlainLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        grave = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{grave}{displayed(record.getMessage())}"


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        about = dict(getattr(record, "about", {}))
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **{name: about.pop(name) for name in ("event", "job", "run_id", "step") if name in about},
            **({"text": record.getMessage()} if record.getMessage() else {}),
            **about,
        }
        return json.dumps(line, default=str)  # ASCII only, on one line


class _LoggedOutput(io.TextIOBase):
    """Stands for standard error: each line becomes an event."""

    def __init__(self, log: JobLog) -> None:
        self._log = log
        self._unfinished = threading.local()  # print() writes a line and its end one after the other

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, text: str) -> int:
        """Logs the lines that are complete."""
        *lines, rest = (getattr(self._unfinished, "text", "") + text).split("\n")
        self._unfinished.text = rest
        for line in lines:
            if line.strip():
                self._log.event(_OUTPUT, line)
        return len(text)

    def progress(self, total: int, what: str, unit: str) -> Progress:
        """Progress as events; see `featurepipe.progress.show`."""
        return LoggedProgress(self._log, total, what, unit)


class LoggedProgress(Paced):
    """Progress as events with numbers, now and then."""

    def __init__(
        self,
        log: JobLog,
        total: int,
        what: str,
        unit: str,
        *,
        every: float = PROGRESS_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(total, what, unit, every=every, clock=clock)
        self._log = log

    def tell(self, rate: float, bottleneck: str) -> None:
        """Logs an event."""
        numbers: dict[str, Any] = {"what": self.what, "done": self.done, "total": self.total}
        numbers |= {"per_second": round(rate, 2)} | ({"waits_for": bottleneck} if bottleneck else {})
        self._log.event(_PROGRESS, self.how_far, **numbers)

    def say(self, message: str) -> None:
        """A line for people."""
        self._log.say(message)
