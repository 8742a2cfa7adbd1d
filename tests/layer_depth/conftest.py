"""Features of made-up images in a store of their own, and small pictures of two kinds."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from featurepipe.layer_depth.probes import Data
from featurepipe.layer_depth.study import PRETRAINED, DepthColumn, Protocol, Study, settle
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.options import RoleOptions
from featurepipe.store.snapshots import SCHEMA

FIELDS = {"dtype": "float32", "net": "made-up", "precision": "fp32"}


class Album:
    """Writes datasets of given features, and studies of them."""

    def __init__(self, path: Path) -> None:
        self.store = FeatureStore(path)
        self._count = 0

    def write(
        self,
        name: str,
        columns: dict[str, np.ndarray],
        labels: Sequence[str | None],
        *,
        contents: Sequence[str] | None = None,
        splits: Sequence[str | None] | None = None,
        ids: Sequence[str] | None = None,
        fields: dict[str, Any] = FIELDS,
    ) -> str:
        """Writes rows whose ``contents`` tell images apart, by default with ids ``0.png`` onwards; the space's fingerprint."""
        count = len(labels)
        self._count += 1
        names = contents or [f"{name}-{i}" for i in range(count)]
        keys = [hashlib.sha256(content.encode()).digest() for content in names]
        first = sorted({key: row for row, key in reversed(list(enumerate(keys)))}.values())
        space = self.store.open_space(fields, backbone="made-up")
        run_id = self.store.new_run_id()
        known = space.index().contains(np.stack([np.frombuffer(keys[row], np.uint8) for row in first]))
        new = [row for row, there in zip(first, known, strict=True) if not there]
        if new:
            with space.writer(run_id) as writer:
                writer.add(
                    np.stack([np.frombuffer(keys[row], np.uint8) for row in new]), [f"{row}.png" for row in new],
                    np.arange(len(new)), np.arange(len(new)), {c: values[new] for c, values in columns.items()},
                )  # fmt: skip
        table = {
            "id": ids or [f"{row}.png" for row in range(count)],
            "key": keys,
            "label": list(labels),
            "split": list(splits) if splits is not None else [None] * count,
            "size": [1] * count,
            "mtime_ns": [1] * count,
            "status": ["ok"] * count,
            "reason": [None] * count,
        }
        self.store.write_snapshot(name, run_id, pa.table(table, schema=SCHEMA))
        return space.fingerprint

    def view(self, name: str, column: str) -> FeatureSet:
        return self.store.features(name, node=column)

    def data(self, name: str, column: str, shifted: str | None = None) -> Data:
        features = self.view(name, column)
        other = None if shifted is None else self.view(shifted, column)
        return Data(
            features, features.codes(), other, np.empty(0, int) if other is None else other.codes(features.classes)
        )

    def study(
        self,
        name: str,
        fingerprint: str,
        columns: Sequence[tuple[str, float, int]],
        *,
        heads: Sequence[str] = ("centroid",),
        folds: int | None = 2,
        seeds: int = 1,
        shifted: str | None = None,
        labels: Any = None,
        spaces: dict[str, str] | None = None,
        target_type: str = "multiclass",
        say: Callable[[str], None] | None = None,
        **roles: Any,
    ) -> Study:
        """A comparison of columns given as (name, share of the forward, width)."""
        found = [
            DepthColumn(column, *column.split(":"), depth, cost, width)
            for depth, (column, cost, width) in enumerate(columns)
        ]
        return settle(
            self.store, name, found, Protocol(tuple(heads), folds, seeds, target_type),
            spaces=spaces or {PRETRAINED: fingerprint}, shifted_dataset=shifted, labels=labels, roles=RoleOptions(**roles),
            say=say,
        )  # fmt: skip


@pytest.fixture
def album(tmp_path: Path) -> Album:
    return Album(tmp_path / "album")


def picture(kind: str, seed: int) -> Image.Image:
    """Noise with a bright half: the left one (``left``) or the upper one (``upper``); anything else is noise alone."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 120, (32, 32))
    if kind == "left":
        values[:, :16] += 100
    elif kind == "upper":
        values[:16] += 100
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of ``count`` pictures of each kind; the classes are called as given."""

    def write(
        name: str = "halves", count: int = 12, classes: Sequence[str] = ("left", "upper"), start: int = 0
    ) -> Path:
        for kind, label in zip(("left", "upper"), classes, strict=False):
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for number in range(start, start + count):
                picture(kind, number + (0 if kind == "left" else 10_000)).save(folder / f"{number:03d}.png")
        return tmp_path / name

    return write
