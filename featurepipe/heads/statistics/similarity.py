"""How alike sets of features of the same images are: linear centred kernel alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurepipe.display import bytes_of
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, as_blocks, iterate, read_as, working_dtype
from featurepipe.heads.moments import refuse_non_finite
from featurepipe.heads.sampling import SomeRows, sampled_positions

Floats = npt.NDArray[np.float64]

_LARGEST_TILE = 1024  # rows and columns of a tile; larger ones multiply no faster
_SMALLEST_TILE = 16
_MEMORY = 512 << 20


def linear_cka(
    features: Sequence[Blocks | Array],
    *,
    rows: int | None = 5000,
    seed: int = 0,
    debiased: bool = True,
    memory: int | str | None = None,
) -> Floats:
    """Computes the linear CKA of every pair of several sets of features of the same images.

    Linear CKA (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited") is the
    Hilbert-Schmidt independence criterion of two Gram matrices between images, scaled to 1 for a set with itself. It
    does not change when features are rotated, shifted or multiplied by a number.

    HSIC is estimated without bias by default (Song et al. 2012, "Feature Selection via Dependence Maximization";
    Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?" use it so). The plain estimator counts what
    each image has in common with itself, and where there are more values than images it calls everything alike:
    it gives 0.9 for independent noise of 10 values an image, the unbiased one 0 on average. Unbiased values may
    therefore be a little below 0; they are not clipped.

    Gram matrices are made tile by tile, those of all sets at once, so that no (n, n) matrix is ever held. Products are
    made in ``working_dtype`` of centred and scaled values (float32 for float16 and float32 features, which changes the
    result by some 1e-8), all sums in float64.

    Args:
        features: L sets of (n, D_l) features, arrays or ``Blocks``, whose rows are the same n images.
        rows: The most images to use; where there are more, ``min(n, rows)`` of them are drawn, the same of each set.
            None for all; the work grows with the square.
        seed: Of the draw.
        debiased: Use the unbiased estimator of HSIC, else the plain one.
        memory: What the tiles and blocks may take together (bytes or "512MB"); by default 512 MiB.

    Returns:
        (L, L) symmetric, 1 on the diagonal. NaN where a set tells no image from another (constant features, say): it is
        like nothing, not even itself.

    Raises:
        UsageError: There is no set, they differ in their number of images, or there are fewer than 4.
        ValueError: A feature is NaN or infinite.
    """
    blocks = [as_blocks(one) for one in features]
    count = _checked_rows(blocks)
    chosen = sampled_positions(count, rows, seed)
    if chosen is not None:
        blocks = [SomeRows(one, chosen) for one in blocks]
        count = len(chosen)
    if count < 4:
        raise UsageError(f"CKA needs 4 images or more, these are {count}; give more rows")
    sets = [_prepared(one, memory) for one in blocks]
    return _scaled(_inner_products(sets, count, debiased, memory), sets, count)


@dataclass(frozen=True)
class _Set:
    """Features with what centres and scales them; ``norms`` (n,) are squared, after both, and 1 on average."""

    blocks: Blocks
    mean: Floats
    scale: float
    norms: Floats

    def read(self, place: slice) -> Array:
        """Rows less the mean (subtracted in float64: none of its digits cancel), over the scale."""
        dtype = working_dtype(self.blocks.dtype)
        rows = (read_as(self.blocks, dtype, place) - self.mean) / self.scale
        return rows.astype(dtype, copy=False)

    def tile(self, rows: Array, columns: Array, row_place: slice, column_place: slice, debiased: bool) -> Floats:
        """Some rows and columns of the centred Gram matrix.

        Unbiased, its diagonal is 0 and all its rows sum to 0 ("U-centred": Szekely & Rizzo 2014). Since the features
        are centred, each row of the Gram matrix sums to 0 already, and to minus its norm without the diagonal. So the
        row and total means to subtract follow from the norms.
        """
        tile: Floats = (rows @ columns.T).astype(np.float64, copy=False)
        if debiased:
            n = len(self.norms)
            tile += self.norms[row_place, None] / (n - 2) + self.norms[column_place] / (n - 2)
            tile -= self.norms.sum() / ((n - 1) * (n - 2))
            if row_place == column_place:
                np.fill_diagonal(tile, 0)
        return tile


def _checked_rows(blocks: list[Blocks]) -> int:
    if not blocks:
        raise UsageError("there is no set of features to compare; give one or more")
    counts = [one.shape[0] for one in blocks]
    if len(set(counts)) > 1:
        raise UsageError(f"sets of features must be of the same images, these have {counts} rows")
    return counts[0]


def _prepared(blocks: Blocks, memory: int | str | None) -> _Set:
    count, width = blocks.shape
    mean = np.zeros(width)
    for _, block in iterate(blocks, memory=memory):
        refuse_non_finite(block)
        mean += block.sum(axis=0, dtype=np.float64)
    mean /= count
    norms = np.empty(count)
    for place, block in iterate(blocks, memory=memory):
        centred = block - mean
        norms[place] = np.einsum("ij,ij->i", centred, centred)
    size = float(norms.mean())
    if size <= (1e-14 * float(np.linalg.norm(mean))) ** 2:  # what rounding the mean leaves of a constant
        size = 0.0
    if not size:
        return _Set(blocks, mean, np.inf, np.zeros(count))
    return _Set(blocks, mean, float(np.sqrt(size)), norms / size)


def _inner_products(sets: list[_Set], count: int, debiased: bool, memory: int | str | None) -> Floats:
    """(L, L) inner products of the centred Gram matrices, from the tiles on and above the diagonal."""
    step = _tile_size(sets, memory)
    places = [slice(start, min(count, start + step)) for start in range(0, count, step)]
    products = np.zeros((len(sets), len(sets)))
    for number, row_place in enumerate(places):
        for column_place in places[number:]:
            tiles = np.stack([_tile(one, row_place, column_place, debiased).reshape(-1) for one in sets])
            products += (tiles @ tiles.T) * (1 if row_place == column_place else 2)
    return products


def _tile(one: _Set, row_place: slice, column_place: slice, debiased: bool) -> Floats:
    rows = one.read(row_place)
    columns = rows if row_place == column_place else one.read(column_place)
    return one.tile(rows, columns, row_place, column_place, debiased)


def _tile_size(sets: list[_Set], memory: int | str | None) -> int:
    """The largest tile for which the tiles of all sets, twice while they are stacked, and two blocks of rows fit."""
    allowed = _MEMORY if memory is None else bytes_of(memory)
    widest = max(one.blocks.shape[1] for one in sets)
    size = _LARGEST_TILE
    while size > _SMALLEST_TILE and 8 * size * (2 * len(sets) * size + 4 * widest) > allowed:
        size //= 2
    return size


def _scaled(products: Floats, sets: list[_Set], count: int) -> Floats:
    """Products over the square roots of each set's own; NaN for a set whose Gram matrix is only rounding."""
    own = np.diagonal(products).copy()
    rounding = np.array([8 * np.finfo(working_dtype(one.blocks.dtype)).eps for one in sets])
    own[own <= (count * rounding) ** 2] = np.nan
    cka: Floats = np.minimum(products / np.sqrt(np.outer(own, own)), 1.0)  # rounding may leave it a little above
    return cka
