"""The sections of the page of the last runs: is all well, and if not, what to do; then every figure over nights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from featurepipe.reporting.blocks import (
    DASH,
    Block,
    Facts,
    Figures,
    Paint,
    Prose,
    Section,
    Steps,
    Table,
    TableCell,
    amount,
    count,
    finite,
)
from featurepipe.reporting.night_charts import (
    STARTED,
    Figure,
    class_trend,
    drift_trend,
    figures,
    night_name,
    rate,
    seconds,
    stored,
    strip_exhibit,
)
from featurepipe.reporting.night_outcomes import Night, ending, is_good, signed

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

    Steps that the last run had still before it when it wrote the page are left out of all: else it would look shorter.
    """
    later = list(nights[-1].get("to_come") or ())
    less = f"less {' and '.join(later)}" if later else ""
    speed = [
        Figure(f"whole run{', ' * bool(less)}{less}", [_whole(night, later) for night in nights], seconds),
        Figure("speed", [finite(night.get("images_per_second")) for night in nights], rate),
        Figure("store", [finite(night.get("store_bytes")) for night in nights], stored),
    ]
    known = [figure for figure in speed if any(figure.known)]
    if known:
        yield strip_exhibit("Whole runs", "How long runs took, and how fast they computed.", nights, known, paint)
    kinds = dict.fromkeys(kind for night in nights for kind in _step_seconds(night) if kind not in later)
    steps = figures(nights, "seconds.steps", {kind: kind for kind in kinds}, seconds)
    alike = (
        f"{less.capitalize()} in all runs, as the last one had not come to that when it wrote this page."
        if less
        else ""
    )
    yield from _parts("Time of each step", "Where the runs' time went.", nights, steps, paint, alike)
    stages = figures(nights, "seconds.stages", _STAGES, seconds)
    words = "What extraction spent its time on: reading and decoding are summed over threads."
    yield from _parts("Stages of extraction", words, nights, stages, paint)


def _whole(night: Night, later: Sequence[str]) -> float | None:
    wall = finite((night.get("seconds") or {}).get("wall"))
    return None if wall is None else wall - sum(_step_seconds(night).get(kind, 0.0) for kind in later)


def _step_seconds(night: Night) -> dict[str, float]:
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


Document = Mapping[str, Any]

_OUTCOMES = {"computed": "computed", "rejected": "rejected", "known": "known already", "listed": "listed"}
_CHANGES = {
    "new": "new",
    "changed": "changed",
    "deleted": "deleted",
    "moved": "moved",
    "copied": "copied",
    "relabelled": "newly labelled",
    "touched": "touched",
    "corrupted": "corrupted",
    "repaired": "repaired",
    "new_rejected": "new, but unusable",
    "still_rejected": "still unusable",
}
_NIGHTS_NAMED, _REJECTS_NAMED = 7, 3
_ALL_WELL = "Nothing to do."


def nights_title(document: Document) -> str:
    """What the page is about."""
    nights = document.get("nights") or []
    span = "the last run" if len(nights) == 1 else f"the last {len(nights)} runs"
    name = document.get("name", "the job")
    return f"What {name} did in {span}" if document.get("is_job", True) else f"What became of {name} in {span}"


def night_sections(document: Document, paint: Paint) -> list[Section]:
    """What the document has, what matters in the morning first."""
    nights = document.get("nights") or []
    if not nights:
        return []
    parts: list[tuple[str, str, Iterable[Block | None]]] = [
        ("answer", "Last run", _answer(document, nights)),
        ("steps", "Steps of the last run", (_steps(nights[-1]),)),
        ("status", "All runs", (_status(nights),)),
        ("images", "Images", _images(nights, paint)),
        ("rejects", "Rejects", _rejects(nights)),
        ("speed", "Time and space", time_exhibits(nights, paint)),
        ("drift", "Drift", (drift_trend(nights, paint),)),
        ("classes", "Predicted classes", [class_trend(nights, bundle, paint) for bundle in _bundles(nights)]),
        ("software", "What changed besides", (_software(nights),)),
        ("provenance", "Where this comes from", _origin(document)),
    ]
    sections = [Section(anchor, title, [block for block in blocks if block]) for anchor, title, blocks in parts]
    return [section for section in sections if section.blocks]


