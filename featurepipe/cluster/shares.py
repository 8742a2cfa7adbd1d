"""Rows that workers keep, and sums over them: what `featurepipe.heads.shares` asks for, as ordinary Dask tasks.

What a worker keeps is the result of a task: if the worker dies, Dask has another one do that task again. Every task of a share
prefers the worker that the share was given to, and goes wherever Dask puts it when that worker is gone; workers that join later
are used by the next fit. A pass is one task a worker; sums are added in pairs by the workers, and only the last one comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.cluster.share import Change, ask, keep, packed, same, unpacked
from featurepipe.cluster.together import together
from featurepipe.errors import ClusterError
from featurepipe.heads.blocks import Array

if TYPE_CHECKING:
    from distributed import Future

    from featurepipe.cluster.team import Team

WORKING = 0.2
"""Of a worker's memory limit: what a pass may take beside the features that are kept."""

_LARGE_BYTES = 1 << 16  # up to which an order goes with every task, which saves the time of a task before them
_LOOK_SECONDS = 1.0  # how often the workers are counted while an answer is awaited


@dataclass(frozen=True)
class Place:
    """One worker's share.

    Attributes:
        worker: The address of the worker that it was given to.
        rows: Which of all rows.
        kept: The features, and the arrays beside them; None for an array that is None.
    """

    worker: str
    rows: slice
    kept: tuple[Future[Any] | None, ...]


@dataclass(frozen=True)
class WorkerShares:
    """`featurepipe.heads.shares.Shares` of a team's workers.

    Attributes:
        team: Whose workers they are.
        places: The shares, in the order of the rows.
        memory: Bytes that a work may take at a worker, beside the features; None where workers have no limit.
        changes: What is done to features as they are read.
    """

    team: Team
    places: tuple[Place, ...]
    memory: int | None
    changes: tuple[Change, ...] = ()

    @property
    def rows(self) -> int:
        """How many there are in all shares."""
        return int(self.places[-1].rows.stop)

    def through(self, change: Change) -> WorkerShares:
        """The same rows, changed row by row as they are read."""
        return replace(self, changes=(*self.changes, change))

    def kept(self, dtype: npt.DTypeLike, memory: int | str | None) -> WorkerShares:
        """The same rows in the workers' memory where they fit: as ``dtype``, else as they are stored."""
        places = tuple(
            replace(place, kept=(self._submit(place, keep, self.changes, np.dtype(dtype), memory, first), *beside))
            for place in self.places
            for first, *beside in [place.kept]
        )
        return replace(self, places=places, changes=())

    def beside(self, *rows: Array | None) -> WorkerShares:
        """The same rows with further arrays (..., n); each worker is sent its own part, once."""

        def sent(place: Place, array: Array | None) -> Future[Any] | None:
            if array is None:
                return None
            return self._submit(place, unpacked, *packed(array[..., place.rows]))

        places = (replace(at, kept=(*at.kept, *(sent(at, array) for array in rows))) for at in self.places)
        return replace(self, places=tuple(places))

    def added(self, work: Callable[..., Any]) -> Any:
        """The sum of what the work returns of each share; workers add."""
        sums = self._asked(work)
        while len(sums) > 1:
            pairs = [sums[start : start + 2] for start in range(0, len(sums), 2)]
            sums = [self.team.client.submit(_add, *pair, pure=False) if pair[1:] else pair[0] for pair in pairs]
        return self._result(sums[0])

    def listed(self, work: Callable[..., Any]) -> list[Any]:
        """What the work returns of each share, in the order of the rows."""
        return [self._result(future) for future in self._asked(work)]

    def at_once(self, work: Callable[..., Any], desk: Callable[[str, int], Any], *others: WorkerShares) -> list[Any]:
        """Has all workers work at the same time; see `featurepipe.cluster.together`."""
        return together(self.team, work, desk, [self, *others])

    def _asked(self, work: Callable[..., Any]) -> list[Future[Any]]:
        """One task a share. A large order travels to one worker, and from there to the others."""
        from distributed.protocol.pickle import dumps

        order: Any = dumps(work)
        if len(order) > _LARGE_BYTES:
            order = self._submit(self.places[0], same, order)
        return [self._submit(place, ask, order, self.changes, *place.kept) for place in self.places]

    def _submit(self, place: Place, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        import dask

        with self.team.reaching(), dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
            return self.team.client.submit(
                function, *arguments, workers=place.worker, allow_other_workers=True, pure=False
            )

    def _result(self, future: Future[Any]) -> Any:
        """Waits for an answer for as long as there is a cluster."""
        from distributed import CancelledError, KilledWorker

        try:
            self._wait(future)
            return future.result()
        except CancelledError as error:
            raise ClusterError(
                "the scheduler of the cluster is gone, and what its workers kept of the features with it; start it again, "
                "then give the same command again"
            ) from error
        except KilledWorker as error:
            raise ClusterError(
                f"a share of the features ended {error.allowed_failures + 1} workers, the last {error.last_worker.address}: "
                "it needs more memory than they have. Use more workers, or give them more memory; see their logs"
            ) from error

    def _wait(self, future: Future[Any]) -> None:
        from distributed import wait

        alone_since = time.monotonic()
        while not future.done():
            try:
                wait(future, timeout=_LOOK_SECONDS)
            except TimeoutError:
                if self.team.addresses():
                    alone_since = time.monotonic()
                elif time.monotonic() - alone_since > self.team.patience:
                    raise self.team.no_worker() from None


def _add(one: Any, other: Any) -> Any:
    return one + other
