"""Ridge and lda from streamed blocks are scikit-learn's, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import UsageError
from featurepipe.heads.linear.lda import BlockLinearDiscriminantAnalysis
from featurepipe.heads.linear.ridge import BlockRidgeClassifier


@pytest.fixture(scope="module", params=["ten classes", "two classes"])
def digits(request):
    images, numbers = load_digits(return_X_y=True)
    images = images[:, images.std(axis=0) > 0.5]
    images += np.random.default_rng(0).normal(0, 0.1, images.shape)
    labels = np.array([f"digit {number}" for number in numbers])
    kept = np.isin(numbers, [3, 8]) if request.param == "two classes" else slice(None)
    return images[kept], labels[kept]


def same(found, expected, rtol=1e-9):
    __tracebackhide__ = True
    expected = np.atleast_2d(expected)
    np.testing.assert_allclose(np.atleast_2d(found), expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("class_weight", [None, "balanced", "dict"])
def test_ridge_is_scikit_learns(digits, stored, alpha, class_weight):
    X, y = digits
    if class_weight == "dict":
        class_weight = {label: 1.0 + place for place, label in enumerate(np.unique(y))}
    weights = np.random.default_rng(1).uniform(0, 3, len(y))
    balance = class_weight
    if class_weight == "balanced":  # by summed weights, in every head; scikit-learn's ridge counts rows
        sums = {label: weights[y == label].sum() for label in np.unique(y)}
        balance = {label: weights.sum() / (len(sums) * of_class) for label, of_class in sums.items()}
    theirs = RidgeClassifier(alpha=alpha, class_weight=balance).fit(X, y, weights)
    ours = BlockRidgeClassifier(alpha, class_weight=class_weight, memory="100kB").fit(stored(X, y), None, weights)
    same(ours.coef_, theirs.coef_)
    same(ours.intercept_, theirs.intercept_)
    assert ours.predict(X).tolist() == theirs.predict(X).tolist()
    assert ours.decision_function(X).shape == theirs.decision_function(X).shape


def test_ridge_of_dependent_columns_without_penalty_is_the_smallest_solution(digits):
    X, y = digits
    X = np.hstack([X, X[:, :5], np.ones((len(X), 1))])
    ours = BlockRidgeClassifier(0).fit(X, y)
    targets = np.where(y[:, None] == ours.classes_, 1.0, -1.0)
    targets = targets[:, 1:] if len(ours.classes_) == 2 else targets
    centred = X - X.mean(axis=0)
    same(ours.coef_, np.linalg.lstsq(centred, targets - targets.mean(axis=0), rcond=1e-10)[0].T, 1e-7)


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0, "auto"])
@pytest.mark.parametrize("own_priors", [False, True])
def test_lda_is_scikit_learns(digits, stored, shrinkage, own_priors):
    X, y = digits
    count = len(np.unique(y))
    priors = np.arange(1, count + 1) / np.arange(1, count + 1).sum() if own_priors else None
    theirs = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage, priors=priors).fit(X, y)
    ours = BlockLinearDiscriminantAnalysis(shrinkage, priors=priors, memory="100kB").fit(stored(X, y))
    same(ours.covariance_, theirs.covariance_)
    same(ours.coef_, theirs.coef_)
    same(ours.intercept_, theirs.intercept_)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-9)
    assert ours.predict(X).tolist() == theirs.predict(X).tolist()


def test_lda_is_also_that_of_the_eigen_solver(digits):
    X, y = digits
    theirs = LinearDiscriminantAnalysis("eigen", shrinkage=0.1).fit(X, y)
    ours = BlockLinearDiscriminantAnalysis(0.1).fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)


def test_lda_shrinks_a_class_with_a_constant_column_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 4)), np.repeat(["a", "b", "c"], 20)
    X[y == "b", 2] = 7.0
    theirs = LinearDiscriminantAnalysis("lsqr", shrinkage="auto").fit(X, y)
    same(BlockLinearDiscriminantAnalysis("auto").fit(X, y).coef_, theirs.coef_)


@pytest.mark.parametrize(
    "head", [BlockRidgeClassifier(memory="200kB"), BlockLinearDiscriminantAnalysis(memory="200kB")]
)
def test_blocks_and_float16_give_what_the_array_gives_in_bounded_memory(digits, stored, head):
    X, y = digits
    features = stored(X.astype(np.float16), y)
    coef = head.fit(features).coef_
    assert 16 <= features.most <= 200_000 / X.shape[1] / 8
    assert features.most < len(X)
    same(coef, head.fit(features.array.astype(np.float64), y).coef_, 1e-12)
    assert head.predict(features).tolist() == head.predict(features.array).tolist()


def test_large_means_cost_no_digits(digits):
    X, y = digits
    near, far = BlockRidgeClassifier().fit(X, y), BlockRidgeClassifier(memory="100kB").fit(X + 1e5, y)
    same(far.coef_, near.coef_, 1e-6)


@pytest.mark.parametrize("head", [BlockRidgeClassifier(), BlockLinearDiscriminantAnalysis()])
class TestBadInput:
    def test_one_class_is_named(self, head):
        with pytest.raises(UsageError, match="one class only: all 3 rows are labelled 'cat'"):
            head.fit(np.eye(3), ["cat"] * 3)

    @pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinity")])
    def test_rows_that_are_not_finite_are_named_when_fitting(self, head, wrap, value, kind):
        X = np.random.default_rng(0).normal(size=(9, 2))
        X[[4, 7], 1] = value
        with pytest.raises(UsageError, match=rf"contains {kind}: 2 rows \(4, 7\)"):
            head.fit(wrap(X), list("ababababa"))

    def test_rows_that_are_not_finite_are_named_when_predicting(self, head, wrap):
        X = np.random.default_rng(0).normal(size=(9, 2))
        head.fit(X, list("ababababa"))
        X[3, 0] = np.nan
        with pytest.raises(UsageError, match="contains NaN: row 3"):
            head.predict(wrap(X))

    def test_another_width_is_refused(self, head, wrap):
        head.fit(np.random.default_rng(0).normal(size=(9, 2)), list("ababababa"))
        with pytest.raises(ValueError, match=r"X has 5 features, but Block.* is expecting 2 features"):
            head.predict(wrap(np.ones((3, 5))))

    def test_rows_without_labels_are_counted(self, head, stored):
        labels = np.array(["a", None, "b", None], object)
        with pytest.raises(UsageError, match="2 of 4 rows have no label"):
            head.fit(stored(np.eye(4), labels))

    def test_as_many_labels_as_rows(self, head, stored):
        with pytest.raises(UsageError, match="4 rows of features but 3 labels"):
            head.fit(stored(np.eye(4)), ["a", "b", "c"])

    def test_labels_that_are_nan_are_named(self, head):
        with pytest.raises(UsageError, match=r"1 of 3 rows have no label \(the first is row 1\); it is nan"):
            head.fit(np.eye(3), [0.0, np.nan, 1.0])


def test_parameters_out_of_range_are_refused(digits):
    with pytest.raises(UsageError, match="alpha=-1 must be 0 or more"):
        BlockRidgeClassifier(-1).fit(*digits)
    with pytest.raises(UsageError, match="shrinkage='strong' must be None, 'auto' or a number from 0 to 1"):
        BlockLinearDiscriminantAnalysis("strong").fit(*digits)
    with pytest.raises(UsageError, match="positive numbers that sum to 1, one for each class"):
        BlockLinearDiscriminantAnalysis(priors=[0.5, 0.6, 0.1]).fit(*digits)
    with pytest.raises(UsageError, match=r"sample_weight must be finite and not negative: row 2"):
        BlockRidgeClassifier().fit(np.eye(4), list("abab"), [1, 1, -1, 1])


@parametrize_with_checks(
    [BlockRidgeClassifier(), BlockLinearDiscriminantAnalysis(), BlockLinearDiscriminantAnalysis("auto")]
)
def test_scikit_learns_conventions_hold(estimator, check):
    check(estimator)
