"""The Gaussian kernel SVM: libsvm's decision values while exact, close to them by landmarks, and it says which."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import UsageError
from featurepipe.heads.kernel import RBFSVM, _Plan, _plan


@pytest.fixture(scope="module", params=[2, 3, 10], ids=["two classes", "three classes", "ten classes"])
def sides(request):
    """Features (float32) and labels to learn from, and others."""
    X, numbers = load_digits(return_X_y=True)
    kept = numbers < request.param
    labels = np.array([f"digit {number}" for number in numbers])[kept]
    X = (X[kept] + np.random.default_rng(0).normal(0, 3, X[kept].shape)).astype(np.float32)
    return X[::2], labels[::2], X[1::2], labels[1::2]


@pytest.mark.parametrize("options", [{}, {"C": 0.05}, {"C": 30, "gamma": 1e-3}, {"gamma": "auto"}])
def test_up_to_a_size_it_is_svc(sides, stored, options):
    X, y, others, _ = sides
    theirs = SVC(break_ties=True, **options).fit(X.astype(np.float64), y)
    ours = RBFSVM(memory="200kB", **options).fit(stored(X, y))
    features = stored(others)
    np.testing.assert_allclose(ours.decision_function(features), theirs.decision_function(others), atol=1e-7)
    assert ours.predict(features).tolist() == theirs.predict(others).tolist()
    assert ours.gamma_ == pytest.approx(theirs._gamma, rel=1e-9)
    assert ours.points_.dtype == np.float32
    assert features.most < len(others)
    assert (ours.method_, ours.method_text_) == (
        "exact",
        f"exact: a support vector machine on {len(X)} rows (exact_rows=20,000)",
    )


@pytest.mark.parametrize("room", [None, "500kB"], ids=["kept", "computed again"])
@pytest.mark.parametrize("options", [{}, {"C": 30, "gamma": 1e-3}])
def test_with_room_for_kernel_matrices_it_is_the_same_machine(sides, options, room):
    X, y, others, _ = sides
    ours, slower = RBFSVM(memory=room, **options).fit(X, y), RBFSVM(memory="200kB", **options).fit(X, y)
    found, expected = ours.decision_function(others), slower.decision_function(others)
    close = np.abs(found - expected) < 0.01  # both stop at libsvm's tolerance of 0.001
    assert close.mean() > 0.999, "and a pair of classes within that tolerance may go the other way"
    assert np.mean(ours.predict(others) == slower.predict(others)) > 0.997


def test_values_of_a_class_with_itself_are_kept_where_they_fit_beside_a_pair():
    """60,000 rows of ten classes in 4 GiB: both cores have a pair, and no value is computed twice."""
    assert _plan([6000] * 10, 4, 4 << 30, 2) == _Plan(2, keeps=True)
    assert _plan([6000] * 10, 4, 3 << 30, 2) == _Plan(1, keeps=True)
    assert _plan([6000] * 10, 4, 2 << 30, 2) == _Plan(1, keeps=False)
    assert _plan([6000] * 10, 4, 1 << 30, 2).at_once == 0
    assert _plan([10_000, 8_000, *[100] * 50], 4, 5 << 30, 2) == _Plan(1, keeps=True)


def test_weights_are_svcs(sides):
    X, y, others, _ = sides
    weights = np.random.default_rng(0).uniform(0.2, 2, len(y))
    theirs = SVC(C=0.1, break_ties=True).fit(X.astype(np.float64), y, weights)
    ours = RBFSVM(C=0.1, memory="200kB").fit(X, y, weights)
    np.testing.assert_allclose(ours.decision_function(others), theirs.decision_function(others), atol=1e-7)
    unweighted = RBFSVM(C=0.1).fit(X, y)
    assert np.abs(unweighted.decision_function(others) - theirs.decision_function(others)).max() > 1e-2
    by_class = dict(zip(ours.classes_, range(1, 20), strict=False))
    together = RBFSVM(C=0.1, class_weight=by_class).fit(X, y)
    np.testing.assert_array_equal(together.weights_, RBFSVM(C=0.1).fit(X, y, [by_class[label] for label in y]).weights_)


def test_gamma_factor_multiplies_gamma(sides):
    X, y, others, _ = sides
    plain = RBFSVM().fit(X, y)
    assert RBFSVM(gamma_factor=0.5).fit(X, y).gamma_ == plain.gamma_ / 2
    same = RBFSVM(gamma=plain.gamma_ / 2).fit(X, y).decision_function(others)
    np.testing.assert_array_equal(RBFSVM(gamma_factor=0.5).fit(X, y).decision_function(others), same)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_above_it_is_an_svm_on_landmarks(sides, stored, kept):
    X, y, others, truth = sides
    if not kept:  # more rows than memory, of few different images
        X, y = np.resize(X, (600, X.shape[1])), np.resize(y, 600)
    head = RBFSVM(C=1, exact_rows=100, n_components=100, random_state=0, memory="20MB" if kept else "240kB")
    features = stored(X, y)
    head.fit(features)
    assert head.method_ == "nystroem"
    assert f"Nystroem: {len(X):,} rows are more than exact_rows=100, so 100 landmarks" in head.method_text_
    assert head.method_text_.endswith("kept in memory" if kept else "computed in every pass")
    exact = RBFSVM(C=1).fit(X, y)
    assert np.mean(head.predict(stored(others)) == truth) > np.mean(exact.predict(others) == truth) - 0.05
    assert head.points_.shape == (100, 64)


def test_with_every_row_a_landmark_the_decision_is_the_linear_svms_in_the_kernels_space():
    X, y = load_digits(n_class=2, return_X_y=True)
    X, others, y = X[:120], X[120:], np.where(y[:120] == 1, "one", "nil")
    head = RBFSVM(C=2, exact_rows=0, n_components=500).fit(X, y)
    # the squared-hinge machine is f = K a + b; at its optimum a = C * 2 * margin shortfall * label, row by row
    sign = np.where(y == "one", 1.0, -1.0)
    shortfall = np.maximum(0, 1 - sign * head.decision_function(X))
    expected = rbf_kernel(others, X, gamma=head.gamma_) @ (2 * 2 * shortfall * sign) + head.intercept_
    np.testing.assert_allclose(head.decision_function(others), expected, atol=2e-3)


def test_landmarks_are_drawn_by_the_seed(sides):
    X, y, _, _ = sides
    head = RBFSVM(exact_rows=0, n_components=20)
    points = [clone(head).set_params(random_state=seed).fit(X, y).points_ for seed in (1, 1, 2)]
    assert (points[0] == points[1]).all()
    assert (points[0] != points[2]).any()
    rows = {row.tobytes() for row in X}
    assert all(point.tobytes() in rows for point in points[0])


def test_copies_of_a_landmark_do_no_harm():
    X, y = load_digits(n_class=3, return_X_y=True)
    X, y = np.repeat(X[:60], 3, axis=0), np.repeat(y[:60], 3)
    head = RBFSVM(exact_rows=0, n_components=180).fit(X, y)
    assert np.isfinite(head.weights_).all()
    assert (head.predict(X) == y).all()


def test_a_constant_feature_matrix_has_a_gamma():
    head = RBFSVM().fit(np.ones((4, 2)), ["a", "b", "a", "b"])
    assert head.gamma_ == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": 0}, "C=0 must be positive"),
        ({"gamma": "scaled"}, "gamma='scaled' must be 'scale', 'auto' or a positive number"),
        ({"gamma": -1.0}, "gamma=-1.0 must be"),
        ({"n_components": 0}, "n_components=0 must be positive"),
        ({"gamma_factor": -2}, "gamma_factor=-2 must be positive"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        RBFSVM(**options).fit(np.eye(4), list("abab"))


WHY = "libsvm stops at a tolerance, and gamma='scale' does not see weights: both as in scikit-learn's SVC"


@parametrize_with_checks(
    [RBFSVM(), RBFSVM(exact_rows=0, n_components=20, random_state=0)],
    expected_failed_checks=lambda head: {"check_sample_weight_equivalence_on_dense_data": WHY},
)
def test_scikit_learns_conventions_hold(estimator, check):
    check(estimator)
