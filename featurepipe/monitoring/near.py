"""Pairs of images whose features lie near each other: all such pairs, or of very many images almost all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import iterate
from featurepipe.monitoring.directions import Directions, turned, unit_vectors
from featurepipe.monitoring.faiss_index import (
    approximate_index,
    exact_index,
    faiss_threads,
    require_faiss,
    sample_size,
    within,
)
from featurepipe.progress import Progress, show

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet

EXACT = 50_000
"""Images up to which every pair is looked at."""

AUTO = "auto"
_AUTO_SHARE = 1 / 15
_WIDTH, _APPROXIMATE_WIDTH = 256, 128  # dimensions searched
_SAMPLE = 2048
_MOST_PAIRS = 5_000_000
_RESULT_BYTES = 256 << 20  # of what one search may return
_RESULT_ENTRY = 12
_PAIR_BYTES = 64 << 20  # of features of pairs that are compared at once
_PLANTED = 512

Positions = npt.NDArray[np.int64]
Single = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NearPairs:
    """Pairs of images that lie near each other.

    Attributes:
        distance: Cosine distance within which they lie.
        first: (p,) positions.
        second: (p,) positions, each larger than the one in ``first``.
        apart: (p,) cosine distance of each pair.
        recall: The share of such pairs that is found, as measured; 1 where every pair was looked at.
        exact: Whether every pair was looked at.
    """

    distance: float
    first: Positions
    second: Positions
    apart: Single
    recall: float
    exact: bool


def checked_near(near: float | str) -> float | str:
    """Returns what ``near`` may be.

    Raises:
        UsageError: It is neither ``auto`` nor between 0 and 1, or faiss is not installed.
    """
    if near != AUTO and not (isinstance(near, int | float) and 0 < near < 1):
        raise UsageError(
            f"near={near!r} is no cosine distance; give a number between 0 and 1, such as 0.03, or {AUTO!r}"
        )
    require_faiss()
    return near


def near_pairs(
    features: FeatureSet, near: float | str, *, seed: int = 0, threads: int | None = None, silent: bool = False
) -> NearPairs:
    """Finds the pairs of images within a cosine distance of each other.

    Up to 50,000 images every pair is looked at. Above, each image is compared with those of the 8 nearest of
    ``4 * sqrt(n)`` cells (an inverted file); which share of the pairs that finds is measured, by searching for 512
    images with directions turned by just the distance towards other images: the hardest pairs that count. The search is
    done in 256 (above 50,000 images 128) dimensions, in which nothing lies farther apart than it does; what it finds is
    then compared by the features themselves.

    Memory, beside the view's own: up to 50,000 images 1,024 bytes an image, above 264; and some 0.5 GB.

    Args:
        features: (n, D), of different images.
        near: The cosine distance, or ``auto``: a fifteenth of the median distance between two images at random. A
            photo encoded again as JPEG of quality 75, or at three quarters or twice its size, lies within it, and most pairs
            of different pictures do not (EfficientNet-Lite0's last features: photos at 0.05, emoji at 0.04, where 3 % have
            a look-alike so near, Fashion-MNIST at 0.035).
        seed: Of the sample behind ``auto``, the cells and the measured recall.
        threads: The most that faiss uses; by default what OMP_NUM_THREADS or the CPUs allow.
        silent: Show no progress.

    Raises:
        UsageError: There are more than 5 million pairs: the distance is too large.
    """
    count = len(features)
    rng = np.random.default_rng(seed)
    exact = count <= EXACT
    sample = _unit_rows(features, _drawn(count, _SAMPLE, rng))
    distance = _auto(sample) if isinstance(near, str) else float(near)
    _refuse_many(float((_all_apart(sample) <= distance).mean()) * count * (count - 1) / 2, distance, features)
    directions = Directions.fitted(sample, _WIDTH if exact else _APPROXIMATE_WIDTH)
    with faiss_threads(threads), show(count, "compare", silent=silent) as progress:
        if exact:
            found, recall = _exact_candidates(features, directions, distance, progress), 1.0
        else:
            index = _filled(features, directions, rng)
            recall = _recall(index, features, directions, distance, rng)
            found = _approximate_candidates(index, features, directions, distance, progress)
        first, second, apart = _verified(features, found, distance)
    return NearPairs(distance, first, second, apart, recall, exact)


def _drawn(count: int, most: int, rng: np.random.Generator) -> Positions:
    return np.sort(rng.choice(count, min(count, most), replace=False)).astype(np.int64)


def _unit_rows(features: FeatureSet, positions: Positions) -> Single:
    return unit_vectors(features.read(np.float32, rows=positions))


def _auto(sample: Single) -> float:
    """The distance for ``auto``; of images that are all alike, the least that can be told from rounding."""
    return max(_AUTO_SHARE * float(np.median(_all_apart(sample))), 1e-4)


def _all_apart(sample: Single) -> Single:
    """The cosine distances between all of (n, D) unit vectors; 1 where there is none."""
    apart: Single = 1 - (sample @ sample.T)[np.triu_indices(len(sample), 1)]
    return apart if len(apart) else np.ones(1, np.float32)


def _refuse_many(pairs: float, distance: float, features: FeatureSet) -> None:
    if pairs > _MOST_PAIRS:
        raise UsageError(
            f"more than {_MOST_PAIRS:,} pairs of images lie within near={distance:.3g} of each other in {features.column}: "
            "that is no sign of copies here; give a smaller distance"
        )


def _squared(distance: float) -> float:
    """The squared distance of unit vectors so far apart, and a little more than rounding can add."""
    return 2 * distance * (1 + 1e-3) + 1e-5


def _blocks(features: FeatureSet, directions: Directions, rows: int) -> Iterator[tuple[int, Single]]:
    """The place of each block's first row, and its projected directions."""
    for place, block in iterate(features, rows=rows, dtype=np.float32):
        yield place.start, directions.project(unit_vectors(block))


