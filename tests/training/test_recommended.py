"""``--node recommended``: the column that the newest comparison of layers recommends, and what predicts from it."""

import csv

import numpy as np
import pytest
from PIL import Image

from featurepipe.backbones.engine import Engine
from featurepipe.errors import UsageError
from featurepipe.extraction.extract import extract
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.prediction.predict import predict
from featurepipe.store import FeatureStore
from featurepipe.training.train import train

OTHER = {"dtype": "float32", "net": "other", "precision": "fp32"}


def recommend(store, dataset, column, fingerprint, accuracy=0.9, classes=("cat", "dog", "emu"), labels=None):
    store.write_depth({
        "kind": "depth", "version": 1, "dataset": dataset, "space": {"name": "-", "fingerprint": fingerprint},
        "recommended": {"column": column, "accuracy": accuracy, "head": "knn"}, "classes": list(classes), "labels": labels,
        "provenance": {"when": "2026-11-22T09:00:00+00:00"},
    })  # fmt: skip


@pytest.fixture
def split_zoo(zoo):
    zoo.write([*zoo.images("train", 30), *zoo.images("test", 10)])
    return zoo


@pytest.mark.parametrize("nodes", ["recommended", ["recommended"], ("recommended",)])
def test_the_newest_of_the_dataset_counts_and_is_told(split_zoo, tmp_path, capsys, nodes):
    space = split_zoo.features().space_fingerprint
    recommend(split_zoo.store, "zoo", "a:gap", space, 0.7)
    recommend(split_zoo.store, "zoo", "b:gap", space, 0.8125)
    recommend(split_zoo.store, "ark", "a:gap", space, 0.9)
    record = train(split_zoo.store, nodes=nodes, out=tmp_path / "bundle")
    assert (
        "recommended on 2026-11-22: b:gap (there 0.8125: knn, its parameters chosen in each fold)"
        in capsys.readouterr().err
    )
    assert read_bundle(tmp_path / "bundle").columns == ("b:gap",)
    named = train(split_zoo.store, nodes="b:gap", out=tmp_path / "named", silent=True)
    assert record["test"]["accuracy"] == named["test"]["accuracy"]


def test_it_is_of_the_space_that_was_compared_or_asked_for(zoo, tmp_path):
    rows = [*zoo.images("train", 30), *zoo.images("test", 10)]
    zoo.write(rows)
    first = zoo.features().space_fingerprint
    zoo.write(rows, fields=OTHER)
    (other,) = {space.fingerprint for space in zoo.store.spaces()} - {first}
    recommend(zoo.store, "zoo", "a:gap", other)
    recommend(zoo.store, "zoo", "b:gap", first)
    for backbone, column, space in ((None, "b:gap", first), (other, "a:gap", other), (first, "b:gap", first)):
        train(zoo.store, nodes="recommended", backbone=backbone, out=tmp_path / "bundle", silent=True)
        bundle = read_bundle(tmp_path / "bundle")
        assert (bundle.columns, bundle.fingerprint) == ((column,), space)


def test_without_a_comparison_the_message_says_how_to_make_one(split_zoo, tmp_path):
    recommend(split_zoo.store, "ark", "a:gap", split_zoo.features().space_fingerprint)
    with pytest.raises(UsageError, match=r"have not been compared on dataset zoo, .* featurepipe depth SOURCE --store"):
        train(split_zoo.store, nodes="recommended", out=tmp_path / "bundle", silent=True)
    split_zoo.write([*split_zoo.images("train", 30), *split_zoo.images("test", 10)], fields=OTHER)
    (other,) = {s.fingerprint for s in split_zoo.store.spaces()} - {split_zoo.store.spaces()[0].fingerprint}
    recommend(split_zoo.store, "zoo", "a:gap", split_zoo.store.spaces()[0].fingerprint)
    with pytest.raises(UsageError, match=f"the layers of {other} for classes have not been compared on dataset zoo"):
        train(split_zoo.store, nodes="recommended", backbone=other, out=tmp_path / "bundle", silent=True)
    with pytest.raises(UsageError, match="unknown column 'recommended'"):  # it is a column, not one of several
        train(split_zoo.store, nodes=["recommended", "a:gap"], backbone=other, out=tmp_path / "bundle", silent=True)
    assert not (tmp_path / "bundle").exists()


