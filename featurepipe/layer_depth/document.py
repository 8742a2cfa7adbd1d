"""What a comparison of layers leaves in writing: every number that was found, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featurepipe.execution.executor import Executor
from featurepipe.layer_depth import answers
from featurepipe.layer_depth.details import details, placed, similarity, transferability
from featurepipe.layer_depth.study import PRETRAINED
from featurepipe.layer_depth.timing import TimedForward, least_disturbed
from featurepipe.progress import Progress
from featurepipe.records import host, now, versions

if TYPE_CHECKING:
    from featurepipe.layer_depth.journal import Journal
    from featurepipe.layer_depth.measure import Series
    from featurepipe.layer_depth.sources import Extracted
    from featurepipe.layer_depth.study import Study


def document(
    study: Study,
    found: Extracted,
    journal: Journal,
    measured: Sequence[Series],
    joined: Sequence[Series],
    recommended: answers.Recommendation,
    *,
    timing: TimedForward,
    executor: Executor,
    labels_name: str | None,
    with_map: bool,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Puts the answers together, and describes the columns; what the journal knows of them already is not found again.

    Args:
        study: what was compared on what.
        found: where the columns are.
        journal: keeps what takes long to find.
        measured: single columns.
        joined: columns side by side.
        recommended: what came of it.
        timing: how long the network takes up to each node.
        executor: fits heads again, for what they say of each image.
        labels_name: of labels of the user's own.
        with_map: place the images in two dimensions, too.
        say: told what takes long.
        progress: advanced by one for each of the `parts_of`.
    """
    say("comparing columns, and timing the network up to each")
    chosen, names = recommended.chosen, [column.column for column in study.columns]
    times = least_disturbed(timing, journal)
    progress.advance(1)
    columns = [
        {
            **column.as_dict(),
            "bytes_per_image": column.width * study.itemsize(column.column),
            "ms_per_image": times["milliseconds"].get(column.node),
            "saved": 1 - column.cost,
        }
        for column in study.columns
    ]
    alike = journal.finding(study.key_without_folds(names, what="similarity"), lambda: similarity(study))
    progress.advance(1)
    scores = journal.finding(study.key_without_folds(names, what="transferability"), lambda: transferability(study))
    progress.advance(1)
    detailed = study.key(PRETRAINED, chosen.columns, what="details", head=chosen.head, names=study.names)
    between = answers.differences(study, measured)
    there = study.elsewhere
    whole = {
        "kind": "depth",
        "version": 1,
        "dataset": study.dataset,
        "backbone": found.backbone_record,
        "space": {"name": found.space_name, "fingerprint": study.spaces[PRETRAINED]},
        "control": found.control(),
        "test_dataset": there.dataset if there else None,
        "settings": found.settings(study.protocol),
        "labels": labels_name,
        "classes": list(study.classes),
        "images": len(study.images),
        "counts": {
            "shifted": len(there.rows) if there else 0,
            "shifted_of_equal_id": there.twins if there else 0,
            **study.left_out,
        },
        "protocol": study.protocol.text,
        "timing": {**timing.as_dict(), "waited": times["waited"]},
        "columns": columns,
        "results": answers.results(study, measured),
        "concatenations": answers.concatenations(
            study, joined, answers.best_of(study, measured, recommended.best.head)
        ),
        "differences": between,
        "recommended": {
            **_recommended(recommended, columns),
            "not_told_apart": answers.not_told_apart(recommended, between),
            "elsewhere": answers.elsewhere(study, recommended, measured),
        },
        "similarity": alike,
        "transferability": {**scores, "correlations": answers.correlations(study, measured, scores["scores"])},
        **journal.finding(detailed, lambda: details(study, chosen, executor)),
    }
    progress.advance(1)
    if with_map:
        key = study.key_without_folds(chosen.columns, what="map", names=study.names)
        whole["map"] = journal.finding(key, lambda: placed(study, chosen))
        progress.advance(1)
    return whole


def parts_of(*, with_map: bool) -> int:
    """How many parts of a description take long: times, likeness, scores without fitting, every image, and the map."""
    return 5 if with_map else 4


def _recommended(found: answers.Recommendation, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    (column,) = (column for column in columns if column["column"] == found.chosen.columns[0])
    return {
        "column": found.chosen.columns[0],
        "node": column["node"],
        "head": found.chosen.head,
        "accuracy": found.estimate.value,
        "low": found.estimate.low,
        "high": found.estimate.high,
        "se": found.estimate.se,
        "best": found.best.columns[0],
        "best_head": found.best.head,
        "best_accuracy": found.best_estimate.value,
        "rule": "the cheapest column within one standard error of the most accurate (Breiman et al. 1984)",
        **{name: column[name] for name in ("width", "bytes_per_image", "ms_per_image", "saved")},
    }


def provenance(study: Study, found: Extracted, seconds: Mapping[str, float], command: str | None) -> dict[str, Any]:
    """Who measured it, where, when and with what."""
    return {
        "command": command,
        "exit_code": max((int(record.get("exit_code") or 0) for record in found.records), default=0),
        "when": now(),
        "software": versions(),
        "machine": host(),
        "store": str(study.store.path),
        "runs": found.runs,
        "snapshot": study.snapshots[study.dataset],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
