"""Nearest-neighbour indices of faiss: an exact one, and one that looks into the likely cells only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError

Single = npt.NDArray[np.float32]
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
        raise UsageError("near-duplicates are found with faiss; run: pip install 'featurepipe[duplicates]'") from error
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


def exact_index(width: int) -> Any:
    """An index that compares with every vector; 4 bytes a value."""
    return require_faiss().IndexFlatL2(width)


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
