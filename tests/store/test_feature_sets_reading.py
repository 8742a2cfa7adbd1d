"""Reading in pieces: bounded memory, windows of files, maps that are let go, Dask."""

import pickle
import subprocess
import sys
import tracemalloc

import cloudpickle
import dask
import numpy as np
import pytest

from featurepipe.errors import UsageError
from featurepipe.store.rows import copy_into

N, WIDTH = 3000, 24


@pytest.fixture(scope="module")
def values():
    x = np.random.default_rng(0).standard_normal((N, WIDTH)).astype(np.float16)
    x[:3] = [[0], [-0.0], [6e-8]]
    return x


@pytest.fixture
def features(store, space, rows, values):
    """Two columns in parts of 1,000 rows each, the snapshot in the order of the store."""
    names = [f"{'ab'[i % 2]}{i}" for i in range(N)]
    with space.writer(store.new_run_id(), part_bytes=1000 * WIDTH * 4) as writer:
        for start in range(0, N, 1000):
            part = slice(start, start + 1000)
            columns = {"a:gap": values[part].astype(np.float32), "b:gap": -values[part].astype(np.float32)}
            writer.add(rows.keys(names[part]), names[part], [0] * 1000, [0] * 1000, columns)
    rows.snapshot(store, "d", names)
    return store.features("d", node=["a", "b"])


@pytest.fixture
def expected(values):
    return np.hstack([values, -values])


def orders():
    rng = np.random.default_rng(1)
    return {
        "all": np.arange(N),
        "most": np.flatnonzero(rng.random(N) < 0.8),
        "few": np.flatnonzero(rng.random(N) < 0.02),
        "shuffled": rng.permutation(N),
        "often": rng.integers(0, N, N),
        "backwards": np.arange(N)[::-1],
        "runs and single rows": np.concatenate([np.arange(100, 400), [7, 2999, 1500], np.arange(900, 1300), [8]]),
    }


@pytest.mark.parametrize("order", orders())
@pytest.mark.parametrize("window", [400, 4000, 1 << 20])
def test_any_rows_in_any_order(features, expected, order, window, monkeypatch):
    monkeypatch.setattr("featurepipe.store.rows.BLOCK_BYTES", window)
    rows = orders()[order]
    for dtype in (np.float16, np.float32, np.float64):
        found = features.read(dtype, rows=rows)
        assert found.dtype == dtype
        assert found.tobytes() == expected[rows].astype(dtype).tobytes()


def test_reading_into_a_given_array_touches_nothing_else(features, values):
    column = features.rows.parts[0]
    for rows in (slice(None), np.arange(0, N, 7)):
        target = np.full((len(column.take(rows)), WIDTH + 5), 9, np.float32)
        assert column.take(rows).read(out=target[:, 2 : WIDTH + 2]).base is target
        np.testing.assert_array_equal(target[:, 2 : WIDTH + 2], values[rows])
        assert (target[:, :2] == 9).all()
        assert (target[:, WIDTH + 2 :] == 9).all()