def _exact_candidates(
    features: FeatureSet, directions: Directions, distance: float, progress: Progress
) -> Iterator[tuple[Positions, Positions]]:
    """Compares each block with all that came before it, and with itself."""
    index = exact_index(directions.width)
    step = int(np.clip(_RESULT_BYTES // (_RESULT_ENTRY * len(features)), 64, 1024))
    for start, block in _blocks(features, directions, step):
        index.add(block)
        yield _ordered(*within(index, block, _squared(distance)), start)
        progress.advance(len(block))


def _approximate_candidates(
    index: Any, features: FeatureSet, directions: Directions, distance: float, progress: Progress
) -> Iterator[tuple[Positions, Positions]]:
    for start, block in _blocks(features, directions, 1024):
        yield _ordered(*within(index, block, _squared(distance)), start)
        progress.advance(len(block))


def _ordered(queries: Positions, found: Positions, start: int) -> tuple[Positions, Positions]:
    """Each pair once: those in which what was found comes before what was asked."""
    asked = queries + start
    kept = found < asked
    return found[kept], asked[kept]


def _filled(features: FeatureSet, directions: Directions, rng: np.random.Generator) -> Any:
    positions = _drawn(len(features), sample_size(len(features)), rng)
    sample = np.concatenate([block for _, block in _blocks(features.take(positions), directions, 4096)])
    index = approximate_index(sample, len(features), int(rng.integers(2**31)))
    for _, block in _blocks(features, directions, 4096):
        index.add(block)
    return index


def _recall(
    index: Any, features: FeatureSet, directions: Directions, distance: float, rng: np.random.Generator
) -> float:
    """The share of images that are found from a direction just so far away."""
    planted = _drawn(len(features), _PLANTED, rng)
    unit = _unit_rows(features, planted)
    moved = turned(unit, np.roll(unit, 1, axis=0), distance)
    queries, found = within(index, directions.project(moved), _squared(distance))
    return len(np.unique(queries[planted[queries] == found])) / len(planted)


def _verified(
    features: FeatureSet, candidates: Iterator[tuple[Positions, Positions]], distance: float
) -> tuple[Positions, Positions, Single]:
    """Compares candidates by all their values, some pairs at a time."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    count = 0
    step = max(16, _PAIR_BYTES // (16 * features.shape[1]))
    for first, second in candidates:
        for start in range(0, len(first), step):
            pair = first[start : start + step], second[start : start + step]
            apart = _apart(features, *pair)
            near = apart <= distance
            found.append((pair[0][near], pair[1][near], apart[near]))
            count += int(near.sum())
            _refuse_many(count, distance, features)
    first, second, apart = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, second, apart


def _apart(features: FeatureSet, first: Positions, second: Positions) -> Single:
    """(p,) cosine distances."""
    rows, place = np.unique(np.concatenate([first, second]), return_inverse=True)
    unit = _unit_rows(features, rows)
    apart: Single = 1 - np.einsum("ij,ij->i", unit[place[: len(first)]], unit[place[len(first) :]])
    return np.maximum(apart, 0)
