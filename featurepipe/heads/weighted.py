"""scikit-learn's own estimators, the in-memory half of many heads, under our rules for labels, targets and weights.

A missing label (None, NaN) is refused by ``blocks.labels_of``, as in every head: scikit-learn compares it with the others and
raises a bare TypeError, or takes the NaN of a list of texts for a class. Weights of rows and classes follow
``inputs.combined_weights``: of its own, ``RidgeClassifier`` balances classes by rows and ``LogisticRegression`` (since 1.7) by
summed weights, and a class whose rows all weigh nothing stays among the classes. Otherwise they are scikit-learn's as they are.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn import discriminant_analysis, linear_model, neighbors, svm
from sklearn.utils.validation import column_or_1d

from featurepipe.heads.blocks import Array, labels_of, targets_of
from featurepipe.heads.inputs import (
    BlockClassifier,
    BlockRegressor,
    balanced,
    classes_of,
    combined_weights,
    numbers_to_learn,
    sample_weights,
)


class _CheckedLabels(BlockClassifier):
    """Refuses missing labels before the estimator sees them."""

    def fit(self, X: Array, y: Any) -> Self:
        """Fits; see scikit-learn.

        Args:
            X: (n, D) array.
            y: (n,) labels.

        Raises:
            UsageError: Rows have no label.
        """
        fit: Any = super().fit
        fit(X, labels_of(X, y))
        return self


class _OneRuleForWeights(BlockClassifier):
    """Refuses missing labels, checks ``sample_weight`` and balances classes by their summed weights before the estimator."""

    class_weight: Any

    def fit(self, X: Array, y: Any, sample_weight: Any = None) -> Self:
        """Fits; see scikit-learn.

        Args:
            X: (n, D) array.
            y: (n,) labels.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: Rows have no label; or weights are negative, not finite or too few, or all those of a class are zero.
        """
        fit: Any = super().fit
        labels = labels_of(X, y)
        if sample_weight is None:
            fit(X, labels)
            return self
        classes, codes = classes_of(labels)
        weights = combined_weights(sample_weight, None, labels, classes, codes)
        asked = self.class_weight
        if isinstance(asked, str) and asked == "balanced":
            self.class_weight = balanced(classes, codes, weights)
        try:
            fit(X, labels, sample_weight=weights)
        finally:
            self.class_weight = asked
        return self


class LogisticRegression(_OneRuleForWeights, linear_model.LogisticRegression):  # type: ignore[misc]
    """``sklearn.linear_model.LogisticRegression``; see this module."""


class LinearSVC(_OneRuleForWeights, svm.LinearSVC):  # type: ignore[misc]
    """``sklearn.svm.LinearSVC``; see this module."""


class RidgeClassifier(_OneRuleForWeights, linear_model.RidgeClassifier):  # type: ignore[misc]
    """``sklearn.linear_model.RidgeClassifier``; see this module."""


class LinearDiscriminantAnalysis(_CheckedLabels, discriminant_analysis.LinearDiscriminantAnalysis):  # type: ignore[misc]
    """``sklearn.discriminant_analysis.LinearDiscriminantAnalysis``; see this module."""


class KNeighborsClassifier(_CheckedLabels, neighbors.KNeighborsClassifier):  # type: ignore[misc]
    """``sklearn.neighbors.KNeighborsClassifier``; see this module."""


class Ridge(BlockRegressor, linear_model.Ridge):  # type: ignore[misc]
    """``sklearn.linear_model.Ridge`` of one target; see this module."""

    def fit(self, X: Array, y: Any, sample_weight: Any = None) -> Self:
        """Fits; see scikit-learn.

        Args:
            X: (n, D) array.
            y: (n,) numbers.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: A target is missing, infinite or no number, or all are the same; or weights are negative, not finite or
                too few.
        """
        targets = column_or_1d(targets_of(X, y), warn=True)
        weights = sample_weights(sample_weight, len(targets))
        numbers_to_learn(targets, weights)
        if isinstance(X, np.ndarray) and X.dtype == np.float32:
            X = X.astype(
                np.float64
            )  # else scikit-learn makes the targets float32: of a date whole minutes would be lost
        fit: Any = super().fit
        fit(X, targets, sample_weight=weights)
        return self


class KNeighborsRegressor(BlockRegressor, neighbors.KNeighborsRegressor):  # type: ignore[misc]
    """``sklearn.neighbors.KNeighborsRegressor`` of one target; see this module."""

    def fit(self, X: Array, y: Any) -> Self:
        """Fits; see scikit-learn.

        Args:
            X: (n, D) array.
            y: (n,) numbers.

        Raises:
            UsageError: A target is missing, infinite or no number, or all are the same.
        """
        targets = column_or_1d(targets_of(X, y), warn=True)
        numbers_to_learn(targets)
        fit: Any = super().fit
        fit(X, targets)
        return self
