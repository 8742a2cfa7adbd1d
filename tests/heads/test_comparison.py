"""Intervals and tests have the values of SciPy's where those exist, and the coverage they promise where not."""

import time
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.comparison import (
    AccuracyEstimate,
    Difference,
    cheapest_within_one_se,
    difference_over_folds,
    difference_over_images,
    over_folds,
    over_images,
    rank_correlation,
)

CELLS = np.array([0.91, 0.88, 0.93, 0.90, 0.87])
OTHER = np.array([0.90, 0.88, 0.90, 0.88, 0.86])


class TestFolds:
    def test_independent_cells_give_the_t_interval(self):
        found = over_folds(CELLS, 0)
        low, high = stats.t.interval(0.95, 4, CELLS.mean(), stats.sem(CELLS))
        assert found == AccuracyEstimate(
            *(pytest.approx(x, rel=1e-12) for x in (CELLS.mean(), low, high, stats.sem(CELLS)))
        )

    def test_shared_training_images_widen_it_as_nadeau_and_bengio_say(self):
        se = np.sqrt(CELLS.var(ddof=1) * (1 / 5 + 1 / 4))
        found = over_folds(CELLS, 0.25)
        assert found.se == pytest.approx(se, rel=1e-12)
        assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 4) * se, rel=1e-12)

    def test_differences_are_the_paired_t_test_of_scipy(self):
        expected = stats.ttest_rel(CELLS, OTHER)
        limits = expected.confidence_interval(0.95)
        found = difference_over_folds(CELLS, OTHER, 0)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx((limits.low, limits.high), rel=1e-9)

    def test_the_corrected_test_divides_t_by_the_wider_error(self):
        d = CELLS - OTHER
        t = d.mean() / np.sqrt(d.var(ddof=1) * (1 / 5 + 1 / 4))
        found = difference_over_folds(CELLS, OTHER, 0.25)
        assert found.p == pytest.approx(2 * stats.t.sf(t, 4), rel=1e-9)
        assert difference_over_folds(OTHER, CELLS, 0.25).p == pytest.approx(found.p, rel=1e-12)

    def test_no_difference_in_any_fold_is_certain(self):
        assert difference_over_folds(CELLS, CELLS, 0.25) == Difference(0.0, 0.0, 0.0, 1.0)
        assert difference_over_folds([0.1 + 0.2, 0.5], [0.3, 0.5], 1) == Difference(0.0, 0.0, 0.0, 1.0)

    def test_two_folds_have_one_degree_of_freedom(self):
        found = over_folds([0.4, 0.6], 1)
        reach = stats.t.ppf(0.975, 1) * np.sqrt(0.02 * 1.5)
        assert reach > 2
        assert found == AccuracyEstimate(pytest.approx(0.5), 0.0, 1.0, pytest.approx(np.sqrt(0.03)))
        wide = difference_over_folds([0.4, 0.6], [0.3, 0.1], 1)
        assert wide.high - wide.value == pytest.approx(stats.t.ppf(0.975, 1) * np.sqrt(0.08 * 1.5))

    def test_one_fold_alone_has_no_interval(self):
        assert over_folds([0.7], 0.25) == AccuracyEstimate(0.7, None, None, None)
        assert difference_over_folds([0.7], [0.5], 0.25) == Difference(pytest.approx(0.2), None, None, None)

    def test_equal_cells_have_no_width(self):
        assert over_folds([1.0, 1.0, 1.0], 0.5) == AccuracyEstimate(1.0, 1.0, 1.0, 0.0)

    def test_estimates_are_json_values(self):
        assert AccuracyEstimate(0.5, None, None, None).as_dict() == {
            "value": 0.5,
            "low": None,
            "high": None,
            "se": None,
        }
        assert Difference(0.5, 0.25, 0.75, 0.01).as_dict() == {"value": 0.5, "low": 0.25, "high": 0.75, "p": 0.01}

    def test_what_are_no_accuracies_is_refused(self):
        with pytest.raises(UsageError, match="value or more"):
            over_folds([], 0.25)
        with pytest.raises(UsageError, match="from 0 to 1"):
            over_folds([91.0, 88.0], 0.25)
        with pytest.raises(UsageError, match="from 0 to 1"):
            over_folds([0.5, np.nan], 0.25)
        with pytest.raises(UsageError, match="test_to_train=-1"):
            over_folds(CELLS, -1)
        with pytest.raises(UsageError, match=r"\(5,\) and \(4,\)"):
            difference_over_folds(CELLS, OTHER[1:], 0.25)
        with pytest.raises(UsageError, match=r"\(2, 5\)"):
            over_folds([CELLS, OTHER], 0.25)


