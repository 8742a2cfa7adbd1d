"""Made ``tests/archives/bundle-v1``. Kept to show what is in it; do not run it again: the files must stay as they are."""

import sys

import numpy as np
import safetensors.numpy
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from featurepipe.heads.boosted import BoostedTrees
from featurepipe.heads.bundle.bundle import Bundle, write_bundle
from featurepipe.heads.bundle.files import sha256_of

SPACE = {"architecture": "tiny", "dtype": "float16", "mean": [0.5, 0.25], "name": "ü", "scale": 0.1}


def main(path: str) -> None:
    """Writes the bundle."""
    x = np.arange(48, dtype=np.float32).reshape(12, 4) % 7
    y = np.array(["cat", "dog", "ünïcorn"])[np.arange(12) % 3]
    head = Pipeline(
        [("scale", StandardScaler()), ("head", BoostedTrees(2, max_depth=2, min_child_weight=0.1, n_jobs=1))]
    )
    weights = f"{path}.safetensors"
    safetensors.numpy.save_file({"conv.weight": np.arange(6, dtype=np.float32)}, weights)
    bundle = Bundle(
        backbone={"name": "tiny", "weights": "file", "seed": 0, "description": {"nodes": 3}},
        space=SPACE,
        fingerprint=sha256_of(SPACE),
        columns=("layer1:gap", "flatten:gap"),
        family="xgboost",
        params={"n_estimators": 2},
        head=head.fit(x, y),
        classes=("cat", "dog", "ünïcorn"),
        temperature=1.25,
        metrics={"accuracy": {"value": 0.75, "low": 0.5, "high": None}},
        training={"dataset": "pets", "split": "train", "rows": 12},
        seen=np.array([1, 2**63 + 1], np.uint64),
    )
    write_bundle(path, bundle, weights_file=weights)


if __name__ == "__main__":
    main(sys.argv[1])
