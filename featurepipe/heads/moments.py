"""Weighted mean, scatter and class means of features, in one pass over their blocks, wherever these are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, iterate, rows_per_block, working_dtype
from featurepipe.heads.devices import BLOCK_BYTES, HOST, OnDevice, namespace_of
from featurepipe.heads.row_shards import row_shards_of


@dataclass(frozen=True)
class Gram:
    """Second moments of features; everything is float64.

    Attributes:
        weight: Sum of the sample weights (the number of rows without weights).
        mean: (D,) weighted mean.
        scatter: (D, D) weighted sum of ``outer(x - mean, x - mean)``.
        class_weights: (K,) sum of the weights of each class; empty if no codes were given.
        class_means: (K, D) weighted mean of each class; zero for a class without weight.
        target_sums: (T,) weighted sum of each target; empty if none were given.
        target_products: (T, D) weighted sum of ``target * (x - mean)``.
    """

    weight: float
    mean: npt.NDArray[np.float64]
    scatter: npt.NDArray[np.float64]
    class_weights: npt.NDArray[np.float64]
    class_means: npt.NDArray[np.float64]
    target_sums: npt.NDArray[np.float64]
    target_products: npt.NDArray[np.float64]

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """(D,) weighted variance (divided by the weight, as ``numpy.var``)."""
        return np.diagonal(self.scatter) / self.weight

    def __add__(self, other: Gram) -> Gram:
        """Moments of the rows of both, as Chan, Golub & LeVeque (1983) join those of two samples."""
        weight, share, gap = _joined(self, other)
        scatter = self.scatter + other.scatter
        scatter += (self.weight * share) * np.outer(gap, gap)
        class_weights = self.class_weights + other.class_weights
        present = np.where(class_weights > 0, class_weights, 1)
        shares = (other.class_weights / present)[:, None]
        class_means = (1 - shares) * self.class_means + shares * other.class_means
        products = self.target_products + other.target_products
        products -= np.outer(self.target_sums, share * gap)  # each was about its own mean
        products += np.outer(other.target_sums, (1 - share) * gap)
        sums = self.target_sums + other.target_sums
        return Gram(weight, self.mean + share * gap, scatter, class_weights, class_means, sums, products)


def gram_of(
    features: Blocks | Array,
    codes: npt.NDArray[np.integer] | None = None,
    classes: int = 0,
    sample_weight: npt.NDArray[np.floating] | None = None,
    *,
    targets: npt.NDArray[np.floating] | None = None,
    dtype: npt.DTypeLike = np.float64,
    memory: int | str | None = None,
) -> Gram:
    """Computes the weighted moments of ``features`` in one pass.

    Columns are shifted by the mean of the first block before they are multiplied, and the sums are corrected at the end
    (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance"): no digits cancel when means are large.

    Args:
        features: (n, D) ``Blocks`` or array.
        codes: (n,) class number of each row, from 0 to ``classes - 1``; None to leave class sums out.
        classes: Number of classes.
        sample_weight: (n,) non-negative weights; None for one each.
        targets: (T, n) numbers whose sums and products with the features are wanted; centre them first, so that no digits
            cancel.
        dtype: Of the products within a block; sums over blocks are float64 always.
        memory: What the blocks alive at one time may take (bytes or "512MB"); the result's 8 * D * D bytes are extra.

    Raises:
        ValueError: A feature is NaN or infinite.
    """
    work = partial(_gram, classes=classes, dtype=dtype, memory=memory)
    found: Gram = row_shards_of(features).beside(codes, sample_weight, targets).reduce(work)
    return found


def _gram(
    blocks: Blocks,
    codes: npt.NDArray[np.integer] | None,
    sample_weight: npt.NDArray[np.floating] | None,
    targets: npt.NDArray[np.floating] | None,
    *,
    classes: int,
    dtype: npt.DTypeLike,
    memory: int | str | None,
) -> Gram:
    """The moments of one share of the rows."""
    width = blocks.shape[1]
    scatter, total = np.zeros((width, width)), np.zeros(width)
    class_weights, class_sums = np.zeros(classes), np.zeros((classes, width))
    numbers = 0 if targets is None else len(targets)
    target_sums, products = np.zeros(numbers), np.zeros((numbers, width))
    weight, shift = 0.0, None
    for place, block in iterate(blocks, memory=memory, dtype=dtype):
        if shift is None:
            shift = block.mean(axis=0, dtype=np.float64).astype(block.dtype)
        refuse_non_finite(block)
        centred = block - shift
        weights = np.ones(len(block)) if sample_weight is None else np.asarray(sample_weight[place], np.float64)
        weight += float(weights.sum())
        if codes is None:
            total += weights.astype(block.dtype) @ centred
        else:
            members = np.zeros((classes, len(block)), block.dtype)
            members[codes[place], np.arange(len(block))] = weights
            class_weights += np.bincount(codes[place], weights, minlength=classes)
            class_sums += members @ centred
        if targets is not None:
            amounts = targets[:, place] * weights
            target_sums += amounts.sum(axis=1)
            products += amounts.astype(block.dtype) @ centred
        if sample_weight is not None:
            centred *= np.sqrt(weights)[:, None].astype(block.dtype)
        scatter += centred.T @ centred
    if codes is not None:
        total = class_sums.sum(axis=0)
    about = np.zeros(width) if shift is None else shift
    return _finish(weight, total, scatter, class_weights, class_sums, target_sums, products, about)


@dataclass(frozen=True)
class Moments:
    """Weight, (D,) mean and (D,) variance of features' columns, float64."""

    weight: float
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    def __add__(self, other: Moments) -> Moments:
        """Moments of the rows of both; see ``Gram``."""
        weight, share, gap = _joined(self, other)
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * gap**2
        return Moments(weight, self.mean + share * gap, variance)


def moments_of(
    features: Blocks | Array,
    sample_weight: npt.NDArray[np.floating] | None = None,
    *,
    dtype: npt.DTypeLike | None = None,
    memory: int | str | None = None,
) -> Moments:
    """Computes the weighted mean and variance of every column in one pass; see ``gram_of``.

    Args:
        features: (n, D) ``Blocks`` or array.
        sample_weight: (n,) non-negative weights; None for one each.
        dtype: Of the products within a block; by default the one to compute in for such features.
        memory: What the blocks alive at one time may take.

    Raises:
        ValueError: A feature is NaN or infinite.
    """
    found: Moments = row_shards_of(features).beside(sample_weight).reduce(partial(_moments, dtype=dtype, memory=memory))
    return found


def _moments(
    blocks: Blocks,
    sample_weight: npt.NDArray[np.floating] | None,
    *,
    dtype: npt.DTypeLike | None,
    memory: int | str | None,
) -> Moments:
    """The moments of one share of the rows, summed where their blocks are."""
    weight, shift = 0.0, None
    total = squares = np.zeros(blocks.shape[1])
    device = blocks.device if isinstance(blocks, OnDevice) else HOST
    xp = device.namespace
    for place, block in _pieces(blocks, dtype, memory):
        refuse_non_finite(block)
        if shift is None:
            shift = device.put(xp.mean(block, axis=0, dtype=xp.float64), block.dtype)
        weights = np.ones(len(block)) if sample_weight is None else np.asarray(sample_weight[place], np.float64)
        centred = block - shift
        weight += float(weights.sum())
        there = device.put(weights, block.dtype)
        total = total + device.get(there @ centred)
        xp.square(centred, out=centred)
        squares = squares + device.get(there @ centred)
    offset = total / weight if weight else total
    variance = np.maximum(squares / (weight or 1) - offset**2, 0)
    return Moments(weight, offset + (0 if shift is None else device.get(shift)), variance)


def _pieces(blocks: Blocks, dtype: npt.DTypeLike | None, memory: int | str | None) -> Iterator[tuple[slice, Any]]:
    """The blocks where they are."""
    if not isinstance(blocks, OnDevice):
        return iterate(blocks, memory=memory, dtype=dtype)
    wanted = working_dtype(blocks.dtype) if dtype is None else np.dtype(dtype)
    return blocks.pieces(rows_per_block(blocks.shape[1], wanted, memory, most=BLOCK_BYTES), wanted)


def _joined(one: Gram | Moments, other: Gram | Moments) -> tuple[float, float, Array]:
    """The weight of both, the other's share in it, and from the one's mean to the other's."""
    weight = one.weight + other.weight
    return weight, other.weight / weight if weight else 0.0, other.mean - one.mean


def refuse_non_finite(block: Array) -> None:
    """Raises ``UsageError``, a ``ValueError``, if a value is NaN or infinite."""
    xp = namespace_of(block)
    if not xp.isfinite(xp.sum(block, dtype=xp.float64)) and not xp.all(xp.isfinite(block)):
        kind = "NaN" if xp.any(xp.isnan(block)) else "infinity"
        raise UsageError(f"Input X contains {kind}: a head learns from finite features only")


def _finish(
    weight: float,
    total: Array,
    scatter: Array,
    class_weights: Array,
    class_sums: Array,
    target_sums: Array,
    products: Array,
    shift: Array,
) -> Gram:
    """Moments about the mean from sums of rows that were shifted."""
    offset = total / weight if weight else total
    scatter -= weight * np.outer(offset, offset)
    means = np.zeros_like(class_sums)
    present = class_weights > 0
    means[present] = class_sums[present] / class_weights[present, None] + shift
    products -= np.outer(target_sums, offset)
    return Gram(weight, offset + shift, scatter, class_weights, means, target_sums, products)
