"""Numbers of images: by a file of predictions, by an object, and by a PyTorch module, as from the cached features."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from featurepipe.errors import BundleError, UsageError
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.families import make_head
from featurepipe.images.decode import decode
from featurepipe.prediction.image_classifier import ImageClassifier
from featurepipe.prediction.predict import predict, text

TARGET = {"type": "continuous", "column": "brightness", "interval": {"level": 0.9, "half_width": 2.5, "images": 50}}


@pytest.fixture
def numeric(album):
    """Makes a bundle that predicts a number of the album's images."""

    def make(name="ridge", target=TARGET, **params):
        features = album.features()
        values = features.read(np.float32)
        numbers = 2000 + 30 * values[:, 0].astype(np.float64) + np.arange(len(values))
        head = make_head(name, target_type="continuous", **params).fit(values, numbers)
        like = album.bundle()
        fields = {name: getattr(like, name) for name in like.__dataclass_fields__}
        return type(like)(**{**fields, "head": head, "classes": (), "family": name, "target": target})

    return make


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_of_images_has_numbers_and_limits(album, numeric, tmp_path, suffix):
    bundle = numeric()
    folder = write_bundle(tmp_path / "bundle", bundle)
    broken = album.root / "day" / "broken.png"
    broken.write_bytes(b"not a picture")
    try:
        record = predict(folder, album.root, tmp_path / f"out.{suffix}", max_rejects=1, workers=2, silent=True)
    finally:
        broken.unlink()
    lines = (tmp_path / f"out.{suffix}").read_text().splitlines()
    rows = list(csv.DictReader(lines)) if suffix == "csv" else [json.loads(line) for line in lines]
    found = {row["id"]: row for row in rows if not row["reason"]}
    expected = dict(zip(album.features().ids, bundle.numbers(album.features()), strict=True))
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        predicted, low, high = (float(found[name][column]) for column in ("predicted", "low", "high"))
        assert predicted == pytest.approx(number, abs=1e-3)
        assert (low, high) == (pytest.approx(predicted - 2.5), pytest.approx(predicted + 2.5))
    (bad,) = (row for row in rows if row["reason"])
    assert (bad["predicted"] or None, bad["low"] or None) == (None, None)
    assert record["counts"] == {"listed": 37, "predicted": 36, "rejected": 1}
    assert record["numbers"]["greatest"] == pytest.approx(max(expected.values()), abs=1e-3)
    assert record["target"] == TARGET
    assert record["labels"] == {}
    assert "brightness: numbers from" in text(record)
    json.dumps(record, allow_nan=False)


def test_without_an_interval_the_limits_are_empty(album, numeric, tmp_path):
    bundle = numeric(target={**TARGET, "interval": None})
    predict(bundle, album.root, tmp_path / "out.csv", workers=2, silent=True)
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert len(rows) == 36
    assert {(row["low"], row["high"]) for row in rows} == {("", "")}


def test_an_object_predicts_numbers_and_has_no_probabilities(album, numeric):
    bundle = numeric("kernel-ridge")
    found = ImageClassifier.load(bundle, workers=2)
    paths = album.paths()
    np.testing.assert_allclose(found.predict(paths[::-1]), bundle.numbers(album.features())[::-1], rtol=0, atol=1e-3)
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_allclose(again.predict(paths[:2]), found.predict(paths[:2]), rtol=0, atol=1e-3)
    assert repr(found) == "<ImageClassifier kernel-ridge on c3:gap + f6.1:gap of lenet5, the number brightness>"
    with pytest.raises(BundleError, match=r"predicts a number \(brightness\), it has no probabilities: use predict"):
        found.predict_proba(paths)
    with pytest.raises(BundleError, match=r"predicts a number \(brightness\), it has no classes"):
        bundle.scores(album.features())
    with pytest.raises(BundleError, match=r"predicts classes, no number"):
        album.bundle().numbers(album.features())


@pytest.mark.parametrize(("name", "pca"), [("ridge", None), ("ridge", 5), ("linear-svm", None)])
def test_a_linear_head_is_a_module_that_gives_the_number(album, numeric, name, pca):
    bundle = numeric(name, pca=pca)
    found = ImageClassifier.load(bundle, workers=1)
    module = found.to_torch()
    preprocessing = found._ready.backbone.preprocessing
    pictures = [
        preprocessing.resize_crop(decode(Path(path).read_bytes(), colour=preprocessing.colour))
        for path in album.paths()[:4]
    ]
    with torch.no_grad():
        numbers = module(torch.stack(pictures))
    assert numbers.shape == (4, 1)
    np.testing.assert_allclose(numbers[:, 0], bundle.numbers(album.features())[:4], rtol=1e-5)
    assert module.classes == []
    with pytest.raises(UsageError, match=r"a knn head is no linear layer, .* linear are: ridge, linear-svm"):
        ImageClassifier.load(numeric("knn"), workers=1).to_torch()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "ordinal"}, "is of a target that this version does not know"),
        ({**TARGET, "interval": {"level": 0.9}}, "its prediction interval is"),
        ({**TARGET, "interval": {"level": 0.9, "half_width": "wide", "images": 3}}, "its prediction interval is"),
        (None, "'classes' must be distinct text, at least one"),
    ],
)
def test_a_strange_target_is_refused(numeric, tmp_path, entry, message):
    from featurepipe.heads.bundle.files import read_manifest, write_manifest

    folder = write_bundle(tmp_path / "bundle", numeric())
    record = {
        name: value for name, value in read_manifest(folder).items() if name not in {"checksum", "format", "version"}
    }
    record = {**record, "target": entry} if entry else {name: v for name, v in record.items() if name != "target"}
    write_manifest(folder, record)
    with pytest.raises(BundleError, match=message):
        read_bundle(folder)
