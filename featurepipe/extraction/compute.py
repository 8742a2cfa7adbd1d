"""From loaded images to committed rows, and the books that must balance."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa

from featurepipe.errors import FeaturepipeError, SourceError
from featurepipe.extraction.batches import Batches, Sink
from featurepipe.extraction.load_task import Loaded
from featurepipe.extraction.plan import KeySet
from featurepipe.extraction.prepare import Job
from featurepipe.extraction.wanted import Wanted
from featurepipe.progress import Progress
from featurepipe.records import bottleneck
from featurepipe.store import PartWriter, Space

FACTS = ["id", "size", "mtime_ns"]


@dataclass
class Outcome:
    """What became of every row of the listing.

    Attributes:
        keys: uint8 (rows, 32), filled where ``has_key``.
        has_key: bool (rows,), which images could be read, now or before.
        reasons: why an image was rejected, by row.
        damage: what is wrong with an image that was kept on request although it is damaged, by row.
        computed: rows whose features were computed and handed to the store.
        known: rows whose features the store had, or gets from another row with the same bytes.
        read: how many images were read.
        tried_again: how many of those could be read only at a further try.
        columns: for how many images each column was computed.
        seconds: wall-clock time of it all.
        busy: what all workers together have spent, where a cluster computed; else None.
        cluster: who computed there, and what, as plain JSON values; else None.
    """

    keys: np.ndarray
    has_key: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    damage: dict[int, str] = field(default_factory=dict)
    computed: int = 0
    known: int = 0
    read: int = 0
    tried_again: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    busy: float | None = None
    cluster: dict[str, Any] | None = None

    @classmethod
    def of(cls, job: Job) -> Self:
        """The books of a job that has not begun: what is known and what was rejected before is settled."""
        plan = job.plan
        outcome = cls(plan.keys.copy(), plan.has_key.copy(), known=plan.known)
        outcome.reasons = {int(row): job.wanted.reasons[plan.keys[row].tobytes()] for row in plan.rejected}
        settled = plan.has_key & KeySet(job.wanted.damaged).contains(plan.keys)
        settled[plan.todo] = False
        outcome.damage = {int(row): job.wanted.damaged[plan.keys[row].tobytes()] for row in np.flatnonzero(settled)}
        return outcome

    @property
    def accounted(self) -> int:
        """How many rows are computed, known or rejected."""
        return self.computed + self.known + len(self.reasons)

    def check(self) -> None:
        """Every listed image is accounted for, or the run fails.

        Raises:
            FeaturepipeError: the counts do not add up; a defect of ours that must not go unseen.
        """
        if self.accounted != len(self.keys):
            raise FeaturepipeError(
                f"{len(self.keys)} images were listed but {self.accounted} are accounted for ({self.computed} computed, "
                f"{self.known} known, {len(self.reasons)} rejected); no snapshot was written. Please report this as a bug"
            )


class Bookkeeping:
    """Books every loaded image, and passes on those that are to be computed.

    Args:
        outcome: the books, kept as images go by.
        batches: what computes.
        wanted: what is wrong with bytes that are kept, and the keys being computed in this run; kept up to date here.
    """

    def __init__(self, outcome: Outcome, batches: Batches, wanted: Wanted) -> None:
        self._outcome, self._batches, self._damaged, self._claimed = outcome, batches, wanted.damaged, wanted.claimed

    def take(self, images: Iterable[Loaded]) -> None:
        """Books each image, and runs the batches that are full."""
        for image in images:
            self._book(image)
            if image.pixels is not None and image.key is not None and image.key not in self._claimed:
                self._claimed.add(image.key)
                self._outcome.computed += 1
                self._outcome.columns.update(image.missing)
                self._batches.add(image)
            elif image.reason is None:
                self._outcome.known += 1

    def _book(self, image: Loaded) -> None:
        self._outcome.read += 1
        if image.key is not None:
            self._outcome.keys[image.row] = np.frombuffer(image.key, dtype=np.uint8)
        self._outcome.has_key[image.row] = image.key is not None
        if image.reason is not None:
            self._outcome.reasons[image.row] = image.reason
        elif image.key is not None and (damage := image.damage or self._damaged.get(image.key)):
            self._outcome.damage[image.row] = self._damaged[image.key] = damage


def store_sink(listing: pa.Table, writer: PartWriter) -> Sink:
    """A sink that hands rows to the store, with the ids, sizes and times of the listing."""
    listed = listing.select(FACTS)

    def add(images: list[Loaded], features: dict[str, np.ndarray]) -> None:
        facts = listed.take(pa.array([image.row for image in images]))
        keys = np.frombuffer(b"".join(image.key or b"" for image in images), dtype=np.uint8).reshape(len(images), -1)
        writer.add(keys, facts["id"].to_pylist(), facts["size"].to_numpy(), facts["mtime_ns"].to_numpy(), features)

    return add


def compute(job: Job, run_id: str, outcome: Outcome, stop: Callable[[], bool], progress: Progress) -> None:
    """Reads, keys, decodes, computes and commits what the plan asks for, until done or asked to stop.

    Everything handed to the writer is committed when this returns, and also when it raises; when the source goes away,
    all that was read before is computed and committed, too.

    Args:
        job: what to do.
        run_id: names the parts.
        outcome: the books, kept as images go by.
        stop: whether to stop at the next safe place.
        progress: where to tell how far it is.
    """
    plan, space = job.plan, job.existing_space
    if not len(plan.todo):
        return
    rejects = RejectLog(plan.listing, space, job.dataset, run_id)

    def follow(images: list[Loaded]) -> None:
        rejects.take(images)
        progress.advance(len(images), f"{bottleneck(job.clock.totals)}-bound")

    start = time.perf_counter()
    with (
        _counting_committed(space.writer(run_id, dataset=job.dataset, on_overflow=progress.say), outcome) as writer,
        rejects,
    ):
        compute_into(writer, job, outcome, stop, follow)
    outcome.seconds = time.perf_counter() - start


@contextmanager
def _counting_committed(writer: PartWriter, outcome: Outcome) -> Iterator[PartWriter]:
    """Enters a writer; where it ends by an error, what it has not committed was not computed, as the next run will see it."""
    try:
        with writer:
            yield writer
    except BaseException:
        outcome.computed = writer.rows
        outcome.columns = Counter()
        for part in writer.parts:
            outcome.columns.update(dict.fromkeys(part.columns, part.rows))
        raise


def compute_into(
    writer: PartWriter,
    job: Job,
    outcome: Outcome,
    stop: Callable[[], bool],
    follow: Callable[[list[Loaded]], None],
    *,
    probes: pa.ChunkedArray | None = None,
) -> None:
    """Reads, keys, decodes and computes what the plan asks for, and hands it to a writer; see `compute`.

    Args:
        writer: of parts.
        job: what to do.
        outcome: the books, kept as images go by.
        stop: whether to stop at the next safe place.
        follow: shown every image after it was booked.
        probes: see `Loader.load`.
    """
    by_name = {str(column): column for column in job.columns}
    loader = job.loader(job.wanted)
    batches = Batches(
        lambda missing: job.engine([by_name[name] for name in missing]),
        store_sink(job.plan.listing, writer),
        batch_size=job.machine.batch_size,
        clock=job.clock,
    )
    books = Bookkeeping(outcome, batches, job.wanted)
    with _finishing(batches):
        for images in loader.load(job.plan.listing, job.plan.todo, stop, probes=probes):
            books.take(images)
            follow(images)
            writer.tick()
    outcome.tried_again = loader.tried_again


@contextmanager
def _finishing(batches: Batches) -> Iterator[None]:
    """Computes what has been loaded, also when the source goes away."""
    try:
        yield
    except SourceError:
        batches.finish()
        raise
    batches.finish()


class RejectLog:
    """Collects rejects and writes them to the space every so often, and at the end of the block that it is entered for."""

    def __init__(self, listing: pa.Table, space: Space, dataset: str, run_id: str, every: int = 256) -> None:
        self._listing, self._space, self._dataset, self._run_id, self._every = listing, space, dataset, run_id, every
        self._rows: list[dict[str, Any]] = []
        known = space.rejects(dataset=dataset).select([*FACTS, "reason"]).to_pylist()
        self._known = {tuple(row.values()) for row in known}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()

    def take(self, images: Iterable[Loaded]) -> None:
        """Notes the rejected ones, and those kept although they are damaged."""
        for image in images:
            if (reason := image.reason or image.damage) is not None:
                facts = self._listing.select(FACTS).slice(image.row, 1).to_pylist()[0]
                if (*facts.values(), reason) in self._known:
                    continue  # what cannot be read has no key, is tried every time, and need not be noted every time
                self._rows.append({**facts, "key": image.key, "reason": reason, "run_id": self._run_id})
        if len(self._rows) >= self._every:
            self.write()

    def write(self) -> None:
        """Hands the collected rejects to the space."""
        if self._rows:
            self._space.add_rejects(self._rows, dataset=self._dataset)
            self._rows = []
