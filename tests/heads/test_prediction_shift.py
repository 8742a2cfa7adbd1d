"""Shifts of predicted classes, labels and numbers: levels that hold for small counts, planted changes, intervals."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact, ks_2samp, ttest_ind, wasserstein_distance

from featurepipe.errors import UsageError
from featurepipe.heads.statistics import prediction_shift as module
from featurepipe.heads.statistics.prediction_shift import class_shift, label_shift, number_shift


def test_p_value_is_fishers_for_two_classes_of_equal_sides():
    found = np.mean([class_shift([12, 8], [6, 14], seed=seed).p_value for seed in range(20)])
    assert found == pytest.approx(fisher_exact([[12, 8], [6, 14]]).pvalue, rel=0.05)


def test_false_alarms_are_as_many_as_the_level_says_for_small_counts():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(30, 0.3))
    p_values = np.array([
        class_shift(rng.multinomial(60, shares), rng.multinomial(12, shares), permutations=499, seed=seed).p_value
        for seed in range(400)
    ])  # fmt: skip
    for level in (0.05, 0.2):
        assert (p_values <= level).sum() <= binom.ppf(0.9995, 400, level)
    assert (p_values <= 0.2).sum() >= binom.ppf(0.0005, 400, 0.15)  # few tables make it a little conservative


def test_a_class_that_is_gone_is_found_and_its_share_is_the_effect():
    found = class_shift([100] * 10, [100] * 9 + [0])
    assert found.p_value == 1e-4
    assert found.total_variation == pytest.approx(0.1)
    assert 0.02 < found.by_chance < 0.06


def test_chance_alone_moves_shares_of_few_images_far():
    rng = np.random.default_rng(1)
    drawn = [class_shift(rng.multinomial(1000, [0.1] * 10), rng.multinomial(20, [0.1] * 10)) for _ in range(30)]
    assert np.mean([one.total_variation for one in drawn]) == pytest.approx(
        np.mean([one.by_chance for one in drawn]), rel=0.15
    )
    assert np.mean([one.by_chance for one in drawn]) > 0.2


def test_classes_that_nobody_has_change_nothing():
    assert class_shift([5, 0, 7, 0], [3, 0, 1, 0], seed=2) == class_shift([5, 7], [3, 1], seed=2)


def test_one_class_alone_is_no_shift():
    assert class_shift([9], [4]).p_value == 1.0


@pytest.mark.parametrize(("before", "new"), [([1, 2], [1, 2, 3]), ([0, 0], [1, 2]), ([-1, 3], [1, 2]), ([], [])])
def test_counts_that_cannot_be_compared_are_refused(before, new):
    with pytest.raises(UsageError, match="same classes"):
        class_shift(before, new)


def test_each_label_has_fishers_p_value_and_the_whole_the_one_of_simes():
    before, new, images = np.array([30, 0, 200, 90, 4]), np.array([8, 0, 50, 1, 9]), (200, 50)
    found = label_shift(before, new, images)
    tested = [0, 3, 4]  # the second label is on no image, the third on all: neither can differ
    expected = np.array([fisher_exact([[before[k], 200 - before[k]], [new[k], 50 - new[k]]]).pvalue for k in tested])
    np.testing.assert_allclose(found.p_values[tested], expected)
    assert np.isnan(found.p_values[[1, 2]]).all()
    order = np.argsort(expected)
    scaled = expected[order] * 3 / np.array([1, 2, 3])
    assert found.p_value == pytest.approx(scaled.min())
    np.testing.assert_allclose(found.adjusted[tested][order], np.minimum.accumulate(scaled[::-1])[::-1])
    assert found.new.tolist() == [0.16, 0, 1, 0.02, 0.18]
    for k, limits in enumerate(found.change_limits):
        assert limits[0] <= found.new[k] - found.reference[k] <= limits[1]


def test_a_planted_change_of_one_label_of_many_is_found_and_named():
    rng = np.random.default_rng(3)
    rates = np.full(40, 0.2)
    before = rng.binomial(1000, rates)
    rates[17] = 0.4
    found = label_shift(before, rng.binomial(100, rates), (1000, 100))
    assert found.p_value == np.nanmin(found.adjusted) < 0.01
    assert np.flatnonzero(found.adjusted < 0.01).tolist() == [17]
    low, high = found.change_limits[17]
    assert 0 < low < 0.2 < high


def test_false_alarms_of_several_labels_that_go_together_are_at_most_as_many_as_the_level_says():
    rng = np.random.default_rng(0)
    cuts = rng.normal(0.8, 0.5, size=8)

    def counts(images):
        latent = 0.7 * rng.normal(size=(images, 1)) + 0.7 * rng.normal(size=(images, 8))
        return (latent > cuts).sum(axis=0)

    p_values = np.array([label_shift(counts(300), counts(60), (300, 60)).p_value for _ in range(300)])
    for level in (0.05, 0.2):
        assert (p_values <= level).sum() <= binom.ppf(0.9995, 300, level)
    assert (p_values <= 0.2).any()


def test_intervals_of_the_change_of_a_rate_hold_their_level():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(300):
        (low, high), *_ = label_shift([rng.binomial(200, 0.1)], [rng.binomial(40, 0.25)], (200, 40)).change_limits
        inside.append(low <= 0.15 <= high)
    assert sum(inside) >= binom.ppf(0.0005, 300, 0.95)


def test_labels_that_cannot_differ_are_no_shift():
    found = label_shift([0, 10], [0, 4], (10, 4))
    assert found.p_value == 1.0
    assert np.isnan(found.adjusted).all()


@pytest.mark.parametrize(
    ("before", "new", "images"), [([1], [1, 2], (5, 5)), ([6], [1], (5, 5)), ([-1], [1], (5, 5)), ([0], [0], (5, 0))]
)
def test_labels_that_cannot_be_compared_are_refused(before, new, images):
    with pytest.raises(UsageError, match="label"):
        label_shift(before, new, images)


def test_numbers_have_scipys_distances_and_welchs_interval():
    rng = np.random.default_rng(2)
    before, new = rng.normal(50, 10, 400), rng.normal(62, 14, 70)
    found = number_shift(before, new)
    assert (found.ks, found.p_value) == pytest.approx(tuple(ks_2samp(before, new, method="exact")))
    assert found.wasserstein == pytest.approx(wasserstein_distance(before, new))
    assert found.effect == pytest.approx(found.wasserstein / before.std(ddof=1))
    limits = ttest_ind(new, before, equal_var=False).confidence_interval(0.95)
    assert found.change_limits == pytest.approx((limits.low, limits.high))
    assert found.p_value < 0.01


@pytest.mark.slow
def test_false_alarms_of_numbers_are_as_many_as_the_level_says():
    rng = np.random.default_rng(4)
    p_values = np.array([number_shift(rng.gamma(2, size=200), rng.gamma(2, size=30)).p_value for _ in range(400)])
    for level in (0.05, 0.2):
        assert binom.ppf(0.0005, 400, 0.8 * level) <= (p_values <= level).sum() <= binom.ppf(0.9995, 400, level)


def test_p_value_of_many_numbers_is_as_exact_as_that_of_few():
    rng = np.random.default_rng(5)
    before, new = rng.normal(size=3000), rng.normal(size=2000)
    assert number_shift(before, new).p_value == pytest.approx(ks_2samp(before, new, method="exact").pvalue)
    assert 0 < number_shift(before, new + 9).p_value < 1e-300


def test_states_of_no_weight_are_left_out_and_count_as_reached(monkeypatch):
    rng = np.random.default_rng(6)
    before, new = rng.normal(size=900), rng.normal(0.1, 1, size=700).round(1)
    exact = number_shift(before, new).p_value
    monkeypatch.setattr(module, "_WIDE", 32)
    found = number_shift(before, new).p_value
    assert exact <= found == pytest.approx(exact, rel=1e-9)


def test_p_value_of_equal_numbers_is_the_share_of_all_deals():
    before, new = [0, 0, 1, 1, 1, 2], [1, 2, 2, 2]
    numbers = np.array(before + new)
    deals = [list(deal) for deal in combinations(range(10), 4)]
    distances = [ks_2samp(np.delete(numbers, deal), numbers[deal]).statistic for deal in deals]
    seen = ks_2samp(before, new).statistic
    expected = np.mean(np.array(distances) >= seen - 1e-12)
    found = number_shift(before, new)
    assert (found.p_value, found.ks) == (pytest.approx(expected), pytest.approx(seen))
    assert found.p_value < ks_2samp(before, new, method="exact").pvalue  # which takes them to be in the worst order


def test_false_alarms_of_equal_numbers_are_as_many_as_the_level_says():
    rng = np.random.default_rng(7)
    p_values = np.array([
        number_shift(rng.poisson(2, size=300), rng.poisson(2, size=60)).p_value for _ in range(300)
    ])  # fmt: skip
    reachable = np.mean([p_values <= level for level in (0.1, 0.2)], axis=1)
    assert binom.ppf(0.0005, 300, 0.07) <= 300 * reachable[0] <= binom.ppf(0.9995, 300, 0.1)
    assert binom.ppf(0.0005, 300, 0.15) <= 300 * reachable[1] <= binom.ppf(0.9995, 300, 0.2)


def groups_of(rng, count, size=6):
    """Which group each of some rows is of, and what each group adds to them."""
    codes = np.repeat(np.arange(count), rng.integers(1, 2 * size, count))
    return codes, rng.normal(size=count)[codes]


def tables(codes, said, width):
    """(G, width) counts of each group."""
    counts = np.zeros((codes.max() + 1, width), np.int64)
    np.add.at(counts, (codes, said), 1)
    return counts


def test_false_alarms_of_groups_are_as_many_as_the_level_says_where_images_by_themselves_give_many():
    rng = np.random.default_rng(8)
    found = {"class": [], "label": [], "number": []}
    alone = []
    for seed in range(150):
        (old, before), (new, after) = groups_of(rng, 40), groups_of(rng, 10)
        values = [levels + 0.5 * rng.normal(size=len(levels)) for levels in (before, after)]
        codes = [np.digitize(value, [-1, 0, 1]) for value in values]
        counts = [tables(*one, 4) for one in zip((old, new), codes, strict=True)]
        sizes = (counts[0].sum(axis=1), counts[1].sum(axis=1))
        options = {"permutations": 299, "seed": seed}
        found["class"].append(class_shift(*counts, **options).p_value)
        found["label"].append(label_shift(*counts, sizes, **options).p_values[1])
        found["number"].append(number_shift(*values, groups=(old, new), **options).p_value)
        alone.append(number_shift(*values).p_value)
    for name, p_values in found.items():
        for level in (0.05, 0.2):
            alarms = np.sum(np.array(p_values) <= level)
            assert binom.ppf(0.0005, 150, level) <= alarms <= binom.ppf(0.9995, 150, level), (name, level)
    assert np.mean(np.array(alone) < 0.05) > 0.3


def test_a_new_group_of_many_images_is_no_shift_and_one_of_all_groups_is():
    rng = np.random.default_rng(9)
    old, new = np.repeat(np.arange(60), 3), np.concatenate([np.repeat(np.arange(15), 3), np.full(50, 15)])
    before, after = rng.normal(size=180), np.concatenate([rng.normal(size=45), np.full(50, 2.0)])
    assert number_shift(before, after).p_value < 1e-9
    assert number_shift(before, after, groups=(old, new)).p_value > 0.01
    assert number_shift(before, after + 2, groups=(old, new)).p_value < 0.001
    counts = [tables(old, (before > 1).astype(int), 2), tables(new, (after > 1).astype(int), 2)]
    sizes = (np.bincount(old), np.bincount(new))
    assert class_shift(counts[0].sum(axis=0), counts[1].sum(axis=0)).p_value < 0.001
    assert class_shift(*counts).p_value > 0.01
    by_group, by_image = (
        label_shift(*counts, sizes),
        label_shift(counts[0].sum(axis=0), counts[1].sum(axis=0), (180, 95)),
    )
    assert by_group.p_value > 0.01
    assert np.array_equal(by_group.new, by_image.new)
    assert np.ptp(by_group.new_limits[1]) > 2 * np.ptp(by_image.new_limits[1])
    assert np.ptp(number_shift(before, after, groups=(old, new)).change_limits) > 2 * np.ptp(
        number_shift(before, after).change_limits
    )


def test_one_group_of_a_side_cannot_be_compared():
    with pytest.raises(UsageError, match="2 groups"):
        number_shift([1, 2, 3], [1, 2, 3], groups=([1, 2, 3], [1, 1, 1]))


def test_equal_numbers_are_no_shift_and_a_constant_reference_has_an_effect():
    found = number_shift([3.0] * 20, [3.0] * 10)
    assert (found.p_value, found.effect, found.change_limits) == (1.0, 0.0, (0.0, 0.0))
    moved = number_shift([3.0] * 20, [4.0] * 10)
    assert moved.p_value < 1e-6
    assert moved.effect == pytest.approx(1 / np.std([3.0] * 20 + [4.0] * 10))


@pytest.mark.parametrize(
    ("before", "new"), [([1.0, np.nan], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0, np.inf], [1.0, 2.0])]
)
def test_numbers_that_cannot_be_compared_are_refused(before, new):
    with pytest.raises(UsageError, match="numbers"):
        number_shift(before, new)
