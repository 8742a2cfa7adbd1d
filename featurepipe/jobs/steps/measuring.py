"""What is measured on this run's features, and asked of them.

Drift, which layer transfers best, which route to take from the network; look-alikes of new images, wrong labels, outliers, what
to label next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from featurepipe.display import counted, named_columns
from featurepipe.errors import FeaturepipeError
from featurepipe.jobs.job import (
    DepthTable,
    DriftTable,
    LabelsTable,
    OutliersTable,
    QuestionTable,
    RoutesTable,
    SelectTable,
    SimilarTable,
)
from featurepipe.jobs.step import Night, within_time
from featurepipe.jobs.steps.heads import COMPARED, extraction_of, new_images, own_weights, snapshot_of
from featurepipe.jobs.steps.history import last_result, previous, warned_of
from featurepipe.monitoring.standing_warnings import is_gone, prediction_tests, told
from featurepipe.store.options import RoleOptions
from featurepipe.store.roles import with_roles

_LATE = "the file of an earlier night stays"
_LISTED = frozenset({"queries", "suspects", "outliers", "chosen", "rejects"})
"""What a file has, and no run record."""


class Drifted(FeaturepipeError):
    """This run's images differ from those of before by more than the job tolerates; its record is what the step found."""


def drift(night: Night, table: DriftTable) -> dict[str, Any]:
    """Compares the images that are new since a reference snapshot with those of that snapshot; warns, or fails the run.

    What was warned of stays so until somebody accepts it or the images are gone, see `history.previous`; every run says so.

    Raises:
        Drifted: a p-value is below ``fail``.
    """
    snapshot = snapshot_of(night, None)
    before = warned_of(night)
    gone = before is not None and is_gone(night.store, before, snapshot)
    told_of = {"settled": [before["run_id"]] if before is not None and gone else []}
    reference = previous(night) if table.reference == "previous" else table.reference
    if reference is None:
        why = "the first night: there is nothing to compare with"
        return {"reference": None, "snapshot": snapshot, **told_of, "skipped": why}
    if before is None:
        return _tested(night, table, snapshot, reference, told_of, [])
    if gone:
        over = f"the drift warning of run {before['run_id']} is over: its images are gone from {night.dataset}"
        return _tested(night, table, snapshot, reference, told_of, [over])
    return _tested(
        night, table, snapshot, reference, {**told_of, "since": before["since"]}, [told(before, night.store.path)]
    )


def _tested(
    night: Night, table: DriftTable, snapshot: str, reference: str, more: Mapping[str, Any], said: list[str]
) -> dict[str, Any]:
    """What the test found, with what is ``said`` of an earlier warning."""
    from featurepipe.monitoring.drift import drift as run
    from featurepipe.monitoring.standing_warnings import DRIFT, TOO_FEW, WARNING

    found = run(
        night.store,
        dataset=night.dataset,
        snapshot=snapshot,
        bundle=table.bundle,
        **{**table.arguments(), "reference": reference},
        silent=night.silent,
    )
    if found["verdict"] == TOO_FEW:
        return {**found, **more, "warnings": said, "skipped": "; ".join(found["warnings"])}
    least = _least(found)
    text = f"{found['verdict']}: {counted(found['images']['new'], 'new image')}, {least}"
    result = {**found, **more, "warnings": [*said, *found["warnings"]], "text": text}
    if found["verdict"] in (WARNING, DRIFT) and "since" in more:
        result["warnings"] = found["warnings"]  # the new warning takes the place of the one that stood
    if found["verdict"] == DRIFT:
        raise Drifted(
            f"new images are not like those of {found['reference']}: {least}; they are tested again every night until they "
            f"are gone or accepted; if they are as they should be: {_accept(night)}, or run once with "
            f'reference = "{snapshot}"',
            record=result,
        )
    if found["verdict"] == WARNING:
        result["warnings"] = [
            *result["warnings"],
            f"this run's images may not be like those of {reference}: {least}; the drift warning stands until it is accepted "
            f"({_accept(night)}) or the images are gone",
        ]
    return result


def _accept(night: Night) -> str:
    return f"featurepipe drift {night.store.path} --accept {night.run_id}"


def _least(found: Mapping[str, Any]) -> str:
    """The test that differs most, as text."""
    tests = [
        (test["adjusted"], named_columns(test["column"], test.get("bottleneck")), test["effect"])
        for test in found["columns"]
    ]
    tests += [(test["adjusted"], name, effect) for name, test, effect in prediction_tests(found)]
    value, name, effect = min(tests)
    return f"{name} differs most (p = {value:.2g}, effect {effect:.3f})"


