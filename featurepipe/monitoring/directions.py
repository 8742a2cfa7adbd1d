"""Features as directions, in few enough dimensions to search: never farther apart than they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Single = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Directions:
    """Makes features unit vectors and projects them onto orthonormal axes.

    The squared distance of unit vectors is twice their cosine distance. A projection shortens distances and lengthens
    none, so that whatever lies within a distance lies within it here as well; what else does is told apart by the
    features themselves.

    Attributes:
        axes: (D, d) orthonormal columns; None where the features are narrow enough as they are.
        width: d.
    """

    axes: Single | None
    width: int

    @classmethod
    def fitted(cls, sample: Single, most: int) -> Directions:
        """Finds the axes along which a sample of unit vectors (n, D) spreads most.

        They are its principal components, from the (n, n) inner products, which are fewer than (D, D) for wide features.
        """
        width = sample.shape[1]
        if width <= most:
            return cls(None, width)
        centred = (sample - sample.mean(axis=0)).astype(np.float64)
        values, vectors = np.linalg.eigh(centred @ centred.T)
        kept = np.flatnonzero(values > max(values[-1], 1e-12) * 1e-7)[-most:]
        axes = centred.T @ (vectors[:, kept] / np.sqrt(values[kept]))
        return cls(axes.astype(np.float32), len(kept)) if len(kept) else cls(np.eye(width, 1, dtype=np.float32), 1)

    def project(self, unit: Single) -> Single:
        """Projects unit vectors (n, D): (n, d)."""
        return np.ascontiguousarray(unit if self.axes is None else unit @ self.axes)


def unit_vectors(rows: Single) -> Single:
    """Divides rows (n, D) by their lengths; rows of zeros stay."""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    unit: Single = rows / np.maximum(lengths, np.finfo(np.float32).tiny).astype(np.float32)[:, None]
    return unit


def turned(unit: Single, towards: Single, distance: float) -> Single:
    """Turns each of (n, D) unit vectors towards another one until it is a cosine distance away from where it was."""
    sideways = towards - np.einsum("ij,ij->i", towards, unit)[:, None] * unit
    cosine = 1 - distance
    moved: Single = (cosine * unit + np.sqrt(1 - cosine**2) * unit_vectors(sideways)).astype(np.float32)
    return moved
