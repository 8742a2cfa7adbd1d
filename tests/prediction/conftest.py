"""A small album in three classes, its features in a store, and bundles trained on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featurepipe.extraction.extract import extract
from featurepipe.heads.bundle.bundle import Bundle, write_bundle
from featurepipe.store import FeatureStore

CLASSES = ("day", "night, late", "ümlaut")
NODES = ("c3", "bottleneck")


def picture(seed: int) -> Image.Image:
    """A smooth coloured picture that no other seed gives, of a brightness that tells its class."""
    rng = np.random.default_rng(seed)
    low = (0, 60, 120)[seed % 3]
    coarse = rng.integers(low, low + 130, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((44, 36), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Album:
    """A folder of images, a store of their features, and what was learned from them."""

    root: Path
    store: Path

    def features(self, node: Any = NODES) -> Any:
        return FeatureStore(self.store).features("album", node)

    def bundle(self, head: Any = None, *, node: Any = NODES, labels: Any = None, family: str = "logistic") -> Bundle:
        """Trains ``head`` on the stored features."""
        features = self.features(node)
        values, own = features.numpy()
        own = own if labels is None else np.asarray([labels[label] for label in own], object)
        head = head or make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        head.fit(values, own)
        (space,) = FeatureStore(self.store).spaces()
        return Bundle(
            backbone={"name": "lenet5", "weights": "none", "seed": 0, "description": space.notes["backbone"]},
            space=space.fields,
            fingerprint=space.fingerprint,
            columns=features.columns,
            family=family,
            params={},
            head=head,
            classes=tuple(str(name) for name in head.classes_),
            temperature=None,
            metrics={},
            training={},
            seen=np.unique(features.keys64),
        )

    def paths(self) -> list[str]:
        return [str(self.root / name) for name in self.features().ids]


def make_album(folder: Path, dtype: str) -> Album:
    root = folder / "album"
    for number in range(36):
        path = root / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    extract(root, folder / "store", backbone="lenet5", weights="none", nodes=NODES, precision="fp32", dtype=dtype,
            workers=2, silent=True)  # fmt: skip
    return Album(root, folder / "store")


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Album:
    return make_album(tmp_path_factory.mktemp("album"), "float16")


@pytest.fixture(scope="session")
def exact_album(tmp_path_factory: pytest.TempPathFactory) -> Album:
    return make_album(tmp_path_factory.mktemp("exact"), "float32")


@pytest.fixture
def written(album: Album, tmp_path: Path) -> Callable[..., Path]:
    """Writes a bundle, perhaps with other fields, and returns its folder."""

    def write(**changes: Any) -> Path:
        write_bundle(tmp_path / "bundle", replace(album.bundle(), **changes))
        return tmp_path / "bundle"

    return write