def _answer(document: Document, nights: Sequence[Night]) -> list[Block | None]:
    night = nights[-1]
    counts, changes = night.get("counts") or {}, night.get("changes") or {}
    wall = finite((night.get("seconds") or {}).get("wall"))
    sentence = f"The run of {night_name(night)} UTC {ending(night, '' if wall is None else seconds(wall))}."
    well = sum(map(is_good, nights))
    before = f"{well} of the last {len(nights)} runs did all that they were to do." if len(nights) > 1 else ""
    drift = night.get("drift") or {}
    items = (
        (
            "Images",
            count(counts.get("listed")),
            f"{count(changes.get('new'))} new, {count(changes.get('deleted'))} gone",
        ),
        (
            "Computed",
            count(counts.get("computed")),
            rate(night.get("images_per_second")) if counts.get("computed") else "",
        ),
        ("Rejected", count(counts.get("rejected")), ""),
        ("Last success", *_day(document.get("last_success"))),
        *((("Drift", str(drift["verdict"]), ""),) if drift else ()),
        *((("Store", amount(night["store_bytes"]), ""),) if finite(night.get("store_bytes")) else ()),
    )
    return [
        Prose((f"{sentence} {before}".strip(),)),
        Figures(items),
        Steps("What to do now", tuple(document.get("next_steps") or (_ALL_WELL,))),
        Prose(tuple(night.get("reasons") or ())) if night.get("reasons") else None,
        Prose(tuple(f"Warning: {text}." for text in night["warnings"])) if night.get("warnings") else None,
        Prose((f"This store has runs of {', '.join(document['others'])} as well; --job NAME shows them.",))
        if document.get("others")
        else None,
    ]


def _day(moment: Any) -> tuple[str, str]:
    """A day, and the moment itself."""
    if not moment:
        return "never", ""
    return f"{datetime.fromisoformat(moment):%b %d}", f"{str(moment)[:16].replace('T', ' ')} UTC"


def _steps(night: Night) -> Table | None:
    rows = tuple(
        (
            TableCell(str(step["step"])),
            TableCell(signed(str(step.get("status")), step.get("warnings") or ())),
            TableCell(str(step.get("told") or DASH)),
            TableCell(seconds(step.get("seconds")), finite(step.get("seconds"))),
        )
        for step in night.get("steps") or ()
    )
    return (
        Table(
            "Steps of the last run, in their order",
            ("Step", "How it ended", "What it did", "Time"),
            rows,
            sortable=False,
        )
        if rows
        else None
    )


def _status(nights: Sequence[Night]) -> Table:
    rows = tuple(
        (
            TableCell(night_name(night), place),
            TableCell(
                signed(str(night.get("status")), night.get("warnings") or ()),
                note=" ".join(night.get("reasons") or night.get("warnings") or ()),
            ),
            *(_counted(night, name) for name in ("computed", "rejected", "listed")),
            TableCell(
                seconds((night.get("seconds") or {}).get("wall")), finite((night.get("seconds") or {}).get("wall"))
            ),
            TableCell(str(night["run_id"])),
        )
        for place, night in reversed(list(enumerate(nights)))
    )
    header = (STARTED, "How it ended", "Computed", "Rejected", "Listed", "Time", "Run")
    return Table("All runs, newest first", header, rows, unbroken=True)


def _counted(night: Night, name: str) -> TableCell:
    value = (night.get("counts") or {}).get(name)
    return TableCell(count(value), finite(value))


