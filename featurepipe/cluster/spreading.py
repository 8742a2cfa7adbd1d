"""Features spread over a cluster: each worker has a share of the rows, and heads learn and predict where these are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.cluster.share import begin
from featurepipe.cluster.shares import WORKING, Place, Placed, WorkerShares, submitted
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, ArrayBlocks, as_blocks
from featurepipe.store.views import FeatureSet

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.cluster.team import Team

_NEAR = 0.05  # of a share: a part's end as near as this to where a share would end is taken instead


def spread(features: Any, team: Team) -> SpreadFeatures:
    """Spreads features over the workers of a team; nothing is read yet.

    Args:
        features: (n, D) ``FeatureSet`` of a store that the workers see, or other ``Blocks`` that can be pickled and have
            ``take``; arrays travel to the workers.
        team: From `connect`.

    Example:
        >>> with connect("tcp://head:8786") as team:            # doctest: +SKIP
        ...     X = spread(store.features("photos"), team)
        ...     head = make_head("logistic", out_of_core=True).fit(X)
    """
    return SpreadFeatures(features, team)


class SpreadFeatures:
    """``Blocks`` whose rows a team's workers keep, in contiguous shares, one a worker.

    Shares are cut when they are first needed, and again when a later fit finds other workers; within a fit they stay, so that
    each worker goes on with what it has in memory. A fit keeps features there while a worker's process takes no more than half
    of its memory limit with them (`featurepipe.cluster.share.KEPT`); elsewhere each pass reads them block by block.

    Attributes:
        features: What is spread.
        team: Over whose workers.
    """

    def __init__(self, features: Any, team: Team) -> None:
        self.features, self.team = features, team
        self._blocks: Any = as_blocks(features)
        self._shares: WorkerShares | None = None

    def __repr__(self) -> str:
        return f"<{self.features!r} spread over {self.team.address}>"

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        rows, width = self._blocks.shape
        return rows, width

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the values are stored."""
        dtype: np.dtype[Any] = np.dtype(self._blocks.dtype)
        return dtype

    @property
    def labels(self) -> Any:
        """(n,) labels that the features carry, or None."""
        return getattr(self.features, "labels", None)

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Reads rows here, not at the workers."""
        return np.asarray(self._blocks.read(dtype, rows=rows))

    def take(self, positions: Any) -> SpreadFeatures:
        """Some rows (positions in any order, a mask, a slice), spread over the same team."""
        take = getattr(self.features, "take", None)
        if take is None or isinstance(self.features, np.ndarray):
            return SpreadFeatures(self._blocks.read(rows=positions), self.team)
        return SpreadFeatures(take(positions), self.team)

    def __getitem__(self, positions: Any) -> SpreadFeatures:
        """Does what ``take`` does, as scikit-learn cuts folds."""
        rows = positions[0] if isinstance(positions, tuple) and positions[1:] == (...,) else positions
        return self.take(rows)

    __iter__ = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Refuses to be read into memory unasked."""
        raise UsageError(
            "features that are spread over a cluster are not in memory here; fit a head that works where they are: "
            "make_head(..., out_of_core=True)"
        )

    def shared(self) -> WorkerShares:
        """The shares, one for each worker that is there now.

        Raises:
            ClusterError: No worker is there, or none comes in time.
        """
        there = frozenset(self.team.addresses())
        if self._shares is None or there != {place.worker for place in self._shares.places}:
            self._shares = WorkerShares(self.team, self._placed)
        return self._shares

    def _placed(self) -> Placed:
        self.team.wait_for_workers()
        workers = sorted(self.team.workers(), key=lambda worker: (len(worker.name), worker.name))
        rows = self.shape[0]
        edges = cuts(rows, min(len(workers), max(1, rows)), self._part_starts())
        places = [
            Place(worker.address, slice(start, stop), (self._begun(worker.address, start, stop),))
            for worker, start, stop in zip(workers, edges[:-1], edges[1:], strict=False)
        ]
        limits = [worker.memory_limit for worker in workers if worker.memory_limit]
        return Placed(tuple(places), int(WORKING * min(limits)) if limits else None)

    def _begun(self, worker: str, start: int, stop: int) -> Future[Any]:
        source, terms = self._rows(slice(start, stop)), self.team.terms
        return submitted(self.team, worker, begin, source, start, terms)

    def _rows(self, place: slice) -> Any:
        """Some rows as they travel: of a store's features only where they lie, without ids, labels and keys."""
        if isinstance(self.features, FeatureSet):
            return self.features.rows.take(place)
        if isinstance(self._blocks, ArrayBlocks):
            return ArrayBlocks(self._blocks.array[place])
        return self.features.take(place)

    def _part_starts(self) -> npt.NDArray[np.int64]:
        if isinstance(self.features, FeatureSet):
            return self.features.rows.part_starts()
        return np.empty(0, np.int64)


def cuts(rows: int, shares: int, starts: npt.NDArray[np.int64]) -> list[int]:
    """Where to cut rows into shares of about the same size: where a part of the store begins, if that is near.

    Example:
        >>> cuts(100, 2, np.array([30, 49])), cuts(100, 3, np.array([30]))
        ([0, 49, 100], [0, 33, 67, 100])
    """
    even = np.linspace(0, rows, shares + 1).round().astype(np.int64)
    for place in range(1, shares):
        near = starts[np.abs(starts - even[place]) <= _NEAR * rows / shares]
        if len(near):
            even[place] = near[np.abs(near - even[place]).argmin()]
    return [int(edge) for edge in even]
