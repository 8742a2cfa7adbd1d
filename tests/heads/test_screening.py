"""Curves, rates and thresholds of two classes: equal to scikit-learn's, with bands and limits that hold what they promise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import norm
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from featurepipe.errors import UsageError
from featurepipe.heads.statistics import intervals
from featurepipe.heads.statistics.aims import Wish
from featurepipe.heads.statistics.metrics import score_table
from featurepipe.heads.statistics.screening import (
    areas,
    choose_threshold,
    precision_recall,
    rates,
    reliability,
    roc,
    screening_table,
    screening_text,
)

Array = npt.NDArray[Any]


def made(n: int = 300, seed: int = 0, ties: int | None = 40) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    scores = rng.random(n) if ties is None else rng.integers(0, ties, n) / ties
    return scores, rng.random(n) < scores


@pytest.mark.parametrize("ties", [None, 40, 3])
def test_curves_and_areas_are_those_of_scikit_learn(ties: int | None) -> None:
    scores, positive = made(ties=ties)
    curve = roc(scores, positive, points=None)
    rate, recall, thresholds = roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.x, rate)
    np.testing.assert_allclose(curve.y, recall)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    curve = precision_recall(scores, positive, points=None)
    precision, recall, thresholds = precision_recall_curve(positive, scores)
    np.testing.assert_allclose(curve.x[::-1], recall)
    np.testing.assert_allclose(curve.y[::-1], precision)
    np.testing.assert_array_equal(curve.thresholds[:0:-1], thresholds)
    found = areas(scores, positive)
    assert found["auc"]["value"] == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert found["average_precision"]["value"] == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


@pytest.mark.parametrize("size", [1, 4])
def test_the_auc_and_its_interval_are_those_of_the_table_of_scores(size: int) -> None:
    scores, positive = made(200, ties=None)
    groups = None if size == 1 else (np.arange(200) // size).astype(str).astype(object)
    table = score_table(np.stack([1 - scores, scores], 1), positive.astype(int), ["no", "yes"], groups=groups)
    assert areas(scores, positive, groups=groups)["auc"] == pytest.approx(table["auc"])


def test_average_precision_s_influences_are_what_leaving_an_image_out_changes() -> None:
    """The jackknife's variance, which is exact but slow, against that of the influences."""
    scores, positive = made(400, ties=None)
    low, high = (areas(scores, positive)["average_precision"][side] for side in ("low", "high"))
    kept = [np.arange(400) != k for k in range(400)]
    parts = np.array([average_precision_score(positive[rows], scores[rows]) for rows in kept])
    deviation = np.sqrt(((parts - parts.mean()) ** 2).sum() * 399 / 400)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.08)


def test_points_of_a_drawn_curve_are_some_of_the_whole_one_and_reach_both_ends() -> None:
    scores, positive = made(5000, ties=None)
    for draw in (roc, precision_recall):
        whole, drawn = draw(scores, positive, points=None), draw(scores, positive, points=50)
        assert len(drawn.x) <= 51
        place = np.searchsorted(-whole.thresholds, -drawn.thresholds)
        np.testing.assert_array_equal(whole.thresholds[place], drawn.thresholds)
        np.testing.assert_allclose(whole.y[place], drawn.y)
        np.testing.assert_allclose(whole.low[place], drawn.low)
        assert drawn.x[0] == 0
        assert drawn.x[-1] == 1


def normal_images(rng: np.random.Generator, groups: int, size: int, share: float, distance: float) -> tuple[Array, ...]:
    """Scores of two normal distributions; images of a group have one class, and half of their variance in common."""
    group = np.repeat(np.arange(groups), size)
    positive = (rng.random(groups) < share)[group]
    alike = 0.5 if size > 1 else 0.0
    noise = np.sqrt(alike) * rng.normal(size=groups)[group] + np.sqrt(1 - alike) * rng.normal(size=len(group))
    return noise + distance * positive, positive, group.astype(str).astype(object)


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "size", "share"), [(150, 1, 0.25), (60, 5, 0.4)])
def test_bands_hold_the_true_curve(groups: int, size: int, share: float) -> None:
    """Of 200 test sets; a share of 0.91 is 2.6 standard deviations below 0.95, so that no band that holds its level fails."""
    rng, sets, distance = np.random.default_rng(1), 200, 1.5
    rate, recall = np.array([0.05, 0.1, 0.3]), np.array([0.4, 0.7, 0.9])
    true_recall = norm.sf(norm.isf(rate) - distance)
    alarms = norm.sf(norm.isf(recall) + distance)
    true_precision = share * recall / (share * recall + (1 - share) * alarms)
    held, false_bands = np.zeros(7), np.zeros(1)
    for _ in range(sets):
        scores, positive, names = normal_images(rng, groups, size, share, distance)
        given = None if size == 1 else names
        for first, draw, x, truth in ((0, roc, rate, true_recall), (3, precision_recall, recall, true_precision)):
            curve = draw(scores, positive, groups=given, points=60)
            start = int(np.isnan(curve.low[0]))
            low, high = (np.interp(x, curve.x[start:], side[start:]) for side in (curve.low, curve.high))
            held[first : first + 3] += (low <= truth) & (truth <= high)
        auc = areas(scores, positive, groups=given)["auc"]
        held[6] += auc["low"] <= norm.cdf(distance / np.sqrt(2)) <= auc["high"]
        if size > 1:
            curve = roc(scores, positive, points=60)
            low, high = (np.interp(0.3, curve.x, side) for side in (curve.low, curve.high))
            false_bands += low <= true_recall[2] <= high
    assert (held / sets).min() >= 0.91, held / sets
    if size > 1:
        assert false_bands / sets < 0.9  # as if images of a group were independent


