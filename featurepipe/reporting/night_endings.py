"""How nights ended, in words and in a sign; and what a page that a night wrote of itself cannot know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.records import KILLED, RUNNING

Night = Mapping[str, Any]

_SIGNS = {
    "done": "\N{CHECK MARK}",
    "failed": "\N{MULTIPLICATION X}",
    KILLED: "\N{MULTIPLICATION X}",
    "interrupted": "\N{BLACK SQUARE}",
}
_WARNS = "\N{WARNING SIGN}\N{VARIATION SELECTOR-15}"  # as text, not as a coloured picture
_UNKNOWN = {
    KILLED: "killed: no record of how it ended",
    RUNNING: "running, or killed: no record of how it ended",
}
_TELLING = ("report", "metrics")


def is_good(night: Night) -> bool:
    """Whether a night did what it was to do."""
    return night.get("status") == "done"


def unknown_end(status: Any) -> list[str]:
    """Why nothing is known of how a night ended; empty if it is known."""
    return [_UNKNOWN[status]] if status in _UNKNOWN else []


def signed(status: str, warnings: Sequence[str] = ()) -> str:
    """How a night or a step ended, with its sign; one with warnings does not look like one without.

    Example:
        >>> signed("done"), signed("done", ["odd images"])
        ('✓ done', '⚠︎ done, 1 warning')
    """
    sign = _WARNS if warnings and status == "done" else _SIGNS.get(status, "")
    return f"{sign} {status}{_counted(warnings)}".strip()


def ending(night: Night, took: str = "") -> str:
    """How a night ended, to go on after its name.

    Example:
        >>> ending({"status": "done"}, "3 s"), ending({"status": "failed", "exit_code": 5})
        ('ended well after 3 s', 'ended failed (exit code 5)')
    """
    status, code, later = str(night.get("status")), night.get("exit_code"), night.get("to_come") or ()
    if status in _UNKNOWN:
        return f"is {_UNKNOWN[status]}" if status == RUNNING else f"was {_UNKNOWN[status]}"
    words = {
        "done": "went well" if later else "ended well",
        "out of time": "ended when its time was over; the next one goes on",
    }
    ended = words.get(status, f"ended {status} (exit code {code})" if code is not None else f"ended {status}")
    time = f" {'for' if later and status == 'done' else 'after'} {took}" if took else ""
    with_warnings = f", with{_counted(night.get('warnings') or ())[1:]}" if night.get("warnings") else ""
    without = f"; its {' and '.join(later)} came after that and {_be(later)} not on this page" if later else ""
    return f"{ended}{time}{with_warnings}{without}"


def to_come(record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The steps that tell of a night and have not been taken: it is one of them that writes the page, before it is over.

    Args:
        record: of the run.
        steps: of the document.
    """
    if record.get("status") in _UNKNOWN:
        return []
    planned, taken = (record.get("plan") or {}).get("steps") or (), {step["kind"] for step in steps}
    return [kind for kind in _TELLING if kind in planned and kind not in taken]


def _be(things: Sequence[str]) -> str:
    return "are" if len(things) > 1 else "is"


def _counted(warnings: Sequence[str]) -> str:
    return f", {len(warnings)} warning{'s' if len(warnings) > 1 else ''}" if warnings else ""
