"""Trees that several processes grow together, each from its own rows: xgboost's collective training.

Each process keeps only its own rows, quantised. For every level of a tree they add up their histograms (Rabit's ring allreduce;
Chen & Guestrin 2016, section 6.3), so that all grow the same trees. The processes meet at a rendezvous, xgboost's tracker, which
tells them of each other and then has nothing more to do until they leave.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost
from xgboost import collective
from xgboost.tracker import RabitTracker

from featurepipe.errors import ClusterError, FeaturepipeError
from featurepipe.heads.blocks import Array, Blocks, iterate, rows_per_block
from featurepipe.heads.inputs import Codes, Floats
from featurepipe.heads.row_shards import Rank


@dataclass(frozen=True)
class Piece:
    """Rows to learn from or to check on.

    Attributes:
        blocks: (m, D) features.
        labels: (m,) class numbers, or numbers to predict.
        weights: (m,) weights; None for ones.
    """

    blocks: Blocks
    labels: Codes | Floats
    weights: Floats | None = None


class RowBatches(xgboost.DataIter):
    """Hands blocks to xgboost, which asks for all of them several times.

    Args:
        pieces: one after the other.
        width: values a row, for a place without rows.
        memory: what the blocks alive at one time may take.
        holding: keep an error of reading in ``error`` and hand over zeros, instead of raising. Where several processes count
            quantiles together, one that stops in the middle would leave the others waiting.
    """

    def __init__(
        self, pieces: Sequence[Piece], width: int, memory: int | str | None = None, *, holding: bool = False
    ) -> None:
        super().__init__()
        self._pieces, self._width, self._memory, self._holding = pieces, width, memory, holding
        self._coming: Iterator[tuple[Array, Codes | Floats, Floats | None]] = iter(())
        self.error: FeaturepipeError | None = None

    def reset(self) -> None:
        """Starts again at the first row."""
        self._coming = self._batches()

    def next(self, input_data: Any) -> bool:
        """Hands over the next block; false at the end."""
        block, labels, weights = next(self._coming, (None, None, None))
        if block is None:
            return False
        input_data(data=block, label=labels, **({} if weights is None else {"weight": weights}))
        return True

    def _batches(self) -> Iterator[tuple[Array, Codes | Floats, Floats | None]]:
        if not any(piece.blocks.shape[0] for piece in self._pieces):
            yield np.empty((0, self._width), np.float32), np.empty(0, np.int64), None
        for piece in self._pieces:
            for place, block in self._blocks(piece.blocks):
                yield block, piece.labels[place], None if piece.weights is None else piece.weights[place]

    def _blocks(self, blocks: Blocks) -> Iterator[tuple[slice, Array]]:
        done = 0
        try:
            for place, block in iterate(blocks, memory=self._memory, dtype=np.float32):
                yield place, block
                done = place.stop
        except FeaturepipeError as error:
            if not self._holding:
                raise
            self.error = error
            rows, step = blocks.shape[0], rows_per_block(self._width, np.float32, self._memory)
            for start in range(done, rows, step):
                place = slice(start, min(rows, start + step))
                yield place, np.zeros((place.stop - start, self._width), np.float32)


COMING_SECONDS = 300
"""How long processes wait at the rendezvous for the last one to come, and to leave."""

SILENT_SECONDS = 1800
"""How long one that says nothing is waited for: it may have far more to read than the others before they first add up."""


class Rendezvous:
    """Where the processes meet; it is open as long as this object lives.

    Args:
        host: address of this machine, by which the others reach it.
        count: how many will come.
    """

    def __init__(self, host: str, count: int) -> None:
        self._tracker = RabitTracker(n_workers=count, host_ip=host, sortby="task", timeout=COMING_SECONDS)
        self._tracker.start()

    def told(self) -> dict[str, Any]:
        """What those who come need to know."""
        return dict(self._tracker.worker_args())

    def close(self) -> None:
        """Lets those who wait for others know that these will not come."""
        try:
            self._tracker.free()
        except xgboost.core.XGBoostError:
            return  # it says that someone did not come or leave, which is why it is closed


@dataclass(frozen=True)
class Grown:
    """What came of growing trees.

    Attributes:
        trees: as UBJSON; empty for all places but the first, since all have the same.
        history: log-loss (of numbers: root mean squared error) on the validation rows after each round.
        best: the round (from 0) that early stopping chose; None without it.
    """

    trees: bytes
    history: tuple[float, ...]
    best: int | None


@dataclass(frozen=True)
class Growth:
    """Trees to grow: what each process is told.

    Attributes:
        parameters: of xgboost.
        rounds: at most so many.
        patience: early stopping after so many rounds without a better result on the validation rows; None for never.
        width: values a row.
        watched: whether there are validation rows.
        memory: what the blocks alive at one time may take at each place.
    """

    parameters: Mapping[str, Any]
    rounds: int
    patience: int | None
    width: int
    watched: bool
    memory: int | str | None

    def __call__(self, rank: Rank, own: Sequence[Sequence[Any]], checked: Sequence[Sequence[Any]] = ()) -> Grown:
        """Grows them here, together with the others.

        Args:
            rank: this process's.
            own: its rows to learn from: (features, labels, weights) of each shard.
            checked: its validation rows: (features, labels).

        Raises:
            UsageError: a value here is not finite.
            ClusterError: one of the others could not read its rows; it says why.
        """
        with _meeting(rank):
            matrix = self._matrix(rank, own)
            watched = self._matrix(rank, checked, matrix) if self.watched else None
            return grow(self, rank.threads, matrix, watched, trees=rank.rank == 0, callbacks=[_Leave(rank)])

    def _matrix(self, rank: Rank, shards: Sequence[Sequence[Any]], ref: Any = None) -> Any:
        """The rows here, quantised by the quantiles of all; together the processes make sure that all could read theirs."""
        batches = RowBatches([Piece(*shard) for shard in shards], self.width, self.memory, holding=True)
        matrix = xgboost.QuantileDMatrix(batches, max_bin=self.parameters["max_bin"], nthread=rank.threads, ref=ref)
        failed = collective.allreduce(np.array([batches.error is not None], np.int32), collective.Op.SUM)
        if batches.error is not None:
            raise batches.error
        if failed[0]:
            raise ClusterError(f"{failed[0]} of {rank.world_size} workers could not read their rows; they say why")
        return matrix


@contextmanager
def _meeting(rank: Rank) -> Iterator[None]:
    """Meets the others at the rendezvous, and leaves at the end."""
    options = {**rank.rendezvous, "dmlc_task_id": f"{rank.rank:06d}", "dmlc_timeout": SILENT_SECONDS, "dmlc_retry": 2}
    context = collective.CommunicatorContext(**options)
    with redirect_stdout(io.StringIO()):  # xgboost prints who has come
        context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


class _Leave(xgboost.callback.TrainingCallback):
    """Ends all processes' work after the same round where nobody wants it any more."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:  # noqa: ARG002 - as xgboost calls it
        """Whether to stop, as all of them say at once."""
        return bool(collective.allreduce(np.array([self._rank.stop()], np.int32), collective.Op.MAX)[0])


def grow(
    growth: Growth, threads: int, matrix: Any, checked: Any, *, trees: bool = True, callbacks: Sequence[Any] = ()
) -> Grown:
    """Grows trees on a matrix, here alone or inside a collective context."""
    history: dict[str, dict[str, list[float]]] = {}
    booster = xgboost.train(
        {**growth.parameters, "nthread": threads},
        matrix,
        growth.rounds,
        evals=[] if checked is None else [(checked, "validation")],
        evals_result=history,
        early_stopping_rounds=growth.patience,
        verbose_eval=False,
        callbacks=list(callbacks),
    )
    losses = [float(loss) for values in history.get("validation", {}).values() for loss in values]
    best = None if growth.patience is None else int(booster.best_iteration)
    return Grown(bytes(booster.save_raw("ubj")) if trees else b"", tuple(losses), best)
