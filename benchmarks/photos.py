"""Photo-like JPEGs to measure with, made from scikit-learn's two sample photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def make_photos(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Writes ``count`` noisy crops of about 500x375 pixels, each another file, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    scenes = [np.asarray(scene) for scene in load_sample_images().images]
    for number in range(count):
        scene = scenes[number % len(scenes)]
        height, width = scene.shape[:2]
        side = int(min(height, width) * rng.uniform(0.45, 0.95))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        size = (500, 375) if rng.random() < 0.7 else (375, 500)
        crop = Image.fromarray(scene[top : top + side, left : left + side]).resize(size, Image.Resampling.LANCZOS)
        noisy = np.asarray(crop, np.float32) + rng.normal(0, 5, (size[1], size[0], 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)
    return folder
