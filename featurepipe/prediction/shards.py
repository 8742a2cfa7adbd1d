"""Predicting a listing on any executor: the function that is mapped over its shards, and what the client makes of them."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from featurepipe import records
from featurepipe.backbones import Backbone
from featurepipe.errors import FeaturepipeError, UsageError, WorkerRefused
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.extraction.compute import check_source, located, source_seen_by
from featurepipe.extraction.ledger import WorkerTotals
from featurepipe.extraction.shards import Shard, ShardRun, ShardSizes, cut
from featurepipe.features.loader import StageSeconds
from featurepipe.features.session import alone_on_all_cores, check_travels, keep_memory, settle_machine_for
from featurepipe.features.settings import Machine
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.heads.bundle.files import MANIFEST
from featurepipe.images import Source
from featurepipe.interrupt import StopRequest
from featurepipe.prediction.files import Scored
from featurepipe.prediction.options import BundleOptions
from featurepipe.prediction.ready import ReadyBundle, make_ready
from featurepipe.progress import Progress, Silent

SCORE = "score"

ANSWER_BYTES = 8 << 20
"""Probabilities that a worker sends at once, about."""

LOOKAHEAD = 3
"""Shards for each worker that are under way, or wait for an earlier one: the results of so many may be in memory at once."""

PROBES = 4
"""Images by which workers show that they can read the source."""


@dataclass(frozen=True)
class PredictionHere:
    """A prediction by the process that asks for it: all in one shard.

    Attributes:
        ready: the bundle with its network.
        listing: of the source.
        clock: where the stages' time is added up.
        progress: told how far it is.
    """

    ready: ReadyBundle
    listing: pa.Table
    clock: StageSeconds
    progress: Progress


@dataclass
class PredictionContext:
    """What all shards of a prediction have in common.

    Attributes:
        bundle: the bundle's folder, or a bundle that travels; see `Prediction.of`.
        digest: of the bundle in that folder, see `digest_of`.
        options: how to run its network; ``workers`` is None for as many threads as a worker may use.
        source: the images.
        probes: locators of images from all over the source that the client can read; None for the listing's own.
        here: what this process has ready; does not travel.
    """

    bundle: str | Bundle
    digest: str
    options: BundleOptions
    source: Source = field(repr=False)
    probes: tuple[bytes, ...] | None = field(repr=False)
    here: PredictionHere | None = field(default=None, repr=False)
    _ready: ReadyBundle | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"here": None, "_ready": None}

    def close(self) -> None:
        """Closes the source, in a process elsewhere that needs it no longer."""
        self.source.close()

    def refusal(self) -> str:
        """Why this process cannot predict, as far as that is quickly told; empty if nothing speaks against it."""
        if isinstance(self.bundle, str) and (digest := digest_of(self.bundle)) != self.digest:
            there = "another bundle is at" if digest else "it does not see the bundle"
            return f"{there} {self.bundle}"
        said = ""
        for probe in self.probes or ():
            try:
                self.source.read(probe)
            except Exception as error:  # noqa: BLE001  # whatever it is, this process cannot read that image
                said = f"it cannot read the source: {error}"
            else:
                return ""
        return said

    @contextmanager
    def at(self, worker: Worker) -> Iterator[ReadyBundle]:
        """The bundle with its network, loaded when the worker's process first needs it, alone on all its cores.

        Raises:
            WorkerRefused: it does not see the bundle or the source, or would not compute the same features.
        """
        if self.here is not None:
            yield self.here.ready
            return
        with alone_on_all_cores(worker), threadpool_limits(worker.threads, user_api="blas"):
            if self._ready is None:
                self._ready = self._load(worker.threads)
            yield self._ready

    def _load(self, threads: int) -> ReadyBundle:
        if why := self.refusal():
            raise WorkerRefused(why)
        keep_memory()
        try:
            return make_ready(self.bundle, replace(self.options, workers=self.options.workers or threads))
        except FeaturepipeError as error:
            raise WorkerRefused(error.message) from error


@dataclass(frozen=True)
class PredictionRun(ShardRun):
    """How a worker fared with a shard.

    Attributes:
        weights_note: what was ignored or guessed when the network's weights were loaded there.
    """

    weights_note: str = ""


def digest_of(folder: str) -> str:
    """SHA-256 of what a bundle says of its files, and so of the bundle; empty if there is none to be seen."""
    try:
        return hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def predict_shard(
    context: PredictionContext, shard: Shard, worker: Worker, stop: Stop, report: Report
) -> PredictionRun:
    """Reads, computes and scores the images of a shard.

    Args:
        context: with what.
        shard: the images.
        worker: who works on it.
        stop: whether to come back with what is done.
        report: told of rows as they are scored, in order (`Scored`), and of lines for the user.

    Returns:
        How the worker fared.

    Raises:
        WorkerRefused: this process does not see the bundle or the source, or would not compute the same features.
    """
    here = context.here
    listing = shard.table() if here is None else here.listing
    clock = StageSeconds() if here is None else here.clock
    progress = _Lines(worker, report) if here is None else here.progress
    probes = None if context.probes is None else located(context.probes)
    reasons: list[str] = []
    rows = 0
    with context.at(worker) as ready, source_seen_by(worker):
        start = time.perf_counter()
        groups = ready.groups(context.source, listing, clock=clock, stop=stop, progress=progress, probes=probes)
        for group in groups:
            with clock.stage(SCORE):
                scored = Scored.of(ready, group, first=shard.start)
            report(scored)
            reasons += scored.reasons.values()
            rows += len(scored.numbers)
        check_source(context.source, context.probes or (), reasons, rows)
        note = ready.backbone.weights_note
        return PredictionRun.by(worker, ready.session.machine, time.perf_counter() - start, clock, weights_note=note)


class _Lines(Silent):
    """Reports what is said."""

    def __init__(self, worker: Worker, report: Report) -> None:
        self._worker, self._report = worker, report

    def say(self, message: str) -> None:
        """Reports a line."""
        self._report(self._worker.signed(message))


class Prediction:
    """Predicts listings with a bundle, on an executor.

    Attributes:
        bundle: the bundle that it predicts with.
        weights_note: what was ignored or guessed when the network's weights were loaded, here or by a worker; empty if all is
            as usual.
    """

    def __init__(
        self, executor: Executor, bundle: Bundle, ready: ReadyBundle | None, there: str | Bundle, options: BundleOptions
    ) -> None:
        self.bundle = bundle
        self.weights_note = ""
        self._executor, self._ready, self._there, self._options = executor, ready, there, options
        self._clock = StageSeconds()
        self._machine: Machine | None = None if ready is None else ready.session.machine
        self._totals: dict[tuple[str, str, int], WorkerTotals] = {}

    @classmethod
    def of(
        cls,
        executor: Executor,
        bundle: Bundle | str | PathLike[str],
        options: BundleOptions,
        *,
        loaded: Backbone | None = None,
    ) -> Self:
        """Reads the bundle; where this process predicts, loads its network, too.

        Args:
            executor: who predicts.
            bundle: the bundle or its folder.
            options: how to read images, and run the network.
            loaded: the bundle's network, if the bundle was made of it here: such a bundle travels to workers.

        Raises:
            BundleError: the bundle cannot be used, or the network gives other features.
            UsageError: others are to predict, and the bundle is not in a folder.
        """
        if executor.is_local:
            ready = make_ready(bundle, options, loaded=loaded)
            return cls(executor, ready.bundle, ready, "", options)
        if isinstance(bundle, Bundle) and loaded is not None:
            return cls(executor, bundle, None, bundle, options.in_full())
        if not isinstance(bundle, str | PathLike):
            raise UsageError(
                "on a cluster each worker reads the bundle for itself, so give its folder, under a path that all workers see; "
                "write it there with featurepipe.heads.bundle.bundle.write_bundle(path, bundle)"
            )
        return cls(executor, read_bundle(bundle), None, str(Path(bundle).absolute()), options.in_full())

    def run(
        self,
        images: Source,
        listing: pa.Table,
        stop: StopRequest,
        progress: Progress,
        take: Callable[[Scored], object],
    ) -> None:
        """Predicts all rows of a listing.

        Args:
            images: the source.
            listing: what it listed.
            stop: once true, rows that are done are the last.
            progress: told how far it is.
            take: given the rows in the listing's order.

        Raises:
            ClusterError: none of the workers can be used, or they are gone.
        """
        context, shards, sizes = self._context(images, listing, progress)
        if self._ready is not None:
            self._note_weights(self._ready.backbone.weights_note, progress)

        def told(what: str | Scored) -> None:
            if isinstance(what, str):
                progress.say(what)
            else:
                take(what)

        results = self._executor.map(
            predict_shard, shards, context=context, stop=stop, report=told, ordered=True, lookahead=LOOKAHEAD
        )
        with closing(results):
            for shard, run in results:
                self._note_weights(run.weights_note, progress)
                if context.here is None:
                    sizes.note(shard.rows, run.seconds)
                    who = run.worker, run.host, run.pid
                    self._totals.setdefault(who, WorkerTotals(run)).add(shard.rows, run)
                    progress.advance(shard.rows)

    def _note_weights(self, note: str, progress: Progress) -> None:
        """Keeps, and says once, what a worker tells of the weights; all workers have the same tensors."""
        if note and not self.weights_note:
            self.weights_note = note
            progress.say(f"weights {self._options.weights or self.bundle.backbone['weights']}: {note}")

    def _context(
        self, images: Source, listing: pa.Table, progress: Progress
    ) -> tuple[PredictionContext, Iterable[Shard], ShardSizes]:
        executor, sizes = self._executor, ShardSizes()
        if self._ready is not None:
            here = PredictionHere(self._ready, listing, self._clock, progress)
            context = PredictionContext("", "", self._options, images, None, here)
            return context, [Shard.whole(listing.num_rows)], sizes
        executor.check()
        check_travels(images)
        self._machine = settle_machine_for(executor, self._options, str(self.bundle.space["decode"]))
        self._machine = self._machine.for_images(listing.num_rows)
        settled = {name: getattr(self._machine, name) for name in ("device", "batch_size", "engine")}
        options = replace(self._options, **settled)
        probes = readable(images, listing["locator"])
        digest = digest_of(self._there) if isinstance(self._there, str) else ""
        context = PredictionContext(self._there, digest, options, images, probes)
        executor.require(partial(PredictionContext.refusal, context))
        sizes = WholeBatches(self._machine.batch_size, most=ANSWER_BYTES // (4 * len(self.bundle.classes) + 64))
        return context, cut(listing, np.arange(listing.num_rows), sizes, iter(executor.expected, -1)), sizes

    def facts(self, wall: float) -> dict[str, Any]:
        """What the record of ``wall`` seconds says of where it ran: ``seconds`` by stage, ``machine``, ``verdict``.

        Stages are added up over workers.
        """
        machine = asdict(self._machine) if self._machine else {}
        device = machine.get("device", "")
        about = self._executor.describe()
        if about is None:
            seconds = self._clock.totals
            return {"seconds": dict(seconds), "machine": machine, "verdict": verdict(seconds, wall, device=device)}
        stages: Counter[str] = Counter()
        for totals in self._totals.values():
            stages.update(totals.stages)
        busy = sum(totals.seconds for totals in self._totals.values())
        workers = [totals.as_dict() for _, totals in sorted(self._totals.items())]
        return {
            "seconds": dict(stages),
            "machine": machine,
            "cluster": {**about, "workers": workers},
            "verdict": verdict(stages, min(busy, wall * len(workers)), device=device),
        }


def readable(images: Source, locators: pa.ChunkedArray) -> tuple[bytes, ...]:
    """Locators of a few images, all over the source, that can be read here."""
    picked = np.unique(np.linspace(0, len(locators) - 1, 4 * PROBES).astype(int))
    in_turn = np.concatenate([picked[start::4] for start in range(4)])
    found: list[bytes] = []
    for locator in locators.take(pa.array(in_turn)).to_pylist():
        with suppress(Exception):  # whatever it is, that image cannot be read
            images.read(locator)
            found.append(locator)
        if len(found) == PROBES:
            break
    return tuple(found)


class WholeBatches(ShardSizes):
    """Sizes that are multiples of a batch."""

    def __init__(self, batch: int, *, most: int) -> None:
        super().__init__(most=max(batch, most // batch * batch))
        self._batch = batch

    def next(self, left: int, workers: int) -> int:
        """See `ShardSizes`."""
        return min(left, -(-super().next(left, workers) // self._batch) * self._batch)


def verdict(seconds: Mapping[str, float], wall: float, *, device: str) -> str:
    """One line that says what a prediction waited for, as `featurepipe.records.verdict`, or that it was the head."""
    scoring = seconds.get(SCORE, 0.0)
    if wall > records.TELLING_SECONDS and scoring > wall / 2:
        share = f"{100 * scoring / wall:.0f} %"
        return f"head-bound: scoring took {share} of the time; a linear head is many times faster"
    return records.verdict(seconds, wall, device=device)
