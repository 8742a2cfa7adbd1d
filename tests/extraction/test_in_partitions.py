"""Plans, counts, ledgers and snapshots come out the same in partitions of a few rows as in one piece in memory."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import featurepipe as fp
from featurepipe.extraction.ledger import ExtractionLedger, ShardLedger
from featurepipe.extraction.plan import KeySet, Plan, count_changes, make_plan, still_rejected
from featurepipe.extraction.publish import snapshot_table
from featurepipe.extraction.shards import COMPUTED, Shard, ShardResult, ShardRun
from featurepipe.features.loader import StageSeconds
from featurepipe.features.session import Sample
from featurepipe.images.listing import SCHEMA as LISTED
from featurepipe.partitions import gathered, spilling
from featurepipe.store import keys as store_keys
from featurepipe.store import snapshots
from featurepipe.store.keys import KNOWN_FILES, SortedKeys
from tests.extraction.test_changes import piles, reference, snapshot

RUN = "20260101T000000000000Z-00000000"
SETTINGS = {"backbone": "lenet5", "weights": "none", "precision": "fp32", "silent": True}


def spilled(rows: int) -> spilling:
    """Partitions of so many rows, in files; None is in memory."""
    return nullcontext() if rows is None else spilling(Path(tempfile.gettempdir()), rows)


def in_chunks(table: pa.Table, rows: int) -> pa.Table:
    return pa.concat_tables([table.slice(at, rows) for at in range(0, max(len(table), 1), rows)])


@settings(max_examples=150)
@given(last=piles(), new=piles(), rows=st.integers(1, 4))
def test_changes_are_counted_as_the_reference_does(last, new, rows):
    with spilled(rows):
        then, now = (gathered(in_chunks(snapshot(pile), rows)) for pile in (last, new))
        found = count_changes(then, now)
        assert {kind: count for kind, count in found.items() if count} == reference(last, new)
        rejected = still_rejected(then, now)
    assert rejected == still_rejected(snapshot(last), snapshot(new))


def numbered_keys(numbers: list[int]) -> np.ndarray:
    """A key for each number; neighbours share their first bytes."""
    keys = np.zeros((len(numbers), 32), np.uint8)
    keys[:, 7], keys[:, 31] = np.array(numbers, int) // 3 * 40, numbers
    return keys


def key_set(numbers: list[int]) -> KeySet:
    return KeySet(key.tobytes() for key in numbered_keys(numbers))


def listing_of(names: list[int], rng: np.random.Generator) -> pa.Table:
    count = len(names)
    columns = {
        "id": [f"class/{name:03d}.jpg" for name in names],
        "label": [None if name % 4 == 0 else "class" for name in names],
        "split": [None] * count,
        "size": rng.integers(-1, 3, count),
        "mtime_ns": rng.integers(-1, 3, count),
        "locator": [str(name).encode() for name in names],
        "column:group": [f"g{name % 3}" for name in names],
    }
    return pa.table(columns, schema=pa.schema([*LISTED, ("column:group", pa.string())]))


def random_case(seed: int) -> tuple[pa.Table, pa.Table, list[int], list[int]]:
    """A listing, files known of it, and numbers of keys that are there and that were rejected."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(60)[: rng.integers(0, 40)].tolist()
    listing = listing_of(names, rng)
    known = rng.integers(0, 60, rng.integers(0, 50)).tolist()  # some several times: the last one counts
    keys = numbered_keys(rng.integers(0, 12, len(known)).tolist())
    files = pa.table(
        {
            "id": [f"class/{name:03d}.jpg" for name in known],
            "size": rng.integers(-1, 3, len(known)),
            "mtime_ns": rng.integers(-1, 3, len(known)),
            "key": pa.array([key.tobytes() for key in keys], pa.binary(32)),
        },
        schema=KNOWN_FILES,
    )
    return listing, files, rng.permutation(12)[:5].tolist(), rng.permutation(12)[:5].tolist()


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_plans_are_the_same(seed, rows):
    listing, files, have, refused = random_case(seed)
    expected = make_plan(listing, files, key_set(have), key_set(refused))
    with spilled(rows):
        plan = make_plan(gathered(in_chunks(listing, 5)), in_chunks(files, 7), key_set(have), key_set(refused))
    assert plan.listing.equals(listing)
    for name in ("keys", "has_key", "todo", "rejected"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(expected, name), err_msg=name)
        assert getattr(plan, name).dtype == getattr(expected, name).dtype


