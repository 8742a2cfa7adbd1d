"""Real photos and the one backbone with real weights that every machine has."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from sklearn.datasets import load_sample_images

from featurepipe.backbones import Backbone, load_backbone


@pytest.fixture(scope="session")
def photos() -> list[torch.Tensor]:
    """scikit-learn's china.jpg and flower.jpg, uint8 (3, 427, 640), and cut-outs of them in other shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = load_sample_images().images
    china, flower = (torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images)
    cuts = [
        china[:, :300, :],
        flower[:, :, 100:400],
        china[:, 50:427, 200:],
        flower[:, 20:240, 20:300],
        china[:, :, 400:],
    ]
    return [china, flower, *cuts]


@functools.cache
def backbone_of(name: str) -> Backbone:
    """A network without weights, for tests that ask for its nodes: finding them takes up to a second, which is done once."""
    return load_backbone(name, "none")


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    return load_backbone("efficientnet_lite0")
