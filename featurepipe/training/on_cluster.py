"""Training on a Dask cluster: which one it is, what is done there, and what a bundle says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt
from sklearn.base import clone
from threadpoolctl import threadpool_limits

from featurepipe.training.splits import Fold

if TYPE_CHECKING:
    from featurepipe.cluster import Team
    from featurepipe.store import FeatureStore
    from featurepipe.store.views import FeatureSet

SHARE = 0.6
"""Of a worker's memory limit: what fits at the same time may take; from there on Dask moves data to disk."""

Array = npt.NDArray[Any]
Trying = Callable[[Any, Any, Array, Array], Any]


def cluster_name(cluster: Any) -> str | None:
    """Names what `featurepipe.cluster.connect` takes, for people and for a bundle: no password, no folder of this machine.

    Example:
        >>> cluster_name("tls://me:secret@head:8786"), cluster_name("/home/me/slurm.toml"), cluster_name({"kind": "ssh"})
        ('tls://head:8786', 'slurm.toml', 'ssh')
    """
    if cluster is None:
        return None
    if isinstance(cluster, Mapping):
        cluster = cluster.get("scheduler") or cluster.get("kind")
    for name in ("address", "scheduler_address"):  # of a Team and of a Dask cluster
        cluster = getattr(cluster, name, cluster)
    scheduler = getattr(cluster, "scheduler", None)  # of a Client
    text = str(cluster if scheduler is None else scheduler.address)
    return re.sub("//[^/@]*@", "//", text) if "://" in text else Path(text).name


@contextmanager
def team_of(cluster: Any, store: FeatureStore, say: Callable[[str], None], *, needed: bool) -> Iterator[Team | None]:
    """The team that a training works with; None where it works here.

    Raises:
        ClusterError: there is no such cluster, or none of its workers can be used.
    """
    if cluster is None or not needed:
        yield None
        return
    from featurepipe.cluster import connect

    with connect(cluster, say=say) as team:
        team.check(store.path)
        yield team


def described(team: Team | None) -> dict[str, Any] | None:
    """What a bundle says of the cluster that it was trained on."""
    if team is None:
        return None
    workers = team.workers()
    return {
        "scheduler": cluster_name(team),
        "workers": len(workers),
        "threads": sum(worker.threads for worker in workers),
        "hosts": len({worker.host for worker in workers}),
    }


class Pool:
    """The rows of a search with its folds, in a form that travels to a worker once and reads the features there, once.

    Args:
        features: of all folds.
        folds: as positions in them.
    """

    def __init__(self, features: FeatureSet, folds: Sequence[Fold]) -> None:
        self.features, self.folds = features, folds
        self._read: tuple[Array, Array] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Pool, (self.features, self.folds)  # never what was read

    def data(self) -> tuple[Array, Array]:
        """Features (n, D), float32, and labels (n,); the process's other fits get the same arrays."""
        from featurepipe.cluster import one_at_a_time

        with one_at_a_time():
            if self._read is None:
                self._read = self.features.numpy()  # type: ignore[assignment]  # all rows have labels
            return self._read  # type: ignore[return-value]


def fits_at_once(team: Team, shared: int, each: int) -> int:
    """How many fits the workers can do at the same time, one a thread; 0 if one is too much for the smallest worker's memory.

    Of a cluster that grows with its work, the workers that may yet come count, too.

    Args:
        team: the workers.
        shared: bytes that all fits of a process share.
        each: bytes that each takes.
    """
    workers = team.workers()
    most = [max(0, int(SHARE * worker.memory_limit - shared) // each) for worker in workers if worker.memory_limit]
    fits = [min([worker.threads, *most]) for worker in workers]
    return max(sum(fits), team.most * min(fits, default=0))


class Try(NamedTuple):
    """One head on one fold. Dask puts the pool there before a worker begins, so that little travels with each."""

    number: int
    head: Any
    fold: int
    pool: Any

    def __str__(self) -> str:
        return f"the fit of {self.head} on fold {self.fold}"


def tried_on(team: Team, pool: Pool, fit: Trying, heads: Sequence[Any], jobs: int) -> list[Any]:
    """Fits every head on every fold, each by itself in a thread of a worker.

    The pool is sent to the scheduler once, as a task of its own; with each fit travel an unfitted head and a number.

    Args:
        team: the workers.
        pool: rows and folds.
        fit: what is done with (head, data, training rows, validation rows).
        heads: unfitted.
        jobs: fits at the same time.

    Returns:
        What ``fit`` returned, the folds of the first head first.

    Raises:
        ClusterError: a fit ends its workers, none is left, or the scheduler is gone.
    """
    there = team.scheduler.submit(Pool, pool.features, pool.folds, pure=False)
    wanted = product(heads, range(len(pool.folds)))
    tries = (Try(number, clone(head), fold, there) for number, (head, fold) in enumerate(wanted))
    each = max(1, jobs // team.expected())
    found: dict[int, Any] = {}
    with closing(team.results(tries, partial(_tried, fit), in_flight_per_worker=each, retries=0)) as answers:
        for tried, outcome in answers:
            found[tried.number] = outcome
    return [found[number] for number in range(len(found))]


def _tried(fit: Trying, tried: Try) -> Any:
    """One fit inside a worker: on one core, since the worker's other threads have fits of their own."""
    with threadpool_limits(1):
        return fit(tried.head, tried.pool.data(), *tried.pool.folds[tried.fold])
