"""Errors of predicted numbers are scikit-learn's, and intervals hold the truth as often as they say."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score, root_mean_squared_error

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.intervals import units_of
from featurepipe.heads.statistics.regression import (
    conformal_half_width,
    least_units,
    number_table,
    numbers_text,
    quadratic_kappa,
)
from featurepipe.heads.statistics.transferability import log_me_of_numbers


def drawn(seed, groups, each, shared=0.0):
    """Predictions, numbers and groups: errors of deviation 1, of which a share of the variance is the group's."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(10, 2, groups * each)
    errors = np.sqrt(1 - shared) * rng.normal(size=groups * each)
    return (
        truth + errors + np.sqrt(shared) * np.repeat(rng.normal(size=groups), each),
        truth,
        np.repeat(range(groups), each),
    )


def test_values_are_scikit_learns_and_scipys():
    predicted, truth, _ = drawn(0, 50, 4)
    truth, predicted = np.round(truth, 1), np.round(predicted, 1)  # with ties
    found = number_table(predicted, truth, half_width=1.0, bootstrap=0, mistakes=3)
    assert found["mae"]["value"] == pytest.approx(mean_absolute_error(truth, predicted))
    assert found["rmse"]["value"] == pytest.approx(root_mean_squared_error(truth, predicted))
    assert found["r2"]["value"] == pytest.approx(r2_score(truth, predicted))
    assert found["spearman"]["value"] == pytest.approx(spearmanr(truth, predicted).statistic)
    assert found["coverage"]["value"] == np.mean(np.abs(truth - predicted) <= 1.0 + 1e-6)
    assert "quadratic_kappa" not in found
    worst = int(np.abs(truth - predicted).argmax())
    assert found["mistakes"][0] == {"id": str(worst), "true": truth[worst], "predicted": predicted[worst]}
    assert [found[name]["low"] for name in ("mae", "r2", "coverage")] == [None] * 3
    assert found["target"]["mean"] == pytest.approx(truth.mean())


def test_grades_have_a_quadratic_kappa():
    rng = np.random.default_rng(0)
    truth = rng.integers(2, 7, 300)
    truth[truth == 4] = 5  # a grade that nobody has
    predicted = truth + rng.normal(0, 1.2, 300)
    found = number_table(predicted, truth, bootstrap=200)["quadratic_kappa"]
    rounded = np.clip(np.rint(predicted), 2, 6)
    expected = cohen_kappa_score(truth, rounded.astype(int), labels=range(2, 7), weights="quadratic")
    assert found["value"] == pytest.approx(expected)
    assert found["low"] < found["value"] < found["high"] < 1
    assert quadratic_kappa(truth - 2, truth - 2, 5) == 1.0
    assert np.isnan(quadratic_kappa(np.zeros(3, int), np.zeros(3, int), 2))


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "each", "shared"), [(30, 1, 0.0), (20, 6, 0.8)])
def test_intervals_hold_the_truth_in_nine_of_ten_test_sets_or_more(groups, each, shared):
    far = number_table(*drawn(1, 40_000, 1, shared)[:2], bootstrap=0)
    held = []
    for seed in range(120):
        predicted, truth, group = drawn(100 + seed, groups, each, shared)
        found = number_table(predicted, truth, groups=group, bootstrap=200, seed=seed)
        held.append(
            [
                found[name]["low"] <= far[name]["value"] <= found[name]["high"]
                for name in ("mae", "rmse", "r2", "spearman")
            ]
        )
    assert np.mean(held, axis=0).min() >= 0.9
    assert found["groups"] == groups


def test_ignoring_groups_makes_intervals_too_narrow():
    predicted, truth, group = drawn(5, 20, 10, 0.9)
    by_group = number_table(predicted, truth, groups=group, half_width=1.0)
    by_image = number_table(predicted, truth, half_width=1.0)
    for name in ("mae", "coverage"):
        wide, narrow = (found[name]["high"] - found[name]["low"] for found in (by_group, by_image))
        assert wide > 1.5 * narrow


def test_of_many_images_the_spread_of_a_sample_is_scaled():
    predicted, truth, _ = drawn(3, 60_000, 1)
    found = number_table(predicted, truth, bootstrap=60)["mae"]
    spread = np.abs(predicted - truth).std() / np.sqrt(60_000)
    assert (found["high"] - found["low"]) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.35)


def test_groups_that_are_missing_stand_alone():
    assert units_of(["a", None, "b", "a", float("nan"), None], 6).tolist() == [0, 1, 2, 0, 3, 4]
    with pytest.raises(UsageError, match=r"groups must be one for each of the 3 images"):
        units_of([1, 2], 3)


