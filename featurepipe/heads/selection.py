"""Which values of long feature vectors a task needs: scores of columns by a regularised fit, and a step that keeps some columns.

After Head2Toe (Evci, Dumoulin, Larochelle and Mozer, "Head2Toe: Utilizing Intermediate Representations for Better Transfer
Learning", ICML 2022): a linear map from all of a network's intermediate outputs is fitted under a penalty, a column counts as
much as the norm of its row of coefficients, and another head is fitted on the columns that count most. A column here is one value
of the feature vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import (
    Array,
    Blocks,
    MappedBlocks,
    as_blocks,
    is_blocks,
    iterate,
    rows_per_block,
    working_dtype,
)
from featurepipe.heads.preprocessing import BlockScaler
from featurepipe.heads.row_shards import RowShards, row_shards_of

Floats = npt.NDArray[np.float64]

PENALTY = 0.0003
"""Of the scoring fit, for each column: a direction is penalised as if it had this share of all columns' variance more."""

TOLERANCE = 1e-3
"""Of the gradient's norm, as a share of that at zero, at which the scoring fit stops: an order needs no more."""

MOST_PASSES = 50
"""Over the rows in one scoring fit."""


def column_scores(
    features: Blocks | Array,
    targets: Array,
    sample_weight: Array | None = None,
    *,
    penalty: float = PENALTY,
    tol: float = TOLERANCE,
    max_passes: int = MOST_PASSES,
    memory: int | str | None = None,
) -> Floats:
    """Scores every column by the norm of its coefficients for all targets in one ridge regression.

    With z the features standardised by column, it minimises ``sum_i(w_i * sum_k((z_i . W_k + c_k - t_ik)^2)) / sum_i(w_i) +
    penalty * D * |W|^2`` over W (D, K) and the free intercepts c; targets that are NaN are left out of the sum. The score of
    column j is the length of the row ``W_j``. The solver is conjugate gradients, whose every step is one pass over the rows, in
    shards and blocks; beside these it keeps a few (D, K) arrays, never a (D, D) one.

    Args:
        features: (n, D) array or ``Blocks``; those that are spread over workers are passed over where they are.
        targets: (n, K) numbers to regress on, or (n,) for one: see `regression_targets`.
        sample_weight: (n,) non-negative weights; None for one each.
        penalty: Strength of the penalty for each column, above 0.
        tol: Share of the first gradient's norm at which to stop, for each target.
        max_passes: Most passes.
        memory: What the rows may take in memory at each place, in bytes or as text; above it they are read anew in each pass.

    Returns:
        (D,) scores, from 0; 0 for constant columns.

    Raises:
        UsageError: The penalty is not above 0.
        ValueError: A feature is NaN or infinite.
    """
    if not penalty > 0:
        raise UsageError(f"penalty={penalty!r} must be above 0")
    wanted = np.asarray(targets, np.float64)
    wanted = (wanted[:, None] if wanted.ndim == 1 else wanted).T
    weights = np.ones(wanted.shape[1]) if sample_weight is None else np.asarray(sample_weight, np.float64)
    counted = np.where(np.isnan(wanted), 0.0, weights) / weights.sum()
    source = as_blocks(features)
    standardised = BlockScaler(memory=memory).fit(source, None, sample_weight).transform(source)
    dtype = working_dtype(standardised.dtype)
    shards = row_shards_of(standardised).kept(dtype, memory).beside(counted, np.nan_to_num(wanted))
    rows = rows_per_block(standardised.shape[1], dtype, memory)
    coefficients = _ridge(shards, standardised.shape[1], len(wanted), penalty, rows, tol=tol, most=max_passes)
    found: Floats = np.linalg.norm(coefficients, axis=0)
    return found


def regression_targets(answers: Array, classes: Any = None) -> Floats:
    """What columns are scored by: of classes and labels plus and minus one, of numbers standard deviations from the mean.

    Args:
        answers: (n,) labels or numbers, or (n, K) several labels: 1 present, 0 absent, NaN unknown.
        classes: The K names of classes, in any order; None where labels or numbers are learned.

    Returns:
        (n, K), or (n, 1) of two classes and of numbers. Targets of a rare class weigh as much as any: each is divided by its
        standard deviation.
    """
    if classes is not None:
        members = np.asarray(answers)[:, None] == np.asarray(classes)[None, len(classes) == 2 :]
        found = members.astype(np.float64)
    else:
        found = np.asarray(answers, np.float64).reshape(len(answers), -1)
    spread = np.nanstd(found, axis=0)
    centred: Floats = (found - np.nanmean(found, axis=0)) / np.where(spread > 0, spread, 1.0)
    return centred


