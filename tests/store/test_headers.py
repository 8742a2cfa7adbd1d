"""Reading the headers of parts once, and again when a file is another."""

import os
import pickle

import h5py
import numpy as np
import pytest

from featurepipe.store import describe, parts
from featurepipe.store.parts import read_part


@pytest.fixture
def read(monkeypatch):
    """Names of the parts whose headers were read, in order."""
    names = []

    def reading(path):
        names.append(path.name)
        return read_part(path)

    monkeypatch.setattr(parts, "read_part", reading)
    return names


def test_all_spaces_of_a_store_share_what_was_read(store, space, rows, read):
    rows.write(store, space, ["1", "2"])
    rows.write(store, space, ["3"])
    assert [part.rows for part in space.parts()] == [2, 1]
    (again,) = store.spaces()
    assert [part.rows for part in again.parts()] == [2, 1]
    assert describe(store)["spaces"][0]["rows"] == 3
    assert len(store.open_space(space.fields, backbone=space.backbone).index()) == 3
    assert read == [path.name for path in space.part_paths()]


def test_a_new_part_is_read_and_a_removed_one_forgotten(store, space, rows, read):
    rows.write(store, space, ["1"])
    (first,) = space.parts()
    rows.write(store, space, ["2", "3"])
    space.part_paths()[0].unlink()
    assert [part.rows for part in store.spaces()[0].parts()] == [2]
    assert len(read) == 2
    assert first.name not in {part.name for part in space.parts()}


def test_a_part_that_is_replaced_is_read_again(store, space, rows, read):
    rows.write(store, space, ["1"])
    rows.write(store, space, ["2", "3"])
    space.parts()
    first, second = space.part_paths()
    second.rename(first)
    assert [part.rows for part in space.parts()] == [2]
    assert read == [first.name, second.name, first.name]


def test_a_damaged_part_counts_again_once_it_is_repaired(store, space, rows, flip_bit):
    rows.write(store, space, ["1"])
    (path,) = space.part_paths()
    flip_bit(path, space.parts()[0].arrays["key"].offset)
    assert not space.index().contains(rows.keys(["1"]))[0]
    (other,) = store.spaces()
    assert (list(other.damaged), other.parts()) == ([path.name], [])  # what one found, all know
    flip_bit(path, read_part(path).arrays["key"].offset)
    os.utime(path, ns=(1, 1))  # clocks of file systems may be coarse
    assert other.index().contains(rows.keys(["1"]))[0]
    assert space.damaged == {}


def test_attributes_of_other_programs_are_passed_over(store, space, rows):
    rows.write(store, space, ["1"])
    (path,) = space.part_paths()
    with h5py.File(path, "r+") as file:
        file.attrs["weather"] = np.array([1.5, 2.5])
        file["key"].attrs["colour"] = "blue"
    assert [part.rows for part in space.parts()] == [1]
    assert space.damaged == {}


def test_a_store_is_pickled_without_what_it_has_read(store, space, rows):
    before = len(pickle.dumps(store))
    rows.write(store, space, ["1"])
    space.parts()
    assert len(pickle.dumps(store)) == before
    assert pickle.loads(pickle.dumps(store)).spaces()[0].parts() == space.parts()
