"""Several labels for each row: a checked (n, K) matrix of present, absent and unknown, and the base of heads that learn it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator

from featurepipe.display import counted, first_names
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks
from featurepipe.heads.inputs import Floats, checked_features, linear_scores, sample_weights

_SHOWN = 5  # labels that an error names


@dataclass(frozen=True)
class LabelMatrix:
    """Checked features and labels, the labels first: what is done label by label runs over whole rows of memory.

    Attributes:
        blocks: (n, D) features; those that are read later raise when a value is not finite.
        positive: (K, n) int8, 1 where a row has the label and 0 where it has not or where that is unknown.
        known: (K, n) bool; None where everything is known.
        weights: (n,) sample weights; None if all are 1.
        names: (K,) of the labels.
        dropped: Names of the labels that were left out, since their known rows are all positive or all negative.
        kept: (of all labels given) bool, False for those left out.
    """

    blocks: Blocks
    positive: npt.NDArray[np.int8]
    known: npt.NDArray[np.bool_] | None
    weights: Floats | None
    names: Array
    dropped: Array
    kept: npt.NDArray[np.bool_]

    def row_weights(self, class_weight: Any = None) -> Floats:
        """Weights of each label's rows, zero where the label is unknown.

        Args:
            class_weight: None, ``"balanced"`` (both sides of each label weigh the same) or a dict of factors for 0 and 1.

        Returns:
            (K, n), or (1, n) where all labels have the same.

        Raises:
            UsageError: ``class_weight`` is none of these.
        """
        rows = np.ones((1, self.positive.shape[1])) if self.weights is None else self.weights[None]
        if self.known is not None:
            rows = rows * self.known
        if class_weight is None:
            return rows
        present = np.array([(rows * self.positive).sum(axis=1), (rows * (1 - self.positive)).sum(axis=1)])
        if isinstance(class_weight, str) and class_weight == "balanced":
            factors = present.sum(axis=0) / (2 * present)
        elif isinstance(class_weight, dict) and set(class_weight) <= {0, 1}:
            factors = np.array([[class_weight.get(1, 1.0)], [class_weight.get(0, 1.0)]])
        else:
            raise UsageError(
                f"class_weight={class_weight!r}: for several labels give None, 'balanced', or factors of absent and present "
                "labels, {0: 1.0, 1: 2.0}"
            )
        return np.asarray(rows * np.where(self.positive > 0, factors[0][:, None], factors[1][:, None]))


class MultilabelClassifier(BaseEstimator):  # type: ignore[misc]
    """Base of heads for several labels of each row; ``decision_function`` is theirs.

    Attributes:
        classes_: (K,) names of the labels, the columns of all results.
        dropped_labels_: Names of the labels that could not be learned and were left out (``one_sided="drop"``).
        n_features_in_: D.
    """

    _estimator_type = "classifier"
    label_names: Sequence[str] | None
    one_sided: str
    memory: int | str | None

    def decision_function(self, X: Any) -> Floats:
        """Returns (n, K) scores, positive where the label is predicted; X is an array or ``Blocks``."""
        raise NotImplementedError

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """Returns (n, K) of 1 where a label is predicted and 0 elsewhere."""
        return (self.decision_function(X) > 0).astype(np.int64)

    def score(self, X: Any, y: Any = None) -> float:
        """Returns the mean average precision over the labels, unknown entries left out; see ``average_precisions``.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n, K) labels; None for those that ``X`` carries.
        """
        from featurepipe.heads.statistics.multilabel import average_precisions

        truth, names = labels_given(X, y)
        scores = self.decision_function(X)
        if len(self.dropped_labels_):
            truth = truth[:, [name not in set(self.dropped_labels_.tolist()) for name in names.tolist()]]
        return float(np.nanmean(average_precisions(scores, truth)))

    def _learn(self, X: Any, y: Any, sample_weight: Any) -> LabelMatrix:
        """Checks the data and notes the labels."""
        data = label_matrix(
            self, X, y, sample_weight=sample_weight, label_names=self.label_names, one_sided=self.one_sided
        )
        self.classes_, self.dropped_labels_ = data.names, data.dropped
        return data

    def __sklearn_tags__(self) -> Any:
        """Says that each row has several labels."""
        from sklearn.utils import ClassifierTags

        tags = super().__sklearn_tags__()
        tags.estimator_type = "classifier"
        tags.classifier_tags = ClassifierTags(multi_class=False, multi_label=True)
        tags.target_tags.required = True
        tags.target_tags.multi_output, tags.target_tags.single_output = True, False
        return tags


class LinearScores(MultilabelClassifier):
    """Base of those whose scores are linear: ``coef_`` (K, D) and ``intercept_`` (K,)."""

    def decision_function(self, X: Any) -> Floats:
        """Returns (n, K) float64 scores, positive where the label is predicted; X is an array or ``Blocks``."""
        scores = linear_scores(self, X, memory=self.memory, dtype=np.float64)
        return np.asarray(scores.reshape(-1, len(self.classes_)))


def label_matrix(
    estimator: Any,
    features: Any,
    labels: Any,
    *,
    sample_weight: Any = None,
    label_names: Sequence[str] | None = None,
    one_sided: str = "error",
) -> LabelMatrix:
    """Checks what a head for several labels is to learn from, and sets the estimator's ``n_features_in_``.

    Args:
        estimator: The one that is being fitted.
        features: (n, D) array, or ``Blocks`` such as a ``FeatureSet``.
        labels: (n, K): 1 present, 0 absent, NaN unknown; None takes the ``targets`` that the features carry.
        sample_weight: (n,) or one number; None for ones.
        label_names: (K,); by default the columns of a data frame, the features' ``target_names``, or numbers from 0.
        one_sided: What to do with a label that no known row has, or every: ``"error"`` or ``"drop"``, with a warning.

    Raises:
        UsageError: Labels of another form, of one side alone, or none at all; a feature is not finite; the lengths differ.
    """
    if one_sided not in ("error", "drop"):
        raise UsageError(f"one_sided={one_sided!r}: choices are 'error' and 'drop'")
    blocks, (values, names) = checked_features(estimator, features, labels, partial(labels_given, names=label_names))
    if len(values) != blocks.shape[0]:
        raise UsageError(f"{blocks.shape[0]} rows of features but {len(values)} rows of labels: give one row a row")
    weights = sample_weights(sample_weight, len(values))
    known = ~np.isnan(values)
    positive = values == 1
    counted = known if weights is None else known & (weights > 0)[:, None]
    some, every = (positive & counted).sum(axis=0), counted.sum(axis=0)
    single = (some == 0) | (some == every)
    if single.any():
        _refuse_or_say(names[single], some[single], every[single], one_sided, left=int((~single).sum()))
        positive, known = positive[:, ~single], known[:, ~single]
    return LabelMatrix(
        blocks,
        np.ascontiguousarray(positive.T.astype(np.int8)),
        None if known.all() else np.ascontiguousarray(known.T),
        weights,
        names[~single],
        names[single],
        ~single,
    )


def labels_given(
    features: Any, labels: Any, names: Sequence[str] | None = None
) -> tuple[npt.NDArray[np.float32], Array]:
    """Returns (n, K) labels as float32 and their (K,) names.

    Raises:
        UsageError: There are none, they are no matrix, hold something else than 0, 1 and unknown, or the names do not fit.
    """
    if labels is None:
        labels = getattr(features, "targets", None)
        if labels is None:
            raise UsageError("requires y to be passed, but the target y is None: these features carry no label columns")
        names = getattr(features, "target_names", None) if names is None else names
    if names is None and hasattr(labels, "columns"):
        names = [str(name) for name in labels.columns]
    values = _numbers(labels)
    if values.ndim != 2 or not values.shape[1]:
        raise UsageError(
            f"labels of shape {values.shape}: several labels are an (images, labels) matrix of 1 present, 0 absent and NaN "
            "unknown; for one class an image take target_type='multiclass'"
        )
    strange = ~(np.isnan(values) | (values == 0) | (values == 1))
    if strange.any():
        row, column = np.argwhere(strange)[0]
        raise UsageError(
            f"{int(strange.sum())} labels are neither 1 (present), 0 (absent) nor NaN (unknown); the first is "
            f"{values[row, column]:g} in row {row}, label {column if names is None else names[column]!r}"
        )
    found = np.arange(values.shape[1]) if names is None else np.array([str(name) for name in names])
    if len(found) != values.shape[1]:
        raise UsageError(f"{len(found)} label_names for {values.shape[1]} columns of labels: give one a column")
    if len(set(found.tolist())) < len(found):
        twice = next(name for name in found.tolist() if found.tolist().count(name) > 1)
        raise UsageError(f"two labels are named {twice!r}: give each its own name")
    return values, found


def _numbers(labels: Any) -> npt.NDArray[np.float32]:
    """Labels as float32; None, pandas' NA and masked entries become NaN."""
    if np.ma.isMaskedArray(labels):
        return np.ma.filled(labels.astype(np.float32), np.nan)
    try:
        if hasattr(labels, "columns"):  # a data frame, whose missing values may be of several kinds
            return np.asarray(labels.to_numpy(dtype=np.float32, na_value=np.nan))
        if not hasattr(labels, "dtype"):
            labels = np.asarray(labels)
        return np.asarray(labels, np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"labels must be numbers, 1 present, 0 absent and NaN unknown, in rows of the same length: {error}"
        ) from error


