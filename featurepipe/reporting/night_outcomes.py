"""How nights ended, in words and in a sign, and the next step for each thing that did not go as it should."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise, takewhile
from statistics import median
from typing import Any

from featurepipe.display import counted, first_names
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
        "done": "was going well" if later else "ended well",
        "out of time": "ended when its time was over; the next one goes on",
    }
    ended = words.get(status, f"ended {status} (exit code {code})" if code is not None else f"ended {status}")
    time = f" after {took}" if took else ""
    with_warnings = f", with{_counted(night.get('warnings') or ())[1:]}" if night.get("warnings") else ""
    were = "were" if len(later) > 1 else "was"
    left = f"; when this page was written, only its {' and '.join(later)} {were} left to do" if later else ""
    return f"{ended}{time}{with_warnings}{left}"


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


def _counted(warnings: Sequence[str]) -> str:
    return f", {len(warnings)} warning{'s' if len(warnings) > 1 else ''}" if warnings else ""


_LATE = 3
"""Nights in a row without time enough, after which waiting no longer helps."""

_OVERDUE = 2.5
"""Usual times between two runs, after which one is missed."""

_MENDS = {
    "SourceError": "see that the source is there and can be read",
    "DiskFull": "free space on the store's disk, or let fewer snapshots stay ([keep])",
    "TooManyRejects": "mend the images named under Rejects, or allow more ([limits] max_rejects)",
    "Drifted": "look at the images named under Drift; if they are as they should be, accept them (featurepipe drift "
    "STORE --accept last), or give a smaller fail",
    "StoreLocked": "wait for the other run, or see why it does not end",
}


def next_steps(nights: Sequence[Mapping[str, Any]], newest: Mapping[str, Any], made: str) -> list[str]:
    """Says what people should do now; empty if nothing.

    Args:
        nights: as in the document, oldest first.
        newest: the run record of the last of them.
        made: when the document was made, ISO 8601.
    """
    night = nights[-1]
    return [
        *_after_failure(night, newest),
        *_after_delays(nights),
        *_about_losses(night),
        *_about_rejects(night),
        *_about_drift(night),
        *_about_silence(nights, made),
    ]


def _again(newest: Mapping[str, Any]) -> str:
    file = newest.get("job_file")
    return f"featurepipe run {shlex.quote(str(file))}" if file else "the same command again"


def _after_failure(night: Mapping[str, Any], newest: Mapping[str, Any]) -> Iterator[str]:
    if night["status"] == "interrupted":
        yield f"The last run was stopped. Run {_again(newest)}: it goes on where it was."
    elif night["status"] == KILLED:
        yield (
            f"The last run was killed, by hand or for want of memory, or lost its machine. Run {_again(newest)}: it goes on "
            "where it was."
        )
    elif night["status"] == RUNNING:
        yield f"The last run has not ended yet. If nothing is running, it was killed: run {_again(newest)}, which goes on."
    elif night["status"] == "failed":
        kinds = dict.fromkeys(step["error_type"] for step in night["steps"] if step["status"] == "failed")
        mends = [_MENDS[kind] for kind in kinds if kind in _MENDS] or ["mend what the error names"]
        yield f"The last run failed: {'; '.join(mends)}. Then run {_again(newest)}."


def _after_delays(nights: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    late = len(list(takewhile(lambda night: night["status"] == "out of time", reversed(nights))))
    if late >= _LATE:
        verdict = f" The last one was {nights[-1]['verdict']}." if nights[-1].get("verdict") else ""
        yield f"The time did not suffice for {late} runs in a row: allow more of it ([limits] time_budget).{verdict}"
    elif late:
        yield "The time did not suffice; the next run goes on. There is nothing to do unless that happens in every run."


def _about_losses(night: Mapping[str, Any]) -> Iterator[str]:
    labels = night.get("lost_labels") or ()
    if labels:
        yield (
            f"No image has the label{'' if len(labels) == 1 else 's'} {first_names(list(labels), 5)} any more, so that heads "
            "forget it. If that is not on purpose, put the images back, and let a smaller [limits] max_gone refuse such runs."
        )


def _about_rejects(night: Mapping[str, Any]) -> Iterator[str]:
    rejected = night["counts"].get("rejected") or 0
    if rejected:
        yield (
            f"{counted(rejected, 'image', 'was', 'were')} rejected; see Rejects. Each is tried again when "
            "its file changes, or with --retry-rejects."
        )


def _about_drift(night: Mapping[str, Any]) -> Iterator[str]:
    if (night.get("drift") or {}).get("verdict") == "warning":
        yield "The new images may not be like those of before: look at those named under Drift."


def _about_silence(nights: Sequence[Mapping[str, Any]], made: str) -> Iterator[str]:
    """A schedule that no longer starts anything leaves no record; only the clock tells."""
    starts = [datetime.fromisoformat(night["started"]) for night in nights if night.get("started")]
    waits = [(after - before).total_seconds() for before, after in pairwise(starts)]
    usual = median(waits) if len(waits) >= 2 else 0.0
    if usual > 0 and (datetime.fromisoformat(made) - starts[-1]).total_seconds() > _OVERDUE * usual:
        yield f"Nothing has run since {starts[-1]:%Y-%m-%d %H:%M} UTC, longer than usual: see that the schedule still starts it."
