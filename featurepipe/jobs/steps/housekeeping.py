"""What is done with what a store holds: images forgotten, features handed on, compaction, retention, a page and figures of it."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from featurepipe.display import counted, first_names, size
from featurepipe.errors import StoreError, StoreLocked, UsageError
from featurepipe.jobs.job import CompactTable, ExportTable, ForgetTable, KeepTable, MetricsTable, ReportTable
from featurepipe.jobs.step import Night, is_of_new, within_time
from featurepipe.jobs.steps.heads import snapshot_of
from featurepipe.jobs.steps.history import LastSnapshot, last_snapshot, needed, telling_runs
from featurepipe.option_groups import declared
from featurepipe.records import is_success
from featurepipe.store import FeatureStore
from featurepipe.store.compact import compact_store
from featurepipe.store.exports import export_dataset
from featurepipe.store.gc import gc_store, remove_runs
from featurepipe.store.options import HandingOnOptions, RoleOptions, is_file_of_groups
from featurepipe.store.roles import with_roles

_AT_ONCE = 65_536
_WARNED = 10
"""Dependents that warnings name; the record has all."""
_NAMES = frozenset({"unknown_ids", "several_ids", "unsearched"})
"""What would name forgotten images in the record."""


def forget(night: Night, table: ForgetTable) -> dict[str, Any]:
    """Lets the images of a list leave the store, and be refused, before this run extracts anything.

    Ids that were forgotten before are none to do. Those that the store does not know are refused from now on: only the log names
    them, since the record stays. What a killed run began is finished first, whatever the list says by then.
    """
    from featurepipe.curation.forget import StandingList, forget_listed
    from featurepipe.store.forget import is_unfinished

    listed = StandingList.read(table.ids, night.store, night.dataset)
    name = table.ids.name
    if listed.blanks:
        night.say(f"{counted(listed.blanks, 'id')} in {name} had blanks around, which were left out")
    if not listed.fresh and not is_unfinished(night.store):
        return {**listed.told(), "skipped": _nothing_new(listed.told(), name)}

    def work() -> dict[str, Any]:
        found = forget_listed(
            listed, night.store, at_most=table.at_most, look_in=table.look_in or (), silent=night.silent
        )
        if found["unknown"]:
            night.say(f"not in dataset {night.dataset}: {first_names(found['unknown_ids'], len(found['unknown_ids']))}")
        told = {key: value for key, value in found.items() if key not in _NAMES}
        told |= {"dependents": _with_writers(night, found["dependents"])}
        told |= {
            "text": _text_of_forget(told, name),
            "warnings": [*_warnings_of_forget(told, name), *_elsewhere(night, table, told)],
        }
        if told["left"]:
            raise StoreError(
                f"still there, in files that are not the store's own: {'; '.join(told['left'])}; remove them",
                record=told,
            )
        return told

    return within_time(night.stop.deadline, work, "the next run finishes what was begun")


def outlook_of_forget(table: ForgetTable, store: FeatureStore | None, dataset: str) -> tuple[bool, str]:
    """Whether a run would let images leave the store now, and how many; takes no lock and changes nothing.

    Raises:
        UsageError: The list is not there or cannot be read.
    """
    from featurepipe.curation.forget import StandingList, would_forget

    found, name = would_forget(StandingList.read(table.ids, store, dataset), store), table.ids.name
    if found["known"] > table.at_most:
        held = counted(found["known"], "image")
        return (
            False,
            f"fails: {name} names {held} that the store holds, more than at_most = {table.at_most}; none would go",
        )
    first = "finishes what a killed run began; " if found["unfinished"] else ""
    if not found["known"] and not found["unknown"]:
        return found["unfinished"], f"{first}{_nothing_new(found, name)}"
    goes = (
        f"removes {counted(found['known'], 'image')}, of earlier snapshots too"
        if found["known"]
        else "removes no image"
    )
    there = ", ".join(f"{name} ({count:,})" for name, count in found["elsewhere"].items())
    stay = f"; other datasets of the store have ids of the list, which stay there: {there}" if there else ""
    return True, f"{first}{goes}{_others(found, name)}{stay}"


def _nothing_new(found: Mapping[str, Any], name: str) -> str:
    return (
        f"{counted(found['listed'], 'id')} in {name}, all forgotten before"
        if found["listed"]
        else f"{name} names no image"
    )


def _others(found: Mapping[str, Any], name: str) -> str:
    """How many ids of a list are of no image that the store holds."""
    kinds = {
        "forgotten before": found["forgotten_before"],
        "nowhere in the store, and refused from now on": found["unknown"],
    }
    others = ", ".join(f"{count:,} {what}" for what, count in kinds.items() if count)
    return f"; of the {counted(found['listed'], 'id')} in {name}: {others}" if others else ""


def _text_of_forget(found: Mapping[str, Any], name: str) -> str:
    done = [f"finished what a killed run began: {counted(found['finished'], 'image')}"] if found["finished"] else []
    done += [f"{counted(found['known'], 'image')} forgotten"] if found["known"] else []
    if not done:
        return f"no image forgotten{_others(found, name)}"
    rows = f"{counted(found['rows_dropped'], 'row')} removed, {counted(found['snapshots_rewritten'], 'snapshot')} rewritten"
    anew = sum(1 for one in found["dependents"] if one["written_by"])
    kinds = {"to look at": len(found["dependents"]) - anew, "that this run writes anew": anew}
    depend = ", ".join(f"{count:,} {what}" for what, count in kinds.items() if count) or "nothing that is known"
    return f"{'; '.join(done)}, {rows}{_others(found, name)}; depends on them: {depend}"


def _warnings_of_forget(found: Mapping[str, Any], name: str) -> Iterator[str]:
    if found["unknown"]:
        yield (
            f"{counted(found['unknown'], 'id')} in {name} not in dataset {found['dataset']}: refused from now on; the log of "
            "this run names them"
        )
    depend = [one for one in found["dependents"] if not one["written_by"]]
    yield from (f"depends on forgotten images: {one['kind']} {one['path']}: {one['why']}" for one in depend[:_WARNED])
    if len(depend) > _WARNED:
        yield f"{len(depend) - _WARNED:,} more depend on forgotten images: see dependents in the run record"
    yield from (f"cannot tell whether {one['path']} depends on them: {one['why']}" for one in found["unread"][:_WARNED])
    if found["kept_keys"]:
        others = [f"{place['id']} (dataset {place['dataset']})" for place in found["kept_for"]]
        bytes_of = counted(found["kept_keys"], "forgotten image")
        yield f"the bytes of {bytes_of} are those of other ids as well, for which the features stay: {first_names(others, 5)}"
    if found["linked"]:
        yield f"{counted(found['linked'], 'part')} had another name (a hard link), perhaps in a backup: remove it"


def _elsewhere(night: Night, table: ForgetTable, found: Mapping[str, Any]) -> Iterator[str]:
    """What other datasets have of the ids: perhaps the same people's images, perhaps those of another job by the same name."""
    for dataset, count in found["elsewhere"].items():
        words = [
            "featurepipe",
            "forget",
            str(night.store.path),
            "--ids",
            str(table.ids),
            "--dataset",
            dataset,
            "--dry-run",
        ]
        yield (
            f"dataset {dataset} of the store has {count:,} of the ids in {table.ids.name}, which stay there, since this job "
            f"is of dataset {night.dataset}; see what would go: {shlex.join(words)}"
        )


