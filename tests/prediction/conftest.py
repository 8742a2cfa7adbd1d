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
from featurepipe.heads.linear.linear_map import linear_map
from featurepipe.store import FeatureStore

CLASSES = ("day", "night, late", "ümlaut")
NODES = ("c3", "bottleneck")
MOVED = 1e-6
"""How far an image's features may move with the company of its batch, of its largest one. An Intel Xeon with AMX moves them by
2e-7; float32 keeps 6e-8 of each sum."""


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
def score_moves(album: Album, exact_album: Album) -> Callable[..., Any]:
    """Returns how far the scores of a linear head may differ between two runs, float64 (N, 1).

    Features that moved by ``moved`` stay what they are when rounded to float16, but for those at a border between two values:
    they change by a step, and the head's weights carry that to the scores. The head itself computes in float32.
    """

    def moves(bundle: Bundle, *, moved: float = MOVED) -> Any:
        assert list(exact_album.features().ids) == list(album.features().ids)
        x = np.asarray(exact_album.features(bundle.columns).read(), np.float64)
        by = moved * np.abs(x).max(axis=1, keepdims=True)
        dtype = np.dtype(bundle.space["dtype"])
        low, high = ((x + sign * by).astype(dtype).astype(np.float64) for sign in (-1, 1))
        weight, _ = linear_map(bundle.head)
        found = ((high - low + 2.0**-22 * np.abs(x)) @ np.abs(weight).T).max(axis=1, keepdims=True)
        assert np.median(found) < 1e-2 * np.ptp(x @ weight.T), "a bound of this size proves nothing"
        return found

    return moves


@pytest.fixture
def written(album: Album, tmp_path: Path) -> Callable[..., Path]:
    """Writes a bundle, perhaps with other fields, and returns its folder."""

    def write(**changes: Any) -> Path:
        write_bundle(tmp_path / "bundle", replace(album.bundle(), **changes))
        return tmp_path / "bundle"

    return write
