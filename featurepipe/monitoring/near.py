"""Images whose features lie near each other: all such pairs, of very many images almost all; and the nearest of some."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_info, threadpool_limits

from featurepipe.errors import UsageError, pip_install
from featurepipe.heads.blocks import Blocks, iterate
from featurepipe.heads.moments import refuse_non_finite
from featurepipe.heads.row_shards import RowShards, remote_row_shards
from featurepipe.progress import Progress, show

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


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
    """Divides rows (n, D) by their lengths; rows of zeros stay.

    Raises:
        UsageError: A value is NaN or infinite.
    """
    refuse_non_finite(rows)
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    unit: Single = rows / np.maximum(lengths, np.finfo(np.float32).tiny).astype(np.float32)[:, None]
    return unit


def turned(unit: Single, towards: Single, distance: float) -> Single:
    """Turns each of (n, D) unit vectors towards another one until it is a cosine distance away from where it was."""
    sideways = towards - np.einsum("ij,ij->i", towards, unit)[:, None] * unit
    cosine = 1 - distance
    moved: Single = (cosine * unit + np.sqrt(1 - cosine**2) * unit_vectors(sideways)).astype(np.float32)
    return moved


Positions = npt.NDArray[np.int64]

_CELLS_A_ROOT = 4  # cells for the square root of the number of vectors
_TRAINED_ON = 40  # vectors a cell
_LOOKED_INTO = 8  # cells
_ROUNDS = 8


def require_faiss() -> Any:
    """Imports faiss.

    Raises:
        UsageError: It is not installed; says how to.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UsageError(
            f"an index of near images, and near copies among more than {EXACT:,} images, need faiss; run: "
            f"{pip_install('duplicates')}"
        ) from error
    return faiss


