"""Coordinates in the span of some rows: the same inner products with them, the same distances to them."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from featurepipe.heads.preprocessing import RowSpace


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(12, 200)).astype(np.float32)


@pytest.fixture
def others():
    return np.random.default_rng(1).normal(size=(30, 200)).astype(np.float32)


def test_inner_products_and_distances_to_the_rows_are_kept(rows, others):
    space = RowSpace().fit(rows)
    turned, turned_others = space.transform(rows), space.transform(others)
    assert turned.shape == (12, 13)
    np.testing.assert_allclose(turned @ turned.T, rows.astype(float) @ rows.T.astype(float), atol=1e-9)
    np.testing.assert_allclose(turned_others @ turned.T, others.astype(float) @ rows.T.astype(float), atol=1e-9)
    np.testing.assert_allclose(cdist(turned_others, turned), cdist(others, rows), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(turned_others, axis=1), np.linalg.norm(others, axis=1), rtol=1e-6)


def test_the_last_coordinate_is_the_distance_from_the_span(rows):
    space = RowSpace().fit(rows)
    inside = np.array([[2.0, -1.0, *[0.5] * 10]]) @ rows
    outside = np.linalg.svd(rows)[2][-1]  # orthogonal to all rows
    np.testing.assert_allclose(space.transform(rows)[:, -1], 0, atol=1e-12)
    assert space.transform(inside)[0, -1] == pytest.approx(0, abs=1e-12)
    found = space.transform(inside + 3 * outside)[0]
    assert found[-1] == pytest.approx(3)
    np.testing.assert_allclose(found[:-1], space.transform(inside)[0, :-1], atol=1e-6)


def test_rows_that_depend_on_one_another_span_less(rows):
    repeated = np.concatenate([rows[:4], rows[:4], rows[:2] - rows[2:4]])
    space = RowSpace().fit(repeated)
    assert space.components_.shape == (200, 4)
    np.testing.assert_allclose(space.components_.T @ space.components_, np.eye(4), atol=1e-12)
    turned = space.transform(repeated)
    np.testing.assert_allclose(turned @ turned.T, repeated.astype(float) @ repeated.T, atol=1e-5)


def test_standardised_rows_lose_the_one_direction_that_their_mean_takes(rows):
    centred = rows.astype(float) - rows.mean(0, dtype=float)
    assert RowSpace().fit(centred).components_.shape == (200, 11)
