"""Stores that earlier versions wrote must always open, and say the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from featurepipe.store import FeatureStore, verify_store

ARCHIVES = Path(__file__).parent.parent / "archives"


@pytest.fixture
def v1(tmp_path):
    return FeatureStore(shutil.copytree(ARCHIVES / "v1", tmp_path / "v1"), create=False)


def test_version_1_opens(v1):
    report = verify_store(v1)
    assert (report.problems, report.leftovers, report.parts, report.rows) == ([], [], 2, 4)
    features = v1.features("pets")
    assert features.ids.tolist() == ["train/cat/1.png", "train/dog/ü.png", "test/cat/1 copy.png", "test/dog/2.png"]
    assert (features.column, features.dtype, features.rejected, features.duplicates) == ("flatten:gap", "float32", 1, 1)
    x, y = features.numpy()
    expected = np.array([[0, 1, 2], [3, 4, 5], [0, 1, 2], [560009, 560010, 560011]], np.float32) / 8
    np.testing.assert_array_equal(x, expected)
    assert y.tolist() == ["cat", "dog", "cat", None]
    assert features.splits.tolist() == ["train", "train", "test", "test"]
    inner = v1.features("pets", node="layer1:gem", backbone="tiny")
    assert inner.dtype == np.float16
    np.testing.assert_array_equal(inner.read()[1], [-0.375, -0.5, -0.625])


def test_version_1_keeps_its_fingerprint_and_records(v1):
    (space,) = v1.spaces()
    assert space.fields == {"dtype": "float16", "architecture": "tiny", "scale": 0.1, "mean": [0.5, 0.25]}
    assert v1.open_space(space.fields, backbone="tiny").path == space.path
    assert space.rejects()["reason"].to_pylist() == ["empty: 0 bytes"]
    assert sorted(space.known_files(dataset="pets")["mtime_ns"].to_pylist()) == [1000, 1001, 1002, 1003]
    assert [run["status"] for run in v1.runs()] == ["done"]
    assert v1.new_run_id() > v1.runs()[0]["run_id"]
