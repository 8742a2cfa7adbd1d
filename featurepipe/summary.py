"""What a store holds and what was done to it, as plain text: pure functions of ``describe`` and of the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featurepipe.display import counted, named_columns, size, table
from featurepipe.records import ACCEPTANCE

if TYPE_CHECKING:
    from featurepipe.store import CompactReport, GcReport, VerifyReport

LAST_RUNS = 5
_CLASSES_SHOWN = 6


def info_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe info`` prints of ``featurepipe.store.describe(store)``."""
    sections = [f"{found['path']} (store format {found['version']})"]
    sections += [_dataset_text(dataset) for dataset in found["datasets"]] or ["no dataset yet"]
    sections += [_space_text(space) for space in found["spaces"]]
    if found.get("forgotten"):
        sections.append(f"{counted(found['forgotten'], 'image')} forgotten: extractions leave them out")
    bottlenecks = {space["fingerprint"]: space["bottleneck"] for space in found["spaces"]}
    indexes = [_index_text(index, bottlenecks.get(index["fingerprint"])) for index in found.get("indexes", ())]
    sections += ["\n".join(indexes)] if indexes else []
    sections += _runs_text(whole_runs(found["runs"]))
    if found.get("set_aside"):
        sections.append("\n".join(f"set aside: {path}: {why}" for path, why in found["set_aside"].items()))
    return "\n\n".join(sections)


def _index_text(index: Mapping[str, Any], bottleneck: str | None) -> str:
    images = f"{counted(index['vectors'], 'image')} of {index['dataset']}"
    columns = named_columns(index["columns"], bottleneck)
    return f"index of {images} by {columns} ({index['distance']}), {size(index['bytes'])}"


def verify_text(report: VerifyReport) -> str:
    """What ``featurepipe verify`` prints."""
    lines = [f"{counted(report.parts, 'part')} checked, {counted(report.rows, 'row')}, {size(report.bytes)}"]
    for problem in report.problems:
        inside = "/".join(filter(None, (problem.space, problem.part, problem.dataset)))
        moved = f"; moved to {problem.quarantined}" if problem.quarantined else ""
        lines.append(f"problem: {inside}: {problem.what}{moved}")
    lines += [f"leftover, harmless: {name}" for name in report.leftovers]
    if any(problem.space for problem in report.problems):
        lines.append("run the same featurepipe extract again: it computes what is missing")
    elif not report.problems:
        lines.append("everything is as it was committed")
    if report.leftovers:
        lines.append("featurepipe gc STORE removes what dead writers left")
    return "\n".join(lines)


def compact_text(report: CompactReport, *, dry_run: bool = False) -> str:
    """What ``featurepipe compact`` prints."""
    merged = f"{counted(report.parts_before, 'part')} into {report.parts_after:,}"
    freed = f"{size(report.bytes_freed)} freed" if report.bytes_freed > 0 else "no space freed"
    lines = [f"{merged}, {counted(report.rows_dropped, 'duplicate row')} dropped, {freed}"]
    if report.parts_before == report.parts_after and not report.rows_dropped:
        lines = [
            f"nothing to do: {counted(report.parts_before, 'part')}, no duplicate rows, none small enough to merge"
        ]
    lines += [f"left alone, damaged: {name}; run: featurepipe verify STORE" for name in report.damaged]
    return "\n".join([*lines, *_dry(dry_run=dry_run)])


def export_text(told: Mapping[str, Any]) -> str:
    """What ``featurepipe export`` prints of ``featurepipe.store.export_dataset``."""
    files = f" in {counted(told['files'], 'file')}" if told["files"] != 1 else ""
    of = named_columns(told["column"].split("+"), told["bottleneck"])
    lines = [
        f"{told['file']}: {told['rows']:,} x {told['width']:,} {told['dtype']} of {of}, {size(told['bytes'])}{files}"
    ]
    if "since" in told:
        changes = ", ".join(f"{told[name]:,} {name}" for name in ("new", "changed", "relabelled"))
        lines.append(f"since {told['since']}: {changes}; {told['deleted']:,} deleted, listed in {told['deleted_file']}")
    return "\n".join(lines)


def gc_text(report: GcReport, *, dry_run: bool = False) -> str:
    """What ``featurepipe gc`` prints."""
    counts = {
        "row that no snapshot needs": report.rows_dropped,
        "old snapshot": report.snapshots_removed,
        "leftover file": report.leftovers_removed,
        "quarantined part": report.quarantined_removed,
        "index that no snapshot needs": report.indexes_removed,
    }
    removed = [counted(number, noun) for noun, number in counts.items() if number]
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb} {', '.join(removed)}: {size(report.bytes_freed)}" if removed else "nothing to remove"]
    if report.rows_unfinished:
        lines.append(f"kept {counted(report.rows_unfinished, 'row')} of runs that have not finished, for the next run")
    return "\n".join([*lines, *_dry(dry_run=dry_run)])