def test_maps_are_let_go(features, expected, monkeypatch):
    monkeypatch.setattr("featurepipe.store.rows._MAPPED_BYTES", 100_000)
    monkeypatch.setattr("featurepipe.store.rows._DENSE", 1)
    rows = np.random.default_rng(0).permutation(N)[:900]
    maps = features.rows.parts[0]._maps
    np.testing.assert_array_equal(features.read(rows=rows), expected[rows])
    assert len(maps) <= 2
    monkeypatch.setattr("featurepipe.store.rows._MAPPED_BYTES", 100_000_000)
    features.read(rows=rows)
    assert len(maps) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_float16_is_widened_exactly(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    out = np.empty((every.shape[0], 70), dtype)[:, 3:67]
    copy_into(out, every)
    with np.errstate(invalid="ignore"):
        assert out.tobytes() == every.astype(dtype).tobytes()


@pytest.mark.parametrize("order", ["all", "most", "shuffled"])
def test_blocks_keep_within_their_memory(features, expected, order, monkeypatch):
    monkeypatch.setattr("featurepipe.store.rows.BLOCK_BYTES", 10_000)  # else the fixed buffers are all there is
    monkeypatch.setattr("featurepipe.store.rows._BLOCK", 1000)
    rows = orders()[order]
    view = features.take(rows)
    next(view.blocks(rows=2))  # the table for float16
    memory, peaks = 300_000, []
    for _ in range(
        5
    ):  # other threads of this process, such as those of a cluster that tests share, may allocate meanwhile
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            parts = []
            for block, _ in view.blocks(memory=memory):
                parts.append((len(block), float(block.sum())))
                del block
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
    assert min(peaks) < memory + 60_000
    assert len(parts) > 3
    assert sum(count for count, _ in parts) == len(rows)
    np.testing.assert_allclose(sum(total for _, total in parts), expected[rows].astype(np.float64).sum(), atol=1e-2)


def test_blocks_by_rows_and_memory(features):
    def sizes(*args, **options):
        return [len(x) for x, _ in features.blocks(*args, **options)]

    assert sizes() == [N]
    assert sizes(1000) == [1000] * 3
    assert sizes(rows=1100, memory="1GB") == [1100, 1100, 800]
    row_bytes = features.rows.row_bytes(np.float32)
    assert row_bytes >= 48 * 4 + 24 * 2
    assert sizes(memory=row_bytes * 1000) == [1000] * 3
    assert sizes(memory=f"{row_bytes}kB", rows=1500) == [1000] * 3
    with pytest.raises(UsageError, match=f"too little for one row; give at least {row_bytes} bytes"):
        features.blocks(memory=10)
    with pytest.raises(UsageError, match="rows=0: a block needs at least one row"):
        features.blocks(rows=0)
    with pytest.raises(UsageError, match="no amount of memory"):
        features.blocks(memory="much")


# Dask


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_dask_equals_numpy(features, expected, scheduler):
    view = features.take(orders()["often"])
    x, y = view.dask(rows=700)
    assert x.chunks == ((700, 700, 700, 700, 200), (48,))
    assert y.chunks == (x.chunks[0],)
    assert (x.dtype, y.dtype) == (np.float32, object)
    computed_x, computed_y = dask.compute(x, y, scheduler=scheduler)
    np.testing.assert_array_equal(computed_x, expected[orders()["often"]])
    assert computed_y.tolist() == view.labels.tolist()
    means = x[y == "a"].mean(axis=0).compute(scheduler=scheduler)
    np.testing.assert_allclose(means, expected[orders()["often"]][view.labels == "a"].mean(0, dtype=float), atol=1e-5)


def test_dask_in_another_process(features, expected, tmp_path):
    x, y = features.dask(rows=1000)
    (tmp_path / "graph").write_bytes(cloudpickle.dumps((x, y)))
    code = """
import pickle, sys, dask, numpy as np
x, y = dask.compute(*pickle.load(open(sys.argv[1], "rb")), scheduler="threads")
np.savez(sys.argv[2], x=x, y=y.astype(str))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "graph"), str(tmp_path / "out.npz")], check=True)
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(found["x"], expected)
    assert found["y"].tolist() == features.labels.tolist()


def test_a_task_carries_its_own_rows_only(features):
    shuffled = features.take(orders()["shuffled"])
    for view, limit in ((features, 1500), (shuffled, 100 * 16 + 2000)):
        x, y = view.dask(rows=100)
        sizes = [len(cloudpickle.dumps(task)) for task in dict(x.__dask_graph__()).values()]
        assert len(sizes) == 30
        assert max(sizes) < limit
        assert max(len(pickle.dumps(task)) for task in dict(y.__dask_graph__()).values()) < 100 * 20 + 1500


def test_dask_names_what_is_the_same_alike(features):
    assert features.dask()[0].name == features.dask()[0].name
    assert features.dask()[1].name == features.dask()[1].name
    for other in (features.dask(rows=10), features.dask(dtype=np.float64), features[:-1].dask(), features[::-1].dask()):
        assert other[0].name != features.dask()[0].name
    assert features.with_labels({"a0": "x"}).dask()[1].name != features.dask()[1].name


def test_dask_of_no_rows_and_no_labels(features):
    x, y = features.take([]).dask()
    assert (x.shape, x.compute().shape, y) == ((0, 48), (0, 48), None)
    assert features.with_labels({"a0": None}).dask()[1] is None
    with pytest.raises(UsageError, match="rows=-1"):
        features.dask(rows=-1)
