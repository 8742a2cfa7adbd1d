"""Heads for ordered classes against an independent optimiser, and the quadratic weighted kappa with its interval."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import cohen_kappa_score

from featurepipe.errors import UsageError
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.families import make_head
from featurepipe.heads.linear.ordinal import OrdinalLogisticRegression
from featurepipe.heads.statistics.metrics import score_table
from featurepipe.heads.statistics.regression import kappa_limits, quadratic_kappa

ORDER = ["none", "mild", "severe"]


def made(rows=200, width=5, seed=0):
    """Features, and grades that follow from one direction but for noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width))
    hidden = x @ np.linspace(1, -1, width) + rng.logistic(size=rows) / 2
    return x, np.array(ORDER)[np.searchsorted([-1, 1.2], hidden)]


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_each_step_is_at_the_optimum_that_another_optimiser_finds(wrap, weighted):
    x, y = made()
    weights = np.random.default_rng(1).uniform(0.2, 3, len(y)) if weighted else None
    head = OrdinalLogisticRegression(C=0.7, order=ORDER, tol=1e-10).fit(wrap(x), y, sample_weight=weights)
    assert head.classes_.tolist() == ORDER
    w = np.ones(len(y)) if weights is None else weights
    for step in range(2):
        signs = np.where(np.array([ORDER.index(name) for name in y]) > step, 1.0, -1.0)

        def objective(at, signs=signs):
            margins = signs * (x @ at[:-1] + at[-1])
            return 0.7 * (w * np.logaddexp(0, -margins)).sum() + at[:-1] @ at[:-1] / 2

        best = minimize(objective, np.zeros(6), method="BFGS", options={"gtol": 1e-7}).x
        np.testing.assert_allclose(head.coef_[step], best[:-1], atol=1e-4)
        assert head.intercept_[step] == pytest.approx(best[-1], abs=1e-4)


def test_probabilities_are_the_differences_of_steps_that_never_rise():
    x, y = made(rows=40, seed=3)  # few rows, whose steps cross
    head = OrdinalLogisticRegression(C=100.0, order=ORDER).fit(x, y)
    far = 30 * np.random.default_rng(0).standard_normal((500, 5))
    raw = far @ head.coef_.T + head.intercept_
    assert (raw[:, 1] > raw[:, 0]).any()
    steps = head.step_scores(far)
    np.testing.assert_allclose(steps[:, 1], raw.min(axis=1))
    found = head.predict_proba(far)
    assert found.min() >= 1e-6 / 1.01
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(np.exp(head.predict_log_proba(far)), found)
    above = 1 / (1 + np.exp(-head.step_scores(x)))
    expected = np.stack([1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1]], axis=1).clip(1e-6)
    np.testing.assert_allclose(head.predict_proba(x), expected / expected.sum(axis=1, keepdims=True), rtol=1e-9)
    assert (head.predict(x) == np.array(ORDER)[head.predict_proba(x).argmax(axis=1)]).all()


def test_the_order_is_that_of_the_classes_that_rows_have():
    x, y = made()
    head = OrdinalLogisticRegression(order=["never", *ORDER]).fit(x[y != "mild"], y[y != "mild"])
    assert head.classes_.tolist() == ["none", "severe"]
    assert head.predict_proba(x).shape == (200, 2)
    assert OrdinalLogisticRegression().fit(x, y).classes_.tolist() == sorted(ORDER)
    with pytest.raises(UsageError, match=r"1 classes are not in the order \['none', 'mild'\]: \['severe'\]"):
        OrdinalLogisticRegression(order=ORDER[:2]).fit(x, y)
    with pytest.raises(UsageError, match="names a class twice"):
        OrdinalLogisticRegression(order=[*ORDER, "mild"]).fit(x, y)
    with pytest.raises(
        UsageError, match="head 'ridge' learns multiclass and multilabel and continuous targets, not ordinal"
    ):
        make_head("ridge", target_type="ordinal")


def test_a_bundle_keeps_the_order(bundle_of, tmp_path):
    x, y = made()
    head = make_head("logistic", target_type="ordinal", order=ORDER, pca=3).fit(x, y)
    made_ = bundle_of(head, ordered=True)
    read = read_bundle(write_bundle(tmp_path / "b", made_))
    assert (read.ordered, read.classes) == (True, tuple(ORDER))
    np.testing.assert_array_equal(read.probabilities(x), made_.probabilities(x))
    np.testing.assert_array_equal(read.predict(x), head.predict(x))


def test_the_kappa_is_scikit_learns_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    truth = rng.integers(4, size=80)
    likely = rng.dirichlet(np.ones(4), size=80) + np.eye(4)[truth] * 0.4
    likely /= likely.sum(axis=1, keepdims=True)
    found = score_table(likely, truth, list("abcd"), ordered=True, bootstrap=500)["quadratic_kappa"]
    assert found["value"] == pytest.approx(cohen_kappa_score(truth, likely.argmax(axis=1), weights="quadratic"))
    assert found["low"] < found["value"] < found["high"]
    assert "quadratic_kappa" not in score_table(likely, truth, list("abcd"), bootstrap=0)
    twice = score_table(
        np.tile(likely, (2, 1)), np.tile(truth, 2), list("abcd"), ordered=True, groups=[str(i % 80) for i in range(160)],
        bootstrap=500,
    )["quadratic_kappa"]  # fmt: skip
    assert twice["value"] == pytest.approx(found["value"])
    assert twice["high"] - twice["low"] == pytest.approx(found["high"] - found["low"], rel=0.15)
    constant = score_table([[0.9, 0.1]] * 9, [0] * 9, ["a", "b"], ordered=True)["quadratic_kappa"]
    assert (constant["value"], constant["reason"]) == (None, "one and the same class is true and predicted throughout")
    low, high = kappa_limits(truth, truth, 4, draws=500, seed=0)
    assert (low < 0.99, high) == (True, 1.0)


def test_intervals_of_the_kappa_hold_the_true_one_as_often_as_they_say():
    rng = np.random.default_rng(0)

    def draw(count):
        hidden = rng.standard_normal(count)
        return [np.searchsorted([-0.5, 0.8], values) for values in (hidden, hidden + rng.standard_normal(count))]

    true = quadratic_kappa(*draw(400_000), 3)
    limits = [kappa_limits(*draw(60), 3, draws=200, seed=seed) for seed in range(200)]
    assert np.mean([low <= true <= high for low, high in limits]) > 0.92