def _images(nights: Sequence[Night], paint: Paint) -> Iterator[Block]:
    outcomes = figures(nights, "counts", _OUTCOMES)
    changes = figures(nights, "changes", _CHANGES)
    if outcomes:
        words = "How many images each run computed, rejected, knew already and listed. A bar is a run; scales differ."
        yield strip_exhibit("Outcomes", words, nights, outcomes, paint)
    if changes:
        never = [name for name in _CHANGES.values() if name not in {figure.name for figure in changes}]
        none = f"In no run: {', '.join(never)}." if never else ""
        words = "What happened to images since the snapshot before, each image counted once."
        yield strip_exhibit("Changes", words, nights, changes, paint, note=none)


def _rejects(nights: Sequence[Night]) -> Iterator[Block]:
    last = nights[-1]
    kinds = dict.fromkeys(code for night in nights for code in night.get("reject_reasons") or {})
    rows = []
    for kind in kinds:
        found = [(night.get("reject_reasons") or {}).get(kind, 0) for night in nights]
        rows.append((TableCell(str(kind)), *(TableCell(count(n), float(n)) for n in (found[-1], max(found)))))
    if rows:
        yield Table("Kinds of reasons", ("Reason", "Last run", "Most in a run"), tuple(rows))
    named = tuple((TableCell(str(one["id"])), TableCell(str(one["reason"]))) for one in last.get("rejects") or ())
    total = (last.get("counts") or {}).get("rejected")
    if named:
        yield Table(
            f"Images of the last run that were rejected, {len(named)} of {count(total)}",
            ("Image", "Reason"),
            named,
        )
    yield from _earlier_rejects(nights)


def _earlier_rejects(nights: Sequence[Night]) -> Iterator[Table]:
    """The first few images of the nights before, each at the last run that names it."""
    told = {(one["id"], one["reason"]) for one in nights[-1].get("rejects") or ()}
    rows = []
    for night in reversed(nights[-1 - _NIGHTS_NAMED : -1]):
        found = {(one["id"], one["reason"]): None for one in night.get("rejects") or ()}
        fresh = [one for one in found if one not in told]
        told.update(fresh)
        rows += [
            (TableCell(night_name(night)), TableCell(str(id_)), TableCell(str(reason)))
            for id_, reason in fresh[:_REJECTS_NAMED]
        ]
    if rows:
        caption = f"Others of earlier runs, the first {_REJECTS_NAMED} of each"
        yield Table(caption, ("Last run that names it (UTC)", "Image", "Reason"), tuple(rows), sortable=False)


def _bundles(nights: Sequence[Night]) -> list[str]:
    return list(dict.fromkeys(bundle for night in nights for bundle in night.get("classes") or {}))


def _software(nights: Sequence[Night]) -> Table | None:
    """Versions, machine and commit, where a night had others than the one before it."""
    rows = [
        (
            TableCell(night_name(night)),
            TableCell(what),
            TableCell(str(old.get(what) or DASH)),
            TableCell(str(new.get(what) or DASH)),
        )
        for before, night in pairwise(nights)
        for old, new in [(_surroundings(before), _surroundings(night))]
        for what in sorted({*old, *new})
        if old.get(what) != new.get(what)
    ]
    header = (STARTED, "What", "Before", "From then on")
    return Table("Software, machine and job file", header, tuple(rows), sortable=False) if rows else None


def _surroundings(night: Night) -> dict[str, Any]:
    machine = night.get("host") or {}
    return {
        **(night.get("versions") or {}),
        "machine": machine.get("name"),
        "cpus": machine.get("cpus"),
        "git": night.get("git"),
    }


def _origin(document: Document) -> list[Block | None]:
    origin = dict(document.get("provenance") or {})
    facts = {
        "Plan of the last run": origin.pop("plan", None),
        "Software of the last run": origin.pop("versions", None),
    }
    return [Facts("Provenance", origin), *(Facts(title, values) for title, values in facts.items() if values)]
