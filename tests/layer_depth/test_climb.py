"""Values of C that cannot be the best one are not fitted; those that can are."""

import numpy as np
import pytest

from featurepipe.layer_depth import probes
from featurepipe.layer_depth.folds import Fold
from featurepipe.layer_depth.probes import Data, measure_fold
from featurepipe.layer_depth.study import Protocol
from featurepipe.training.tuning import RULE, climb

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class Curve:
    """Accuracies over C, and which were asked for together."""

    def __init__(self, *accuracies):
        self.accuracies, self.asked = dict(zip(STRENGTHS, accuracies, strict=True)), []

    def __call__(self, some):
        self.asked.append(tuple(some))
        return [self.accuracies[C] for C in some]


def test_the_three_smallest_are_fitted_together_and_then_one_by_one():
    curve = Curve(0.5, 0.6, 0.7, 0.8, 0.82, 0.83, 0.84)
    assert climb(STRENGTHS, curve, 1000) == 100.0
    assert curve.asked == [STRENGTHS[:3], (0.1,), (1.0,), (10.0,), (100.0,)]


@pytest.mark.parametrize(("images", "fitted"), [(400, 7), (1600, 6), (12_000, 5)])
def test_it_ends_where_one_is_worse_by_more_than_a_standard_error(images, fitted):
    """At 0.8 the standard error is 0.02 of 400 images, 0.01 of 1,600 and 0.004 of 12,000."""
    curve = Curve(0.7, 0.75, 0.79, 0.8, 0.795, 0.785, 0.781)
    assert climb(STRENGTHS, curve, images) == 0.1
    assert sum(map(len, curve.asked)) == fitted


def test_what_comes_after_a_small_drop_is_still_found():
    curve = Curve(0.7, 0.75, 0.8, 0.799, 0.7985, 0.82, 0.75)
    assert climb(STRENGTHS, curve, 1000) == 10.0


def test_where_the_smallest_learn_nothing_it_goes_on():
    """Heads that are held back too much say the commonest class, one like the other."""
    curve = Curve(0.6, 0.6, 0.6, 0.6, 0.7, 0.9, 0.9)
    assert climb(STRENGTHS, curve, 50) == 10.0


def test_of_equals_the_smallest_is_taken():
    curve = Curve(0.6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert climb(STRENGTHS, curve, 50) == 1e-3
    assert curve.asked == [STRENGTHS[:3]]  # nothing can do better
    assert climb(STRENGTHS[:2], lambda some: [0.5] * len(some), 50) == 1e-4


def many_values_few_of_use(count=980, width=40):
    """Two classes that one value tells apart, badly; the others are noise to learn by heart."""
    rng = np.random.default_rng(5)
    codes = np.arange(count) % 2
    values = rng.normal(size=(count, width))
    values[:, 0] += 1.5 * codes
    return values.astype(np.float32), codes


class Features:
    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self, dtype=None, *, rows=None):
        return (self.values if rows is None else self.values[rows]).astype(dtype or self.dtype)

    def take(self, positions):
        return Features(self.values[positions])


@pytest.mark.parametrize("head", ["logistic", "linear-svm"])
def test_in_memory_and_in_blocks_the_same_values_are_fitted(head, monkeypatch):
    values, codes = many_values_few_of_use()
    data = Data(Features(values), codes, None, np.empty(0, np.int64))
    fold = Fold(0, 0, np.arange(80), np.arange(80, 880), np.arange(880, 980))
    asked = []

    def spy(strengths, accuracies_of, images, *more):
        def kept(some):
            found = accuracies_of(some)
            asked.append((tuple(some), found))
            return found

        return climb(strengths, kept, images, *more)

    monkeypatch.setattr(probes, "climb", spy)
    (inside,) = measure_fold(data, fold, [head])
    in_memory, asked = asked, []
    monkeypatch.setattr(probes, "SMALL_VALUES", 100)
    (blocks,) = measure_fold(data, fold, [head])
    assert [some for some, _ in asked] == [some for some, _ in in_memory]
    assert sum(len(some) for some, _ in asked) < 7  # it did not go to the end
    for (_, one), (_, other) in zip(asked, in_memory, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)
    for cell, tried in ((inside, in_memory), (blocks, asked)):
        accuracies = {C: accuracy for some, found in tried for C, accuracy in zip(some, found, strict=True)}
        assert accuracies[cell.params["C"]] == max(accuracies.values())


@pytest.mark.parametrize(
    ("heads", "is_said"), [(("logistic", "knn"), True), (("linear-svm",), True), (("knn",), False)]
)
def test_the_protocol_says_so_where_there_is_a_c(heads, is_said):
    for folds in (5, None):
        assert (RULE in Protocol(heads, folds, 1).text) == is_said