def told(store, capsys, tmp_path, **options):
    train(store, nodes="recommended", out=tmp_path / "bundle", dry_run=True, **options)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("the recommendation ")]


def test_a_comparison_of_some_other_classes_is_told(split_zoo, tmp_path, capsys):
    space = split_zoo.features().space_fingerprint
    recommend(split_zoo.store, "zoo", "a:gap", space)
    assert told(split_zoo.store, capsys, tmp_path) == []
    recommend(split_zoo.store, "zoo", "a:gap", space, classes=["cat", "dog", "fox", "gnu", "hen", "ibis"])
    assert told(split_zoo.store, capsys, tmp_path) == [
        "the recommendation is of other classes: 'emu' were not there then, 'fox', 'gnu', 'hen' and 1 more are not here now; if "
        "that matters, compare again with featurepipe depth, or name a column with --node"
    ]


def test_a_comparison_of_none_of_the_classes_is_refused(split_zoo, tmp_path):
    space = split_zoo.features().space_fingerprint
    recommend(split_zoo.store, "zoo", "a:gap", space, classes=["large", "small"], labels="sizes.csv")
    with pytest.raises(
        UsageError,
        match=r"compared on other classes with the labels of sizes.csv: 'large', 'small'; to train are 'cat', 'dog', 'emu'",
    ):
        train(split_zoo.store, nodes="recommended", out=tmp_path / "bundle", silent=True)
    assert not (tmp_path / "bundle").exists()


def test_a_comparison_with_other_labels_is_told(split_zoo, tmp_path, capsys):
    features = split_zoo.features()
    own = tmp_path / "own.csv"
    own.write_text(
        "id,label\n" + "".join(f"{i},{label}\n" for i, label in zip(features.ids, features.labels, strict=True))
    )
    recommend(split_zoo.store, "zoo", "a:gap", features.space_fingerprint, labels="own.csv")
    assert told(split_zoo.store, capsys, tmp_path, labels=own) == []
    assert told(split_zoo.store, capsys, tmp_path) == [
        "the recommendation was made with the labels of own.csv, not of the dataset; if these are others, compare again with "
        "featurepipe depth, or name a column with --node"
    ]
    recommend(split_zoo.store, "zoo", "a:gap", features.space_fingerprint)
    (line,) = told(split_zoo.store, capsys, tmp_path, labels=str(own))
    assert "with the labels of the dataset, not of own.csv" in line


def test_predicting_stops_the_network_at_the_recommended_node(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for kind in ("dark", "light"):
        (tmp_path / "album" / kind).mkdir(parents=True)
        for number in range(12):
            values = rng.integers(0, 120, (32, 32)) + (120 if kind == "light" else 0)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "album" / kind / f"{number}.png")
    store = FeatureStore(tmp_path / "store")
    extract(
        tmp_path / "album", store, backbone="lenet5", weights="none", nodes=["s2:avg2x2", "bottleneck"], precision="fp32",
        silent=True,
    )  # fmt: skip
    recommend(store, "album", "s2:avg2x2", store.spaces()[0].fingerprint, classes=["dark", "light"])
    train(store, nodes="recommended", out=tmp_path / "bundle", silent=True)
    assert read_bundle(tmp_path / "bundle").columns == ("s2:avg2x2",)

    kept = []
    forward = Engine._forward

    def spy(engine, batch):
        kept.append({name.split(".")[0] for name, _ in engine._network.named_modules()} - {""})
        return forward(engine, batch)

    monkeypatch.setattr(Engine, "_forward", spy)
    predict(tmp_path / "bundle", tmp_path / "album", tmp_path / "found.csv", silent=True)
    with (tmp_path / "found.csv").open(newline="") as file:
        right = [row["id"].split("/")[0] == row["label"] for row in csv.DictReader(file)]
    assert len(right) == 24
    assert np.mean(right) > 0.9
    assert kept
    assert all(names == {"c1", "s2"} for names in kept)  # nothing of c3, s4, c5, f6 and the output
