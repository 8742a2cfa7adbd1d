"""Bundles that earlier versions wrote must always open, and predict the same."""

import importlib
import io
import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from featurepipe.heads import make_head
from featurepipe.heads.bundle.audit import FORMER, OURS
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.heads.bundle.head import head_files, load_head

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


def test_version_2_opens_and_labels_by_its_threshold(tmp_path):
    folder = shutil.copytree(ARCHIVES / "bundle-v2", tmp_path / "bundle-v2")
    with warnings.catch_warnings():  # that it was written with another scikit-learn
        warnings.filterwarnings("ignore", ".*was written with scikit-learn", UserWarning)
        v2 = read_bundle(folder)
    found = v2.threshold
    assert (found["positive"], found["value"], found["wish"], found["reached"]) == ("sick", 0.25, "recall=0.95", True)
    x = np.arange(48, dtype=np.float32).reshape(12, 4) % 7
    likely = v2.probabilities(x)[:, 1]
    np.testing.assert_allclose(likely[:4], [0.399232, 0.053871, 0.411613, 0.450548], atol=2e-6)
    assert v2.predict(x).tolist() == ["sick" if share >= 0.25 else "healthy" for share in likely]
    assert (likely[v2.predict(x) == "sick"] < 0.5).any()


NOW = {name.rpartition(".")[2]: name for name in OURS}


@pytest.mark.parametrize("former", FORMER)
def test_pickles_find_estimators_whose_modules_have_moved(former):
    module, _, name = former.rpartition(".")
    found = pickle.loads(f"c{module}\n{name}\n.".encode())
    assert f"{found.__module__}.{name}" == NOW[name]
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        importlib.import_module(module).Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("logistic", {"out_of_core": True}),
        ("linear-svm", {"out_of_core": True, "pca": 2}),
        ("ridge", {"out_of_core": True}),
        ("lda", {"out_of_core": True}),
    ],
)
def test_heads_written_before_their_modules_moved_open_and_say_the_same(tmp_path, family, options):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(60, 4)).astype(np.float32)
    head = make_head(family, **options).fit(x, np.where(x[:, 0] + x[:, 1] > 0, "b", "a"))
    content, named = as_written_before(head_files(head)["head.skops"])
    assert named
    loaded = load_head({"head.skops": content}, tmp_path)
    assert type(loaded) is type(head)
    np.testing.assert_array_equal(loaded.decision_function(x), head.decision_function(x))


def as_written_before(content):
    """A skops file in which our estimators have the names of before, and how many have."""
    former = {NOW[name.rpartition(".")[2]]: name.rpartition(".")[0] for name in FORMER}
    count = 0

    def renamed(value):
        nonlocal count
        if isinstance(value, dict):
            full = f"{value.get('__module__')}.{value.get('__class__')}"
            count += full in former
            value = {key: renamed(inner) for key, inner in value.items()}
            return value | ({"__module__": former[full]} if full in former else {})
        return [renamed(inner) for inner in value] if isinstance(value, list) else value

    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, json.dumps(renamed(json.loads(data))) if name == "schema.json" else data)
    return written.getvalue(), count
