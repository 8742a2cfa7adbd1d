"""The engine of an extraction: said, kept, followed; both engines fill one feature space."""

import numpy as np
import pytest

from featurepipe.backbones.engine import OPENVINO, PYTORCH
from featurepipe.features import settings


@pytest.mark.slow
def test_engines_fill_one_space_and_the_next_run_follows(album, run):
    album.fill(6)
    first = run(album.root)
    (space,) = run.store.spaces()
    assert (first["machine"]["engine"]["engine"], space.notes.get("engine")) == (PYTORCH, None)
    known = run(album.root, engine=OPENVINO)
    assert known["counts"]["computed"] == 0
    assert "engine" not in known["machine"]

    album.fill(3, first=6)
    converted = run(album.root, engine=OPENVINO)["machine"]["engine"]
    assert (converted["engine"], bool(converted["version"])) == (OPENVINO, True)
    assert [found.fingerprint for found in run.store.spaces()] == [space.fingerprint]
    assert run.store.spaces()[0].notes["engine"] == OPENVINO

    album.fill(2, first=9)
    assert run(album.root)["machine"]["engine"]["engine"] == OPENVINO
    album.fill(1, first=11)
    assert run(album.root, engine=PYTORCH)["machine"]["engine"]["engine"] == PYTORCH
    assert run.store.spaces()[0].notes["engine"] == PYTORCH


def test_features_of_both_engines_agree(album, run, network):
    album.fill(8)
    name = network()
    options = {"backbone": name, "dtype": "float32", "nodes": ["conv:map", "act", "bottleneck"]}
    run(album.root, engine=PYTORCH, seed=0, **options)
    expected = {node: run.features(node=node) for node in options["nodes"]}
    run.path = run.path.with_name("other")
    assert run(album.root, engine=OPENVINO, **options)["machine"]["engine"]["engine"] == OPENVINO
    for node, features in expected.items():
        found = run.features(node=node)
        assert found.keys() == features.keys()
        for id_, values in features.items():
            assert np.linalg.norm(found[id_] - values) <= 1e-5 * np.linalg.norm(values)


def test_many_images_are_worth_a_conversion_and_few_are_not(album, run, monkeypatch):
    monkeypatch.setattr(settings, "ENOUGH_TO_CONVERT", 5)
    album.fill(4)
    assert run(album.root)["machine"]["engine"]["engine"] == PYTORCH
    album.fill(5, first=4)
    assert run(album.root)["machine"]["engine"]["engine"] == OPENVINO


@pytest.mark.parametrize("precision", ["bf16"])
def test_reduced_precision_stays_with_pytorch(album, run, precision):
    album.fill(2)
    assert run(album.root, precision=precision, engine=OPENVINO)["machine"]["engine"]["engine"] == PYTORCH