def depth(night: Night, table: DepthTable) -> dict[str, Any]:
    """Compares the layers that the store has, if the images, their labels or what is asked are not those of last time.

    What has been measured before is not measured again, so that a comparison that ran out of time goes on in the next run.
    """
    from featurepipe.layer_depth.depth import depth as run
    from featurepipe.reporting.from_store import report

    inputs = _inputs(night, table)
    last = last_result(night, "depth") or {}
    if table.when == "images changed" and last.get("inputs") == inputs and _is_shown(table):
        return {"skipped": "images, labels and columns are those that were compared last", "inputs": inputs}
    labels = table.labels or night.job.source.labels

    def work() -> dict[str, Any]:
        document = run(
            night.store,
            dataset=night.dataset,
            backbone=table.backbone,
            labels=labels,
            trust_code=night.job.networks,
            **table.arguments(),
            command=f"featurepipe run, job {night.job.name}",
            silent=night.silent,
            cluster=night.executor(),
        )
        if table.report is not None:
            table.report.parent.mkdir(parents=True, exist_ok=True)
            images = night.job.source
            report(
                night.store, table.report, document=document, labels=labels, silent=night.silent,
                source=images.path, only_under=images.only_under, path_column=images.path_column,
                box=images.box, box_unit=images.box_unit, box_margin=images.box_margin,
                images=images.images, frames=images.frames,
            )  # fmt: skip
        best, measure = document["recommended"], document["measure"]
        reached = f"{best[measure]:.4f} right" if measure == "accuracy" else f"{measure} {best[measure]:.4f}"
        return {
            "inputs": inputs,
            "recommended": {name: best[name] for name in ("column", "head", measure, "low", "high")},
            "images": document["images"],
            "report": None if table.report is None else str(table.report),
            "text": f"recommended: {best['column']}, {best['head']} {reached}{_page(night, table)}",
        }

    return within_time(night.stop.deadline, work, "the comparison goes on in the next run")


def routes(night: Night, table: RoutesTable) -> dict[str, Any]:
    """Compares the routes that can be taken from what the store has, if images, labels or what is asked have changed.

    What has been measured before is not measured again: a comparison that ran out of time, or of its ``budget``, goes on the
    next run.
    """
    from featurepipe.transfer_routes.measure import OVER_BUDGET
    from featurepipe.transfer_routes.routes import routes as run

    inputs = _inputs(night, table)
    last = last_result(night, "routes") or {}
    is_done = last.get("inputs") == inputs and not last.get("over_budget")
    if table.when == "images changed" and is_done and _is_shown(table):
        return {"skipped": "images, labels and columns are those that were compared last", "inputs": inputs}
    extracted = extraction_of(night, table.backbone)
    own = own_weights(night).get("" if extracted is None else extracted["fingerprint"])

    def work() -> dict[str, Any]:
        if table.report is not None:
            table.report.parent.mkdir(parents=True, exist_ok=True)
        document = run(
            night.store,
            dataset=night.dataset,
            backbone=table.backbone,
            weights=own or "DEFAULT",
            labels=table.labels or night.job.source.labels,
            trust_code=night.job.networks,
            **table.arguments(),
            report=table.report,
            command=f"featurepipe run, job {night.job.name}",
            silent=night.silent,
            cluster=night.executor(),
        )
        best, measure = document["recommended"], document["measure"]
        left = [one for one in document["not_tried"] if one["why"] == OVER_BUDGET]
        later = f"; {sum(one['draws'] for one in left):,} measurements are left for the next run" if left else ""
        return {
            "inputs": inputs,
            "recommended": {name: best[name] for name in ("route", "cut", measure, "low", "high", "best")},
            "over_budget": len(left),
            "not_tried": document["not_tried"],
            "images": document["images"],
            "report": None if table.report is None else str(table.report),
            "text": f"recommended: {best['route']}, {measure} {best[measure]:.4f}{later}{_page(night, table)}",
        }

    return within_time(night.stop.deadline, work, "the comparison goes on in the next run")


def _page(night: Night, table: DepthTable | RoutesTable) -> str:
    return "" if table.report is None else f"; page {night.job.named(table.report)}"


def _is_shown(table: DepthTable | RoutesTable) -> bool:
    return table.report is None or table.report.exists()


