"""Images of another source are tested only by heads that have not learned from the image of equal id."""

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.errors import UsageError
from featurepipe.heads.statistics import intervals
from featurepipe.layer_depth import answers
from featurepipe.layer_depth.document import details
from featurepipe.layer_depth.measure import Series
from featurepipe.layer_depth.probes import Cell, measure_fold
from featurepipe.layer_depth.study import PRETRAINED

COLUMNS = [("a:gap", 0.5, 4), ("b:gap", 1.0, 4)]
COUNT = 24
LABELS = ["cat", "dog", "emu"] * (COUNT // 3)


def features(seed=0, count=COUNT):
    rng = np.random.default_rng(seed)
    codes = np.arange(count) % 3
    centres = np.random.default_rng(7).normal(size=(3, 4)) * 3
    values = (centres[codes] + rng.normal(size=(count, 4))).astype(np.float32)
    return {"a:gap": values, "b:gap": values + 1}


@pytest.fixture
def study(album):
    """A comparison, and another source with images of these ids and labels."""

    def make(ids, labels=None, *, splits=None, contents=None, **options):
        fingerprint = album.write("zoo", features(), LABELS, splits=splits)
        labels = labels or [LABELS[int(name.split(".")[0]) % COUNT] for name in ids]
        album.write("away", features(1, len(ids)), labels, ids=ids, contents=contents)
        return album.study("zoo", fingerprint, COLUMNS, shifted="away", **options)

    return make


def series(study, right):
    """Cells with (cells, m) given hits on the other source."""
    cells = [
        Cell("centroid", fold.seed, fold.number, {}, np.ones(len(fold.test), bool), np.array(hits, bool), 1.0, 1.0)
        for fold, hits in zip(study.folds, right, strict=True)
    ]
    return Series(PRETRAINED, ("a:gap",), "centroid", cells)


def test_a_twin_has_the_same_id_and_class(study):
    given = study(["0.png", "1.png", "99.png", "3.png"], ["cat", "cat", "cat", "cat"], folds=3)
    there = given.elsewhere
    assert there.twins == 2  # 1.png is a dog here
    for number, fold in enumerate(given.folds):
        train = set(given.images.ids[fold.train])
        assert there.unseen[number].tolist() == ["0.png" not in train, True, True, "3.png" not in train]


def test_only_heads_that_have_not_seen_the_twin_count(study):
    """Here a head is right exactly where it has seen the twin: it gets nothing for that."""
    given = study([f"{row}.png" for row in range(COUNT)], folds=3, seeds=2)
    unseen = given.elsewhere.unseen
    assert (unseen.sum(axis=0) == 2).all()  # one fold of each seed
    found = answers.estimate(given, series(given, ~unseen), answers.SHIFTED)
    assert found.value == 0
    found = answers.estimate(given, series(given, unseen), answers.SHIFTED)
    assert found.value == 1
    (_, result) = answers.results(given, [series(given, unseen)])
    assert result["tested_on"] == answers.SHIFTED
    assert result["cells"] == [1.0] * 6
    assert (result["accuracy"], result["low"] < 1) == (1.0, True)


def test_each_image_counts_alike_with_or_without_a_twin(study):
    given = study(["0.png", "100.png", "101.png", "102.png"], ["cat", "cat", "cat", "cat"], folds=3, seeds=2)
    right = np.zeros((6, 4), bool)
    right[:, 1] = True  # by all
    right[:3, 2] = True  # by all of the first seed
    right[0, 3] = right[3, 3] = True  # by one of three
    found = answers.estimate(given, series(given, right), answers.SHIFTED)
    assert found.value == pytest.approx((0 + 1 + 1 / 2 + 1 / 3) / 4)


def test_without_twins_every_head_counts(study):
    given = study([f"{row}.png" for row in range(100, 106)], ["cat"] * 6, folds=3, seeds=1)
    assert given.elsewhere.twins == 0
    right = np.arange(18).reshape(3, 6) % 4 == 0
    hits, keys = answers._by_image_elsewhere(given, series(given, right))
    np.testing.assert_array_equal(hits, right)
    np.testing.assert_array_equal(keys, given.elsewhere.images.keys64)


def test_on_the_own_split_twins_of_training_images_are_left_out(study):
    splits = ["train"] * 15 + ["val"] * 3 + ["test"] * 6
    given = study([f"{row}.png" for row in range(COUNT)], splits=splits, folds=None)
    assert given.elsewhere.rows.tolist() == list(range(18, 24))
    assert given.elsewhere.unseen.all()
    assert given.elsewhere.twins == 6
    assert given.left_out["shifted_twins_that_train"] == 18
    with pytest.raises(
        UsageError, match=r"all 18 images of away have the id of an image of zoo that every head learns from"
    ):
        study([f"{row}.png" for row in range(18)], splits=splits, folds=None)


def test_the_same_image_in_both_is_no_stranger(study):
    contents = ["zoo-0", *[f"new-{row}" for row in range(1, 4)]]
    given = study(["0.png", "1.png", "2.png", "3.png"], contents=contents)
    assert given.elsewhere.rows.tolist() == [1, 2, 3]
    assert given.left_out["shifted_in_both"] == 1


def test_each_image_is_asked_of_one_head_that_has_not_seen_its_twin_the_others_in_turns(study):
    given = study([f"{row}.png" for row in range(2 * COUNT)], folds=4, seeds=2)
    there = given.elsewhere
    testers = there.testers(given.folds)
    assert {given.folds[number].seed for number in testers} == {0}
    assert there.unseen[testers, np.arange(len(testers))].all()
    assert testers[COUNT:].tolist() == [place % 4 for place in range(COUNT, 2 * COUNT)]


@pytest.mark.parametrize("ids", [range(12), range(100, 112)], ids=["twins", "strangers"])
def test_details_elsewhere_are_of_those_heads(study, ids):
    """As many right as the cells of the asked heads have."""
    given = study([f"{row}.png" for row in ids], [LABELS[row % 3] for row in range(12)], folds=3)
    data = given.data(PRETRAINED, ["a:gap"])
    cells = [measure_fold(data, fold, ["knn"])[0] for fold in given.folds]
    found = details(given, Series(PRETRAINED, ("a:gap",), "knn", cells))
    testers = given.elsewhere.testers(given.folds)
    right = [bool(cells[number].shifted[place]) for place, number in enumerate(testers)]
    assert 0 < sum(right) < 12
    there = found["details_shifted"]
    assert (there["column"], there["head"]) == ("a:gap", "knn")
    assert there["metrics"]["images"] == 12
    assert there["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    confusion = np.array(there["metrics"]["confusion"]["counts"])
    assert confusion.sum() == 12
    assert confusion.trace() == sum(right)
    wrong = {given.elsewhere.images.ids[place] for place in range(12) if not right[place]}
    assert {one["id"] for one in there["metrics"]["mistakes"]["most_confident"]} == wrong
    own = found["details"]["metrics"]
    assert own["accuracy"]["value"] == pytest.approx(np.concatenate([cell.contributions for cell in cells]).mean())


def test_details_of_grouped_images_have_intervals_of_so_many_groups(album):
    fingerprint = album.write("zoo", features(), LABELS)
    album.write("away", features(1, 12), LABELS[:12], ids=[f"{row}.png" for row in range(100, 112)])
    groups = [f"g{row // 6}{row % 3}" for row in range(COUNT)]  # two images of one class each
    labels = pa.table({"id": [f"{row}.png" for row in range(COUNT)], "label": LABELS, "group": groups})
    given = album.study("zoo", fingerprint, COLUMNS, shifted="away", labels=labels, folds=3)
    cells = [measure_fold(given.data(PRETRAINED, ["a:gap"]), fold, ["knn"])[0] for fold in given.folds]
    metrics = details(given, Series(PRETRAINED, ("a:gap",), "knn", cells))["details"]["metrics"]
    assert (given.groups, metrics["groups"], metrics["images"]) == (12, 12, 24)
    accuracy = metrics["accuracy"]
    assert accuracy["low"] < intervals.proportion(accuracy["value"], COUNT)[0]  # 24 independent images would be more
    assert accuracy["low"] >= intervals.proportion(accuracy["value"], 8)[0]
    assert (metrics["ece"]["low"], metrics["ece"]["reason"]) == (
        None,
        "no interval: none is known that holds for groups",
    )
    assert album.study("zoo", fingerprint, COLUMNS).groups is None


def test_without_another_source_there_are_no_details_of_it(album):
    given = album.study("zoo", album.write("zoo", features(), LABELS), COLUMNS)
    cells = [measure_fold(given.data(PRETRAINED, ["a:gap"]), fold, ["knn"])[0] for fold in given.folds]
    assert details(given, Series(PRETRAINED, ("a:gap",), "knn", cells))["details_shifted"] is None
