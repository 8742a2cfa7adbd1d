"""Intervals of grouped images hold their level where images of a group are alike, and those of single images do not."""

import numpy as np
import pytest

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.intervals import units_of
from featurepipe.heads.statistics.metrics import score_table

GROUPS, EACH, SETS = 30, 5, 120


def a_test_set(rng, right):
    """Two classes; of each group nearly all images are right, or nearly none, so that they are about one image."""
    of_group = rng.beta(0.5 * right, 0.5 * (1 - right), GROUPS)
    codes = np.repeat(np.arange(GROUPS) % 2, EACH)
    correct = rng.random(GROUPS * EACH) < np.repeat(of_group, EACH)
    predicted = np.where(correct, codes, 1 - codes)
    probabilities = np.where(np.arange(2) == predicted[:, None], 0.9, 0.1)
    return probabilities, codes, np.repeat([f"g{i}" for i in range(GROUPS)], EACH)


@pytest.mark.parametrize("right", [0.5, 0.9])
def test_the_intervals_cover_the_truth(right):
    """Counted over sets of test images; of 120 at 95 %, fewer than 106 have a probability under 0.1 %."""
    rng = np.random.default_rng(0)
    covered, covered_without, balanced = 0, 0, 0
    for _ in range(SETS):
        probabilities, codes, groups = a_test_set(rng, right)
        table = score_table(probabilities, codes, ["a", "b"], groups=groups, bootstrap=200)
        alone = score_table(probabilities, codes, ["a", "b"], bootstrap=200)
        covered += table["accuracy"]["low"] <= right <= table["accuracy"]["high"]
        covered_without += alone["accuracy"]["low"] <= right <= alone["accuracy"]["high"]
        balanced += table["balanced_accuracy"]["low"] <= right <= table["balanced_accuracy"]["high"]
        assert table["accuracy"]["value"] == alone["accuracy"]["value"]
    assert min(covered, balanced) >= 106
    assert covered_without < 100


def test_groups_of_one_image_give_about_the_intervals_of_images():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 3, 300)
    scores = rng.dirichlet(np.ones(3), 300) + 0.7 * np.eye(3)[codes]
    scores /= scores.sum(axis=1, keepdims=True)
    alone = score_table(scores, codes, ["a", "b", "c"], bootstrap=2000)
    grouped = score_table(scores, codes, ["a", "b", "c"], groups=[None] * 300, bootstrap=2000)
    assert grouped["groups"] == 300
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "log_loss"):
        width, other = (table[name]["high"] - table[name]["low"] for table in (alone, grouped))
        assert other == pytest.approx(width, rel=0.15), name
    assert grouped["ece"]["low"] is None
    assert "groups" in grouped["ece"]["reason"]


def test_where_all_is_right_each_group_counts_as_one_image():
    codes = np.repeat([0, 1], 60)
    groups = np.repeat(np.arange(24), 5).astype(str)
    table = score_table(np.eye(2)[codes] * 0.98 + 0.01, codes, ["a", "b"], groups=groups)
    assert (table["accuracy"]["value"], table["accuracy"]["high"]) == (1, 1)
    assert 0.8 < table["accuracy"]["low"] < 0.87  # 24 of 24 right: 0.858, and less with 23 degrees of freedom


def test_of_one_group_there_are_measures_without_intervals():
    codes = np.repeat([0, 1], 6)
    scores = np.eye(2)[codes] * 0.8 + 0.1
    table = score_table(scores, codes, ["a", "b"], groups=["p"] * 12)
    alone = score_table(scores, codes, ["a", "b"])
    assert table["groups"] == 1
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "log_loss", "ece"):
        assert (table[name]["value"], table[name]["low"]) == (alone[name]["value"], None)
        assert "no interval" in table[name]["reason"]


def test_there_is_a_group_for_each_image():
    with pytest.raises(UsageError, match="3 images, but 2 groups"):
        units_of(["a", "b"], 3)
    assert units_of(["a", None, "a", None], 4).tolist() == [0, 1, 0, 2]
