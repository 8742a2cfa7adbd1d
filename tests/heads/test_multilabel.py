"""Heads for several labels of each row: scikit-learn's one-against-the-rest optimum, unknown entries, and what is refused."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
from scipy.special import expit
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from featurepipe.errors import UsageError
from featurepipe.heads import blocks as heads_blocks
from featurepipe.heads.families import FAMILIES, make_head
from featurepipe.heads.label_matrix import label_matrix, labels_given
from featurepipe.heads.linear import losses, multilabel, row_sums
from featurepipe.heads.linear.multilabel import (
    MultilabelLinearSVC,
    MultilabelLogisticRegression,
    MultilabelRidge,
    fit_label_path,
)
from featurepipe.heads.multilabel import MultilabelNeighbours, MultilabelTrees
from featurepipe.heads.trees.boosted import BoostedTrees

ROWS, WIDTH, LABELS = 600, 30, 5
NAMES = ["cat", "dog", "emu", "fox", "gnu"]
QUICK = {"xgboost": {"n_estimators": 8, "max_depth": 3, "n_jobs": 1}}


@functools.cache
def made(dtype=np.float64):
    """Columns of different scales and means, labels from 1 % to 76 % positive, a third of the entries unknown, and weights."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((ROWS, WIDTH)) * np.linspace(0.5, 3, WIDTH) + 2
    scores = features @ rng.standard_normal((WIDTH, LABELS)) + 3 * rng.standard_normal((ROWS, LABELS))
    labels = (scores > np.array([0, 5, 10, -5, 20])).astype(np.float32)
    some = np.where(rng.random(labels.shape) < 0.3, np.nan, labels).astype(np.float32)
    return features.astype(dtype), labels, some, rng.uniform(0.2, 3, ROWS)


def objective(kind, coef, intercept, X, y, weights, C):
    """What is minimised for one label, in float64, written here once more."""
    margins = np.where(y == 1, 1, -1) * (X.astype(np.float64) @ coef + intercept)
    if kind is MultilabelLogisticRegression:
        return C * (weights * np.logaddexp(0, -margins)).sum() + coef @ coef / 2
    return C * (weights * np.maximum(0, 1 - margins) ** 2).sum() + (coef @ coef + intercept**2) / 2


def theirs(kind, C, **options):
    if kind is MultilabelLogisticRegression:
        return LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000, **options)
    return LinearSVC(C=C, dual=False, tol=1e-10, max_iter=100_000, **options)


