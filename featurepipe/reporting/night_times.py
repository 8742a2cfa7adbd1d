"""Where the time of the nights went: strips of whole nights, of their steps, and of the stages of extraction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from featurepipe.reporting.blocks import Block, finite
from featurepipe.reporting.night_charts import Figure, figures, rate, seconds, stored, strip_exhibit
from featurepipe.reporting.night_outcomes import Night
from featurepipe.reporting.palette import Paint

_STAGES = {
    "scan": "listing the source",
    "read": "reading (all threads)",
    "decode": "decoding (all threads)",
    "waiting": "waiting for images",
    "forward": "the network",
    "write": "writing",
}


def time_exhibits(nights: Sequence[Night], paint: Paint) -> Iterator[Block]:
    """Time, speed and space of every night.

    Steps that the last night had still before it when it wrote the page are left out of all: else it would look shorter.
    """
    later = list(nights[-1].get("to_come") or ())
    less = f"less {' and '.join(later)}" if later else ""
    speed = [
        Figure(f"whole night{', ' * bool(less)}{less}", [_whole(night, later) for night in nights], seconds),
        Figure("speed", [finite(night.get("images_per_second")) for night in nights], rate),
        Figure("store", [finite(night.get("store_bytes")) for night in nights], stored),
    ]
    known = [figure for figure in speed if any(figure.known)]
    if known:
        yield strip_exhibit("Whole nights", "How long nights took, and how fast they computed.", nights, known, paint)
    kinds = dict.fromkeys(kind for night in nights for kind in _steps(night) if kind not in later)
    steps = figures(nights, "seconds.steps", {kind: kind for kind in kinds}, seconds)
    alike = (
        f"{less.capitalize()} on all nights, as the last one had not come to that when it wrote this page."
        if less
        else ""
    )
    yield from _parts("Time of each step", "Where the nights' time went.", nights, steps, paint, alike)
    stages = figures(nights, "seconds.stages", _STAGES, seconds)
    words = "What extraction spent its time on: reading and decoding are summed over threads."
    yield from _parts("Stages of extraction", words, nights, stages, paint)


def _whole(night: Night, later: Sequence[str]) -> float | None:
    wall = finite((night.get("seconds") or {}).get("wall"))
    return None if wall is None else wall - sum(_steps(night).get(kind, 0.0) for kind in later)


def _steps(night: Night) -> dict[str, float]:
    return (night.get("seconds") or {}).get("steps") or {}


def _parts(
    title: str, words: str, nights: Sequence[Night], found: Sequence[Figure], paint: Paint, note: str = ""
) -> Iterator[Block]:
    """Strips of what took a second on some night; the rest is named."""
    long = [figure for figure in found if max(figure.known) >= 1.0]
    short = [figure.name for figure in found if figure not in long]
    if long:
        never = f"Never as long as a second: {', '.join(short)}." if short else ""
        yield strip_exhibit(title, words, nights, long, paint, f"{never} {note}".strip())
