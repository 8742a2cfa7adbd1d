"""CNNFeatures with a cluster: workers fill the store, and the features are those of one process."""

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone

from featurepipe.cnn_features import CNNFeatures
from featurepipe.errors import UsageError
from featurepipe.store import FeatureStore


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        values = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(values).save(root / f"{number:02d}.png")
    return sorted(map(str, root.iterdir()))


def transformer(store, **options):
    return CNNFeatures(
        "lenet5", "f6", weights="none", precision="fp32", store=store, workers=1, batch_size=8, **options
    )


def test_workers_compute_what_the_store_lacks(paths, dask_executor, cluster_address, tmp_path):
    here = transformer(tmp_path / "here").fit(paths).transform(paths)
    there = clone(transformer(tmp_path / "there", cluster=cluster_address)).fit(paths)
    np.testing.assert_array_equal(there.transform(paths), here)
    (run,) = FeatureStore(tmp_path / "there").runs()
    assert run["counts"]["computed"] == 40
    pids = {worker["pid"] for worker in run["cluster"]["workers"]}
    assert pids <= {worker.pid for worker in dask_executor.workers()}
    assert pids
    np.testing.assert_array_equal(there.transform(paths[::-1]), here[::-1])
    assert len(FeatureStore(tmp_path / "there").runs()) == 1  # nothing was left to compute


def test_without_a_store_there_is_nothing_to_share(paths, thread_executor):
    with pytest.raises(UsageError, match="give store=DIR"):
        transformer(None, cluster=thread_executor).fit(paths)