def _inputs(night: Night, table: DepthTable | RoutesTable) -> str:
    """A digest of all that decides what a comparison finds: labelled images, columns, settings."""
    from featurepipe.training.publish import digest_of

    run = extraction_of(night, table.backbone)
    if run is None:
        return ""
    features = night.store.features(
        night.dataset, node=run["columns"], backbone=run["fingerprint"], snapshot=run["run_id"]
    )
    labels = table.labels or night.job.source.labels
    roles = RoleOptions.of(table)
    joined = with_roles(night.store, features, labels, roles, lambda _: None, snapshot=run["run_id"])
    images = joined.select(labelled=True)
    splits, split = np.unique(images.splits.astype(str), return_inverse=True)
    unset = {name for name, value in roles.arguments().items() if value is None}  # of version 1
    settings = table.model_dump(mode="json", exclude={"when", "labels", "jobs", "report", "budget", *unset})
    if isinstance(table, DepthTable):
        settings["heads"] = list(table.families)
    columns = sorted(night.store.space(run["fingerprint"]).columns())
    groups = [] if images.groups is None else [hashlib.sha256("\0".join(map(str, images.groups)).encode()).hexdigest()]
    weights = [] if images.weights is None else [hashlib.sha256(images.weights.astype("<f8")).hexdigest()]
    found = [
        digest_of(images, split, images.targets),
        *groups,
        *weights,
        *images.target_names,
        splits.tolist(),
        run["fingerprint"],
        columns,
        settings,
    ]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def similar(night: Night, table: SimilarTable) -> dict[str, Any]:
    """Finds what the images that are new since the night before look like, among all."""
    from featurepipe.curation.similar import similar as run

    if night.before is None:
        return {"skipped": "the first night: every image is new"}
    new = _new_ids(night, table)
    if not new:
        return {"skipped": "no new images"}
    return _asked(
        night, table, run, lambda found: f"look-alikes of {counted(len(found['queries']), 'new image')}", query_ids=new
    )


def labels(night: Night, table: LabelsTable) -> dict[str, Any]:
    """Finds labels that look wrong."""
    from featurepipe.curation.suspects import count_text
    from featurepipe.curation.suspects import labels as run

    return _asked(night, table, run, count_text)


def outliers(night: Night, table: OutliersTable) -> dict[str, Any]:
    """Finds images that lie apart, or which of those that are new since an earlier night do."""
    from featurepipe.curation.outliers import outliers as run

    since = night.before if table.since == "previous" else table.since
    if table.since is not None:
        if night.before is None:
            return {"skipped": "the first night: there is nothing to compare with"}
        if table.since == "previous" and not _new_ids(night, table):
            return {"skipped": "no new images"}
    what = "image" if since is None else "new image"
    return _asked(
        night, table, run, lambda found: f"{counted(found['count'], 'outlier')} of {counted(found['images'], what)}",
        since=since,
    )  # fmt: skip


def select(night: Night, table: SelectTable) -> dict[str, Any]:
    """Chooses images to label next; all that are without a label, if those are fewer than the budget."""
    from featurepipe.curation.next_to_label import BudgetTooLarge
    from featurepipe.curation.next_to_label import select as run

    def told(found: Mapping[str, Any]) -> str:
        return f"{counted(len(found['chosen']), 'image')} to label next, of {found['unlabelled']:,}"

    try:
        return _asked(night, table, run, told)
    except BudgetTooLarge as error:
        if not error.left:
            return {"skipped": "every image has a label"}
        return _asked(night, table, run, told, budget=error.left)


def _asked(
    night: Night,
    table: QuestionTable,
    run: Callable[..., dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
    **more: Any,
) -> dict[str, Any]:
    """Asks a question of this run's snapshot, and tells of the answer what is no list."""
    file = night.place(table)
    file.parent.mkdir(parents=True, exist_ok=True)
    images = night.job.source
    given = table.arguments()
    if "label" in given:  # a question about labels
        given["labels"] = table.labels or images.labels
    pictures = {
        "source": images.path, "only_under": images.only_under, "path_column": images.path_column, "box": images.box,
        "box_unit": images.box_unit, "box_margin": images.box_margin, "images": images.images, "frames": images.frames,
    } if file.suffix.lower() == ".html" else {}  # fmt: skip

    def work() -> dict[str, Any]:
        found = run(
            night.store, dataset=night.dataset, snapshot=snapshot_of(night, table.backbone), backbone=table.backbone,
            to=file, cluster=night.executor(), silent=night.silent, **{**given, **pictures, **more},
        )  # fmt: skip
        kept = {name: value for name, value in found.items() if name not in _LISTED | {"options"}}
        return {**kept, "text": f"{told(found)}, in {night.job.named(file)}"}

    return within_time(night.stop.deadline, work, _LATE)


def _new_ids(night: Night, table: QuestionTable) -> list[str]:
    """Ids of the images that are new since the night before, and usable."""
    now = night.store.snapshot(night.dataset, snapshot_of(night, table.backbone), columns=COMPARED)
    before = night.store.snapshot(night.dataset, night.before, columns=COMPARED)
    if now is None:
        return []
    found = now.filter(new_images(now, before))
    return [row["id"] for row in found.to_pylist() if row["status"] == "ok"]
