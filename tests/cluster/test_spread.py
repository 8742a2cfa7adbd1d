"""Heads on features that workers keep find what they find on one machine."""

import pickle
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline

from featurepipe.errors import UsageError
from featurepipe.execution import row_shard, spread
from featurepipe.execution.row_shards import cuts
from featurepipe.heads import (
    BlockCentroid,
    BlockLinearDiscriminantAnalysis,
    BlockLinearSVC,
    BlockLogisticRegression,
    BlockNeighbours,
    BlockPCA,
    BlockRidgeClassifier,
    BlockScaler,
    class_scores,
    fit_path,
    make_head,
)
from featurepipe.heads.blocks import ArrayBlocks, MappedBlocks
from featurepipe.heads.linear import multilabel, passes
from featurepipe.heads.linear.row_sums import Sums
from featurepipe.heads.moments import gram_of, moments_of

ROWS, WIDTH = 3000, 24
NAMES = np.array(["cat", "dog", "emu", "fox"])


def made(classes=3, dtype=np.float32, rows=ROWS):
    """Features of classes that overlap, in an order that no share has all of; and their names."""
    rng = np.random.default_rng(classes)
    codes = np.sort(rng.integers(0, classes, rows))
    codes[:: rows // 50] = rng.integers(0, classes, len(codes[:: rows // 50]))
    features = rng.standard_normal((rows, WIDTH)) * np.linspace(0.5, 2, WIDTH) + 1
    features[:, :classes] += 1.2 * np.eye(classes)[codes]
    return features.astype(dtype), NAMES[codes]


def logistic_objective(head, features, labels, weights):
    scores = features.astype(np.float64) @ head.coef_.T + head.intercept_
    scores = np.column_stack([np.zeros(len(scores)), scores]) if len(head.classes_) == 2 else scores
    own = scores[np.arange(len(scores)), np.searchsorted(head.classes_, labels)]
    losses = np.logaddexp.reduce(scores, axis=1) - own
    return head.C * (weights * losses).sum() + (head.coef_**2).sum() / 2


def svm_objective(head, features, labels, weights):
    scores = features.astype(np.float64) @ head.coef_.T + head.intercept_
    positive = np.searchsorted(head.classes_, labels)[:, None] == np.arange(len(head.classes_))
    positive = positive[:, 1:] if len(head.classes_) == 2 else positive
    losses = np.maximum(0, 1 - np.where(positive, scores, -scores)) ** 2
    return head.C * (weights[:, None] * losses).sum() + ((head.coef_**2).sum() + (head.intercept_**2).sum()) / 2


OBJECTIVES = {BlockLogisticRegression: logistic_objective, BlockLinearSVC: svm_objective}


def assert_same_optimum(there, here, features, labels, weights=None):
    weights = np.ones(len(labels)) if weights is None else weights
    objective = OBJECTIVES[type(here)]
    assert objective(there, features, labels, weights) == pytest.approx(
        objective(here, features, labels, weights), rel=1e-6
    )
    np.testing.assert_array_equal(there.classes_, here.classes_)


@pytest.fixture(params=["float64", "float32"])
def arithmetic(request, monkeypatch):
    """Small features are computed in float64; the second time they are not taken for small."""
    if request.param == "float32":
        monkeypatch.setattr(passes, "_SMALL_BYTES", 0)


@pytest.mark.parametrize("kind", [BlockLogisticRegression, BlockLinearSVC])
@pytest.mark.parametrize(("classes", "dtype"), [(2, np.float16), (3, np.float16), (4, np.float32)])
def test_the_optimum_is_the_local_one(thread_executor, kind, classes, dtype, arithmetic):
    features, labels = made(classes, dtype)
    here = kind(C=0.1).fit(ArrayBlocks(features), labels)
    there = kind(C=0.1).fit(spread(features, thread_executor), labels)
    assert_same_optimum(there, here, features, labels)
    assert set(there.predict(spread(features, thread_executor))) == set(
        NAMES[:classes]
    )  # not two of three, as dask-ml has it


@pytest.mark.parametrize("kind", [BlockLogisticRegression, BlockLinearSVC])
def test_sample_and_class_weights_count(thread_executor, kind):
    features, labels = made()
    weights = np.random.default_rng(0).uniform(0, 3, len(labels))
    factors = {"cat": 3.0, "dog": 0.5, "emu": 1.0}
    here = kind(C=0.1, class_weight=factors).fit(ArrayBlocks(features), labels, sample_weight=weights)
    there = kind(C=0.1, class_weight=factors).fit(spread(features, thread_executor), labels, sample_weight=weights)
    whole = weights * np.array([factors[label] for label in labels])
    assert_same_optimum(there, here, features, labels, whole)
    plain = kind(C=0.1).fit(ArrayBlocks(features), labels)
    assert np.abs(plain.coef_ - there.coef_).max() > 0.01


@pytest.mark.parametrize("kind", [BlockLogisticRegression, BlockLinearSVC])
def test_values_of_c_and_folds_share_passes(thread_executor, kind):
    features, labels = made(dtype=np.float16)
    fold = np.random.default_rng(1).integers(0, 3, len(labels))
    folds = [np.flatnonzero(fold != number) for number in range(3)]
    here = fit_path(kind(), ArrayBlocks(features), labels, Cs=[0.01, 1], folds=folds)
    there = fit_path(kind(), spread(features, thread_executor), labels, Cs=[0.01, 1], folds=folds)
    for rows, ours, theirs in zip(folds, there, here, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.C == other.C
            assert_same_optimum(one, other, features[rows], labels[rows])


@pytest.mark.parametrize("kind", [BlockLogisticRegression, BlockLinearSVC])
@pytest.mark.parametrize("before", [(BlockScaler(),), (BlockScaler(), BlockPCA(10))])
def test_pipelines_run_where_the_rows_are(thread_executor, kind, before):
    features, labels = made(dtype=np.float16)
    guarded = spread(NotHere(features), thread_executor)
    there = make_pipeline(*before, kind(C=0.1)).fit(guarded, labels)
    scores = there.decision_function(guarded)
    here = make_pipeline(*before, kind(C=0.1)).fit(ArrayBlocks(features), labels)
    assert_same_optimum(there[-1], here[-1], here[:-1].transform(ArrayBlocks(features)).read(np.float64), labels)
    np.testing.assert_allclose(scores, here.decision_function(ArrayBlocks(features)), atol=2e-3)


TREES = pytest.param("xgboost", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["logistic", "logistic in float32", "linear-svm", "ridge", "knn", TREES])
def test_several_labels_are_learned_where_the_rows_are(request, name, monkeypatch):
    name, _, rounded = name.partition(" ")
    workers = request.getfixturevalue("dask_executor" if name == "xgboost" else "thread_executor")  # trees need a gang
    if rounded:
        monkeypatch.setattr(passes, "_SMALL_BYTES", 0)
    if name != "logistic" or rounded:  # begin in the shared basis, though there are few columns
        monkeypatch.setattr(multilabel, "_OWN_FROM", 0)
    features, names = made(4)
    labels = (names[:, None] == NAMES).astype(np.float32)
    labels[:, 3] = features[:, 5] > 1.5
    labels[np.random.default_rng(0).random(labels.shape) < 0.2] = np.nan
    kind = {"target_type": "multilabel", "out_of_core": True, "label_names": NAMES.tolist()}
    kind |= {"n_estimators": 5, "n_jobs": 1} if name == "xgboost" else {}
    here = make_head(name, **kind).fit(ArrayBlocks(features), labels)
    there = make_head(name, **kind).fit(spread(NotHere(features), workers) if name != "knn" else features, labels)
    found = there.decision_function(spread(features, workers))
    expected = here.decision_function(ArrayBlocks(features))
    if name == "xgboost":  # quantiles are joined from those of the workers
        assert np.mean((found > 0) == (expected > 0)) > 0.97
    else:
        np.testing.assert_allclose(found, expected, atol={"ridge": 1e-8}.get(name, 2e-2))


class NotHere(ArrayBlocks):
    """Features that only workers can read."""

    def take(self, rows):
        return NotHere(self.array[rows])

    def read(self, dtype=None, *, rows=None):
        import distributed

        distributed.get_worker()  # an error if the client materialises them
        return super().read(dtype, rows=rows)


HEADS = [
    BlockRidgeClassifier(alpha=2.0),
    BlockRidgeClassifier(class_weight="balanced"),
    BlockLinearDiscriminantAnalysis(),
    BlockLinearDiscriminantAnalysis(shrinkage="auto"),
    BlockLinearDiscriminantAnalysis(priors=[0.5, 0.25, 0.25]),
    BlockCentroid(),
    BlockCentroid(shrink_threshold=0.5),
    BlockNeighbours(3),
]


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_heads_of_one_pass_are_the_local_ones(thread_executor, head):
    features, labels = made(dtype=np.float16)
    here = type(head)(**head.get_params()).fit(ArrayBlocks(features), labels)
    there = type(head)(**head.get_params()).fit(spread(features, thread_executor), labels)
    for name in ("coef_", "intercept_", "means_", "covariance_", "centroids_"):
        if hasattr(here, name):
            np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(there.predict(spread(features, thread_executor)), here.predict(ArrayBlocks(features)))
    np.testing.assert_allclose(
        class_scores(there, spread(features, thread_executor)),
        class_scores(here, ArrayBlocks(features)),
        rtol=1e-6,
        atol=1e-6,
    )


def test_scaling_and_pca_are_the_local_ones(thread_executor):
    features, _ = made()
    weights = np.random.default_rng(0).uniform(0, 2, ROWS)
    here, there = (
        BlockScaler().fit(f, sample_weight=weights) for f in (ArrayBlocks(features), spread(features, thread_executor))
    )
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-10)
    here, there = (BlockPCA(0.9).fit(f) for f in (ArrayBlocks(features), spread(features, thread_executor)))
    np.testing.assert_allclose(there.components_, here.components_, atol=1e-9)
    np.testing.assert_allclose(there.explained_variance_, here.explained_variance_, rtol=1e-10)


def test_moments_of_shares_without_weight_or_a_class_are_none(thread_executor):
    """The first share has weight zero and lacks a class, and means are a thousand deviations from zero."""
    features = np.random.default_rng(0).standard_normal((1000, 5)) + 1000
    codes = np.repeat([0, 1], 500)
    weights = np.repeat([0.0, 2.0], 500)
    for given in (weights, None):
        here, there = (gram_of(f, codes, 3, given) for f in (features, spread(features, thread_executor)))
        for name in ("weight", "mean", "scatter", "class_weights", "class_means"):
            np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-9, atol=1e-9)
        here, there = (moments_of(f, given) for f in (features, spread(features, thread_executor)))
        np.testing.assert_allclose(there.variance, here.variance, rtol=1e-9)
        np.testing.assert_allclose(there.mean, here.mean, rtol=1e-12)


