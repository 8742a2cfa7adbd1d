"""Several labels of images: by a file of predictions, by an object, and by a PyTorch module, as from the cached features."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from featurepipe.errors import BundleError
from featurepipe.heads.bundle.bundle import Bundle, read_bundle, write_bundle
from featurepipe.heads.bundle.files import read_manifest, write_manifest
from featurepipe.heads.families import make_head
from featurepipe.images.decode import decode
from featurepipe.prediction.files import labels_batch
from featurepipe.prediction.image_classifier import ImageClassifier
from featurepipe.prediction.predict import predict, text

NAMES = ("bright", "odd", "re|d")
CALIBRATION = {
    "images": 50,
    "slopes": [2.0, 0.5, 1.0],
    "offsets": [0.1, -1.0, 0.0],
    "thresholds": [0.3, -0.2, 0.0],
    "uncalibrated": ["re|d"],
}


@pytest.fixture
def labelled(album):
    """Makes a bundle that predicts several labels of the album's images."""

    def make(name="logistic", calibration=CALIBRATION, names=NAMES, **params):
        values = album.features().read(np.float32)
        sums = values @ np.random.default_rng(0).standard_normal((values.shape[1], 2))
        above = sums > np.median(sums, axis=0)
        wanted = np.stack([above[:, 0], np.arange(len(values)) % 2, above[:, 1]], axis=1)
        head = make_head(name, target_type="multilabel", label_names=list(names), **params).fit(values, wanted)
        like = album.bundle()
        fields = {field: getattr(like, field) for field in like.__dataclass_fields__}
        target = {"type": "multilabel", "columns": list(names), "calibration": calibration}
        return Bundle(**{**fields, "head": head, "classes": tuple(names), "family": name, "target": target})

    return make


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_of_images_has_labels_and_probabilities(album, labelled, tmp_path, suffix):
    bundle = labelled()
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
    features = album.features()
    expected, probabilities = bundle.predict(features), bundle.probabilities(features)
    assert sorted(found) == sorted(features.ids)
    for row, name in enumerate(features.ids):
        given = found[name]["labels"] if suffix == "jsonl" else json.loads(found[name]["labels"])
        assert given == [label for label, has in zip(NAMES, expected[row], strict=True) if has]
        odd = found[name]["p(odd)"] if suffix == "csv" else found[name]["probabilities"]["odd"]
        assert float(odd) == pytest.approx(probabilities[row, 1], abs=1e-3)
    (bad,) = (row for row in rows if row["reason"])
    assert not bad["labels"]
    assert record["counts"] == {"listed": 37, "predicted": 36, "rejected": 1}
    assert record["labels"] == dict(zip(NAMES, expected.sum(axis=0).tolist(), strict=True))
    assert "bright (" in text(record)
    json.dumps(record, allow_nan=False)


def test_labels_are_joined_where_no_name_forbids_it(album, labelled):
    import pyarrow as pa

    bundle = labelled(names=("a", "b", "c"))
    scores = np.array([[1.0, 1, -1], [-9, -9, -9], [np.nan] * 3])
    batch = labels_batch(pa.array(["x", "y", "z"]), scores, pa.nulls(3, pa.string()), bundle)
    assert batch["labels"].to_pylist() == ["a|b", "", None]
    assert batch["p(c)"].to_pylist()[2] is None


@pytest.mark.parametrize("name", ["logistic", "linear-svm", "ridge", "knn"])
def test_an_object_predicts_labels_and_probabilities(album, labelled, tmp_path, name):
    bundle = read_bundle(write_bundle(tmp_path / "bundle", labelled(name)))
    found = ImageClassifier.load(bundle, workers=2)
    features = album.features()
    paths = album.paths()
    np.testing.assert_allclose(
        found.predict_proba(paths[::-1]), bundle.probabilities(features)[::-1], rtol=0, atol=2e-3
    )
    assert np.mean(found.predict(paths) == bundle.predict(features)) > 0.97  # but for rounding at a threshold
    assert "3 labels" in repr(found)
    (tmp_path / "text.png").write_text("no image")
    lenient = ImageClassifier.load(bundle, workers=2, on_reject="nan").predict([paths[0], tmp_path / "text.png"])
    np.testing.assert_array_equal(lenient, [found.predict(paths[:1])[0], [np.nan] * 3])


@pytest.mark.parametrize(("name", "pca"), [("logistic", None), ("linear-svm", 5), ("ridge", None)])
def test_a_linear_head_is_a_module_that_gives_the_scores(album, labelled, name, pca):
    bundle = labelled(name, pca=pca)
    found = ImageClassifier.load(bundle, workers=1)
    module = found.to_torch()
    preprocessing = found._ready.backbone.preprocessing
    pictures = [
        preprocessing.resize_crop(decode(Path(path).read_bytes(), colour=preprocessing.colour))
        for path in album.paths()[:4]
    ]
    with torch.no_grad():
        scores = module(torch.stack(pictures))
    np.testing.assert_allclose(scores, bundle.scores(album.features())[:4], rtol=1e-4, atol=1e-3)
    assert module.classes == list(NAMES)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"type": "multilabel", "columns": [], "calibration": {**CALIBRATION, "slopes": [1.0]}},
            "calibration does not fit",
        ),
        (
            {"type": "multilabel", "columns": [], "calibration": {**CALIBRATION, "offsets": ["a"] * 3}},
            "calibration does not fit",
        ),
        ({"type": "multilabel", "columns": [], "calibration": 1}, "calibration does not fit"),
        ({"type": "continuous", "column": "x", "interval": None}, "is of a target that this version does not know"),
    ],
)
def test_a_strange_calibration_is_refused(labelled, tmp_path, entry, message):
    folder = write_bundle(tmp_path / "bundle", labelled())
    record = {
        name: value for name, value in read_manifest(folder).items() if name not in {"checksum", "format", "version"}
    }
    write_manifest(folder, {**record, "target": entry})
    with pytest.raises(BundleError, match=message):
        read_bundle(folder)
