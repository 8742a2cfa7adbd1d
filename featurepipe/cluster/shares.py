"""Rows that workers keep, and sums over them: what `featurepipe.heads.shares` asks for, as ordinary Dask tasks.

What a worker keeps is the result of a task: if the worker dies, Dask has another one do that task again. Every task of a share
prefers the worker that the share was given to, and goes wherever Dask puts it when that worker is gone; workers that join later
are used by the next fit. Where none is left that had a share, all are given out anew. A pass is one task a worker; sums are
added in pairs by the workers, and only the last one comes back.
"""

from __future__ import annotations

import secrets
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
_KEYS = "share-"  # with which the names of our tasks begin
_TRIES = 3  # how often all shares are given out before a fit is given up
_IDLE_LOOKS = 2
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
class Placed:
    """Where the shares are.

    Attributes:
        places: The shares, in the order of the rows.
        memory: Bytes that a work may take at a worker, beside the features; None where workers have no limit.
        changes: What is done to features as they are read.
    """

    places: tuple[Place, ...]
    memory: int | None
    changes: tuple[Change, ...] = ()


class _Stuck(Exception):
    """Nobody is left whom Dask would give a task to: the workers that it prefers are gone, and all others came too late."""


class WorkerShares:
    """`featurepipe.heads.shares.Shares` of a team's workers.

    Args:
        team: Whose workers they are.
        place: Gives the workers their shares; called again if Dask cannot go on without workers that are gone.
    """

    def __init__(self, team: Team, place: Callable[[], Placed]) -> None:
        self.team, self._place = team, place
        self._placed = place()

    @property
    def places(self) -> tuple[Place, ...]:
        """The shares, in the order of the rows."""
        return self._placed.places

    @property
    def changes(self) -> tuple[Change, ...]:
        """What is done to features as they are read."""
        return self._placed.changes

    @property
    def memory(self) -> int | None:
        """Bytes that a work may take at a worker, beside the features; None where workers have no limit."""
        return self._placed.memory

    @property
    def rows(self) -> int:
        """How many there are in all shares."""
        return int(self.places[-1].rows.stop)

    def whole(self) -> Placed:
        """Where the shares are; those of workers that are gone are given out anew."""
        if self._gone():
            self._placed = self._place()
        return self._placed

    def through(self, change: Change) -> WorkerShares:
        """The same rows, changed row by row as they are read."""

        def place() -> Placed:
            placed = self.whole()
            return replace(placed, changes=(*placed.changes, change))

        return WorkerShares(self.team, place)

    def kept(self, dtype: npt.DTypeLike, memory: int | str | None) -> WorkerShares:
        """The same rows in the workers' memory where they fit: as ``dtype``, else as they are stored."""

        def place() -> Placed:
            placed, wanted = self.whole(), np.dtype(dtype)
            places = tuple(
                replace(at, kept=(self._submit(at, keep, placed.changes, wanted, memory, at.kept[0]), *at.kept[1:]))
                for at in placed.places
            )
            return Placed(places, placed.memory)

        return WorkerShares(self.team, place)

    def beside(self, *rows: Array | None) -> WorkerShares:
        """The same rows with further arrays (..., n); each worker is sent its own part, once."""

        def sent(at: Place, array: Array | None) -> Future[Any] | None:
            if array is None:
                return None
            return self._submit(at, unpacked, *packed(array[..., at.rows]))

        def place() -> Placed:
            placed = self.whole()
            places = (replace(at, kept=(*at.kept, *(sent(at, array) for array in rows))) for at in placed.places)
            return replace(placed, places=tuple(places))

        return WorkerShares(self.team, place)

    def added(self, work: Callable[..., Any]) -> Any:
        """The sum of what the work returns of each share; workers add."""

        def ask_and_add() -> Any:
            sums = self._asked(work)
            while len(sums) > 1:
                pairs = [sums[start : start + 2] for start in range(0, len(sums), 2)]
                sums = [self._submit(None, _add, *pair) if pair[1:] else pair[0] for pair in pairs]
            return self._result(sums[0])

        return self._until_done(ask_and_add)

    def listed(self, work: Callable[..., Any]) -> list[Any]:
        """What the work returns of each share, in the order of the rows."""
        found: list[Any] = self._until_done(lambda: [self._result(future) for future in self._asked(work)])
        return found

    def at_once(self, work: Callable[..., Any], desk: Callable[[str, int], Any], *others: WorkerShares) -> list[Any]:
        """Has all workers work at the same time; see `featurepipe.cluster.together`."""
        return together(self.team, work, desk, [self, *others])

    def _until_done(self, attempt: Callable[[], Any]) -> Any:
        for _ in range(_TRIES):
            try:
                return attempt()
            except _Stuck:
                self.team.say("workers that kept features are gone; those that are there now read them again")
                self.whole()
        raise ClusterError(
            f"the workers that kept features were lost {_TRIES} times; if they ran out of memory (see their logs), use more "
            "workers or give them more, then give the same command again"
        )

    def _gone(self) -> bool:
        return not {place.worker for place in self.places} <= set(self.team.addresses())

    def _asked(self, work: Callable[..., Any]) -> list[Future[Any]]:
        """One task a share. A large order travels to one worker, and from there to the others."""
        from distributed.protocol.pickle import dumps

        order: Any = dumps(work)
        if len(order) > _LARGE_BYTES:
            order = self._submit(self.places[0], same, order)
        return [self._submit(place, ask, order, self.changes, *place.kept) for place in self.places]

    def _submit(self, place: Place | None, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return submitted(self.team, place.worker if place else None, function, *arguments)

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

        alone_since, idle = time.monotonic(), 0
        while not future.done():
            try:
                wait(future, timeout=_LOOK_SECONDS)
            except TimeoutError:
                if self.team.addresses():
                    alone_since = time.monotonic()
                    idle = idle + 1 if self._gone() and not self._busy() else 0
                elif time.monotonic() - alone_since > self.team.patience:
                    raise self.team.no_worker() from None
                if idle == _IDLE_LOOKS:
                    raise _Stuck from None

    def _busy(self) -> bool:
        """Whether a worker does anything for us or for others like us."""
        keys = self.team.scheduler.ask("processing", workers=None).values()
        return any(str(key).startswith(_KEYS) for some in keys for key in some)


def submitted(team: Team, worker: str | None, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """A task that prefers a worker, if one is named."""
    preferred: dict[str, Any] = {} if worker is None else {"workers": worker, "allow_other_workers": True}
    key = f"{_KEYS}{function.__name__.strip('_')}-{secrets.token_hex(16)}"
    return team.scheduler.submit(function, *arguments, key=key, **preferred)


def _add(one: Any, other: Any) -> Any:
    return one + other
