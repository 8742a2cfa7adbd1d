"""Scores of every family in one form, temperatures that maximise likelihood, and calibration errors by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from featurepipe.errors import UsageError
from featurepipe.heads.calibration import (
    class_scores,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
)
from featurepipe.heads.families import HEADS, make_head
from featurepipe.training.fit import HeldOut, calibrate

QUICK = {"xgboost": {"n_estimators": 5, "n_jobs": 1}}


@pytest.fixture(scope="module", params=[2, 3, 10])
def sides(request):
    """Features and labels to learn from, and others: of two classes, three (as many as pairs), and ten."""
    X, numbers = load_digits(return_X_y=True)
    kept = numbers < request.param
    labels = np.array([f"digit {number}" for number in numbers])[kept]
    X = X[kept] + np.random.default_rng(0).normal(0, 3, X[kept].shape)
    return X[::2], labels[::2], X[1::2], labels[1::2]


def noisy_scores(rows=400, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(classes, size=rows)
    scores = rng.normal(0, 1.5, (rows, classes))
    scores[np.arange(rows), codes] += 2
    return scores, codes


@pytest.mark.parametrize("name", HEADS)
def test_the_largest_score_is_the_prediction_for_every_family(sides, stored, name):
    X, y, others, _ = sides
    head = make_head(name, **QUICK.get(name, {})).fit(X, y)
    scores = class_scores(head, stored(others), memory="100kB")
    assert scores.shape == (len(others), len(head.classes_))
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert head.classes_[scores.argmax(axis=1)].tolist() == head.predict(others).tolist()
    np.testing.assert_allclose(class_scores(head, others), scores, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, family in HEADS.items() if family.probabilities and name != "knn"])
def test_families_with_probabilities_give_their_logarithms(sides, name):
    X, y, others, _ = sides
    head = make_head(name, **QUICK.get(name, {})).fit(X, y)
    np.testing.assert_allclose(np.exp(class_scores(head, others)), head.predict_proba(others), atol=1e-9)


def test_margins_of_two_classes_become_two_columns_whose_difference_they_are():
    X, numbers = load_digits(n_class=2, return_X_y=True)
    head = make_head("linear-svm").fit(X, numbers)
    scores = class_scores(head, X)
    np.testing.assert_allclose(scores[:, 1] - scores[:, 0], head.decision_function(X))
    np.testing.assert_allclose(scores.sum(axis=1), 0, atol=1e-12)


def test_certain_logistic_heads_are_told_apart_beyond_what_probabilities_hold():
    head = LogisticRegression().fit([[-1.0], [1.0]], [0, 1])
    head.coef_ = np.array([[1000.0]])
    head.intercept_ = np.array([0.0])
    np.testing.assert_allclose(class_scores(head, [[2.0], [3.0]]), [[-2000, 0], [-3000, 0]])


def test_no_neighbour_is_improbable_but_not_impossible():
    head = KNeighborsClassifier(2).fit([[0.0], [1], [10], [11]], ["a", "a", "b", "b"])
    np.testing.assert_allclose(np.exp(class_scores(head, [[0.4]])), [[2.5 / 3, 0.5 / 3]])


def test_scores_for_pairs_of_classes_never_pass_as_scores_of_classes(sides):
    X, y, others, _ = sides
    head = SVC(decision_function_shape="ovo").fit(X, y)
    with pytest.raises(UsageError, match=r"one value for each pair of classes.*decision_function_shape='ovr'"):
        class_scores(head, others)


def test_svc_and_a_pipeline_around_it_give_decision_values(sides):
    X, y, others, _ = sides
    head = make_pipeline(StandardScaler(), SVC(break_ties=True)).fit(X, y)
    scores, values = class_scores(head, others), head.decision_function(others)
    np.testing.assert_allclose(scores if values.ndim == 2 else scores[:, 1] - scores[:, 0], values, atol=1e-12)


def test_one_against_rest_logistic_gives_its_own_probabilities():
    X, y = load_digits(n_class=2, return_X_y=True)
    head = LogisticRegression(solver="liblinear").fit(X, y)
    np.testing.assert_allclose(np.exp(class_scores(head, X)), head.predict_proba(X), atol=1e-9)


def test_a_head_without_scores_is_refused():
    class Mute(ClassifierMixin, BaseEstimator):
        classes_ = np.array(["a", "b"])

    with pytest.raises(UsageError, match="Mute has neither predict_log_proba nor decision_function"):
        class_scores(Mute(), np.eye(2))


def test_probabilities_are_the_softmax_of_divided_scores():
    found = probabilities(np.log([[1.0, 3.0], [4.0, 4.0]]) * 2, temperature=2)
    np.testing.assert_allclose(found, [[0.25, 0.75], [0.5, 0.5]])
    assert probabilities(np.array([[1e4, -1e4]])).tolist() == [[1, 0]]


@pytest.mark.parametrize("factor", [1e-3, 3.0, 1e6])
def test_scores_times_a_factor_have_that_temperature_times_the_factor(factor):
    scores, codes = noisy_scores()
    assert fit_temperature(scores * factor, codes) == pytest.approx(factor * fit_temperature(scores, codes), rel=1e-8)


def test_the_temperature_is_where_likelihood_peaks():
    scores, codes = noisy_scores()
    best = fit_temperature(scores, codes)
    # each label right but for one part in n + 2, shared out over the classes
    targets = np.full(scores.shape, 1 / (len(scores) + 2) / scores.shape[1])
    targets[np.arange(len(codes)), codes] += 1 - 1 / (len(scores) + 2)

    def loss(temperature):
        return -(targets * np.log(probabilities(scores, temperature))).sum(axis=1).mean()

    assert all(loss(best * factor) > loss(best) for factor in (0.9, 0.999, 1.001, 1.1))
    assert negative_log_likelihood(scores, codes, best) < negative_log_likelihood(scores, codes)


def test_labels_drawn_from_the_probabilities_have_temperature_one():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (40_000, 5))
    cumulated = probabilities(scores).cumsum(axis=1)
    codes = (rng.random((len(scores), 1)) > cumulated[:, :-1]).sum(axis=1)
    assert fit_temperature(scores, codes) == pytest.approx(1, abs=0.02)
    assert fit_temperature(3 * scores, codes) == pytest.approx(3, abs=0.06)
    assert expected_calibration_error(probabilities(scores), codes) < 0.01
    assert expected_calibration_error(probabilities(3 * scores), codes) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_likelihood_never_gets_worse(seed):
    rng = np.random.default_rng(seed)
    scores, codes = rng.normal(0, 10.0 ** rng.integers(-3, 4), (5, 3)), rng.integers(3, size=5)
    best = fit_temperature(scores, codes)
    assert best > 0
    assert negative_log_likelihood(scores, codes, best) <= negative_log_likelihood(scores, codes)


def test_scores_that_have_no_best_temperature_get_a_finite_one():
    right = np.array([[1.0, 0], [0, 1]])
    few = fit_temperature(right, np.array([0, 1]))
    assert probabilities(right, few)[0, 0] == pytest.approx(1 - 1 / 4 / 2)  # two right of two: not certain at all
    many = fit_temperature(np.tile(right, (500, 1)), np.tile([0, 1], 500))
    assert probabilities(right, many)[0, 0] == pytest.approx(1 - 1 / 1002 / 2)
    assert 100 < fit_temperature(right, np.array([1, 0])) < np.inf
    assert fit_temperature(np.zeros((4, 3)), np.array([0, 1, 2, 0])) == 1


def test_calibration_error_by_hand():
    confident = np.array([0.95, 0.95, 0.85, 0.65, 0.6])
    scores = np.stack([confident, 1 - confident], axis=1)
    codes = np.array([0, 1, 0, 0, 1])
    # five bins of 0.2: (0.8, 1] holds three, two right: |2 - 2.75| / 5; (0.6, 0.8] holds 0.65, right: |1 - 0.65| / 5;
    # (0.4, 0.6] holds 0.6, wrong: |0 - 0.6| / 5
    assert expected_calibration_error(scores, codes, bins=5) == pytest.approx((0.75 + 0.35 + 0.6) / 5)
    # one bin: |3 - 4| / 5
    assert expected_calibration_error(scores, codes, bins=1) == pytest.approx(0.2)


def test_certainty_belongs_to_the_last_bin():
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert expected_calibration_error(certain, np.array([0, 0])) == 0
    assert expected_calibration_error(certain, np.array([0, 1])) == 0.5


@pytest.mark.parametrize("function", [fit_temperature, expected_calibration_error, negative_log_likelihood])
def test_what_cannot_be_compared_is_refused(function):
    with pytest.raises(UsageError, match=r"scores of shape \(0, 3\)"):
        function(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(UsageError, match=r"classes of shape \(3,\)"):
        function(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(UsageError, match="classes from 0 to 3 are not columns of 3 scores"):
        function(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(UsageError, match="1 rows of scores are not finite, the first is row 1"):
        function(np.array([[0.0, 1], [np.nan, 1]]), np.array([0, 1]))


@pytest.mark.parametrize(("factor", "most"), [(0.5, -0.05), (0.75, 0.0), (1.0, 0.006), (1.5, 0.0), (3.0, -0.3)])
def test_calibrating_on_28_images_is_on_average_no_worse_than_not_calibrating(factor, most):
    """By the log-loss of other images; where scores are right as they are, a fitted temperature alone costs 0.016 nats."""
    rng = np.random.default_rng(0)
    changes, fitted = [], []
    for _ in range(150):
        logits = rng.normal(0, 2, (1028, 5))
        cumulated = probabilities(logits).cumsum(axis=1)
        codes = (rng.random((len(logits), 1)) > cumulated[:, :-1]).sum(axis=1)
        names = tuple("abcde")
        held = HeldOut(np.arange(28), codes[:28], factor * logits[:28], names)
        found = calibrate(held, lambda _: None)
        others, truth = factor * logits[28:], codes[28:]
        free = fit_temperature(factor * logits[:28], codes[:28])
        none = negative_log_likelihood(others, truth)
        changes.append(negative_log_likelihood(others, truth, found.temperature) - none)
        fitted.append(negative_log_likelihood(others, truth, free) - none)
    assert np.mean(changes) < most
    if factor == 1:
        assert np.mean(changes) < 0.4 * np.mean(fitted)


def test_many_images_are_calibrated_even_by_little():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (400, 5))
    codes = (rng.random((400, 1)) > probabilities(logits).cumsum(axis=1)[:, :-1]).sum(axis=1)
    said = []
    many = calibrate(HeldOut(np.arange(400), codes, logits, tuple("abcde")), said.append)
    assert many.temperature == fit_temperature(logits, codes) != 1
    few = calibrate(HeldOut(np.arange(28), codes[-28:], logits[-28:], tuple("abcde")), said.append)
    assert (few.temperature, few.ece_before) == (1, few.ece_after)
    assert len(said) == 1
    assert "28 validation images are few" in said[0]
    assert "stay as the head gives them" in said[0]