def test_what_is_undefined_says_why():
    same = number_table([1.0, 2, 3, 4, 5, 6.5], [3.5] * 6, bootstrap=50)
    assert same["r2"] == {"value": None, "low": None, "high": None, "reason": "all true numbers are the same"}
    flat = number_table([3.5] * 6, [1.0, 2, 3, 4, 5, 6.5], bootstrap=50)
    assert flat["spearman"]["reason"] == "all true or all predicted numbers are the same"
    assert flat["r2"]["value"] is not None
    few = number_table([1.0, 2.5], [1.0, 2.0], groups=["a", "a"])
    assert few["mae"] == {"value": 0.25, "low": None, "high": None, "reason": "no interval: 1 groups are too few"}
    assert "R2: none, all true numbers are the same" in numbers_text(same)
    for arguments, message in (
        (([], []), "there is no image with a number"),
        (([1.0], [1.0, 2.0]), "give one of each an image"),
        (([1.0, np.nan], [1.0, 2.0]), "1 predictions are not finite, the first is row 1"),
    ):
        with pytest.raises(UsageError, match=message):
            number_table(*arguments)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("count", [9, 19, 20, 57, 200])
def test_the_half_width_is_the_residual_of_the_finite_sample_rank(count, level):
    residuals = np.random.default_rng(count).exponential(size=count)
    rank = int(np.ceil(round((count + 1) * level, 9)))
    found = conformal_half_width(residuals, np.zeros(count), level=level)
    assert found == (None if rank > count else np.sort(residuals)[rank - 1])
    assert (found is None) == (count < least_units(level))


def test_conformal_intervals_hold_new_numbers_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        residuals = rng.standard_t(3, 29)  # of any distribution
        held.append(np.mean(np.abs(rng.standard_t(3, 20)) <= conformal_half_width(residuals, np.zeros(29), level=0.9)))
    assert np.mean(held) == pytest.approx(0.9, abs=0.006)  # 27 / 30 exactly; the deviation of this mean is 0.002


def test_conformal_intervals_of_groups_are_for_new_groups():
    by_group, by_image = [], []
    for seed in range(400):
        predicted, truth, group = drawn(seed, 24, 5, 0.9)
        sizes = np.random.default_rng(seed).random(len(group)) < np.where(group < 12, 1, 0.3)  # unequal groups
        new, new_truth, _ = drawn(10_000 + seed, 40, 1, 0.9)
        for found, groups in ((by_group, group[sizes]), (by_image, None)):
            half = conformal_half_width(predicted[sizes], truth[sizes], groups=groups)
            found.append(np.mean(np.abs(new - new_truth) <= half))
    assert np.mean(by_group) >= 0.895
    assert np.mean(by_group) > np.mean(by_image)


def evidence(features, target, alpha, beta):
    """The log evidence per image by its definition: the density of the target, weights integrated out."""
    covariance = np.eye(len(features)) / beta + features @ features.T / alpha
    _, logarithm = np.linalg.slogdet(2 * np.pi * covariance)
    return -(logarithm + target @ np.linalg.solve(covariance, target)) / (2 * len(features))


@pytest.mark.parametrize(("images", "width"), [(60, 8), (30, 50)])
def test_log_me_of_numbers_is_the_maximum_of_the_dense_evidence(images, width):
    rng = np.random.default_rng(width)
    features = rng.normal(size=(images, width)) + 0.5
    features[:, :4] *= 5
    target = 40 + features[:, :4].sum(axis=1) + 3 * rng.normal(size=images)
    standard = (target - target.mean()) / target.std()
    grid = np.exp(np.linspace(-4, 6, 41))
    coarse = max((evidence(features, standard, a, b), a, b) for a in grid for b in grid)
    fine = np.exp(np.linspace(-0.3, 0.3, 25))
    best = max(evidence(features, standard, coarse[1] * a, coarse[2] * b) for a in fine for b in fine)
    found = log_me_of_numbers(features, target)
    assert found == pytest.approx(best, abs=1e-4)
    assert found >= best - 1e-9
    assert log_me_of_numbers(features, target * 1000 - 7) == pytest.approx(found)
    assert log_me_of_numbers(features, rng.permutation(target)) < found
    with pytest.raises(UsageError, match="one and the same number"):
        log_me_of_numbers(features, np.ones(images))


def test_intervals_hold_as_often_as_they_say_and_about_so_after_another_fit_with_their_images():
    rng = np.random.default_rng(0)
    held = {False: [], True: []}
    for _ in range(300):
        x = rng.standard_normal((60 + 29 + 40, 12))
        y = x @ np.arange(12) + 4 * rng.standard_t(4, len(x))
        new = slice(89, None)
        ends = {False: 60, True: 89}
        fits = {
            again: np.linalg.solve(x[:end].T @ x[:end] + np.eye(12), x[:end].T @ y[:end]) for again, end in ends.items()
        }
        half = conformal_half_width(x[60:89] @ fits[False], y[60:89], level=0.9)
        for again, coefficients in fits.items():
            held[again].append(np.mean(np.abs(y[new] - x[new] @ coefficients) <= half))
    assert np.mean(held[False]) == pytest.approx(0.9, abs=0.015)
    assert 0.9 <= np.mean(held[True]) < 0.95
