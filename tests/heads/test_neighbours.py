"""Neighbours and centroids from blocks are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import UsageError
from featurepipe.heads.neighbours import BlockCentroid, BlockNeighbours


@pytest.fixture(scope="module", params=["ten classes", "two classes"])
def sides(request):
    """Features and labels to learn from, and features of others."""
    X, numbers = load_digits(return_X_y=True)
    kept = np.isin(numbers, [3, 8]) if request.param == "two classes" else slice(None)
    X, labels = X[kept] + 0.01, np.array([f"digit {number}" for number in numbers])[kept]
    return X[::2], labels[::2], X[1::2]


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_neighbours_are_scikit_learns_and_predictions_stream(sides, stored, weights):
    X, y, others = sides
    theirs = KNeighborsClassifier(7, weights=weights, algorithm="brute").fit(X, y)
    ours = BlockNeighbours(7, weights=weights, memory="500kB").fit(stored(X, y))
    ours.memory = "100kB"
    features = stored(others)
    np.testing.assert_allclose(ours.predict_proba(features), theirs.predict_proba(others), atol=1e-12)
    assert ours.predict(features).tolist() == theirs.predict(others).tolist() == ours.predict(others).tolist()
    assert features.most < 70


def test_rows_that_memory_does_not_hold_are_refused(sides, stored):
    X, y, _ = sides
    needed = X.size * 4
    BlockNeighbours(memory=needed).fit(stored(X.astype(np.float16), y))
    with pytest.raises(UsageError, match=rf"knn keeps its training rows: {len(X)} x 64 values take .* allow more"):
        BlockNeighbours(memory=needed - 1).fit(stored(X.astype(np.float16), y))


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_ has at least 1 zero")
@pytest.mark.parametrize("threshold", [None, 0.1, 0.5, 2.0, 50.0])
def test_centroids_are_scikit_learns(sides, stored, threshold):
    X, y, others = sides
    theirs = NearestCentroid(shrink_threshold=threshold).fit(X, y)
    ours = BlockCentroid(threshold, memory="100kB").fit(stored(X, y))
    np.testing.assert_allclose(ours.centroids_, theirs.centroids_, rtol=0, atol=1e-12)
    if threshold != 50:  # there all centroids are one
        assert ours.predict(stored(others)).tolist() == theirs.predict(others).tolist()


def test_decision_values_order_classes_as_distances_do(sides):
    X, y, others = sides
    head = BlockCentroid().fit(X, y)
    nearness = -0.5 * ((others[:, None] - head.centroids_) ** 2).sum(axis=2) + 0.5 * (others**2).sum(axis=1)[:, None]
    expected = nearness[:, 1] - nearness[:, 0] if len(head.classes_) == 2 else nearness
    np.testing.assert_allclose(head.decision_function(others), expected, atol=1e-8)


def test_a_class_with_one_row_has_it_as_its_centroid():
    head = BlockCentroid().fit([[0.0, 0], [0, 2], [4, 4]], ["a", "a", "b"])
    assert head.centroids_.tolist() == [[0, 1], [4, 4]]


def test_shrinking_by_nothing_or_less_is_refused():
    with pytest.raises(UsageError, match=r"shrink_threshold=0 must be positive, or None"):
        BlockCentroid(0).fit(np.eye(2), ["a", "b"])


def test_one_class_is_refused():
    for head in (BlockNeighbours(1), BlockCentroid()):
        with pytest.raises(UsageError, match="one class only"):
            head.fit(np.eye(3), ["cat"] * 3)


@parametrize_with_checks([BlockNeighbours(), BlockCentroid(), BlockCentroid(0.1)])
def test_scikit_learns_conventions_hold(estimator, check):
    check(estimator)
