"""Second moments of features that scores of whole sets follow from: (D, D) where rows are many, (n, n) where few."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import linalg

from featurepipe.heads.blocks import Array, Blocks, iterate
from featurepipe.heads.gram import gram_of, refuse_non_finite

Floats = npt.NDArray[np.float64]


def second_moments(blocks: Blocks, codes: Array, classes: int, memory: int | str | None = None) -> SecondMoments:
    """Computes the smaller of both forms.

    Args:
        blocks: (n, D) features. Where D <= n they are read in blocks, else at once, which takes less than (D, D).
        codes: (n,) class of each image, from 0 to ``classes - 1``.
        classes: Number of classes.
        memory: What the blocks alive at one time may take.

    Raises:
        ValueError: A feature is NaN or infinite.
    """
    if blocks.shape[1] > blocks.shape[0]:
        return _Kernel(blocks, codes, classes)
    return _Scatter(blocks, codes, classes, memory)


class SecondMoments(Protocol):
    """What the scores need to know of features: from second moments (D, D), or from a Gram matrix (n, n)."""

    images: int
    width: int
    counts: Floats  # (K,) images of the classes that have any

    @property
    def centred(self) -> Floats:
        """Scatter of the features, or inner products between the images; of centred features."""

    def spectrum(self) -> tuple[Floats, Floats]:
        """(r,) squared singular values of the features as they are, (K, r) squared projections of 0/1 labels."""

    def between(self) -> tuple[Floats, Floats]:
        """Left and right (K, m) for which ``left (a centred + b I)^-1 right'`` is that of the class means."""

    def quartic(self) -> float:
        """Sum over the images of the centred features' norms to the fourth."""


class _Scatter:
    """For D <= n: mean, scatter and class means, in one pass."""

    def __init__(self, blocks: Blocks, codes: Array, classes: int, memory: int | str | None) -> None:
        self.images, self.width = blocks.shape
        gram = gram_of(blocks, codes, classes, memory=memory)
        present = gram.class_weights > 0
        self.counts: Floats = gram.class_weights[present]
        self.centred: Floats = gram.scatter
        self._mean, self._means = gram.mean, gram.class_means[present]
        self._blocks, self._memory = blocks, memory

    def spectrum(self) -> tuple[Floats, Floats]:
        plain = self.centred + self.images * np.outer(self._mean, self._mean)
        values, vectors = eigen(plain)
        return values, (self._means * self.counts[:, None] @ vectors) ** 2 / values

    def between(self) -> tuple[Floats, Floats]:
        offsets = (self._means - self._mean) * np.sqrt(self.counts / self.images)[:, None]
        return offsets, offsets

    def quartic(self) -> float:
        total = 0.0
        for _, block in iterate(self._blocks, memory=self._memory, dtype=np.float64):
            centred = block - self._mean
            total += float((np.einsum("ij,ij->i", centred, centred) ** 2).sum())
        return total


class _Kernel:
    """For D > n: inner products between images."""

    def __init__(self, blocks: Blocks, codes: Array, classes: int) -> None:
        self.images, self.width = blocks.shape
        features = blocks.read(np.float64)
        refuse_non_finite(features)
        mean = features.mean(axis=0)
        features = features - mean
        self.centred: Floats = features @ features.T
        along_mean = features @ mean
        self._shift: Floats = along_mean[:, None] + along_mean + mean @ mean
        members = np.zeros((classes, self.images))
        members[codes, np.arange(self.images)] = 1
        self._members = members[members.any(axis=1)]
        self.counts: Floats = self._members.sum(axis=1)

    def spectrum(self) -> tuple[Floats, Floats]:
        values, vectors = eigen(self.centred + self._shift)
        return values, (self._members @ vectors) ** 2

    def between(self) -> tuple[Floats, Floats]:
        weights = self._members / np.sqrt(self.counts * self.images)[:, None]
        return weights @ self.centred, weights

    def quartic(self) -> float:
        return float((np.diagonal(self.centred) ** 2).sum())


def eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues and vectors of a positive semi-definite matrix, without those that are only rounding."""
    values, vectors = linalg.eigh(matrix, driver="evd")
    real = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return values[real], vectors[:, real]
