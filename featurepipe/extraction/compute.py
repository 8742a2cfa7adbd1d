"""From images to committed rows: the function that every executor maps over the shards of a listing, and the run that does it."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from featurepipe.errors import FeaturepipeError, SourceError, StoreError, WorkerRefused
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.extraction.ledger import FACTS, Bookkeeping, ExtractionLedger, RejectLog, ShardLedger, committed
from featurepipe.extraction.plan import KeySet, MissingColumns, Plan, make_plan
from featurepipe.extraction.prepare import ExtractionSpec
from featurepipe.extraction.shards import (
    COMPUTED,
    KNOWN,
    REJECTED,
    UNTOUCHED,
    Shard,
    ShardResult,
    ShardRun,
    ShardSizes,
    cut,
)
from featurepipe.features.loader import Loaded, StageSeconds
from featurepipe.features.options import RejectOptions
from featurepipe.features.reading import GONE, PatientReader
from featurepipe.features.session import Session, check_travels
from featurepipe.features.stream import Batches, Sink
from featurepipe.images import Source
from featurepipe.partitions import take
from featurepipe.progress import Progress
from featurepipe.records import bottleneck
from featurepipe.store import FeatureStore, PartWriter, Space
from featurepipe.store.keys import KNOWN_FILES, known_files
from featurepipe.store.parts import PartInfo
from featurepipe.store.writer import DEFAULT_PART_BYTES

PROBES = 16
"""Images from all over the source by which a worker tells that it still sees it."""
LEAST_PART_BYTES = 4 * 1024 * 1024
PART_SHARE = 32
"""A part that is being filled, and one that is being written, each hold at most this fraction of the worker's memory limit."""


@dataclass
class ShardWork:
    """What a shard is computed with in the process that does it.

    Attributes:
        space: where features go.
        missing: which columns each image lacks.
        plan: what to read of the shard's listing.
        ledger: what became of its rows.
        clock: of its stages.
        name: of the shard's parts; None for all of a run.
        earlier: which columns an earlier attempt at the shard has left.
    """

    space: Space
    missing: MissingColumns
    plan: Plan
    ledger: ExtractionLedger
    clock: StageSeconds
    name: str | None = None
    earlier: MissingColumns | None = None


@dataclass
class ExtractionContext:
    """What all shards of a run have in common.

    Attributes:
        session: the network and its settings.
        source: the images.
        dataset: which the images' ids belong to.
        run_id: names the parts.
        store: path of the store.
        space: name of the feature space in it.
        probes: locators of images from all over the source; None for the listing's own.
        rejects: what becomes of images that are no good.
        here: the whole run in this process; does not travel.
    """

    session: Session
    source: Source
    dataset: str
    run_id: str
    store: str
    space: str
    probes: tuple[bytes, ...] | None
    rejects: RejectOptions
    here: ShardWork | None = field(default=None, repr=False)
    _opened: tuple[FeatureStore, Space, MissingColumns] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"here": None, "_opened": None}

    def close(self) -> None:
        """Closes the source, in a process elsewhere that needs it no longer."""
        self.source.close()

    @contextmanager
    def work(self, session: Session, shard: Shard) -> Iterator[ShardWork]:
        """What a shard is computed with, in this process; the store is kept from `gc` meanwhile."""
        if self.here is not None:
            yield self.here
            return
        store, space, missing = self._open()
        with store.lock(shared=True):
            yield self._work(session, shard, space, missing)

    def _work(self, session: Session, shard: Shard, space: Space, missing: MissingColumns) -> ShardWork:
        parts = space.parts_of_shard(self.run_id, shard.name)
        mine = missing.of_shard(parts)
        plan = _shard_plan(shard, mine, parts)
        earlier = MissingColumns(None, session.columns).of_shard(parts)
        return ShardWork(space, mine, plan, ExtractionLedger.of(plan, mine), StageSeconds(), shard.name, earlier)

    def _open(self) -> tuple[FeatureStore, Space, MissingColumns]:
        """What the store held when this process began to work for the run; its index is built once."""
        if self._opened is None:
            store = FeatureStore(self.store, create=False)
            space = next((space for space in store.spaces() if space.name == self.space), None)
            if space is None:
                raise StoreError(f"{self.store} has no feature space {self.space} as seen from {socket.gethostname()}")
            missing = MissingColumns(space, self.session.columns, self.rejects)
            self._opened = store, space, missing
        return self._opened


