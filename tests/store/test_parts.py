"""The file format: anyone with HDF5 can read a part, and any damage is seen."""

import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from featurepipe.errors import CorruptPart, StoreError
from featurepipe.store.parts import damaged_arrays, numbers_of, read_array, read_part, text_of

NAMES = ["c/ä.png", "b", "a/longer name.jpg"]


def read_with_h5py_alone(path):
    """A reader as FORMAT.md allows anyone to write one."""
    with h5py.File(path, "r") as file:
        rows = int(file.attrs["rows"])
        datasets = {name: file[name] for name in ("key", "id", "size", "mtime_ns")}
        datasets |= {f"features/{name}": item for name, item in file["features"].items()}
        for dataset in datasets.values():
            raw = np.fromfile(path, np.uint8, dataset.size * dataset.dtype.itemsize, offset=dataset.id.get_offset())
            assert zlib.crc32(raw.tobytes()) == dataset.attrs["crc32"]
            assert dataset.chunks is None
            assert dataset.shape[0] == rows
        return {name: dataset[()] for name, dataset in datasets.items()}, dict(file.attrs)


def test_a_part_is_plain_hdf5(store, space, rows):
    run_id = rows.write(store, space, NAMES, columns=("a:gap", "b.0:gem"), dataset="photos")
    (path,) = space.part_paths()
    arrays, attributes = read_with_h5py_alone(path)
    assert sorted(arrays) == ["features/a:gap", "features/b.0:gem", "id", "key", "mtime_ns", "size"]
    np.testing.assert_array_equal(arrays["key"], rows.keys(NAMES))
    assert [item.decode() for item in arrays["id"]] == NAMES
    np.testing.assert_array_equal(arrays["size"], [10, 11, 12])
    np.testing.assert_array_equal(arrays["mtime_ns"], [1000, 1001, 1002])
    assert arrays["features/a:gap"].dtype == np.dtype("<f2")
    np.testing.assert_array_equal(arrays["features/b.0:gem"], rows.features(NAMES))
    assert attributes["fingerprint"].decode() == space.fingerprint
    assert (attributes["run_id"].decode(), attributes["dataset"].decode()) == (run_id, "photos")
    assert (attributes["format_version"], attributes["rows"]) == (1, 3)
    assert attributes["created"].decode().endswith("+00:00")


def test_ids_are_as_wide_as_the_longest(store, space, rows):
    rows.write(store, space, NAMES)
    with h5py.File(space.part_paths()[0], "r") as file:
        info = h5py.check_string_dtype(file["id"].dtype)
    assert (info.encoding, info.length) == ("utf-8", len("a/longer name.jpg"))


@pytest.mark.slow
def test_any_flipped_bit_is_found_or_harmless(store, space, rows, flip_bit):
    """Every byte of the file: either something is reported, or everything still reads as it was (padding)."""
    rows.write(store, space, NAMES)
    (path,) = space.part_paths()
    original = path.read_bytes()
    intact = read_part(path)
    contents = {name: read_array(intact, name).tobytes() for name in intact.arrays}
    data = {i for info in intact.arrays.values() for i in range(info.offset, info.offset + info.nbytes)}
    unnoticed = 0
    for offset in range(len(original)):
        flip_bit(path, offset)
        try:
            part = read_part(path)
            bad = damaged_arrays(part)
        except CorruptPart:
            pass
        else:
            if not bad:
                assert offset not in data
                assert {name: read_array(part, name).tobytes() for name in part.arrays} == contents
                assert (part.fingerprint, part.run_id, part.rows) == (intact.fingerprint, intact.run_id, intact.rows)
                unnoticed += 1
        flip_bit(path, offset)
    assert path.read_bytes() == original
    assert unnoticed < len(original) / 3


@pytest.mark.parametrize("name", ["key", "id", "size", "mtime_ns", "features/a:gap"])
def test_a_flipped_bit_is_named(store, space, rows, flip_bit, name):
    rows.write(store, space, NAMES)
    part = space.parts()[0]
    info = part.arrays[name]
    flip_bit(Path(part.path), info.offset + info.nbytes - 1)
    assert damaged_arrays(part) == [name]
    with pytest.raises(CorruptPart, match=name):
        read_array(part, name)


@pytest.mark.parametrize("keep", [0, 7, 100, 600, -1])
def test_a_truncated_part_is_corrupt(store, space, rows, keep):
    rows.write(store, space, NAMES)
    (path,) = space.part_paths()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptPart, match=path.name):
        read_part(path)


def test_a_newer_part_is_refused_with_both_versions(store, space, rows):
    rows.write(store, space, NAMES)
    (path,) = space.part_paths()
    with h5py.File(path, "r+") as file:
        file.attrs.modify("format_version", np.int64(7))
    with pytest.raises(StoreError, match=r"version 7.*up to 1"):
        space.parts()


def test_hdf5_of_another_kind_is_corrupt(space, tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["x"] = [1, 2]
    with pytest.raises(CorruptPart, match=r"other\.h5"):
        read_part(path)


def test_headers_are_plain_values(store, space, rows):
    import pickle

    rows.write(store, space, NAMES)
    part = space.parts()[0]
    assert pickle.loads(pickle.dumps(part)) == part
    assert part.columns["a:gap"].shape == (3, 4)


def test_texts_and_numbers_reach_arrow_as_they_are():
    values = np.array(["train/é.jpg", "", "a" * 40, "日本"]).astype(object)
    stored = np.array([text.encode() for text in values])
    assert text_of(stored).to_pylist() == values.tolist()
    assert text_of(stored[::2]).to_pylist() == values[::2].tolist()
    assert text_of(stored[:0]).to_pylist() == []
    with pytest.raises(pa.ArrowInvalid, match=r"UTF-?8"):
        text_of(np.array([b"ok", b"\xff"]))
    numbers = np.arange(10, dtype=np.int64)
    assert numbers_of(numbers[::3]).to_pylist() == [0, 3, 6, 9]
    assert numbers_of(numbers.astype(np.float32)).type == pa.float32()
