"""Several columns as one feature vector, what is refused, and what a view tells of itself."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from featurepipe.errors import StoreError, UsageError
from featurepipe.store import FeatureStore, compact_store

NAMES = [f"{'cat' if i % 3 else 'dog'}{i}" for i in range(200)]
COLUMNS = ("a:gap", "b:gap", "c:map")


def values_for(rows, names, column):
    """Another value and another width for each column."""
    number = COLUMNS.index(column)
    return rows.features(names, 3 + number) + 40 * number


@pytest.fixture
def wide(store, space, rows):
    """Columns of widths 3, 4 and 5, the last one in parts of its own, all in another order than the snapshot."""
    shuffled = list(np.random.default_rng(0).permutation(NAMES))
    for columns in (COLUMNS[:2], COLUMNS[2:]):
        with space.writer(store.new_run_id(), part_bytes=1000) as writer:
            for start in range(0, 200, 60):
                names = shuffled[start : start + 60]
                values = {column: values_for(rows, names, column) for column in columns}
                writer.add(rows.keys(names), names, [0] * len(names), [0] * len(names), values)
    space.update_notes({"map_shapes": {"c:map": [5, 1, 1]}})
    rows.snapshot(store, "d", NAMES, split=["train"] * 150 + ["test"] * 50)
    return store


@pytest.fixture
def expected(rows):
    def of(names, columns=COLUMNS):
        return np.hstack([values_for(rows, names, column) for column in columns])

    return of


def test_columns_stand_side_by_side_in_the_order_named(wide, expected):
    features = wide.features("d", node=["c:map", "bottleneck", "b"])
    order = ("c:map", "a:gap", "b:gap")
    assert features.columns == order
    assert features.column == "c:map+a:gap+b:gap"
    assert features.widths == tuple(wide.features("d", node=column).shape[1] for column in order)
    assert sum(features.widths) == 12
    assert (features.shape, features.dtype, features.map_shape) == ((200, 12), np.float16, None)
    for dtype in (np.float16, np.float32, np.float64):
        x, y = features.numpy(dtype)
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, expected(NAMES, order))
        assert y.tolist() == [name[0] for name in NAMES]
    backwards = features.take(slice(None, None, -3))
    np.testing.assert_array_equal(backwards.read(), expected(NAMES[::-3], order))
    np.testing.assert_array_equal(features.read(rows=np.array([7, 7, 3])), expected(["cat7", "cat7", "dog3"], order))
    features.check()


def test_plus_equals_naming_both(wide):
    a, b, c = (wide.features("d", node=node) for node in COLUMNS)
    assert c.map_shape == (5, 1, 1)
    joined = a + (b + c)
    assert joined.map_shape is None
    assert joined.columns == COLUMNS
    np.testing.assert_array_equal(joined.read(), wide.features("d", node=COLUMNS).read())
    np.testing.assert_array_equal(joined.read(), np.hstack([a.read(), b.read(), c.read()]))
    test = a.select(split="test") + b.select(split="test")
    np.testing.assert_array_equal(test.read(), joined.select(split="test").read()[:, :7])
    with pytest.raises(TypeError):
        a + 3


def test_columns_of_two_dtypes_are_promoted(wide, rows, expected):
    space = wide.spaces()[0]
    with space.writer(wide.new_run_id()) as writer:
        writer.add(rows.keys(NAMES), NAMES, [0] * 200, [0] * 200, {"w:gap": np.full((200, 2), 1e6, np.float32)})
    features = wide.features("d", node=["a", "w"])
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features.read(), np.hstack([expected(NAMES, ["a:gap"]), np.full((200, 2), 1e6)]))


def test_a_column_twice_is_refused(wide):
    with pytest.raises(UsageError, match="nodes 'a' and 'bottleneck' are one column, a:gap; name each column once"):
        wide.features("d", node=["a", "b", "bottleneck"])
    with pytest.raises(UsageError, match=r"node=\[\] names no column"):
        wide.features("d", node=[])
    both = wide.features("d", node=["a", "b"])
    with pytest.raises(UsageError, match="column b:gap would be in the feature vector twice"):
        both + wide.features("d", node="b")


def test_two_feature_spaces_are_refused_with_what_differs(wide, rows, space):
    other = wide.open_space({"dtype": "float32", "net": "tiny"}, backbone="other")
    rows.write(wide, other, NAMES, columns=["z:gap"])
    with pytest.raises(
        UsageError, match=rf"two feature spaces, which differ in dtype\..*'d', .*backbone='{space.name}'"
    ):
        wide.features("d", node="a", backbone="tiny") + wide.features("d", node="z", backbone="other")


def test_two_datasets_are_refused(wide, rows):
    rows.snapshot(wide, "e", NAMES)
    with pytest.raises(UsageError, match=r"dataset 'd' and of dataset 'e' side by side.*store\.features\('d', node="):
        wide.features("d", node="a") + wide.features("e", node="b")


def test_other_rows_are_refused_and_counted(wide):
    a, b = wide.features("d", node="a"), wide.features("d", node="b")
    with pytest.raises(
        UsageError, match=r"200 and 150 rows; 50 ids only on the left, 0 only on the right, such as 'dog150'"
    ):
        a + b.select(split="train")
    with pytest.raises(UsageError, match=r"0 ids only on the left, 1 only on the right, such as 'cat1'"):
        a.take([0, 2]) + b.take([0, 1, 2])
    swapped = np.array([0, 2, 1, *range(3, 200)])
    with pytest.raises(
        UsageError, match=r"another order \(2 rows differ, the first is 'cat1'\); put the columns side by"
    ):
        a + b.take(swapped)
    with pytest.raises(UsageError, match=r"occur differently often \(2 and 3 rows\)"):
        a.take([0, 1]) + b.take([0, 1, 1])


def test_other_labels_or_splits_are_refused(wide, rows):
    a, b = wide.features("d", node="a"), wide.features("d", node="b")
    labels = dict(zip(NAMES, a.labels, strict=True))
    assert (a + b.with_labels(labels)).shape == (200, 7)
    with pytest.raises(UsageError, match="1 images have another label, such as 'cat5': 'c' and None"):
        a + b.with_labels({**labels, "cat5": None})
    rows.snapshot(wide, "d", NAMES)
    with pytest.raises(UsageError, match="200 images have another split, such as 'dog0': 'train' and None"):
        a + wide.features("d", node="b")


def test_images_that_changed_in_between_are_refused(wide, rows):
    a = wide.features("d", node="a")
    keys = [bytes(key) for key in rows.keys(NAMES)]
    keys[4] = keys[5]
    rows.snapshot(wide, "d", NAMES, split=["train"] * 150 + ["test"] * 50, key=keys)
    with pytest.raises(UsageError, match="1 images have changed in between, such as 'cat4'"):
        a + wide.features("d", node="b")


def test_missing_columns_are_named_with_the_command(wide, rows):
    rows.write(wide, wide.spaces()[0], ["new"], columns=["a:gap"])
    rows.snapshot(wide, "d", [*NAMES, "new"])
    with pytest.raises(
        StoreError, match=r"1 of 201 images .* has no b:gap \(and c:map\) in .* --node b:gap --node c:map$"
    ):
        wide.features("d", node=COLUMNS)


def test_counts_and_words(wide, rows):
    names = [*NAMES[:7], *NAMES[:3]]
    status = ["ok"] * 7 + ["rejected"] + ["ok"] * 2
    labels = ["x", None, *"yxyxy", "x", None, "x"]
    split = ["train"] * 6 + ["test"] * 4
    ids = [f"i{n}" for n in range(10)]
    rows.snapshot(wide, "some", names, status=status, label=labels, split=split, id=ids)
    features = wide.features("some", node=["a", "b"])
    assert features.counts() == json.loads(json.dumps(features.counts()))
    assert features.counts() == {
        "images": 9,
        "labelled": 7,
        "unlabelled": 2,
        "rejected": 1,
        "duplicates": 2,
        "unmatched": 0,
        "classes": {"x": 4, "y": 3},
        "splits": {"test": 3, "train": 6},
    }
    assert features.describe().splitlines()[2:] == [
        "columns  bottleneck (a:gap) + b:gap: 7 values, stored as float16, read as float32",
        "images   9 (2 unlabelled, 1 rejected, 2 duplicates)",
        "classes  2: x 4, y 3",
        "splits   2: test 3, train 6",
    ]
    assert repr(features) == "<FeatureSet some: bottleneck (a:gap) + b:gap (9, 7), stored as float16, read as float32>"
    assert (features.dtype, features.read().dtype, features.read(None).dtype) == (np.float16, np.float32, np.float16)
    assert ">7, stored as float16, read as float32<" in features._repr_html_()
    assert (features.select(split="train").rejected, features.select(split="test").rejected) == (0, 1)
    assert wide.features("some", node="a", split="train").rejected == 0
    relabelled = features.with_labels({"i0": "x", "elsewhere": "y"})
    assert relabelled.describe().splitlines()[-1] == "labels   1 id of the labels matches no image here"


def test_rows_are_selected_by_class(wide, expected):
    features = wide.features("d", node=COLUMNS)
    dogs = features.select(split="test", classes=["d"])
    names = [name for name in NAMES[150:] if name[0] == "d"]
    assert dogs.ids.tolist() == names
    np.testing.assert_array_equal(dogs.read(), expected(names))
    with pytest.raises(UsageError, match="unknown class 'e'; choices: c, d"):
        features.select(classes=["c", "e"])


def test_keys64_and_codes(wide, rows):
    features = wide.features("d", node="a")
    assert features.keys64.dtype == np.uint64
    assert np.shares_memory(features.keys64, features.keys)
    assert features.keys64.tolist() == [int.from_bytes(bytes(key)[:8], "little") for key in rows.keys(NAMES)]
    assert features.codes().tolist() == ["cd".index(name[0]) for name in NAMES]
    some = features.with_labels({"cat1": "z", "cat2": "y", "cat4": "x"}).take([1, 0, 2, 4])
    codes = some.codes(np.array(["y", "x"]))
    assert codes.dtype == np.int64
    assert codes.tolist() == [-1, -1, 0, 1]
    assert some.codes().tolist() == [2, -1, 1, 0]


def test_it_is_cut_as_scikit_learn_cuts(wide, expected):
    from sklearn.model_selection import train_test_split
    from sklearn.utils import _safe_indexing

    features = wide.features("d", node=COLUMNS)
    np.testing.assert_array_equal(_safe_indexing(features, np.array([3, 1])).read(), expected(["dog3", "cat1"]))
    train, test, y_train, y_test = train_test_split(features, features.labels, random_state=0)
    np.testing.assert_array_equal(train.read(), expected(train.ids))
    assert (train.labels.tolist(), test.labels.tolist()) == (y_train.tolist(), y_test.tolist())


def test_it_is_not_read_into_memory_unasked(wide):
    features = wide.features("d", node="a")
    with pytest.raises(
        UsageError, match=r"not in memory; pass X, y = features\.numpy\(\), or fit a head that reads block by block"
    ):
        np.asarray(features)
    with pytest.raises(TypeError):
        list(features)
    with pytest.raises(TypeError, match=r"\.blocks\(\)"):
        features[3]
    with pytest.raises(TypeError, match=r"\.blocks\(\)"):
        features[:, 3]


def test_pickles_are_small_and_work_from_another_folder(wide, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = FeatureStore("store").features("d", node=COLUMNS)
    features.read(rows=np.array([100, 5]))
    content = pickle.dumps(features)
    assert len(content) < 200 * (32 + 3 * 8 + 30) + 6000
    (tmp_path / "features.pickle").write_bytes(content)
    code = "import pickle, sys, numpy as np; np.save(sys.argv[2], pickle.load(open(sys.argv[1], 'rb')).read())"
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = [sys.executable, "-c", code, str(tmp_path / "features.pickle"), "x.npy"]
    subprocess.run(done, cwd=folder, check=True)
    np.testing.assert_array_equal(np.load(folder / "x.npy"), expected(NAMES))


def test_pickles_name_the_modules_of_before(wide, expected):
    content = pickle.dumps(wide.features("d", node=list(COLUMNS)), protocol=2)
    for name, now, before in (
        ("WideRows", "rows", "wide_rows"),
        ("PartColumn", "rows", "part_files"),
        ("Origin", "space", "identity"),
        ("Origin", "identity", "origin"),
    ):
        assert f"cfeaturepipe.store.{now}\n{name}\n".encode() in content
        content = content.replace(f"store.{now}\n{name}\n".encode(), f"store.{before}\n{name}\n".encode())
    np.testing.assert_array_equal(pickle.loads(content).numpy()[0], expected(NAMES))


def test_a_pickle_of_some_rows_names_only_their_parts_and_packs_runs(store, space, rows):
    names = [f"n{i}" for i in range(3000)]
    with space.writer(store.new_run_id(), part_bytes=8000) as writer:
        for start in range(0, 3000, 1000):
            rows.add(writer, names[start : start + 1000])
    rows.snapshot(store, "d", names)
    features = store.features("d")
    assert len(features.rows.parts[0].parts) == 3
    some = pickle.loads(pickle.dumps(features.rows.take(np.arange(1200, 1900))))
    assert len(some.parts[0].parts) == 1
    np.testing.assert_array_equal(some.read(), rows.features(names[1200:1900]))
    assert len(pickle.dumps(features.rows)) < 1500
    shuffled = features.rows.take(np.random.default_rng(0).permutation(3000))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shuffled)).read(), shuffled.read())
    empty = pickle.loads(pickle.dumps(features.take([])))
    assert empty.read().shape == (0, 4)


def test_views_hold_no_file(wide):
    before = os.listdir("/proc/self/fd")
    features = wide.features("d", node=COLUMNS)
    pickle.loads(pickle.dumps(features)).read()
    assert os.listdir("/proc/self/fd") == before


def test_a_store_compacted_meanwhile_is_named(wide):
    features = wide.features("d", node=COLUMNS)
    compact_store(wide)
    with pytest.raises(StoreError, match=r"compacted meanwhile, open the features again with store\.features"):
        features.read()
    x = wide.features("d", node=COLUMNS).read()
    assert x.shape == (200, 12)