def repeated_cross_validations(rounds, n, *, folds, seeds, width=4, shift=0.6, rng):
    """Accuracies (rounds, seeds * folds) of the nearest of two class means on new data, and their expectation.

    The mean's classifier is linear, so each one's true accuracy is known; what is estimated is its mean over training
    sets of this size.
    """
    cells, true = np.empty((rounds, seeds * folds)), []
    for round_number in range(rounds):
        codes = np.tile([0, 1], n // 2)
        x = rng.standard_normal((n, width))
        x[:, 0] += shift * (2 * codes - 1)
        for seed in range(seeds):
            fold = rng.permutation(n) % folds
            for k in range(folds):
                trains = fold != k
                means = [x[trains & (codes == c)].mean(axis=0) for c in (0, 1)]
                direction, middle = means[1] - means[0], (means[0] + means[1]) / 2
                predicted = (x[~trains] - middle) @ direction > 0
                cells[round_number, seed * folds + k] = (predicted == codes[~trains]).mean()
                length = np.linalg.norm(direction)
                offsets = [(s * shift * direction[0] - middle @ direction) * s / length for s in (-1, 1)]
                true.append(stats.norm.cdf(offsets).mean() if seed == 0 else np.nan)
    return cells, np.nanmean(true)


@pytest.mark.parametrize(("folds", "seeds"), [(5, 3), (2, 5)])
def test_the_corrected_interval_covers_and_the_plain_one_does_not(folds, seeds):
    cells, true = repeated_cross_validations(400, 100, folds=folds, seeds=seeds, rng=np.random.default_rng(0))
    covered = {}
    for ratio in (0, 1 / (folds - 1)):
        found = [over_folds(row, ratio) for row in cells]
        covered[ratio] = np.mean([one.low <= true <= one.high for one in found])
    assert 0.9 <= covered[1 / (folds - 1)] <= 0.99
    assert covered[0] < 0.8


class TestImages:
    def test_one_seed_has_the_exact_interval_of_a_proportion(self):
        correct = np.arange(2000) < 1800
        low, high = stats.binomtest(1800, 2000).proportion_ci(method="exact")
        found = over_images(correct)
        assert found.value == 0.9
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
        assert found.se == pytest.approx(np.sqrt(0.09 / 2000), rel=1e-3)
        assert over_images(correct[None]) == found

    def test_all_right_still_leaves_room_below(self):
        def lowest(
            groups,
        ):  # Clopper & Pearson's with all right, for as many images as Student's quantile makes of them
            count = groups * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, groups - 1)) ** 2
            return 0.025 ** (1 / count)

        assert over_images(np.ones(50)) == AccuracyEstimate(1.0, pytest.approx(lowest(50)), 1.0, pytest.approx(1 / 51))
        assert over_images(np.zeros((3, 50))).high == pytest.approx(1 - lowest(50))
        assert over_images(np.ones(50), np.arange(50) // 5).low == pytest.approx(lowest(10))

    @pytest.mark.parametrize("n", [5, 12, 50, 1000])
    @pytest.mark.parametrize("true", [0.5, 0.9, 0.97, 0.995])
    def test_the_interval_covers_also_near_one(self, n, true):
        hits = np.random.default_rng(0).binomial(n, true, 2000)
        found = {count: over_images(np.arange(n) < count) for count in np.unique(hits)}
        assert np.mean([found[count].low <= true <= found[count].high for count in hits]) >= 0.94

    @pytest.mark.parametrize("n", [5, 20, 200])
    @pytest.mark.parametrize(("only_a", "only_b"), [(0.0, 0.0), (0.02, 0.0), (0.1, 0.02), (0.2, 0.2)])
    def test_the_interval_of_a_difference_covers(self, n, only_a, only_b):
        rng = np.random.default_rng(1)
        covered = 0
        for _ in range(300):
            drawn = rng.random(n)
            a, b = drawn < only_a, (drawn > 1 - only_b) & (drawn >= only_a)
            found = difference_over_images(a, b)
            covered += found.low <= only_a - only_b <= found.high
        assert covered >= 270

    def test_copies_of_an_image_count_once(self):
        rng = np.random.default_rng(0)
        correct = rng.random(300) < 0.8
        once = over_images(correct)
        keys = np.frombuffer(rng.bytes(300 * 32), np.uint8).reshape(300, 32)
        for groups in (
            np.tile(np.arange(300), 4),
            np.tile([f"image {i}" for i in range(300)], 4),
            np.tile(keys, (4, 1)),
        ):
            copied = over_images(np.tile(correct, 4), groups)
            assert copied.as_dict() == pytest.approx(once.as_dict(), rel=1e-9)
        assert over_images(np.tile(correct, 4)).se == pytest.approx(once.se / 2, rel=1e-2)

    def test_the_error_over_groups_is_that_of_resampling_them(self):
        rng = np.random.default_rng(1)
        groups = rng.integers(0, 120, 500)
        correct = rng.random(500) < 0.4 + 0.5 * rng.random(120)[groups]
        sums, sizes = np.bincount(groups, correct), np.bincount(groups)
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 20_000)
        resampled = (drawn @ sums) / (drawn @ sizes)
        found = over_images(correct, groups)
        assert found.se == pytest.approx(resampled.std(), rel=0.04)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.006)

    @pytest.mark.parametrize(("luck", "least", "most"), [(0.0, 0.93, 0.99), (0.05, 0.90, 0.99)])
    def test_the_interval_covers_images_and_seeds(self, luck, least, most):
        """``luck`` is how much a seed's accuracy varies: far more than 400 images explain, in the second case."""
        rng = np.random.default_rng(2)
        normal = stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
        ease = np.clip(0.75 + 0.3 * normal, 0.05, 0.95)
        true = np.clip(ease[:, None] + luck * normal, 0, 1).mean()
        covered = []
        for _ in range(500):
            chances = rng.choice(ease, 400) + luck * rng.standard_normal((5, 1))
            found = over_images(rng.random((5, 400)) < chances)
            covered.append(found.low <= true <= found.high)
        assert least <= np.mean(covered) <= most

    def test_chance_that_images_explain_is_not_counted_for_seeds_again(self):
        rng = np.random.default_rng(8)
        squared = [over_images(rng.random((5, 200)) < 0.7).se ** 2 for _ in range(300)]
        assert 0.95 < np.mean(squared) / (0.21 / 1000) < 1.4

    def test_seeds_that_disagree_widen_it_and_deterministic_ones_do_not(self):
        rng = np.random.default_rng(3)
        correct = rng.random(1000) < 0.8
        assert over_images(np.tile(correct, (3, 1))).as_dict() == pytest.approx(
            over_images(correct).as_dict(), rel=1e-9
        )
        lucky = np.stack([correct, rng.random(1000) < 0.7, rng.random(1000) < 0.9])
        found = over_images(lucky)
        assert found.se == pytest.approx(lucky.mean(axis=1).std(ddof=1) / np.sqrt(3), rel=0.1)
        assert found.high - found.low > 5 * found.se  # few seeds have few degrees of freedom

    def test_differences_are_the_paired_t_test_of_scipy(self):
        rng = np.random.default_rng(4)
        a, b = rng.random(400) < 0.85, rng.random(400) < 0.8
        expected = stats.ttest_rel(a.astype(float), b.astype(float))
        limits = expected.confidence_interval(0.95)
        found = difference_over_images(a, b)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.value, found.low, found.high) == pytest.approx((a.mean() - b.mean(), *limits), abs=3e-4)

    def test_pairing_sees_what_separate_intervals_do_not(self):
        rng = np.random.default_rng(5)
        b = rng.random(1000) < 0.8
        a = b | (np.arange(1000) % 50 == 0)
        assert over_images(a).low < over_images(b).high
        assert difference_over_images(a, b).p < 0.05
        copies = np.tile(np.arange(1000) // 200, 1)
        assert difference_over_images(a, b, copies).p > difference_over_images(a, b).p

    def test_no_difference_on_any_image_has_p_1_and_some_width(self):
        correct = np.random.default_rng(6).random((3, 90)) < 0.5
        found = difference_over_images(correct, correct)
        assert (found.value, found.p) == (0.0, 1.0)
        assert -0.03 < found.low < 0 < found.high < 0.03

    def test_a_single_group_has_no_interval(self):
        assert over_images([True, False], ["a", "a"]) == AccuracyEstimate(0.5, None, None, None)
        assert difference_over_images([True, True], [True, False], ["a", "a"]) == Difference(0.5, None, None, None)

    def test_equal_shares_have_no_width(self):
        assert over_images(np.full(20, 0.3)) == AccuracyEstimate(pytest.approx(0.3), *[pytest.approx(0.3)] * 2, 0.0)

    def test_a_million_answers_take_no_time(self):
        rng = np.random.default_rng(7)
        correct = rng.random((3, 300_000)) < 0.9
        start = time.process_time()
        difference_over_images(correct, correct[::-1], rng.integers(0, 290_000, 300_000))
        over_images(correct)
        assert time.process_time() - start < 5

    def test_with_all_right_the_error_is_that_of_wilsons_interval_and_joins_that_of_one_wrong(self):
        right = over_images(np.ones(99))
        z, n = 1.0, 99  # the lower limit of Wilson's score interval with all right, by its formula
        low = (1 + z**2 / (2 * n) - z * np.sqrt(z**2 / (4 * n**2))) / (1 + z**2 / n)
        assert right.se == pytest.approx(1 - low) == pytest.approx(1 / 100)
        assert over_images(np.zeros((3, 99))).se == pytest.approx(1 / 100)
        one_wrong = over_images(np.arange(99) > 0).se
        assert right.se < one_wrong < 1.02 * right.se
        now_and_then = over_images(np.stack([np.arange(99) > 0, np.ones(99), np.ones(99)]))
        assert now_and_then.se == pytest.approx(right.se)  # no surer with a mistake than without
        copies = over_images(np.ones(99), np.repeat(np.arange(33), 3))
        assert copies.se == pytest.approx(1 / 34)

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(UsageError, match="groups must be one for each of the 3 images"):
            over_images([True, False, True], ["a", "b"])
        with pytest.raises(UsageError, match="value or more"):
            over_images(np.empty((3, 0)))


class TestChoice:
    ESTIMATES: ClassVar = {
        "early": AccuracyEstimate(0.80, 0.79, 0.81, 0.005),
        "middle": AccuracyEstimate(0.895, 0.88, 0.91, 0.001),
        "late": AccuracyEstimate(0.90, 0.89, 0.91, 0.005),
        "last": AccuracyEstimate(0.897, 0.89, 0.91, 0.005),
    }
    COSTS: ClassVar = {"early": 0.1, "middle": 0.5, "late": 0.9, "last": 1.0, "unused": 0.0}

    def test_the_cheapest_within_the_bests_error_is_chosen(self):
        assert cheapest_within_one_se(self.ESTIMATES, self.COSTS) == ("middle", "late")

    def test_exactly_one_error_below_is_within_it(self):
        even = {"a": AccuracyEstimate(0.7, None, None, 0.1), "b": AccuracyEstimate(0.8, None, None, 0.1)}
        assert 0.8 - 0.1 > 0.7
        assert cheapest_within_one_se(even, {"a": 1, "b": 2}) == ("a", "b")

    def test_the_error_that_counts_is_the_bests(self):
        sure = self.ESTIMATES | {"late": AccuracyEstimate(0.90, 0.89, 0.91, 0.004)}
        assert cheapest_within_one_se(sure, self.COSTS) == ("late", "late")

    def test_ties_go_to_the_cheaper_then_to_the_better_then_to_the_first(self):
        even = {"a": AccuracyEstimate(0.9, None, None, None), "b": AccuracyEstimate(0.9, None, None, None)}
        assert cheapest_within_one_se(even, {"a": 2, "b": 1}) == ("b", "b")
        assert cheapest_within_one_se(even, {"a": 1, "b": 1}) == ("a", "a")
        near = {"a": AccuracyEstimate(0.895, None, None, 0.01), "b": AccuracyEstimate(0.9, None, None, 0.01)}
        assert cheapest_within_one_se(near, {"a": 1, "b": 1}) == ("b", "b")

    def test_costs_that_a_clock_does_not_tell_apart_are_equal_and_the_first_is_taken(self):
        near = {name: AccuracyEstimate(0.9, None, None, 0.01) for name in ("simple", "other", "dear")}
        near["worse"] = AccuracyEstimate(0.8, None, None, 0.01)
        costs = {"simple": 1.4, "other": 0.5, "dear": 1.6, "worse": 0.0}
        assert cheapest_within_one_se(near, costs) == ("other", "other")
        assert cheapest_within_one_se(near, costs, same=lambda cost: cost + 1) == ("simple", "simple")
        last_first = {name: near[name] for name in ("dear", "simple", "other")}
        assert cheapest_within_one_se(last_first, costs, same=lambda cost: cost + 1) == ("simple", "simple")

    def test_one_candidate_is_chosen(self):
        assert cheapest_within_one_se({"a": AccuracyEstimate(0.1, 0, 1, 0.3)}, {"a": 5}) == ("a", "a")

    def test_what_cannot_be_chosen_from_is_refused(self):
        with pytest.raises(UsageError, match="nothing"):
            cheapest_within_one_se({}, {})
        with pytest.raises(UsageError, match="'late' has no cost"):
            cheapest_within_one_se(self.ESTIMATES, {"early": 1, "middle": 1, "last": 1})
        with pytest.raises(UsageError, match="'a' is NaN"):
            cheapest_within_one_se({"a": AccuracyEstimate(np.nan, None, None, None)}, {"a": 1})


class TestRanks:
    def test_known_values(self):
        assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == {
            "spearman": pytest.approx(0.8),
            "kendall": pytest.approx(4 / 6),
        }
        assert rank_correlation([1, 2, 3], [3, 2, 1]) == {"spearman": pytest.approx(-1), "kendall": pytest.approx(-1)}

    def test_ties_and_missing_pairs(self):
        a, b = [1, 1, 2, 3, np.nan, 5], [2, 1, 3, 3, 9, np.inf]
        assert rank_correlation(a, b) == {
            "spearman": pytest.approx(stats.spearmanr(a[:4], b[:4]).statistic),
            "kendall": pytest.approx(stats.kendalltau(a[:4], b[:4]).statistic),
        }

    @pytest.mark.parametrize(
        ("a", "b"),
        [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([], []), ([1, 2, np.nan], [1, 2, 3])],
    )
    def test_undefined_is_none(self, a, b):
        assert rank_correlation(a, b) == {"spearman": None, "kendall": None}

    def test_unequal_lengths_are_refused(self):
        with pytest.raises(UsageError, match="as many"):
            rank_correlation([1, 2, 3], [1, 2])