def test_rates_are_those_of_the_confusion_matrix_with_exact_limits() -> None:
    scores, positive = made()
    called = scores >= 0.6
    (tn, fp), (fn, tp) = confusion_matrix(positive, called)
    found = rates(called, positive)
    for name, hit, of in (
        ("sensitivity", tp, tp + fn),
        ("specificity", tn, tn + fp),
        ("ppv", tp, tp + fp),
        ("npv", tn, tn + fn),
    ):
        low, high = intervals.proportion(hit / of, of)
        assert found[name] == {
            "value": pytest.approx(hit / of),
            "low": pytest.approx(low),
            "high": pytest.approx(high),
            "images": of,
        }
    assert [found[f"{a}_{b}"] for a, b in (("true", "positives"), ("false", "negatives"))] == [tp, fn]


def test_rates_of_groups_are_as_certain_as_groups() -> None:
    """Ten copies of each image in a group say no more than the images."""
    scores, positive = made(120, ties=None)
    alone = rates(scores > 0.5, positive, groups=[str(k) for k in range(120)])
    copies = [np.repeat(values, 10) for values in (scores > 0.5, positive)]
    grouped = rates(*copies, groups=np.repeat(np.arange(120).astype(str), 10).astype(object))
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        assert [grouped[name][side] for side in ("low", "high")] == pytest.approx(
            [alone[name][side] for side in ("low", "high")], rel=0.005
        )
        plain = rates(*copies)[name]
        assert plain["high"] - plain["low"] < 0.5 * (grouped[name]["high"] - grouped[name]["low"])


def test_rates_that_no_image_tells_say_why() -> None:
    found = rates(np.zeros(5, bool), np.array([True, False, False, False, False]))
    assert found["ppv"] == {
        "value": None,
        "low": None,
        "high": None,
        "images": 0,
        "reason": "no image is called positive",
    }
    assert found["sensitivity"]["value"] == 0


@pytest.mark.parametrize("ties", [None, 25])
@pytest.mark.parametrize("aim", ["recall=0.9", "recall=1", "precision=0.8", "cost=7:2", "cost=1:20"])
def test_the_threshold_is_the_one_that_a_search_over_all_finds(aim: str, ties: int | None) -> None:
    scores, positive = made(200, seed=3, ties=ties)
    wish = Wish.of(aim)
    found = choose_threshold(scores, positive, wish)
    tried = {}
    for threshold in [*np.unique(scores), np.inf]:
        called = scores >= threshold
        tp, fp, fn = ((called & positive).sum(), (called & ~positive).sum(), (~called & positive).sum())
        value = {
            "recall": tp / positive.sum(),
            "precision": tp / max(1, tp + fp),
            "cost": -(wish.least * fn + fp),
        }[wish.aim]
        tried[float(threshold)] = value, tp
    if wish.aim == "recall":
        best = max(t for t, (value, _) in tried.items() if value >= wish.least)
    elif wish.aim == "precision":
        best = min(t for t, (value, _) in tried.items() if value >= wish.least)
    else:
        least = max(value for value, _ in tried.values())
        best = min(t for t, (value, _) in tried.items() if value >= least - 1e-9)
    np.testing.assert_array_equal(scores >= found.threshold, scores >= best)
    assert found.reached
    assert found.threshold <= best or not (scores >= found.threshold).any()
    if np.isfinite(best):
        assert best - found.threshold <= 1e-6


