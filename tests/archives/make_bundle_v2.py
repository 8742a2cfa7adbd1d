"""Made ``tests/archives/bundle-v2``. Kept to show what is in it; do not run it again: the files must stay as they are."""

import sys

import numpy as np
from sklearn.linear_model import LogisticRegression

from featurepipe.heads.bundle.bundle import Bundle, write_bundle
from featurepipe.heads.bundle.files import sha256_of
from featurepipe.heads.statistics.screening import rates

SPACE = {"architecture": "tiny", "dtype": "float32", "name": "ü"}


def main(path: str) -> None:
    """Writes the bundle."""
    x = np.arange(48, dtype=np.float32).reshape(12, 4) % 7
    y = np.array(["healthy", "sick"])[(np.arange(12) % 3 == 0).astype(int)]
    head = LogisticRegression().fit(x, y)
    threshold = {
        "positive": "sick", "negative": "healthy", "value": 0.25, "wish": "recall=0.95", "margin": False, "reached": True,
        "reason": "", "images": 12, "rates": rates(head.predict_proba(x)[:, 1] >= 0.25, y == "sick"),
    }  # fmt: skip
    bundle = Bundle(
        backbone={"name": "tiny", "weights": "none", "seed": 0, "description": {}},
        space=SPACE,
        fingerprint=sha256_of(SPACE),
        columns=("layer1:gap", "flatten:gap"),
        family="logistic",
        params={},
        head=head,
        classes=("healthy", "sick"),
        temperature=None,
        metrics={},
        training={"dataset": "patients", "split": "train", "rows": 12},
        seen=np.array([1, 2**63 + 1], np.uint64),
        threshold=threshold,
    )
    write_bundle(path, bundle)


if __name__ == "__main__":
    main(sys.argv[1])
