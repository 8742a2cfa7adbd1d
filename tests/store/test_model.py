"""Whatever the order of adds, commits, reopenings, repairs and compactions: the store is a dict."""

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from featurepipe.store import FeatureStore, compact_store, gc_store, verify_store
from featurepipe.store.snapshots import SCHEMA

COLUMNS = ("a:gap", "b.1:gem")
SETS = [COLUMNS[:1], COLUMNS[1:], COLUMNS]


def key_of(number: int) -> bytes:
    """Keys that often share their first 8 bytes."""
    return bytes(8) + number.to_bytes(24, "big") if number % 2 else number.to_bytes(1, "big") * 32


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(-6e4, 6e4, width=16)
    ),
    ids=st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9), min_size=9, max_size=9
    ),
    stats=st.lists(st.tuples(st.integers(0, 2**62), st.integers(-(2**62), 2**62)), min_size=9, max_size=9),
)
def test_what_goes_in_comes_out(tmp_path_factory, values, ids, stats):
    store = FeatureStore(tmp_path_factory.mktemp("store"))
    space = store.open_space({"dtype": "float16"}, backbone="n")
    n = len(values)
    keys = np.array([list(key_of(i)) for i in range(n)], np.uint8)
    sizes, times = zip(*stats[:n], strict=True)
    with space.writer(store.new_run_id()) as writer:
        writer.add(keys, ids[:n], sizes, times, {"a:gap": values})
    table = pa.table(
        {
            "id": ids[:n],
            "key": list(map(bytes, keys)),
            "label": ids[:n],
            "split": pa.nulls(n),
            "size": sizes,
            "mtime_ns": times,
            "status": ["ok"] * n,
            "reason": pa.nulls(n),
        }
    )
    store.write_snapshot("d", store.new_run_id(), table)
    features = store.features("d", "a")
    np.testing.assert_array_equal(features.read(), values.astype(np.float16))
    assert features.ids.tolist() == features.labels.tolist() == ids[:n]
    known = space.known_files().sort_by("key").to_pylist()
    assert {(r["id"], r["size"], r["mtime_ns"]) for r in known} == set(zip(ids[:n], sizes, times, strict=True))


class StoreModel(RuleBasedStateMachine):
    """A store beside ``self.model``: column -> key number -> value."""

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.model = {column: {} for column in COLUMNS}
        self.reopen()
        self.writer = None

    @rule()
    def reopen(self):
        self.store = FeatureStore(self.folder / "s")
        self.space = self.store.open_space({"dtype": "float32"}, backbone="n")

    @rule(numbers=st.lists(st.integers(0, 20), max_size=8), columns=st.sampled_from(SETS))
    def add(self, numbers, columns):
        if self.writer is None:
            self.writer = self.space.writer(self.store.new_run_id(), part_bytes=500, dataset="d")
        keys = np.array([list(key_of(i)) for i in numbers], np.uint8).reshape(-1, 32)
        values = {c: np.array([[i, COLUMNS.index(c)] for i in numbers], np.float32).reshape(-1, 2) for c in columns}
        self.writer.add(keys, [f"id{i}" for i in numbers], numbers, numbers, values)
        for column in columns:
            self.model[column] |= dict.fromkeys(numbers, COLUMNS.index(column))

    @rule()
    def commit(self):
        if self.writer is not None:
            with self.writer:
                pass
            self.writer = None

    @rule(target_bytes=st.sampled_from([1, 3000, 1 << 20]))
    def compact(self, target_bytes):
        self.commit()
        compact_store(self.store, target_bytes=target_bytes)

    @rule(kept=st.sets(st.integers(0, 20)))
    def collect(self, kept):
        """A snapshot of some of the keys, then gc: the others go."""
        self.commit()
        numbers = sorted(kept & (self.model[COLUMNS[0]].keys() | self.model[COLUMNS[1]].keys()))
        columns = {name: pa.nulls(len(numbers), SCHEMA.field(name).type) for name in SCHEMA.names} | {
            "id": pa.array([f"id{i}" for i in numbers], pa.string()),
            "key": pa.array([key_of(i) for i in numbers], pa.binary(32)),
            "status": pa.array(["ok"] * len(numbers), pa.string()),
        }
        self.store.write_snapshot("d", self.store.new_run_id(), pa.table(columns))
        gc_store(self.store, keep_snapshots=1)
        self.model = {column: {n: v for n, v in rows.items() if n in kept} for column, rows in self.model.items()}

    @invariant()
    def the_store_is_the_model(self):
        if self.writer is not None:
            return
        everything = np.array([list(key_of(i)) for i in range(21)], np.uint8)
        held = self.space.columns()
        for column, rows in self.model.items():
            index = self.space.index([column])
            assert index.contains(everything).tolist() == [i in rows for i in range(21)]
            part, row, found = index.locate(everything)
            for number in np.flatnonzero(found):
                info = index.parts[part[number]]
                array = info.columns[column]
                stored = np.fromfile(info.path, array.dtype, offset=array.offset, count=2 * info.rows).reshape(-1, 2)
                assert stored[row[number]].tolist() == [number, rows[number]]
            assert (column in held) == bool(rows)
        both = self.space.index(COLUMNS).contains(everything).tolist()
        assert both == [all(i in rows for rows in self.model.values()) for i in range(21)]

    def teardown(self):
        if hasattr(self, "folder"):
            self.commit()
            report = verify_store(self.store)
            assert report.clean
            assert report.leftovers == []
            shutil.rmtree(self.folder)


StoreModel.TestCase.settings = settings(max_examples=25, stateful_step_count=12)
TestStoreModel = StoreModel.TestCase
