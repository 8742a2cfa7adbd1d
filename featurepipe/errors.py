"""Every error featurepipe raises on purpose.

::

    FeaturepipeError                     exit code 1
    +-- UsageError (ValueError)          2   an argument is wrong: names the value, the choices, the next step
    |   +-- UnknownSnapshot              2   there is no snapshot of that id (any more)
    +-- SourceError                      1   a source as a whole cannot be read
    +-- Reject                           -   one image cannot be used; recorded with its reason, never fatal
    |   +-- Unavailable                  -   it cannot be read now, but perhaps in a moment
    +-- WeightsNotFound                  1   weights are not at hand and cannot be downloaded
    +-- StoreError                       1   the store cannot be read or written
    |   +-- NoStore (UsageError)         2   there is no store at the path that was given, or something else is
    |   +-- CorruptPart                  1   a part's bytes are not what was committed
    |   +-- StoreMoved                   1   what was listed is gone: the store was compacted meanwhile; begin again
    |   +-- DiskFull                     1   no space left; what was committed is safe
    |   +-- StoreLocked                  75  someone else holds the lock
    +-- BundleError                      1   a bundle is damaged, foreign, or asked about features it does not know
    +-- NonFiniteFeatures                1   the network produced NaN or infinity
    +-- TooManyRejects                   4   more images were rejected than allowed
    +-- ClusterError                     1   a cluster cannot be reached or used, or went away; what was committed stands
    |   +-- WorkerRefused                -   one worker must not be used: other versions, weights, or no view of the store
    +-- Interrupted                      130 stopped by a signal, everything in flight committed

An error knows which option it is about (``error.option``, the name in Python), and each front end spells the options that a
message names in its own way: ``max_rejects="1%"`` in Python, ``--max-rejects 1%`` on the command line,
``[limits] max_rejects = "1%"`` in a job file (`featurepipe.jobs.validation.keys_of`).
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeAlias


@dataclass(frozen=True)
class Option:
    """An option as a message names it.

    Attributes:
        name: Its name in Python, such as ``max_rejects``.
        value: What it is or should be set to; None to name it alone. True is a flag.
    """

    name: str
    value: Any = None


Spelling: TypeAlias = Callable[[Option], str]
"""How a front end writes an option."""

_ON_COMMAND_LINE = {
    "nodes": "node",
    "columns": "node",
    "params": "set",
    "from_node": "from",
    "query_ids": "id",
}  # for each; a word of Python


def on_command_line(option: Option) -> str:
    """Spells an option as the command line does.

    Example:
        >>> on_command_line(Option("max_rejects", 1)), on_command_line(Option("nodes")), on_command_line(Option("tune", True))
        ('--max-rejects 1', '--node', '--tune')
        >>> on_command_line(Option("sizes", (5, "all")))
        '--sizes 5,all'
    """
    value = ",".join(map(str, option.value)) if isinstance(option.value, tuple) else option.value
    flag = "--" + _ON_COMMAND_LINE.get(option.name, option.name).replace("_", "-")
    return flag if value is None or value is True else f"{flag} {shlex.quote(str(value))}"


def in_python(option: Option) -> str:
    """Spells an option as a keyword argument.

    Example:
        >>> in_python(Option("max_rejects", "1%")), in_python(Option("nodes"))
        ("max_rejects='1%'", 'nodes')
    """
    return option.name if option.value is None else f"{option.name}={option.value!r}"


class Message(str):
    """Text that names options, each of which a front end spells in its own way; as it is, it is for the command line.

    Args:
        parts: Texts and options, in their order.

    Example:
        >>> text = Message("more than ", Option("max_rejects", "1%"), " allows")
        >>> text, text.spelled(in_python)
        ('more than --max-rejects 1% allows', "more than max_rejects='1%' allows")
    """

    __slots__ = ("parts",)
    parts: tuple[str | Option, ...]

    def __new__(cls, *parts: str | Option) -> Self:
        """Joins the parts; a message among them brings its own."""
        flat = tuple(one for part in parts for one in (part.parts if isinstance(part, Message) else (part,)))
        message = super().__new__(cls, _spelled(flat, on_command_line))
        message.parts = flat
        return message

    def __getnewargs__(self) -> Any:
        """Its parts, which a pickle keeps."""
        return self.parts

    @property
    def options(self) -> tuple[Option, ...]:
        """The options that it names, in their order."""
        return tuple(part for part in self.parts if isinstance(part, Option))

    def spelled(self, spelling: Spelling) -> str:
        """The text as a front end shows it."""
        return _spelled(self.parts, spelling)


def _spelled(parts: Iterable[str | Option], spelling: Spelling) -> str:
    return "".join(spelling(part) if isinstance(part, Option) else part for part in parts)


class FeaturepipeError(Exception):
    """Base of all errors that featurepipe raises on purpose; ``str(error)`` spells options as Python does.

    Args:
        lines: Of the message.
        option: The name in Python of the option that the error is about; by default the first that the message names.
        record: What the call would have returned, as far as it is known: the record of a run that failed.

    Attributes:
        option: That name; empty if the error is about none.
        record: That record, plain JSON values; None if there is none.
    """

    exit_code = 1

    def __init__(self, *lines: object, option: str = "", record: dict[str, Any] | None = None) -> None:
        super().__init__(*lines)
        named = (one.name for line in lines if isinstance(line, Message) for one in line.options)
        self.option = option or next(named, "")
        self.record = record

    def __str__(self) -> str:
        return "\n".join(self.spelled(in_python))

    @property
    def lines(self) -> tuple[str, ...]:
        """The message's lines, options spelled as Python does; names in them may hold line breaks."""
        return self.spelled(in_python)

    def spelled(self, spelling: Spelling) -> tuple[str, ...]:
        """The message's lines as a front end shows them.

        Each is on its own: names in them may hold line breaks, which are no ends of ours.
        """
        return tuple(line.spelled(spelling) if isinstance(line, Message) else str(line) for line in self.args)

    @property
    def message(self) -> Message:
        """The whole message, to be part of another one."""
        lines = [line if isinstance(line, Message) else str(line) for line in self.args]
        return Message(*[part for line in lines for part in ("\n", line)][1:])


