"""Bundles for the tests of ``featurepipe.heads.bundle.bundle``."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featurepipe.heads.bundle.bundle import Bundle, write_bundle
from featurepipe.heads.bundle.files import read_manifest, write_manifest

SPACE = {"architecture": "tiny", "dtype": "float16", "preprocessing": {"mean": [0.5, 0.25], "crop": 8}, "scale": 0.1}


@pytest.fixture(scope="session")
def digits():
    """Features (500, 64) and text labels of ten classes."""
    x, y = load_digits(return_X_y=True)
    return x[:500].astype(np.float32), np.array([f"digit {code}" for code in y[:500]])


@pytest.fixture(scope="session")
def bundle_of():
    """Makes a bundle around a fitted head; keywords replace its other fields."""

    def make(head, **changes):
        text = json.dumps(SPACE, sort_keys=True, separators=(",", ":"))
        bundle = Bundle(
            backbone={"name": "tiny", "weights": "none", "seed": 3, "description": {"input": [3, 8, 8]}},
            space=SPACE,
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
            columns=("layer1:gap", "flatten:gap"),
            family="logistic",
            params={"C": 0.5},
            head=head,
            classes=tuple(str(name) for name in head.classes_),
            temperature=1.7,
            metrics={"test": {"images": 100, "accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}}},
            training={"dataset": "digits", "split": "train", "rows": 500},
            seen=np.array([1, 2**64 - 1, 2**63], np.uint64),
        )
        return dataclasses.replace(bundle, **changes)

    return make


@pytest.fixture(scope="session")
def bundle(digits, bundle_of):
    """A bundle of a scaler and a logistic regression."""
    return bundle_of(make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(*digits))


@pytest.fixture
def folder(bundle, tmp_path):
    """A bundle that has been written."""
    return write_bundle(tmp_path / "made" / "bundle", bundle)


@pytest.fixture
def forge():
    """Changes a bundle as somebody would who wants it to be believed: the checksums are right again afterwards."""

    def forged(folder, *, record=None, **contents):
        manifest = read_manifest(folder)
        for keyword, content in contents.items():
            name = keyword.replace("_", ".")
            (folder / name).write_bytes(content)
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if record is not None:
            record(manifest)
        write_manifest(folder, manifest)
        return folder

    return forged


class Stored:
    """Features with labels that are read some rows at a time, as a FeatureSet; notes the most rows read at once."""

    def __init__(self, array, labels=None):
        self.array, self.labels, self.most = array, labels, 0
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, dtype=None, *, rows=None):
        found = np.array(self.array if rows is None else self.array[rows], dtype or self.dtype)
        self.most = max(self.most, len(found))
        return found


@pytest.fixture(scope="session")
def stored():
    """Makes blocks, like a FeatureSet, of an array and labels."""
    return Stored


@pytest.fixture(params=[np.asarray, Stored], ids=["array", "blocks"])
def wrap(request):
    """Gives features as an array, and as blocks."""
    return request.param
