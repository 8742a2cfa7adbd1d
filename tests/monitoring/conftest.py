"""A pile of images that changes from night to night; features are given, not computed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.store import FeatureStore
from featurepipe.store.snapshots import SCHEMA

FIELDS = {"dtype": "float32", "net": "made-up", "precision": "fp32"}


def key_of(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


class Pile:
    """Images by id; those with the same content are copies of one another and share their features."""

    def __init__(self, path: Path) -> None:
        self.store = FeatureStore(path)
        self.images: dict[str, dict[str, Any]] = {}

    def add(
        self,
        content: str,
        *,
        name: str = "",
        label: str | None = None,
        split: str | None = None,
        group: str | None = None,
    ) -> None:
        """Adds an image; its id is its content unless told otherwise."""
        self.images[name or content] = {"content": content, "label": label, "split": split, "group": group}

    def night(self, features: dict[str, dict[str, np.ndarray]] | None = None, fields: dict[str, Any] = FIELDS) -> str:
        """Writes features (column, content, values) that come with this night, and a snapshot; its run id."""
        run_id = self.store.new_run_id()
        space = self.store.open_space(fields, backbone="made-up", notes={"aliases": {"bottleneck": "b"}})
        for column, rows in (features or {}).items():
            with space.writer(self.store.new_run_id()) as writer:
                keys = np.stack([np.frombuffer(key_of(content), np.uint8) for content in rows])
                numbers = np.arange(len(rows))
                writer.add(keys, list(rows), numbers, numbers, {column: np.stack(list(rows.values())).astype("f4")})
        self.snapshot(run_id)
        return run_id

    def snapshot(self, run_id: str) -> None:
        rows = list(self.images.values())
        table = {
            "id": list(self.images),
            "key": [key_of(row["content"]) for row in rows],
            "label": [row["label"] for row in rows],
            "split": [row["split"] for row in rows],
            "size": [1] * len(rows),
            "mtime_ns": [1] * len(rows),
            "status": ["rejected" if row["content"].startswith("broken") else "ok" for row in rows],
            "reason": [None] * len(rows),
        }
        made = pa.table(table, schema=SCHEMA)
        if any(row["group"] for row in rows):
            made = made.append_column("column:patient", pa.array([row["group"] for row in rows], pa.string()))
        self.store.write_snapshot("pile", run_id, made)

    def add_rows(
        self, names: Sequence[str], values: np.ndarray, groups: Sequence[str | None] = ()
    ) -> dict[str, np.ndarray]:
        """Adds images; what ``night`` takes for one column."""
        for name, group in zip(names, groups or [None] * len(names), strict=True):
            self.add(name, group=group)
        return dict(zip(names, values, strict=True))


@pytest.fixture
def pile(tmp_path: Path) -> Pile:
    return Pile(tmp_path / "store")
