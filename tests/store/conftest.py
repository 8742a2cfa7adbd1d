import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.store import FeatureStore, Space
from featurepipe.store.snapshots import SCHEMA


def keys_for(names: list[str]) -> np.ndarray:
    """The key of an image whose bytes are its name."""
    digests = b"".join(hashlib.sha256(name.encode()).digest() for name in names)
    return np.frombuffer(digests, np.uint8).reshape(-1, 32)


def features_for(names: list[str], width: int = 4) -> np.ndarray:
    """A function of the key, exact in float16, so that any copy of a row has the same values."""
    return (keys_for(names)[:, :width].astype(np.float32) - 100) / 8


class Rows:
    """Writes rows whose values follow from their names."""

    keys = staticmethod(keys_for)
    features = staticmethod(features_for)

    @staticmethod
    def add(writer: Any, names: list[str], columns: tuple[str, ...] = ("a:gap",), width: int = 4) -> None:
        values = {column: features_for(names, width) for column in columns}
        writer.add(keys_for(names), names, np.arange(len(names)) + 10, np.arange(len(names)) + 1000, values)

    @classmethod
    def write(
        cls,
        store: FeatureStore,
        space: Space,
        names: list[str],
        *,
        columns: Any = ("a:gap",),
        **options: Any,
    ) -> str:
        run_id = store.new_run_id()
        with space.writer(run_id, **options) as writer:
            cls.add(writer, names, columns)
        return run_id

    @staticmethod
    def snapshot(store: FeatureStore, dataset: str, names: list[str], *, run_id: str = "", **columns: Any) -> str:
        run_id = run_id or store.new_run_id()
        n = len(names)
        values = {
            "id": names,
            "key": [bytes(key) for key in keys_for(names)],
            "label": [name[0] for name in names],
            "split": [None] * n,
            "size": list(range(10, 10 + n)),
            "mtime_ns": list(range(1000, 1000 + n)),
            "status": ["ok"] * n,
            "reason": [None] * n,
            **columns,
        }
        store.write_snapshot(dataset, run_id, pa.table(values, schema=SCHEMA))
        return run_id


@pytest.fixture
def rows() -> type[Rows]:
    return Rows


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "store")


@pytest.fixture
def space(store: FeatureStore) -> Space:
    fields = {"dtype": "float16", "net": "tiny"}
    return store.open_space(fields, backbone="tiny", notes={"aliases": {"bottleneck": "a"}})


@pytest.fixture
def flip_bit() -> Callable[[Path, int], None]:
    def flip(path: Path, offset: int) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))

    return flip
