"""The block-wise linear classifiers: scikit-learn's checks, and scikit-learn's optimum, on features that make solvers stumble."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import ArrayBlocks
from featurepipe.heads.linear import passes
from featurepipe.heads.linear.classifiers import BlockLinearSVC, BlockLogisticRegression, fit_path
from featurepipe.heads.row_shards import row_shards_of


def digits():
    return load_digits(return_X_y=True)


def ill_conditioned():
    """Columns nearly dependent, condition number about 1e6."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((600, 4))
    features = hidden @ rng.standard_normal((4, 20)) + 1e-3 * rng.standard_normal((600, 20)) * np.logspace(0, -3, 20)
    return features, (hidden[:, :3] + 0.7 * rng.standard_normal((600, 3))).argmax(axis=1)


def constant_columns():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((500, 8))
    features[:, [0, 3, 7]] = [0, 1000, -1e-3]
    return features, (features[:, 1] + 0.5 * rng.standard_normal(500) > 0) + 2 * (features[:, 2] > 1)


def single_sample_class():
    rng = np.random.default_rng(2)
    labels = np.r_[rng.integers(0, 3, 299), 3]
    return rng.standard_normal((300, 6)) + np.eye(4, 6)[labels], labels


def unscaled():
    """Columns of scales from 1e-3 to 1e4, with means many deviations from zero."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 800)
    features = (rng.standard_normal((800, 9)) + 0.8 * np.eye(4, 9)[labels] + 20) * np.logspace(-3, 4, 9)
    return features, labels


def two_classes():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 400)
    return rng.standard_normal((400, 5)) + 0.6 * labels[:, None], np.array(["no", "yes"])[labels]


CASES = [digits, ill_conditioned, constant_columns, single_sample_class, unscaled, two_classes]
CS = [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]


@parametrize_with_checks([BlockLogisticRegression(), BlockLinearSVC()])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def objective(head, features, labels, C, weights=1.0):
    """What is minimised, in float64, written here once more."""
    codes = np.searchsorted(head.classes_, labels)
    scores = features.astype(np.float64) @ head.coef_.T.astype(np.float64) + head.intercept_
    if len(head.classes_) == 2:
        losses = np.logaddexp(0, np.where(codes == 1, -1, 1) * scores[:, 0])
    else:
        losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(codes)), codes]
    return C * (weights * losses).sum() + (head.coef_.astype(np.float64) ** 2).sum() / 2


@functools.cache
def least(case, C):
    """The least value of the objective: Newton's method with the whole second derivative, on equilibrated columns."""
    features, labels = case()
    classes, codes = np.unique(labels, return_inverse=True)
    count = len(classes) if len(classes) > 2 else 1
    shift, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale < 1e-9] = 1
    design = np.column_stack([(features - shift) / scale, np.ones(len(features))])
    ridge = np.tile(np.append(scale**-2.0, 0), count)
    target = np.eye(len(classes))[codes][:, -count:]

    def parts(point):
        scores = design @ point.reshape(count, -1).T
        full = np.column_stack([np.zeros(len(scores)), scores]) if count == 1 else scores
        total = np.logaddexp.reduce(full, axis=1)
        likely = np.exp(full - total[:, None])[:, -count:]
        value = C * (total - (scores * target).sum(axis=1)).sum() + (ridge * point**2).sum() / 2
        return value, likely

    point = np.zeros(count * design.shape[1])
    value, likely = parts(point)
    for _ in range(200):
        gradient = C * ((likely - target).T @ design).ravel() + ridge * point
        blocks = [
            [design.T @ ((likely[:, [i]] * ((i == j) - likely[:, [j]])) * design) for j in range(count)]
            for i in range(count)
        ]
        second = C * np.block(blocks) + np.diag(ridge)
        second += 1e-12 * np.diagonal(second).max() * np.eye(len(second))  # the softmax's intercepts are redundant
        direction = -np.linalg.solve(second, gradient)
        step = 1.0
        while step > 1e-9 and parts(point + step * direction)[0] > value + 1e-4 * step * gradient @ direction:
            step /= 2
        point = point + step * direction
        before, (value, likely) = value, parts(point)
        if before - value <= 1e-13 * value:
            break
    return value


