"""Evaluating on a cluster: the scores of a local evaluation, in the order of the rows, without their features."""

from pathlib import Path

import numpy as np
import pytest

from featurepipe.errors import ClusterError, StoreError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.store import FeatureSet


@pytest.fixture
def dataset(zoo):
    """Rows in splits of their own, some broken, some copies; a bundle trained on ``train``."""
    rows = [*zoo.images("train", 60), *zoo.images("test", 40)]
    rows += [
        zoo.image("x.png", "cat-test-1", "dog", "test"),
        zoo.image("broken.png", "none", "emu", "test", is_usable=False),
    ]
    rng = np.random.default_rng(0)
    zoo.write([rows[place] for place in rng.permutation(len(rows))])
    zoo.trained = zoo.bundle(zoo.images("train", 60))
    return zoo


def test_all_numbers_are_those_of_a_local_evaluation(dataset, thread_executor):
    here = evaluate(dataset.trained, dataset.store, bootstrap=50, silent=True)
    there = evaluate(dataset.trained, dataset.store, bootstrap=50, cluster=thread_executor, silent=True)
    assert here.pop("seconds") > 0
    assert there.pop("seconds") > 0
    assert there == here
    assert here["counts"]["scored"] == 121
    assert 0.5 < here["metrics"]["accuracy"]["value"] < 1


def test_scores_come_in_order_and_features_stay_away(dataset, thread_executor, monkeypatch):
    """Each of two workers scores its half; this process reads no feature."""
    scored, original = [], Bundle.probabilities

    def probabilities(self, features):
        with monkeypatch.context() as here:
            here.setattr(FeatureSet, "read", lambda *_, **__: pytest.fail("features were read by the client"))
            scored.append((features, original(self, features)))
        return scored[-1][1]

    monkeypatch.setattr(Bundle, "probabilities", probabilities)
    evaluate(dataset.trained, dataset.store, bootstrap=0, cluster=thread_executor, silent=True)
    ((features, found),) = scored
    assert len(features.row_shards().places) == 2
    np.testing.assert_allclose(found, original(dataset.trained, features.features), rtol=1e-12)


def test_a_store_that_no_worker_sees_is_an_error_by_name(dataset, thread_executor, monkeypatch):
    """Here the store's folder is one place for all, so what the client shows to workers is put elsewhere."""
    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: original(path.with_name("elsewhere"), text))
    with pytest.raises(ClusterError, match=r"no worker of tcp://.* can be used: .*does not see the store"):
        evaluate(dataset.trained, dataset.store, cluster=thread_executor, silent=True)


def test_a_part_that_is_gone_is_an_error_of_ours(dataset, thread_executor, monkeypatch):
    original = Bundle.probabilities

    def probabilities(self, features):
        for part in dataset.store.path.glob("spaces/*/parts/*.h5"):
            part.unlink()
        return original(self, features)

    monkeypatch.setattr(Bundle, "probabilities", probabilities)
    with pytest.raises(StoreError, match="is gone"):
        evaluate(dataset.trained, dataset.store, cluster=thread_executor, silent=True)
