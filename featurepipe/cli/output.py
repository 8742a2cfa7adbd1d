"""Printing a command's result: one JSON document with ``--json``, text without."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from featurepipe.display import displayed_lines, displayed_values


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
