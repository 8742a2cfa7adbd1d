"""The recipes into LanceDB and Qdrant: after three nights the database's vectors equal the store's, and nothing else is there."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.errors import UsageError
from featurepipe.store import FeatureStore, forget_images
from featurepipe.store.snapshots import SCHEMA

RECIPES = Path(__file__).parents[1] / "pipelines"
NIGHTS = (
    {"a": "a1", "b'": "b1", "c": "c1", "twin": "a1"},
    {"a": "a2", "b'": "b1", "twin": "a1", "d": "d1"},  # a has other bytes, c is gone, d is new
    {"a": "a2", "b'": "b1", "twin": "a1", "d": "d1", "é/e": "e1"},
)
LABELS = ("cat", "cat", "dog")  # of b', which is relabelled in the third night
pytestmark = pytest.mark.slow  # each client takes seconds to load


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def key_of(content):
    return hashlib.sha256(content.encode()).digest()


def vector_of(content):
    return np.frombuffer(key_of(content) * 2, np.uint8)[:48].astype(np.float32) / 64 - 1


def night(store, images, label):
    """A night whose images have these contents, by id."""
    space, run = (
        store.open_space({"dtype": "float32", "net": "x"}, backbone="x", notes={"aliases": {"bottleneck": "f"}}),
        store.new_run_id(),
    )
    contents = sorted({content for content in images.values() if not space.index().contains([key_of(content)]).any()})
    if contents:
        with space.writer(run, dataset="d") as writer:
            keys = np.frombuffer(b"".join(map(key_of, contents)), np.uint8).reshape(-1, 32)
            ids = [next(id_ for id_, content in images.items() if content == own) for own in contents]
            writer.add(keys, ids, [1] * len(ids), [1] * len(ids), {"f:gap": np.stack(list(map(vector_of, contents)))})
    n = len(images)
    values = {
        "id": list(images), "key": list(map(key_of, images.values())), "split": [None] * n, "size": [1] * n, "mtime_ns": [1] * n,
        "label": [label if id_ == "b'" else None for id_ in images], "status": ["ok"] * n, "reason": [None] * n,
    }  # fmt: skip
    store.write_snapshot("d", run, pa.table(values, schema=SCHEMA))


def check_nights(store, sync, read):
    """Runs the nights; ``sync`` brings the database up to date, ``read`` gives its vectors and labels by id."""
    changes = []
    for images, label in zip(NIGHTS, LABELS, strict=True):
        night(store, images, label)
        told = sync()
        changes.append(tuple(told[name] for name in ("new", "changed", "relabelled", "deleted")))
        found = read()
        assert {id_: found[id_][1] for id_ in found} == {id_: label if id_ == "b'" else None for id_ in images}
        features = store.features("d", "f")
        for id_, vector in zip(features.ids, features.read(), strict=True):
            np.testing.assert_array_equal(found[id_][0], vector)
            np.testing.assert_array_equal(vector, vector_of(images[id_]))
    assert changes == [(4, 0, 0, 0), (1, 1, 0, 1), (1, 0, 1, 0)]
    told = sync()
    assert [told[name] for name in ("new", "changed", "relabelled", "deleted")] == [0, 0, 0, 0]
    forget_images(store, ["a", "é/e"])
    assert sync()["deleted"] == 2
    assert sorted(read()) == ["b'", "d", "twin"]


def mixed(store, sync, read):
    """One table of two feature spaces, and of two columns: the second is refused, whatever its width, and nothing changes."""
    night(store, NIGHTS[0], "cat")
    other, run = store.open_space({"dtype": "float32", "net": "y"}, backbone="y"), store.new_run_id()
    with other.writer(run, dataset="d") as writer:
        keys = np.frombuffer(b"".join(key_of(content) for content in ("a1", "b1", "c1")), np.uint8).reshape(-1, 32)
        values = {"f:gap": np.full((3, 48), 5, np.float32), "g:gap": np.full((3, 8), 5, np.float32)}
        writer.add(keys, ["a", "b'", "c"], [1] * 3, [1] * 3, values)
    assert sync(backbone="x", node="f")["new"] == 4
    before = read()
    spaces = [store.features("d", "f", backbone=name).space_fingerprint for name in "xy"]
    for backbone, node in (("y", "f"), ("y", "g")):
        with pytest.raises(
            UsageError, match=f"f:gap of feature space {spaces[0]}, .*{node}:gap of feature space {spaces[1]}"
        ):
            sync(backbone=backbone, node=node)
    assert sync(backbone="x", node="f")["new"] == 0
    after = read()
    assert after.keys() == before.keys()
    for id_ in before:
        np.testing.assert_array_equal(after[id_][0], before[id_][0])


def holding(folder, content):
    """The files with some bytes in them."""
    return [file for file in folder.rglob("*") if file.is_file() and content in file.read_bytes()]


def test_lancedb_has_what_the_store_has(tmp_path):
    import lancedb

    into_lancedb, store = recipe("into_lancedb"), FeatureStore(tmp_path / "store")
    into_lancedb.ROWS, into_lancedb.IDS = 2, 1  # several blocks

    def read():
        rows = lancedb.connect(tmp_path / "lance").open_table("vectors").to_arrow().to_pylist()
        return {row["id"]: (np.float32(row["vector"]), row["label"]) for row in rows}

    check_nights(
        store, lambda: into_lancedb.bring_up_to_date(store, str(tmp_path / "lance"), node="f", table="vectors"), read
    )
    night(store, {**NIGHTS[0], **{f"more {n}": f"m{n}" for n in range(50)}}, "cat")
    into_lancedb.bring_up_to_date(store, str(tmp_path / "lance"), node="f", table="vectors")
    forget_images(store, ["more 7"])
    into_lancedb.bring_up_to_date(store, str(tmp_path / "lance"), node="f", table="vectors")
    gone = vector_of("m7").tobytes()
    assert holding(tmp_path / "lance", gone)  # one row of a large file is only marked as deleted
    told = into_lancedb.bring_up_to_date(store, str(tmp_path / "lance"), node="f", table="vectors", purge=True)
    assert (told["rows"], sorted(read())) == (53, sorted(store.features("d", "f").ids))
    assert not holding(tmp_path / "lance", gone)
    assert holding(tmp_path / "lance", vector_of("m8").tobytes())


def test_qdrant_has_what_the_store_has(tmp_path):
    from qdrant_client import QdrantClient

    into_qdrant, store = recipe("into_qdrant"), FeatureStore(tmp_path / "store")
    into_qdrant.ROWS, into_qdrant.READ = 2, 2
    client = QdrantClient(path=str(tmp_path / "qdrant"))

    def read():
        (collection,) = client.get_collections().collections
        points, _ = client.scroll(collection.name, limit=100, with_vectors=True)
        return {point.payload["id"]: (np.float32(point.vector), point.payload["label"]) for point in points}

    check_nights(store, lambda: into_qdrant.bring_up_to_date(store, client, node="f", distance="euclid"), read)
    client.close()


def test_lancedb_takes_no_other_feature_space(tmp_path):
    import lancedb

    into_lancedb, store, to = recipe("into_lancedb"), FeatureStore(tmp_path / "store"), str(tmp_path / "lance")

    def read():
        rows = lancedb.connect(to).open_table("t").to_arrow().to_pylist()
        return {row["id"]: (np.float32(row["vector"]), row["label"]) for row in rows}

    mixed(store, lambda **which: into_lancedb.bring_up_to_date(store, to, table="t", **which), read)
    features = store.features("d", "f", backbone="x")
    parts = ("d", features.space_fingerprint[:12], "f-gap")
    for name in ("earlier", "-".join(parts)):  # tables of recipes that kept no note of the space
        rows = next(into_lancedb.blocks(features)).slice(0, 1)
        lancedb.connect(to).create_table(name, rows.replace_schema_metadata(None))
    with pytest.raises(UsageError, match="table earlier has vectors of another table, or an earlier recipe"):
        into_lancedb.bring_up_to_date(store, to, backbone="x", node="f", table="earlier")
    told = into_lancedb.bring_up_to_date(store, to, backbone="x", node="f")  # its name has the space
    assert (told["table"], told["rows"], told["new"]) == ("-".join(parts), 4, 3)


def test_qdrant_takes_no_other_feature_space(tmp_path):
    from qdrant_client import QdrantClient

    into_qdrant, store = recipe("into_qdrant"), FeatureStore(tmp_path / "store")
    client = QdrantClient(path=str(tmp_path / "qdrant"))

    def sync(**which):
        return into_qdrant.bring_up_to_date(store, client, distance="euclid", **which)

    def read():
        points, _ = client.scroll("t", limit=100, with_vectors=True)
        return {point.payload["id"]: (np.float32(point.vector), point.payload["label"]) for point in points}

    mixed(store, lambda **which: sync(collection="t", **which), read)
    own = sync(backbone="x", node="f")["collection"]
    for name in ("t", own):  # as a recipe that kept no note of the space left them
        client.delete_payload(name, ["space", "column"], points=[into_qdrant.point_of("a")])
    with pytest.raises(UsageError, match="collection t has vectors of something else, or an earlier recipe"):
        sync(backbone="x", node="f", collection="t")
    assert sync(backbone="x", node="f")["new"] == 0
    client.close()
