"""Scores of columns by a ridge regression's rows, and the step that keeps some columns."""

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from featurepipe.errors import BundleError, UsageError
from featurepipe.heads.blocks import ArrayBlocks, MappedBlocks
from featurepipe.heads.bundle.head import head_files, load_head
from featurepipe.heads.linear.linear_map import linear_map
from featurepipe.heads.selection import (
    PENALTY,
    KeptColumns,
    best_columns,
    column_scores,
    kept_count,
    regression_targets,
)

WIDTH, TELLING = 120, [3, 17, 50, 88, 119]


def planted(rows=400, seed=0):
    """Noise, but for five columns that three classes follow from, of scales and means far apart; one column is constant."""
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal((rows, WIDTH))
    labels = (plain[:, TELLING] @ rng.standard_normal((5, 3))).argmax(axis=1)
    scales = 10.0 ** rng.uniform(-3, 3, WIDTH)
    features = (plain + 5) * scales
    features[:, 40] = 7.25
    return features.astype(np.float32), np.array(["cat", "dog", "emu"])[labels]


def reference(features, targets, weights=None, penalty=PENALTY):
    """Row norms by the normal equations in float64, each target on the rows that have it."""
    weights = np.ones(len(features)) if weights is None else weights
    x = features.astype(np.float64)
    mean = np.average(x, axis=0, weights=weights)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    z = np.column_stack([(x - mean) / np.where(spread > 1e-9 * np.abs(mean), spread, np.inf), np.ones(len(x))])
    shrink = np.diag(np.append(np.full(x.shape[1], penalty * x.shape[1]), 0))
    found = []
    for target in targets.T:
        known = ~np.isnan(target)
        w = np.where(known, weights, 0) / weights.sum()
        found.append(np.linalg.solve(z.T * w @ z + shrink, z.T @ (w * np.nan_to_num(target)))[:-1])
    return np.linalg.norm(found, axis=0)


def test_scores_are_the_row_norms_of_the_ridge_regression():
    features, labels = planted()
    targets = regression_targets(labels, ["cat", "dog", "emu"])
    found = column_scores(features, targets, tol=1e-7, max_passes=500)
    np.testing.assert_allclose(found, reference(features, targets), rtol=1e-3, atol=1e-5)
    assert found[40] == pytest.approx(0, abs=1e-12)


def test_weights_count_and_unknown_labels_do_not():
    features, _ = planted()
    rng = np.random.default_rng(1)
    answers = (rng.random((len(features), 4)) < 0.3).astype(float)
    answers[:, 2] = features[:, 17] > np.median(features[:, 17])
    answers[rng.random(answers.shape) < 0.2] = np.nan
    weights = rng.uniform(0, 3, len(features))
    targets = regression_targets(answers)
    found = column_scores(features, targets, weights, tol=1e-7, max_passes=500)
    np.testing.assert_allclose(found, reference(features, targets, weights), rtol=1e-3, atol=1e-5)
    assert found.argmax() == 17


def test_planted_columns_are_found_among_noise_whatever_the_memory_and_the_blocks():
    features, labels = planted()
    targets = regression_targets(labels, ["cat", "dog", "emu"])
    expected = column_scores(features, targets)
    assert best_columns(expected, 5 / WIDTH).tolist() == TELLING
    in_pieces = MappedBlocks(ArrayBlocks(features), np.copy, WIDTH)
    for memory in (None, "100KB", "1MB"):
        found = column_scores(in_pieces, targets, memory=memory)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        assert best_columns(found, 5 / WIDTH).tolist() == TELLING


def test_a_number_and_two_classes_have_one_target_and_constant_ones_none():
    ages = np.array([3.0, 4.0, 5.0, 8.0])
    np.testing.assert_allclose(regression_targets(ages)[:, 0], (ages - 5) / ages.std())
    two = regression_targets(np.array(["a", "b", "a", "b"]), ["a", "b"])
    np.testing.assert_allclose(two, [[-1], [1], [-1], [1]])
    np.testing.assert_array_equal(regression_targets(np.ones((3, 1))), np.zeros((3, 1)))


def test_a_number_is_found_in_the_column_that_gives_it():
    features, _ = planted()
    scores = column_scores(features, regression_targets(features[:, 88].astype(np.float64) * 1e6 - 3))
    assert scores.argmax() == 88
    assert scores[88] > 5 * np.delete(scores, 88).max()


def test_what_cannot_be_scored_is_refused():
    features, labels = planted()
    targets = regression_targets(labels, ["cat", "dog", "emu"])
    with pytest.raises(UsageError, match=r"penalty=0 must be above 0"):
        column_scores(features, targets, penalty=0)
    features[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        column_scores(features, targets)


def test_of_equal_scores_the_first_are_kept_and_one_at_least():
    assert best_columns(np.array([1.0, 2, 1, 2, 1]), 0.6).tolist() == [0, 1, 3]
    assert best_columns(np.zeros(7), 0.01).tolist() == [0]
    assert [kept_count(share, 200) for share in (0.005, 0.5, 1.0)] == [1, 100, 200]


@parametrize_with_checks([KeptColumns()])
def test_the_step_is_a_transformer_of_scikit_learns(estimator, check):
    check(estimator)


def test_the_step_keeps_columns_of_arrays_and_blocks_alike():
    features, _ = planted(50)
    step = KeptColumns([3, 17, 119]).fit(features)
    np.testing.assert_array_equal(step.transform(features), features[:, [3, 17, 119]])
    found = step.transform(ArrayBlocks(features))
    assert found.shape == (50, 3)
    np.testing.assert_array_equal(found.read(rows=slice(4, 9)), features[4:9, [3, 17, 119]])
    with pytest.raises(UsageError, match="X has 5 features, but KeptColumns is expecting 120"):
        step.transform(ArrayBlocks(features[:, :5]))
    for wrong in ([5, 3], [3, 3], [-1], [120], []):
        with pytest.raises(UsageError, match="must be ascending positions from 0 to 119"):
            KeptColumns(wrong).fit(features)


def test_kept_columns_fold_into_a_linear_map_and_go_into_bundles(tmp_path):
    features, labels = planted()
    narrow = make_pipeline(StandardScaler(), LinearSVC(dual=False)).fit(features[:, TELLING], labels)
    head = make_pipeline(KeptColumns.of_width(TELLING, WIDTH), *(step for _, step in narrow.steps))
    weight, bias = linear_map(head)
    np.testing.assert_allclose(features @ weight.T + bias, narrow.decision_function(features[:, TELLING]), atol=2e-3)
    assert not np.delete(weight, TELLING, axis=1).any()
    again = load_head(head_files(head), tmp_path)
    np.testing.assert_array_equal(again.decision_function(features), head.decision_function(features))
    head.steps[0][1].columns_ = np.array([3, WIDTH])
    with pytest.raises(BundleError, match="KeptColumns that does not fit together"):
        load_head(head_files(head), tmp_path)
