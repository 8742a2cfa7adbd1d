"""The fits of a search, each by itself, on any executor: the rows that they share, and their turns in a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy.typing as npt
from sklearn.base import clone
from threadpoolctl import threadpool_limits

from featurepipe.display import size
from featurepipe.errors import WorkerRefused
from featurepipe.execution.executor import Executor, Report, Room, Stop, Worker
from featurepipe.progress import Progress
from featurepipe.training.splits import Fold

Array = npt.NDArray[Any]
Trying = Callable[[Any, Any, Array, Array], Any]
"""What is done with (head, data, training rows, validation rows)."""


class Try(NamedTuple):
    """One head on one fold."""

    number: int
    head: Any
    fold: int

    def __str__(self) -> str:
        head = getattr(self.head, "steps", [("", self.head)])[-1][1]
        return f"the fit of {head} on fold {self.fold}"


@dataclass
class TrialRows:
    """The rows of a search and its folds, and what is done with a head on one of them.

    Attributes:
        read: gives what ``fit`` takes: arrays, or features that are read in blocks. Called once in each process that fits.
        folds: as positions in the rows.
        fit: what is done with a head on a fold.
        room: what fits take that go side by side in a process, each on one core; None where a process makes one at a time.
    """

    read: Callable[[], Any]
    folds: Sequence[Fold]
    fit: Trying
    room: Room | None = None
    _read: Any = field(default=None, init=False)
    _turns: threading.BoundedSemaphore | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return TrialRows, (self.read, self.folds, self.fit, self.room)  # never what was read

    @contextmanager
    def turn(self, worker: Worker) -> Iterator[Any]:
        """A block in which the worker fits; gives the rows.

        Raises:
            WorkerRefused: the worker has too little memory.
        """
        if self.room is None:
            yield self._rows()
            return
        with self._lock:
            if self._turns is None:
                fits = self.room.tasks(worker.threads, worker.memory)
                if not fits:
                    raise WorkerRefused(f"its memory of {size(worker.memory)} is too little for a fit of this search")
                self._turns = threading.BoundedSemaphore(fits)
        with self._turns, threadpool_limits(1):
            yield self._rows()

    def _rows(self) -> Any:
        with self._lock:
            if self._read is None:
                self._read = self.read()
            return self._read


def fit_try(data: TrialRows, tried: Try, worker: Worker, _stop: Stop, _report: Report) -> Any:
    """Fits one head on one fold, and returns what the data's ``fit`` says of it."""
    with data.turn(worker) as rows:
        return data.fit(tried.head, rows, *data.folds[tried.fold])


def try_all(executor: Executor, data: TrialRows, heads: Sequence[Any], told: Progress) -> list[Any]:
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
    side_by_side = executor.most_threads()
    results = executor.map(fit_try, tries, context=data, in_flight=side_by_side, retries=0, interruptible=False)
    with closing(results):
        for tried, outcome in results:
            found[tried.number] = outcome
            told.advance(1)
    return [found[number] for number in range(len(found))]
