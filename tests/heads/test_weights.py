"""One rule for weights in every head: a weight is a number of equal rows, in memory and out of core."""

import numpy as np
import pytest

from featurepipe.errors import UsageError
from featurepipe.heads.families import HEADS, make_head

WEIGHTED = [name for name, family in HEADS.items() if family.weights]
TIGHT = {
    "logistic": {"tol": 1e-8},
    "linear-svm": {"tol": 1e-8, "max_iter": 20_000},
    "rbf-svm": {"gamma": 0.1},
    "xgboost": {"n_estimators": 10, "n_jobs": 1, "colsample_bytree": 1.0},
}


def groups(n=120, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % classes
    X = rng.normal(size=(n, 4)) + 1.5 * np.eye(classes, 4)[codes]
    return X, np.array(["ant", "bee", "cat"])[codes], rng.integers(1, 4, n) * (1 + 2 * (codes == 0))


def made(name, **options):
    return make_head(name, scale=False, **TIGHT.get(name, {}), **options)


def scores(head, X):
    found = head.decision_function(X)
    return found / np.abs(found).max()


@pytest.mark.parametrize("out_of_core", [False, True], ids=["in memory", "blocks"])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_whole_weight_is_so_many_rows(name, class_weight, out_of_core):
    X, y, weights = groups()
    make = lambda: made(name, class_weight=class_weight, out_of_core=out_of_core)  # noqa: E731
    weighted = make().fit(X, y, sample_weight=weights)
    repeated = make().fit(np.repeat(X, weights, axis=0), np.repeat(y, weights))
    np.testing.assert_allclose(scores(weighted, X), scores(repeated, X), atol=0.02)


@pytest.mark.parametrize("out_of_core", [False, True], ids=["in memory", "blocks"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_row_of_weight_zero_is_not_there(name, out_of_core):
    X, y, _ = groups()
    weights = (np.random.default_rng(1).random(len(y)) < 0.7).astype(float)
    make = lambda: made(name, out_of_core=out_of_core)  # noqa: E731
    weighted, without = make().fit(X, y, sample_weight=weights), make().fit(X[weights > 0], y[weights > 0])
    np.testing.assert_allclose(scores(weighted, X), scores(without, X), atol=0.02)


@pytest.mark.parametrize("out_of_core", [False, True], ids=["in memory", "blocks"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_class_whose_rows_all_weigh_nothing_is_refused_by_name(name, out_of_core):
    X, y, _ = groups()
    with pytest.raises(UsageError, match="every row of class 'bee' has weight zero: leave these rows out"):
        made(name, out_of_core=out_of_core).fit(X, y, sample_weight=(y != "bee").astype(float))


def test_many_small_classes_share_one_kernel_matrix_and_give_svcs_machine():
    from sklearn.svm import SVC

    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(40), 4)
    X = rng.normal(size=(40, 20))[y] + 0.5 * rng.normal(size=(160, 20))
    ours = make_head("rbf-svm", scale=False, gamma=0.05).fit(X, y)
    expected = SVC(gamma=0.05, decision_function_shape="ovr").fit(X, y)
    np.testing.assert_allclose(ours.decision_function(X), expected.decision_function(X), atol=2e-3)


@pytest.mark.parametrize("out_of_core", [False, True], ids=["in memory", "blocks"])
def test_centroid_predicts_its_highest_score(out_of_core):
    rng = np.random.default_rng(0)
    codes = (rng.random(400) ** 2 * 5).astype(int)
    X = rng.normal(size=(400, 6)) * np.array([1, 1, 4, 1, 0.3, 1]) + np.eye(5, 6)[codes]
    head = make_head("centroid", out_of_core=out_of_core).fit(X, codes)
    assert (head.classes_[head.decision_function(X).argmax(axis=1)] == head.predict(X)).all()
    nearest = ((X[:, None] - np.stack([X[codes == k].mean(axis=0) for k in range(5)])) ** 2).sum(axis=2)
    scaled = make_head("centroid", scale=False, out_of_core=out_of_core).fit(X, codes)
    assert (scaled.predict(X) == nearest.argmin(axis=1)).all()


@pytest.mark.parametrize("out_of_core", [False, True], ids=["in memory", "blocks"])
@pytest.mark.parametrize("weight", [1e-300, 1e300, 3e38])
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_beyond_any_number_of_rows_is_refused_with_the_next_step(name, weight, out_of_core):
    X, y, _ = groups()
    weights = np.ones(len(y))
    weights[7] = weight
    with pytest.raises(
        UsageError, match=r"^sample_weight has values from .*: scale them to lie between 1e-30 and 1e\+30$"
    ):
        made(name, out_of_core=out_of_core).fit(X, y, sample_weight=weights)
