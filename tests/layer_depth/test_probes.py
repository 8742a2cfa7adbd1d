"""One column on one fold: the short ways give what the plain way gives, and test rows influence nothing."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from featurepipe.layer_depth import probes
from featurepipe.layer_depth.folds import Fold
from featurepipe.layer_depth.probes import Data, measure_fold, scores_again

COLUMN = "a:gap"


class Array:
    """Features in memory, with as much of a FeatureSet as measuring needs."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self, dtype=None, *, rows=None):
        chosen = self.values if rows is None else self.values[rows]
        return chosen.astype(dtype or self.dtype)

    def take(self, positions):
        return Array(self.values[positions])


def made_up(count, width, *, classes=3, seed=0, distance=1.0, spread=1.0):
    """(n, D) values around one centre a class, each value of a scale of its own, and codes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * distance
    codes = np.arange(count) % classes
    scales = np.exp(np.random.default_rng(98).normal(size=width))
    values = (centres[codes] + spread * rng.normal(size=(count, width))) * scales + 5 * scales
    return values.astype(np.float32), codes


def data(values, codes, shifted=None):
    if shifted is None:
        return Data(Array(values), codes, None, np.empty(0, np.int64))
    return Data(Array(values), codes, Array(shifted[0]), shifted[1])


def fold(fit, choose, test, seed=0):
    edges = np.cumsum([0, fit, choose, test])
    return Fold(seed, 0, *(np.arange(a, b) for a, b in pairwise(edges)))


@pytest.mark.parametrize("head", ["logistic", "linear-svm", "ridge", "knn", "rbf-svm"])
def test_in_the_span_of_the_rows_everything_comes_out_the_same(head, monkeypatch):
    values, codes = made_up(150, 600, distance=0.12)
    other = made_up(60, 600, seed=1, distance=0.12, spread=1.5)
    cut = fold(50, 20, 80)
    given = data(values, codes, other)
    assert probes._is_turned(given, cut, head)
    (turned,) = measure_fold(given, cut, [head])
    turned_scores, classes, _ = scores_again(given, cut, turned)
    monkeypatch.setattr(probes, "TURNED_FROM", 1000)
    assert not probes._is_turned(given, cut, head)
    (plain,) = measure_fold(given, cut, [head])
    plain_scores, _, _ = scores_again(given, cut, plain)
    assert turned.params == plain.params
    np.testing.assert_array_equal(turned.contributions, plain.contributions)
    np.testing.assert_array_equal(turned.shifted, plain.shifted)
    assert turned.train_value == plain.train_value
    np.testing.assert_allclose(turned_scores, plain_scores, atol=0.02 * np.abs(plain_scores).max())
    np.testing.assert_array_equal(codes[cut.test] == classes[turned_scores.argmax(axis=1)], turned.contributions)
    assert 0.4 < plain.value < 1  # neither chance nor perfect: a change of features would show


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("neighbours", [1, 20])
def test_each_vote_of_neighbours_is_the_same(neighbours, weights, monkeypatch):
    """All parameters, not only the chosen ones."""
    grid = {"n_neighbors": (neighbours,), "weights": (weights,)}
    knn = replace(probes.HEADS["knn"], grid=grid)
    monkeypatch.setattr(probes, "HEADS", {**probes.HEADS, "knn": knn})
    values, codes = made_up(150, 600, distance=0.1)
    given, cut = data(values, codes), fold(50, 20, 80)
    (turned,) = measure_fold(given, cut, ["knn"])
    turned_scores, _, _ = scores_again(given, cut, turned)
    monkeypatch.setattr(probes, "TURNABLE", ())
    (plain,) = measure_fold(given, cut, ["knn"])
    np.testing.assert_array_equal(turned.contributions, plain.contributions)
    np.testing.assert_allclose(turned_scores, scores_again(given, cut, plain)[0], rtol=1e-4)


def test_centroids_are_measured_value_by_value():
    values, codes = made_up(150, 600, distance=0.12)
    assert not probes._is_turned(data(values, codes), fold(50, 20, 80), "centroid")


@pytest.mark.parametrize("head", ["logistic", "linear-svm"])
def test_in_blocks_the_same_is_chosen_and_predicted(head, monkeypatch):
    values, codes = made_up(700, 20, distance=0.35)
    other = made_up(100, 20, seed=1, distance=0.35, spread=1.5)
    given, cut = data(values, codes, other), fold(300, 100, 300)
    (inside,) = measure_fold(given, cut, [head])
    inside_scores, _, inside_shifted = scores_again(given, cut, inside)
    monkeypatch.setattr(probes, "SMALL_VALUES", 1000)
    (blocks,) = measure_fold(given, cut, [head])
    assert blocks.params == inside.params
    assert (blocks.contributions == inside.contributions).mean() > 0.99
    assert (blocks.shifted == inside.shifted).mean() > 0.97
    assert blocks.value == pytest.approx(inside.value, abs=0.01)
    assert blocks.train_value == pytest.approx(inside.train_value, abs=0.01)
    assert 0.6 < inside.value < 0.97
    blocks_scores, classes, blocks_shifted = scores_again(given, cut, blocks)
    np.testing.assert_array_equal(codes[cut.test] == classes[blocks_scores.argmax(axis=1)], blocks.contributions)
    np.testing.assert_allclose(blocks_scores, inside_scores, atol=0.05 * np.abs(inside_scores).max())
    np.testing.assert_array_equal(other[1] == classes[blocks_shifted.argmax(axis=1)], blocks.shifted)
    np.testing.assert_array_equal(other[1] == classes[inside_shifted.argmax(axis=1)], inside.shifted)


def test_it_is_scikit_learns_head_on_standardised_training_rows():
    values, codes = made_up(300, 10, distance=0.8)
    given, cut = data(values, codes), fold(120, 40, 140)
    (cell,) = measure_fold(given, cut, ["logistic"])
    scaler = StandardScaler().fit(values[:160])
    x = scaler.transform(values)

    def right(strength, train, check):
        head = LogisticRegression(C=strength, max_iter=5000, tol=1e-3).fit(x[train], codes[train])
        return head.predict(x[check]) == codes[check]

    strengths = probes.HEADS["logistic"].grid["C"]
    chosen = max(strengths, key=lambda strength: right(strength, cut.fit, cut.choose).mean())  # of equals the first
    assert cell.params == {"C": chosen}
    assert chosen > strengths[0]
    np.testing.assert_array_equal(cell.contributions, right(chosen, cut.train, cut.test))
    assert cell.train_value == right(chosen, cut.train, cut.train).mean()
    assert cell.value == cell.contributions.mean()
    assert (cell.head, cell.seed, cell.fold) == ("logistic", 0, 0)


@pytest.mark.filterwarnings("error")
def test_ridge_on_values_that_say_the_same_is_solved_and_not_complained_about():
    """Twice the same 150 values, nearly all of one direction: in float32 the smallest penalties would vanish beside it."""
    rng = np.random.default_rng(0)
    values = 3 * rng.normal(size=(2000, 1)) + 0.1 * rng.normal(size=(2000, 150))
    codes = np.arange(2000) % 2
    values[:, 0] += 0.2 * codes
    values = np.repeat(values.astype(np.float32), 2, axis=1)
    cut = fold(800, 400, 800)
    (cell,) = measure_fold(data(values, codes), cut, ["ridge"])
    scaler = StandardScaler().fit(values[:1200])
    exact = RidgeClassifier(alpha=cell.params["alpha"], solver="svd").fit(
        scaler.transform(values[:1200]).astype(np.float64), codes[:1200]
    )
    right = exact.predict(scaler.transform(values[1200:])) == codes[1200:]
    assert cell.contributions.mean() == pytest.approx(right.mean(), abs=0.003)
    assert cell.value > 0.7


HEADS = ["logistic", "linear-svm", "ridge", "knn", "rbf-svm", "centroid", "lda", "xgboost"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [20, 400], ids=["plain", "turned"])
@pytest.mark.parametrize("blocks", [False, True], ids=["", "blocks"])
def test_test_rows_influence_nothing(width, blocks, monkeypatch):
    """Other features and labels of the test rows: everything that was learned stays as it was."""
    if blocks:
        monkeypatch.setattr(probes, "SMALL_VALUES", 100)
    heads = ["logistic", "linear-svm"] if blocks else [h for h in HEADS if width < 100 or h not in ("lda", "xgboost")]
    values, codes = made_up(150, width, distance=2 / width**0.5)
    other = made_up(30, width, seed=1)
    cut = fold(60, 20, 70)
    before = measure_fold(data(values, codes, other), cut, heads)
    changed, wrong = values.copy(), codes.copy()
    changed[80:] = changed[80:] * 1000 - 7e4
    wrong[80:] = (wrong[80:] + 1) % 3
    for one, after in zip(before, measure_fold(data(changed, wrong, other), cut, heads), strict=True):
        assert (one.head, one.params, one.train_value) == (after.head, after.params, after.train_value)
        np.testing.assert_array_equal(one.shifted, after.shifted)  # so the fitted head is the same, and its scale
        assert one.contributions.tolist() != after.contributions.tolist()


def test_what_chooses_is_not_fitted_while_it_chooses():
    """With the labels of the choosing rows turned round no neighbour is right, unless rows were compared with themselves."""
    values, codes = made_up(200, 5, classes=2, distance=2.0)
    flipped = codes.copy()
    flipped[60:80] = 1 - flipped[60:80]
    (honest,) = measure_fold(data(values, codes), fold(60, 20, 120), ["knn"])
    (misled,) = measure_fold(data(values, flipped), fold(60, 20, 120), ["knn"])
    assert honest.params == {"n_neighbors": 1, "weights": "uniform"}  # all equal: the first
    assert misled.params == {"n_neighbors": 1, "weights": "uniform"}  # all wrong: the first, no neighbour is itself
    assert honest.value == 1.0
    assert misled.train_value == 1.0  # the last fit is on both


def test_neighbours_are_never_more_than_rows():
    values, codes = made_up(40, 5)
    (cell,) = measure_fold(data(values, codes), fold(8, 2, 30), ["knn"])
    assert cell.params["n_neighbors"] <= 8


def test_trees_are_as_many_as_stopping_early_chose():
    values, codes = made_up(500, 8, distance=0.7)
    given, cut = data(values, codes), fold(250, 80, 170)
    (cell,) = measure_fold(given, cut, ["xgboost"])
    from featurepipe.heads.trees.boosted import BoostedTrees

    scaler = StandardScaler().fit(values[:330])
    x = scaler.transform(values)
    settings = {**probes.TREES, "colsample_bytree": 1.0, "n_jobs": 1, "random_state": 0}
    searched = BoostedTrees(**settings).fit(x[cut.fit], codes[cut.fit], eval_set=(x[cut.choose], codes[cut.choose]))
    best = int(np.argmin(searched.evaluation_))
    assert cell.params["n_estimators"] == best + 1 < probes.TREES["n_estimators"]
    del settings["early_stopping_rounds"]
    last = BoostedTrees(**{**settings, "n_estimators": best + 1}).fit(x[cut.train], codes[cut.train])
    np.testing.assert_array_equal(cell.contributions, last.predict(x[cut.test]) == codes[cut.test])
    scores, classes, _ = scores_again(given, cut, cell)
    np.testing.assert_array_equal(classes[scores.argmax(axis=1)] == codes[cut.test], cell.contributions)


def test_images_of_the_other_source_are_tested_with_the_same_head_and_scale():
    values, codes = made_up(200, 6, distance=0.8)
    cut = fold(80, 40, 80)
    other = values[cut.test], codes[cut.test]
    cells = measure_fold(data(values, codes, other), cut, HEADS)
    for cell in cells:
        np.testing.assert_array_equal(cell.shifted, cell.contributions)
    assert [cell.head for cell in cells] == HEADS
    assert measure_fold(data(values, codes), cut, ["knn"])[0].shifted is None


def test_classes_that_a_fold_does_not_learn_are_never_right():
    values, codes = made_up(90, 6)
    codes = np.where(np.arange(90) == 70, 3, codes)  # a class that only the test has
    given, cut = data(values, codes), fold(40, 20, 30)
    (cell,) = measure_fold(given, cut, ["centroid"])
    assert not cell.contributions[10]
    assert scores_again(given, cut, cell)[1].tolist() == [0, 1, 2]


def test_features_that_are_constant_are_no_obstacle():
    values, codes = made_up(120, 10)
    values[:, :7] = 3.0
    for cell in measure_fold(data(values, codes), fold(50, 20, 50), HEADS):
        assert 0 <= cell.value <= 1
        assert np.isfinite(cell.train_value)