def _shard_plan(shard: Shard, missing: MissingColumns, earlier: list[PartInfo]) -> Plan:
    """All of a shard, or what an earlier attempt has left of it."""
    listing, files = shard.table(), KNOWN_FILES.empty_table()
    if earlier:
        files = known_files(earlier, files, listing["id"], on_damage=lambda _part, _error: None)
    return make_plan(listing, files, missing, KeySet(missing.reasons))


def compute_shard(
    context: ExtractionContext, shard: Shard, worker: Worker, stop: Stop, report: Report
) -> ShardResult | None:
    """Reads, keys, decodes, computes and commits the images of a shard that the store lacks.

    A shard may be worked on a second time, by this process or another one: what was committed for it stays, and only
    the rest is computed. Everything handed to the writer is committed when this returns, and also when it raises; when the
    source goes away, all that was read before is computed and committed, too.

    Args:
        context: what the run is to do.
        shard: the images.
        worker: who does it.
        stop: whether to come back with what is done.
        report: told lines for the user; in the process of the run also the images, as they are entered.

    Returns:
        What became of the rows; None in the process of the run, whose ledger has it.

    Raises:
        WorkerRefused: this worker would not compute the same features, or cannot read the source.
        SourceError: the source has gone, as the process of the run sees it.
    """
    with context.session.at(worker) as session, source_seen_by(worker), context.work(session, shard) as work:
        writer = _writer(context, work, worker, report)
        if worker.is_local:
            with _counting_committed(writer, work.ledger):
                compute_into(writer, session, context, work, stop, report)
            return None
        return _Attempt(context, session, shard, work, worker).run(writer, stop)


def _writer(context: ExtractionContext, work: ShardWork, worker: Worker, report: Report) -> PartWriter:
    """A writer of the shard's parts; reports values too large for float16."""

    def say(line: str) -> None:
        report(worker.signed(line))

    return work.space.writer(
        context.run_id,
        dataset=context.dataset,
        shard=work.name or "",
        part_bytes=part_bytes(worker),
        on_overflow=say,
    )


@contextmanager
def _counting_committed(writer: PartWriter, ledger: ExtractionLedger) -> Iterator[PartWriter]:
    """Enters a writer; where it ends by an error, what it has not committed was not computed, as the next run will see it."""
    try:
        with writer:
            yield writer
    except BaseException:
        ledger.computed = writer.rows
        ledger.columns = Counter()
        for part in writer.parts:
            ledger.columns.update(dict.fromkeys(part.columns, part.rows))
        ledger.lose_copies(writer.parts)
        raise


