"""Code that a store names runs only when the user has named it or says so; see also tests/prediction for bundles."""

import json
import sys

import numpy as np
import pytest

from featurepipe.errors import FeaturepipeError, UsageError
from featurepipe.extraction.extract import extract
from featurepipe.jobs.job import Job
from featurepipe.layer_depth.depth import depth
from featurepipe.store import FeatureStore
from featurepipe.training.train import train

NAME = "of_a_stranger:make"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Features of LeNet, of which the store says that they are of ``of_a_stranger:make`` and its weights file."""
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
    extract(images, tmp_path / "store", backbone="lenet5", weights="none", dataset="d", precision="fp32", silent=True)
    (path,) = (tmp_path / "store" / "spaces").glob("*/space.json")
    record = json.loads(path.read_text())
    record["backbone"] = NAME
    record["notes"]["backbone"] |= {"weights": "file:net.pt", "random": False}
    path.write_text(json.dumps(record))
    (tmp_path / "of_a_stranger.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return FeatureStore(tmp_path / "store")


LABELS = {str(number): "ab"[number % 2] for number in range(24)}


def compare(store, **options):
    depth(store, labels=LABELS, folds=2, seeds=1, jobs=1, silent=True, **options)


def learn(store, **options):
    ids = store.snapshot("d")["id"].to_pylist()
    labels = {name: "ab"[number % 2] for number, name in enumerate(ids)}
    train(
        store, head="centroid", out="bundle", labels=labels, weights="net.pt", calibration=False, silent=True, **options
    )


@pytest.mark.parametrize("command", [compare, learn])
def test_a_module_that_a_store_names_runs_only_with_consent(command, store, tmp_path, monkeypatch):
    for options in ({}, {"trust_code": {"another:make"}}, {"backbone": store.spaces()[0].name}):
        with pytest.raises(UsageError, match=r"the store's network is of_a_stranger:make.*trust_code=True"):
            command(store, **options)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("options", [{"trust_code": True}, {"trust_code": {NAME}}, {"backbone": NAME}])
@pytest.mark.parametrize("command", [compare, learn])
def test_a_module_that_the_user_names_or_trusts_does_run(command, options, store, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "of_a_stranger", raising=False)
    with pytest.raises(FeaturepipeError, match="of_a_stranger"):  # it has no function `make`
        command(store, **options)
    assert (tmp_path / "ran").exists()


def test_a_job_trusts_the_networks_that_its_file_names_and_no_others():
    features = ({"backbone": "lenet5"}, {"backbone": NAME})
    job = Job.model_validate({"name": "j", "store": "s", "source": {"path": "p"}, "features": features}, strict=False)
    assert job.networks == {"lenet5", NAME}
