"""Finding keys."""

import numpy as np
import pytest

from featurepipe.errors import UsageError
from featurepipe.store import keys as keys_module
from featurepipe.store.compact import rewritten_bytes


def add_keys(store, space, keys, columns=("a:gap",)):
    values = {column: np.arange(len(keys), dtype=np.float32)[:, None] for column in columns}
    with space.writer(store.new_run_id()) as writer:
        writer.add(keys, [str(i) for i in range(len(keys))], np.zeros(len(keys)), np.zeros(len(keys)), values)


def test_keys_that_shard_prefixes_are_told_apart(store, space):
    keys = np.zeros((64, 32), np.uint8)
    keys[:, 31] = np.random.default_rng(0).permutation(64)
    add_keys(store, space, keys[:40])
    index = space.index(["a:gap"])
    np.testing.assert_array_equal(index.contains(keys), np.arange(64) < 40)
    part, row, found = index.locate(keys)
    np.testing.assert_array_equal(row, np.where(np.arange(64) < 40, np.arange(64), -1))
    np.testing.assert_array_equal(part, np.where(found, 0, -1))


def test_all_columns_are_needed_but_may_lie_in_different_parts(store, space, rows):
    rows.write(store, space, ["1", "2", "3"], columns=("a:gap",))
    rows.write(store, space, ["2", "4"], columns=("b:gap",))
    rows.write(store, space, ["3"], columns=("a:gap", "b:gap"))
    keys = rows.keys(["1", "2", "3", "4", "5"])
    index = space.index(["a:gap", "b:gap"])
    assert index.contains(keys).tolist() == [False, True, True, False, False]
    assert space.index(["a:gap"]).contains(keys).tolist() == [True, True, True, False, False]
    assert space.index().contains(keys).tolist() == [True, True, True, True, False]
    assert index.locate(keys, "a:gap")[0].tolist() == [0, 0, 0, -1, -1]  # the first of two parts of other columns
    assert index.locate(keys, "b:gap")[0].tolist() == [-1, 1, 2, 1, -1]
    assert index.locate(keys)[0].tolist() == [-1, -1, 2, -1, -1]
    with pytest.raises(UsageError, match="'c:gap'"):
        index.locate(keys, "c:gap")