class _Attempt:
    """One attempt at a shard by a worker elsewhere."""

    def __init__(
        self, context: ExtractionContext, session: Session, shard: Shard, work: ShardWork, worker: Worker
    ) -> None:
        self.context, self.session, self.shard, self.work, self.worker = context, session, shard, work, worker
        self.names = tuple(map(str, session.columns))
        self.untouched = np.zeros(shard.rows, bool)
        self.untouched[work.plan.todo] = True
        self.made = np.zeros((shard.rows, len(self.names)), bool)

    def run(self, writer: PartWriter, stop: Stop) -> ShardResult:
        start, error = time.perf_counter(), None
        try:
            with writer:
                compute_into(writer, self.session, self.context, self.work, stop, self._follow)
            self._doubt()
        except SourceError:
            raise  # this process alone may have lost the source
        except FeaturepipeError as ours:
            error = ours
            self._lose(writer.parts)
        return self._result(writer, time.perf_counter() - start, error)

    def _follow(self, images: list[Loaded]) -> None:
        for image in images:
            self.untouched[image.row] = False
            if image.reason is None and image.missing:
                self.made[image.row, [self.names.index(name) for name in image.missing]] = True

    def _doubt(self) -> None:
        reasons, reached = self.work.ledger.reasons.values(), int(np.count_nonzero(~self.untouched))
        check_source(self.context.source, self.context.probes or (), reasons, reached)

    def _lose(self, parts: Sequence[PartInfo]) -> None:
        """Has rows untouched again whose features, or those of the image that they are a copy of, were not committed."""
        claimed = KeySet(self.work.missing.claimed).contains(self.work.ledger.keys) & self.work.ledger.has_key
        claimed[claimed] = ~committed(parts, self.work.ledger.keys[claimed])
        self.made[claimed] = False
        self.untouched |= claimed

    def _result(self, writer: PartWriter, seconds: float, error: FeaturepipeError | None) -> ShardResult:
        ledger, earlier = self.work.ledger, self.work.earlier
        keys = np.ascontiguousarray(ledger.keys[ledger.has_key])
        if earlier is not None:
            for place, name in enumerate(self.names):  # what an earlier attempt has computed counts as this run's work
                self.made[ledger.has_key, place] |= earlier.holds(keys, name)
        self.made[list(ledger.reasons)] = False
        status = np.where(ledger.has_key, KNOWN, UNTOUCHED).astype(np.uint16)
        status[list(ledger.reasons)] = REJECTED
        computed = self.made.any(axis=1)
        sets, which = np.unique(self.made[computed], axis=0, return_inverse=True)
        status[computed] = COMPUTED + which.reshape(-1)
        status[self.untouched] = UNTOUCHED
        kinds = [tuple(name for name, has in zip(self.names, made, strict=True) if has) for made in sets]
        about = {
            "parts": len(writer.parts),
            "bytes": writer.bytes,
            "tried_again": ledger.tried_again,
            "remarks": dict(ledger.remarks),
        }
        run = ShardRun.by(self.worker, self.session.machine, seconds, self.work.clock, **about)
        return ShardResult(status, kinds, keys, ledger.has_key, ledger.reasons, run, error, ledger.damage)


def part_bytes(worker: Worker) -> int:
    """What a part may hold: the usual, or less where a worker's memory is scarce."""
    fraction = worker.memory // PART_SHARE if worker.memory else DEFAULT_PART_BYTES
    return max(LEAST_PART_BYTES, min(DEFAULT_PART_BYTES, fraction))


@contextmanager
def source_seen_by(worker: Worker) -> Iterator[None]:
    """Whoever loses the source elsewhere is refused, since others perhaps can read it.

    Raises:
        WorkerRefused: a worker elsewhere cannot read the source.
    """
    try:
        yield
    except SourceError as error:
        if worker.is_local:
            raise
        raise WorkerRefused(f"it cannot read the source: {error}") from error


def check_source(source: Source, probes: Sequence[bytes], reasons: Iterable[str], rows: int) -> None:
    """Looks for the source if it seems that none at all of some images could be read.

    Args:
        source: as this process reads it.
        probes: locators of images that can be read as long as the source is there.
        reasons: why images could not be used.
        rows: how many images there were.

    Raises:
        SourceError: this process cannot read the source; others perhaps can.
    """
    gone = [reason for reason in reasons if reason.startswith(GONE)]
    if gone and len(gone) == rows and probes:
        PatientReader(source, located(probes)).check(gone[0])


def located(probes: Sequence[bytes]) -> pa.ChunkedArray:
    """Locators as a listing has them."""
    return pa.chunked_array([pa.array(probes, pa.binary())])


def compute_into(
    writer: PartWriter,
    session: Session,
    context: ExtractionContext,
    work: ShardWork,
    stop: Stop,
    follow: Callable[[list[Loaded]], object],
) -> None:
    """Reads, keys, decodes and computes what a plan asks for, and hands it to a writer.

    Args:
        writer: of the space's parts.
        session: what computes.
        context: of the run.
        work: the plan, and the ledger that is kept as images go by.
        stop: whether to stop at the next safe place.
        follow: shown every image after it was entered.
    """
    by_name = {str(column): column for column in session.columns}
    loader = session.loader(context.source, work.missing, work.clock)
    batches = Batches(
        lambda missing: session.engine([by_name[name] for name in missing]),
        store_sink(work.plan.listing, writer),
        batch_size=session.machine.batch_size,
        clock=work.clock,
    )
    entries = Bookkeeping(work.ledger, batches, work.missing)
    probes = None if context.probes is None else located(context.probes)
    with _finishing(batches):
        for images in loader.load(work.plan.listing, work.plan.todo, stop, probes=probes):
            entries.take(images)
            follow(images)
            writer.tick()
    work.ledger.tried_again = loader.tried_again


