"""Scaling and PCA of blocks are scikit-learn's of the whole array."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import ArrayBlocks, MappedBlocks
from featurepipe.heads.preprocessing import BlockPCA, BlockScaler


@parametrize_with_checks([BlockScaler(), BlockPCA()])
def test_they_are_estimators(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


@pytest.mark.parametrize("memory", [None, 30_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scaling_of_blocks_is_scaling_of_the_array(digits, dtype, memory):
    x = (digits[0] * 3 - 40).astype(dtype)
    expected = StandardScaler().fit(x.astype(np.float64))
    found = BlockScaler(memory=memory).fit(ArrayBlocks(x))
    np.testing.assert_allclose(found.mean_, expected.mean_, rtol=1e-13)
    np.testing.assert_allclose(found.scale_, expected.scale_, rtol=1e-12)
    view = found.transform(ArrayBlocks(x))
    assert isinstance(view, MappedBlocks)
    np.testing.assert_allclose(view.read(np.float64), expected.transform(x.astype(np.float64)), atol=1e-12)


def test_large_means_lose_no_digits():
    x = np.random.default_rng(0).normal(1e6, 1e-2, (3000, 3))
    found = BlockScaler(memory=20_000).fit(ArrayBlocks(x))
    np.testing.assert_allclose(found.scale_, x.std(axis=0), rtol=1e-8)


def test_sample_weights_count_rows(digits):
    x, y = digits
    found = BlockScaler(memory=30_000).fit(ArrayBlocks(x), sample_weight=(y < 3).astype(float))
    np.testing.assert_allclose(found.mean_, x[y < 3].mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("components", [1, 10, 0.5, 0.95, None])
def test_components_are_those_of_scikit_learn_with_their_signs(digits, components):
    x, _ = digits
    expected = PCA(components, svd_solver="covariance_eigh").fit(x)
    found = BlockPCA(components, memory=30_000).fit(ArrayBlocks(x))
    rank = min(len(found.components_), 61)  # three pixels are always white
    assert found.components_.shape == expected.components_.shape
    np.testing.assert_allclose(found.components_[:rank], expected.components_[:rank], atol=1e-10)
    np.testing.assert_allclose(found.explained_variance_, expected.explained_variance_, atol=1e-10)
    np.testing.assert_allclose(found.explained_variance_ratio_, expected.explained_variance_ratio_, atol=1e-12)
    np.testing.assert_allclose(
        found.transform(ArrayBlocks(x)).read()[:, :rank], expected.transform(x)[:, :rank], atol=1e-9
    )


@pytest.mark.parametrize("components", [0, -1, 65, 2.5, 1.5])
def test_a_number_of_components_that_cannot_be_is_refused(digits, components):
    with pytest.raises(UsageError, match="whole number from 1 to 64"):
        BlockPCA(components).fit(digits[0])


def test_a_pipeline_of_blocks_ends_as_one_of_arrays(digits):
    x, y = digits
    steps = make_pipeline(BlockScaler(memory=30_000), BlockPCA(20, memory=30_000))
    view = steps.fit_transform(ArrayBlocks(x))
    assert view.shape == (len(x), 20)
    head = LogisticRegression(max_iter=2000)
    expected = make_pipeline(StandardScaler(), PCA(20, svd_solver="covariance_eigh"), clone(head)).fit(x, y)
    np.testing.assert_array_equal(head.fit(view.read(), y).predict(view.read()), expected.predict(x))


@pytest.mark.parametrize("estimator", [BlockScaler(), BlockPCA()])
def test_wrong_width_and_values_are_refused(digits, estimator):
    x, _ = digits
    with pytest.raises(UsageError, match=r"X has 63 features, but \w+ is expecting 64 features"):
        clone(estimator).fit(x).transform(ArrayBlocks(x[:, 1:]))
    broken = x.copy()
    broken[7, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        clone(estimator).fit(ArrayBlocks(broken))
