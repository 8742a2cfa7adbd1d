"""The client's books of a run whose images are computed elsewhere: each row once, whoever did it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featurepipe import records
from featurepipe.errors import FeaturepipeError
from featurepipe.extraction.compute import Outcome
from featurepipe.extraction.load_task import Loaded
from featurepipe.extraction.prepare import Job
from featurepipe.extraction.slices import COMPUTED, UNTOUCHED, Done, Slice, Worked
from featurepipe.store.keys import KEY_BYTES


@dataclass
class WorkerBooks:
    """What one worker process has done in a run."""

    last: Worked
    slices: int = 0
    images: int = 0
    parts: int = 0
    bytes: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)

    def add(self, images: int, worked: Worked) -> None:
        """Adds a slice."""
        self.slices += 1
        self.images += images
        self.parts += worked.parts
        self.bytes += worked.bytes
        self.seconds += worked.seconds
        self.stages.update(worked.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the run record."""
        return {
            "worker": self.last.worker,
            "host": self.last.host,
            "pid": self.last.pid,
            "device": self.last.device,
            "threads": self.last.threads,
            "slices": self.slices,
            "images": self.images,
            "parts": self.parts,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "verdict": records.verdict(self.stages, self.seconds, device=self.last.device),
        }


class SliceBooks:
    """Books what workers answer, and closes the books of the run.

    Copies of an image may lie in two slices and be computed in both. Then one counts as computed, and the others as known, as
    on one machine.

    Args:
        job: what is to be done.
        outcome: the books of the run; its counts are right once `close` was called.

    Attributes:
        error: the first error that a worker answered with, or None.
        workers: what each worker process has done, by name, host and process.
    """

    def __init__(self, job: Job, outcome: Outcome) -> None:
        self._job, self._outcome = job, outcome
        self._kind = np.zeros(len(outcome.keys), np.uint16)
        self._kinds: dict[tuple[str, ...], int] = {}
        self.error: FeaturepipeError | None = None
        self.workers: dict[tuple[str, str, int], WorkerBooks] = {}

    def take(self, piece: Slice, done: Done) -> list[Loaded]:
        """Books the rows of a slice that were dealt with; returns the rejected and the damaged ones."""
        outcome = self._outcome
        rows = self._job.plan.todo[piece.start : piece.start + piece.rows]
        reached = done.status != UNTOUCHED
        outcome.keys[rows[done.has_key]] = done.keys
        outcome.has_key[rows[reached]] = done.has_key[reached]
        outcome.read += int(reached.sum())
        codes = np.array([0] * COMPUTED + [self._code(kind) for kind in done.kinds], np.uint16)
        self._kind[rows] = codes[done.status]
        rejected = {int(rows[place]): reason for place, reason in done.reasons.items()}
        outcome.reasons.update(rejected)
        damaged = {int(rows[place]): damage for place, damage in done.damage.items()}
        outcome.damage.update(damaged)
        self._note(int(reached.sum()), done)
        keys = outcome.keys
        return [
            Loaded(row, keys[row].tobytes() if outcome.has_key[row] else None, reason=reason)
            for row, reason in rejected.items()
        ] + [Loaded(row, keys[row].tobytes(), damage=damage) for row, damage in damaged.items()]

    def close(self) -> None:
        """Counts what was computed, each key once; everything else that could be read was known."""
        outcome = self._outcome
        rows = np.flatnonzero(self._kind)
        keys = np.ascontiguousarray(outcome.keys[rows]).view(f"S{KEY_BYTES}").ravel()
        first = rows[np.unique(keys, return_index=True)[1]]
        outcome.computed = len(first)
        outcome.known = self._job.plan.known + self._usable() - len(first)
        for kind, code in self._kinds.items():
            outcome.columns.update(dict.fromkeys(kind, int((self._kind[first] == code).sum())))

    def _usable(self) -> int:
        """Rows that workers have dealt with and not rejected."""
        before = len(self._job.plan.rejected)
        return self._outcome.read - (len(self._outcome.reasons) - before)

    def _code(self, kind: tuple[str, ...]) -> int:
        return self._kinds.setdefault(kind, len(self._kinds) + 1)

    def _note(self, images: int, done: Done) -> None:
        worked = done.worked
        who = (worked.worker, worked.host, worked.pid)
        self.workers.setdefault(who, WorkerBooks(worked)).add(images, worked)
        for stage, seconds in worked.stages.items():
            self._job.clock.add(stage, seconds)
        self._outcome.tried_again += worked.tried_again
        self.error = self.error or done.error

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the run record."""
        workers = [worker.as_dict() for _, worker in sorted(self.workers.items())]
        return {"slices": sum(worker["slices"] for worker in workers), "workers": workers}

    @property
    def seconds(self) -> float:
        """What all workers have spent on slices."""
        return sum(worker.seconds for worker in self.workers.values())
