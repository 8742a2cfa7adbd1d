"""Commands that read features begin again when the store is rewritten under them."""

import json
import os

import numpy as np
import pytest

from featurepipe.errors import CorruptPart, StoreError, StoreMoved, UnknownSnapshot
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.heads.bundle.bundle import write_bundle
from featurepipe.monitoring.drift import drift
from featurepipe.monitoring.duplicates import duplicates
from featurepipe.prediction.from_store import predict_features
from featurepipe.store import FeatureStore, compact_store, export, gc_store
from featurepipe.store.locks import TRIES, starts_again
from featurepipe.training.train import train


@pytest.fixture
def split(zoo):
    """Three snapshots, each in parts of its own; the first has images that the others lack."""
    old, train_rows, test = zoo.images("old", 12), zoo.images("train", 12), zoo.images("test", 12)
    for rows in (old, [*old[:20], *train_rows], [*train_rows, *test]):
        zoo.write(rows)
    return zoo


@pytest.fixture
def rewritten(split, monkeypatch):
    """Rewrites the store after the next ``times`` views of it were opened; tells how often that was."""
    real, left, done = FeatureStore.features, [1], []

    def features(store, *arguments, **options):
        found = real(store, *arguments, **options)
        if left[0]:
            left[0] -= 1
            done.append(1)
            split.write([*split.images("train", 12), *split.images("test", 12), *split.images("more", 1, len(done))])
            gc_store(FeatureStore(store.path), keep_snapshots=1)
            compact_store(FeatureStore(store.path))
        return found

    monkeypatch.setattr(FeatureStore, "features", features)
    return left, done


def trained(zoo, folder):
    found = train(zoo.store, head="centroid", nodes=["a:gap", "b:gap"], out=folder / "bundle", calibration=False)
    return {name: found[name] for name in ("classes", "counts", "test")}


def evaluated(zoo, folder):
    found = evaluate(zoo.bundle(zoo.images("train", 12)), zoo.store, bootstrap=10)
    return {name: found[name] for name in ("counts", "metrics", "scope")}


def predicted(zoo, folder):
    predict_features(zoo.bundle(zoo.images("train", 12)), zoo.store, folder / "p.jsonl")
    return [json.loads(line)["id"] for line in (folder / "p.jsonl").read_text().splitlines()]


def compared(zoo, folder):
    found = drift(zoo.store, reference="previous")
    return {name: found[name] for name in ("images", "columns", "verdict")}


def grouped(zoo, folder):
    return duplicates(zoo.store, node="b:gap", near=0.001)["near"]


@pytest.mark.parametrize("command", [trained, evaluated, predicted, grouped])
def test_a_command_finds_what_it_finds_in_a_store_at_rest(command, rewritten, split, tmp_path, capsys):
    done = rewritten[1]
    found = command(split, tmp_path)
    assert len(done) == 1
    assert "the store was rewritten meanwhile (compact or gc): starting again, try 2 of 3" in capsys.readouterr().err
    assert json.dumps(found) == json.dumps(command(split, tmp_path))  # of the one snapshot that is left


def test_drift_starts_again_with_the_snapshots_that_are_left(rewritten, split, tmp_path, capsys):
    assert compared(split, tmp_path)["verdict"]
    assert "starting again" in capsys.readouterr().err or not rewritten[1]


def test_a_store_that_is_never_at_rest_ends_the_command(rewritten, split, tmp_path):
    left, done = rewritten
    left[0] = 100
    with pytest.raises(StoreMoved):
        trained(split, tmp_path)
    assert len(done) == TRIES
    assert not (tmp_path / "bundle").exists()


def test_features_that_were_moved_are_exported_all_the_same(split, tmp_path):
    features = split.features().select(split="test")
    expected = features.read()
    compact_store(split.store)
    for name in ("x.npz", "y.h5"):
        export(features, tmp_path / name)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["X"], expected)


def test_features_that_were_removed_are_not_exported(split, tmp_path):
    features = split.store.features("zoo", "b", snapshot=split.store.snapshot_ids("zoo")[0])
    gc_store(split.store, keep_snapshots=1)
    with pytest.raises(StoreMoved, match="rows that were listed are gone"):
        export(features, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_a_snapshot_that_was_asked_for_is_not_replaced_by_another(rewritten, split, tmp_path):
    old = split.store.snapshot_ids("zoo")[0]
    bundle = split.bundle(split.images("train", 12))
    with pytest.raises(UnknownSnapshot, match=f"unknown snapshot '{old}'"):
        predict_features(bundle, split.store, tmp_path / "p.jsonl", snapshot=old)
    assert len(rewritten[1]) == 1
    assert not (tmp_path / "p.jsonl").exists()


def test_other_errors_are_not_tried_again():
    calls = []

    @starts_again
    def command():
        calls.append(1)
        raise StoreError("damaged")

    with pytest.raises(StoreError, match="damaged"):
        command()
    assert calls == [1]


@pytest.mark.parametrize("since", [-1, 0])
def test_parts_that_are_missing_are_what_the_command_ends_with(split, tmp_path, monkeypatch, capsys, since):
    """Where nobody moved them: without the last part of a space, the second beginning finds no column at all."""
    real = FeatureStore.features

    def features(store, *arguments, **options):
        found = real(store, *arguments, **options)
        for part in sorted(store.path.glob("spaces/*/parts/*.h5"))[since:]:
            part.unlink()
        return found

    monkeypatch.setattr(FeatureStore, "features", features)
    with pytest.raises(StoreMoved, match=r"part .*\.h5 is gone") as found:
        trained(split, tmp_path)
    said = capsys.readouterr().err
    assert said.count("starting again") == 1
    assert f"nothing was moved: what is missing is not in the store; {found.value.__cause__}" in said
    assert not (tmp_path / "bundle").exists()


def test_damage_found_at_the_second_beginning_is_said_itself():
    errors = [StoreMoved("part 1 is gone"), CorruptPart("part 2 is damaged")]

    @starts_again
    def command():
        raise errors.pop(0)

    with pytest.raises(CorruptPart, match="part 2 is damaged"):
        command()


def test_a_bundle_page_of_a_store_that_is_rewritten(rewritten, split, tmp_path):
    from featurepipe.reporting.from_store import report

    write_bundle(tmp_path / "bundle", split.bundle(split.images("train", 12)))
    assert report(split.store, tmp_path / "page.html", bundle=tmp_path / "bundle", silent=True).is_file()
    assert len(rewritten[1]) == 1


@pytest.mark.parametrize("wanted", [[29, 0], [3, 2, 1], slice(None)], ids=["few of many", "neighbours", "all"])
@pytest.mark.parametrize("fate", ["removed", "cut short"])
def test_rows_of_a_part_that_was_moved_say_so_however_they_are_read(store, space, rows, wanted, fate):
    names = [f"n{number}" for number in range(30)]
    rows.write(store, space, names, dataset="d")
    rows.snapshot(store, "d", names)
    view = store.features("d")
    [path] = space.part_paths()
    path.unlink() if fate == "removed" else os.truncate(path, space.parts()[0].columns["a:gap"].offset)
    with pytest.raises(StoreMoved, match=f"part {path} is gone or shorter than it was; .*compacted meanwhile"):
        view.read(rows=np.array(wanted) if isinstance(wanted, list) else wanted)
