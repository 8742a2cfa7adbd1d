"""Whatever the store and the snapshot: operations on a view equal the same ones on plain arrays."""

import pickle

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings

from featurepipe.store import FeatureStore
from featurepipe.store.snapshots import SCHEMA

COLUMNS = {"a:gap": 1, "b:gap": 3, "c:gmp": 2}
TEXTS = st.sampled_from([None, "x", "y", "ü z"])


def key_of(number):
    return number.to_bytes(8, "little") * 4


def values_of(numbers, column):
    """(n, D) float16: a different value for each image, column and position."""
    width = COLUMNS[column]
    start = 100 * list(COLUMNS).index(column)
    return (np.array(numbers, np.float32)[:, None] + start + np.arange(width) / 4).astype(np.float16).reshape(-1, width)


@st.composite
def datasets(draw):
    """Image numbers a row, labels, splits, states; and parts, each with some images and columns, all covered."""
    numbers = draw(st.lists(st.integers(0, 12), min_size=1, max_size=25))
    n = len(numbers)
    labels, splits = (draw(st.lists(TEXTS, min_size=n, max_size=n)) for _ in range(2))
    states = draw(st.lists(st.sampled_from(["ok", "ok", "rejected"]), min_size=n, max_size=n))
    some_columns = st.sets(st.sampled_from(list(COLUMNS)), min_size=1)
    parts = draw(st.lists(st.tuples(st.permutations(range(13)), st.integers(1, 13), some_columns), max_size=2))
    written = [(order[:count], sorted(columns)) for order, count, columns in parts]
    return numbers, labels, splits, states, [*written, (list(range(13)), list(COLUMNS))]


def stored(folder, dataset):
    numbers, labels, splits, states, parts = dataset
    n = len(numbers)
    store = FeatureStore(folder)
    space = store.open_space({"dtype": "float16"}, backbone="n")
    for order, columns in parts:
        with space.writer(store.new_run_id()) as writer:
            keys = np.array([list(key_of(number)) for number in order], np.uint8).reshape(-1, 32)
            values = {column: values_of(order, column) for column in columns}
            writer.add(keys, [str(number) for number in order], order, order, values)
    table = {
        "id": [f"i{row}" for row in range(n)],
        "key": list(map(key_of, numbers)),
        "label": labels,
        "split": splits,
        "size": [0] * n,
        "mtime_ns": [0] * n,
        "status": states,
        "reason": [None] * n,
    }
    store.write_snapshot("d", store.new_run_id(), pa.table(table, schema=SCHEMA))
    return store


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(datasets(), st.data())
def test_a_view_is_plain_arrays(tmp_path_factory, dataset, data):
    numbers, labels, splits, states, _ = dataset
    store = stored(tmp_path_factory.mktemp("store") / "s", dataset)
    columns = data.draw(st.lists(st.sampled_from(list(COLUMNS)), min_size=1, max_size=3, unique=True))
    kept = [row for row, state in enumerate(states) if state == "ok"]
    x = np.hstack([values_of([numbers[row] for row in kept], column) for column in columns])
    ids = np.array([f"i{row}" for row in kept], object)
    y, parted = (np.array([values[row] for row in kept], object) for values in (labels, splits))
    names = np.array([numbers[row] for row in kept], np.uint64)

    features = store.features("d", node=columns)
    joined = store.features("d", node=columns[0])
    for column in columns[1:]:
        joined = joined + store.features("d", node=column)
    new = data.draw(st.dictionaries(st.sampled_from([f"i{row}" for row in range(28)]), TEXTS, max_size=9))
    if set(new) & set(ids):
        features, y = features.with_labels(new), np.array([new.get(name) for name in ids], object)
        joined = joined.with_labels(new)
        assert features.unmatched == len(set(new) - set(ids))

    for _ in range(2):
        for view in (features, joined, pickle.loads(pickle.dumps(features))):
            same(view, columns, x, ids, y, parted, names)
        assert features.rejected == len(states) - len(kept)
        if len(ids):
            block_rows = data.draw(st.integers(1, len(ids) + 1))
            blocks = list(features.blocks(rows=block_rows))
            np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), x)
            assert [len(block) for block, _ in blocks[:-1]] == [block_rows] * (len(blocks) - 1)
            np.testing.assert_array_equal(features.dask(rows=block_rows)[0].compute(scheduler="synchronous"), x)
        drawn = data.draw(st.lists(st.integers(0, 100), max_size=20))
        places = np.array([place % (2 * len(ids)) - len(ids) for place in drawn] if len(ids) else [], int)
        x, ids, y, parted, names = (values[places] for values in (x, ids, y, parted, names))
        features, joined = features.take(places), joined[places]


def same(view, columns, x, ids, y, splits, names):
    assert view.columns == tuple(columns)
    assert view.shape == x.shape
    for dtype in (np.float16, np.float64):
        np.testing.assert_array_equal(view.read(dtype), x.astype(dtype))
    assert (view.ids.tolist(), view.labels.tolist()) == (ids.tolist(), y.tolist())
    assert (view.splits.tolist(), view.keys64.tolist()) == (splits.tolist(), names.tolist())
    labelled = np.array([label is not None for label in y], bool)
    classes = sorted(set(y[labelled]))
    assert (view.classes, view.unlabelled) == (classes, int((~labelled).sum()))
    assert view.codes().tolist() == [-1 if label is None else classes.index(label) for label in y]
    assert view.codes(["y"]).tolist() == [0 if label == "y" else -1 for label in y]
    assert view.duplicates == len(names) - len(set(names.tolist()))
    some_x, some_y = view.numpy(labelled=True)
    np.testing.assert_array_equal(some_x, x[labelled])
    assert (some_y is None and not labelled.any()) or some_y.tolist() == y[labelled].tolist()
    for split in {name for name in splits if name is not None}:
        np.testing.assert_array_equal(view.select(split=split).read(), x[splits == split])
    for label in classes:
        assert view.select(classes=[label]).ids.tolist() == ids[y == label].tolist()
