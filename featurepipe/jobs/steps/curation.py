"""Questions asked of this run's features: look-alikes of new images, wrong labels, outliers, what to label next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from featurepipe.display import counted
from featurepipe.jobs.job import LabelsTable, OutliersTable, QuestionTable, SelectTable, SimilarTable
from featurepipe.jobs.step import Night, within_time
from featurepipe.jobs.steps.heads import COMPARED, new_images, snapshot_of

_LATE = "the file of an earlier night stays"
_LISTED = frozenset({"queries", "suspects", "outliers", "chosen", "rejects"})
"""What a file has, and no run record."""


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
    from featurepipe.curation.suspects import labels as run

    return _asked(night, table, run, lambda found: f"{found['count']:,} of {found['images']:,} labels look wrong")


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
