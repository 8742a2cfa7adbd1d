"""One run as a screen: all that its record says; and the images that cannot be used, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featurepipe.jobs.text import ending, image_lines, minute, step_lines
from featurepipe.progress import spoken
from featurepipe.tables import counted, size, table

_REJECTS_SHOWN = 20
_LISTED = 100
"""Rejects of a table; all are in its JSON form."""


def details_text(record: Mapping[str, Any], extractions: Sequence[Mapping[str, Any]] = ()) -> str:
    """What ``featurepipe runs STORE RUN-ID`` prints.

    Args:
        record: of a job's run, or of an extraction by hand; it may be running still, or have been killed.
        extractions: the records of the run's extractions that are there, which name its rejects.
    """
    parts = [list(_head(record)), list(_plan(record.get("plan") or {})), list(image_lines(record))]
    parts.append(list(step_lines(record.get("steps") or ())))
    parts.append(list(_rejects([*extractions, record])))
    parts.append(list(_figures(record)))
    parts.append([f"warning: {text}" for text in record.get("warnings") or ()])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def rejects_text(rejects: Sequence[Mapping[str, Any]]) -> str:
    """What ``featurepipe runs STORE --rejects`` prints."""
    if not rejects:
        return "no image is rejected"
    several = len({reject["dataset"] for reject in rejects}) > 1
    header = ["since (UTC)", "run", *(["dataset"] if several else []), "image", "reason"]
    rows = [
        [minute(reject["since"] or "?"), reject["run"] or "?", *([reject["dataset"]] if several else []), reject["id"],
         reject["reason"]]
        for reject in rejects[:_LISTED]
    ]  # fmt: skip
    left = len(rejects) - _LISTED
    more = [f"and {left:,} more; all of them: --json"] if left > 0 else []
    return "\n".join([table(header, rows), *more])


def _head(record: Mapping[str, Any]) -> Iterator[str]:
    what = record.get("job") or f"{record.get('command', 'run')} by hand"
    yield f"{what}: {ending(record)}"
    wall, ended = (record.get("seconds") or {}).get("wall"), record.get("ended")
    until = f" to {minute(ended)[-5:]}" if ended else ""
    took = "" if wall is None else f", {spoken(wall)}"
    yield f"{minute(record.get('started', '?'))}{until} UTC{took}, run {record['run_id']}"
    if record.get("waiting"):
        yield f"waiting since {minute(record['waiting']['since'])} UTC: {record['waiting']['why']}"
    if record.get("error"):
        yield str(record["error"])
    host, git = record.get("host") or {}, record.get("git")
    yield f"on {host.get('name', '?')}, pid {host.get('pid', '?')}" + (f", git {git}" if git else "")
    yield from (
        f"{name.replace('_', ' ')}: {record[name]}" for name in ("job_file", "source", "space") if record.get(name)
    )


def _plan(plan: Mapping[str, Any]) -> Iterator[str]:
    for features in plan.get("features", ()):
        yield f"features: {features['backbone']}, weights {features['weights']}: {', '.join(features['nodes'])}"
    limits = {name: value for name, value in plan.get("limits", {}).items() if value is not None}
    if limits:
        yield f"limits: {', '.join(f'{name} {value}' for name, value in limits.items())}"
    if plan:
        yield f"steps: {', '.join(plan.get('steps', ())) or 'none'}"


def _rejects(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = {reject["id"]: reject["reason"] for record in records for reject in record.get("rejects") or ()}
    count = max([int((record.get("counts") or {}).get("rejected", 0)) for record in records] + [len(found)])
    if not count:
        return
    yield f"rejected: {counted(count, 'image')}"
    yield from (f"  {name}: {reason}" for name, reason in list(found.items())[:_REJECTS_SHOWN])
    if count > min(len(found), _REJECTS_SHOWN):
        yield "  all that are rejected now: featurepipe runs STORE --rejects"


def _figures(record: Mapping[str, Any]) -> Iterator[str]:
    seconds = {name: value for name, value in (record.get("seconds") or {}).items() if value}
    if seconds:
        yield f"seconds: {', '.join(f'{name} {value:,.1f}' for name, value in seconds.items())}"
    if record.get("store_bytes") is not None:
        yield f"store: {size(record['store_bytes'])}; free on its disk: {size(record.get('free_bytes') or 0)}"
    if record.get("versions"):
        yield f"versions: {', '.join(f'{name} {value}' for name, value in record['versions'].items())}"
