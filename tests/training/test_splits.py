"""Who trains and who checks: copies together, classes even, the user's own splits as they are."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV, GroupKFold

from featurepipe.errors import UsageError
from featurepipe.heads import make_head
from featurepipe.heads.sampling import ALWAYS_TRAIN, fold_numbers, group_fold_numbers, larger_classes_first
from featurepipe.training import splits
from featurepipe.training.splits import divide, folds_of, near_training
from featurepipe.training.text import train_text
from featurepipe.training.train import train


@given(
    images=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=80),
    folds=st.integers(2, 6),
    seed=st.integers(0, 5),
)
def test_folds_keep_copies_together_and_classes_even(images, folds, seed):
    keys = np.array([key for key, _ in images], np.uint64)
    label_of = dict(reversed(images))  # copies share a label here
    codes = np.array([label_of[key] for key, _ in images])
    found = fold_numbers(keys, codes, folds=folds, seed=seed)
    by_key = {key: {int(f) for f in found[keys == key]} for key in keys}
    assert all(len(numbers) == 1 for numbers in by_key.values())
    for code in set(codes):
        members = [by_key[key].copy().pop() for key in set(keys[codes == code])]
        if len(members) == 1:
            assert members == [ALWAYS_TRAIN]
        else:
            sizes = [members.count(fold) for fold in range(folds)]
            assert max(sizes) - min(sizes) <= 1
            assert sum(sizes) == len(members)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=25), seed=st.integers(0, 5))
def test_larger_classes_are_tested_before_smaller_ones_and_the_largest_stay(sizes, seed):
    codes = np.repeat(np.arange(len(sizes)), sizes)
    keys = np.random.default_rng(0).permutation(len(codes)).astype(np.uint64)
    before = fold_numbers(keys, codes, folds=5, seed=seed)
    found = larger_classes_first(before, keys, codes)
    assert sorted(found) == sorted(before)
    is_tested = np.isin(np.arange(len(sizes)), codes[found == 0])
    large = np.array(sizes)[codes] >= 5
    np.testing.assert_array_equal(found[large], before[large])
    tested, untested = np.array(sizes)[is_tested], np.array(sizes)[~is_tested & (np.array(sizes) > 1)]
    assert tested.min(initial=99) >= untested.max(initial=0)


@given(
    groups=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=40),
    folds=st.integers(2, 5),
    seed=st.integers(0, 3),
)
def test_groups_stay_whole_and_classes_as_even_as_they_allow(groups, folds, seed):
    units = np.repeat(np.arange(len(groups), dtype=np.uint64), [size for size, _ in groups])
    codes = np.repeat([code for _, code in groups], [size for size, _ in groups])
    found = group_fold_numbers(units, codes, folds=folds, seed=seed)
    assert all(len(set(found[units == unit])) == 1 for unit in units)
    for code in set(codes):
        largest = max(size for size, other in groups if other == code)
        if sum(other == code for _, other in groups) == 1:
            assert set(found[codes == code]) == {ALWAYS_TRAIN}
        else:
            counts = [int((found[codes == code] == fold).sum()) for fold in range(folds)]
            assert max(counts) - min(counts) <= largest  # no fold has more than a group more than another


def test_the_first_fold_is_not_that_of_a_group_larger_than_a_fold():
    """It is the one that is held out for the test."""
    units = np.repeat(np.arange(7, dtype=np.uint64), [54, 1, 1, 1, 1, 1, 1])
    codes = np.concatenate([np.arange(54) % 2, [0, 0, 0, 1, 1, 1]])
    for seed in range(5):
        found = group_fold_numbers(units, codes, folds=5, seed=seed)
        assert set(range(5)) == set(found.tolist())
        assert 1 <= (found == 0).sum() <= 2
    two = group_fold_numbers(np.array([7, 7, 8, 8], np.uint64), np.array([0, 1, 0, 1]), folds=5, seed=0)
    assert sorted(two.tolist()) == [0, 0, 1, 1]  # nor is it empty


def test_groups_of_mixed_classes_are_dealt_about_evenly():
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(400, dtype=np.uint64), 5)
    codes = (rng.random(2000) < np.repeat(rng.random(400), 5)).astype(np.int64)
    found = group_fold_numbers(units, codes, folds=5, seed=0)
    share = [codes[found == fold].mean() for fold in range(5)]
    assert max(share) - min(share) < 0.03
    assert np.bincount(found).tolist() == pytest.approx([400] * 5, abs=10)


def test_another_seed_is_another_draw_and_the_same_seed_the_same():
    keys, codes = np.arange(200, dtype=np.uint64), np.zeros(200, np.int64)
    first = fold_numbers(keys, codes, folds=5, seed=0)
    np.testing.assert_array_equal(first, fold_numbers(keys, codes, folds=5, seed=0))
    assert (first != fold_numbers(keys, codes, folds=5, seed=1)).sum() > 100


def test_copies_with_two_labels_still_stay_together():
    keys = np.array([1, 1, 2, 2, 3, 4], np.uint64)
    codes = np.array([0, 1, 0, 0, 1, 1])
    found = fold_numbers(keys, codes, folds=2, seed=3)
    assert found[0] == found[1]
    assert found[2] == found[3]


def division_of(zoo, split=None, *, validate=True, seed=0):
    features = zoo.features()
    return features, divide(features, features.codes(), split=split, seed=seed, validate=validate)


def test_own_splits_are_taken_as_they_are(zoo):
    zoo.write([*zoo.images("train"), *zoo.images("val", 10), *zoo.images("test", 10), *zoo.images(None, 5)])
    features, found = division_of(zoo)
    assert set(features.take(found.train).splits) == {"train"}
    assert set(features.take(found.validation).splits) == {"val"}
    assert set(features.take(found.test).splits) == {"test"}
    assert [len(part) for part in (found.train, found.validation, found.test)] == [120, 30, 30]
    np.testing.assert_array_equal(found.final, found.train)  # a user's validation rows are never trained on
    assert found.text == "the dataset's own splits (test, train, val), trained on train"
    asked = divide(features, features.codes(), split="val", seed=0, validate=False, column="part")
    assert asked.text == "the splits of column part (test, train, val), trained on val"


def test_without_val_a_tenth_is_set_aside_and_given_back_for_the_last_fit(zoo):
    zoo.write([*zoo.images("train"), *zoo.images("test", 10)])
    features, found = division_of(zoo)
    assert len(found.validation) == 12
    assert found.is_carved
    assert not set(found.train) & set(found.validation)
    assert set(features.take(found.final).splits) == {"train"}
    assert len(found.final) == 120


@pytest.mark.parametrize(
    ("asked", "meant"), [("training", "train"), ("Validation", "val"), ("dev", "val"), ("val", "val")]
)
def test_usual_names_of_splits_mean_the_splits(zoo, asked, meant):
    zoo.write([*zoo.images("train", 30), *zoo.images("val", 12), *zoo.images("test", 9)])
    features = zoo.store.features("zoo", node="a:gap")
    assert set(features.select(split=asked).splits) == {meant}
    codes = features.codes(features.classes)
    same = [divide(features, codes, split=split, seed=0, validate=False).train.tolist() for split in (asked, meant)]
    assert same[0] == same[1]


def test_without_splits_a_fifth_is_held_out_with_its_copies(zoo):
    originals = zoo.images(None)
    copies = [zoo.image(f"copy-{image.id}", image.content, image.label) for image in originals]
    zoo.write([*originals, *copies])
    features, found = division_of(zoo)
    parts = [set(features.keys64[rows].tolist()) for rows in (found.train, found.validation, found.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert len(found.test) == 48
    assert sorted(np.concatenate([found.final, found.test])) == list(range(240))


def test_unlabelled_images_take_no_part(zoo):
    rows = [*zoo.images("train"), zoo.image("stranger", "cat-stranger", None, "train")]
    zoo.write(rows)
    _, found = division_of(zoo)
    assert 120 not in found.final


def test_splits_that_are_not_there_are_named_with_the_choices(zoo):
    zoo.write([*zoo.images("train"), zoo.image("x", "cat-x", None, "extra")])
    with pytest.raises(UsageError, match=r"unknown split 'trian' in dataset zoo; nearest: train"):
        division_of(zoo, "trian")
    with pytest.raises(UsageError, match="split extra of dataset zoo has no labelled image to train on"):
        division_of(zoo, "extra")


def test_a_split_of_a_dataset_without_splits_is_refused(zoo):
    zoo.write(zoo.images(None))
    with pytest.raises(UsageError, match="has no splits; leave split out"):
        division_of(zoo, "train")


def of_groups(features, *, each=4):
    """The features with so many neighbouring images in a group."""
    return features.with_column("group", np.array([f"g{row // each}" for row in range(len(features))], object))


def test_groups_are_on_one_side_of_every_split(zoo):
    zoo.write(zoo.images(None, 60))
    features = of_groups(zoo.features())
    found = divide(features, features.codes(), split=None, seed=0, validate=True)
    parts = [set(features.groups[rows]) for rows in (found.train, found.validation, found.test)]
    assert all(parts)
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert "by group" in found.text
    names = [{features.groups[row] for row in rows} for rows in (found.final, found.validation, found.test)]
    sides = dict(zip(("train", "validation", "test"), map(len, names), strict=True))
    assert found.groups(features.groups) == sides
    assert sides["train"] + sides["test"] == len(set(features.groups))
    told = f"{sides['train']} groups to train on ({sides['validation']} of these to calibrate), {sides['test']} to test"
    assert found.text.endswith(f"set aside to calibrate; {told}")
    folds = folds_of(features, features.codes(), found.final, folds=5, seed=0)
    assert all(not set(features.groups[one]) & set(features.groups[other]) for one, other in folds)


def test_a_group_across_the_datasets_own_splits_is_refused(zoo):
    zoo.write([*zoo.images("train"), *zoo.images("test", 10)])
    features = zoo.features()
    group = np.array(["p" if row in (3, len(features) - 1) else None for row in range(len(features))], object)
    with pytest.raises(
        UsageError, match="1 group of dataset zoo has images in both splits, train and test, such as 'p'"
    ):
        divide(features.with_column("group", group), features.codes(), split=None, seed=0, validate=False)


def test_units_are_scikit_learns_groups(zoo):
    zoo.write(zoo.images(None, 30))
    features = of_groups(zoo.features())
    X, y = features.numpy()
    search = GridSearchCV(make_head("logistic"), {"head__C": [0.1, 1.0]}, cv=GroupKFold(3))
    assert search.fit(X, y, groups=features.units()).best_params_["head__C"] in (0.1, 1.0)
    for learned, tested in GroupKFold(3).split(X, y, groups=features.units()):
        assert not set(features.groups[learned]) & set(features.groups[tested])


def nearest_shares(features, train_rows, test_rows):
    """By hand: the distance of near copies, and the share of test rows that have a training row so near."""
    x = features.read(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    apart = 1 - x[test_rows] @ x.T
    distance = np.median(apart[:, test_rows][np.triu_indices(len(test_rows), 1)]) / 15
    return distance, (apart[:, train_rows].min(axis=1) <= distance).mean()


def test_test_images_near_training_images_are_counted(zoo, monkeypatch):
    zoo.write(zoo.images(None, 60))
    features, found = division_of(zoo)
    assert near_training(features, found.final, found.test, seed=0) is None  # three values tell nothing
    monkeypatch.setattr(splits, "_NEAR_WIDTH", 1)
    distance, expected = nearest_shares(features, found.final, found.test)
    near = near_training(features, found.final, found.test, seed=0)
    assert near == {"images": 36, "share": expected, "distance": pytest.approx(distance, rel=1e-4)}
    assert 0.1 < expected < 1
    assert near_training(features, found.final, found.test[:1], seed=0) is None
    monkeypatch.setattr(splits, "_NEAR_SAMPLE", 20)
    assert near_training(features, found.final, found.test, seed=0)["images"] == 20
    monkeypatch.setattr(splits, "_NEAR_PRODUCTS", 20 * len(found.final) * features.shape[1] - 1)
    assert near_training(features, found.final, found.test, seed=0) is None


def test_train_says_that_near_copies_make_the_score_too_good_unless_there_are_groups(zoo, monkeypatch, tmp_path):
    monkeypatch.setattr(splits, "_NEAR_WIDTH", 1)
    rows = zoo.images(None, 60)
    zoo.write(rows)
    asked = {"nodes": ["a:gap", "b:gap"], "out": tmp_path / "bundle", "silent": True}
    record = train(zoo.store, **asked)
    features, found = division_of(zoo)
    share = nearest_shares(features, found.final, found.test)[1]
    assert record["test_near"]["share"] == share
    assert f"{100 * share:.1f} % of the test images have a look-alike among the training images" in train_text(record)
    assert "look-alike" not in train_text({**record, "test_near": {**record["test_near"], "share": 0.09}})
    groups = [{"id": row.id, "group": f"g{place // 4}"} for place, row in enumerate(rows)]
    grouped = train(zoo.store, **asked, labels=pa.Table.from_pylist(groups))
    assert "test_near" not in grouped
    assert "look-alike" not in train_text(grouped)
