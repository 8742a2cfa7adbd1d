"""Predicted-class shift: exact levels for small counts, and effects that say how much chance alone would give."""

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.two_sample import class_shift


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
