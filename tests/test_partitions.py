"""Whatever is worked on in partitions comes out as it does in memory: with partitions of a few rows, against Arrow and NumPy."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from featurepipe import partitions as under_test
from featurepipe.errors import DiskFull
from featurepipe.partitions import (
    are_equal,
    bucketed,
    codes_of,
    copied,
    distinct,
    filtered,
    flatnonzero,
    gathered,
    index_in,
    is_large,
    partitions,
    repeated,
    spilling,
    stored,
    take,
    zeros,
)


@pytest.fixture(params=[3, 8, 1000])
def spilled(request, tmp_path):
    with spilling(tmp_path, request.param):
        yield request.param
    assert not list(tmp_path.iterdir())  # no file has a name, at no time


def texts(rng: np.random.Generator, count: int, most: int = 40) -> list[str]:
    words = ["", "a", "aé", "a/b", "\x01", "long" * 50]
    return [f"{words[rng.integers(len(words))]}{rng.integers(most)}" for _ in range(count)]


def chunked(rng: np.random.Generator, values: list[str]) -> pa.ChunkedArray:
    """In chunks of any length, some of them slices of longer arrays, or empty."""
    cuts = sorted(rng.integers(0, len(values) + 1, 3).tolist())
    bounds = [0, *cuts, len(values)]
    pieces = [values[a:b] for a, b in pairwise(bounds)]
    return pa.chunked_array([pa.array(["before", *piece], pa.string())[1:] for piece in pieces], pa.string())


@pytest.mark.parametrize("seed", range(30))
def test_rows_of_ids_are_those_that_arrow_finds(seed, spilled):
    rng = np.random.default_rng(seed)
    ids, listed = (chunked(rng, texts(rng, int(rng.integers(0, 60)))) for _ in range(2))
    if seed % 5 == 0:
        listed = ids
    expected = np.arange(len(ids)) if ids.equals(listed) else pc.fill_null(pc.index_in(ids, value_set=listed), -1)
    np.testing.assert_array_equal(index_in(ids, listed), np.asarray(expected))


@pytest.mark.parametrize("moved", [0, 1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_ids_in_the_order_of_the_list_are_found_without_codes(seed, moved, monkeypatch, tmp_path):
    rng = np.random.default_rng(seed)
    every = [f"{number:04d}" for number in range(400)]
    here, there = (sorted(rng.choice(every, count, replace=False)) for count in (380, 390))
    for _ in range(moved):
        here.insert(int(rng.integers(len(here))), here.pop(int(rng.integers(len(here)))))
    ids, listed = chunked(rng, here), chunked(rng, there)
    monkeypatch.setattr(under_test, "codes_of", None)  # would be called
    with spilling(tmp_path, 100):
        np.testing.assert_array_equal(
            index_in(ids, listed), pc.fill_null(pc.index_in(ids, value_set=listed), -1).to_numpy()
        )
        assert index_in(ids, listed.slice(0, 0)).tolist() == [-1] * 380


def test_values_of_a_column_come_once_in_their_order(spilled):
    column = chunked(np.random.default_rng(0), [*"bacabd", "x", *"zyx"])
    assert distinct(column).to_pylist() == pc.unique(column).to_pylist() == [*"bacdxzy"]
    assert are_equal(column, pa.chunked_array([column.combine_chunks()]))
    assert not are_equal(column, column.slice(1))
    assert not are_equal(column, chunked(np.random.default_rng(0), [*"bacabd", "x", *"zyy"]))


@pytest.mark.parametrize("codes", ["length", "nothing"])
@pytest.mark.parametrize("seed", range(5))
def test_ids_whose_codes_are_equal_are_told_apart(seed, codes, spilled, monkeypatch):
    alike = {"length": lambda ids: pc.binary_length(ids).to_numpy().astype(np.uint64) << np.uint64(57),
             "nothing": lambda ids: np.zeros(len(ids), np.uint64)}[codes]  # fmt: skip
    monkeypatch.setattr(under_test, "codes_of", alike)
    rng = np.random.default_rng(seed)
    ids, listed = (chunked(rng, texts(rng, 50)) for _ in range(2))
    np.testing.assert_array_equal(
        index_in(ids, listed), pc.fill_null(pc.index_in(ids, value_set=listed), -1).to_numpy()
    )
    assert repeated_values(repeated(ids)) == repeated_values(ids)


def repeated_values(ids: pa.ChunkedArray) -> list[str]:
    counts = pc.value_counts(ids)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()


@pytest.mark.parametrize("seed", range(10))
def test_repeated_ids_come_in_their_order(seed, spilled):
    rng = np.random.default_rng(seed)
    ids = chunked(rng, texts(rng, 60, most=20))
    assert repeated_values(repeated(ids)) == repeated_values(ids) != []


def test_ids_that_are_all_different_leave_no_doubt(tmp_path):
    with spilling(tmp_path, 100):
        assert len(repeated(pa.chunked_array([[f"{n}" for n in range(10_000)]]))) == 0


def test_codes_depend_on_every_byte_and_on_its_place():
    ids = pa.array(["", "a", "aa", "ab", "ba", "b", "\x00a", "a" * 5000, "a" * 5001, "a" * 4999 + "b", "é"])
    codes = codes_of(ids)
    assert len(set(codes.tolist())) == len(ids)
    np.testing.assert_array_equal(codes_of(ids[3:]), codes[3:])
    np.testing.assert_array_equal(codes_of(pa.array(["ab"] * 40_000)), np.full(40_000, codes[3]))


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_many_chunks_are_taken_as_from_one(seed, spilled):
    rng = np.random.default_rng(seed)
    column = chunked(rng, texts(rng, 50))
    table = pa.table({"id": column, "n": np.arange(50)}).replace_schema_metadata({"a": "b"})
    for rows in (
        rng.integers(0, 50, 30),
        np.sort(rng.integers(0, 50, 30)),
        np.arange(7, 31),
        np.empty(0, np.int64),
        np.array([49]),
    ):
        assert take(column, rows).to_pylist() == column.combine_chunks().take(pa.array(rows)).to_pylist()
        found = take(table, rows)
        assert found.equals(table.combine_chunks().take(pa.array(rows)))
        assert found.schema.metadata == {b"a": b"b"}


@pytest.mark.parametrize("seed", range(5))
def test_tables_in_files_are_those_that_went_there(seed, spilled):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 60))
    table = pa.table({"id": chunked(rng, texts(rng, count)), "n": rng.integers(0, 9, count)}).combine_chunks()
    batches = table.to_batches(max_chunksize=int(rng.integers(1, 9)))
    found = stored(iter(batches), table.schema)
    found.validate(full=True)
    assert found.equals(table)
    if is_large(count):
        assert [len(chunk) for chunk in found["id"].chunks] == [part.stop - part.start for part in partitions(count)]
    told = found.replace_schema_metadata({"a": "b"})
    for same in (
        gathered(told),
        gathered(pa.Table.from_batches(batches, table.schema).replace_schema_metadata({"a": "b"})),
    ):
        assert same.equals(table)
        assert same.schema.metadata == {b"a": b"b"}
    for mask in (lambda piece: pc.greater(piece["n"], 4), table["n"].to_numpy() > 4):
        kept = filtered(told, mask)
        assert kept.equals(table.filter(pc.greater(table["n"], 4)))
        assert kept.schema.metadata == {b"a": b"b"}


def test_arrays_in_files_can_be_written_to(spilled):
    made = zeros((20, 2), np.int32)
    assert made.dtype == np.int32
    assert not made.any()
    made[5] = 7
    other = copied(made)
    other[6] = 8
    assert made.sum() == 14
    assert other.sum() == 30
    np.testing.assert_array_equal(flatnonzero(other[:, 0]), [5, 6])
    assert [made[part].sum() for part in partitions(20)] == [
        made[start : start + spilled].sum() for start in range(0, 20, spilled)
    ]


def test_equal_codes_are_in_one_bucket_in_their_order(spilled):
    codes = np.random.default_rng(0).integers(0, 2**64, 20, np.uint64).repeat(3)
    np.random.default_rng(1).shuffle(codes)
    pieces = ((np.arange(at, at + 10), codes[at : at + 10]) for at in range(0, 60, 10))
    found = [(rows.copy(), some.copy()) for rows, some in bucketed(pieces, 100, 4)]
    assert len(found) == 4
    for number, (rows, some) in enumerate(found):
        np.testing.assert_array_equal(some, codes[rows])
        assert (np.diff(rows) > 0).all()
        assert set((some >> np.uint64(62)).tolist()) <= {number}
    assert sorted(np.concatenate([rows for rows, _ in found]).tolist()) == list(range(60))


def test_outside_of_the_block_everything_is_in_memory(tmp_path):
    with spilling(tmp_path, 3):
        assert is_large(4)
    assert not is_large(1 << 40)
    assert list(partitions(10)) == [slice(0, 10)]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with spilling(tmp_path, 3), pytest.raises(DiskFull, match=r"no space is left in .* run the same command again"):
        zeros((10,), np.int64)


def test_a_file_system_that_reserves_nothing_is_written_to(tmp_path, monkeypatch):
    def without(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", without)
    with spilling(tmp_path, 3):
        made = zeros((300_000,), np.int64)
        made[-1] = 1
        assert made.sum() == 1


def test_a_folder_that_cannot_be_written_to_is_not_used(tmp_path):
    with spilling(tmp_path / "missing", 3):
        made = zeros((10,), np.int64)
        made[:] = 1
        assert made.sum() == 10


@pytest.mark.parametrize("fault", [errno.ENODEV, errno.EINVAL, errno.EACCES])
def test_a_folder_whose_files_cannot_be_mapped_is_not_used(fault, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    really, made_in = tempfile.TemporaryFile, []

    def made(dir):  # noqa: A002
        made_in.append(dir)
        return really(dir=dir)

    def mapped(number: int, *args: int, **options: int) -> mmap.mmap:
        if made_in[-1] == tmp_path:
            raise OSError(fault, os.strerror(fault))
        return really_mapped(number, *args, **options)

    really_mapped = mmap.mmap
    monkeypatch.setattr(tempfile, "TemporaryFile", made)
    monkeypatch.setattr(under_test.mmap, "mmap", mapped)
    with spilling(tmp_path, 3):
        assert zeros((10,), np.int64).sum() == 0
        assert stored(pa.table({"n": [1] * 10}).to_batches(), pa.schema({"n": pa.int64()}))["n"].to_pylist() == [1] * 10
    assert made_in == [tmp_path, elsewhere, elsewhere]


def test_threads_started_in_the_block_find_the_same_in_memory(tmp_path):
    ids, listed = pa.chunked_array([["b", "a", "c"]]), pa.chunked_array([["a", "x"], ["b"]])
    with spilling(tmp_path, 2), ThreadPoolExecutor(1) as pool:
        assert pool.submit(index_in, ids, listed).result().tolist() == index_in(ids, listed).tolist() == [2, 0, -1]


def test_a_block_within_another_changes_nothing(tmp_path):
    with spilling(tmp_path, 5):
        with spilling(tmp_path, 100):
            assert is_large(6)
        assert is_large(6)
