"""Printing a command's result: one JSON document with ``--json``, text without."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any


def show(args: Namespace, value: Any, text: Callable[[Any], str]) -> None:
    """Prints ``value``, JSON values, on standard output: as they are with ``--json``, else as ``text`` says them."""
    if args.json:
        say(args, json.dumps(value, indent=2))  # ASCII only, which every terminal and pipe can take
    else:
        say(args, text(value))


def say(args: Namespace, line: str) -> None:
    """Prints on the real standard output, which is redirected while a command runs."""
    print(line, file=args.stdout)


def this_command() -> str:
    """The command line that is running, as one could type it again."""
    return shlex.join(["featurepipe", *sys.argv[1:]])