@pytest.mark.parametrize("own_from", [0, 6], ids=["shared basis first", "a matrix each"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("kind", [MultilabelLogisticRegression, MultilabelLinearSVC])
def test_each_label_reaches_scikit_learns_optimum_on_its_known_rows(kind, unknown, weighted, own_from, monkeypatch):
    monkeypatch.setattr(multilabel, "_OWN_FROM", own_from)
    X, whole, some, weights = made()
    Y = some if unknown else whole
    weights = weights if weighted else np.ones(ROWS)
    for C in (0.01, np.array([0.01, 1, 100, 0.1, 10])):
        head = kind(C=C).fit(X, Y, sample_weight=weights if weighted else None)
        predicted = head.predict(X)
        for label, own in enumerate(np.broadcast_to(C, LABELS)):
            known = ~np.isnan(Y[:, label])
            data = X[known], Y[known, label], weights[known]
            other = theirs(kind, own).fit(*data)
            ours = objective(kind, head.coef_[label], head.intercept_[label], *data, own)
            least = objective(kind, other.coef_[0], other.intercept_[0], *data, own)
            assert least * (1 - 1e-7) <= ours <= least * (1 + 1e-5)
            assert np.mean(predicted[:, label] == other.predict(X)) >= 0.999


@pytest.mark.parametrize("kind", [MultilabelLogisticRegression, MultilabelLinearSVC])
def test_it_is_one_vs_rest_of_scikit_learn(kind):
    X, Y, _, _ = made()
    ours = kind(C=0.1, class_weight="balanced").fit(X, Y)
    other = OneVsRestClassifier(theirs(kind, 0.1, class_weight="balanced")).fit(X, Y)
    assert np.mean(ours.predict(X) == other.predict(X)) >= 0.999
    np.testing.assert_allclose(ours.decision_function(X), other.decision_function(X), atol=1e-2)
    if kind is MultilabelLogisticRegression:
        np.testing.assert_allclose(ours.predict_proba(X), other.predict_proba(X), atol=1e-3)
    weighted = kind(C=0.1, class_weight={1: 2.0, 0: 0.5}).fit(X, Y)
    alike = theirs(kind, 0.1, class_weight={1: 2.0, 0: 0.5}).fit(X, Y[:, 0])
    np.testing.assert_allclose(weighted.decision_function(X)[:, 0], alike.decision_function(X), atol=1e-2)


def wide():
    """1,500 rows of 200 float32 values, and 8 labels of which a fifth is unknown."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((1500, 60)).astype(np.float32) @ rng.standard_normal((60, 200)).astype(np.float32) + 1
    Y = (X @ rng.standard_normal((200, 8)) > 15 * rng.standard_normal((1500, 8)) + 20).astype(np.float32)
    Y[rng.random(Y.shape) < 0.2] = np.nan
    return X, Y


@functools.cache
def least_objectives(kind):
    """Of scikit-learn's heads on `wide`, label by label."""
    X, Y = wide()
    found = []
    for label in range(8):
        known = ~np.isnan(Y[:, label])
        data = X[known].astype(np.float64), Y[known, label], np.ones(known.sum())
        other = theirs(kind, 1e-3).fit(*data)
        found.append(objective(kind, other.coef_[0], other.intercept_[0], *data, 1e-3))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("own_from", [0, 6])
@pytest.mark.parametrize("kind", [MultilabelLogisticRegression, MultilabelLinearSVC])
def test_wide_float32_features_that_are_streamed_reach_the_same_optimum(kind, own_from, stored, monkeypatch):
    monkeypatch.setattr(multilabel, "_OWN_FROM", own_from)
    monkeypatch.setitem(multilabel.prepare.__globals__, "_SMALL_BYTES", 0)
    X, Y = wide()
    blocks = stored(X)
    head = kind(C=1e-3, memory="900kB").fit(blocks, Y)
    assert blocks.most < len(X) / 3
    for label, least in enumerate(least_objectives(kind)):
        known = ~np.isnan(Y[:, label])
        data = X[known].astype(np.float64), Y[known, label], np.ones(known.sum())
        assert objective(kind, head.coef_[label], head.intercept_[label], *data, 1e-3) <= least * (1 + 1e-5)


@pytest.mark.parametrize("kind", [MultilabelLogisticRegression, MultilabelLinearSVC])
def test_fewer_rows_than_values_are_learned_in_their_own_span(kind, wrap, monkeypatch):
    rng = np.random.default_rng(2)
    X = rng.standard_normal((60, 150)) + 2
    Y = (X[:, :4] + rng.standard_normal((60, 4)) > 2).astype(np.float32)
    Y[rng.random(Y.shape) < 0.2] = np.nan
    head = kind(C=0.05).fit(wrap(X), Y)
    for label in range(4):
        known = ~np.isnan(Y[:, label])
        data = X[known], Y[known, label], np.ones(known.sum())
        other = theirs(kind, 0.05).fit(*data)
        least = objective(kind, other.coef_[0], other.intercept_[0], *data, 0.05)
        assert objective(kind, head.coef_[label], head.intercept_[label], *data, 0.05) <= least * (1 + 1e-5)
    monkeypatch.setattr(multilabel, "_ROW_SPACE_BYTES", 0)
    whole = kind(C=0.05).fit(X, Y)
    np.testing.assert_allclose(head.coef_, whole.coef_, atol=1e-3)
    np.testing.assert_allclose(head.intercept_, whole.intercept_, atol=2e-3)


@pytest.mark.parametrize("kind", [MultilabelLogisticRegression, MultilabelLinearSVC])
def test_threads_change_no_bit(kind, monkeypatch):
    """Pieces are cut, and their sums added, in one order, however many threads there are."""
    X, _, some, _ = made(np.float32)
    monkeypatch.setitem(multilabel.prepare.__globals__, "_SMALL_BYTES", 0)
    monkeypatch.setattr(row_sums, "_PIECE_ROWS", 64)
    monkeypatch.setattr(row_sums, "_PIECE_FLOPS", 0)
    monkeypatch.setattr(row_sums, "_WORTH_FLOPS", 0)
    found = []
    with threadpool_limits(1, user_api="blas"):
        for count in (1, 3):
            monkeypatch.setattr(heads_blocks, "blas_threads", lambda count=count: count)
            found.append(kind(C=0.1).fit(X, some))
    np.testing.assert_array_equal(found[0].coef_, found[1].coef_)
    np.testing.assert_array_equal(found[0].intercept_, found[1].intercept_)


def test_logistic_losses_are_exact_far_from_the_boundary():
    scores = np.array([-300, -40, -1, 0, 1e-3, 2, 40, 300])
    codes, weights = np.stack([np.zeros(8), np.ones(8)]).astype(np.int8), np.linspace(0.5, 2, 8)[None]
    for dtype, close in ((np.float64, 1e-14), (np.float32, 1e-6)):
        both = np.stack([scores, scores]).astype(dtype)[:, None]
        bent = losses.BinomialLoss().curvature(both[0], codes, weights[0].astype(dtype), 0)
        values = losses.BinomialLoss().residuals(both, codes, weights.astype(dtype), np.array([0, 1]))
        signed = np.stack([scores, -scores]).astype(dtype).astype(np.float64)
        np.testing.assert_allclose(values, (np.logaddexp(0, signed) * weights).sum(axis=1), rtol=close)
        pulls = expit(signed) * np.array([[1], [-1]]) * weights
        np.testing.assert_allclose(both[:, 0], pulls, rtol=10 * close, atol=1e-44)
        np.testing.assert_allclose(
            bent[0], expit(signed[0]) * expit(-signed[0]) * weights[0], rtol=10 * close, atol=1e-44
        )


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_the_preconditioner_in_the_shared_basis_is_exact_along_coefficients_and_intercept(intercept, pull):
    rng = np.random.default_rng(0)
    rows, width, C = 4000, 6, 0.7
    X = rng.standard_normal((rows, width)) * np.linspace(0.3, 2, width)
    ones = np.column_stack([X, np.ones(rows)]) if intercept else X
    point = np.append(rng.standard_normal(width) * 0.7, -3.0)[: width + intercept]  # a rare label
    scores = ones @ point
    weights = expit(scores) * expit(-scores)
    penalty = losses.Penalty(
        np.append(np.ones(width), 0)[: width + intercept], rng.standard_normal(width + intercept), pull
    )
    exact = C * (ones.T * weights) @ ones + np.diag(penalty.ridge) + pull * np.outer(penalty.lever, penalty.lever)

    def solver(at):
        sums = losses.RotatedDiagonals(1, np.zeros(width), np.eye(width), centre=False, intercept=intercept, share=1.0)
        for place in np.array_split(np.arange(rows), 7):
            moments = sums.moments(weights[None, place], (ones @ at)[None, place])
            sums.add(X[place], weights[None, place], moments)
        return losses.SubspacePreconditioner(sums.finish()[0], C, penalty, at[None])

    found = np.linalg.inv(np.vstack([solver(point)(row[None]) for row in np.eye(len(point))]))
    np.testing.assert_allclose(found, found.T, rtol=1e-9, atol=1e-9)
    plane = np.eye(len(point))[:, [0, -1]].copy()
    plane[:width, 0] = point[:width]
    plane[width:, 0] = 0
    plane = plane[:, : 1 + intercept]
    np.testing.assert_allclose(plane.T @ found @ plane, plane.T @ exact @ plane, rtol=1e-9)
    ratios = scipy.linalg.eigvalsh(exact, found)
    plain = scipy.linalg.eigvalsh(exact, np.diag(np.diagonal(exact)))
    assert ratios[0] > 0
    assert ratios[-1] / ratios[0] < plain[-1] / plain[0]
    start = np.zeros(width + intercept)  # where there are no coefficients, the intercept's own
    assert np.isfinite(solver(start)(exact[:1])).all()


def test_rows_are_measured_however_few_of_a_block_are_chosen():
    rng = np.random.default_rng(0)
    X, amounts = rng.standard_normal((40_000, 3)) * [1, 2, 3], rng.uniform(0, 2, (1, 40_000))
    sums = losses.RotatedDiagonals(1, np.zeros(3), np.eye(3), centre=False, intercept=True, share=0.01)
    for place in np.array_split(np.arange(40_000), 2000):  # 20 rows each, of which a fifth of one is chosen
        sums.add(X[place], amounts[:, place], sums.moments(amounts[:, place], amounts[:, place]))
    [found] = sums.finish()
    np.testing.assert_allclose(found[0, :3], 40_000 * np.array([1, 4, 9]), rtol=0.2)
    np.testing.assert_allclose(found[0, 3:5], amounts.sum(), rtol=1e-9)


def test_without_an_intercept():
    X, Y, _, _ = made()
    head = MultilabelLogisticRegression(C=0.1, fit_intercept=False).fit(X, Y)
    other = LogisticRegression(C=0.1, fit_intercept=False, tol=1e-10, solver="newton-cholesky").fit(X, Y[:, 2])
    np.testing.assert_allclose(head.decision_function(X)[:, 2], other.decision_function(X), atol=1e-2)
    assert not head.intercept_.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unknown", [False, True])
def test_ridge_is_that_of_each_labels_known_rows(unknown, weighted, wrap, monkeypatch):
    X, whole, some, weights = made()
    Y = some if unknown else whole
    alpha = np.array([0.1, 1, 3, 10, 100])
    head = MultilabelRidge(alpha=alpha, memory="100kB").fit(wrap(X), Y, weights if weighted else None)
    for label in range(LABELS):
        known = ~np.isnan(Y[:, label])
        other = RidgeClassifier(alpha=alpha[label])
        other.fit(X[known], Y[known, label], sample_weight=weights[known] if weighted else None)
        np.testing.assert_allclose(head.coef_[label], np.ravel(other.coef_), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(head.intercept_[label], np.ravel(other.intercept_)[0], rtol=1e-9)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_neighbours_of_a_label_are_the_nearest_rows_where_it_is_known(weights, wrap):
    X, whole, some, _ = made()
    for Y in (whole, some):
        head = MultilabelNeighbours(7, weights=weights).fit(wrap(X[:500]), Y[:500])
        shares = head.predict_proba(wrap(X[400:]))  # some of them are their own neighbours
        for label in range(LABELS):
            known = ~np.isnan(Y[:500, label])
            other = KNeighborsClassifier(7, weights=weights, algorithm="brute").fit(
                X[:500][known], Y[:500][known, label]
            )
            np.testing.assert_allclose(shares[:, label], other.predict_proba(X[400:])[:, 1], atol=1e-6)
            assert (head.predict(X[400:])[:, label] == other.predict(X[400:])).all()
    with pytest.raises(UsageError, match="n_neighbors=501: give a number from 1 to 500"):
        MultilabelNeighbours(501).fit(X[:500], whole[:500])


def test_trees_of_a_label_are_those_of_its_known_rows():
    X, whole, some, _ = made()
    options = {"n_estimators": 5, "max_depth": 3, "n_jobs": 1, "random_state": 0}
    head = MultilabelTrees(**options).fit(X, some)
    alone = BoostedTrees(**options).fit(X, whole[:, 1].astype(int))
    assert (MultilabelTrees(**options).fit(X, whole).decision_function(X)[:, 1] == alone.decision_function(X)).all()
    known = ~np.isnan(some[:, 1])
    alone = BoostedTrees(**options).fit(X[known], whole[known, 1].astype(int))
    np.testing.assert_allclose(head.decision_function(X)[:, 1], alone.decision_function(X), atol=0.1)
    stopped = MultilabelTrees(early_stopping_rounds=2, **options).fit(
        X[:400], some[:400], eval_set=(X[400:], some[400:])
    )
    assert [1 <= one.best_iteration_ + 1 <= 5 for one in stopped.heads_] == [True] * LABELS
    with pytest.raises(UsageError, match="early_stopping_rounds needs validation data"):
        MultilabelTrees(early_stopping_rounds=2).fit(X, some)


@pytest.mark.parametrize("name", FAMILIES["multilabel"])
def test_every_family_by_name(name, stored):
    X, _, some, _ = made(np.float32)
    frame = pd.DataFrame(some, columns=NAMES)
    kind = {**QUICK.get(name, {}), "target_type": "multilabel"}
    head = make_head(name, **kind).fit(X, frame)
    last = head[-1] if hasattr(head, "steps") else head
    assert last.classes_.tolist() == NAMES
    scores, predicted = head.decision_function(X), head.predict(X)
    assert scores.shape == predicted.shape == (ROWS, LABELS)
    assert ((scores > 0) == predicted).all()
    assert set(np.unique(predicted)) <= {0, 1}
    assert np.mean((predicted == some)[~np.isnan(some)]) > 0.8
    if FAMILIES["multilabel"][name].probabilities:
        assert ((head.predict_proba(X) > 0.5) == predicted).all()
    blocks = stored(X)
    blocks.targets, blocks.target_names = some, NAMES
    streamed = make_head(name, out_of_core=True, memory="100MB", **kind).fit(blocks)
    last = streamed[-1] if hasattr(streamed, "steps") else streamed
    assert last.classes_.tolist() == NAMES
    assert np.mean(streamed.predict(blocks) == predicted) > 0.995
    again = clone(last)
    assert again.get_params() == last.get_params()
    with pytest.raises(NotFittedError):
        again.decision_function(X)


def test_other_families_say_which_learn_several_labels():
    with pytest.raises(
        UsageError, match="'lda' learns multiclass targets, not multilabel ones; heads that do: logistic"
    ):
        make_head("lda", target_type="multilabel")


def test_a_label_of_one_side_is_named_or_left_out():
    X, whole, some, weights = made()
    Y = some.copy()
    Y[:, 1] = np.where(Y[:, 1] == 1, np.nan, Y[:, 1])
    Y[:, 3] = np.nan
    Y[:, 4] = 1
    head = MultilabelLogisticRegression(label_names=NAMES)
    told = r"3 labels have rows of one side only: 'dog' \(no positive row of \d+ known\), 'fox' \(no known row\), "
    with pytest.raises(UsageError, match=told + r"'gnu' \(no negative row of 600 known\)\. .*one_sided='drop'"):
        head.fit(X, Y)
    with pytest.warns(UserWarning, match="left out 3 labels"):
        head.set_params(one_sided="drop").fit(X, Y)
    assert head.classes_.tolist() == ["cat", "emu"]
    assert head.dropped_labels_.tolist() == ["dog", "fox", "gnu"]
    assert head.predict(X).shape == (ROWS, 2)
    with pytest.raises(UsageError, match="No label is left"):
        head.fit(X, np.zeros((ROWS, LABELS)))
    only = np.where(whole[:, 0] == 1, weights, 0)  # rows without weight are no rows
    with pytest.raises(UsageError, match="no negative row of"):
        MultilabelRidge().fit(X, whole, only)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros(ROWS), r"labels of shape \(600,\)"),
        (np.full((ROWS, 2), 2.0), "1200 labels are neither 1"),
        (np.zeros((ROWS, 0)), r"labels of shape \(600, 0\)"),
        (np.zeros((10, 2)), "600 rows of features but 10 rows of labels"),
        (np.full((ROWS, 2), "cat"), "labels must be numbers"),
        (None, "requires y to be passed"),
    ],
)
def test_labels_of_another_form_are_refused(labels, said):
    with pytest.raises(UsageError, match=said):
        MultilabelLogisticRegression().fit(made()[0], labels)