def _refuse_or_say(names: Array, some: Array, every: Array, one_sided: str, *, left: int) -> None:
    """Names labels without positive or negative rows: as an error, or as a warning where they are left out."""
    told = [
        f"{name!r} ({'no known row' if not all_ else 'no positive row' if not positive else 'no negative row'}"
        f"{f' of {all_} known' if all_ else ''})"
        for name, positive, all_ in zip(names.tolist(), some.tolist(), every.tolist(), strict=True)
    ]
    shown = first_names(told, _SHOWN)
    if one_sided == "error" or not left:
        also = "" if left else " No label is left."
        raise UsageError(
            f"{counted(len(told), 'label', 'has', 'have')} rows of one side only: {shown}. A head learns a label from rows that "
            f"have it and rows that do not; add such rows, or leave these labels out with one_sided='drop'.{also}"
        )
    warnings.warn(
        f"left out {counted(len(told), 'label')} with rows of one side only: {shown}", UserWarning, stacklevel=5
    )


def per_label(name: str, value: Any, kept: npt.NDArray[np.bool_], *, least: float | None = None) -> Floats:
    """Returns (K,) values of a parameter that is one number, or one for each label given, of those that are kept.

    Raises:
        UsageError: It has another length, or a value is not positive; or, if ``least`` is given, below that.
    """
    values = np.asarray(value, np.float64)
    labels = len(kept)
    if values.shape not in ((), (labels,)):
        raise UsageError(
            f"{name} has {values.shape} values for {labels} labels: give one number, or one for each label"
        )
    if not (values > 0 if least is None else values >= least).all():
        raise UsageError(f"{name}={value!r} must be {'positive' if least is None else f'{least:g} or more'}")
    return np.broadcast_to(values, labels)[kept].astype(np.float64)