def test_scores_come_in_the_order_of_the_rows(thread_executor):
    features, labels = made(4)
    head = BlockLogisticRegression().fit(features, labels)
    spread_out = spread(features, thread_executor)
    np.testing.assert_allclose(
        head.decision_function(spread_out), head.decision_function(features), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_array_equal(head.predict(spread_out[::-1]), head.predict(features)[::-1])
    trees = make_head("xgboost", n_estimators=3).fit(features, labels)
    np.testing.assert_array_equal(trees.predict_proba(spread_out), trees.predict_proba(features))
    machine = make_head("rbf-svm", out_of_core=True, exact_rows=100, n_components=40)
    here, there = (
        machine.fit(ArrayBlocks(features), labels).predict(features),
        machine.fit(spread_out, labels).predict(spread_out),
    )
    assert (here != there).sum() <= 3


def test_a_value_that_is_not_finite_is_named_by_its_row_among_all(thread_executor):
    features, labels = made()
    features[2345, 3] = np.nan
    with pytest.raises(UsageError, match=r"Input X contains NaN: row 2345"):
        BlockRidgeClassifier().fit(spread(features, thread_executor), labels)


def test_a_feature_sets_labels_and_parts_go_along(dask_executor, zoo):
    zoo.write(zoo.images(None, count=30))
    zoo.write(zoo.images(None, count=90), name="more")  # part two holds the others, part one all again
    features = zoo.features("more")
    there = spread(features, dask_executor)
    assert there.shape == (270, 3)
    head = BlockLogisticRegression().fit(there)
    here = BlockLogisticRegression().fit(features)
    np.testing.assert_allclose(head.coef_, here.coef_, atol=1e-6)
    assert head.score(there) == here.score(features) > 0.8
    some = np.r_[200:100:-3, 5]
    np.testing.assert_array_equal(head.predict(there.take(some)), here.predict(features.take(some)))
    np.testing.assert_array_equal(there[some].labels, features[some].labels)


class Noted:
    """Features whose reads are noted in a file."""

    def __init__(self, array, path):
        self.array, self.path, self.shape, self.dtype = array, path, array.shape, array.dtype

    def take(self, rows):
        return Noted(self.array[rows], self.path)

    def read(self, dtype=None, *, rows=None):
        found = self.array if rows is None else self.array[rows]
        with self.path.open("a") as file:
            file.write(f"{len(found)}\n")
        return found.astype(dtype or self.dtype)


def test_what_fits_a_workers_memory_is_read_once_to_look_and_once_to_keep(dask_executor, tmp_path):
    features, labels = made(dtype=np.float16)
    noted = Noted(features, tmp_path / "reads")
    head = make_pipeline(BlockScaler(), BlockLogisticRegression(C=10.0)).fit(spread(noted, dask_executor), labels)
    assert head[-1].n_iter_[0] > 3
    assert (
        sum(map(int, noted.path.read_text().split())) == 3 * ROWS
    )  # the scaler's look, the fit's look, the fit's copy


@pytest.mark.parametrize(("room", "dtype"), [(4.0, np.float32), (3.9, np.float16), (1.9, None)])
def test_features_are_kept_as_far_as_they_fit(room, dtype, monkeypatch):
    """Room is in bytes a value: 4 as they are computed with, 2 as they are stored."""
    features, _ = made(dtype=np.float16)
    stored = row_shard.StoredRows(ArrayBlocks(features), 0)
    monkeypatch.setattr(row_shard, "room_here", lambda: int(room * features.size))
    monkeypatch.setattr(row_shard, "all_threads", nullcontext)
    kept = row_shard.keep(
        (partial(MappedBlocks, function=np.negative, width=WIDTH),), np.dtype(np.float32), None, stored
    )
    np.testing.assert_array_equal(kept.read(np.float32), -features.astype(np.float32))
    held = kept if isinstance(kept, ArrayBlocks) else kept.source
    assert (held.dtype if isinstance(held, ArrayBlocks) else None) == dtype
    limited = row_shard.keep((), np.dtype(np.float32), 8 * features.size - 1, stored)  # half is for other things
    assert isinstance(limited, ArrayBlocks) is (room >= 2)
    assert limited.dtype == np.float16


def test_what_travels_arrives_as_it_was():
    rng = np.random.default_rng(0)
    for array in (rng.integers(0, 2, 13), rng.integers(0, 2, (3, 13)).astype(np.float32), rng.integers(-3, 900, 13)):
        small = row_shard.packed(array)
        np.testing.assert_array_equal(row_shard.unpacked(*small), array)
        assert small[0].nbytes <= 2 * 13
    weights = rng.uniform(0, 1, (2, 13))
    np.testing.assert_array_equal(row_shard.unpacked(*row_shard.packed(weights)), weights)
    matrices = rng.standard_normal((2, 5, 5))
    matrices += matrices.transpose(0, 2, 1)
    sums = Sums(np.ones(1), np.ones((2, 3)), np.ones(2), [matrices, rng.uniform(0, 1, (2, 5)), None])
    again = pickle.loads(pickle.dumps(sums))
    np.testing.assert_array_equal(again.curvature[0], matrices)
    np.testing.assert_array_equal(again.curvature[1], sums.curvature[1])
    assert again.curvature[2] is None


def test_shards_end_where_parts_do_if_that_is_near():
    assert cuts(100, 3, np.array([31, 34, 70, 71])) == [0, 34, 67, 100]
    assert cuts(7, 3, np.empty(0, int)) == [0, 2, 5, 7]
    assert cuts(2, 2, np.array([1])) == [0, 1, 2]


def test_fewer_rows_than_workers_are_enough(thread_executor):
    there = spread(np.arange(6.0).reshape(1, 6), thread_executor)
    assert moments_of(there).mean.tolist() == [0, 1, 2, 3, 4, 5]


def test_spread_features_are_not_read_into_memory_unasked(thread_executor):
    with pytest.raises(UsageError, match="not in memory here"):
        np.asarray(spread(made()[0], thread_executor))
