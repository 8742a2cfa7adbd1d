"""The standard streams: open, whatever started the process, and a command's result on them, as JSON or text, shown safely."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import sys
import threading
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from featurepipe.display import displayed, displayed_lines, displayed_values

_STREAMS = ("stdin", "stdout", "stderr")


def open_standard_streams() -> None:
    """Opens the null device where a standard stream is closed, as some schedulers start commands (``>&-``).

    Else the next file that is opened would take the descriptor's number, and hold what some library prints. Characters that
    the terminal's encoding lacks are written as escapes.
    """
    for descriptor in range(len(_STREAMS)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(null := os.open(os.devnull, os.O_RDWR), descriptor)
            if null != descriptor:
                os.close(null)
    for name in _STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  for as long as we live
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_unwritable() -> None:
    """Gives up what standard output still holds if it cannot be written, as on a full disk.

    Python would try again when it ends, complain, and change the exit code.
    """
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()


def discard_output() -> None:
    """Sends what standard output still holds, and all that follows, nowhere: its reader left."""
    with suppress(OSError, ValueError):  # a stream of a program that called us may have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def warnings_shown_safely() -> Iterator[None]:
    """Has Python's warnings, whose texts may hold names, take one line each while the block runs."""
    before = warnings.formatwarning

    def one_line(message: object, category: type[Warning], *_where: object) -> str:
        return f"{category.__name__}: {displayed(message)}\n"

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before


def explain() -> None:
    """Has reasons, which modules log at the level DEBUG under the name ``featurepipe``, shown on standard error.

    What they say at higher levels is shown already, as messages on the way.
    """

    class Reasons(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno < logging.INFO:
                where = record.name.removeprefix("featurepipe.")
                print(f"{where}: {displayed(record.getMessage())}", file=sys.stderr, flush=True)

    logger = logging.getLogger("featurepipe")
    logger.addHandler(Reasons())
    logger.setLevel(logging.DEBUG)


def displayed_traceback(error: BaseException) -> str:
    """The traceback of a defect, in which what strangers named is escaped, and no message makes lines of its own."""
    found = traceback.TracebackException.from_exception(error, compact=True)
    _escape_notes(found)
    return "".join(map(_displayed_chunk, found.format())).rstrip()


def _escape_notes(found: traceback.TracebackException) -> None:
    """Makes each note of all errors of a chain or a group one line, else each of its lines would be a chunk of its own."""
    waiting: list[traceback.TracebackException | None] = [found]
    while waiting:
        if (one := waiting.pop()) is not None:
            if isinstance(notes := getattr(one, "__notes__", None), list | tuple):
                one.__notes__ = [displayed(note) for note in notes]
            waiting += [one.__cause__, one.__context__, *(one.exceptions or ())]


def _displayed_chunk(chunk: str) -> str:
    if chunk.startswith("  "):  # of a frame: a place, the line there, and marks below it
        return displayed_lines(chunk)
    inside = chunk.strip("\n")
    before, _, after = chunk.partition(inside) if inside else (chunk, "", "")
    return f"{before}{displayed(inside)}{after}"


@contextmanager
def tracebacks_shown_safely(*, on_one_line: bool) -> Iterator[None]:
    """Has tracebacks of threads, and of objects that are deleted, shown as `displayed_traceback` while the block runs.

    Args:
        on_one_line: whether each is one line, for a log of lines.
    """

    def show_one(where: str, error: BaseException | None) -> None:
        text = "\n".join([displayed(where), *([displayed_traceback(error)] if error else [])])
        with suppress(OSError, AttributeError):  # a standard error that is full, or none
            print(displayed(text) if on_one_line else text, file=sys.stderr)

    def of_thread(found: threading.ExceptHookArgs) -> None:
        if found.exc_type is not SystemExit:
            show_one(f"Exception in thread {found.thread.name if found.thread else '?'}:", found.exc_value)

    def of_object(found: sys.UnraisableHookArgs) -> None:
        show_one(f"{found.err_msg or 'Exception ignored in'}: {type(found.object).__name__}", found.exc_value)

    before = threading.excepthook, sys.unraisablehook
    if threading.excepthook is threading.__excepthook__:  # else a program that called us has its own
        threading.excepthook = of_thread
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = of_object
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before


def show(args: Namespace, value: Any, text: Callable[[Any], str]) -> None:
    """Prints ``value``, JSON values, on standard output: as they are with ``--json``, else as ``text`` says them.

    Args:
        args: of the command.
        value: what came of it.
        text: makes lines of the value, in which every name is `displayed`.
    """
    if args.json:
        _print(args, json.dumps(value, indent=2))  # ASCII only, which every terminal and pipe can take
    else:
        _print(args, displayed_lines(text(displayed_values(value))))


def start_up(args: Namespace, result: Mapping[str, Any]) -> float:
    """Seconds of this command that its result does not count: those in which Python and the libraries were loaded."""
    began: float = args.began
    return max(time.perf_counter() - began - float(result["seconds"]), 0.0)


def say(args: Namespace, line: str) -> None:
    """Prints text whose names are `displayed` already on the real standard output, which is redirected while a command runs."""
    _print(args, displayed_lines(line))


def _print(args: Namespace, text: str) -> None:
    print(text, file=args.stdout)


def this_command() -> str:
    """The command line that is running, as one could type it again."""
    return shlex.join(["featurepipe", *sys.argv[1:]])
