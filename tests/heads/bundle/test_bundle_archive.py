"""Bundles that earlier versions wrote must always open, and predict the same."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from featurepipe.heads.bundle.bundle import read_bundle

ARCHIVES = Path(__file__).parents[2] / "archives"


@pytest.fixture
def v1(tmp_path):
    folder = shutil.copytree(ARCHIVES / "bundle-v1", tmp_path / "bundle-v1")
    with warnings.catch_warnings():  # that it was written with another scikit-learn
        warnings.filterwarnings("ignore", ".*was written with scikit-learn", UserWarning)
        return read_bundle(folder)


def test_version_1_opens_and_says_the_same(v1):
    assert v1.backbone == {"name": "tiny", "weights": "file", "seed": 0, "description": {"nodes": 3}}
    assert v1.space == {"architecture": "tiny", "dtype": "float16", "mean": [0.5, 0.25], "name": "ü", "scale": 0.1}
    assert v1.fingerprint == "52001f63bec333ce87a8a042d68c23544cdd4e5434c62379c8782f9395a522b4"
    assert v1.columns == ("layer1:gap", "flatten:gap")
    assert (v1.family, v1.params, v1.temperature) == ("xgboost", {"n_estimators": 2}, 1.25)
    assert v1.metrics == {"accuracy": {"value": 0.75, "low": 0.5, "high": None}}
    assert v1.training == {"dataset": "pets", "split": "train", "rows": 12}
    assert v1.seen.tolist() == [1, 2**63 + 1]
    assert v1.weights_file.stat().st_size == 104


def test_version_1_predicts_the_same(v1):
    x = np.arange(48, dtype=np.float32).reshape(12, 4) % 7
    expected = [
        [-1.059382, -1.056396, -1.185401],
        [-1.191025, -1.045894, -1.065043],
        [-1.066099, -1.166692, -1.066372],
        [-1.064936, -1.04606, -1.190955],
    ]
    np.testing.assert_allclose(v1.scores(x)[:4], expected, atol=2e-6)
    assert v1.predict(x)[:6].tolist() == ["dog", "dog", "cat", "dog", "ünïcorn", "ünïcorn"]
