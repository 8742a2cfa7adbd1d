"""The two-sample test: it holds its level at any size, finds real shifts, and says how far they go."""

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import binom, norm

import featurepipe
from featurepipe.errors import UsageError
from featurepipe.heads.statistics import two_sample as module
from featurepipe.heads.statistics.two_sample import sequential_p_value, two_sample

LEVELS = (0.05, 0.2)


def sparse(rng, rows, width):
    """Values like those of a network: positive, most of them 0, some features a hundred times as large as others."""
    scale = np.geomspace(0.1, 10, width)
    return (np.maximum(rng.normal(-0.5, 1, (rows, width)), 0) * scale).astype(np.float32)


class Endless:
    """n rows drawn when they are read, so that no test has to hold them all."""

    def __init__(self, rng, rows, width):
        self.rng, self.shape, self.dtype = rng, (rows, width), np.dtype(np.float32)

    def read(self, dtype=None, *, rows=None):
        return sparse(self.rng, len(rows), self.shape[1])


def assert_level_held(p_values):
    """False alarms are as many as a binomial count may be (two-sided, 1 in 1,000)."""
    for level in LEVELS:
        alarms, count = int(np.sum(np.asarray(p_values) <= level)), len(p_values)
        assert binom.ppf(0.0005, count, level) <= alarms <= binom.ppf(0.9995, count, level), (level, alarms, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "new", "width", "count"),
    [(10, 10, 30, 400), (10, 10, 9000, 80), (10, 200, 500, 60), (200, 12, 500, 60)],
)
def test_false_alarms_are_as_many_as_the_level_says_for_few_rows(reference, new, width, count):
    rng = np.random.default_rng(reference + width)
    assert_level_held([
        two_sample(sparse(rng, reference, width), sparse(rng, new, width), permutations=999, seed=seed).p_value
        for seed in range(count)
    ])  # fmt: skip


def test_false_alarms_are_as_many_as_the_level_says_for_many_rows_that_change_sides_in_groups(monkeypatch):
    monkeypatch.setattr(module, "_UNITS", 48)  # as with 1,024 rows in 256 groups, but faster
    rng = np.random.default_rng(7)
    sides = Endless(rng, 100_000, 20), Endless(rng, 100_000, 20)
    assert_level_held([two_sample(*sides, rows=192, permutations=499, seed=seed).p_value for seed in range(80)])


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "width", "count"), [(100_000, 64, 40), (5_000, 2_048, 20)])
def test_false_alarms_are_as_many_as_the_level_says_as_nights_run(rows, width, count):
    rng = np.random.default_rng(width)
    sides = Endless(rng, rows, width), Endless(rng, rows, width)
    assert_level_held([two_sample(*sides, permutations=499, seed=seed).p_value for seed in range(count)])


def test_p_value_is_that_of_all_deals_of_the_discrepancy_as_it_is_defined():
    rng = np.random.default_rng(3)
    reference, new = rng.normal(size=(4, 3)), rng.normal(0.8, 1.5, size=(5, 3))
    rows = np.concatenate([reference, new])
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    squared = cdist(rows, rows, "sqeuclidean")
    low, high = np.quantile(squared[np.triu_indices(9, 1)], [0.05, 0.95])
    kernels = [np.exp(-squared / (2 * width)) for width in np.geomspace(low / 4, high * 4, 5)]

    def spread(kernel):  # of a deal, up to a factor: the size of the kernel matrix after U-centring
        others = ~np.eye(9, dtype=bool)
        sums = (kernel * others).sum(axis=1)
        centred = kernel - (sums[:, None] + sums) / 7 + sums.sum() / (8 * 7)
        return np.sqrt((centred**2)[others].sum())

    def discrepancy(kernel, side):
        rest = [row for row in range(9) if row not in side]
        within = [np.mean([kernel[a, b] for a in rows for b in rows if a != b]) for rows in (side, rest)]
        return sum(within) - 2 * kernel[np.ix_(side, rest)].mean()

    deals = [list(side) for side in itertools.combinations(range(9), 4)]
    statistics = [max(discrepancy(kernel, side) / spread(kernel) for kernel in kernels) for side in deals]
    exact = np.mean(np.array(statistics) >= statistics[0] - 1e-9)  # the first deal is the data
    assert 0.01 < exact < 0.5
    found = [two_sample(reference, new, seed=seed).p_value for seed in range(20)]
    assert np.mean(found) == pytest.approx(exact, rel=0.1)


