"""One pass gives the moments that NumPy gives of everything at once."""

from __future__ import annotations

import numpy as np
import pytest

from featurepipe.heads.moments import gram_of


@pytest.mark.parametrize("memory", [None, 3 * 16 * 8 * 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_equal_those_of_all_rows_at_once(memory, weighted):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((203, 6)) * [1, 2, 3, 1e-3, 0, 1] + [0, 1e4, -5, 0, 3, 0]
    codes = rng.integers(0, 3, 203)
    weights = rng.random(203) if weighted else np.ones(203)
    gram = gram_of(features, codes, 4, weights if weighted else None, memory=memory)
    mean = np.average(features, axis=0, weights=weights)
    centred = features - mean
    np.testing.assert_allclose(gram.weight, weights.sum())
    np.testing.assert_allclose(gram.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(gram.scatter, (centred * weights[:, None]).T @ centred, rtol=1e-9, atol=1e-9)
    for number in range(3):
        members = codes == number
        np.testing.assert_allclose(
            gram.class_means[number], np.average(features[members], axis=0, weights=weights[members]), rtol=1e-12
        )
        np.testing.assert_allclose(gram.class_weights[number], weights[members].sum())
    assert gram.class_weights[3] == 0
    assert not gram.class_means[3].any()


def test_large_means_cancel_no_digits_in_float32():
    rng = np.random.default_rng(1)
    features = (rng.standard_normal((5000, 3)) + 1000).astype(np.float32)
    gram = gram_of(features, dtype=np.float32, memory=3 * 16 * 4 * 3)
    np.testing.assert_allclose(gram.variance, features.astype(np.float64).var(axis=0), rtol=1e-5)


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_values_that_are_not_finite_are_refused_by_name(value, name):
    features = np.zeros((40, 3))
    features[33, 1] = value
    with pytest.raises(ValueError, match=name):
        gram_of(features)
