"""What a comparison of layers leaves in writing: every number that was found, how, and what the recommended column gets wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor
from featurepipe.heads.calibration import fit_temperature, probabilities
from featurepipe.heads.label_calibration import fit_sigmoids
from featurepipe.heads.statistics.metrics import score_table
from featurepipe.heads.statistics.multilabel import label_table
from featurepipe.heads.statistics.regression import number_table
from featurepipe.heads.statistics.similarity import linear_cka
from featurepipe.heads.statistics.transferability import log_me_of_labels, log_me_of_numbers, transfer_scores
from featurepipe.layer_depth import answers
from featurepipe.layer_depth.measure import Series, TimedForward, least_disturbed, scores_of
from featurepipe.layer_depth.study import PRETRAINED
from featurepipe.progress import Progress
from featurepipe.records import host, now, processor_name, versions
from featurepipe.reporting.images import mapped, shown_names

if TYPE_CHECKING:
    from featurepipe.layer_depth.journal import Journal
    from featurepipe.layer_depth.sources import Extracted
    from featurepipe.layer_depth.study import Study


CKA_IMAGES = 2000
"""Images that columns are compared on."""

SCORED_IMAGES = 5000
"""Images that scores without fitting are computed from at most."""


def details(study: Study, series: Series, executor: Executor | None = None) -> dict[str, Any]:
    """Measures of every image as the first seed's folds test it, by a head that has not seen it: here, and elsewhere.

    Images of the other source are asked about once, too, of one head that has not seen the image of equal id. Where images have
    groups, intervals are of so many independent groups, as those of ``train`` and ``evaluate`` are.

    Args:
        study: what is compared on what.
        series: the cells of a column.
        executor: fits heads again; by default this process.

    Returns:
        ``{"details", "details_shifted"}``, each with column, head and metrics, which also say whether probabilities are
        ``calibrated``; the second is None without another source.
    """
    if study.images.targets is not None:
        return _details_of_targets(study, series, executor or LocalExecutor())
    data, there = study.data(PRETRAINED, series.columns), study.elsewhere
    scores = np.empty((len(study.images), len(study.classes)))
    shifted = np.empty((0 if there is None else len(there.rows), len(study.classes)))
    testers = np.empty(0, np.int64) if there is None else there.testers(study.folds)
    first = [number for number, fold in enumerate(study.folds) if fold.seed == study.folds[0].seed]
    for number, found in scores_of(executor or LocalExecutor(), study, series, first):
        scores[study.folds[number].test] = _of_all_classes(found.test, found.classes, scores.shape[1])
        if found.shifted is not None:
            own = testers == number
            shifted[own] = _of_all_classes(found.shifted[own], found.classes, scores.shape[1])
    tests = [study.folds[number].test for number in first]
    tested = np.concatenate(tests)

    def table(likely: Any, codes: Any, images: Any) -> dict[str, Any]:
        scored = score_table(likely, codes, list(study.classes), ids=images.ids, groups=images.groups)
        metrics = {**scored, "calibrated": len(tests) > 1}
        return {"column": "+".join(series.columns), "head": series.head, "metrics": metrics}

    own, temperature = _calibrated(scores, data.truth, tests)
    there_likely = probabilities(shifted, temperature)
    return {
        "details": table(own[tested], data.truth[tested], study.images.take(tested)),
        "details_shifted": None if there is None else table(there_likely, data.shifted_truth, there.images),
    }


def _details_of_targets(study: Study, series: Series, executor: Executor) -> dict[str, Any]:
    """The same of several labels or numbers, with ``label_table`` or ``number_table``."""
    data, there = study.data(PRETRAINED, series.columns), study.elsewhere
    scores = np.full(data.truth.shape, np.nan)
    shifted = np.full(data.shifted_truth.shape, np.nan)
    testers = np.empty(0, np.int64) if there is None else there.testers(study.folds)
    first = [number for number, fold in enumerate(study.folds) if fold.seed == study.folds[0].seed]
    for number, found in scores_of(executor, study, series, first):
        scores[study.folds[number].test] = found.test
        if found.shifted is not None:
            shifted[testers == number] = found.shifted[testers == number]
    tests = [study.folds[number].test for number in first]
    tested = np.concatenate(tests)
    calibrated = len(tests) > 1
    if data.truth.ndim == 2:
        scores, shifted = _likely_labels(scores, shifted, data.truth, tests)

    def table(said: Any, truth: Any, images: Any) -> dict[str, Any]:
        if data.truth.ndim == 2:
            metrics = {
                **label_table(said, truth, list(study.classes), thresholds=0.5, groups=images.groups, ids=images.ids),
                "calibrated": calibrated,
            }
        else:
            metrics = number_table(said, truth, ids=images.ids, groups=images.groups)
        return {"column": "+".join(series.columns), "head": series.head, "metrics": metrics}

    return {
        "details": table(scores[tested], data.truth[tested], study.images.take(tested)),
        "details_shifted": None if there is None else table(shifted, data.shifted_truth, there.images),
    }


def _likely_labels(scores: Any, shifted: Any, truth: Any, tests: Sequence[Any]) -> tuple[Any, Any]:
    """Probabilities of labels by sigmoids that are fitted across folds, as `_calibrated` does; a single fold's are not fitted."""
    likely, every = np.zeros(scores.shape), np.concatenate(list(tests))
    for number, test in enumerate(tests):
        others = np.concatenate([rows for other, rows in enumerate(tests) if other != number] or [test[:0]])
        likely[test] = fit_sigmoids(scores[others], truth[others]).probabilities(scores[test])
    fitted = fit_sigmoids(scores[every], truth[every]) if len(tests) > 1 else fit_sigmoids(scores[:0], truth[:0])
    return likely, fitted.probabilities(shifted) if len(shifted) else shifted


