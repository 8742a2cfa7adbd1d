"""What a run of a job did or would do, what all runs did, and which images are rejected: records as text."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

import pyarrow.compute as pc
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from featurepipe.display import counted, dealt_with, first_names, size, table
from featurepipe.errors import TooManyRejects
from featurepipe.jobs.job import Job
from featurepipe.progress import duration, spoken
from featurepipe.records import RUNNING
from featurepipe.store import FeatureStore
from featurepipe.store.documents import PUBLISHING
from featurepipe.store.snapshots import OK

_KINDS = ("new", "changed", "moved", "copied", "relabelled", "touched", "corrupted", "repaired", "new_rejected",
          "still_rejected", "unchanged")  # fmt: skip
_WARNINGS_SHOWN = 8
_KEY_WIDTH = 100
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
    forgotten = record.get("forgotten")
    without = f", besides {counted(forgotten, 'forgotten image')} that stayed out" if forgotten else ""
    yield f"{record.get('dataset') or '?'}: {counted(counts.get('listed', 0), 'image')} listed{without}"
    if kinds or deleted:
        yield f"  {'; '.join([', '.join(kinds), *deleted] if kinds else deleted)}"
    yield f"  {dealt_with(counts, record.get('copies') or 0, _left(record))}"
    named = record.get("new_rejects", ())
    yield from (f"  rejected: {reject['id']}: {reject['reason']}" for reject in named)
    more = changes.get("new_rejected", 0) + changes.get("corrupted", 0) - len(named)
    if named and more > 0:
        yield f"  and {more:,} more: featurepipe runs STORE --rejects"
    if counts.get("computed"):
        yield f"  {record.get('images_per_second') or 0:,.1f} img/s; {record.get('verdict', '')}"


def _left(record: Mapping[str, Any]) -> int:
    """How many listed images a run came to no end with; of several feature spaces only their own counts tell."""
    counts, spaces = record.get("counts") or {}, record.get("counts_by_space") or {}
    if len(spaces) > 1 or "listed" not in counts:
        return 0
    return int(counts["listed"]) - sum(int(counts.get(name, 0)) for name in ("computed", "known", "rejected"))


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
        return dealt_with(result["counts"], result.get("copies") or 0)
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
    yield (
        f"{found['backbone']} ({nodes}): {found['known']:,} known, {found['to_read']:,} to read{lacking}, "
        f"{found['gone']:,} gone"
    )
    if found["seconds"] is not None:
        yield f"  about {spoken(found['seconds'])}, {size(sum(found['bytes_per_column'].values()))}"
    yield from (f"  warning: {warning}" for warning in found["warnings"])


def minute(stamp: str) -> str:
    """A time without its seconds."""
    return stamp[:16].replace("T", " ")


Reject = dict[str, Any]


def current_rejects(store: FeatureStore, dataset: str) -> list[Reject]:
    """The rejects of a dataset's last snapshot, and of a later run that left none, as it failed on them or was stopped.

    Args:
        store: the feature store.
        dataset: its name.

    Returns:
        JSON values, in the order of the snapshot: ``dataset``, ``id``, ``reason``, ``run``, the run that found these bytes
        unusable (a job's, where one did), and ``since``, when that began; both None where no record is left of it. If the
        last run left no snapshot, ``last_run`` has its ``run``, ``status`` and ``rejected``, how many it counted.
    """
    records = store.runs()
    last = max(store.snapshot_ids(dataset), default="")
    failed = _without_snapshot(records, dataset, last)
    rejected = _rejected(store, dataset, last)
    if failed is not None:
        rejected = _also_rejected(rejected, store, dataset, last, failed)
    found = _found_by(store, dataset) if rejected else {}
    runs = _whole_runs(records)
    told = {} if failed is None else {"last_run": _told_of(failed, runs)}
    return [
        {
            "dataset": dataset,
            "id": row["id"],
            "reason": row["reason"],
            **_since(found.get((row["id"], row["key"])), runs),
            **told,
        }
        for row in rejected
    ]


def datasets_taken(store: FeatureStore) -> list[str]:
    """The datasets of which there is a snapshot, or a run that left none."""
    runs = (str(record["dataset"]) for record in store.runs() if "fingerprint" in record and record.get("dataset"))
    return list(dict.fromkeys([*store.datasets(), *runs]))


def _rejected(store: FeatureStore, dataset: str, run_id: str) -> list[Reject]:
    """The rejects of a snapshot: ``id``, ``key``, ``reason``; none without one."""
    snapshot = store.snapshot(dataset, run_id, columns=("id", "key", "status", "reason")) if run_id else None
    return [] if snapshot is None else snapshot.filter(pc.not_equal(snapshot["status"], OK)).to_pylist()


def _without_snapshot(records: Sequence[Mapping[str, Any]], dataset: str, last: str) -> Mapping[str, Any] | None:
    """The dataset's last extraction, if it rejected images and left no snapshot."""
    taken = [run for run in records if run.get("dataset") == dataset and "fingerprint" in run]
    run = max(taken, key=lambda record: str(record["run_id"]), default=None)
    if run is None or run["run_id"] <= last or run.get("status") in ("done", PUBLISHING):
        return None
    return run if (run.get("counts") or {}).get("rejected") else None


def _also_rejected(
    before: Sequence[Reject], store: FeatureStore, dataset: str, last: str, run: Mapping[str, Any]
) -> list[Reject]:
    """The rejects that a run without a snapshot saw.

    Its record names the first; the store keeps each when it is found for the first time. So those of the last snapshot count,
    and all found since, unless the record names all that a whole run saw.
    """
    keys = {
        row["id"]: row
        for space in store.spaces()
        for row in space.rejects(dataset=dataset).select(["id", "key", "reason", "run_id"]).to_pylist()
    }
    named = [{"key": None, **keys.get(one["id"], {}), **one} for one in run.get("rejects") or ()]
    if run.get("exit_code") == TooManyRejects.exit_code and len(named) == run["counts"]["rejected"]:
        return named
    since = [row for row in keys.values() if row["run_id"] > last]
    return list({row["id"]: row for row in (*before, *since, *named)}.values())


def _told_of(run: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> Reject:
    whole = runs.get(run["run_id"], run)
    return {"run": whole["run_id"], "status": run.get("status"), "rejected": run["counts"]["rejected"]}


def _found_by(store: FeatureStore, dataset: str) -> dict[tuple[str, bytes | None], str]:
    """The extraction that found each reject first, in whatever feature space."""
    found: dict[tuple[str, bytes | None], str] = {}
    for space in store.spaces():
        for row in space.rejects(dataset=dataset, first=True).select(["id", "key", "run_id"]).to_pylist():
            place = (row["id"], row["key"])
            found[place] = min(row["run_id"], found.get(place, row["run_id"]))
    return found


def _whole_runs(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The record of each run by its id, for an extraction that was part of a job's run the record of that."""
    runs = {record["run_id"]: record for record in records}
    return runs | {part: record for record in records for part in record.get("extractions", ())}


def _since(run_id: str | None, runs: Mapping[str, Mapping[str, Any]]) -> Reject:
    run = runs.get(run_id or "", {})
    return {"run": run.get("run_id", run_id), "since": run.get("started")}


_REJECTS_SHOWN = 20
_SUFFIXES_SHOWN = 10
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
    parts.append(list(_passed_over([*extractions, record])))
    parts.append(list(_rejects([*extractions, record])))
    parts.append(list(_figures(record)))
    parts.append([f"warning: {text}" for text in record.get("warnings") or ()])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def rejects_text(rejects: Sequence[Mapping[str, Any]]) -> str:
    """What ``featurepipe runs STORE --rejects`` prints."""
    if not rejects:
        return "no image is rejected"
    several = len({reject["dataset"] for reject in rejects}) > 1
    failed = {reject["dataset"]: reject["last_run"] for reject in rejects if "last_run" in reject}
    header = ["since (UTC)", "run", *(["dataset"] if several else []), "image", "reason"]
    rows = [
        [minute(reject["since"] or "?"), reject["run"] or "?", *([reject["dataset"]] if several else []), reject["id"],
         reject["reason"]]
        for reject in rejects[:_LISTED]
    ]  # fmt: skip
    left = len(rejects) - _LISTED
    more = [f"and {left:,} more; all of them: --json"] if left > 0 else []
    return "\n".join([table(header, rows), *more, *(_of_failed(name, run, rejects) for name, run in failed.items())])


def _of_failed(dataset: str, run: Mapping[str, Any], rejects: Sequence[Mapping[str, Any]]) -> str:
    """Says which run the rejects are of that left no snapshot, and if it counted others than are named."""
    named, counted_ones = sum(reject["dataset"] == dataset for reject in rejects), run["rejected"]
    others = (
        ""
        if named == counted_ones
        else f"; it counted {counted_ones:,}, and of the {named:,} above some may be mended or gone, or were not reached"
    )
    return f"{dataset}: as of run {run['run']}, which ended {run['status']} and left no snapshot{others}"


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


def _passed_over(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the source holds beside images; the same in each extraction of a run."""
    listings = (record.get("listing") for record in records)
    found: Mapping[str, int] = next((one["passed_over"] for one in listings if one and one.get("passed_over")), {})
    if found:
        named = first_names([f"{suffix} {count:,}" for suffix, count in found.items()], _SUFFIXES_SHOWN)
        yield f"passed over: {counted(sum(found.values()), 'file')}: {named}"


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


def keys_text() -> str:
    """Every key that a job file may have, table by table, with its default and meaning."""
    lines = ["Paths are relative to the job file. [[...]] may be there several times, [...] once."]
    for title, keys in job_keys().items():
        lines += ["", title]
        for key, what, text in keys:
            lines += ["", *textwrap.wrap(f"{key}{what}", _KEY_WIDTH, initial_indent="  ", subsequent_indent="    ")]
            lines += textwrap.wrap(text, _KEY_WIDTH, initial_indent="      ", subsequent_indent="      ")
        if not keys:
            lines += ["", "  It has no keys."]
    return "\n".join(lines)


def job_keys() -> dict[str, list[tuple[str, str, str]]]:
    """Of each table of a job file its keys, those that must be given first.

    Returns:
        For each title, such as ``[source]``, keys with their defaults as a job file writes them, whether they must be given, and
        what they mean.
    """
    top = "Before the first table"
    found: dict[str, list[tuple[str, str, str]]] = {top: []}
    for name, field in Job.model_fields.items():
        table = next((kind for kind in _classes_in(field.annotation) if issubclass(kind, BaseModel)), None)
        if table is None:
            found[top].append(_key(name, field))
        else:
            title = f"[[{name}]]" if get_origin(field.annotation) is tuple else f"[{name}]"
            found[title] = [_key(*key) for key in sorted(table.model_fields.items(), key=_comes_later)]
    return found


def _classes_in(annotation: Any) -> Iterator[type]:
    """The classes that a type is made of, such as those of ``tuple[TrainTable, ...]``."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)


def _comes_later(key: tuple[str, FieldInfo]) -> bool:
    return not key[1].is_required()


def _key(name: str, field: FieldInfo) -> tuple[str, str, str]:
    """A key, with its default as a job file writes it; whether it must be given; its meaning, without the command's default."""
    text = field.description or ""
    if field.is_required():
        return name, "" if "by default" in text else " must be given", text
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return name, "", text
    return f"{name} = {json.dumps(value)}", "", re.sub(r" \(default: [^()]*\)", "", text)
