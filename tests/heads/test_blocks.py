"""Blocks cover every row once, in order, in the dtype asked for, and hold no more memory than they may."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from featurepipe.display import bytes_of
from featurepipe.errors import UsageError
from featurepipe.heads import blocks
from featurepipe.heads.blocks import (
    ArrayBlocks,
    MappedBlocks,
    RowThreads,
    as_blocks,
    blas_threads,
    is_blocks,
    iterate,
    labels_of,
    one_blas_thread,
    rows_per_block,
    widened,
    working_dtype,
)


class Recorded(ArrayBlocks):
    """Notes who reads which rows."""

    def __init__(self, array):
        super().__init__(array)
        self.reads = []

    def read(self, dtype=None, *, rows=None):
        self.reads.append((rows.start, threading.current_thread().name))
        return super().read(dtype, rows=rows)


@pytest.mark.parametrize("rows", [1, 7, 50, 64])
@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_blocks_put_together_are_the_features(rows, stored):
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(stored)
    found = list(iterate(features, rows=rows))
    assert [place.start for place, _ in found] == list(range(0, 50, rows))
    assert all(block.dtype == working_dtype(stored) for _, block in found)
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), features)


def test_the_next_block_is_read_by_another_thread_while_one_is_in_use_and_no_further():
    source = Recorded(np.zeros((50, 4), np.float16))
    blocks = iterate(source, rows=10)
    next(blocks)
    next(blocks)
    blocks.close()
    assert [start for start, _ in source.reads] == [0, 10, 20]
    assert all(name.startswith("read-ahead") for _, name in source.reads)


def test_an_error_while_reading_ahead_reaches_the_caller():
    def fail(block):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(iterate(MappedBlocks(np.zeros((50, 4)), fail, 2), rows=10))


def test_memory_decides_the_rows_of_a_block():
    assert rows_per_block(100, np.float32, 3 * 100 * 4 * 20) == 20
    assert rows_per_block(100, np.float64, "48kB") == 20
    with pytest.raises(UsageError, match="memory '1kB' is too little for rows of 100 values; give at least 19200"):
        rows_per_block(100, np.float32, "1kB")


def test_an_array_of_the_right_dtype_is_not_copied():
    features = np.zeros((50, 4), np.float32)
    assert all(np.shares_memory(block, features) for _, block in iterate(features, rows=10))


def test_mapped_blocks_are_the_function_of_the_rows():
    features = np.arange(24, dtype=np.float16).reshape(8, 3)
    mapped = MappedBlocks(features, lambda block: block[:, :2] * 2, 2)
    assert mapped.shape == (8, 2)
    assert mapped.dtype == np.float32
    np.testing.assert_array_equal(mapped.read(rows=slice(2, 4)), [[12, 14], [18, 20]])
    assert mapped.read(np.float64).dtype == np.float64


def test_what_reads_rows_is_taken_as_it_is_and_arrays_are_wrapped():
    source = ArrayBlocks(np.zeros((3, 2)))
    assert as_blocks(source) is source
    assert is_blocks(source)
    assert not is_blocks(np.zeros((3, 2)))
    assert not is_blocks([[1, 2]])
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        as_blocks(np.zeros(3))


class Labelled(ArrayBlocks):
    labels = np.array(["b", "a", None], object)


def test_labels_come_from_the_features_where_none_are_given():
    source = Labelled(np.zeros((3, 2)))
    assert labels_of(source, ["x", "y", "z"]).tolist() == ["x", "y", "z"]
    with pytest.raises(UsageError, match=r"1 of 3 rows have no label \(the first is row 2\); leave them out"):
        labels_of(source, None)
    with pytest.raises(UsageError, match="these features carry no labels"):
        labels_of(np.zeros((3, 2)), None)


@pytest.mark.parametrize("amount", ["", "MB", "-1GB", "12 parsecs", 0, "0MB", float("nan")])
def test_what_is_no_amount_of_memory_is_refused(amount):
    with pytest.raises(UsageError, match="no amount of memory"):
        bytes_of(amount)


def test_every_float16_there_is_becomes_the_same_float32():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)].reshape(-1, 2)
    np.testing.assert_array_equal(widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(widened(halves[::-1]), halves[::-1].astype(np.float32))  # with infinities and NaN
    assert widened(np.empty((0, 3), np.float16)).shape == (0, 3)


@pytest.fixture
def three_threads(monkeypatch):
    """Three threads, whatever machine or environment the tests have."""
    monkeypatch.setattr(blocks, "blas_threads", lambda: 3)


@pytest.mark.usefixtures("three_threads")
def test_threads_give_results_in_order_and_take_few_items_ahead():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    names = set()

    def work(number):
        names.add(threading.current_thread().name)
        return number**2

    with RowThreads(wanted=True) as threads:
        for done, (number, square) in enumerate(threads.map(work, items())):
            assert (number, square) == (done, done**2)
            assert len(taken) <= done + 3 + 2
        found = []
        threads.each(found.append, range(5))
    assert sorted(found) == list(range(5))
    assert all(name.startswith("rows") for name in names)
    with RowThreads(wanted=False) as threads:
        assert list(threads.map(work, range(3))) == [(0, 0), (1, 1), (2, 4)]
    assert threading.current_thread().name in names


@pytest.mark.usefixtures("three_threads")
def test_products_take_one_thread_while_any_rows_are_worked_on_and_what_they_had_after_that():
    with threadpool_limits(2, user_api="blas"):
        outer, inner = RowThreads(wanted=True), RowThreads(wanted=True)
        outer.__enter__()
        inner.__enter__()
        outer.__exit__()  # another thread of the process may end first
        assert _threads_of_products() == 1
        inner.__exit__()
        assert blas_threads() == 2

        def fail(number):
            raise ValueError(number)

        with pytest.raises(ValueError, match="0"), RowThreads(wanted=True) as threads:
            list(threads.map(fail, range(9)))
        assert blas_threads() == 2


def test_rows_have_all_threads_where_products_between_them_have_one():
    with threadpool_limits(2, user_api="blas"), one_blas_thread:
        assert _threads_of_products() == 1
        assert blas_threads() == 2
        with RowThreads(wanted=True) as threads:
            assert threads.count == 2
            assert _threads_of_products() == 1
            assert RowThreads(wanted=True).count == 1  # none is left
        with RowThreads(wanted=False, products=True):
            assert _threads_of_products() == 2
        with one_blas_thread.lifted():
            assert _threads_of_products() == 2
        assert _threads_of_products() == 1


def test_another_thread_has_no_more_than_products_have():
    with threadpool_limits(2, user_api="blas"), one_blas_thread, ThreadPoolExecutor(1) as other:
        assert other.submit(blas_threads).result() == 1
    with threadpool_limits(2, user_api="blas"):
        assert blas_threads() == 2


def _threads_of_products():
    numpys = [one for one in threadpool_info() if "numpy" in one["filepath"] and one["user_api"] == "blas"]
    return numpys[0]["num_threads"]