def _with_writers(night: Night, dependents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What depends on images, each with the key of the job file by which this run writes it anew; empty if none does."""
    perhaps = {f"{key}.to" for key, table in night.job.questions.items() if is_of_new(table)}
    answers = {f"{key}.to": night.place(table) for key, table in night.job.answers.items()}
    targets = {**dict(night.job.targets), **answers}
    written = {str(target.resolve()): key for key, target in targets.items() if key not in perhaps}
    return [{**one, "written_by": written.get(str(Path(one["path"]).resolve()), "")} for one in dependents]


def export(night: Night, table: ExportTable) -> dict[str, Any]:
    """Hands features on: of all images, or of those that are new or changed since the table last did, with the ids that went.

    If it never did, or that snapshot is not kept any more, all images are new. If a file of labels or groups of its own says
    something else of the images that it handed on, which a checksum tells, all images are handed on again.
    """
    snapshot = snapshot_of(night, table.backbone)
    about: dict[str, Any] = {"node": table.node, "to": table.to, "snapshot": snapshot}
    last = (
        last_snapshot(night, "export", places={"to": table.to}, made="handed on", node=table.node)
        if table.images == "new"
        else LastSnapshot(None)
    )
    since = last.snapshot
    given = _given_labels(table) if table.images == "new" else None
    changed = since is not None and _labels_changed(night, table, since, given, last.result.get("checksums") or {})
    if given is not None:
        about["checksums"] = {"given": given, "images": _labels_digest(night, table, snapshot)}
    if since is not None and not changed and _is_same(night, since, snapshot):
        return {**about, "skipped": "no image is new, changed or gone"}
    place = night.place(table)
    place.parent.mkdir(parents=True, exist_ok=True)
    found = export_dataset(
        night.store, table.node, place, dataset=night.dataset, snapshot=snapshot, since=since, backbone=table.backbone,
        labels_changed=changed, labels=table.labels, silent=night.silent,
        **{name: getattr(table, name) for name in declared(HandingOnOptions)},
    )  # fmt: skip
    gone = f", {found['deleted']:,} gone" if since is not None else ""
    again = ", all again: labels changed" if changed else ""
    text = f"{counted(found['rows'], 'image')}{gone}{again}, in {night.job.named(place)}"
    return {**found, **about, "text": text, "warnings": [*last.warnings]}


def _given_labels(table: ExportTable) -> str | None:
    """A checksum of the files of labels and groups that a table has of its own, and of which columns are what; None for none."""
    groups = Path(table.group) if table.group is not None and is_file_of_groups(table.group) else None
    files = [file for file in (table.labels, groups) if file is not None]
    if not files:
        return None
    try:
        contents = [Path(file).read_bytes() for file in files]
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
    roles = json.dumps(RoleOptions.of(table).arguments(), sort_keys=True, default=str)
    return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in (roles.encode(), *contents))).hexdigest()


def _labels_changed(night: Night, table: ExportTable, since: str, given: str | None, before: Mapping[str, str]) -> bool:
    """Whether labels or groups of files say something else of a snapshot's images than when a table handed these on."""
    if given == before.get("given"):
        return False
    if given is None or not before:
        return True
    return _labels_digest(night, table, since) != before["images"]  # equal if only labels of new images have come


def _labels_digest(night: Night, table: ExportTable, snapshot: str) -> str:
    """A checksum of what a table hands on beside the features of a snapshot's images, by id."""
    features = night.store.features(night.dataset, node=table.node, backbone=table.backbone, snapshot=snapshot)
    roles = RoleOptions.of(table)
    rows = with_roles(night.store, features, table.labels, roles, lambda _: None, snapshot=snapshot).table
    found = hashlib.sha256()
    for batch in rows.take(pc.sort_indices(rows["id"])).to_batches(max_chunksize=_AT_ONCE):
        for row in batch.to_pylist():
            found.update(json.dumps(row).encode())
    return found.hexdigest()


def _is_same(night: Night, since: str, snapshot: str) -> bool:
    """Whether two snapshots are names of one file, as those of nights with nothing new are."""
    folder = night.store.path / "snapshots" / night.dataset
    return since == snapshot or (folder / f"{since}.parquet").samefile(folder / f"{snapshot}.parquet")


def compact(night: Night, table: CompactTable) -> dict[str, Any]:  # noqa: ARG001 - as every step
    """Merges small parts; another writer in the store puts it off to the next run."""

    def work() -> dict[str, Any]:
        report = compact_store(night.store)
        if report.parts_before == report.parts_after and not report.rows_dropped:
            return {**asdict(report), "skipped": f"nothing to merge: {counted(report.parts_before, 'part')}"}
        copies = f", {counted(report.rows_dropped, 'duplicate row')} dropped" if report.rows_dropped else ""
        merged = f"{counted(report.parts_before, 'part')} into {report.parts_after:,}"
        return {**asdict(report), "text": f"{merged}{copies}"}

    return _alone(night, work, "parts are merged in the next run")


def keep(night: Night, table: KeepTable) -> dict[str, Any]:
    """Lets old snapshots of the dataset go, whoever took them, the features that only they needed, and the job's old run records.

    References of drift stay, those of other jobs' too, as do the record of the last successful run, those that tell what
    drift is measured against, those of runs whose snapshot is there, and those of other jobs and of what was done by hand.
    """

    def work() -> dict[str, Any]:
        spaces = len(night.job.features)  # a night writes one snapshot for each
        kept = None if table.snapshots is None else table.snapshots * spaces
        report = gc_store(night.store, keep_snapshots=kept, dataset=night.dataset, spared=needed(night))
        old = [] if table.runs is None else old_records(night.store.runs(), night, table.runs)
        removed = remove_runs(night.store, old)
        found = {**asdict(report), "runs_removed": len(removed)}
        counts = {
            "snapshot": report.snapshots_removed,
            "run record": len(removed),
            "row that no snapshot needs": report.rows_dropped,
            "leftover file": report.leftovers_removed,
            "quarantined part": report.quarantined_removed,
            "index that no snapshot needs": report.indexes_removed,
        }
        gone = ", ".join(counted(count, what) for what, count in counts.items() if count)
        if not gone:
            return {**found, "skipped": "nothing to remove"}
        return {**found, "text": f"removed {gone}: {size(report.bytes_freed)}"}

    return _alone(night, work, "old snapshots go in the next run")


def old_records(records: Sequence[Mapping[str, Any]], night: Night, keep: int) -> list[str]:
    """Which run records to remove, so that those of the job's last ``keep`` nights stay, this run among them.

    These are the job's own, and those of its extractions, also of one that its night was killed before it could name. What
    other jobs did, and what people did by hand, stays.

    Args:
        records: all of the store, oldest first.
        night: this run.
        keep: how many nights stay, at least 1.
    """
    runs = [record for record in records if record.get("command") == "run"]
    own = [run for run in runs if run.get("job") == night.job.name and run["run_id"] != night.run_id]
    old = own[: max(0, len(own) + 1 - keep)]
    last_success = next((run["run_id"] for run in reversed(own) if is_success(run)), None)
    named = {run_id for run in runs for run_id in run.get("extractions", ())}
    unnamed = [record for record in records if record.get("command") == "extract" and record["run_id"] not in named]
    ends = [*(run["run_id"] for run in own[1:]), night.run_id]
    going = {run["run_id"] for run in old} - {*telling_runs(night), last_success}
    for run, end in zip(old, ends, strict=False):
        going.update(run.get("extractions", ()), _of_its_process(run, end, unnamed))
    return [record["run_id"] for record in records if record["run_id"] in going]


def _of_its_process(run: Mapping[str, Any], end: str, extractions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The extractions that a run made before the job's next one began, whether or not it came to name them."""
    process = _process(run)
    for record in extractions:
        if process is not None and _process(record) == process and run["run_id"] < record["run_id"] < end:
            yield record["run_id"]


def _process(record: Mapping[str, Any]) -> tuple[str, int] | None:
    host = record.get("host")
    return None if host is None else (host["name"], host["pid"])


def _alone(night: Night, work: Callable[[], dict[str, Any]], otherwise: str) -> dict[str, Any]:
    try:
        return within_time(night.stop.deadline, work, otherwise)
    except StoreLocked as error:
        return {"skipped": f"the store was not to be had alone: {otherwise}", "warnings": [error.message]}


METRICS_SECONDS = 5.0
"""Seconds that figures may take; a night that was stopped writes them, too."""


def report(night: Night, table: ReportTable) -> dict[str, Any]:
    """Writes the page of the last runs, with this run as it stands."""
    from featurepipe.reporting.nights import nights_report

    table.to.parent.mkdir(parents=True, exist_ok=True)
    page = nights_report(
        night.store, table.to, **table.arguments(), job=night.job.name, current=night.record, silent=night.silent
    )
    return {"file": str(page), "text": night.job.named(page)}


def metrics(night: Night, table: MetricsTable) -> dict[str, Any]:
    """Writes the figures of this run as it stands, whatever became of it."""
    from featurepipe.jobs.prometheus import write_metrics

    def work() -> dict[str, Any]:
        path = write_metrics(table.prometheus, night.record, night.store)
        return {"file": str(path), "text": night.job.named(path)}

    return within_time(time.monotonic() + METRICS_SECONDS, work, "the figures stay those of an earlier night")
