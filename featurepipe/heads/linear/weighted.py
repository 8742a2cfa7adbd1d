"""scikit-learn's linear classifiers under one rule for weights of rows and classes, that of ``inputs.combined_weights``.

Of its own, ``RidgeClassifier`` balances classes by rows and ``LogisticRegression`` (since 1.7) by summed weights, and a class
whose rows all weigh nothing stays among the classes. Without ``sample_weight`` they are scikit-learn's as they are.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn import linear_model, svm

from featurepipe.heads.blocks import Array
from featurepipe.heads.inputs import balanced, classes_of, combined_weights


class _OneRuleForWeights:
    """Checks ``sample_weight`` and balances classes by their summed weights before the estimator sees them."""

    class_weight: Any

    def fit(self, X: Array, y: Array, sample_weight: Any = None) -> Self:
        """Fits; see scikit-learn.

        Args:
            X: (n, D) array.
            y: (n,) labels.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: Weights are negative, not finite or too few, or all those of a class are zero.
        """
        fit: Any = super().fit  # type: ignore[misc]
        if sample_weight is None:
            fit(X, y)
            return self
        labels = np.asarray(y)
        classes, codes = classes_of(labels)
        weights = combined_weights(sample_weight, None, labels, classes, codes)
        asked = self.class_weight
        if isinstance(asked, str) and asked == "balanced":
            self.class_weight = balanced(classes, codes, weights)
        try:
            fit(X, y, sample_weight=weights)
        finally:
            self.class_weight = asked
        return self


class LogisticRegression(_OneRuleForWeights, linear_model.LogisticRegression):  # type: ignore[misc]
    """``sklearn.linear_model.LogisticRegression``; see this module."""


class LinearSVC(_OneRuleForWeights, svm.LinearSVC):  # type: ignore[misc]
    """``sklearn.svm.LinearSVC``; see this module."""


class RidgeClassifier(_OneRuleForWeights, linear_model.RidgeClassifier):  # type: ignore[misc]
    """``sklearn.linear_model.RidgeClassifier``; see this module."""
