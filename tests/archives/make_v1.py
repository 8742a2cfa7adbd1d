"""Made ``tests/archives/v1``. Kept to show what is in it; do not run it again: the files must stay as they are."""

import hashlib
import sys

import numpy as np
import pyarrow as pa

from featurepipe.store import FeatureStore

NAMES = ["train/cat/1.png", "train/dog/ü.png", "test/cat/1 copy.png", "test/dog/2.png"]


def main(path: str) -> None:
    """Writes the store."""
    store = FeatureStore(path)
    space = store.open_space(
        {"dtype": "float16", "architecture": "tiny", "scale": 0.1, "mean": [0.5, 0.25]},
        backbone="tiny",
        notes={"aliases": {"bottleneck": "flatten"}},
    )
    keys = [hashlib.sha256(name[-5:].encode()).digest() for name in ("1.png", "ü.png", "1.png", "2.png")]
    matrix = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    values = np.arange(12, dtype=np.float32).reshape(4, 3) / 8
    values[2] = values[0]
    run_id = store.new_run_id()
    with space.writer(run_id, dataset="pets") as writer:
        writer.add(
            matrix[:2], NAMES[:2], [10, 11], [1000, 1001], {"flatten:gap": values[:2], "layer1:gem": -values[:2]}
        )
        writer.commit()
        wide = values[2:] + np.float32([[0], [70000]])
        writer.add(matrix[2:], NAMES[2:], [10, 13], [1002, 1003], {"flatten:gap": wide, "layer1:gem": -values[2:]})
    reject = {
        "key": None,
        "id": "train/dog/0.png",
        "size": 0,
        "mtime_ns": 1,
        "reason": "empty: 0 bytes",
        "run_id": run_id,
    }
    space.add_rejects([reject], dataset="pets")
    table = pa.table(
        {
            "id": [*NAMES, "train/dog/0.png"],
            "key": pa.array([*keys, None], pa.binary(32)),
            "label": ["cat", "dog", "cat", None, "dog"],
            "split": ["train", "train", "test", "test", "train"],
            "size": [10, 11, 10, 13, 0],
            "mtime_ns": [1000, 1001, 1002, 1003, 1],
            "status": ["ok"] * 4 + ["rejected"],
            "reason": [None] * 4 + ["empty: 0 bytes"],
        }
    )
    store.write_snapshot("pets", run_id, table)
    store.write_run({"run_id": run_id, "status": "done", "dataset": "pets"})


if __name__ == "__main__":
    main(sys.argv[1])