def test_a_margin_asks_the_limit_to_reach_it() -> None:
    scores, positive = made(600, ties=None)
    for aim, name in (("recall=0.9", "sensitivity"), ("precision=0.7", "ppv")):
        plain, safe = (choose_threshold(scores, positive, Wish.of(aim), margin=margin) for margin in (False, True))
        wanted = Wish.of(aim).least
        assert safe.reached
        assert safe.rates[name]["low"] >= wanted > plain.rates[name]["low"]
    groups = np.repeat(np.arange(60), 10).astype(str).astype(object)
    wider = choose_threshold(scores, positive, Wish.of("recall=0.9"), margin=True, groups=groups)
    assert wider.rates["sensitivity"]["low"] >= 0.9


def test_a_wish_that_cannot_be_reached_is_said() -> None:
    scores, positive = made(40, ties=None)
    found = choose_threshold(scores, positive, Wish.of("recall=0.99"), margin=True)
    assert not found.reached
    assert found.rates["sensitivity"]["value"] == 1
    assert "recall=0.99 cannot be reached" in found.reason
    assert "lower 95 % limit of the recall" in found.reason
    scores[~positive] += 1  # the ranking is upside down
    found = choose_threshold(scores, positive, Wish.of("precision=0.9"))
    assert not found.reached
    assert f"is at most {positive.mean():.4f}" in found.reason


def test_thresholds_bear_scores_that_rounding_changes() -> None:
    scores, positive = made(500, ties=None)
    threshold = choose_threshold(scores, positive, Wish.of("recall=0.95")).threshold
    elsewhere = scores + 1e-8 * np.random.default_rng(0).normal(size=500)
    np.testing.assert_array_equal(scores >= threshold, elsewhere >= threshold)


@pytest.mark.parametrize(
    "text", ["recall", "recall=0", "recall=1.2", "recall=nan", "cost=10", "cost=0:1", "f1=0.9", "precision=a"]
)
def test_a_wish_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"write recall=0\.95, precision=0\.9, cost=10:1"):
        Wish.of(text)


def test_wishes_read_percentages_and_costs() -> None:
    assert Wish.of("recall = 95%").least == pytest.approx(0.95)
    assert Wish.of("cost=1:4").least == 0.25


def test_reliability_bins_hold_equally_many_images_and_keep_ties_together() -> None:
    scores, positive = made(1000, ties=None)
    bins = reliability(scores, positive, bins=10)
    assert [one["images"] for one in bins] == [100] * 10
    assert all(one["low"] <= one["observed"] <= one["high"] for one in bins)
    assert sum(one["low"] <= one["probability"] <= one["high"] for one in bins) >= 8  # they are calibrated
    own = (scores >= bins[4]["from"]) & (scores <= bins[4]["to"])
    assert bins[4]["observed"] == pytest.approx(positive[own].mean())
    assert bins[4]["probability"] == pytest.approx(scores[own].mean())
    tied = reliability(np.repeat([0.0, 0.25, 1.0], [80, 15, 5]), np.repeat([False, True], [80, 20]))
    assert [one["images"] for one in tied] == [80, 20]
    assert [one["observed"] for one in tied] == [0, 1]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="all 3 images are of the class"):
        roc([0.1, 0.2, 0.3], [True] * 3)
    with pytest.raises(UsageError, match="score of image 1 is no finite number"):
        roc([0.1, np.nan, 0.3], [True, False, True])
    with pytest.raises(UsageError, match="give one of each"):
        rates([True], [True, False])
    with pytest.raises(UsageError, match="a cost has no margin"):
        choose_threshold([0.1, 0.2], [True, False], Wish.of("cost=1:1"), margin=True)


def test_the_table_holds_all_as_json_and_text() -> None:
    scores, positive = made(ties=None)
    found = screening_table(scores, positive, scores >= 0.3, threshold=0.3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["positives"] == positive.sum()
    assert found["sensitivity"] == rates(scores >= 0.3, positive)["sensitivity"]
    assert found["roc"]["thresholds"][0] is None
    assert found["precision_recall"]["low"][0] is None
    assert len(found["reliability"]) == 10
    lines = screening_text(found).splitlines()
    assert lines[1].split()[:3] == ["sensitivity", "(recall)", f"{found['sensitivity']['value']:.4f}"]
    assert lines[-1].startswith(f"{found['true_positives']} found, {found['false_negatives']} missed; ")
    one_side = screening_table(scores, np.zeros(300), scores >= 0.3, threshold=0.3)
    assert "auc" not in one_side
    assert "no image is positive" in screening_text(one_side)