def clothes():
    """The 2,000 bundled images as rows of pixels, and their labels."""
    folder = Path(featurepipe.__file__).parent / "data"
    images, labels = [], []
    for name in ("train", "t10k"):
        pixels = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
        images.append(np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 784))
        codes = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
        labels.append(np.frombuffer(codes, np.uint8, offset=8))
    return np.concatenate(images).astype(np.float32), np.concatenate(labels)


def test_a_missing_class_of_ten_is_found_in_real_images_and_a_random_half_is_not():
    images, labels = clothes()
    missed, alarms = 0, 0
    for seed, gone in enumerate((1, 9)):  # trousers, boots
        order = np.random.default_rng(seed).permutation(2000)
        reference, rest = order[:1000], order[1000:]
        without = rest[labels[rest] != gone]
        missed += two_sample(images[reference], images[without], permutations=999, seed=seed).p_value > 0.01
        alarms += two_sample(images[reference], images[rest], permutations=999, seed=seed).p_value <= 0.01
    assert (missed, alarms) == (0, 0)


def test_shifts_that_keep_the_mean_are_found():
    rng = np.random.default_rng(0)
    reference, wider = rng.normal(size=(400, 10)), rng.normal(0, 1.3, size=(400, 10))
    found = two_sample(reference, wider)
    assert found.p_value < 0.01
    assert found.effect < 0.1


def test_a_shift_in_features_of_little_spread_is_found():
    rng = np.random.default_rng(0)
    reference, new = sparse(rng, 100, 200), sparse(rng, 60, 200)
    new[:, :20] += 0.1  # their spread is about 0.1, that of the last is 10
    assert two_sample(reference, new).p_value < 0.001


def test_effect_is_the_way_of_the_mean_in_spreads_and_sampling_is_taken_off():
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(1000, 300)) * np.geomspace(1, 100, 300)
    moved = rng.normal(size=(1000, 300)) * np.geomspace(1, 100, 300) + 0.4 * np.geomspace(1, 100, 300)
    assert two_sample(reference, moved, permutations=99).effect == pytest.approx(0.4, rel=0.03)
    few = [two_sample(*rng.normal(size=(2, 10, 1000)), permutations=99).effect for _ in range(20)]
    assert np.median(few) < 0.1  # the means of ten rows lie 0.45 apart


def test_auc_is_how_often_a_new_row_is_told_from_a_reference_row():
    rng = np.random.default_rng(6)
    reference, new = rng.normal(size=(1000, 1)), rng.normal(1, 1, size=(1000, 1))
    assert two_sample(reference, new, permutations=99).auc == pytest.approx(norm.cdf(np.sqrt(0.5)), abs=0.03)
    same = [two_sample(*rng.normal(size=(2, 50, 100)), permutations=99).auc for _ in range(20)]
    assert np.mean(same) == pytest.approx(0.5, abs=0.04)


def test_rows_far_from_every_reference_row_and_rows_typical_of_the_shift_are_named():
    rng = np.random.default_rng(8)
    reference, new = rng.normal(size=(200, 5)), rng.normal(size=(100, 5))
    new[30:70, 0] += 3  # many of one new kind
    new[[7, 90]] -= 40  # two that are like nothing
    new[7] -= 1
    found = two_sample(reference, new, shown=6)
    assert found.farthest[:2].tolist() == [7, 90]
    assert set(found.typical.tolist()) <= set(range(30, 70))
    assert (len(found.farthest), len(found.typical)) == (6, 6)


def test_rows_without_differences_are_alike():
    same = np.full((20, 4), 3.5)
    found = two_sample(same, same[:12])
    assert (found.p_value, found.effect, found.auc) == (1.0, 0.0, 0.5)
    rng = np.random.default_rng(0)
    dead = two_sample(same, rng.normal(5.5, 1, size=(12, 4)))
    assert dead.p_value < 0.001
    assert 0.5 < dead.effect < 2.1  # in spreads of both sides


def test_what_is_drawn_follows_from_the_seed_and_the_number_of_rows_is_bounded():
    rng = np.random.default_rng(1)
    reference, new = Endless(rng, 100_000, 3), rng.normal(size=(3000, 3))
    found = two_sample(reference, new, permutations=99, seed=4)
    assert (found.reference, len(found.new), len(np.unique(found.new))) == (1024, 1024, 1024)
    again = two_sample(new, new[:500], permutations=99, seed=4)
    np.testing.assert_array_equal(again.new, two_sample(new, new[:500], permutations=99, seed=4).new)
    assert set(found.farthest) <= set(found.new)


