"""predict_features: the file that predict writes, from stored features alone."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurepipe.errors import BundleError, Interrupted, UsageError
from featurepipe.extraction.extract import extract
from featurepipe.interrupt import stop_on_signals
from featurepipe.prediction import from_store
from featurepipe.prediction.from_store import predict_features
from featurepipe.prediction.predict import predict
from featurepipe.store import FeatureStore


@pytest.fixture(scope="module")
def spoilt(album, tmp_path_factory):
    """The album with two unusable images, the first one among them, in a store of its own."""
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(album.root, folder / "album")
    (folder / "album" / "day" / "!.png").write_bytes(b"")
    (folder / "album" / "ümlaut" / "no image.png").write_bytes(b"no image\n")
    extract(folder / "album", folder / "store", backbone="lenet5", weights="none", nodes=["c3", "bottleneck"], workers=2,
            precision="fp32", dtype="float16", max_rejects=2, silent=True)  # fmt: skip
    return replace(album, root=folder / "album", store=folder / "store")


def columns_of(path):
    table = pq.read_table(path)
    facts = [table[name].to_pylist() for name in ("id", "label", "reason")]
    return facts, np.stack([column.to_numpy() for column in table.select(table.column_names[4:]).columns]), table


def test_the_file_is_that_of_the_network(spoilt, tmp_path):
    bundle = replace(spoilt.bundle(), temperature=1.7)
    by_network = predict(bundle, spoilt.root, tmp_path / "network.parquet", max_rejects=2, workers=2, silent=True)
    record = predict_features(bundle, spoilt.store, tmp_path / "store.parquet", silent=True)
    facts, values, table = columns_of(tmp_path / "store.parquet")
    expected, probabilities, other = columns_of(tmp_path / "network.parquet")
    assert facts == expected
    assert facts[2][0] == "empty: 0 bytes"
    assert table.schema == other.schema
    np.testing.assert_allclose(values, probabilities, rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(table["confidence"].to_numpy()[1:-1], values.max(axis=0)[1:-1])
    assert record["labels"] == {name: count for name, count in by_network["labels"].items() if count}
    assert record["counts"] == {"images": 38, "predicted": 36, "rejected": 2}
    assert record["dataset"] == "album"
    assert record["snapshot"] == FeatureStore(spoilt.store).snapshot_ids("album")[-1]


@pytest.mark.parametrize("rows_at_once", [1, 5, 38])
def test_blocks_and_chosen_rows_give_the_same_values(spoilt, tmp_path, monkeypatch, rows_at_once):
    bundle = spoilt.bundle()
    whole = predict_features(bundle, spoilt.store, tmp_path / "whole.parquet", silent=True)
    monkeypatch.setattr(
        from_store, "_blocks", lambda rows, _: np.split(rows, range(rows_at_once, len(rows), rows_at_once))
    )
    mask = np.arange(38) % 3 == 0
    some = predict_features(bundle, spoilt.store, tmp_path / "some.parquet", rows=mask, silent=True)
    assert some["counts"] == {"images": 13, "predicted": 12, "rejected": 1}
    everything, chosen = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "some"))
    expected = everything.filter(pa.array(mask))
    assert chosen["id"].to_pylist() == expected["id"].to_pylist()
    assert chosen["label"].to_pylist() == expected["label"].to_pylist()
    for name in everything.column_names[4:]:
        np.testing.assert_allclose(chosen[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5)
    assert sum(some["labels"].values()) == 12 < sum(whole["labels"].values())


def test_the_memory_of_a_block_is_bounded(album):
    bundle = album.bundle()
    for width, classes in [(10, 3), (2048, 1000), (100_000, 10)]:
        shaped = replace(bundle, head=type("Head", (), {"n_features_in_": width}), classes=("x",) * classes)
        (first, *_) = from_store._blocks(np.arange(10**6), shaped)
        assert len(first) * (4 * width + 24 * classes) <= from_store.BLOCK_BYTES
        assert 16 <= len(first) <= from_store.MOST_ROWS
        assert sum(map(len, from_store._blocks(np.arange(10**6), shaped))) == 10**6


def test_nothing_chosen_makes_an_empty_file_and_no_file_only_counts(album, tmp_path):
    bundle = album.bundle()
    none = predict_features(bundle, album.store, tmp_path / "none.parquet", rows=np.zeros(36, bool), silent=True)
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
    assert none["counts"]["images"] == 0
    counted = predict_features(bundle, album.store, silent=True)
    assert counted["file"] is None
    assert counted["counts"]["predicted"] == sum(counted["labels"].values()) == 36


def test_an_older_snapshot_is_predicted_as_it_was(album, tmp_path):
    shutil.copytree(album.root, tmp_path / "album")
    shutil.copytree(album.store, tmp_path / "store")
    (tmp_path / "album" / "day" / "00.png").unlink()
    extract(
        tmp_path / "album",
        tmp_path / "store",
        backbone="lenet5",
        weights="none",
        nodes=["c3", "bottleneck"],
        silent=True,
    )
    bundle, (first, last) = album.bundle(), FeatureStore(tmp_path / "store").snapshot_ids("album")
    images = [predict_features(bundle, tmp_path / "store", snapshot=run, silent=True) for run in (first, last, None)]
    assert [found["counts"]["images"] for found in images] == [36, 35, 35]
    assert [found["snapshot"] for found in images] == [first, last, last]


def test_features_of_another_space_are_refused(album, tmp_path):
    bundle = album.bundle()
    shutil.copytree(album.store, tmp_path / "store")
    extract(
        album.root, tmp_path / "store", backbone="lenet5", weights="none", nodes=["c3"], dtype="float32", silent=True
    )
    other = next(s for s in FeatureStore(tmp_path / "store").spaces() if s.fingerprint != bundle.fingerprint)
    lacking = replace(bundle, space=other.fields, fingerprint=other.fingerprint)
    with pytest.raises(UsageError, match=r"unknown column 'f6\.1:gap' in lenet5"):
        predict_features(lacking, tmp_path / "store", tmp_path / "x.parquet", silent=True)
    strange = replace(bundle, space={**bundle.space, "dtype": "float64"}, fingerprint="0" * 64)
    with pytest.raises(
        BundleError, match=r"for features of the space lenet5-000000000000, and .* has none(.|\n)*in dtype"
    ):
        predict_features(strange, album.store, tmp_path / "x.parquet", silent=True)
    with pytest.raises(UsageError, match="unknown dataset 'albun'"):
        predict_features(bundle, album.store, tmp_path / "x.parquet", dataset="albun", silent=True)
    assert not (tmp_path / "x.parquet").exists()


def test_files_that_must_stay_are_not_replaced(album, written, tmp_path):
    bundle, manifest = written(), tmp_path / "images.parquet"
    pq.write_table(pa.table({"path": ["a"]}), manifest)
    for target in (manifest, bundle / "out.parquet", album.store / "runs" / "out.parquet"):
        with pytest.raises(UsageError, match="cannot write predictions to"):
            predict_features(bundle, album.store, target, spared=[manifest], silent=True)
    assert pq.read_table(manifest).num_rows == 1
    predict_features(bundle, album.store, manifest, silent=True)
    assert pq.read_table(manifest).num_rows == 36


def test_a_signal_leaves_the_older_file(album, tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_text("older")
    monkeypatch.setattr(from_store, "_blocks", lambda rows, _: (signal.raise_signal(signal.SIGTERM), [rows])[1])
    with stop_on_signals() as stop, pytest.raises(Interrupted) as caught, stop.at_once("the end"):
        predict_features(album.bundle(), album.store, tmp_path / "x.parquet", silent=True)
    assert caught.value.exit_code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    assert (tmp_path / "x.parquet").read_text() == "older"


@pytest.mark.slow
def test_no_network_is_loaded():
    code = "import featurepipe.prediction.from_store, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