def write_into(folder: Path, table: pa.Table) -> Path:
    folder.mkdir()
    return snapshots.write_snapshot(folder, "d", RUN, table)


def worked_on(plan: Plan, ledger: ExtractionLedger, seed: int) -> ShardLedger:
    """Has shards of the plan answered, with copies in several of them, and rows that nobody came to."""
    rng = np.random.default_rng(seed)
    entries = ShardLedger(plan, ledger, StageSeconds())
    start = 0
    while start < len(plan.todo):
        count = min(int(rng.integers(1, 9)), len(plan.todo) - start)
        untouched = [0] * (seed % 2)  # then the run was stopped, and leaves no snapshot
        status = rng.choice([*untouched, 1, 2, COMPUTED, COMPUTED + 1], count).astype(np.uint16)
        has_key = np.isin(status, [1, COMPUTED, COMPUTED + 1]) | (rng.random(count) < 0.5) & (status > 0)
        keys = numbered_keys(rng.integers(0, 9, int(has_key.sum())).tolist())
        reasons = {int(place): f"corrupt: {place}" for place in np.flatnonzero(status == 2)}
        run = ShardRun("w", "here", 1, "cpu", 1, 1.0, {})
        kinds = [("a:gap",), ("a:gap", "b:gap")]
        entries.take(Shard(0, start, count, b""), ShardResult(status, kinds, keys, has_key, reasons, run))
        start += count
    return entries


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_ledgers_and_snapshots_are_the_same(seed, rows, tmp_path):
    class Missing:
        reasons = {key.tobytes(): "corrupt: before" for key in numbered_keys(list(range(12)))}  # noqa: RUF012
        damaged = {key.tobytes(): "damaged: a bit" for key in numbered_keys([1, 2, 5])}  # noqa: RUF012

    listing, files, have, refused = random_case(seed)
    found = {}
    for name, size in (("memory", None), ("files", rows)):
        with spilled(size):
            listed = listing if size is None else gathered(in_chunks(listing, 5))
            plan = make_plan(listed, files, key_set(have), key_set(refused))
            ledger = ExtractionLedger.of(plan, Missing())
            worked_on(plan, ledger, seed).close()
            table = snapshot_table(listed, ledger)
            paths = [] if seed % 2 else [write_into(tmp_path / name, table)]
        counts = {
            field: getattr(ledger, field) for field in ("computed", "known", "copies", "read", "columns", "reasons")
        }
        found[name] = {
            **counts,
            "damage": ledger.damage,
            "rows": table.to_pylist(),
            "bytes": [path.read_bytes() for path in paths],
        }
    assert found["files"] == found["memory"]


@pytest.mark.parametrize("rows", [3, 10])
@pytest.mark.parametrize("seed", range(10))
def test_files_known_of_parts_are_the_same(seed, rows, monkeypatch):
    rng = np.random.default_rng(seed)
    tables = [random_case(seed * 10 + number)[1] for number in range(3)]
    rejects = random_case(seed * 10 + 5)[1]
    monkeypatch.setattr(store_keys, "_of_parts", lambda *_: iter(tables))
    ids = pa.chunked_array([[f"class/{name:03d}.jpg" for name in rng.permutation(60)[:40]]])
    expected = store_keys.known_files([], rejects, ids, print)
    with spilled(rows):
        assert store_keys.known_files([], rejects, ids, print).equals(expected)
    assert len(expected) > 0


@pytest.mark.parametrize("rows", [3, 10])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("different", [True, False])
def test_keys_are_found_in_the_same_rows(seed, rows, different):
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(60)[:50] if different else rng.integers(0, 60, 50)
    held = numbered_keys(numbers.tolist())
    wanted = numbered_keys([*numbers[10:40].tolist(), *rng.integers(0, 60, 20).tolist()])
    expected = SortedKeys(held).find(wanted)
    with spilled(rows):
        np.testing.assert_array_equal(SortedKeys(held).find(wanted), expected)
        np.testing.assert_array_equal(SortedKeys(held).find(wanted[:2]), expected[:2])


