"""The command line: one module a command, or family of commands; each declares options, calls a function, prints its result.

Results go to standard output (one JSON document with ``--json``); progress and messages go to standard error.
Nothing heavy is imported before a command runs, so that ``--help`` answers at once: commands are imported where they are called.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from featurepipe.cli.output import (
    discard_output,
    discard_unwritable,
    displayed_traceback,
    explain,
    open_standard_streams,
    tracebacks_shown_safely,
    warnings_shown_safely,
)
from featurepipe.cli.parser import build_parser, offer_values, parse
from featurepipe.display import displayed
from featurepipe.errors import FeaturepipeError, on_command_line, unsearchable
from featurepipe.interrupt import ends_on_ctrl_c

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: errors become words and a code."""
    began = time.perf_counter()
    open_standard_streams()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell when somebody presses the tab key
        _complete()
    args = parse(sys.argv[1:] if argv is None else argv)
    if args is None:
        return 2
    args.stdout, args.began = sys.stdout, began
    with _rare_collections():
        return _guarded(args)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Searches for garbage in circles less often than usual: a tenth of a start went into looking through what imports make."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _complete() -> None:
    """Prints what may follow on the command line and ends the process; does nothing without the extra ``completion``."""
    with suppress(ImportError):
        import argcomplete

        parser = build_parser()
        offer_values(parser)
        argcomplete.autocomplete(parser)


_STOPPED = (
    "stopped by SIGINT before there was a result: what had been committed is kept, nothing is half written, and the same command "
    "goes on from there"
)


def _guarded(args: Namespace) -> int:
    try:
        with warnings_shown_safely(), tracebacks_shown_safely(on_one_line=_logs_json(args)), ends_on_ctrl_c():
            if args.verbose:
                explain()
            return _run(args)
    except FeaturepipeError as error:
        return _failed(args, error.spelled(on_command_line), error.exit_code)
    except KeyboardInterrupt:
        return _failed(args, [_STOPPED], 130)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        discard_output()
        return 0
    except OSError as error:  # a disk or a permission, not a defect: its text names the file
        discard_unwritable()
        return _failed(args, ["; ".join(filter(None, (str(error), _blocked(error))))], 1)
    except Exception as error:  # noqa: BLE001  # a defect of ours, at the border of the process: shown whole, but not obeyed
        discard_unwritable()
        return _defect(args, error)


def _run(args: Namespace) -> int:
    with redirect_stdout(sys.stderr):  # whatever others print, a user's network say, stays out of the result
        code = int(args.run(args))
    args.stdout.flush()  # here, where a reader that has left can still be told from a failure
    return code


def _defect(args: Namespace, error: Exception) -> int:
    if _logs_json(args):  # which must hold it as one line
        return _failed(args, ["".join(traceback.format_exception(error))], 1)
    with suppress(OSError):
        print(displayed_traceback(error), file=sys.stderr)
    return 1


def _blocked(error: OSError) -> str:
    """Which folder may not be searched, if that is why a file is not to be had."""
    named = isinstance(error, PermissionError) and isinstance(error.filename, str | bytes | os.PathLike)
    return unsearchable(os.fsdecode(error.filename)) if named else ""


def _logs_json(args: Namespace) -> bool:
    return getattr(args, "log_format", "text") == "json"


def _failed(args: Namespace, lines: Sequence[str], code: int) -> int:
    """Says why a command ended, in the form of its log, and returns its exit code."""
    if _logs_json(args):
        from featurepipe.jobs.log import job_log

        with job_log(Path(args.job).stem, log_format="json") as log:  # a job that could not be read has its file's name
            log.event("failed", "\n".join(lines), level="error", exit_code=code)
    else:
        with suppress(OSError):  # standard error may be a file on the disk that is full; the code still tells
            print("featurepipe:", "\n".join(map(displayed, lines)), file=sys.stderr)
    return code
