"""What follows from the cells: intervals, differences, the recommendation, columns side by side."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from featurepipe.layer_depth import answers
from featurepipe.layer_depth.measure import Series
from featurepipe.layer_depth.probes import Cell
from featurepipe.layer_depth.study import PRETRAINED, RANDOM

COLUMNS = [("a:gap", 0.2, 4), ("a:avg2x2", 0.2, 16), ("b:gap", 0.6, 8), ("c:gap", 1.0, 4)]
COUNT = 40
LABELS = ["cat", "dog"] * (COUNT // 2)


@pytest.fixture
def study(album):
    """A study whose features nobody looks at: cells are made up."""
    values = {name: np.zeros((COUNT, width), np.float32) for name, _, width in COLUMNS}

    def make(name="zoo", contents=None, splits=None, **options):
        fingerprint = album.write(name, values, LABELS, contents=contents, splits=splits)
        options = {"heads": ("knn", "ridge"), "folds": 4, **options}
        return album.study(name, fingerprint, COLUMNS, **options)

    return make


def hits(accuracy, count=10):
    """Whether each image is right: so many of them are."""
    return np.arange(count) < round(accuracy * count)


def series(column, accuracies, head="knn", network=PRETRAINED, shifted=None, train=0.9):
    columns = (column,) if isinstance(column, str) else tuple(column)
    cells = [
        Cell(head, 0, fold, {"k": fold}, hits(value), None if shifted is None else shifted[fold], train, 1.0)
        for fold, value in enumerate(accuracies)
    ]
    return Series(network, columns, head, cells)


def corrected(values, share):
    """Mean, half width of the interval, standard error: Nadeau and Bengio by hand."""
    values = np.array(values)
    se = np.sqrt(values.var(ddof=1) * (1 / len(values) + share))
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * se, se


def test_over_folds_the_interval_is_corrected(study):
    given = study()
    accuracies = [0.5, 0.7, 0.6, 0.8]
    found = answers.estimate(given, series("a:gap", accuracies))
    mean, reach, se = corrected(accuracies, 10 / 30)
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - reach, min(1, mean + reach)))
    assert found.se == pytest.approx(se)


def test_results_have_an_entry_for_all_that_was_measured(study, album):
    away = {name: np.ones((6, width), np.float32) for name, _, width in COLUMNS}
    album.write("away", away, ["cat", "dog", "dog"] * 2, ids=[f"other-{row}" for row in range(6)])
    given = study(shifted="away")
    shifted = [hits(value, 6) for value in (0.5, 1.0, 0.5, 1.0)]
    one = series("a:gap", [0.5, 0.7, 0.6, 0.8], shifted=shifted, train=0.75)
    other = series("a:gap", [0.5] * 4, network=RANDOM, shifted=shifted)
    found = answers.results(given, [one, other])
    assert [(r["column"], r["head"], r["network"], r["tested_on"]) for r in found] == [
        ("a:gap", "knn", "pretrained", "source"), ("a:gap", "knn", "pretrained", "shifted"),
        ("a:gap", "knn", "random", "source"), ("a:gap", "knn", "random", "shifted"),
    ]  # fmt: skip
    assert found[0]["cells"] == [0.5, 0.7, 0.6, 0.8]
    assert found[0]["params"] == [{"k": 0}, {"k": 1}, {"k": 2}, {"k": 3}]
    assert found[0]["train_accuracy"] == 0.75
    assert found[0]["seconds"] == 4
    assert found[1]["cells"] == [0.5, 1.0, 0.5, 1.0]
    assert found[1]["accuracy"] == pytest.approx(0.75)
    assert found[1]["low"] < 0.75 < found[1]["high"]
    assert found[0]["se"] != found[1]["se"]


def test_the_cheapest_within_one_standard_error_is_recommended(study):
    given = study()
    best = [0.7, 0.9, 0.8, 1.0]  # mean 0.85
    _, _, se = corrected(best, 1 / 3)
    assert 0.09 < se < 0.11
    cells = {
        "a:gap": [0.6, 0.6, 0.7, 0.7],  # too bad
        "a:avg2x2": [0.7, 0.7, 0.8, 0.9],  # 0.775: within, and as cheap as a:gap
        "b:gap": [0.8, 0.8, 0.8, 0.9],  # 0.825: within, but dearer
        "c:gap": best,
    }
    found = answers.recommend(given, [series(column, values) for column, values in cells.items()])
    assert found.chosen.columns == ("a:avg2x2",)
    assert found.best.columns == ("c:gap",)
    assert found.estimate.value == pytest.approx(0.775)
    assert found.best_estimate.value == pytest.approx(0.85)
    assert found.best_estimate.se == pytest.approx(se)


def test_of_equal_cost_the_narrower_is_recommended(study):
    measured = [series("a:avg2x2", [0.9] * 4), series("a:gap", [0.9] * 4), series("c:gap", [0.9] * 4)]
    found = answers.recommend(study(), measured)
    assert found.chosen.columns == found.best.columns == ("a:gap",)


def test_the_head_may_be_any_but_the_network_is_the_trained_one(study):
    measured = [
        series("a:gap", [0.5, 0.5, 0.6, 0.6], "knn"),
        series("b:gap", [0.8, 0.8, 0.8, 0.8], "ridge"),
        series("a:gap", [1.0] * 4, "knn", RANDOM),
    ]
    found = answers.recommend(study(), measured)
    assert (found.chosen.columns, found.chosen.head, found.chosen.network) == (("b:gap",), "ridge", PRETRAINED)


def test_differences_are_paired_and_adjusted(study):
    given = study()
    best = [0.7, 0.9, 0.8, 1.0]
    worse = {"a:gap": [0.4, 0.9, 0.5, 0.8], "a:avg2x2": [0.6, 0.9, 0.7, 1.0], "b:gap": [0.7, 0.8, 0.8, 0.9]}
    measured = [*(series(column, values) for column, values in worse.items()), series("c:gap", best)]
    measured += [series(column, [0.5, 0.5, 0.6, 0.6], "ridge") for column in ("a:gap", "b:gap")]
    measured += [series("c:gap", [0.0] * 4, network=RANDOM)]
    found = answers.differences(given, measured)
    assert [(d["head"], d["a"], d["b"]) for d in found] == [
        ("knn", "a:gap", "c:gap"), ("knn", "a:avg2x2", "c:gap"), ("knn", "b:gap", "c:gap"), ("ridge", "b:gap", "a:gap"),
    ]  # fmt: skip
    by_hand = {}
    for one in found[:3]:
        mean, reach, se = corrected(np.array(worse[one["a"]]) - best, 1 / 3)
        assert (one["difference"], one["low"], one["high"]) == pytest.approx((mean, mean - reach, mean + reach))
        by_hand[one["a"]] = 2 * stats.t.sf(abs(mean) / se, 3)
        assert one["p"] == pytest.approx(by_hand[one["a"]])
    first, second, third = sorted(by_hand.values())  # Holm: times 3, 2, 1, never less than the one before
    expected = {first: 3 * first, second: max(3 * first, 2 * second), third: max(3 * first, 2 * second, third)}
    for one in found[:3]:
        assert one["p_adjusted"] == pytest.approx(min(1, expected[by_hand[one["a"]]]))
    assert (found[3]["difference"], found[3]["p"], found[3]["p_adjusted"]) == (0, 1, 1)


def test_holm_steps_down_never_decreases_and_stays_within_one():
    found = answers.with_adjusted_p([{"p": p} for p in (0.04, 0.01, 0.03, 0.005, 0.9)])
    assert [one["p_adjusted"] for one in found] == pytest.approx([0.09, 0.04, 0.09, 0.025, 0.9])
    assert [one["p_adjusted"] for one in answers.with_adjusted_p([{"p": 0.7}, {"p": 0.6}])] == [1.0, 1.0]
    mixed = answers.with_adjusted_p([{"p": None}, {"p": 0.02}])
    assert mixed == [{"p": None}, {"p": 0.02, "p_adjusted": 0.02}]


def test_the_most_accurate_of_different_nodes_are_joined(study):
    accuracies = {"a:gap": 0.9, "a:avg2x2": 1.0, "b:gap": 0.6, "c:gap": 0.8}
    measured = [series(column, [value] * 4) for column, value in accuracies.items()]
    join = answers.neighbours_to_join
    # of node a only the better pooling; sets in execution order; all three nodes are the same set as the best three
    assert join(study(), measured, "knn", 9000) == [("a:avg2x2", "c:gap"), ("a:avg2x2", "b:gap", "c:gap")]
    assert join(study(), measured[:2], "knn", 9000) == []
    assert join(study(), measured[1:3], "knn", 9000) == [("a:avg2x2", "b:gap")]
    assert join(study(), measured, "ridge", 9000) == []


def test_all_nodes_are_joined_only_where_that_is_not_too_wide(album):
    columns = [(f"n{i}:gap", i / 5, 10) for i in range(1, 6)]
    values = {name: np.zeros((COUNT, 10), np.float32) for name, _, _ in columns}
    given = album.study("wide", album.write("wide", values, LABELS), columns, heads=("knn",), folds=4)
    measured = [series(name, [1 - place / 10] * 4) for place, (name, _, _) in enumerate(columns)]
    names = tuple(name for name, _, _ in columns)
    assert answers.neighbours_to_join(given, measured, "knn", 50) == [names[:2], names[:3], names]
    assert answers.neighbours_to_join(given, measured, "knn", 49) == [names[:2], names[:3]]


def test_columns_side_by_side_are_compared_with_the_best_alone(study):
    best, joined = series("c:gap", [0.7, 0.9, 0.8, 1.0]), series(["a:gap", "c:gap"], [0.9, 0.9, 0.9, 1.0])
    (found,) = answers.concatenations(study(), [joined], best)
    assert (found["columns"], found["head"], found["against"]) == (["a:gap", "c:gap"], "knn", "c:gap")
    mean, reach, se = corrected([0.2, 0, 0.1, 0], 1 / 3)
    assert (found["difference"], found["low_difference"], found["high_difference"]) == pytest.approx(
        (mean, mean - reach, mean + reach)
    )
    assert found["p"] == pytest.approx(2 * stats.t.sf(mean / se, 3))
    assert found["accuracy"] == pytest.approx(0.925)
    assert found["low"] < 0.925 < found["high"]


def test_rank_correlations_are_scipys_over_the_trained_networks_columns(study):
    accuracies = {"a:gap": 0.5, "a:avg2x2": 0.7, "b:gap": 0.9, "c:gap": 0.8}
    scores = {"a:gap": -1.0, "a:avg2x2": 0.5, "b:gap": 0.4, "c:gap": 2.0}
    measured = [series(column, [value] * 4) for column, value in accuracies.items()]
    measured += [series(column, [1 - value] * 4, network=RANDOM) for column, value in accuracies.items()]
    measured += [series(column, [0.5] * 4, "ridge") for column in accuracies]
    found = answers.correlations(study(), measured, scores)
    a, b = list(scores.values()), list(accuracies.values())
    assert found["knn"]["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found["knn"]["kendall"] == pytest.approx(stats.kendalltau(a, b).statistic)
    assert found["ridge"] == {"spearman": None, "kendall": None}  # all equally accurate


def split_series(column, right, head="knn"):
    """One cell a seed with exactly these images right."""
    cells = [Cell(head, seed, 0, {}, np.array(one, bool), None, 1.0, 1.0) for seed, one in enumerate(right)]
    return Series(PRETRAINED, (column,), head, cells)


SPLITS = ["train"] * 30 + ["test"] * 10


def test_with_the_own_split_images_are_the_sample(study):
    given = study(splits=SPLITS, folds=None)
    one, other = [1] * 8 + [0] * 2, [1] * 5 + [0] * 4 + [1]
    found = answers.estimate(given, split_series("a:gap", [one]))
    assert found.value == 0.8
    assert found.se == pytest.approx(np.std(one, ddof=1) / np.sqrt(10))
    paired = np.array(one) - other
    between = answers.difference(given, split_series("a:gap", [one]), split_series("b:gap", [other]))
    test = stats.ttest_1samp(paired, 0)
    assert between.value == pytest.approx(0.2)
    assert between.p == pytest.approx(test.pvalue)
    interval = test.confidence_interval(0.95)
    assert between.low < interval.low < interval.high < between.high  # wider by two pseudo-images


def test_copies_in_the_test_count_as_one_image(study):
    contents = [*map(str, range(30)), *"xxxxyyzuvw"]
    given = study(contents=contents, splits=SPLITS, folds=None)
    right = [1, 1, 1, 1, 0, 0, 1, 0, 1, 1]
    found = answers.estimate(given, split_series("a:gap", [right]))
    sums = np.array([4, 0, 1, 0, 1, 1]) - np.array([4, 2, 1, 1, 1, 1]) * 0.7  # of each image, about the mean
    by_hand = np.sqrt(6 / 5 * ((sums / 10) ** 2).sum())
    assert found.value == pytest.approx(0.7)
    assert found.se == pytest.approx(by_hand)
    apart = answers.estimate(study("apart", splits=SPLITS, folds=None), split_series("a:gap", [right]))
    assert apart.se < found.se


def test_images_of_a_group_count_as_one_image(study):
    """The same figures as those of copies of one image."""
    groups = [*(f"g{row}" for row in range(30)), *"xxxxyyzuvw"]
    labels = pa.table({"id": [f"{row}.png" for row in range(COUNT)], "label": LABELS, "group": groups})
    right = [1, 1, 1, 1, 0, 0, 1, 0, 1, 1]
    grouped = study(splits=SPLITS, folds=None, labels=labels)
    copies = study("copies", contents=groups, splits=SPLITS, folds=None)
    found, same = (answers.estimate(one, split_series("a:gap", [right])) for one in (grouped, copies))
    of_copies = (same.value, same.se, same.low, same.high)
    assert (found.value, found.se, found.low, found.high) == pytest.approx(of_copies, rel=1e-12)


def test_a_seed_that_changes_nothing_changes_no_interval(study):
    given = study(splits=SPLITS, folds=None, seeds=2)
    right = [1] * 7 + [0] * 3
    once = answers.estimate(given, split_series("a:gap", [right]))
    twice = answers.estimate(given, split_series("a:gap", [right, right]))
    assert once.as_dict() == pytest.approx(twice.as_dict())


def test_folds_that_agree_are_no_certainty(study):
    """Four folds of ten images, all right: the interval is that of forty images, not a point."""
    perfect = answers.estimate(study(), series("a:gap", [1.0] * 4))
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.89 < perfect.low < 0.95  # Wilson's for 40 of 40 is 0.912
    equal = answers.estimate(study(), series("a:gap", [0.9] * 4))
    assert equal.low < 0.85 < 0.95 < equal.high
    assert equal.se == pytest.approx(np.sqrt(0.9 * 0.1 / 40), rel=0.1)


def test_what_chance_may_have_put_behind_is_named(study):
    given = study()
    best = answers.recommend(given, [series("c:gap", [0.9, 0.9, 1.0, 0.9])])
    between = [{"head": "knn", "a": "a:gap", "p_adjusted": 0.01}, {"head": "knn", "a": "b:gap", "p_adjusted": 0.2},
               {"head": "knn", "a": "d:gap", "p": None}, {"head": "lda", "a": "e:gap", "p_adjusted": 0.9}]  # fmt: skip
    assert answers.not_told_apart(best, between) == ["b:gap", "d:gap"]


def test_folds_that_differ_alike_are_no_certainty(study):
    """One image in ten more is right in every fold: four images of forty, which may be chance."""
    more = answers.difference(study(), series("a:gap", [0.9] * 4), series("b:gap", [0.8] * 4))
    assert more.value == pytest.approx(0.1)
    assert more.low < 0.05 < 0.15 < more.high
    assert 0.001 < more.p < 0.2
    same = answers.difference(study(), series("a:gap", [0.9] * 4), series("b:gap", [0.9] * 4))
    assert (same.value, same.p) == (0.0, 1.0)
