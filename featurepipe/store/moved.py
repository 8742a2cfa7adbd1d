"""Commands that read a store while ``compact`` or ``gc`` rewrites it start again, and so see one state of it throughout."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from featurepipe.errors import StoreMoved, UnknownSnapshot
from featurepipe.progress import announcer

TRIES = 3
"""How often a command is begun: each time the store would have to be rewritten again, which happens once a night."""

P = ParamSpec("P")
R = TypeVar("R")


def starts_again(command: Callable[P, R]) -> Callable[P, R]:
    """Makes a command that reads features begin anew when parts that it was about to read were moved or removed.

    Rows, labels and keys are then all of the snapshot that is current at the last beginning (or of the one asked for): what
    was read before is forgotten. Nobody needs a lock to read, so that a night never waits for somebody's training.

    Args:
        command: Writes nothing before it has read everything, or the same again. Its argument ``silent``, if it has one,
            says whether it may tell that it begins anew.

    Raises:
        StoreMoved: (When called) it happened ``TRIES`` times.
    """

    @wraps(command)
    def begun(*args: P.args, **options: P.kwargs) -> R:
        for number in range(2, TRIES + 1):
            try:
                return command(*args, **options)
            except (StoreMoved, UnknownSnapshot) as error:
                if isinstance(error, UnknownSnapshot) and error.run_id in {
                    *map(str, args),
                    *map(str, options.values()),
                }:
                    raise  # which was asked for
                say = announcer(silent=bool(options.get("silent", False)))
                say(f"the store was rewritten meanwhile (compact or gc): starting again, try {number} of {TRIES}")
        return command(*args, **options)

    return begun