@contextmanager
def _finishing(batches: Batches) -> Iterator[None]:
    """Computes what has been loaded, also when the source goes away."""
    try:
        yield
    except SourceError:
        batches.finish()
        raise
    batches.finish()


def store_sink(listing: pa.Table, writer: PartWriter) -> Sink:
    """A sink that hands rows to the store, with the ids, sizes and times of the listing."""
    listed = listing.select(FACTS)

    def add(images: list[Loaded], features: dict[str, np.ndarray]) -> None:
        facts = take(listed, np.array([image.row for image in images], np.int64))
        keys = np.frombuffer(b"".join(image.key or b"" for image in images), dtype=np.uint8).reshape(len(images), -1)
        writer.add(keys, facts["id"].to_pylist(), facts["size"].to_numpy(), facts["mtime_ns"].to_numpy(), features)

    return add


def compute(
    job: ExtractionSpec, executor: Executor, run_id: str, ledger: ExtractionLedger, stop: Stop, progress: Progress
) -> None:
    """Has an executor compute and commit what the plan asks for, until done or asked to stop.

    Features never travel: whoever computes them commits parts of its own. This process alone writes the snapshot, the run
    record, and what workers elsewhere have rejected.

    Args:
        job: what to do.
        executor: who does it.
        run_id: names the parts.
        ledger: of the run, kept as images or shards are done.
        stop: whether to stop at the next safe place.
        progress: where to tell how far it is.

    Raises:
        ClusterError: the scheduler or the last worker is gone; what was committed stands.
        FeaturepipeError: what a worker ran into; it, and the others, have committed what they had computed.
    """
    if not len(job.plan.todo):
        return
    here = ShardWork(job.existing_space, job.missing, job.plan, ledger, job.clock) if executor.is_local else None
    sizes, entries = ShardSizes(), ShardLedger(job.plan, ledger, job.clock)

    if here is not None:
        shards: Iterable[Shard] = [Shard.whole(len(job.plan.todo))]
    else:
        shards = cut(job.plan.listing, job.plan.todo, sizes, iter(executor.expected, -1))
    rejects = RejectLog(job.plan.listing, job.existing_space, job.dataset, run_id)

    def told(what: str | list[Loaded]) -> None:
        if isinstance(what, str):
            progress.say(what)
        else:
            rejects.take(what)
            progress.advance(len(what), f"{bottleneck(job.clock.totals)}-bound")

    results = executor.map(
        compute_shard,
        shards,
        context=_context(job, run_id, here),
        stop=lambda: stop() or entries.error is not None,
        report=told,
    )
    start = time.perf_counter()
    try:
        with rejects, closing(results):
            for shard, result in results:
                if result is not None:
                    rejects.take(entries.take(shard, result))
                    reached = int(np.count_nonzero(result.status))
                    sizes.note(reached, result.run.seconds)
                    progress.advance(reached, _bound(job, executor))
    finally:
        ledger.seconds = time.perf_counter() - start
        if here is None:
            entries.close()
            ledger.busy, ledger.cluster = entries.seconds, {**(executor.describe() or {}), **entries.as_dict()}
    if entries.error is not None:
        raise entries.error


def _bound(job: ExtractionSpec, executor: Executor) -> str:
    workers = executor.count()
    return f"{bottleneck(job.clock.totals)}-bound, {workers} worker{'s' * (workers != 1)}"


def _context(job: ExtractionSpec, run_id: str, here: ShardWork | None) -> ExtractionContext:
    space, probes = job.existing_space, None
    if here is None:
        check_travels(job.source)
        locators = job.plan.listing["locator"]
        places = np.unique(np.linspace(0, len(locators) - 1, PROBES).astype(int))
        probes = tuple(take(locators, places).to_pylist())
    return ExtractionContext(
        session=job.session,
        source=job.source,
        dataset=job.dataset,
        run_id=run_id,
        store=str(space.path.absolute().parents[1]),
        space=space.name,
        probes=probes,
        rejects=RejectOptions.of(job.options),
        here=here,
    )
