"""Heads for numbers are scikit-learn's and xgboost's: their optima and predictions, from memory and streamed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import xgboost
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVR
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import BundleError, UsageError
from featurepipe.heads.families import FAMILIES, make_head
from featurepipe.heads.kernel import BlockKernelRidge
from featurepipe.heads.linear.ridge import BlockLinearSVR, BlockRidge
from featurepipe.heads.moments import gram_of
from featurepipe.heads.neighbours import BlockNeighboursRegressor
from featurepipe.heads.trees.boosted import BoostedRegressor, BoostedTrees

CONTINUOUS = FAMILIES["continuous"]
QUICK = {"xgboost": {"n_estimators": 30, "max_depth": 3, "n_jobs": 1}, "linear-svm": {"C": 0.1}}


@pytest.fixture(scope="module")
def sides():
    """Features (n, 10), numbers and weights to learn from; others to predict."""
    X, y = load_diabetes(return_X_y=True)
    X = 30 * X + np.linspace(-5, 5, 10)
    weights = np.random.default_rng(1).uniform(0, 3, 300)
    weights[::17] = 0
    return X[:300], y[:300] + 1000, weights, X[300:], y[300:] + 1000


class Carrying:
    """Blocks (n, D) that carry numbers, and count the most rows read at once."""

    def __init__(self, array, targets=None):
        self.array, self.targets, self.most = array, targets, 0
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, dtype=None, *, rows=None):
        found = np.array(self.array if rows is None else self.array[rows], dtype)
        self.most = max(self.most, len(found))
        return found


def quick(name, **options):
    return make_head(name, target_type="continuous", **QUICK.get(name, {}), **options)


def close(found, expected, rtol=1e-9):
    __tracebackhide__ = True
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


def test_the_families_for_numbers():
    assert list(CONTINUOUS) == ["ridge", "linear-svm", "kernel-ridge", "xgboost", "knn"]
    with pytest.raises(
        UsageError, match=r"head 'lda' learns multiclass targets, not continuous ones; heads that do: ridge"
    ):
        make_head("lda", target_type="continuous")
    with pytest.raises(UsageError, match=r"unknown target type 'number'; choices: multiclass"):
        make_head("ridge", target_type="number")
    with pytest.raises(UsageError, match=r"unknown head 'rigde'; nearest: ridge"):
        make_head("rigde", target_type="continuous")
    with pytest.raises(UsageError, match=r"class_weight='balanced' is for classes"):
        make_head("ridge", target_type="continuous", class_weight="balanced")


@pytest.mark.parametrize("out_of_core", [False, True])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_each_family_learns_a_number_in_its_own_unit(sides, name, out_of_core):
    X, y, _, others, truth = sides
    head = quick(name, out_of_core=out_of_core)
    assert head.fit(X, y).score(others, truth) > 0.3
    assert head.predict(others).shape == truth.shape
    assert clone(head).get_params().keys() == head.get_params().keys()
    in_thousandths = quick(name, out_of_core=out_of_core).fit(X, y * 1000)
    close(in_thousandths.predict(others), head.predict(others) * 1000, 1e-3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(head)).predict(others), head.predict(others))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_blocks_with_their_targets_are_what_arrays_are(sides, name):
    X, y, _, others, _ = sides
    whole = quick(name, out_of_core=True, pca=5).fit(X, y)
    streamed = quick(name, out_of_core=True, pca=5, memory="4MB").fit(Carrying(X, y))
    close(streamed.predict(Carrying(others)), whole.predict(others), 1e-6)
    assert streamed.score(Carrying(X, y)) == pytest.approx(whole.score(X, y), abs=1e-6)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_is_scikit_learns(sides, alpha, weighted):
    X, y, weights, others, _ = sides
    weights = weights if weighted else None
    theirs = Ridge(alpha).fit(X, y, weights)
    blocks = Carrying(X, y)
    for ours in (
        BlockRidge(alpha, memory="5kB").fit(blocks, None, weights),
        make_head("ridge", target_type="continuous", scale=False, alpha=alpha).fit(X, y, weights),
    ):
        close(ours.coef_, theirs.coef_)
        close(ours.intercept_, theirs.intercept_)
        close(ours.predict(others), theirs.predict(others))
    assert blocks.most < 100, "it was to be read in several blocks"


def test_ridge_loses_no_digits_to_large_means():
    rng = np.random.default_rng(0)
    X, noise = rng.normal(size=(400, 5)), rng.normal(size=400)
    y = X @ [1, 2, 3, 4, 5.0] + noise
    far = BlockRidge(2.0, memory="5kB").fit(X + 1e6, y + 1e9)
    close(far.coef_, BlockRidge(2.0).fit(X, y).coef_, 1e-7)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_large_numbers_keep_their_small_differences_in_float32_features(sides, name):
    X, y, _, others, _ = sides
    seconds = y - 1000 + 1.75e9
    head, plain = (quick(name).fit(X.astype(np.float32), numbers) for numbers in (seconds, y - 1000))
    found = head.predict(others.astype(np.float32)) - 1.75e9
    np.testing.assert_allclose(found, plain.predict(others.astype(np.float32)), rtol=0, atol=1e-2)


def test_moments_with_targets_are_joined_about_the_common_mean(sides):
    X, y, weights, _, _ = sides
    targets = np.stack([y, y**2])
    whole = gram_of(X, None, 0, weights, targets=targets)
    parts = [
        gram_of(X[part], None, 0, weights[part], targets=targets[:, part]) for part in (slice(90), slice(90, None))
    ]
    mean = np.average(X, axis=0, weights=weights)
    close(whole.target_sums, targets @ weights)
    close(whole.target_products, (targets * weights) @ (X - mean))
    close((parts[0] + parts[1]).target_products, whole.target_products)
    close((parts[0] + parts[1]).target_sums, whole.target_sums)


@pytest.mark.parametrize("weighted", [False, True])
def test_linear_svr_is_scikit_learns_of_the_standardised_number(sides, weighted):
    X, y, weights, others, _ = sides
    weights = weights if weighted else None
    mean = np.average(y, weights=weights)
    spread = np.sqrt(np.average((y - mean) ** 2, weights=weights))
    options = {"C": 0.3, "epsilon": 0.2, "tol": 1e-6}
    theirs = LinearSVR(loss="squared_epsilon_insensitive", dual=False, **options).fit(X, (y - mean) / spread, weights)
    ours = BlockLinearSVR(**options).fit(Carrying(X, y), None, weights)
    close(ours.predict(Carrying(others)), theirs.predict(others) * spread + mean)
    close(ours.coef_, theirs.coef_ * spread)


@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_ridge_is_scikit_learns_of_the_centred_number(sides, weighted):
    X, y, weights, others, _ = sides
    weights = weights if weighted else None
    mean = np.average(y, weights=weights)
    kept = slice(None) if weights is None else weights > 0  # scikit-learn divides by the root of a weight
    theirs = KernelRidge(alpha=0.5, kernel="rbf", gamma=2 / (10 * X.var())).fit(
        X[kept], (y - mean)[kept], None if weights is None else weights[kept]
    )
    ours = BlockKernelRidge(0.5, gamma_factor=2, memory="3MB").fit(Carrying(X, y), None, weights)
    close(ours.predict(Carrying(others)), theirs.predict(others) + mean)


@pytest.mark.parametrize("weighted", [False, True])
def test_trees_are_those_of_xgbregressor(sides, weighted):
    X, y, weights, others, _ = sides
    weights = weights if weighted else None
    options = {
        "n_estimators": 8,
        "max_depth": 3,
        "max_bin": 64,
        "subsample": 0.7,
        "colsample_bytree": 0.5,
        "n_jobs": 1,
        "learning_rate": 0.3,
    }
    X, others = X.astype(np.float32), others.astype(np.float32)
    mean = np.average(y, weights=weights)
    theirs = xgboost.XGBRegressor(tree_method="hist", random_state=3, base_score=0.0, **options)
    theirs.fit(X, y - mean, sample_weight=weights)
    blocks = Carrying(X, y)
    ours = BoostedRegressor(random_state=3, memory="4kB", **options).fit(blocks, None, weights)
    assert ours.booster_.get_dump(dump_format="json") == theirs.get_booster().get_dump(dump_format="json")
    assert blocks.most < 100, "it was to be read in several blocks"
    close(ours.predict(Carrying(others)), theirs.predict(others).astype(np.float64) + mean, 1e-7)
    own_mean = xgboost.XGBRegressor(tree_method="hist", random_state=3, **options).fit(X, y, sample_weight=weights)
    close(ours.predict(others), own_mean.predict(others), 1e-5)


def test_trees_stop_early_on_the_validation_error_and_travel_as_bytes(sides):
    X, y, _, others, truth = sides
    head = BoostedRegressor(200, early_stopping_rounds=5, n_jobs=1, random_state=0, colsample_bytree=1.0)
    head.fit(X, y, eval_set=(Carrying(others, truth), None))
    assert head.best_iteration_ + 6 == len(head.evaluation_) < 200
    error = np.sqrt(np.mean((head.predict(others) - truth) ** 2))
    assert error == pytest.approx(min(head.evaluation_), rel=1e-5)
    raw = head.booster_ubjson()
    np.testing.assert_array_equal(head.without_booster().with_booster(raw).predict(others), head.predict(others))
    classes = BoostedTrees(3, n_jobs=1).fit(X, y > np.median(y))
    with pytest.raises(BundleError, match=r"the booster takes 10 features for a number, the head 10 for 2 classes"):
        classes.without_booster().with_booster(raw)
    with pytest.raises(UsageError, match=r"early_stopping_rounds needs validation data"):
        BoostedRegressor(early_stopping_rounds=5).fit(X, y)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_neighbours_are_scikit_learns(sides, weights):
    X, y, _, others, _ = sides
    theirs = KNeighborsRegressor(7, weights=weights, algorithm="brute").fit(X, y)
    ours = BlockNeighboursRegressor(7, weights=weights, memory="1MB").fit(Carrying(X, y))
    close(ours.predict(Carrying(others)), theirs.predict(others))
    plain = make_head("knn", target_type="continuous", scale=False, n_neighbors=7, weights=weights).fit(X, y)
    close(plain.predict(others), theirs.predict(others))


def test_columns_are_standardised_as_for_classes(sides):
    X, y, _, others, _ = sides
    expected = make_pipeline(StandardScaler(), Ridge(3.0)).fit(X, y).predict(others)
    for out_of_core in (False, True):
        head = make_head("ridge", target_type="continuous", out_of_core=out_of_core, alpha=3.0)
        assert list(head.named_steps) == ["scale", "head"]
        close(head.fit(X, y).predict(others), expected)


@pytest.mark.parametrize("out_of_core", [False, True])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_bad_targets_are_refused_in_words(sides, name, out_of_core):
    X, y, _, _, _ = sides
    head = quick(name, out_of_core=out_of_core)
    gap, endless = y.copy(), y.copy()
    gap[[3, 7]], endless[5] = np.nan, np.inf
    for target, message in (
        (gap, r"2 of 300 rows have no target \(Input y contains NaN; the first is row 3\)"),
        ([None, *y[1:]], r"1 of 300 rows have no target"),
        (endless, r"Input y contains infinity: 1 of 300 rows \(the first is row 5\)"),
        (np.full(300, 4.5), r"constant target: all 300 rows have the number 4.5"),
        (np.full(300, "old"), r"the target is text, such as 'old', not a number"),
        (np.array(["2024-01-01"] * 300, "M8[D]"), r"the target is a date"),
    ):
        with pytest.raises(UsageError, match=message):
            head.fit(X, target)


def test_wrong_parameters_and_too_many_rows_are_refused(sides):
    X, y, _, _, _ = sides
    for head, message in (
        (BlockRidge(-1), r"alpha=-1 must be 0 or more"),
        (BlockLinearSVR(0), r"C=0 must be positive"),
        (BlockKernelRidge(0), r"alpha=0 must be positive"),
        (BlockKernelRidge(gamma="wide"), r"gamma='wide' must be 'scale', 'auto' or a positive number"),
        (
            BlockKernelRidge(exact_rows=200),
            r"300 are more than exact_rows=200: train on fewer rows, or take ridge or xgboost",
        ),
        (BlockKernelRidge(memory="1MB"), r"kernel matrices of 1 MB, more than the memory allowed \(1MB\)"),
        (
            BlockNeighboursRegressor(memory="10kB"),
            r"knn keeps its training rows.*takes? .*or take a head that keeps none \(ridge",
        ),
        (BlockLinearSVR(memory="10kB"), r"linear-svm of a number keeps its training rows"),
    ):
        with pytest.raises(UsageError, match=message):
            head.fit(Carrying(X, y))


def test_a_grid_search_takes_a_head_for_numbers(sides):
    X, y, _, _, _ = sides
    search = GridSearchCV(make_head("ridge", target_type="continuous"), {"head__alpha": [1.0, 1e6]}, cv=3).fit(X, y)
    assert search.best_params_ == {"head__alpha": 1.0}


@parametrize_with_checks(
    [
        BlockRidge(),
        BlockLinearSVR(tol=1e-10),
        BlockKernelRidge(gamma=0.1),  # "scale" is of all rows, whatever they weigh
        BlockNeighboursRegressor(),
        BoostedRegressor(n_estimators=30, n_jobs=1),
    ]
)
def test_scikit_learns_conventions_hold(estimator, check):
    check(estimator)
