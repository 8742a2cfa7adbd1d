import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression

from featurepipe.heads.bundle import Bundle
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.snapshots import SCHEMA

FIELDS = {"dtype": "float32", "net": "tiny", "precision": "fp32"}
CENTRES = {"cat": [2, 0, 0], "dog": [0, 2, 0], "emu": [0, 0, 2]}


@dataclass(frozen=True)
class Image:
    """One row of a dataset; images with the same ``content`` are copies of one another."""

    id: str
    content: str
    label: str | None
    split: str | None = None
    is_usable: bool = True

    @property
    def key(self) -> bytes:
        return hashlib.sha256(self.content.encode()).digest()

    def features(self) -> np.ndarray:
        """Three values that follow from the content: near the centre of the class that it starts with, but noisy."""
        noise = np.random.default_rng(int.from_bytes(self.key[8:16])).normal(size=3)
        return (np.array(CENTRES[self.content.split("-")[0]]) + noise).astype(np.float32)


def keys64(images: list[Image]) -> np.ndarray:
    return np.array([int.from_bytes(image.key[:8], "little") for image in images], np.uint64)


def images(split: str | None, count: int = 40, start: int = 0) -> list[Image]:
    """``count`` different images of each class."""
    numbers = range(start, start + count)
    return [Image(f"{split}/{name}/{i}.png", f"{name}-{split}-{i}", name, split) for name in CENTRES for i in numbers]


class Datasets:
    """Writes datasets of made-up images, and bundles trained on some of them."""

    image, images, keys64 = staticmethod(Image), staticmethod(images), staticmethod(keys64)

    def __init__(self, folder: Path) -> None:
        self.store = FeatureStore(folder / "store")

    def write(self, rows: list[Image], name: str = "zoo", fields: dict[str, Any] = FIELDS) -> None:
        space = self.store.open_space(fields, backbone="tiny", notes={"aliases": {"bottleneck": "b"}})
        usable = list({row.key: row for row in rows if row.is_usable}.values())
        values = np.stack([row.features() for row in usable])
        run_id = self.store.new_run_id()
        with space.writer(run_id) as writer:
            writer.add(
                np.stack([np.frombuffer(row.key, np.uint8) for row in usable]), [row.id for row in usable],
                np.arange(len(usable)), np.arange(len(usable)), {"a:gap": values[:, :1], "b:gap": values[:, 1:]},
            )  # fmt: skip
        columns = {
            "id": [row.id for row in rows],
            "key": [row.key for row in rows],
            "label": [row.label for row in rows],
            "split": [row.split for row in rows],
            "size": [1] * len(rows),
            "mtime_ns": [1] * len(rows),
            "status": ["ok" if row.is_usable else "rejected" for row in rows],
            "reason": [None if row.is_usable else "truncated: ends early" for row in rows],
        }
        self.store.write_snapshot(name, run_id, pa.table(columns, schema=SCHEMA))

    def features(self, name: str = "zoo") -> FeatureSet:
        return self.store.features(name, node=["a:gap", "b:gap"])

    def bundle(self, trained_on: list[Image], fields: dict[str, Any] = FIELDS) -> Bundle:
        """A logistic head fitted to these images."""
        from featurepipe.store import fingerprint

        head = LogisticRegression().fit(np.stack([i.features() for i in trained_on]), [i.label for i in trained_on])
        return Bundle(
            backbone={"name": "tiny", "weights": "none", "seed": 3, "description": {}},
            space=fields,
            fingerprint=fingerprint(fields),
            columns=("a:gap", "b:gap"),
            family="logistic",
            params={},
            head=head,
            classes=tuple(head.classes_),
            temperature=None,
            metrics={},
            training={},
            seen=keys64(trained_on),
        )


@pytest.fixture
def zoo(tmp_path: Path) -> Datasets:
    return Datasets(tmp_path)
