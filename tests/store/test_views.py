"""Features of a dataset, as the one who trains sees them."""

import pickle

import numpy as np
import pytest

from featurepipe.errors import StoreError, UsageError

NAMES = [f"{'cat' if i % 3 else 'dog'}{i}" for i in range(200)]


@pytest.fixture
def filled(store, space, rows):
    """Rows over several parts, in another order than the snapshot."""
    shuffled = list(np.random.default_rng(0).permutation(NAMES))
    for start in range(0, 200, 60):
        rows.write(store, space, shuffled[start : start + 60])
    rows.snapshot(store, "d", NAMES, split=["train"] * 150 + ["test"] * 50)
    return store


def test_rows_are_in_snapshot_order(filled, rows, space):
    features = filled.features("d")
    x, y = features.numpy()
    np.testing.assert_array_equal(x, rows.features(NAMES))
    assert y.tolist() == [name[0] for name in NAMES]
    assert features.ids.tolist() == NAMES
    np.testing.assert_array_equal(features.keys, rows.keys(NAMES))
    assert features.classes == ["c", "d"]
    assert features.splits.tolist() == ["train"] * 150 + ["test"] * 50
    assert (features.shape, features.dtype, features.column) == ((200, 4), np.float16, "a:gap")
    assert (features.space_fingerprint, features.rejected, features.duplicates) == (space.fingerprint, 0, 0)
    assert (x.dtype, features.numpy(np.float16)[0].dtype) == ("float32", "float16")
    assert (features.read().dtype, features.read(dtype=None).dtype) == ("float32", "float16")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_long_runs_and_scattered_rows_give_the_same(filled, rows, dtype):
    space = filled.spaces()[0]
    in_order = [f"n{i}" for i in range(300)]
    rows.write(filled, space, in_order)
    mixed = in_order[:150] + NAMES[:20] + in_order[150:] + NAMES[20:] + in_order[:90]
    rows.snapshot(filled, "m", mixed)
    features = filled.features("m")
    np.testing.assert_array_equal(features.read(dtype), rows.features(mixed).astype(dtype))
    assert features.duplicates == 90
    backwards = features.take(np.arange(len(mixed))[::-1])
    np.testing.assert_array_equal(backwards.read(dtype), rows.features(mixed[::-1]).astype(dtype))
    assert backwards.ids.tolist() == mixed[::-1]
    np.testing.assert_array_equal(features.read(dtype, rows=np.array([5, 3, 200])), features.read(dtype)[[5, 3, 200]])


@pytest.mark.parametrize("rows_a_block", [1, 7, 64, 1000])
def test_blocks_are_the_whole_in_pieces(filled, rows_a_block):
    features = filled.features("d")
    x, y = features.numpy()
    blocks = list(features.blocks(rows=rows_a_block))
    assert max(len(block) for block, _ in blocks) == min(rows_a_block, 200)
    np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), x)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in blocks]), y)


def test_one_split(filled, rows):
    for test in (filled.features("d", split="test"), filled.features("d").select(split="test")):
        assert len(test) == 50
        np.testing.assert_array_equal(test.read(), rows.features(NAMES[150:]))
    with pytest.raises(UsageError, match="unknown split 'tset' in dataset d; nearest: test"):
        filled.features("d", split="tset")
    with pytest.raises(UsageError, match="unknown split 'x'"):
        filled.features("d").select(split="x")


def test_a_split_of_a_dataset_without_splits(filled, rows):
    rows.snapshot(filled, "plain", NAMES[:3])
    advice = "has no splits; leave split out, or put train/ and test/ above the class folders"
    with pytest.raises(UsageError, match=f"unknown split 'test' in dataset plain: this dataset {advice}"):
        filled.features("plain", split="test")
    with pytest.raises(UsageError, match=advice):
        filled.features("plain").select(split="test")


def test_unlabelled_rows_are_kept_unless_asked(filled, rows):
    rows.snapshot(filled, "some", NAMES[:3], label=["x", None, "y"])
    rows.snapshot(filled, "none", NAMES[:3], label=[None] * 3)
    some = filled.features("some")
    assert some.numpy()[1].tolist() == ["x", None, "y"]
    x, y = some.numpy(labelled=True)
    np.testing.assert_array_equal(x, rows.features([NAMES[0], NAMES[2]]))
    assert y.tolist() == ["x", "y"]
    assert filled.features("none").numpy()[1] is None
    assert [labels for _, labels in filled.features("none").blocks(2)] == [None, None]
    assert filled.features("none").numpy(labelled=True)[0].shape == (0, 4)


