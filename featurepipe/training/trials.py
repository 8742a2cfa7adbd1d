"""The fits of a search, each by itself, on any executor: what they share, and how many go side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from threadpoolctl import threadpool_limits

from featurepipe.display import size
from featurepipe.errors import WorkerRefused
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.progress import Progress
from featurepipe.training.splits import Fold

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet

MEMORY_USED = 0.6
"""Of a worker's memory limit: what fits at the same time may take; from there on Dask moves data to disk."""

Array = npt.NDArray[Any]
Trying = Callable[[Any, Any, Array, Array], Any]
"""What is done with (head, data, training rows, validation rows)."""


class Room(NamedTuple):
    """What the fits of a search take, in bytes: what all of a process share, and what each takes beside it."""

    shared: int
    each: int

    def fits(self, threads: int, memory_limit: int) -> int:
        """How many there may be at a time in a worker with so many threads, and so much memory, 0 for any."""
        if not memory_limit:
            return threads
        return min(threads, max(0, int(MEMORY_USED * memory_limit - self.shared) // self.each))


def fits_at_once(executor: Executor, room: Room) -> int:
    """How many fits workers elsewhere can do at the same time, one a thread; 0 if one is too much for the smallest's memory.

    Of a cluster that grows with its work, the workers that may yet come count, too.
    """
    if executor.is_local:
        return 0
    workers = executor.workers()
    fits = [room.fits(worker.threads, worker.memory_limit) for worker in workers]
    least = min(fits, default=0)
    return max(sum(fits), executor.expected() * least) if least else 0


class Try(NamedTuple):
    """One head on one fold."""

    number: int
    head: Any
    fold: int

    def __str__(self) -> str:
        head = getattr(self.head, "steps", [("", self.head)])[-1][1]
        return f"the fit of {head} on fold {self.fold}"


@dataclass
class DataHere:
    """Rows that this process has: arrays in memory, which its processes share, or features that are read in blocks."""

    data: Any
    folds: Sequence[Fold]
    fit: Trying

    @contextmanager
    def turn(self, _worker: Worker) -> Iterator[Any]:
        """A block in which the worker fits; gives the data."""
        yield self.data


@dataclass
class DataElsewhere:
    """Rows that each worker reads once for all its fits.

    Attributes:
        features: of all folds.
        folds: as positions in them.
        fit: what is done with a head on a fold.
        room: what fits take.
        answers: (n,) numbers to learn; None for the features' labels.
    """

    features: FeatureSet
    folds: Sequence[Fold]
    fit: Trying
    room: Room
    answers: Array | None = None
    _read: tuple[Array, Array, Array | None] | None = field(default=None, init=False)
    _turns: threading.BoundedSemaphore | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return DataElsewhere, (self.features, self.folds, self.fit, self.room, self.answers)  # never what was read

    @contextmanager
    def turn(self, worker: Worker) -> Iterator[Any]:
        """A block in which the worker fits, on one core, since the worker's other threads have fits of their own.

        Raises:
            WorkerRefused: the worker has too little memory.
        """
        with self._lock:
            if self._turns is None:
                fits = self.room.fits(worker.threads, worker.memory)
                if not fits:
                    raise WorkerRefused(f"its memory of {size(worker.memory)} is too little for a fit of this search")
                self._turns = threading.BoundedSemaphore(fits)
        with self._turns, threadpool_limits(1):
            yield self._data()

    def _data(self) -> tuple[Array, Array, Array | None]:
        """Features (n, D), float32, labels or numbers (n,), and weights, if any; the process's other fits get the same arrays."""
        with self._lock:
            if self._read is None:
                features, labels = self.features.numpy()
                answers = labels if self.answers is None else self.answers
                self._read = features, np.asarray(answers), self.features.weights  # all rows have labels
            return self._read


def fit_try(data: DataHere | DataElsewhere, tried: Try, worker: Worker, _stop: Stop, _report: Report) -> Any:
    """Fits one head on one fold, and returns what the data's ``fit`` says of it."""
    with data.turn(worker) as rows:
        return data.fit(tried.head, rows, *data.folds[tried.fold])


def try_all(executor: Executor, data: DataHere | DataElsewhere, heads: Sequence[Any], told: Progress) -> list[Any]:
    """Fits every head on every fold, each by itself.

    Args:
        executor: who fits. Workers elsewhere take as many at a time as their memory permits.
        data: rows and folds.
        heads: unfitted.
        told: counts the fits that are done.

    Returns:
        What the data's ``fit`` returned, the folds of the first head first.

    Raises:
        ClusterError: a fit ends its workers, none is left, or the scheduler is gone.
        StoreError: the store cannot be written.
    """
    found: dict[int, Any] = {}
    wanted = product(heads, range(len(data.folds)))
    tries = (Try(number, clone(head), fold) for number, (head, fold) in enumerate(wanted))
    threads = max((worker.threads for worker in executor.workers()), default=1)
    results = executor.map(fit_try, tries, context=data, in_flight=threads, retries=0, interruptible=False)
    with closing(results):
        for tried, outcome in results:
            found[tried.number] = outcome
            told.advance(1)
    return [found[number] for number in range(len(found))]