def _calibrated(scores: Any, codes: Any, tests: Sequence[Any]) -> tuple[Any, float]:
    """Probabilities by temperatures that are fitted across folds, and one temperature for images of other sources.

    The scores of a fold's images come from a head that has not seen them, and their temperature from the other folds' images,
    so that it has not seen them either. A single fold has nothing to be calibrated on: its probabilities are the head's own.

    Args:
        scores: (n, K) of all images.
        codes: (n,) their classes.
        tests: positions of the images of each fold.
    """
    if len(tests) < 2:
        return probabilities(scores), 1.0
    likely = np.full(scores.shape, 1 / scores.shape[1])
    for number, test in enumerate(tests):
        others = np.concatenate([rows for other, rows in enumerate(tests) if other != number])
        likely[test] = probabilities(scores[test], fit_temperature(scores[others], codes[others]))
    every = np.concatenate(list(tests))
    return likely, fit_temperature(scores[every], codes[every])


def placed(study: Study, series: Series) -> dict[str, Any]:
    """Where the images lie in two dimensions by the features of some columns: at most 2,000 of them, drawn at random."""
    from featurepipe.reporting.images import project

    features, images = mapped(study.data(PRETRAINED, series.columns).features), mapped(study.images)
    found = project(list(images.ids), features.read(np.float32), shown_names(images))
    return {**found.as_dict(), "total": len(study.images)}


def _of_all_classes(scores: Any, known: Any, classes: int) -> Any:
    """Scores (n, classes) from those (n, K) of the known ones; a class that no training image has gets the lowest."""
    found = np.full((len(scores), classes), scores.min(initial=0.0) - 20.0)
    found[:, known] = scores
    return found


def similarity(study: Study) -> dict[str, Any]:
    """Linear CKA between all columns."""
    views = [study.data(PRETRAINED, [column.column]).features for column in study.columns]
    found = linear_cka(views, rows=CKA_IMAGES)
    return {
        "columns": [column.column for column in study.columns],
        "cka": [[None if np.isnan(value) else float(value) for value in row] for row in found],
        "images": min(CKA_IMAGES, len(study.images)),
        "method": "linear CKA, unbiased (Kornblith et al. 2019; Song et al. 2012)",
    }


def transferability(study: Study) -> dict[str, Any]:
    """Scores of every column that need no fitting."""
    if study.images.targets is not None:
        return _transferability_of_targets(study)
    scores = {}
    for column in study.columns:
        data = study.data(PRETRAINED, [column.column])
        scores[column.column] = transfer_scores(data.features, data.truth, len(study.classes), rows=SCORED_IMAGES)
    return {
        "method": "LogME",
        "source": "You et al. 2021, with the fixed point of You et al. 2022; H-score: Bao et al. 2019, Ibrahim et al. 2021",
        "images": min(SCORED_IMAGES, len(study.images)),
        "scores": {column: found.log_me for column, found in scores.items()},
        "h_scores": {column: found.h_score for column, found in scores.items()},
    }


