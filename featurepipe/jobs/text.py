"""What a run of a job did or would do, and what all runs did, as text: pure functions of their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featurepipe.progress import duration, spoken
from featurepipe.records import RUNNING
from featurepipe.tables import counted, size, table

_KINDS = ("new", "changed", "moved", "copied", "relabelled", "touched", "corrupted", "repaired", "new_rejected",
          "still_rejected", "unchanged")  # fmt: skip
_WARNINGS_SHOWN = 8
_WIDEST = 110
"""Characters of a step's line beyond which its text goes on below."""


def summary_text(record: Mapping[str, Any]) -> str:
    """One screen for the morning: how the run ended, what happened to the images, what each step did.

    Args:
        record: the run record of ``featurepipe run``.
    """
    took = spoken(record.get("seconds", {}).get("wall", 0.0))
    lines = [
        f"{record['job']}: {ending(record)}",
        f"{minute(record['started'])} to {minute(record['ended'])[-5:]} UTC, {took}, run {record['run_id']}",
        "",
        *image_lines(record),
        "",
        *step_lines(record["steps"]),
    ]
    warnings = record.get("warnings", [])
    lines += ["", *(f"warning: {text}" for text in warnings[:_WARNINGS_SHOWN])] if warnings else []
    if len(warnings) > _WARNINGS_SHOWN:
        lines.append(f"and {len(warnings) - _WARNINGS_SHOWN} more warnings, in the run record")
    return "\n".join(lines)


def runs_text(records: Sequence[Mapping[str, Any]]) -> str:
    """A table of runs, oldest first; runs that no job made have no job's name."""
    if not records:
        return "no runs yet"
    header = ["started (UTC)", "job", "dataset", "status", "exit", "listed", "computed", "rejected", "time", "run"]
    return table(header, [_row(record) for record in records])


def plan_text(plan: Mapping[str, Any]) -> str:
    """What ``featurepipe run --dry-run`` prints."""
    lines = [
        f"{plan['job']}: {counted(plan['listed'], 'image')} in {plan['source']}, dataset {plan['dataset']} of {plan['store']}"
    ]
    lines += [line for found in plan["features"] for line in _estimate(found)]
    if plan["cluster"]:
        lines.append(
            f"computed by a cluster ({plan['cluster']}), which is not asked now: times are those of this machine"
        )
    seconds = "an unknown time" if plan["seconds"] is None else f"about {spoken(plan['seconds'])}"
    lines.append(f"in all {seconds}, {size(plan['bytes'])}")
    words = {True: "yes", False: "no", None: "perhaps"}
    rows = [[step_name(step), words[step["runs"]], step["why"]] for step in plan["steps"]]
    lines += ["", table(["step", "runs", "why"], rows)] if rows else []
    return "\n".join([*lines, "dry run: nothing was changed"])


def ending(record: Mapping[str, Any]) -> str:
    """How a run ended; of one that has not, or of whose end nobody knows, how far that is known."""
    code, status = record.get("exit_code"), status_of(record)
    rejects = ", with images that could not be used" if code == 3 else ""
    failed = [step_name(entry) for entry in record.get("steps", ()) if entry["status"] == "failed"]
    why = f": {', '.join(failed)}" if failed else ""
    if code is None:
        return status
    return f"{status.upper() if status in ('failed', 'interrupted') else status}{rejects}{why} (exit code {code})"


def image_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """What happened to the images."""
    counts, changes = record.get("counts") or {}, record.get("changes") or {}
    kinds = [f"{changes[kind]:,} {kind.replace('_', ' ')}" for kind in _KINDS if changes.get(kind)]
    deleted = [f"{changes['deleted']:,} deleted"] if changes.get("deleted") else []
    yield f"{record.get('dataset') or '?'}: {counted(counts.get('listed', 0), 'image')} listed"
    if kinds or deleted:
        yield f"  {'; '.join([', '.join(kinds), *deleted] if kinds else deleted)}"
    yield "  " + ", ".join(f"{counts.get(name, 0):,} {name}" for name in ("computed", "known", "rejected"))
    for reject in record.get("new_rejects", ()):
        yield f"  rejected: {reject['id']}: {reject['reason']}"
    if counts.get("computed"):
        yield f"  {record.get('images_per_second') or 0:,.1f} img/s; {record.get('verdict', '')}"


def step_lines(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What became of each step."""
    names = list(map(step_name, steps))
    wide, widest = max(map(len, names), default=0), max((len(entry["status"]) for entry in steps), default=0)
    for name, entry in zip(names, steps, strict=True):
        start = f"{name.ljust(wide)}  {entry['status'].ljust(widest)}  {entry.get('seconds') or 0.0:8.1f} s"
        said = told(entry)
        if len(start) + len(said) + 2 > _WIDEST or "\n" in said:
            yield start
            yield "    " + said.replace("\n", "\n    ")
        else:
            yield f"{start}  {said}".rstrip()


def step_name(entry: Mapping[str, Any]) -> str:
    """Which step, and which of several: ``train logistic``."""
    return f"{entry['step']} {entry.get('name') or ''}".strip()


def told(entry: Mapping[str, Any]) -> str:
    """What a step has to say of itself."""
    result = entry.get("result") or {}
    for text in (entry.get("error"), result.get("skipped"), result.get("text"), result.get("why")):
        if text:
            return str(text)
    if "counts" in result:
        return ", ".join(f"{result['counts'].get(name, 0):,} {name}" for name in ("computed", "known", "rejected"))
    return counted(result["listed"], "image") if "listed" in result else ""


def _row(record: Mapping[str, Any]) -> list[object]:
    counts = record.get("counts", {})
    wall, code = record.get("seconds", {}).get("wall"), record.get("exit_code")
    warnings = len(record.get("warnings", ()))
    return [
        minute(record.get("started", "?")),
        record.get("job", "-"),
        record.get("dataset") or "?",
        f"{status_of(record)}, {counted(warnings, 'warning')}" if warnings else status_of(record),
        "-" if code is None else code,  # of a run that has not ended, or was killed
        *(counts.get(name, 0) for name in ("listed", "computed", "rejected")),
        "-" if wall is None else duration(wall),
        record["run_id"],
    ]


def status_of(record: Mapping[str, Any]) -> str:
    """How a run ended; of one that has not, whether it waits for its source."""
    status = str(record.get("status", "?"))
    return "waiting" if status == RUNNING and record.get("waiting") else status


def _estimate(found: Mapping[str, Any]) -> Iterator[str]:
    nodes = ", ".join(found["nodes"])
    seen = found["to_read"] - found["new"]
    lacking = f", {seen:,} of them seen before but without these columns" if seen else ""
    yield f"{found['backbone']} ({nodes}): {found['known']:,} known, {found['to_read']:,} to read{lacking}"
    if found["seconds"] is not None:
        yield f"  about {spoken(found['seconds'])}, {size(sum(found['bytes_per_column'].values()))}"


def minute(stamp: str) -> str:
    """A time without its seconds."""
    return stamp[:16].replace("T", " ")
