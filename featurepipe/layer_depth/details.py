"""What the recommended column gets right and wrong, image by image, and what columns have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from featurepipe.heads.calibration import probabilities
from featurepipe.heads.metrics import score_table
from featurepipe.heads.similarity import linear_cka
from featurepipe.heads.transferability import transfer_scores
from featurepipe.layer_depth.mapped import mapped
from featurepipe.layer_depth.probes import scores_of_test
from featurepipe.layer_depth.study import PRETRAINED

if TYPE_CHECKING:
    from featurepipe.layer_depth.folds import Fold
    from featurepipe.layer_depth.measure import Series
    from featurepipe.layer_depth.probes import Cell, Data
    from featurepipe.layer_depth.study import Study

CKA_IMAGES = 2000
"""Images that columns are compared on."""

SCORED_IMAGES = 5000
"""Images that scores without fitting are computed from at most."""


def details(study: Study, series: Series) -> dict[str, Any]:
    """Measures of the images as the first seed's folds test them, each by a head that has not seen it."""
    data = study.data(PRETRAINED, series.columns)
    tested = np.concatenate([fold.test for fold in study.folds if fold.seed == 0])
    scores = []
    for cell, fold in zip(series.cells, study.folds, strict=True):
        if fold.seed == 0:
            scores.append(_scores(data, fold, cell, len(study.classes)))
    found = probabilities(np.concatenate(scores))
    metrics = score_table(found, data.codes[tested], list(study.classes), ids=study.images.ids[tested])
    return {"column": "+".join(series.columns), "head": series.head, "metrics": metrics}


def placed(study: Study, series: Series) -> dict[str, Any]:
    """Where the images lie in two dimensions by the features of some columns: at most 2,000 of them, drawn at random."""
    from featurepipe.reporting.projection import project

    features, images = mapped(study.data(PRETRAINED, series.columns).features), mapped(study.images)
    found = project(list(images.ids), features.read(np.float32), list(images.labels))
    return {**found.as_dict(), "total": len(study.images)}


def _scores(data: Data, fold: Fold, cell: Cell, classes: int) -> Any:
    """Class scores (t, K) of a fold's test images; a class that no training image has gets the lowest score."""
    found, known = scores_of_test(data, fold, cell)
    scores = np.full((len(fold.test), classes), found.min() - 20.0)
    scores[:, known] = found
    return scores


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
    scores = {}
    for column in study.columns:
        data = study.data(PRETRAINED, [column.column])
        scores[column.column] = transfer_scores(data.features, data.codes, len(study.classes), rows=SCORED_IMAGES)
    return {
        "method": "LogME",
        "source": "You et al. 2021, with the fixed point of You et al. 2022; H-score: Bao et al. 2019, Ibrahim et al. 2021",
        "images": min(SCORED_IMAGES, len(study.images)),
        "scores": {column: found.log_me for column, found in scores.items()},
        "h_scores": {column: found.h_score for column, found in scores.items()},
    }