class UsageError(FeaturepipeError, ValueError):
    """An argument is wrong; the message names the value, the choices and the next step."""

    exit_code = 2


class UnknownSnapshot(UsageError):
    """There is no snapshot of that id, or none any more.

    Attributes:
        run_id: The id.
    """

    def __init__(self, message: str, run_id: str = "") -> None:
        super().__init__(message)
        self.run_id = run_id


class SourceError(FeaturepipeError):
    """A source as a whole cannot be listed or read."""


class Reject(FeaturepipeError):
    """One image that cannot be used; ``str(error)`` is the reason that is recorded.

    Reasons start with a short stable code and a colon, such as ``truncated: ...`` or ``not-an-image: ...``.
    """


class ForgottenBytes(Reject):
    """One image whose bytes were forgotten: it is not computed, and not even its key is kept."""


class Unavailable(Reject):
    """One image that cannot be read now, but perhaps in a moment: a server is busy, a share does not answer."""


class WeightsNotFound(FeaturepipeError):
    """Pretrained weights are not on this machine and cannot be downloaded."""


class StoreError(FeaturepipeError):
    """The feature store cannot be read or written."""


class NoStore(StoreError, UsageError):
    """There is no feature store at the path that was given, or something else is there."""


class CorruptPart(StoreError):
    """A part's bytes are not what was committed."""


class StoreMoved(StoreError):
    """What was listed a moment ago is gone: ``compact`` or ``gc`` rewrote the store meanwhile."""


class DiskFull(StoreError):
    """No space is left on the store's disk; what was committed before is safe."""


class StoreLocked(StoreError):
    """Another process holds the store's lock."""

    exit_code = 75


class BundleError(FeaturepipeError):
    """A model bundle is damaged, is none, or was made for another feature space."""


class NonFiniteFeatures(FeaturepipeError):
    """The network produced NaN or infinity for an image."""


class TooManyRejects(FeaturepipeError):
    """More images were rejected than ``max_rejects`` allows."""

    exit_code = 4


class ClusterError(FeaturepipeError):
    """A cluster cannot be reached or used, or went away; what its workers had committed stands."""


class WorkerRefused(ClusterError):
    """One worker must not be used: its versions, weights or feature space differ, or it cannot see the store.

    A task raises it in the worker; `featurepipe.execution` then reports that worker by name, leaves it alone from there on, and
    has the task done elsewhere.
    """