def best_columns(scores: Floats, share: float) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the columns with the highest scores; of equal ones the first.

    Args:
        scores: (D,).
        share: Of the columns, above 0 and at most 1; at least one column is kept.
    """
    count = kept_count(share, len(scores))
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def kept_count(share: float, width: int) -> int:
    """How many of ``width`` columns a share of them is, at least one."""
    return max(1, round(share * width))


class KeptColumns(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Keeps some columns of arrays and, as they are read, of ``Blocks``.

    Args:
        columns: Their positions, ascending; None for all.

    Attributes:
        columns_: (k,) int64 positions.
        n_features_in_: D.
    """

    def __init__(self, columns: Any = None) -> None:
        self.columns = columns

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learns the width alone.

        Args:
            X: (n, D) array or ``Blocks``.
            y: Ignored.

        Raises:
            UsageError: A position is not one of a column, or one comes twice.
        """
        del y
        if is_blocks(X):
            self.n_features_in_ = X.shape[1]
        else:
            validate_data(self, X)
        return self._keep(self.n_features_in_)

    @classmethod
    def of_width(cls, columns: Array, width: int) -> Self:
        """A fitted step for features of ``width`` values."""
        step = cls(np.asarray(columns, np.int64))
        step.n_features_in_ = width
        return step._keep(width)

    def _keep(self, width: int) -> Self:
        kept = np.arange(width) if self.columns is None else np.asarray(self.columns, np.int64)
        if kept.ndim != 1 or not len(kept) or kept[0] < 0 or kept[-1] >= width or (np.diff(kept) <= 0).any():
            raise UsageError(f"columns={self.columns!r} must be ascending positions from 0 to {width - 1}, one or more")
        self.columns_ = kept
        return self

    def transform(self, X: Any) -> Any:
        """Returns (n, k) features: of ``Blocks`` a view that keeps columns of what is read, of an array an array."""
        check_is_fitted(self)
        if not is_blocks(X):
            return _Keep(self.columns_)(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))
        if X.shape[1] != self.n_features_in_:
            raise UsageError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features"
            )
        return MappedBlocks(X, _Keep(self.columns_), len(self.columns_))


class _Keep:
    """Takes columns of a block."""

    def __init__(self, columns: Array) -> None:
        self.columns = columns

    def __call__(self, block: Array) -> Array:
        return np.ascontiguousarray(block[:, self.columns])


@dataclass(frozen=True)
class _Products:
    """Asks for ``sum_i(weight_ik * (z_i . W_k + c_k - t_ik) * (z_i, 1))`` of a share of the rows.

    Attributes:
        coefficients: (K, D + 1), the intercepts last.
        toward: Whether targets are subtracted; else the products are those of the second derivative with a direction.
        rows: Of a block.
    """

    coefficients: Floats
    toward: bool
    rows: int

    def __call__(self, blocks: Blocks, weights: Array, targets: Array) -> Floats:
        """Sums (K, D + 1) over a shard: (m, D) blocks, (K, m) weights and targets."""
        sums = np.zeros(self.coefficients.shape)
        dtype = working_dtype(blocks.dtype)
        slopes, intercepts = self.coefficients[:, :-1].astype(dtype), self.coefficients[:, -1:]
        for place, block in iterate(blocks, rows=self.rows, dtype=dtype):
            scores = slopes @ block.T + intercepts
            if self.toward:
                scores -= targets[:, place]
            scores *= weights[:, place]
            sums[:, :-1] += scores.astype(dtype) @ block
            sums[:, -1] += scores.sum(axis=1)
        return sums


def _ridge(shards: RowShards, width: int, count: int, penalty: float, rows: int, *, tol: float, most: int) -> Floats:
    """Coefficients (K, D) by conjugate gradients, each target's by its own steps in passes that all share."""
    shrink = np.full(width + 1, penalty * width)
    shrink[-1] = 0.0  # the intercept is free
    found = np.zeros((count, width + 1))
    rest: Floats = -shards.reduce(_Products(found, toward=True, rows=rows))
    direction = rest.copy()
    square = np.einsum("kd,kd->k", rest, rest)
    enough = tol**2 * square
    for _ in range(most):
        moving = square > enough
        if not moving.any():
            break
        bent: Floats = shards.reduce(_Products(direction, toward=False, rows=rows)) + shrink * direction
        curvature = np.einsum("kd,kd->k", direction, bent)
        step = np.where(moving & (curvature > 0), square / np.where(curvature > 0, curvature, 1.0), 0.0)
        found += step[:, None] * direction
        rest -= step[:, None] * bent
        after = np.einsum("kd,kd->k", rest, rest)
        direction = rest + (after / np.where(square > 0, square, 1.0))[:, None] * direction
        square = after
    return found[:, :-1]