@pytest.mark.parametrize("rows", [np.arange(2000), np.arange(700, 1500), np.arange(0, 2000, 7)])
def test_a_sample_travels_without_the_listing_it_is_of(rows):
    listing = listing_of(list(range(2000)), np.random.default_rng(0))
    with spilled(500):
        packed = pickle.dumps(Sample(gathered(in_chunks(listing, 300)), rows, 8))
    there = pickle.loads(packed)
    assert there.listing.equals(listing.take(pa.array(rows[:32])).select(["id", "size", "mtime_ns", "locator"]))
    assert len(packed) < 4000


def test_a_snapshot_is_read_row_group_by_row_group(tmp_path):
    rng = np.random.default_rng(0)
    listing = listing_of(list(range(50)), rng)
    ledger = ExtractionLedger(numbered_keys(list(range(50))), np.ones(50, bool), reasons={7: "corrupt: x"})
    path = snapshots.write_snapshot(tmp_path, "d", RUN, snapshot_table(listing, ledger))
    whole = snapshots.read_snapshot(tmp_path, "d")
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    with spilled(5):
        read = snapshots.read_snapshot(tmp_path, "d")
        assert read["id"].num_chunks == 10
        assert read.equals(whole)
        assert snapshots.read_snapshot(tmp_path, "d", columns=["label", "column:group"]).equals(
            whole.select(["label"]).append_column("column:group", listing["column:group"])
        )


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 35])
def test_row_groups_are_those_of_one_table(count, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "PARTITION_ROWS", 10)
    ledger = ExtractionLedger(numbered_keys(list(range(count))), np.ones(count, bool))
    table = snapshot_table(listing_of(list(range(count)), np.random.default_rng(0)), ledger)
    one, many = write_into(tmp_path / "one", table), write_into(tmp_path / "many", in_chunks(table, 3))
    schema = pa.schema([*snapshots.SCHEMA, ("column:group", pa.string())])
    pq.write_table(
        table.select(schema.names).cast(schema).combine_chunks(),
        tmp_path / "x",
        row_group_size=10,
        compression="zstd",
        write_page_checksum=True,
    )
    assert one.read_bytes() == many.read_bytes() == (tmp_path / "x").read_bytes()


def nights(folder: Path, store: Path, rows: int | None, **more) -> list[dict]:
    """Runs over images that come, go, move, change and are copied; what each run counted, and the bytes of its snapshot."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 28, 28), np.uint8)
    folder.mkdir()

    def put(name: str, number: int) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[number]).save(folder / name)

    for number in range(20):
        put(f"{'ab'[number % 2]}/{number:03d}.png", number)
    (folder / "a/bad.png").write_bytes(b"no image")

    def second() -> None:
        for number in range(20, 26):
            put(f"a/{number:03d}.png", number)
        put("b/copy.png", 3)
        (folder / "a/000.png").rename(folder / "b/moved.png")
        (folder / "b/001.png").unlink()
        put("a/002.png", 30)

    found = []
    for change in (lambda: None, second, lambda: None):
        change()
        with spilled(rows):
            run = fp.extract(folder, store, max_rejects=1, **SETTINGS, **more)
            (path,) = store.glob(f"snapshots/*/{run['run_id']}.parquet")
            table = pq.read_table(path).drop_columns(["mtime_ns"])
            about = {name: run[name] for name in ("counts", "changes", "rejects", "new_rejects", "listing", "copies")}
            found.append({**about, "snapshot": table.to_pylist()})
    return found


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("rows", [4])
def test_runs_tell_and_leave_the_same(rows, cluster, tmp_path, request):
    there = {"cluster": request.getfixturevalue("dask_executor")} if cluster else {}
    expected = nights(tmp_path / "images", tmp_path / "memory", None)
    shutil.rmtree(tmp_path / "images")
    found = nights(tmp_path / "images", tmp_path / "files", rows, **there)
    assert found == expected
    assert Counter(found[1]["changes"]) == Counter(
        new=6, moved=1, copied=1, changed=1, deleted=1, unchanged=17, still_rejected=1
    )
    assert found[2]["counts"]["known"] == 26