class Interrupted(FeaturepipeError):
    """Stopped by a signal; everything in flight was committed first."""

    def __init__(self, message: str, signal_number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def unsearchable(path: str | os.PathLike[str]) -> str:
    """Says which folder on the way to a local path may not be searched; empty if each may.

    Below such a folder nobody can tell a missing file from one that is there, and most functions say that it is missing.
    """
    try:
        whole = Path(os.path.realpath(path))
        for step in (*reversed(whole.parents), whole):
            folder = step.parent
            os.lstat(step)
    except PermissionError:
        return f"the folder {folder} cannot be searched: its permission x is missing for this user"
    except (OSError, ValueError):
        pass
    return ""


def missing(path: str) -> str:
    """What is said of a local path that is not there: where it was looked for, and which names there look most like it."""
    folder = Path(path).parent.absolute()
    near = near_paths(path)
    return f"no such file or folder (looked in {folder}{f'; nearest: {near}' if near else ''})"


def near_paths(path: str, holding: str = "") -> str:
    """Up to three files or folders beside a path that look most like it, as it is written.

    Args:
        path: A local path that is not there.
        holding: Only folders that hold this file, whatever they are called; empty for whatever is there.
    """
    where = Path(path)
    try:
        with os.scandir(where.parent) as entries:
            names = sorted(entry.name for entry in islice(entries, _NEIGHBOURS))
    except (OSError, ValueError):
        return ""
    if holding:
        names = [name for name in names if os.path.lexists(where.parent / name / holding)]
    near = nearest(where.name, names) or (names[:3] if holding else [])
    return ", ".join(str(where.parent / one) for one in near)


_NEIGHBOURS = 10_000  # entries of a folder that are compared with a misspelt name


@contextmanager
def about(option: str) -> Iterator[None]:
    """Errors of the block that name no option are about this one."""
    try:
        yield
    except FeaturepipeError as error:
        error.option = error.option or option
        raise


def needs_posix(what: str) -> str:
    """Why ``what`` (stores, bundles) cannot be used on this system, as on Windows; empty where it can.

    Their files are opened without following links, and read at positions by several threads.
    """
    lacking = [name for name in ("O_NOFOLLOW", "O_CLOEXEC", "pread") if not hasattr(os, name)]
    if not lacking:
        return ""
    return (
        f"{what} need Linux or macOS: Python on {sys.platform} has no os.{lacking[0]}. On Windows run featurepipe in WSL; "
        "`featurepipe --help`, `backbones`, `nodes` and fp.make_head work here"
    )


def pip_install(extra: str) -> str:
    """The command that installs what an extra brings.

    Example:
        >>> pip_install("duplicates")
        "pip install 'featurepipe[duplicates]' (in a checkout '.[duplicates]')"
    """
    return f"pip install 'featurepipe[{extra}]' (in a checkout '.[{extra}]')"


def nearest(value: str, names: Sequence[str]) -> list[str]:
    """Up to three names that look most like a value, or hold it, each once.

    Example:
        >>> nearest("--stroe", ["--store", "--label"])
        ['--store']
        >>> nearest("a/1.pgn", ["a/1.png", "a/1.png"])
        ['a/1.png']
    """
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    return near + [name for name in names if len(value) >= 3 and value in name and name not in near][: 3 - len(near)]


def unknown(
    kind: str,
    value: str,
    choices: Iterable[str],
    *,
    where: str = "",
    see: str = "",
    is_better: Callable[[str], bool] | None = None,
) -> UsageError:
    """Builds the error for a name that is not among ``choices``: the value, the nearest ones, where to look.

    Of the nearest those that ``is_better`` is true of come first.

    Example:
        >>> str(unknown("node", "layer5", ["layer3", "layer4"], where="resnet50", see="featurepipe nodes resnet50"))
        "unknown node 'layer5' in resnet50; nearest: layer4, layer3. See: featurepipe nodes resnet50"
    """
    names = list(choices)
    near = nearest(value, names)
    near = sorted(near, key=is_better, reverse=True) if is_better else near
    hint = (
        f"nearest: {', '.join(near)}"
        if near
        else f"choices: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    )
    inside = f" in {where}" if where else ""
    tail = f". See: {see}" if see else ""
    return UsageError(f"unknown {kind} {value!r}{inside}; {hint}{tail}")
