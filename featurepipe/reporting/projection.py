"""Features brought down to two dimensions, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from featurepipe.store import FeatureSet


POINTS = 2000
"""Images shown at most; t-SNE takes seconds for so many."""

_COMPONENTS = 50
_FEWEST_FOR_TSNE = 10

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Points in two dimensions.

    Attributes:
        ids: Of the n images shown, in random order.
        labels: Of each image.
        total: Images they were drawn from.
        places: (n, 2) by method: ``PCA``, and ``t-SNE`` where there are images enough.
        kept: Share of the variance in the two principal components.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    total: int
    places: dict[str, Array]
    kept: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        places = {method: np.round(place, 4).tolist() for method, place in self.places.items()}
        return {
            "ids": list(self.ids),
            "labels": list(self.labels),
            "total": self.total,
            "places": places,
            "kept": self.kept,
        }

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Projection:
        """What ``as_dict`` gave."""
        places = {method: np.asarray(place, np.float64) for method, place in found["places"].items()}
        return Projection(tuple(found["ids"]), tuple(found["labels"]), found["total"], places, found["kept"])


def project(
    ids: Sequence[str],
    features: npt.ArrayLike,
    labels: Sequence[Any] | None,
    *,
    total: int | None = None,
    seed: int = 0,
) -> Projection:
    """Places a random sample of images by their features: principal components, and t-SNE of the first 50 of them.

    Features are centred, not scaled. t-SNE (van der Maaten and Hinton, 2008; Barnes-Hut, 2014) starts from the principal
    components, with a perplexity of 30 or a third of the images.

    Args:
        ids: (n,).
        features: (n, D), finite.
        labels: (n,), or None.
        total: How many images these were drawn from, if they are a sample already.
        seed: Of the sample and of t-SNE.
    """
    values = np.asarray(features)
    chosen = np.random.default_rng(seed).permutation(len(values))[:POINTS]
    sample = values[chosen].astype(np.float64)
    components, kept = _principal(sample)
    places = {"PCA": components[:, :2]}
    if len(sample) >= _FEWEST_FOR_TSNE:
        places["t-SNE"] = _tsne(components, seed)
    return Projection(
        tuple(str(ids[k]) for k in chosen),
        tuple("" if labels is None or labels[k] is None else str(labels[k]) for k in chosen),
        len(values) if total is None else total,
        places,
        kept,
    )


def _principal(sample: Array) -> tuple[Array, float]:
    """The first principal components, at least two columns."""
    from sklearn.decomposition import PCA

    count = min(_COMPONENTS, *sample.shape)
    model = PCA(count, random_state=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # no variance at all leaves no ratios
        components = model.fit_transform(sample)
    kept = float(np.nan_to_num(model.explained_variance_ratio_)[:2].sum())
    missing = max(0, 2 - components.shape[1])
    return np.pad(components, ((0, 0), (0, missing))), kept


def _tsne(components: Array, seed: int) -> Array:
    from sklearn.manifold import TSNE

    start = components[:, :2] / (np.std(components[:, 0]) or 1.0) * 1e-4
    model = TSNE(perplexity=min(30.0, (len(components) - 1) / 3), init=start, random_state=seed, n_jobs=1)
    placed: Array = model.fit_transform(components.astype(np.float32)).astype(np.float64)
    return placed


def mapped(view: FeatureSet) -> FeatureSet:
    """Draws as many rows as a map shows, at random but always the same of as many rows, in their order."""
    return view.take(np.sort(np.random.default_rng(0).permutation(len(view))[:POINTS]))