def test_a_few_new_rows_are_all_compared_and_groups_leave_few_out():
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(5000, 2))
    for count, used in ((11, 11), (256, 256), (257, 256), (700, 699)):
        found = two_sample(reference, rng.normal(size=(count, 2)), permutations=9)
        assert (len(found.new), found.reference) == (used, 256 * -(-count // 256))


def test_a_matrix_of_deals_is_none_where_all_rows_lie_equally_far_apart():
    alike = np.full((12, 12), 0.3, np.float32) + 0.7 * np.eye(12, dtype=np.float32)
    assert module._deal_matrix(alike) is None
    assert module._deal_matrix(module._unit_means(alike, 3)) is None


def test_a_p_value_ends_early_where_it_is_not_small_and_keeps_its_value():
    draws = []

    def draw(count):
        draws.append(count)
        return np.random.default_rng(len(draws)).random(count)

    assert sequential_p_value(0.5, draw, 100_000) == pytest.approx(0.5, rel=0.2)
    assert sum(draws) == 500
    assert sequential_p_value(0.999, draw, 100_000) == pytest.approx(0.001, rel=0.3)
    assert sequential_p_value(2.0, draw, 999) == 1 / 1000
    assert sequential_p_value(0.0, np.zeros, 20) == 1.0  # ties count


def test_unusable_sets_are_refused_by_name():
    rows = np.zeros((5, 3))
    with pytest.raises(UsageError, match="3 and of 2 values"):
        two_sample(rows, rows[:, :2])
    with pytest.raises(UsageError, match="these have 5 and 1"):
        two_sample(rows, rows[:1])
    with pytest.raises(UsageError, match="rows=1 must be 2"):
        two_sample(rows, rows, rows=1)
    with pytest.raises(ValueError, match="NaN"):
        two_sample(rows, rows * np.nan)


def patients(rng, count, size, width, between=1.0):
    """Rows of patients that differ from each other, 1 to 2 * size - 1 of each, and whose they are."""
    sizes = rng.integers(1, 2 * size, count)
    codes = np.repeat(np.arange(count), sizes)
    return (between * rng.normal(size=(count, width))[codes] + rng.normal(size=(len(codes), width))), codes


def test_false_alarms_of_groups_are_as_many_as_the_level_says_where_rows_by_themselves_give_many(monkeypatch):
    monkeypatch.setattr(module, "_UNITS", 16)  # so that groups change sides in pairs, some rows of each
    rng = np.random.default_rng(11)
    whole, alone = [], []
    for seed in range(150):
        (before, old), (after, new) = patients(rng, 40, 6, 5), patients(rng, 12, 6, 5)
        options = {"rows": 100, "permutations": 299, "seed": seed}
        whole.append(two_sample(before, after, groups=(old, new), **options).p_value)
        alone.append(two_sample(before, after, **options).p_value)
    assert_level_held(whole)
    assert np.mean(np.array(alone) < 0.05) > 0.3


def test_a_shift_of_all_new_groups_is_found_and_a_large_group_counts_once():
    rng = np.random.default_rng(12)
    (before, old), (after, new) = patients(rng, 60, 4, 6, 0.3), patients(rng, 20, 4, 6, 0.3)
    assert two_sample(before, after + 1.2, groups=(old, new)).p_value < 0.001
    odd, whose = np.concatenate([after, 8 + rng.normal(size=(200, 6))]), np.concatenate([new, np.full(200, 99)])
    found, rows = two_sample(before, odd, groups=(old, whose)), two_sample(before, odd)
    assert rows.p_value < 0.001 < found.p_value
    assert found.effect < rows.effect / 2
    assert found.farthest[0] >= len(after)


def test_groups_of_one_row_each_compare_as_rows_do():
    rng = np.random.default_rng(13)
    before, after = rng.normal(size=(80, 4)), rng.normal(0.4, 1, size=(30, 4))
    rows = two_sample(before, after)
    found = two_sample(before, after, groups=(np.arange(80), [None] * 30))
    assert (found.effect, found.reference, len(found.new)) == (pytest.approx(rows.effect), 80, 30)
    assert found.p_value == pytest.approx(rows.p_value, rel=0.5)


def test_one_group_of_a_side_cannot_be_compared():
    with pytest.raises(UsageError, match="2 groups each; these have 10 and 1"):
        two_sample(np.eye(10), np.eye(10), groups=(range(10), [0] * 10))