def test_rejects_are_left_out_and_counted(filled, rows):
    rows.snapshot(filled, "d", NAMES[:4], status=["ok", "rejected", "ok", "rejected"])
    features = filled.features("d")
    assert features.rejected == 2
    assert features.ids.tolist() == [NAMES[0], NAMES[2]]


def test_views_are_picklable_small_and_hold_no_file(filled, rows):
    features = filled.features("d")
    features.take(np.arange(0, 200, 7)).read()
    features.read()
    content = pickle.dumps(features)
    assert len(content) < 200 * (32 + 8 + 60) + 5000
    np.testing.assert_array_equal(pickle.loads(content).read(), rows.features(NAMES))


def test_missing_features_are_counted_and_the_next_step_is_said(filled, rows):
    rows.snapshot(filled, "more", [*NAMES, "new1", "new2"])
    with pytest.raises(StoreError, match=r"2 of 202 images of dataset 'more' have no a:gap.*--dataset more"):
        filled.features("more")


def test_columns_are_found_by_node_pooling_or_alias(filled, rows):
    space = filled.spaces()[0]
    rows.write(filled, space, NAMES, columns=("a:gem", "layer4.2:avg2x2"))
    assert filled.features("d", node="a").column == "a:gap"
    assert filled.features("d", node="a:gem").column == "a:gem"
    assert filled.features("d", node="bottleneck:gem").column == "a:gem"
    assert filled.features("d", node="layer4.2:avg2x2").column == "layer4.2:avg2x2"
    see = r"nearest: layer4.2:avg2x2\. See: featurepipe info .*--backbone tiny --node NODE$"
    with pytest.raises(UsageError, match=rf"unknown column 'layer4\.2' in tiny-.*{see}"):
        filled.features("d", node="layer4.2")
    with pytest.raises(UsageError, match=r"unknown column 'botleneck' in .*nearest: bottleneck"):
        filled.features("d", node="botleneck")
    space.update_notes({"aliases": {"bottleneck": "layer4.2:avg2x2"}})
    assert filled.features("d").column == "layer4.2:avg2x2"


def test_unknown_names_are_usage_errors(filled):
    with pytest.raises(UsageError, match=r"unknown dataset 'e' in .*choices: d\. See: featurepipe info"):
        filled.features("e")
    with pytest.raises(UsageError, match="unknown feature space 'vgg'"):
        filled.features("d", backbone="vgg")


def test_an_ambiguous_space_is_not_guessed(filled, rows):
    other = filled.open_space({"dtype": "float32"}, backbone="tiny")
    assert filled.features("d", backbone="tiny").dtype == np.float16  # only one holds this dataset
    rows.write(filled, other, NAMES)
    with pytest.raises(UsageError, match="fits 2 feature spaces"):
        filled.features("d", backbone="tiny")
    with pytest.raises(UsageError, match="there are 2 feature spaces"):
        filled.features("d")
    assert filled.features("d", "a", backbone=other.fingerprint[:12]).dtype == np.float32


def test_parts_of_both_dtypes_are_promoted(store, space, rows):
    rows.write(store, space, ["1"])
    with space.writer(store.new_run_id()) as writer:
        writer.add(rows.keys(["2"]), ["2"], [0], [0], {"a:gap": np.full((1, 4), 1e6, np.float32)})
    rows.snapshot(store, "d", ["2", "1"])
    features = store.features("d")
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features.read(), np.vstack([np.full((1, 4), 1e6), rows.features(["1"])]))


def test_a_part_that_went_away_says_what_to_do(filled):
    features = filled.features("d")
    for path in filled.spaces()[0].part_paths():
        path.unlink()
    with pytest.raises(StoreError, match=r"compacted meanwhile.*store\.features"):
        features.read()
    with pytest.raises(StoreError, match="compacted"):
        features.take(np.arange(0, 200, 3)).read()


def test_an_empty_dataset_has_no_rows(filled, rows):
    rows.snapshot(filled, "d", NAMES[:1], status=["rejected"])
    x, y = filled.features("d", backbone="tiny").numpy()
    assert x.shape == (0, 4)
    assert y is None


def test_more_parts_than_open_maps(store, space, rows, monkeypatch):
    monkeypatch.setattr("featurepipe.store.rows._OPEN_MAPS", 2)
    for name in NAMES[:9]:
        rows.write(store, space, [name])
    rows.snapshot(store, "d", NAMES[:9])
    features = store.features("d")
    backwards = np.arange(9)[::-1]
    np.testing.assert_array_equal(features.read(rows=backwards), rows.features(NAMES[:9])[::-1])
    assert len(features.rows.parts[0]._maps) <= 2