@functools.cache
def reference(case, C, fit_intercept=True):
    """scikit-learn's second-order solver, as far as it gets."""
    features, labels = case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"solver": "newton-cholesky", "tol": 1e-10, "max_iter": 2000, "fit_intercept": fit_intercept}
        return LogisticRegression(C=C, **options).fit(features, labels)


SLOW = [pytest.param(digits, marks=pytest.mark.slow), *CASES[1:]]  # the references take 20 s


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", SLOW)
def test_every_c_reaches_scikit_learns_optimum_in_shared_passes(case, dtype):
    features, labels = case()
    features = features.astype(dtype)
    [heads] = fit_path(BlockLogisticRegression(), features, labels, Cs=CS)
    for C, head in zip(CS, heads, strict=True):
        other = reference(case, C)
        ours, theirs = objective(head, features, labels, C), objective(other, features, labels, C)
        assert ours <= theirs * (1 + 1e-5)
        assert least(case, C) * (1 - 1e-7) <= ours <= least(case, C) * (1 + 1e-5)
        if theirs <= ours * (1 + 1e-5):  # scikit-learn too stops early on columns that are not scaled
            assert (head.predict(features) != other.predict(features)).sum() <= max(1, len(labels) // 1000)


@pytest.mark.slow
@pytest.mark.parametrize("case", [digits, unscaled, constant_columns])
def test_float32_arithmetic_suffices(case, monkeypatch):
    monkeypatch.setattr(passes, "_SMALL_BYTES", 0)
    features, labels = case()
    features = features.astype(np.float32)
    [heads] = fit_path(BlockLogisticRegression(), features, labels, Cs=[1e-3, 0.1, 10])
    for C, head in zip([1e-3, 0.1, 10], heads, strict=True):
        assert objective(head, features, labels, C) <= least(case, C) * (1 + 1e-5)
        assert (head.predict(features) != reference(case, C).predict(features)).sum() <= max(1, len(labels) // 1000)


def test_without_an_intercept_the_optimum_is_scikit_learns():
    features, labels = unscaled()
    head = BlockLogisticRegression(C=0.1, fit_intercept=False).fit(features, labels)
    other = reference(unscaled, 0.1, fit_intercept=False)
    assert not head.intercept_.any()
    assert objective(head, features, labels, 0.1) <= objective(other, features, labels, 0.1) * (1 + 1e-5)


def test_all_values_of_c_and_all_folds_share_each_pass(monkeypatch):
    counts = []
    call = passes.Passes.__call__

    def counted(self, numbers, requests):
        counts.append(len(numbers))
        return call(self, numbers, requests)

    monkeypatch.setattr(passes.Passes, "__call__", counted)
    features, labels = two_classes()
    folds = [np.arange(0, 300), np.arange(100, 400)]
    paths = fit_path(BlockLogisticRegression(), features, labels, Cs=[0.01, 1], folds=folds)
    assert counts[0] == 4
    slowest = max(int(head.n_iter_[0]) for path in paths for head in path)
    assert len(counts) <= 1.5 * slowest + 2
    assert counts == sorted(counts, reverse=True)  # whoever is done drops out


def test_folds_are_fits_of_their_rows_even_where_classes_are_missing():
    features, labels = single_sample_class()
    folds = [np.arange(0, 200), np.arange(100, 300), labels < 2]
    paths = fit_path(BlockLogisticRegression(tol=1e-9), features, labels, Cs=[0.1, 1], folds=folds)
    for fold, path in zip(folds, paths, strict=True):
        for C, head in zip([0.1, 1], path, strict=True):
            alone = BlockLogisticRegression(C=C, tol=1e-9).fit(features[fold], labels[fold])
            assert head.C == C
            np.testing.assert_array_equal(head.classes_, np.unique(labels[fold]))
            np.testing.assert_allclose(head.coef_, alone.coef_, atol=2e-4)
            assert head.predict(features).shape == (300,)


@pytest.mark.parametrize("case", [digits, ill_conditioned, constant_columns, single_sample_class, two_classes])
@pytest.mark.parametrize("kind", [BlockLogisticRegression, BlockLinearSVC])
def test_overlapping_folds_reach_the_optima_of_folds_fitted_apart(case, kind):
    features, labels = case()
    weights = np.random.default_rng(5).uniform(0.5, 2, len(labels))
    part = np.random.default_rng(6).integers(0, 4, len(labels))
    folds = [part != number for number in range(4)]
    options = {"Cs": [0.01, 1], "folds": folds, "sample_weight": weights}
    apart = fit_path(kind(tol=1e-8), features, labels, **options)
    together = fit_path(kind(tol=1e-5), features, labels, **options, overlapping=True)
    for fold, ones, others in zip(folds, together, apart, strict=True):
        for one, other in zip(ones, others, strict=True):
            np.testing.assert_array_equal(one.classes_, other.classes_)
            learned = features[fold], labels[fold], one.C
            if kind is BlockLogisticRegression:
                values = [objective(head, *learned, weights[fold]) for head in (one, other)]
                assert values[0] <= values[1] * (1 + 1e-5)
                np.testing.assert_allclose(one.predict_proba(features), other.predict_proba(features), atol=5e-3)
            else:
                np.testing.assert_allclose(one.coef_, other.coef_, atol=0.02 * np.abs(other.coef_).max())


def test_overlapping_folds_measure_curvature_once_for_all(monkeypatch):
    asked = []
    values = passes.Passes._values

    def watched(self, problems, requests):
        asked.extend(request.curvature for request in requests)
        return values(self, problems, requests)

    monkeypatch.setattr(passes.Passes, "_values", watched)
    features, labels = digits()
    part = np.random.default_rng(6).integers(0, 5, len(labels))
    folds = [part != number for number in range(5)]
    counts = {}
    for overlapping in (False, True):
        asked.clear()
        fit_path(BlockLogisticRegression(), features, labels, Cs=[1e-3], folds=folds, overlapping=overlapping)
        counts[overlapping] = len(asked), sum(map(bool, asked))
    assert counts[True][1] <= counts[False][1] / 4
    assert counts[True][0] < counts[False][0]
    assert [kind for kind in asked if kind] == [
        "shared",
        "each",
    ]  # the latter where the fit of all rows ends, and folds start
    assert asked.index("each") > 3


@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 1: 0.5, 2: 1, 3: 1}])
def test_weights_of_rows_and_classes_are_those_of_scikit_learn(class_weight):
    features, labels = unscaled()
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    labels = np.where(labels == 1, 0, labels) if class_weight is None else labels
    weights = np.random.default_rng(0).random(len(labels)) * 2
    options = {"C": 0.3, "class_weight": class_weight}
    head = BlockLogisticRegression(**options, tol=1e-9).fit(features, labels, sample_weight=weights)
    other = LogisticRegression(**options, tol=1e-9, max_iter=2000).fit(features, labels, sample_weight=weights)
    np.testing.assert_allclose(head.predict_proba(features), other.predict_proba(features), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_streamed_features_give_what_arrays_give(stored, monkeypatch):
    monkeypatch.setattr(passes, "_SMALL_BYTES", 0)
    features, labels = digits()
    features = features.astype(stored)
    streamed = BlockLogisticRegression(memory=200_000).fit(ArrayBlocks(features), labels)
    kept = BlockLogisticRegression().fit(features, labels)
    assert objective(streamed, features, labels, 1) == pytest.approx(objective(kept, features, labels, 1), rel=1e-5)
    np.testing.assert_array_equal(streamed.predict(ArrayBlocks(features)), kept.predict(features))


def test_wide_features_are_solved_with_a_diagonal(monkeypatch):
    monkeypatch.setattr(passes, "WIDEST", 10)
    features, labels = digits()
    head = BlockLogisticRegression(C=0.01).fit(features, labels)
    other = reference(digits, 0.01)
    assert objective(head, features, labels, 0.01) <= objective(other, features, labels, 0.01) * (1 + 1e-5)


def test_string_labels_are_kept_and_probabilities_are_those_of_the_scores():
    features, labels = two_classes()
    head = BlockLogisticRegression().fit(features, labels)
    assert head.classes_.tolist() == ["no", "yes"]
    likely = head.predict_proba(features)
    np.testing.assert_allclose(likely.sum(axis=1), 1)
    np.testing.assert_allclose(likely[:, 1], 1 / (1 + np.exp(-head.decision_function(features))))
    np.testing.assert_allclose(np.exp(head.predict_log_proba(features)), likely)
    assert (head.predict(features) == labels).mean() > 0.7


def test_stopping_early_warns_and_names_max_iter():
    features, labels = digits()
    with pytest.warns(ConvergenceWarning, match="1 of 1 fits of BlockLogisticRegression stopped after max_iter=3"):
        BlockLogisticRegression(max_iter=3).fit(features, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": 0}, "C=0 of BlockLogisticRegression must be positive"),
        ({"tol": -1}, "tol=-1"),
        ({"max_iter": 0}, "max_iter=0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(options, message):
    features, labels = two_classes()
    with pytest.raises(UsageError, match=message):
        BlockLogisticRegression(**options).fit(features, labels)


def test_a_fold_of_one_class_is_refused_by_name():
    features, labels = two_classes()
    with pytest.raises(UsageError, match=r"at least 2 classes.*'yes'"):
        fit_path(BlockLogisticRegression(), features, labels, Cs=[1], folds=[labels == "yes"])


def hinge_objectives(head, features, labels, C, intercept_penalty=1.0):
    """What the SVM minimises for each class."""
    positives = head.classes_ if len(head.classes_) > 2 else head.classes_[1:]
    scores = features.astype(np.float64) @ head.coef_.T + head.intercept_
    signs = np.where(np.asarray(labels)[:, None] == positives, 1, -1)
    penalty = (head.coef_**2).sum(axis=1) + intercept_penalty * head.intercept_**2
    return C * (np.maximum(0, 1 - signs * scores) ** 2).sum(axis=0) + penalty / 2


@functools.cache
def svm_reference(case, C, intercept_scaling=1.0, fit_intercept=True):
    """LIBLINEAR's primal solver, as far as it gets."""
    features, labels = case()
    options = {"intercept_scaling": intercept_scaling, "fit_intercept": fit_intercept}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LinearSVC(C=C, dual=False, tol=1e-10, max_iter=20_000, **options).fit(features, labels)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", SLOW)
def test_the_svm_reaches_liblinears_optimum_for_each_class(case, dtype):
    features, labels = case()
    features = features.astype(dtype)
    [heads] = fit_path(BlockLinearSVC(), features, labels, Cs=CS)
    for C, head in zip(CS, heads, strict=True):
        other = svm_reference(case, C)
        ours, theirs = (hinge_objectives(model, features, labels, C) for model in (head, other))
        assert (ours <= theirs * (1 + 1e-5)).all()
        assert ours.sum() >= theirs.sum() * (1 - 1e-2)
        if ours.sum() >= theirs.sum() * (1 - 1e-5):  # LIBLINEAR stops early on columns that are not scaled
            assert (head.predict(features) != other.predict(features)).sum() <= max(1, len(labels) // 1000)


@pytest.mark.parametrize("intercept_scaling", [0.1, 10.0])
def test_the_intercept_is_penalised_as_a_feature_of_that_value(intercept_scaling):
    features, labels = unscaled()
    features = features / features.std(axis=0)
    head = BlockLinearSVC(C=0.01, intercept_scaling=intercept_scaling, tol=1e-9).fit(features, labels)
    other = svm_reference(unscaled_to_deviation, 0.01, intercept_scaling)
    np.testing.assert_allclose(head.intercept_, other.intercept_, rtol=1e-3)
    np.testing.assert_allclose(head.coef_, other.coef_, atol=1e-4)


def unscaled_to_deviation():
    features, labels = unscaled()
    return features / features.std(axis=0), labels


def test_a_free_intercept_is_the_limit_of_a_large_scaling():
    features, labels = two_classes()
    free = BlockLinearSVC(C=0.1, penalise_intercept=False, tol=1e-10).fit(features, labels)
    other = svm_reference(two_classes, 0.1, 1e4)
    np.testing.assert_allclose(free.intercept_, other.intercept_, rtol=1e-3)
    np.testing.assert_allclose(free.coef_, other.coef_, atol=1e-4)
    with pytest.raises(UsageError, match="intercept_scaling=0 must be positive"):
        BlockLinearSVC(intercept_scaling=0).fit(features, labels)


def test_the_svm_without_an_intercept_is_liblinears():
    features, labels = two_classes()
    head = BlockLinearSVC(fit_intercept=False, tol=1e-9).fit(features, labels)
    np.testing.assert_allclose(head.coef_, svm_reference(two_classes, 1.0, 1.0, fit_intercept=False).coef_, atol=1e-4)
    assert not head.intercept_.any()


def test_where_float32_gets_stuck_float64_goes_on(monkeypatch):
    """``finished`` takes the problems that stopped early, from where they stopped, and no others."""
    from featurepipe.heads.linear import classifiers as linear
    from featurepipe.heads.linear.optimisers import Optimum

    prepared = passes.Prepared(None, np.dtype(np.float32), np.ones(3, np.float32), centred=False)
    asked = []

    def solve(method, features, chosen, starts, iterations):
        asked.append((method.__name__, features.dtype, features.mean.dtype, list(chosen), starts, list(iterations)))
        is_last = method.__name__ == "newton"
        return [Optimum(start + 1, 5, converged=is_last or chosen[place] == 3) for place, start in enumerate(starts)]

    stopped = [Optimum(np.full((1, 4), float(i)), 7, converged=i not in (1, 3)) for i in range(4)]
    found = linear.finished(stopped, prepared, 100, solve)
    first, second = asked
    assert first[:4] == ("lbfgs", np.float64, np.float64, [1, 3])
    assert second[:4] == ("newton", np.float64, np.float64, [1])  # what L-BFGS has not finished
    assert (first[5], second[5]) == ([93, 93], [88])
    np.testing.assert_array_equal(first[4][0], np.ones((1, 4)))
    np.testing.assert_array_equal(second[4][0], np.full((1, 4), 2.0))
    assert [(one.point[0, 0], one.iterations, one.converged) for one in found] == [
        (0, 7, True),
        (3, 17, True),
        (2, 7, True),
        (4, 12, True),
    ]
    at_the_end = [Optimum(np.zeros((1, 4)), 100, converged=False)]
    assert linear.finished(at_the_end, prepared, 100, solve) == at_the_end  # it had its iterations
    assert len(asked) == 2


@pytest.mark.parametrize("loss", ["SoftmaxLoss", "BinomialLoss", "SquaredHingeLoss"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_products_with_the_second_derivative_are_differences_of_gradients(loss, intercept, centred):
    """Also beside requests for values, in the same call."""
    from featurepipe.heads.linear import losses
    from featurepipe.heads.linear.optimisers import Evaluate

    rng = np.random.default_rng(0)
    features, codes = rng.standard_normal((50, 4)) + 2, rng.integers(0, 3, 50)
    mean = features.mean(axis=0) if intercept else np.zeros(4)
    shards = row_shards_of(features - mean if centred else features)
    prepared = passes.Prepared(shards, np.dtype(float), mean, centred)
    weights = rng.uniform(0, 2, (2, 50))
    problems = [passes.FitProblem(0, 0.7, 1), passes.FitProblem(1, 3.0, 2)]
    ask = passes.Passes(
        prepared, codes, weights, problems, getattr(losses, loss)(),
        intercept=intercept, intercept_penalty=0.5 if loss == "SquaredHingeLoss" else 0.0, memory=None,
    )  # fmt: skip
    shape = (3 if loss == "SoftmaxLoss" else 1, 4 + intercept)
    points, towards = rng.standard_normal((2, 2, *shape))
    if loss == "SoftmaxLoss":
        points, towards = (array - array.mean(axis=1, keepdims=True) for array in (points, towards))
    products = ask([0, 1], [Evaluate(point, along=along) for point, along in zip(points, towards, strict=True)])
    for number, (point, along) in enumerate(zip(points, towards, strict=True)):
        step = 1e-6
        [above, product] = ask([number, number], [Evaluate(point + step * along), Evaluate(point, along=along)])
        [below] = ask([number], [Evaluate(point - step * along)])
        assert (above.bound > 0) == (loss == "SoftmaxLoss")  # others do not stop by it
        expected = (above.gradient - below.gradient) / (2 * step)
        np.testing.assert_allclose(products[number].gradient, expected, atol=1e-5)
        np.testing.assert_allclose(product.gradient, products[number].gradient, rtol=1e-12)
        assert np.abs(expected).max() > 0.1
