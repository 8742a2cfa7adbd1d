"""Linear CKA is that of its definitions, and does what is said of it."""

import numpy as np
import pytest

from featurepipe.errors import UsageError
from featurepipe.heads.sampling import sampled_positions
from featurepipe.heads.statistics.similarity import linear_cka


def unbiased_hsic(first, second):
    """Song et al. (2012), equation 5, up to n (n - 3), which cancels."""
    n = len(first)
    first, second = first - np.diag(np.diag(first)), second - np.diag(np.diag(second))
    one = np.ones(n)
    rest = (one @ first @ one) * (one @ second @ one) / ((n - 1) * (n - 2))
    return np.trace(first @ second) + rest - 2 / (n - 2) * (one @ first @ second @ one)


def plain_hsic(first, second):
    centring = np.eye(len(first)) - 1 / len(first)
    return np.trace(first @ centring @ second @ centring)


def naive(sets, hsic):
    grams = [x.astype(np.float64) @ x.astype(np.float64).T for x in sets]
    products = np.array([[hsic(first, second) for second in grams] for first in grams])
    return products / np.sqrt(np.outer(np.diagonal(products), np.diagonal(products)))


@pytest.fixture
def related():
    """Three sets of features of the same 57 images: one, a noisy map of it, a wider and unrelated one."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((57, 8)) + 3
    second = np.maximum(first @ rng.standard_normal((8, 20)), 0) + rng.standard_normal((57, 20))
    return [first, second, rng.standard_normal((57, 300))]


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("memory", [None, "120kB"], ids=["one tile", "tiles of 16"])
def test_values_are_those_of_the_definitions(related, wrap, debiased, memory):
    expected = naive(related, unbiased_hsic if debiased else plain_hsic)
    found = linear_cka([wrap(x) for x in related], debiased=debiased, memory=memory)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert 0.3 < found[0, 1] < 0.99
    np.testing.assert_allclose(np.diagonal(found), 1, rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_features_with_large_means_lose_nothing(related, dtype, wrap):
    narrow = [(x + 100).astype(dtype) for x in related]
    found = linear_cka([wrap(x) for x in narrow])
    np.testing.assert_allclose(found, naive(narrow, unbiased_hsic), rtol=0, atol=3e-6)


def test_rotations_shifts_and_scales_change_nothing(related):
    rng = np.random.default_rng(1)
    turned = [
        1e-5 * (x @ np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])))[0]) + rng.standard_normal(x.shape[1])
        for x in related
    ]
    np.testing.assert_allclose(linear_cka(turned), linear_cka(related), rtol=0, atol=1e-8)
    both = linear_cka([related[0], turned[0]])
    np.testing.assert_allclose(both, np.ones((2, 2)), rtol=1e-8)


def test_scaling_one_direction_does_change_it(related):
    stretched = related[0] * np.array([10.0] + [1] * 7)
    assert linear_cka([related[0], stretched])[0, 1] < 0.9


def test_unrelated_wide_features_are_unlike_on_average_only_without_bias():
    rng = np.random.default_rng(2)
    pairs = [[rng.standard_normal((40, 400)), rng.standard_normal((40, 300))] for _ in range(200)]
    unbiased = np.array([linear_cka(pair)[0, 1] for pair in pairs])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / np.sqrt(200)
    assert unbiased.std() < 0.05
    assert np.mean([linear_cka(pair, debiased=False)[0, 1] for pair in pairs[:20]]) > 0.85


def test_the_sample_is_the_same_images_of_every_set(related, wrap):
    chosen = sampled_positions(57, 30, seed=5)
    found = linear_cka([wrap(x) for x in related], rows=30, seed=5)
    np.testing.assert_allclose(found, linear_cka([x[chosen] for x in related]), rtol=0, atol=1e-13)
    assert abs(found - linear_cka(related, rows=30, seed=6)).max() > 1e-3
    np.testing.assert_array_equal(linear_cka(related, rows=57), linear_cka(related, rows=None))


def test_no_more_is_read_at_once_than_memory_allows(stored):
    rng = np.random.default_rng(3)
    sets = [stored(rng.standard_normal((400, 50)).astype(np.float32)) for _ in range(3)]
    linear_cka(sets, memory="60kB")
    assert max(one.most for one in sets) == 100


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e20])
@pytest.mark.parametrize("debiased", [True, False])
def test_constant_features_are_like_nothing(related, constant, debiased):
    found = linear_cka([related[0], np.full((57, 3), constant), related[1]], debiased=debiased)
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(found[::2, ::2], linear_cka(related[:2], debiased=debiased), rtol=1e-13)


def test_images_that_are_all_equally_far_apart_are_like_nothing(related):
    assert np.isnan(linear_cka([related[0], np.eye(57)])[1]).all()


def test_what_cannot_be_compared_is_refused(related):
    with pytest.raises(UsageError, match="no set"):
        linear_cka([])
    with pytest.raises(UsageError, match=r"\[57, 56\] rows"):
        linear_cka([related[0], related[1][1:]])
    with pytest.raises(UsageError, match="4 images"):
        linear_cka(related, rows=3)
    with pytest.raises(UsageError, match="rows=0"):
        linear_cka(related, rows=0)
    with pytest.raises(ValueError, match="NaN"):
        linear_cka([np.full((9, 2), np.nan)])