@contextmanager
def faiss_threads(threads: int | None) -> Iterator[None]:
    """While the block runs, faiss uses at most so many threads; None leaves it to OMP_NUM_THREADS and the CPUs allowed."""
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(before if threads is None else min(threads, before))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class EveryRow:
    """Vectors that are all compared with, block by block, by matrix products; 4 bytes a value."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Single, Single]] = []  # vectors, and half of their squared lengths

    def add(self, block: Single) -> None:
        """Adds vectors (n, d)."""
        self._blocks.append((block, np.einsum("ij,ij->i", block, block) / 2))

    def within(self, queries: Single, squared: float) -> tuple[Positions, Positions]:
        """Finds the vectors within a squared distance of each query (q, d): numbers of queries, and of vectors."""
        least = (np.einsum("ij,ij->i", queries, queries) - squared) / 2
        asked, found, start = [], [], 0
        for block, halves in self._blocks:
            rows, columns = np.nonzero(queries @ block.T - halves >= least[:, None])
            asked.append(rows)
            found.append(columns + start)
            start += len(block)
        return np.concatenate(asked), np.concatenate(found)


@contextmanager
def _threads(threads: int | None, values: int, *, exact: bool) -> Iterator[None]:
    """While the block runs, the search uses at most so many threads; None leaves it to OMP_NUM_THREADS and the CPUs allowed."""
    if not exact:
        with faiss_threads(threads):
            yield
        return
    before = max((library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"), default=1)
    wanted = 1 if values <= _FEW_VALUES else before  # threads wait for each other where products are small
    with threadpool_limits(wanted if threads is None else min(threads, wanted), user_api="blas"):
        yield


def cells(count: int) -> int:
    """How many cells an index of so many vectors is cut into."""
    return max(1, round(_CELLS_A_ROOT * math.sqrt(count)))


def sample_size(count: int) -> int:
    """How many vectors its cells are learned from."""
    return min(count, _TRAINED_ON * cells(count))


def approximate_index(sample: Single, count: int, seed: int) -> Any:
    """An inverted file (Sivic & Zisserman 2003; Johnson et al. 2019, "Billion-scale similarity search with GPUs").

    Vectors lie in cells around centres, and a search looks into the cells of the nearest few; 2 bytes a value (float16), and
    8 a vector.

    Args:
        sample: (n, d) vectors to learn the cells from: ``sample_size(count)``.
        count: Vectors that will be added.
        seed: Of the clustering.
    """
    faiss = require_faiss()
    number = min(cells(count), len(sample))
    centres = faiss.IndexFlatL2(sample.shape[1])
    index = faiss.IndexIVFScalarQuantizer(
        centres, sample.shape[1], number, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2
    )
    index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = _ROUNDS, seed, 1
    index.cp.max_points_per_centroid = _TRAINED_ON
    index.train(sample)
    index.nprobe = _LOOKED_INTO
    return index


def within(index: Any, queries: Single, squared: float) -> tuple[Positions, Positions]:
    """Finds the vectors within a squared distance of each query: numbers of queries, and of vectors."""
    limits, _, found = index.range_search(queries, squared)
    counts = np.diff(limits.astype(np.int64))
    return np.repeat(np.arange(len(queries)), counts), found.astype(np.int64)


EXACT = 50_000
"""Images up to which every pair is looked at."""

AUTO = "auto"
_AUTO_SHARE = 1 / 15
_FEW_VALUES = 1_000_000  # searched, up to which one thread is used
_WIDTH, _APPROXIMATE_WIDTH = 256, 128  # dimensions searched
_SAMPLE = 2048
_MOST_PAIRS = 5_000_000
_RESULT_BYTES = 256 << 20  # of what one search may return
_RESULT_ENTRY = 12
_PAIR_BYTES = 64 << 20  # of features of pairs that are compared at once
_PLANTED = 512


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
        UsageError: It is neither ``auto`` nor between 0 and 1.
    """
    if near != AUTO and not (isinstance(near, int | float) and 0 < near < 1):
        raise UsageError(
            f"near={near!r} is no cosine distance; give a number between 0 and 1, such as 0.03, or {AUTO!r}"
        )
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
        threads: The most that the search uses; by default what OMP_NUM_THREADS or the CPUs allow.
        silent: Show no progress.

    Raises:
        UsageError: There are more than 5 million pairs: the distance is too large; or more than 50,000 images, and faiss is
            not installed.
    """
    count = len(features)
    rng = np.random.default_rng(seed)
    exact = count <= EXACT
    if not exact:
        require_faiss()
    sample = _unit_rows(features, _drawn(count, _SAMPLE, rng))
    distance = _auto(sample) if isinstance(near, str) else float(near)
    if count < 2:
        none = np.empty(0, np.int64)
        return NearPairs(distance, none, none, np.empty(0, np.float32), 1.0, exact)
    _refuse_many(float((_all_apart(sample) <= distance).mean()) * count * (count - 1) / 2, distance, features)
    directions = Directions.fitted(sample, _WIDTH if exact else _APPROXIMATE_WIDTH)
    with _threads(threads, count * directions.width, exact=exact), show(count, "compare", silent=silent) as progress:
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
    every = EveryRow()
    step = int(np.clip(_RESULT_BYTES // (_RESULT_ENTRY * len(features)), 64, 1024))
    for start, block in _blocks(features, directions, step):
        every.add(block)
        yield _ordered(*every.within(block, _squared(distance)), start)
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


_SLACK = 16  # candidates beyond those asked for, which single precision may have put in the wrong order
_ALIKE = 0.99  # share of the rows' mean square that is their mean's: above it the mean is taken from them
_FEW = 64  # scores of a block that are picked out one by one
_REFINED_BYTES = 64 << 20  # of candidates that are compared in double precision at once


@dataclass(frozen=True)
class Nearest:
    """The nearest rows of each of q queries, nearest first; of equally near ones the earlier row.

    Attributes:
        positions: (q, k) of the rows; -1 where there are fewer than k.
        apart: (q, k) float64 distances; infinite where there is no row.
    """

    positions: Positions
    apart: npt.NDArray[np.float64]


def nearest(
    features: Blocks,
    queries: Single,
    top: int,
    *,
    distance: str = "cosine",
    without: Positions | None = None,
    progress: Progress | None = None,
) -> Nearest:
    """Finds the nearest rows of some queries by comparing each with every row, block by block.

    Blocks are compared in single precision; the nearest, and a few more, are then compared in double precision. Memory: two
    blocks of 16 MB, and 4 bytes a query and row of a block. Rows that are spread over a cluster's workers are compared there.

    Args:
        features: (n, D).
        queries: (q, D).
        top: How many rows for each query, k.
        distance: ``cosine`` (1 for a row of zeros) or ``euclidean``.
        without: (q,) positions of the row that is the query itself; -1 for none. It is passed over.
        progress: Told the rows that have been compared.

    Raises:
        UsageError: A value is NaN or infinite.
    """
    elsewhere = remote_row_shards(features)
    if elsewhere is not None:
        return _nearest_elsewhere(elsewhere, queries, top, distance, without, progress)
    kept = min(top + _SLACK, features.shape[0])
    wanted = unit_vectors(queries) if distance == "cosine" else queries
    refuse_non_finite(wanted)
    best = np.full((len(queries), kept), -np.inf, np.float32)
    place = np.full((len(queries), kept), -1, np.int64)
    centre: Single | None = None
    for rows, block in iterate(features, dtype=np.float32):
        values = unit_vectors(block) if distance == "cosine" else block
        refuse_non_finite(values)
        centre = common_centre(values) if rows.start == 0 else centre
        scores = _scores(wanted, values, distance, centre)
        if without is not None:
            inside = np.flatnonzero((without >= rows.start) & (without < rows.stop))
            scores[inside, without[inside] - rows.start] = -np.inf
        _merge(best, place, scores, rows.start)
        if progress is not None:
            progress.advance(len(block))
    return refined(features, queries, np.where(np.isneginf(best), -1, place), top, distance=distance)


def _nearest_elsewhere(
    shards: RowShards, queries: Single, top: int, distance: str, without: Positions | None, progress: Progress | None
) -> Nearest:
    """Of the nearest rows of each shard the nearest of all; their distances are of double precision, and the same as here."""
    work = partial(_nearest_of_shard, queries=queries, top=top, distance=distance, without=without)
    parts = shards.beside(np.arange(shards.rows)).map(work)
    positions, apart = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    order = np.lexsort((positions, apart))[:, :top]
    if progress is not None:
        progress.advance(shards.rows)
    return Nearest(np.take_along_axis(positions, order, axis=1), np.take_along_axis(apart, order, axis=1))


def _nearest_of_shard(
    shard: Blocks, rows: Positions, *, queries: Single, top: int, distance: str, without: Positions | None
) -> tuple[Positions, npt.NDArray[np.float64]]:
    """(q, k) the nearest rows of a shard, by their positions among all, and their distances."""
    first, count = int(rows[0]), len(rows)
    inside = None if without is None else np.where((without >= first) & (without < first + count), without - first, -1)
    found = nearest(shard, queries, top, distance=distance, without=inside)
    return np.where(found.positions >= 0, found.positions + first, -1), found.apart


def common_centre(values: Single) -> Single | None:
    """What single precision must take from rows (n, D) that are all alike, lest their differences drown; None where it need not.

    Distances are told by inner products, whose rounding grows with the lengths of the rows, not with what is between them.
    """
    mean = values.mean(axis=0, dtype=np.float64)
    square = np.einsum("ij,ij->", values, values, dtype=np.float64) / max(1, len(values))
    return mean.astype(np.float32) if mean @ mean > _ALIKE * square else None


def _scores(wanted: Single, values: Single, distance: str, centre: Single | None) -> Single:
    """(q, m), larger for nearer rows; of unit vectors where the distance is that of cosines."""
    if centre is not None:
        wanted, values = wanted - centre, values - centre
    elif distance == "cosine":
        found: Single = wanted @ values.T
        return found
    euclidean: Single = 2 * (wanted @ values.T) - np.einsum("ij,ij->i", values, values)
    return euclidean


def _merge(best: Single, place: Positions, scores: Single, start: int) -> None:
    """Keeps the best of each query among those so far and those of a block.

    After the first blocks few rows are better than what a query has, and are picked out: to sort the scores of all of them in
    part takes as long as to compute them.
    """
    kept = best.shape[1]
    is_better = scores > best.min(axis=1)[:, None]
    count = is_better.sum(axis=1)
    for queries in (np.flatnonzero((count > 0) & (count <= _FEW)), np.flatnonzero(count > _FEW)):
        if not len(queries):
            continue
        if count[queries[0]] <= _FEW:
            found, columns = _picked(scores, is_better, queries, count)
        else:
            found = scores[queries]
            columns = np.argpartition(found, -min(kept, found.shape[1]), axis=1)[:, -kept:]
            found = np.take_along_axis(found, columns, axis=1)
        together = np.concatenate([best[queries], found], axis=1)
        where = np.concatenate([place[queries], columns + start], axis=1)
        chosen = np.argpartition(together, -kept, axis=1)[:, -kept:]
        best[queries] = np.take_along_axis(together, chosen, axis=1)
        place[queries] = np.take_along_axis(where, chosen, axis=1)


def _picked(
    scores: Single, is_better: npt.NDArray[np.bool_], queries: Positions, count: Positions
) -> tuple[Single, Positions]:
    """(p, c) scores and columns of the better ones of some queries, filled up with minus infinity."""
    rows, columns = np.nonzero(is_better[queries])
    counts = count[queries]
    slot = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.full((len(queries), int(counts.max())), -np.inf, np.float32)
    number = np.zeros(found.shape, np.int64)
    found[rows, slot], number[rows, slot] = scores[queries[rows], columns], columns
    return found, number


def refined(features: Blocks, queries: Single, candidates: Positions, top: int, *, distance: str) -> Nearest:
    """Compares candidates by all their values in double precision.

    Args:
        features: (n, D).
        queries: (q, D).
        candidates: (q, c) positions of rows, different ones; -1 for none.
        top: How many of them to keep, k.
        distance: As for ``nearest``.
    """
    count = min(top, candidates.shape[1])
    positions, apart = np.empty((len(queries), count), np.int64), np.empty((len(queries), count))
    step = max(1, _REFINED_BYTES // (8 * features.shape[1] * max(1, candidates.shape[1])))
    for start in range(0, len(queries), step):
        here = candidates[start : start + step]
        far = _far(features, queries[start : start + step], here, distance)
        order = np.lexsort((here, far))[:, :count]
        positions[start : start + step] = np.take_along_axis(here, order, axis=1)
        apart[start : start + step] = np.take_along_axis(far, order, axis=1)
    return Nearest(positions, apart)


def _far(features: Blocks, queries: Single, candidates: Positions, distance: str) -> npt.NDArray[np.float64]:
    """(q, c) distances; infinite where there is no candidate."""
    far = np.full(candidates.shape, np.inf)
    rows, place = np.unique(candidates[candidates >= 0], return_inverse=True)
    values = features.read(np.float32, rows=rows).astype(np.float64)
    number = np.broadcast_to(np.arange(len(queries))[:, None], candidates.shape)[candidates >= 0]
    asked = queries.astype(np.float64)
    if distance == "cosine":
        values, asked = (
            one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), np.finfo(np.float64).tiny)
            for one in (values, asked)
        )
        products = np.einsum("ij,ij->i", asked[number], values[place])
        far[candidates >= 0] = np.maximum(1 - products, 0)
    else:
        far[candidates >= 0] = np.linalg.norm(asked[number] - values[place], axis=1)
    return far
