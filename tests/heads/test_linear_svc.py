"""scikit-learn's own checks, and its optimum."""

from __future__ import annotations

from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.heads.linear_svc import BlockLinearSVC


@parametrize_with_checks([BlockLinearSVC()])
def test_scikit_learns_checks(estimator, check):
    check(estimator)
