"""Who trains, who chooses, who is tested: each image once a seed, copies always together."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurepipe.errors import UsageError
from featurepipe.layer_depth.folds import cross_validation, own_split
from featurepipe.layer_depth.options import ComparisonOptions
from featurepipe.layer_depth.study import Protocol


class Rows:
    """As much of a FeatureSet as folds need: an image a content, all of one class and split unless told otherwise."""

    def __init__(self, contents, splits=None):
        digests = [hashlib.sha256(str(content).encode()).digest()[:8] for content in contents]
        self.keys64 = np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)
        self.splits = np.array(splits if splits is not None else [None] * len(contents), object)

    groups = None

    class origin:
        dataset = "album"


def together(rows, positions):
    return set(rows.keys64[positions].tolist())


def check_apart(rows, fold):
    """No image of a fold is in two of its parts, nor is a copy."""
    parts = [together(rows, part) for part in (fold.fit, fold.choose, fold.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))


SMALL = settings(max_examples=60)


@SMALL
@given(st.lists(st.integers(0, 40), min_size=30, max_size=90), st.integers(2, 5), st.integers(1, 3))
def test_each_image_is_tested_once_a_seed_and_copies_stay_together(contents, folds, seeds):
    rows, codes = Rows(contents), np.array([content % 3 for content in contents])
    singles = {kind for kind in range(3) if len({c for c in contents if c % 3 == kind}) == 1}
    try:
        found = cross_validation(rows, codes, folds=folds, seeds=seeds)
    except UsageError:
        assert len(set(contents)) < 30  # only many copies leave too few images
        return
    assert [(fold.seed, fold.number) for fold in found] == [(s, n) for s in range(seeds) for n in range(folds)]
    for seed in range(seeds):
        tested = np.concatenate([fold.test for fold in found if fold.seed == seed])
        expected = [row for row, code in enumerate(codes) if code not in singles]
        assert sorted(tested.tolist()) == expected
    for fold in found:
        check_apart(rows, fold)
        parts = np.concatenate([fold.train, fold.test])
        assert sorted(parts.tolist()) == list(range(len(contents)))
        assert fold.train.tolist() == sorted([*fold.fit.tolist(), *fold.choose.tolist()])
        assert fold.test_share == len(fold.test) / len(fold.train)


@SMALL
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["train", "val", "test", None])), min_size=40, max_size=90),
    st.integers(1, 3),
)
def test_copies_are_never_on_two_sides_of_an_own_split_either(drawn, seeds):
    contents, splits = zip(*drawn, strict=True)
    rows, codes = Rows(contents, splits), np.array([content % 2 for content in contents])
    try:
        found = own_split(rows, codes, seeds=seeds)
    except UsageError:
        return
    test = {row for row, split in enumerate(splits) if split == "test"}
    for fold in found:
        check_apart(rows, fold)
        assert set(fold.test.tolist()) <= test
        assert all(splits[row] in ("train", "val") for row in fold.train)
        assert set(codes[fold.test]) <= set(codes[fold.train])


def test_folds_are_even_by_class():
    codes = np.repeat([0, 1, 2], [50, 30, 20])
    for fold in cross_validation(Rows(range(100)), codes, folds=5, seeds=2):
        assert Counter(codes[fold.test].tolist()) == {0: 10, 1: 6, 2: 4}
        assert len(fold.choose) == 16  # a fifth of the 80 that train
        assert Counter(codes[fold.choose].tolist()) == pytest.approx({0: 8, 1: 5, 2: 3}, abs=1)


def test_seeds_deal_anew_and_the_same_seed_alike():
    rows, codes = Rows(range(60)), np.arange(60) % 2
    once, again = (cross_validation(rows, codes, folds=3, seeds=3) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        for part in ("fit", "choose", "test"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    tests = [tuple(fold.test.tolist()) for fold in once]
    assert len(set(tests)) == 9
    assert [fold.test.tolist() for fold in cross_validation(rows, codes, folds=3, seeds=1)] == [
        fold.test.tolist() for fold in once[:3]
    ]  # a seed more changes none of the others


def test_the_only_image_of_a_class_always_trains():
    codes = np.array([0] * 10 + [1] * 10 + [2, 2])  # the last class has one image, twice
    contents = [*range(20), 20, 20]
    for fold in cross_validation(Rows(contents), codes, folds=2, seeds=2):
        assert {20, 21} <= set(fold.fit.tolist())


def test_an_own_val_split_chooses():
    splits = ["train"] * 8 + ["val"] * 4 + ["test"] * 4 + [None] * 2
    codes = np.arange(18) % 2
    found = own_split(Rows(range(18), splits), codes, seeds=2)
    assert [fold.seed for fold in found] == [0, 1]
    for fold in found:
        parts = [part.tolist() for part in (fold.fit, fold.choose, fold.test)]
        assert parts == [[*range(8)], [*range(8, 12)], [*range(12, 16)]]


def test_without_one_a_part_of_train_chooses_by_seed():
    splits = ["train"] * 20 + ["test"] * 6
    codes = np.arange(26) % 2
    one, other = own_split(Rows(range(26), splits), codes, seeds=2)
    for fold in (one, other):
        assert fold.test.tolist() == [*range(20, 26)]
        assert fold.train.tolist() == [*range(20)]
        assert len(fold.choose) == 4
    assert one.choose.tolist() != other.choose.tolist()


def test_training_images_that_are_test_images_too_take_no_part():
    splits = ["train"] * 10 + ["val"] * 4 + ["test"] * 4
    contents = [*range(10), 100, 101, 0, 201, 100, 1, 202, 203]  # 1 and 100 are in the test, 0 in train and val
    codes = np.arange(18) % 2
    (fold,) = own_split(Rows(contents, splits), codes, seeds=1)
    assert fold.fit.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert fold.choose.tolist() == [11, 13]
    assert fold.test.tolist() == [14, 15, 16, 17]


def test_test_images_of_classes_that_nobody_learns_take_no_part():
    splits = ["train"] * 10 + ["test"] * 4
    codes = np.array([0, 1] * 5 + [0, 1, 2, 2])
    (fold,) = own_split(Rows(range(14), splits), codes, seeds=1)
    assert fold.test.tolist() == [10, 11]


@pytest.mark.parametrize("splits", [["train"] * 10, ["test"] * 10, [None] * 10, ["train"] * 5 + ["val"] * 5])
def test_missing_splits_are_named(splits):
    there = ", ".join(sorted({str(split) for split in splits}))
    with pytest.raises(UsageError, match=rf"dataset album needs .* train and test for split \(it has: {there}\)"):
        own_split(Rows(range(10), splits), np.arange(10) % 2, seeds=1)


@pytest.mark.parametrize(
    ("codes", "splits"),
    [
        ([0] * 6 + [1] * 2 + [0, 1], ["train"] * 6 + ["val"] * 2 + ["test"] * 2),  # one class to fit
        ([0, 1] * 4 + [2, 2], ["train"] * 8 + ["test"] * 2),  # nothing to test
        ([0, 1, 0, 1], ["train"] * 2 + ["test"] * 2),  # nothing to choose by
    ],
)
def test_too_small_own_splits_are_refused(codes, splits):
    with pytest.raises(UsageError, match=rf"{len(codes)} labelled images of . classes are too few"):
        own_split(Rows(range(len(codes)), splits), np.array(codes), seeds=1)


def test_too_few_images_are_refused_in_numbers():
    with pytest.raises(UsageError, match=r"3 labelled images of 2 classes are too few for such folds.* fewer folds"):
        cross_validation(Rows(range(3)), np.array([0, 0, 1]), folds=2, seeds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds 1 must be at least 2"),
        ({"folds": 0}, "folds 0 must be at least 2"),
        ({"seeds": 0}, "seeds 0 must be at least 1"),
        ({"heads": ("logistik",)}, "unknown head 'logistik'.*nearest: logistic"),
        ({"heads": ("knn", "knn")}, "heads='knn,knn': name each head once"),
        ({"heads": ()}, "heads='': name each head once"),
    ],
)
def test_protocols_that_measure_nothing_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ComparisonOptions(**options)


def test_the_protocol_says_how_it_was_measured():
    folds = Protocol(("knn",), 5, 3).text
    assert folds.startswith(
        "5-fold cross-validation, repeated 3 times with new folds, on the images outside the split test, if there is one; copies"
    )
    split = Protocol(("knn",), None, 1).text
    assert split.startswith("Fitted on the split train and tested on the split test; ")
    assert "The recommendation looks at the test images" in split


class Keyed:
    """What folds ask of features."""

    groups = None

    def __init__(self, count):
        self.keys64 = np.arange(count, dtype=np.uint64)


@pytest.mark.parametrize(("images", "parts"), [(100, 5), (1000, 4), (4000, 1)])
def test_as_many_parts_choose_in_turn_as_make_five_hundred_images(images, parts):
    codes = np.arange(images) % 4
    fold = cross_validation(Keyed(images), codes, folds=5, seeds=1)[2]
    assert len(fold.choices) == parts
    choosing = np.concatenate([choose for _, choose in fold.choices])
    assert len(np.unique(choosing)) == len(choosing) >= min(500, len(fold.train))
    for fit, choose in fold.choices:
        np.testing.assert_array_equal(np.union1d(fit, choose), fold.train)
        assert not len(np.intersect1d(fit, choose))
        assert not len(np.intersect1d(fold.train, fold.test))


def test_images_of_a_group_are_in_one_part_of_every_fold():
    rows = Rows(range(120))
    rows.groups = np.array([f"g{number // 4}" for number in range(120)], object)
    rows.units = lambda: np.arange(120, dtype=np.uint64) // 4
    for fold in cross_validation(rows, np.arange(120) % 3, folds=3, seeds=2):
        parts = [set(rows.groups[part]) for part in (fold.fit, fold.choose, fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 30


def test_a_group_in_both_own_splits_is_refused():
    rows = Rows(range(40), ["train"] * 30 + ["test"] * 10)
    rows.groups = np.array([f"g{number % 30}" for number in range(40)], object)
    with pytest.raises(UsageError, match="10 groups of dataset album have images in both splits, train and test"):
        own_split(rows, np.arange(40) % 2, seeds=1)
