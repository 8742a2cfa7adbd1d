"""The standard streams: open, whatever started the process, and a command's result on them, as JSON or text, shown safely."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
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


def say(args: Namespace, line: str) -> None:
    """Prints text whose names are `displayed` already on the real standard output, which is redirected while a command runs."""
    _print(args, displayed_lines(line))


def _print(args: Namespace, text: str) -> None:
    print(text, file=args.stdout)


def this_command() -> str:
    """The command line that is running, as one could type it again."""
    return shlex.join(["featurepipe", *sys.argv[1:]])