def _transferability_of_targets(study: Study) -> dict[str, Any]:
    """LogME of several labels or numbers."""
    scores = {}
    for column in study.columns:
        data = study.data(PRETRAINED, [column.column])
        of_targets = log_me_of_labels if data.truth.ndim == 2 else log_me_of_numbers
        scores[column.column] = of_targets(data.features, data.truth, rows=SCORED_IMAGES)
    form = (
        "the mean over the labels, each on the images that know it"
        if study.truth.ndim == 2
        else "the form for regression, of standardised numbers"
    )
    return {
        "method": "LogME",
        "source": f"You et al. 2021, with the fixed point of You et al. 2022: {form}",
        "images": min(SCORED_IMAGES, len(study.images)),
        "scores": scores,
        "left_out": "H-score compares the means of classes, which these images have not",
    }


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
    grouped = {"groups": study.groups} if study.groups else {}  # journals of before took such images as independent
    detailed = study.key(PRETRAINED, chosen.columns, what="details", head=chosen.head, names=study.names, **grouped)
    between = answers.differences(study, measured)
    there = study.elsewhere
    whole = {
        "kind": "depth",
        "version": 1,
        "dataset": study.dataset,
        "backbone": found.backbone_record,
        "weights_note": found.weights_note,
        "space": {"name": found.space_name, "fingerprint": study.spaces[PRETRAINED]},
        "control": found.control(),
        "test_dataset": there.dataset if there else None,
        "settings": found.settings(study.protocol),
        "labels": labels_name,
        "target_type": study.protocol.target_type,
        "measure": study.measure,
        "classes": list(study.classes),
        "images": len(study.images),
        "groups": study.groups,
        "counts": {
            "shifted": len(there.rows) if there else 0,
            "shifted_of_equal_id": there.twins if there else 0,
            **({"shifted_of_equal_group": there.grouped} if there and there.grouped else {}),
            **study.left_out,
        },
        "damaged": found.damaged,
        "protocol": study.protocol.text,
        "timing": {**timing.as_dict(), "waited": times["waited"]},
        "columns": columns,
        "results": answers.results(study, measured),
        "concatenations": answers.concatenations(
            study, joined, answers.best_of(study, measured, recommended.best.head)
        ),
        "differences": between,
        "recommended": {
            **_recommended(study, recommended, columns),
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


_BEST = {"accuracy": "most accurate", "map": "one with the best mAP", "r2": "one with the best R2"}


def parts_of(*, with_map: bool) -> int:
    """How many parts of a description take long: times, likeness, scores without fitting, every image, and the map."""
    return 5 if with_map else 4


def _recommended(study: Study, found: answers.Recommendation, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    (column,) = (column for column in columns if column["column"] == found.chosen.columns[0])
    return {
        "column": found.chosen.columns[0],
        "node": column["node"],
        "head": found.chosen.head,
        study.measure: found.estimate.value,
        "low": found.estimate.low,
        "high": found.estimate.high,
        "se": found.estimate.se,
        "best": found.best.columns[0],
        "best_head": found.best.head,
        f"best_{study.measure}": found.best_estimate.value,
        "rule": "the column with the fewest operations of the network within one standard error of the "
        f"{_BEST[study.measure]} (Breiman et al. 1984)",
        **{name: column[name] for name in ("width", "bytes_per_image", "ms_per_image", "saved")},
    }


def files_of(**given: Any) -> dict[str, dict[str, str]]:
    """The files among the given arguments, each its ``path`` and the ``sha256`` of its bytes; columns and tables are none."""
    found = {}
    for name, value in given.items():
        if isinstance(value, str | PathLike) and Path(value).is_file():
            with Path(value).open("rb") as file:
                found[name] = {"path": str(value), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return found


def provenance(study: Study, found: Extracted, seconds: Mapping[str, float], command: str | None) -> dict[str, Any]:
    """Who measured it, where, when and with what."""
    engine = study.store.space(study.spaces[PRETRAINED]).notes.get("engine")
    there = study.elsewhere
    return {
        "command": command,
        "exit_code": max((int(record.get("exit_code") or 0) for record in found.records), default=0),
        "when": now(),
        "software": versions("scikit-learn", "scipy", *(["openvino"] if engine == "openvino" else [])),
        "machine": {**host(), "processor": processor_name()},
        "store": str(study.store.path),
        "runs": found.runs,
        "snapshot": study.snapshots[study.dataset],
        **({"snapshot_of_test_source": study.snapshots[there.dataset]} if there else {}),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
