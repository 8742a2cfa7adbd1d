"""Images of three kinds of stripes, extracted with a small random network."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featurepipe
from featurepipe.store import FeatureStore

KINDS = ("flat", "across", "down")


def picture(kind: str, seed: int) -> Image.Image:
    """Noise of 32 x 32 pixels on stripes across, stripes down, or none."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    stripes = np.where(np.arange(32) // 4 % 2, 60, 190)
    base = {
        "flat": np.full((32, 32), 120),
        "across": stripes[:, None].repeat(32, 1),
        "down": stripes[None].repeat(32, 0),
    }
    return Image.fromarray(np.clip(base[kind] + rng.normal(0, 12, (32, 32)), 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of 12 images of each kind, and a store of their features but for four of each; read only."""
    folder = tmp_path_factory.mktemp("stripes")
    for part, numbers in (("seen", range(8)), ("new", range(8, 12))):
        for kind in KINDS:
            place = folder / part / kind
            place.mkdir(parents=True)
            for number in numbers:
                picture(kind, number).save(place / f"{number}.png")
    store = folder / "store"
    options = {
        "backbone": "lenet5",
        "weights": "none",
        "seed": 3,
        "precision": "fp32",
        "dtype": "float32",
        "silent": True,
    }
    featurepipe.extract(folder / "seen", store, dataset="seen", **options)
    featurepipe.extract(folder / "new", folder / "reference", dataset="new", **options)
    return folder, store


@pytest.fixture
def kept(stripes: tuple[Path, Path]) -> FeatureStore:
    return FeatureStore(stripes[1])
