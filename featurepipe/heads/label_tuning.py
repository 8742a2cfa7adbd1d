"""A value of C for each label, by its average precision on images left out, and the protocol of PASCAL VOC 2007 by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from sklearn.base import clone

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import is_blocks
from featurepipe.heads.families import ROUGH, VOC07
from featurepipe.heads.label_matrix import labels_given
from featurepipe.heads.linear.multilabel import MultilabelLinearClassifier, MultilabelLinearSVC, fit_label_path
from featurepipe.heads.preprocessing import UnitRows
from featurepipe.heads.row_shards import remote_row_shards
from featurepipe.heads.sampling import SomeRows
from featurepipe.heads.statistics.multilabel import average_precisions

Floats = npt.NDArray[np.float64]
Estimator = TypeVar("Estimator", bound=MultilabelLinearClassifier)


@dataclass(frozen=True)
class LabelTuning:
    """What a search found.

    Attributes:
        C: (of all labels given) best value for each; the median of the values tried where no fold could tell.
        Cs: The values tried.
        average_precision: (len(Cs), K) mean over the folds; NaN where no fold had both sides of a label.
    """

    C: Floats
    Cs: tuple[float, ...]
    average_precision: Floats


def tune_labels(
    estimator: Estimator,
    X: Any,
    y: Any = None,
    *,
    Cs: Sequence[float],
    folds: Sequence[tuple[Any, Any]],
    sample_weight: Any = None,
) -> LabelTuning:
    """Finds a C for each label: the one with the best mean average precision over folds, all fitted in shared passes.

    Of equally good values the smallest is taken. A fold in which a label has no known rows of both sides, to learn from or to
    measure on, is left out for that label.

    Args:
        estimator: A ``MultilabelLogisticRegression`` or ``MultilabelLinearSVC``; it is not changed.
        X: (n, D) array or ``Blocks``.
        y: (n, K) labels; None for those that ``X`` carries.
        Cs: Values to try.
        folds: Positions to train on and to measure on, of each fold, as scikit-learn's splitters give them.
        sample_weight: (n,) weights; None for one each.

    Raises:
        UsageError: Features or labels that cannot be learned from, no fold, or no value.
    """
    if not len(Cs) or not len(folds):
        raise UsageError(f"{len(Cs)} values of C and {len(folds)} folds: give at least one of each")
    truth, names = labels_given(X, y, estimator.label_names)
    values = tuple(sorted(float(C) for C in Cs))
    quick = clone(estimator).set_params(tol=max(estimator.tol, ROUGH["tol"]))
    paths = fit_label_path(quick, X, y, Cs=values, folds=[train for train, _ in folds], sample_weight=sample_weight)
    learned = np.isin(names, paths[0][0].classes_)
    found = np.full((len(folds), len(values), int(learned.sum())), np.nan)
    for scores, path, (_, test) in zip(found, paths, folds, strict=True):
        rows = np.flatnonzero(test) if np.asarray(test).dtype == bool else np.asarray(test)
        for number, head in enumerate(path):
            scores[number] = average_precisions(_scores(head, X, rows), truth[rows][:, learned])
    counted = (~np.isnan(found)).sum(axis=0)
    mean = np.where(counted > 0, np.nansum(found, axis=0) / np.maximum(counted, 1), np.nan)
    best = np.where(np.isnan(mean).all(axis=0), len(values) // 2, np.argmax(np.nan_to_num(mean, nan=-1.0), axis=0))
    chosen = np.full(len(names), values[len(values) // 2])
    chosen[learned] = np.array(values)[best]
    return LabelTuning(chosen, values, mean)


def _scores(head: Any, X: Any, rows: Any) -> Floats:
    """Scores of some rows; of features that are spread over a cluster all are scored where they are."""
    if not is_blocks(X):
        return np.asarray(head.decision_function(np.asarray(X)[rows]))
    if remote_row_shards(X) is not None:
        return np.asarray(head.decision_function(X)[rows])
    return np.asarray(head.decision_function(SomeRows(X, rows)))


def voc07_head(X: Any, y: Any = None, *, folds: Sequence[tuple[Any, Any]], **params: Any) -> MultilabelLinearSVC:
    """Fits linear SVMs by the protocol of ``VOC07``; features are scaled to rows of length 1 as they are read.

    Args:
        X: (n, D) array or ``Blocks``; what is predicted on must be given through ``unit_rows`` as well.
        y: (n, K) labels; None for those that ``X`` carries.
        folds: Positions to train on and to measure on; the protocol has three.
        **params: Of ``MultilabelLinearSVC``.
    """
    head = MultilabelLinearSVC(class_weight=dict(VOC07["class_weight"]), **params)
    features = unit_rows(X)
    tuned = tune_labels(head, features, y, Cs=VOC07["Cs"], folds=folds)
    return head.set_params(C=tuned.C).fit(features, y)  # type: ignore[no-any-return]


def unit_rows(features: Any) -> Any:
    """Features whose rows are divided by their Euclidean lengths (plus 1e-5): an array, or ``Blocks`` of ``Blocks``."""
    return UnitRows().fit(features).transform(features)