def test_unknown_entries_may_be_missing_in_every_way():
    frame = pd.DataFrame({"a": pd.array([1, 0, None], "Int8"), "b": [True, False, True]})
    values, names = labels_given(None, frame)
    assert names.tolist() == ["a", "b"]
    np.testing.assert_array_equal(values, [[1, 1], [0, 0], [np.nan, 1]])
    masked = np.ma.masked_array([[1, 0], [0, 1]], mask=[[False, True], [False, False]])
    np.testing.assert_array_equal(labels_given(None, masked)[0], [[1, np.nan], [0, 1]])
    np.testing.assert_array_equal(labels_given(None, [[None, 1], [0, 1]])[0], [[np.nan, 1], [0, 1]])
    with pytest.raises(UsageError, match="two labels are named 'a'"):
        labels_given(None, np.zeros((2, 2)), ["a", "a"])
    with pytest.raises(UsageError, match="3 label_names for 2 columns"):
        labels_given(None, np.zeros((2, 2)), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"C": [1, 2]}, r"C has \(2,\) values for 5 labels"),
        ({"C": -1}, "C=-1 must be positive"),
        ({"C": [1, 1, 1, 1, np.nan]}, "must be positive"),
        ({"tol": 0}, "tol=0 of MultilabelLogisticRegression must be positive"),
        ({"class_weight": "even"}, "class_weight='even'"),
        ({"class_weight": {"cat": 2}}, "factors of absent and present"),
        ({"one_sided": "keep"}, "one_sided='keep'"),
    ],
)
def test_parameters_that_make_no_sense_are_named(options, said):
    X, Y, _, _ = made()
    with pytest.raises(UsageError, match=said):
        MultilabelLogisticRegression(**options).fit(X, Y)


