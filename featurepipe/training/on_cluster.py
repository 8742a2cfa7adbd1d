"""Training on a Dask cluster: which one it is, what is done there, and what a bundle says of it."""

from __future__ import annotations

import hashlib
import pickle
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt
from sklearn.base import clone
from threadpoolctl import threadpool_limits

from featurepipe.errors import StoreError, WorkerRefused
from featurepipe.tables import size
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
    """The rows of a search with its folds, as a worker reads them once for all its fits.

    Args:
        features: of all folds.
        folds: as positions in them.
        room: what fits take.

    Attributes:
        turns: as many as there may be fits at a time in this process.
    """

    def __init__(self, features: FeatureSet, folds: Sequence[Fold], room: Room) -> None:
        self.features, self.folds, self.room = features, folds, room
        self.turns: threading.Semaphore = threading.Semaphore(0)
        self._read: tuple[Array, Array] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Pool, (self.features, self.folds, self.room)  # never what was read

    def data(self) -> tuple[Array, Array]:
        """Features (n, D), float32, and labels (n,); the process's other fits get the same arrays."""
        from featurepipe.cluster import one_at_a_time

        with one_at_a_time():
            if self._read is None:
                self._read = self.features.numpy()  # type: ignore[assignment]  # all rows have labels
            return self._read  # type: ignore[return-value]


class Room(NamedTuple):
    """What the fits of a search take, in bytes: what all of a process share, and what each takes beside it."""

    shared: int
    each: int

    def fits(self, threads: int, memory_limit: int) -> int:
        """How many there may be at a time in a worker with so many threads, and so much memory, 0 for any."""
        return min(threads, max(0, int(SHARE * memory_limit - self.shared) // self.each)) if memory_limit else threads


def fits_at_once(team: Team, room: Room) -> int:
    """How many fits the workers can do at the same time, one a thread; 0 if one is too much for the smallest worker's memory.

    Of a cluster that grows with its work, the workers that may yet come count, too.
    """
    fits = [room.fits(worker.threads, worker.memory_limit) for worker in team.workers()]
    least = min(fits, default=0)
    return max(sum(fits), team.most * least) if least else 0


class Try(NamedTuple):
    """One head on one fold, of the pool that is kept in a file; its digest tells that it is the right one."""

    number: int
    head: Any
    fold: int
    pool: str
    digest: str

    def __str__(self) -> str:
        head = getattr(self.head, "steps", [("", self.head)])[-1][1]
        return f"the fit of {head} on fold {self.fold}"


def tried_on(team: Team, folder: Path, pool: Pool, fit: Trying, heads: Sequence[Any]) -> list[Any]:
    """Fits every head on every fold, each by itself in a thread of a worker, as many at a time as its memory permits.

    The pool is kept in a file while the search lasts. Dask would give fits to those workers first that have what they need, and
    so all to one; and what it has scattered is lost with the workers that have it.

    Args:
        team: the workers.
        folder: which all of them see.
        pool: rows and folds.
        fit: what is done with (head, data, training rows, validation rows).
        heads: unfitted.

    Returns:
        What ``fit`` returned, the folds of the first head first.

    Raises:
        ClusterError: a fit ends its workers, none is left, or the scheduler is gone.
        StoreError: the folder cannot be written.
    """
    found: dict[int, Any] = {}
    with _kept(pool, folder.absolute()) as (file, digest):
        wanted = product(heads, range(len(pool.folds)))
        tries = (Try(number, clone(head), fold, file, digest) for number, (head, fold) in enumerate(wanted))
        threads = max((worker.threads for worker in team.workers()), default=1)
        work = partial(_tried, fit)
        flow = team.results(tries, work, in_flight_per_worker=threads, retries=0, interruptible=False)
        with closing(flow) as answers:
            for tried, outcome in answers:
                found[tried.number] = outcome
    return [found[number] for number in range(len(found))]


@contextmanager
def _kept(pool: Pool, folder: Path) -> Iterator[tuple[str, str]]:
    """A file with the pool, and its SHA-256, for as long as the block runs; `gc` removes it should we be killed."""
    content, file = pickle.dumps(pool), folder / f".search-{secrets.token_hex(8)}.tmp"
    try:
        file.write_bytes(content)
    except OSError as error:
        raise StoreError(f"cannot write into the store {folder}: {error.strerror}") from error
    try:
        yield str(file), hashlib.sha256(content).hexdigest()
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _tried(fit: Trying, tried: Try) -> Any:
    """One fit inside a worker: on one core, since the worker's other threads have fits of their own."""
    from featurepipe.cluster import one_at_a_time

    with one_at_a_time():
        pool = _pool(tried.pool, tried.digest)
    with pool.turns, threadpool_limits(1):
        return fit(tried.head, pool.data(), *pool.folds[tried.fold])


@lru_cache(maxsize=1)
def _pool(file: str, digest: str) -> Pool:
    """The pool of a search, which this process reads when it first needs it.

    Raises:
        WorkerRefused: it is not to be seen here, or this process has too little memory.
    """
    from featurepipe.cluster import this_worker

    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise WorkerRefused(f"it does not see {file} ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise WorkerRefused(f"it sees something else at {file}")
    pool: Pool = pickle.loads(content)  # noqa: S301  # what our client has written, as its digest shows
    _, threads, memory = this_worker()
    fits = pool.room.fits(threads, memory)
    if not fits:
        raise WorkerRefused(f"its memory of {size(memory)} is too little for a fit of this search")
    pool.turns = threading.BoundedSemaphore(fits)
    return pool