def test_the_first_committed_copy_is_found_however_segments_were_merged(store, space, rows):
    names = [f"n{i}" for i in range(50)]
    for start in range(0, 50, 5):
        rows.write(store, space, names[start : start + 10])
    part, row, found = space.index(["a:gap"]).locate(rows.keys(names))
    expected = np.maximum(np.arange(50) // 5 - 1, 0)
    assert found.all()
    np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(row, np.arange(50) - 5 * expected)


def test_many_keys_in_many_parts_take_44_bytes_each(store, space):
    keys = np.random.default_rng(0).integers(0, 256, (4000, 32), np.uint8)
    for start in range(0, 4000, 500):
        add_keys(store, space, keys[start : start + 500])
    index = space.index(["a:gap"])
    assert (len(index), index.nbytes) == (4000, 44 * 4000)
    shuffled = np.random.default_rng(1).permutation(4000)
    part, row, found = index.locate(keys[shuffled])
    assert found.all()
    np.testing.assert_array_equal(500 * part + row, shuffled)
    absent = keys.copy()
    absent[:, 31] ^= 1  # only the last byte differs
    assert not index.contains(absent).any()


def test_keys_are_looked_up_in_blocks(monkeypatch):
    monkeypatch.setattr(keys_module, "_BLOCK", 7)
    keys = np.random.default_rng(0).integers(0, 2, (300, 32), np.uint8)
    keys[:, :10] = 0  # prefixes are all the same
    first = {bytes(key): row for row, key in reversed(list(enumerate(keys[:200])))}
    found = keys_module.SortedKeys(keys[:200]).find(keys)
    assert found.tolist() == [first.get(bytes(key), -1) for key in keys]


@pytest.mark.parametrize("copies", [0, 3])
def test_keys_in_the_order_of_those_held_are_found_as_any_others_are(monkeypatch, copies):
    monkeypatch.setattr(keys_module, "_BLOCK", 16)
    rng = np.random.default_rng(2)
    held = rng.integers(0, 256, (200, 32), np.uint8)
    if copies:
        held[[50, 90, 199]] = held[[49, 10, 198]]  # the first of them counts
    first = {bytes(key): row for row, key in reversed(list(enumerate(held)))}
    strange = rng.integers(0, 256, (5, 32), np.uint8)
    wanted = np.concatenate([held[40:80], strange, held[81:200], held[:3], held[rng.permutation(200)]])
    found = keys_module.SortedKeys(held).find(wanted)
    assert found.tolist() == [first.get(bytes(key), -1) for key in wanted]


@pytest.mark.parametrize("run", [1, 4, 256])
@pytest.mark.parametrize("seed", range(20))
def test_runs_that_are_broken_off_are_found_again(monkeypatch, seed, run):
    monkeypatch.setattr(keys_module, "_RUN", run)
    monkeypatch.setattr(keys_module, "_BLOCK", 90)
    rng = np.random.default_rng(seed)
    held = rng.integers(0, 256, (300, 32)).astype(np.uint8)
    wanted = held
    for change in rng.integers(0, 3, 5):
        low, high = np.sort(rng.integers(0, len(wanted) + 1, 2))
        if change == 0:
            wanted = np.delete(wanted, slice(low, low + 30), axis=0)
        elif change == 1:
            wanted = np.insert(wanted, low, rng.integers(0, 256, (3, 32)), axis=0)
        else:
            wanted = np.concatenate([wanted[high:], wanted[low:high], wanted[:low]])
    rows = {key.tobytes(): row for row, key in enumerate(held)}
    expected = [rows.get(key.tobytes(), -1) for key in wanted]
    assert keys_module.SortedKeys(held).find(wanted).tolist() == expected


def test_takes_keys_as_bytes_too(store, space, rows):
    rows.write(store, space, ["1"])
    assert space.index().contains([bytes(key) for key in rows.keys(["1", "2"])]).tolist() == [True, False]
    assert space.index().contains([]).tolist() == []
    with pytest.raises(UsageError, match="32 bytes"):
        space.index().contains([b"short"])


def test_a_damaged_part_counts_as_absent_and_is_named(store, space, rows, flip_bit):
    rows.write(store, space, ["1"])
    rows.write(store, space, ["2"])
    rows.write(store, space, ["3"])
    first, second, _ = space.part_paths()
    flip_bit(first, 20)  # header
    flip_bit(second, space.parts()[0].arrays["key"].offset)
    fresh = store.spaces()[0]
    assert fresh.index(["a:gap"]).contains(rows.keys(["1", "2", "3"])).tolist() == [False, False, True]
    assert fresh.index(["a:gap"]).locate(rows.keys(["3"]))[1].tolist() == [0]
    assert sorted(fresh.damaged) == [first.name, second.name]
    assert "header" in fresh.damaged[first.name]
    assert "key" in fresh.damaged[second.name]


def test_a_part_of_another_space_counts_as_damaged(store, space, rows):
    other = store.open_space({"dtype": "float16", "net": "other"}, backbone="other")
    rows.write(store, other, ["1"])
    (path,) = other.part_paths()
    path.rename(space.path / "parts" / path.name)
    assert not space.index().contains(rows.keys(["1"])).any()
    assert "another feature space" in space.damaged[path.name]


def test_files_of_a_damaged_part_are_not_known_and_the_part_is_named(store, space, rows, flip_bit):
    rows.write(store, space, ["1", "2"])
    (first,), (path,) = space.parts(), space.part_paths()
    rows.write(store, space, ["3"])
    flip_bit(path, first.arrays["key"].offset)
    assert space.known_files()["id"].to_pylist() == ["3"]
    assert list(space.damaged) == [path.name]


def test_nothing_is_rewritten_of_parts_of_which_nothing_is_kept(store, space, rows):
    rows.write(store, space, ["1", "2"])
    part = space.parts()[0]
    assert rewritten_bytes([part], [np.zeros(2, np.bool_)]) == 0
    assert rewritten_bytes([part], [np.ones(2, np.bool_)]) == part.file_bytes