def test_a_path_is_what_single_fits_find_and_names_folds_that_lack_a_side():
    X, _, some, weights = made()
    folds = [np.arange(0, 400), np.arange(ROWS) >= 200]
    rare = some.copy()
    rare[200:, 4] = np.where(np.isnan(rare[200:, 4]), np.nan, 0)
    rare[:5, 4] = 1
    paths = fit_label_path(MultilabelLogisticRegression(), X, rare, Cs=[0.01, 1.0], folds=folds, sample_weight=weights)
    for path, rows in zip(paths, folds, strict=True):
        for C, head in zip([0.01, 1.0], path, strict=True):
            alone = MultilabelLogisticRegression(C=C).fit(X[rows], rare[rows][:, :4], weights[rows])
            np.testing.assert_allclose(head.decision_function(X)[:, :4], alone.decision_function(X), atol=2e-2)
    assert np.isnan(paths[1][0].intercept_).tolist() == [False] * 4 + [True]
    assert not np.isnan(paths[0][0].intercept_).any()


def test_too_few_iterations_are_told():
    X, Y, _, _ = made()
    with pytest.warns(ConvergenceWarning, match="of 5 fits of MultilabelLogisticRegression stopped after max_iter=2"):
        head = MultilabelLogisticRegression(C=100.0, max_iter=2).fit(X, Y)
    assert head.n_iter_.max() == 2


def test_it_is_refitted_and_used_like_any_estimator():
    X, Y, _, _ = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = make_pipeline(StandardScaler(), MultilabelLogisticRegression(C=0.1)).fit(X, Y[:, :1])
    assert pipe.predict(X).shape == (ROWS, 1)
    with pytest.raises(ValueError, match="X has 3 features"):
        MultilabelRidge().fit(X, Y).predict(X[:, :3])
    assert label_matrix(MultilabelRidge(), X, Y).known is None
