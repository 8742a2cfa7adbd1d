"""Shards: every row in exactly one, as large as the rate allows, small enough to travel."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurepipe.extraction.shards import COLUMNS, Shard, ShardSizes, cut
from featurepipe.images.listing import SCHEMA
from featurepipe.images.regions import Box, region_locator


def listing(count):
    rows = [
        {"id": f"birds/{n % 7}/IMG_{n:08d}.jpg", "size": 40_000 + n % 999, "mtime_ns": 1_700_000_000_000_000_000 + n * 1013}
        for n in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist([{**row, "locator": row["id"].encode()} for row in rows], schema=SCHEMA)


def test_a_shard_travels_as_few_bytes_and_arrives_as_it_was():
    table = listing(20_000)
    piece = Shard.of(3, 60, table)
    assert piece.table().equals(table.select(COLUMNS))
    assert (piece.name, piece.rows, str(piece)) == ("s000003", 20_000, "shard 3 (20,000 images)")
    assert len(piece.listing) / piece.rows < 30  # a row of it is some 90 bytes


@pytest.mark.slow
@given(
    st.integers(1, 900), st.lists(st.integers(0, 9), min_size=1), st.floats(0.01, 1e4), st.integers(1, 400),
    st.integers(20, 700),
)  # fmt: skip
def test_every_row_is_in_one_shard_however_workers_come_and_go(count, workers, rate, first, most):
    table, sizes = listing(1).take(pa.array(np.zeros(count, np.int64))), ShardSizes(first=first, most=most)
    todo, places = np.arange(count), []
    for number, piece in enumerate(cut(table, todo, sizes, itertools.cycle(workers))):
        assert piece.number == number
        assert 1 <= piece.rows <= most
        places += range(piece.start, piece.start + piece.rows)
        sizes.note(piece.rows, piece.rows / rate)
    assert places == list(range(count))


def test_regions_of_one_image_stay_in_one_shard_as_far_as_one_decode_serves():
    locators = [
        region_locator(name, Box(i, 0, 5, 5)) for name, n in ((b"a", 9), (b"b", 200), (b"c", 3)) for i in range(n)
    ]
    table = listing(212).set_column(5, SCHEMA.field("locator"), pa.array(locators, pa.binary()))
    pieces = list(cut(table, np.arange(212), ShardSizes(first=8, most=8), itertools.repeat(1)))
    assert [piece.rows for piece in pieces] == [9, *[8] * 17, 64, 3]
    assert sum(piece.rows for piece in pieces[1:-1]) == 200


def test_shards_take_as_long_as_they_should():
    sizes = ShardSizes(first=100, longest=60, shortest=4, most=50_000, per_worker=3)
    assert sizes.next(1_000_000, 4) == 100  # nothing is known yet
    assert sizes.next(200, 4) == 50
    assert sizes.next(60, 4) == 32
    assert sizes.next(20, 4) == 20
    sizes.note(100, 1.0)
    assert sizes.next(1_000_000, 4) == 6000  # a minute
    assert sizes.next(12_000, 4) == 1000  # a third of an even share
    assert sizes.next(2_400, 4) == 400  # four seconds
    assert sizes.next(800, 4) == 200  # an even share, since nobody should wait for the others
    assert sizes.next(200, 4) == 100  # a second
    sizes.note(10_000, 1.0)
    assert sizes.next(10**9, 4) == 50_000


def test_the_last_shards_are_small_beside_the_run():
    sizes = ShardSizes()
    sizes.note(1000, 1.0)
    table = listing(1).take(pa.array(np.zeros(400_000, np.int64)))
    done = [piece.rows for piece in cut(table, np.arange(400_000), sizes, itertools.repeat(8))]
    assert done[0] == pytest.approx(400_000 / 24, rel=0.01)
    assert max(done[-8:]) <= 4000
    assert len(done) < 100  # that many would take four seconds each
