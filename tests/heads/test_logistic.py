"""scikit-learn's own checks, and its optimum."""

from __future__ import annotations

from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.heads.logistic import BlockLogisticRegression


@parametrize_with_checks([BlockLogisticRegression()])
def test_scikit_learns_checks(estimator, check):
    check(estimator)
