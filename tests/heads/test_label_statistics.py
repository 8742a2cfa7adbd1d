"""Measures of several labels against the devkit's rules and scikit-learn; their intervals, thresholds, sigmoids and tuning."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.model_selection import KFold
from sklearn.svm import LinearSVC

from featurepipe.errors import UsageError
from featurepipe.heads.label_calibration import choose_thresholds, fit_sigmoids
from featurepipe.heads.linear.multilabel import MultilabelLinearSVC, MultilabelLogisticRegression
from featurepipe.heads.multilabel import VOC07, tune_labels, unit_rows, voc07_head
from featurepipe.heads.statistics.multilabel import average_precisions, label_table, labels_text
from featurepipe.heads.statistics.regression import number_table
from featurepipe.heads.statistics.similarity import linear_cka

NAMES = ["cat", "dog", "emu"]


def made(images=200, unknown=0.0, seed=0):
    """Scores that tell labels apart more or less well, without ties."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((images, 3)) < [0.5, 0.2, 0.1]).astype(float)
    scores = truth * [0.5, 1.0, 3.0] + rng.standard_normal((images, 3))
    truth[rng.random(truth.shape) < unknown] = np.nan
    return scores, truth


def devkit(scores, truth, eleven):
    """The devkit's rules line by line: ``VOCap`` of VOC2012, and the loop of ``VOCevalcls`` of VOC2007."""
    order = np.argsort(-scores, kind="stable")
    tp, fp = np.cumsum(truth[order] == 1), np.cumsum(truth[order] == 0)
    recall, precision = tp / (truth == 1).sum(), tp / (tp + fp)
    if eleven:
        total = 0.0
        for tenths in range(11):
            best = precision[10 * tp >= tenths * (truth == 1).sum()]
            total += (best.max() if len(best) else 0.0) / 11
        return total
    mrec, mpre = np.r_[0, recall, 1], np.r_[0, precision, 0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    i = np.flatnonzero(mrec[1:] != mrec[:-1]) + 1
    return ((mrec[i] - mrec[i - 1]) * mpre[i]).sum()


def test_average_precision_by_hand():
    """Ranked +, -, +, -, -, +: precisions at the positives 1, 2/3, 3/6, none better further down."""
    scores, truth = np.arange(6, 0, -1.0)[:, None], np.array([1, 0, 1, 0, 0, 1.0])[:, None]
    assert average_precisions(scores, truth)[0] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    # recalls of at least 0 to 0.3 are reached with precision 1, 0.4 to 0.6 with 2/3, 0.7 to 1 with 1/2
    assert average_precisions(scores, truth, points_11=True)[0] == pytest.approx((4 + 3 * 2 / 3 + 4 / 2) / 11)
    # a dip is filled: -, +, + has precision 2/3 throughout
    assert average_precisions([[3.0], [2], [1]], [[0], [1], [1]])[0] == pytest.approx(2 / 3)
    # three of ten found at a recall of 0.3 exactly, which as binary fractions is below 3 * 0.1
    truth = np.r_[np.ones(3), np.zeros(20), np.ones(7)][:, None]
    found = average_precisions(np.arange(30, 0, -1.0)[:, None], truth, points_11=True)[0]
    assert found == pytest.approx((4 + 7 / 3) / 11)


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_every_measure_is_the_devkits_or_scikit_learns(unknown):
    scores, truth = made(unknown=unknown)
    table = label_table(scores, truth, NAMES, thresholds=[0.2, 0.5, 1.5], bootstrap=0)
    predicted = scores > [0.2, 0.5, 1.5]
    f1, pairs = [], []
    for k, entry in enumerate(table["per_label"]):
        known = ~np.isnan(truth[:, k])
        score, own = scores[known, k], truth[known, k]
        assert entry["ap"]["value"] == pytest.approx(devkit(score, own, eleven=False))
        assert entry["ap_11_point"]["value"] == pytest.approx(devkit(score, own, eleven=True))
        assert entry["auc"]["value"] == pytest.approx(roc_auc_score(own, score))
        f1.append(f1_score(own, predicted[known, k]))
        assert entry["f1"]["value"] == pytest.approx(f1[-1])
        assert (entry["positive"], entry["negative"]) == ((own == 1).sum(), (own == 0).sum())
        assert entry["unknown"] == (~known).sum()
        assert entry["threshold"] == [0.2, 0.5, 1.5][k]
        pairs += zip(own, predicted[known, k], strict=True)
    own, guess = np.array(pairs).T
    assert table["macro_f1"]["value"] == pytest.approx(np.mean(f1))
    assert table["micro_f1"]["value"] == pytest.approx(f1_score(own, guess))
    assert table["map"]["value"] == pytest.approx(np.mean([entry["ap"]["value"] for entry in table["per_label"]]))
    if not unknown:
        assert table["macro_f1"]["value"] == pytest.approx(f1_score(truth, predicted, average="macro"))
        assert table["micro_f1"]["value"] == pytest.approx(f1_score(truth, predicted, average="micro"))
        assert table["auc"]["value"] == pytest.approx(roc_auc_score(truth, scores))
        assert table["map"]["value"] >= average_precision_score(truth, scores)  # interpolation never lowers a curve


def test_images_with_equal_scores_enter_a_curve_together():
    scores, truth = np.zeros((10, 1)), np.r_[np.ones(3), np.zeros(7)][:, None]
    for order in (slice(None), slice(None, None, -1)):
        table = label_table(scores, truth[order], ["cat"], bootstrap=0)
        assert table["map"]["value"] == pytest.approx(0.3)
        assert table["map_11_point"]["value"] == pytest.approx(0.3)
        assert table["auc"]["value"] == 0.5


def test_a_label_of_one_side_is_not_measured_and_is_named():
    scores, truth = made()
    truth[:, 1] = np.where(truth[:, 1] == 1, np.nan, 0)
    table = label_table(scores, truth, NAMES, bootstrap=50)
    assert table["unmeasured"] == ["dog"]
    assert table["per_label"][1]["ap"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "no known positive image",
    }
    assert table["map"]["value"] == pytest.approx(np.mean([table["per_label"][k]["ap"]["value"] for k in (0, 2)]))
    text = labels_text(table)
    assert "not measured: dog" in text
    assert "mean average precision" in text
    nothing = label_table(scores[:5], np.full((5, 3), np.nan), NAMES, bootstrap=10)
    assert nothing["map"]["reason"] == "no label has known images of both sides"
    assert "mean average precision: none, no label has" in labels_text(nothing)


def test_the_table_of_labels_says_why_an_interval_is_missing_once_for_all_labels_that_lack_it():
    scores, truth = made(60)
    truth[:, 1:] = 0
    truth[:3, 1:] = 1
    text = labels_text(label_table(scores, truth, NAMES, bootstrap=50))
    assert f"AP, AUC and F1 of {NAMES[1]}, {NAMES[2]}: no interval: fewer than 5 images of a side" in text.splitlines()
    truth[:3] = np.nan
    text = labels_text(label_table(scores, truth, NAMES, bootstrap=50))
    assert f"labels without test images of both sides, not measured: {NAMES[1]}, {NAMES[2]}" in text.splitlines()
    assert "no interval" not in text


def test_intervals_hold_the_value_and_widen_with_groups():
    scores, truth = made(300)
    copies = np.repeat(np.arange(300), 4)
    alone = label_table(scores[copies], truth[copies], NAMES, bootstrap=200)
    grouped = label_table(scores[copies], truth[copies], NAMES, bootstrap=200, groups=copies)
    once = label_table(scores, truth, NAMES, bootstrap=200)
    assert (alone["groups"], grouped["groups"]) == (None, 300)
    for name in ("map", "map_11_point", "auc", "macro_f1", "micro_f1"):
        for table in (alone, grouped, once):
            assert table[name]["low"] <= table[name]["value"] <= table[name]["high"]
        widths = [table[name]["high"] - table[name]["low"] for table in (alone, grouped, once)]
        assert widths[1] > 1.5 * widths[0]  # twice, but for chance
        assert widths[1] == pytest.approx(widths[2], rel=0.25)
    assert label_table(scores, truth, NAMES, bootstrap=200) == once


def test_intervals_of_average_precision_cover_the_truth():
    """Simulated with 150 images, 20 % positive; the truth is measured on 200,000."""
    scores, truth = made(200_000, seed=1)
    true = average_precisions(scores, truth)[1]
    hits = 0
    for start in range(100):
        rows = slice(150 * start, 150 * (start + 1))
        low_high = label_table(scores[rows, 1:2], truth[rows, 1:2], ["dog"], bootstrap=200)["per_label"][0]["ap"]
        hits += low_high["low"] <= true <= low_high["high"]
    assert hits >= 91


def test_a_faultless_label_is_not_certain_and_a_rare_one_has_no_interval():
    truth = np.zeros((60, 2))
    truth[:20, 0] = truth[:3, 1] = 1
    table = label_table(truth + np.arange(60)[:, None] / 1000, truth, ["good", "rare"], thresholds=0.5)
    assert table["per_label"][0]["ap"]["low"] == pytest.approx(0.8316, abs=1e-4)  # 20 of 20, Clopper and Pearson
    assert table["per_label"][1]["ap"]["low"] is None
    assert table["per_label"][1]["ap"]["reason"] == "no interval: fewer than 5 images of a side"


def test_many_images_are_sampled_for_their_intervals(monkeypatch):
    monkeypatch.setattr("featurepipe.heads.statistics.multilabel._MOST_UNITS", 400)
    scores, truth = made(1600)
    sampled = label_table(scores, truth, NAMES, bootstrap=200)
    monkeypatch.undo()
    whole = label_table(scores, truth, NAMES, bootstrap=200)
    for name in ("map", "auc", "micro_f1"):
        assert sampled[name]["value"] == whole[name]["value"]
        widths = [table[name]["high"] - table[name]["low"] for table in (sampled, whole)]
        assert widths[0] == pytest.approx(widths[1], rel=0.4)


@pytest.mark.parametrize(
    ("scores", "truth", "said"),
    [
        (np.zeros((3, 2)), np.zeros((3, 3)), r"scores of shape \(3, 2\) and labels of shape \(3, 3\)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "no labelled image"),
        (np.full((3, 3), np.nan), np.zeros((3, 3)), "scores of 3 images are not all finite"),
        (np.zeros((3, 3)), np.full((3, 3), 2), "must be 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores, truth, said):
    with pytest.raises(UsageError, match=said):
        label_table(scores, truth, NAMES)


def test_thresholds_by_hand():
    scores = np.array([9, 8, 7, 6, 5, 4, 3.0])[:, None]
    truth = np.array([1, 1, 0, 1, 0, np.nan, 0])[:, None]
    # F1 after each: 1/2, 4/5, 4/6, 6/7, 6/8, ...
    assert choose_thresholds(scores, truth).values[0] == 5.5
    assert choose_thresholds(scores, truth, aim="recall", at_least=0.5).values[0] == 7.5
    assert choose_thresholds(scores, truth, aim="recall", at_least=1.0).values[0] == 5.5
    assert choose_thresholds(scores, truth, aim="precision", at_least=0.75).values[0] == 5.5
    assert choose_thresholds(scores, truth, aim="precision", at_least=0.9).values[0] == 7.5
    best = choose_thresholds(-scores, truth, aim="precision", at_least=0.9)
    assert (best.reached[0], best.values[0] < -9) == (False, True)
    lone = choose_thresholds(scores, np.ones((7, 1)))
    assert (lone.values[0], lone.reached[0]) == (0, False)
    tied = choose_thresholds([[1.0], [1.0], [1.0 - 2e-16]], [[1], [1], [0]])
    assert (tied.values < [[1.0], [1.0], [1.0 - 2e-16]]).ravel().tolist() == [True, True, False]
    for wrong in ({"aim": "auc"}, {"aim": "recall"}, {"aim": "precision", "at_least": 1.5}, {"at_least": 0.5}):
        with pytest.raises(UsageError, match=r"aim="):
            choose_thresholds(scores, truth, **wrong)


def test_sigmoids_are_platts():
    scores, truth = made(500, unknown=0.2)
    truth[:, 0] = np.where(np.isnan(truth[:, 0]), np.nan, 1)
    found = fit_sigmoids(scores * 100 + 7, truth)
    assert found.fitted.tolist() == [False, True, True]
    assert (found.slopes[0], found.offsets[0]) == (1, 0)
    for k in (1, 2):
        rows = ~np.isnan(truth[:, k])
        own = truth[rows, k] == 1
        having, lacking = own.sum(), (~own).sum()
        soft = np.where(own, (having + 1) / (having + 2), 1 / (lacking + 2))
        # each image as two weighted ones: scikit-learn's optimum of the same cross-entropy
        doubled = LogisticRegression(C=np.inf, tol=1e-10, solver="newton-cholesky").fit(
            np.r_[scores[rows, k], scores[rows, k]][:, None] * 100 + 7,
            np.r_[np.ones(len(own)), np.zeros(len(own))],
            np.r_[soft, 1 - soft],
        )
        assert found.slopes[k] == pytest.approx(doubled.coef_[0, 0], rel=1e-4)
        assert found.offsets[k] == pytest.approx(doubled.intercept_[0], rel=1e-4)
    assert found.probabilities(scores * 100 + 7).shape == scores.shape
    certain = fit_sigmoids([[1.0], [2.0], [3.0], [4.0]], [[0], [0], [1], [1]])
    assert 0.6 < certain.probabilities([[4.0]])[0, 0] < 0.8  # two of two say no more than 3 of 4


def features_of(rows=240, width=12):
    rng = np.random.default_rng(5)
    X = rng.standard_normal((rows, width)) + 1
    Y = (X @ rng.standard_normal((width, 3)) + 2 * rng.standard_normal((rows, 3)) > [1, 3, 5]).astype(np.float32)
    Y[rng.random(Y.shape) < 0.15] = np.nan
    return X, Y


@pytest.mark.parametrize("kind", [MultilabelLogisticRegression, MultilabelLinearSVC])
def test_c_is_chosen_for_each_label_by_its_own_average_precision(kind, wrap):
    X, Y = features_of()
    folds = list(KFold(3).split(X))
    tuned = tune_labels(kind(), wrap(X), Y, Cs=[1.0, 1e-4, 1e-2], folds=folds)
    assert tuned.Cs == (1e-4, 1e-2, 1.0)
    for k in range(3):
        means = []
        for C in tuned.Cs:
            found = []
            for train, test in folds:
                known = train[~np.isnan(Y[train, k])]
                if kind is MultilabelLogisticRegression:
                    head = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky").fit(X[known], Y[known, k])
                else:
                    head = LinearSVC(C=C, dual=False, tol=1e-8, max_iter=10_000).fit(X[known], Y[known, k])
                rows = ~np.isnan(Y[test, k])
                found.append(devkit(head.decision_function(X[test])[rows], Y[test, k][rows], eleven=False))
            means.append(np.mean(found))
        np.testing.assert_allclose(tuned.average_precision[:, k], means, atol=0.02)
        assert tuned.C[k] == tuned.Cs[int(tuned.average_precision[:, k].argmax())]
    with pytest.raises(UsageError, match="0 values of C and 3 folds"):
        tune_labels(kind(), X, Y, Cs=[], folds=folds)


def test_the_voc07_protocol_by_name(wrap):
    assert VOC07["Cs"] == (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
    X, Y = features_of()
    head = voc07_head(wrap(X), Y, folds=list(KFold(VOC07["folds"]).split(X)))
    assert head.C.shape == (3,)
    np.testing.assert_allclose(np.linalg.norm(unit_rows(X), axis=1), 1, atol=1e-4)
    known = ~np.isnan(Y[:, 1])
    other = LinearSVC(C=head.C[1], class_weight={0: 1, 1: 2}, dual=False, tol=1e-8, max_iter=100_000)
    other.fit(unit_rows(X)[known], Y[known, 1])
    np.testing.assert_allclose(
        head.decision_function(unit_rows(wrap(X)))[:, 1], other.decision_function(unit_rows(X)), atol=0.02
    )


def test_an_estimators_score_is_its_mean_average_precision():
    X, Y = features_of()
    head = MultilabelLogisticRegression().fit(X, Y)
    assert head.score(X, Y) == pytest.approx(average_precisions(head.decision_function(X), Y).mean())


def test_no_measure_leaves_its_range_by_rounding():
    rng = np.random.default_rng(0)
    for images, labels in ((7, 2), (33, 3), (90, 7)):
        truth = rng.permuted(np.arange(images)[:, None] % 3 == np.zeros(labels), axis=0).astype(float)
        table = label_table(truth * 0.1, truth, list("abcdefg"[:labels]), bootstrap=20)
        for entry in (*(table[name] for name in ("map", "map_11_point", "auc")), *table["per_label"]):
            for one in [entry] if "value" in entry else [entry[name] for name in ("ap", "ap_11_point", "auc", "f1")]:
                assert max(value for value in one.values() if isinstance(value, float)) <= 1
        assert table["map_11_point"]["value"] == 1
    for images in range(5, 60):
        numbers = rng.standard_normal(images)
        assert number_table(3 * numbers, numbers, bootstrap=0)["spearman"]["value"] <= 1
        assert number_table(-numbers, numbers, bootstrap=0)["spearman"]["value"] >= -1
        features = rng.standard_normal((images, 3))
        assert linear_cka([features, features * 2])[0, 1] <= 1