def whole_runs(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Run records without those of extractions that were part of a job's run, which that run's record counts; runs alone."""
    parts = {run_id for record in records for run_id in record.get("extractions", ())}
    return [one for one in records if one.get("run_id") not in parts and one.get("command") != ACCEPTANCE]


def _dry(*, dry_run: bool) -> list[str]:
    return ["dry run: nothing was changed"] if dry_run else []


def _dataset_text(dataset: Mapping[str, Any]) -> str:
    title = f"dataset {dataset['name']}"
    if not dataset["snapshots"]:
        return f"{title}: no snapshot"
    lines = [f"{title}: {counted(dataset['images'], 'image')}, {counted(dataset['snapshots'], 'snapshot')}"]
    copies = dataset["images"] - dataset["distinct"]
    if copies:
        copy = (
            "is a copy of another, and shares its feature"
            if copies == 1
            else "are copies of others, and share a feature"
        )
        lines.append(f"  {copies:,} of them {copy}")
    if dataset["rejects"]:
        lines.append(f"  {dataset['rejects']:,} more could not be used")
    if dataset.get("columns"):
        lines.append(
            f"  columns  {', '.join(dataset['columns'])} (of the manifest; roles such as --label and --group name them)"
        )
    if dataset["splits"]:
        lines.append("  splits   " + ", ".join(f"{name} {count:,}" for name, count in dataset["splits"].items()))
    if dataset["labels"]:
        lines.append(f"  classes  {len(dataset['labels']):,}: {_classes(dataset['labels'])}")
    return "\n".join(lines)


def _classes(counts: Mapping[str, int]) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:_CLASSES_SHOWN]]
    return ", ".join([*shown, "..."] if len(counts) > _CLASSES_SHOWN else shown)


def _space_text(space: Mapping[str, Any]) -> str:
    fields = space["fields"]
    lines = [
        f"feature space {space['name']}{' of mirrored images' if fields.get('mirrored') else ''}",
        f"  precision {fields.get('precision', '?')}, stored as {fields.get('dtype', '?')}, "
        f"{counted(space['parts'], 'part')}, {counted(space['rows'], 'row')}, {size(space['bytes'])}",
    ]
    lines += _weights(space["notes"].get("backbone", {}))
    if space["damaged"]:
        lines.append(f"  {counted(len(space['damaged']), 'damaged part')}; run: featurepipe verify STORE")
    if space["quarantined"]:
        parts = counted(len(space["quarantined"]), "damaged part")
        lines.append(f"  {parts} in quarantine; run the same featurepipe extract again, then featurepipe gc STORE")
    aliases = {node: alias for alias, node in space["notes"].get("aliases", {}).items()}
    rows = [
        [
            name,
            aliases.get(name.partition(":")[0], "-"),
            info["width"],
            info["dtype"],
            info["rows"],
            size(info["bytes"]),
        ]
        for name, info in space["columns"].items()
    ]
    columns = table(["column", "alias", "width", "dtype", "rows", "size"], rows)
    return "\n".join([*lines, *(f"  {line}" for line in columns.splitlines())])


def _weights(backbone: Mapping[str, Any]) -> list[str]:
    if backbone.get("random"):
        return [f"  a random control network, not a trained one: weights {backbone.get('weights', '?')}"]
    return [f"  weights {backbone['weights']}"] if "weights" in backbone else []


def _runs_text(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not runs:
        return []
    rows = [
        [_time(run.get("ended", "?")), run.get("dataset", "?"), run.get("status", "?"), *_counts(run)]
        for run in runs[-LAST_RUNS:]
    ]
    older = f", the last {LAST_RUNS}" if len(runs) > LAST_RUNS else ""
    columns = table(["ended", "dataset", "status", "listed", "computed", "known", "rejected"], rows)
    return [f"{counted(len(runs), 'run')}{older}\n" + "\n".join(f"  {line}" for line in columns.splitlines())]


def _time(stamp: str) -> str:
    return stamp.replace("T", " ").replace("+00:00", " UTC")


def _counts(run: Mapping[str, Any]) -> list[int]:
    counts = run.get("counts", {})
    return [counts.get(name, 0) for name in ("listed", "computed", "known", "rejected")]
