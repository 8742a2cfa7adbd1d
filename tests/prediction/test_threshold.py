"""A bundle's threshold labels images, from files as from the store."""

import csv
from dataclasses import replace

import numpy as np

from featurepipe.heads.bundle.bundle import write_bundle
from featurepipe.heads.statistics.screening import rates
from featurepipe.prediction.from_store import predict_features
from featurepipe.prediction.image_classifier import ImageClassifier
from featurepipe.prediction.predict import predict, text


def screened(album):
    """A bundle of two classes that calls only the seven surest images bright."""
    bundle = album.bundle(labels={"day": "dark", "night, late": "bright", "ümlaut": "bright"})
    likely = bundle.probabilities(album.features())[:, 0]
    value = float(np.sort(likely)[28:30].mean())  # between images
    threshold = {
        "positive": "bright", "negative": "dark", "value": value, "wish": "precision=0.9", "margin": False,
        "reached": True, "reason": "", "images": 36, "rates": rates(likely >= value, likely >= 0.5),
    }  # fmt: skip
    bundle = replace(bundle, threshold=threshold)
    expected = np.where(likely >= value, "bright", "dark")
    assert (expected != np.where(likely >= 0.5, "bright", "dark")).sum() > 0
    return bundle, likely, expected


def test_images_get_the_labels_of_the_threshold(album, tmp_path):
    bundle, likely, expected = screened(album)
    folder = write_bundle(tmp_path / "bundle", bundle)
    record = predict(folder, album.root, tmp_path / "out.csv", workers=2, silent=True)
    rows = {row["id"]: row for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines())}
    found = [rows[name] for name in album.features().ids]
    assert [row["label"] for row in found] == expected.tolist()
    own = np.where(expected == "bright", likely, 1 - likely)
    np.testing.assert_allclose([float(row["confidence"]) for row in found], own, atol=1e-4)
    assert record["labels"] == {"bright": (expected == "bright").sum(), "dark": (expected == "dark").sum()}
    assert record["threshold"] == bundle.threshold
    assert "threshold: bright from a probability of" in text(record)
    stored = predict_features(folder, album.store, tmp_path / "stored.csv", silent=True)
    assert stored["labels"] == record["labels"]


def test_an_object_labels_by_the_threshold(album):
    bundle, _, expected = screened(album)
    found = ImageClassifier.load(bundle, workers=2)
    assert found.predict(album.paths()).tolist() == expected.tolist()
