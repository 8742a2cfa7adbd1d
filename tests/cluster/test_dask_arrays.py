"""``FeatureSet.dask()`` on a cluster: tasks that open what they read, arrays that behave, and errors that are ours."""

import hashlib
import pickle

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pyarrow as pa
import pytest
from dask.highlevelgraph import HighLevelGraph
from distributed import wait

from featurepipe.errors import StoreError
from featurepipe.store import FeatureStore
from featurepipe.store.compact import compact_store
from featurepipe.store.snapshots import SCHEMA

N, WIDTH = 4000, 20
CLASSES = ("cat", "dog", "emu")


def fill(path, parts=4):
    """Writes two columns of N rows in some parts; returns the values of both side by side."""
    store = FeatureStore(path)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(N, WIDTH))
    values[np.arange(N), np.arange(N) % 3] += 3
    values = values.astype(np.float16).astype(np.float32)
    keys = np.stack([np.frombuffer(hashlib.sha256(str(row).encode()).digest(), np.uint8) for row in range(N)])
    ids = [f"{row:04d}.png" for row in range(N)]
    space = store.open_space({"dtype": "float16", "net": "made-up"}, backbone="made-up")
    run_id = store.new_run_id()
    for rows in np.array_split(np.arange(N), parts):
        with space.writer(run_id, dataset="zoo") as writer:
            columns = {"a:gap": values[rows, :12], "b:gap": values[rows, 12:]}
            writer.add(keys[rows], [ids[row] for row in rows], rows, rows, columns)
    labels = [None if row % 10 == 9 else CLASSES[row % 3] for row in range(N)]
    table = {
        "id": ids, "key": [key.tobytes() for key in keys], "label": labels, "split": [None] * N, "size": [1] * N,
        "mtime_ns": [1] * N, "status": ["ok"] * N, "reason": [None] * N,
    }  # fmt: skip
    store.write_snapshot("zoo", run_id, pa.table(table, schema=SCHEMA))
    return values


@pytest.fixture(scope="session")
def values(tmp_path_factory):
    return fill(tmp_path_factory.getbasetemp() / "zoo")


@pytest.fixture(scope="session")
def features(values, tmp_path_factory):
    return FeatureStore(tmp_path_factory.getbasetemp() / "zoo").features("zoo", node=["a:gap", "b:gap"])


def orders():
    rng = np.random.default_rng(1)
    return {"all": np.arange(N), "shuffled": rng.permutation(N), "some, some twice": rng.integers(0, N, 2500)}


@pytest.mark.parametrize("order", orders())
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_and_labels_are_those_of_numpy(features, order, dtype):
    view = features.take(orders()[order])
    x, y = view.dask(rows=700, dtype=dtype)
    expected, labels = view.numpy(dtype)
    assert x.chunks == (tuple(np.diff([*range(0, len(view), 700), len(view)]).tolist()), (WIDTH,))
    assert y.chunks == (x.chunks[0],)
    found_x, found_y = dask.compute(*pickle.loads(cloudpickle.dumps([x, y])), scheduler="sync")  # as they travel
    assert found_x.dtype == dtype
    np.testing.assert_array_equal(found_x, expected)
    assert found_y.tolist() == labels.tolist()


def test_array_operations_work_on_known_chunks(features, values):
    x, y = features.dask(rows=900, dtype=np.float64)
    mean, gram, some = dask.compute(x.mean(axis=0), x.T @ x, x[y == "dog"].sum(axis=0), scheduler="threads")
    np.testing.assert_allclose(mean, values.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(gram, values.astype(np.float64).T @ values, rtol=1e-10)
    dogs = [row for row in range(N) if row % 10 != 9 and row % 3 == 1]
    np.testing.assert_allclose(some, values[dogs].sum(axis=0, dtype=np.float64), rtol=1e-10)
    assert (x - x.mean(axis=0)).rechunk((500, WIDTH)).chunks == ((500,) * 8, (WIDTH,))


def test_chunks_stay_where_they_were_read(features, values, dask_executor):
    """Persisted, each chunk is with one worker, and both have some."""
    x, _ = features.dask(rows=500)
    kept = dask_executor.client.persist(x)
    wait(kept)
    holders = dask_executor.client.who_has(kept)
    assert {len(where) for where in holders.values()} == {1}
    assert {address for where in holders.values() for address in where} == set(dask_executor.addresses())
    np.testing.assert_allclose(
        kept.sum().compute(scheduler=dask_executor.client), values.sum(dtype=np.float64), rtol=1e-4
    )


@pytest.mark.parametrize(("order", "a_row"), [("all", 0), ("shuffled", 16)])
def test_little_travels(features, order, a_row):
    """Rows in the order of the store are sent as runs; scattered ones take 8 bytes in each column."""
    view = features.take(orders()[order])
    x, _ = view.dask(rows=1000)
    graph = HighLevelGraph.merge(x.__dask_graph__())
    sizes = [len(cloudpickle.dumps(task)) for task in dict(graph).values()]
    assert len(sizes) == 4
    assert max(sizes) < 3000 + 1000 * a_row
    assert len(pickle.dumps(view.rows)) < 6000 + N * a_row


def test_xgboost_trains_on_the_chunks(features, dask_executor):
    import xgboost
    import xgboost.dask

    labelled = features.select(labelled=True)
    x, _ = labelled.dask(rows=600)
    y = da.from_array(labelled.codes(), chunks=(x.chunks[0],))
    params = {"objective": "multi:softprob", "num_class": 3, "max_depth": 3, "nthread": 1}
    data = xgboost.dask.DaskQuantileDMatrix(dask_executor.client, x, y)
    booster = xgboost.dask.train(dask_executor.client, params, data, num_boost_round=10)["booster"]
    features_here, _ = labelled.numpy()
    found = booster.predict(xgboost.DMatrix(features_here))
    alone = xgboost.train(params, xgboost.QuantileDMatrix(features_here, labelled.codes()), num_boost_round=10)
    expected = alone.predict(xgboost.DMatrix(features_here))
    assert (found.argmax(axis=1) == labelled.codes()).mean() > 0.97
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.98  # sketches of quantiles differ a little


def test_a_store_that_was_compacted_or_moved_is_an_error_of_ours(tmp_path):
    fill(tmp_path / "store")
    store = FeatureStore(tmp_path / "store")
    x, _ = store.features("zoo", node="a:gap").dask(rows=900)
    compact_store(store)
    with pytest.raises(StoreError, match=r"is gone .*if the store was compacted meanwhile, open the features again"):
        x.sum().compute(scheduler="threads")
    x, _ = store.features("zoo", node="a:gap").dask(rows=900)
    assert np.isfinite(x.sum().compute(scheduler="threads"))
    store.path.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is gone"):
        x.sum().compute(scheduler="threads")


def test_a_relative_path_is_found_from_anywhere(values, dask_executor, tmp_path_factory, monkeypatch):
    """Workers stand in another folder."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    x, _ = FeatureStore("zoo").features("zoo", node=["a:gap", "b:gap"]).dask(rows=1000)
    monkeypatch.undo()
    np.testing.assert_array_equal(x.compute(scheduler=dask_executor.client), values)
