"""Boosted trees: xgboost's own, tree for tree, from memory and streamed; labels kept; out to bytes and back."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import xgboost
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import BundleError, UsageError
from featurepipe.heads.trees.boosted import BoostedTrees


@pytest.fixture(scope="module", params=["ten classes", "two classes"])
def digits(request):
    X, numbers = load_digits(return_X_y=True)
    kept = np.isin(numbers, [3, 8]) if request.param == "two classes" else np.arange(len(X)) % 2 == 0
    labels = np.array([f"digit {number}" for number in numbers])
    X = X + np.random.default_rng(0).normal(0, 0.5, X.shape)
    return X[kept].astype(np.float32), labels[kept]


def trees(head, **changes):
    options = {
        "n_estimators": 8,
        "max_depth": 3,
        "max_bin": 64,
        "colsample_bytree": 0.3,
        "n_jobs": 1,
        "random_state": 3,
    }
    return head(**{**options, **changes})


def dump(booster):
    return booster.get_dump(dump_format="json")


@pytest.mark.parametrize("weighted", [False, True])
def test_streamed_trees_are_those_of_xgbclassifier(digits, stored, weighted):
    X, y = digits
    weights = np.random.default_rng(1).uniform(0.2, 3, len(y)) if weighted else None
    options = {"subsample": 0.7, "max_bin": 256, "learning_rate": 0.3}
    codes = np.unique(y, return_inverse=True)[1]
    theirs = trees(xgboost.XGBClassifier, tree_method="hist", **options).fit(X, codes, sample_weight=weights)
    features = stored(X, y)
    ours = trees(BoostedTrees, memory="100kB", **options).fit(features, None, weights)
    assert dump(ours.booster_) == dump(theirs.get_booster())
    assert features.most < 150, "it was to be read in several blocks"
    np.testing.assert_allclose(ours.predict_proba(features), theirs.predict_proba(X), rtol=1e-5, atol=1e-7)
    assert ours.predict(X).tolist() == ours.classes_[theirs.predict(X)].tolist()
    assert dump(trees(BoostedTrees, **options).fit(X, y, weights).booster_) == dump(ours.booster_)


def test_class_weights_are_sample_weights(digits):
    X, y = digits
    by_class = {label: 1.0 + place for place, label in enumerate(np.unique(y))}
    weighted = trees(BoostedTrees, class_weight=by_class).fit(X, y)
    weights = np.array([by_class[label] for label in y])
    assert dump(weighted.booster_) == dump(trees(BoostedTrees).fit(X, y, weights).booster_)
    assert dump(weighted.booster_) != dump(trees(BoostedTrees).fit(X, y).booster_)


@pytest.mark.parametrize("seed", [0, 2, 5])
@pytest.mark.parametrize("own_labels", [False, True])
def test_early_stopping_uses_the_best_round_of_the_validation_data(digits, stored, own_labels, seed):
    X, y = digits
    y = np.where(
        np.random.default_rng(0).random(len(y)) < 0.2, np.random.default_rng(1).permutation(y), y
    )  # no easy data
    X, y, unseen, truth = X[::2], y[::2], X[1::2], y[1::2]
    head = BoostedTrees(400, learning_rate=0.5, max_depth=6, early_stopping_rounds=5, n_jobs=1, random_state=seed)
    head.fit(X, y, eval_set=(stored(unseen, truth), None) if own_labels else (unseen, truth))
    assert head.best_iteration_ == int(np.argmin(head.evaluation_)) < len(head.evaluation_) - 1 < 399
    own = head.predict_log_proba(unseen)[np.arange(len(truth)), np.searchsorted(head.classes_, truth)]
    assert -own.mean() == pytest.approx(min(head.evaluation_), rel=1e-4)


def test_validation_data_are_not_quantised_on_their_own(digits):
    X, y = digits
    codes = np.unique(y, return_inverse=True)[1]
    options = {"learning_rate": 0.3, "early_stopping_rounds": 3}
    theirs = trees(xgboost.XGBClassifier, tree_method="hist", **options)
    theirs.fit(X[::2], codes[::2], eval_set=[(X[1::2], codes[1::2])], verbose=False)
    ours = trees(BoostedTrees, **options).fit(X[::2], y[::2], eval_set=(X[1::2], y[1::2]))
    (found,) = theirs.evals_result()["validation_0"].values()
    np.testing.assert_allclose(ours.evaluation_, found, rtol=1e-6)


def test_early_stopping_without_validation_data_is_refused(digits):
    with pytest.raises(UsageError, match=r"needs validation data: fit\(X, y, eval_set="):
        BoostedTrees(early_stopping_rounds=5).fit(*digits)


def test_validation_labels_must_be_known(digits):
    X, y = digits
    with pytest.raises(UsageError, match="labels that the training rows lack: cat"):
        BoostedTrees().fit(X, y, eval_set=(X[:2], ["cat", y[0]]))
    with pytest.raises(UsageError, match="3 rows of features but 2 labels"):
        BoostedTrees().fit(X, y, eval_set=(X[:3], y[:2]))


def test_the_booster_goes_out_as_bytes_and_comes_back(digits):
    X, y = digits
    head = trees(BoostedTrees).fit(X, y)
    raw, rest = head.booster_ubjson(), pickle.loads(pickle.dumps(head.without_booster()))
    assert not any(type(value).__module__.startswith("xgboost") for value in vars(rest).values())
    with pytest.raises(UsageError, match="this head has no trees"):
        rest.predict(X)
    back = rest.with_booster(raw)
    np.testing.assert_array_equal(back.decision_function(X), head.decision_function(X))
    assert back.predict(X).tolist() == head.predict(X).tolist()
    assert hasattr(head, "booster_")
    assert not hasattr(rest, "booster_")


def test_bytes_that_are_no_such_booster_are_refused(digits):
    X, y = digits
    head = trees(BoostedTrees).fit(X, y)
    with pytest.raises(BundleError, match="these 7 bytes are no booster"):
        head.with_booster(b"nothing")
    with pytest.raises(BundleError, match=r"takes 7 features for .*, the head 64 for"):
        head.with_booster(trees(BoostedTrees).fit(X[:, :7], y).booster_ubjson())
    other = "two" if len(head.classes_) > 2 else "three"
    labels = np.resize(["a", "b"] if other == "two" else ["a", "b", "c"], len(X))
    with pytest.raises(BundleError, match=f"for {2 if other == 'two' else 3} classes"):
        head.with_booster(trees(BoostedTrees).fit(X, labels).booster_ubjson())


def test_an_error_while_reading_reaches_the_caller(digits, stored):
    X, y = digits
    X = X.copy()
    X[5, 2] = np.nan
    with pytest.raises(UsageError, match="contains NaN: row 5"):
        trees(BoostedTrees, memory="100kB").fit(stored(X, y))


@parametrize_with_checks([BoostedTrees(n_estimators=5, n_jobs=1)])
def test_scikit_learns_conventions_hold(estimator, check):
    check(estimator)
