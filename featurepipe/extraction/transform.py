"""Features of images that are at hand, in the order given, from a store or computed: what `CNNFeatures` does."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, Self

import numpy as np

from featurepipe.backbones import Column, load_backbone
from featurepipe.errors import UsageError
from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor, executor_on
from featurepipe.extraction.compute import compute
from featurepipe.extraction.extract import existing_store
from featurepipe.extraction.given import GivenImages
from featurepipe.extraction.ledger import ExtractionLedger
from featurepipe.extraction.limits import ExtractionOptions
from featurepipe.extraction.prepare import ExtractionSpec, prepare
from featurepipe.extraction.publish import begin_run
from featurepipe.features.session import LoadedNetwork
from featurepipe.features.settings import Settings
from featurepipe.features.stream import FeatureStream
from featurepipe.images import Source
from featurepipe.interrupt import StopRequest
from featurepipe.progress import Progress, Silent, announcer, show
from featurepipe.store import FeatureStore, differences
from featurepipe.store.atomic import checked_folder
from featurepipe.store.locks import LOCK_EX, locked
from featurepipe.store.rows import ColumnRows

Store = FeatureStore | str | PathLike[str] | None
Rejects = dict[int, str]
Damage = dict[int, str]


class Transformation:
    """A network in one feature space, ready for images, with a store as its cache if there is one.

    Args:
        loaded: the network, and the engines built of it so far.
        columns: what to compute, in the order of the features.
        options: with the space's precision, stored dtype and decoding, none of them ``auto``.
        store: where features are kept, or None.
        space: the fields of the feature space.
        cluster: whose workers compute what the store lacks; None for this process.
    """

    def __init__(
        self,
        loaded: LoadedNetwork,
        columns: tuple[Column, ...],
        options: ExtractionOptions,
        store: Store,
        space: dict[str, Any],
        cluster: Any = None,
    ) -> None:
        self.columns, self.space = columns, space
        self.weights_note = loaded.backbone.weights_note
        self.widths = tuple(math.prod(loaded.backbone.feature_shape(column)) for column in columns)
        self._loaded, self._options, self._store = loaded, options, store
        self._cluster = cluster

    @classmethod
    def settle(cls, given: GivenImages, options: ExtractionOptions, store: Store, cluster: Any = None) -> Self:
        """Settles what is ``auto``, on the first of the images where it has to be measured; writes nothing.

        Raises:
            UsageError: there is a cluster and no store.
        """
        if cluster is not None and store is None:
            raise UsageError("workers of a cluster keep features in a store that all of them see; give store=DIR")
        held = None if store is None else existing_store(store)
        with executor_on(cluster, say=Silent().say) as executor:
            executor.check()
            job = prepare(given.source, held, None, options, Silent().say, dry_run=True, executor=executor)
        settled, session = _with(options, job.session.settled), job.session
        return cls(session.network_here, session.columns, settled, store, dict(job.fields), cluster)

    @classmethod
    def resume(cls, options: ExtractionOptions, store: Store, space: dict[str, Any], cluster: Any = None) -> Self:
        """Makes ready again what was settled before, perhaps on another machine."""
        settled = _with(options, Settings.of_space(space, why="as fitted"))
        backbone = load_backbone(options.backbone, options.weights, seed=options.seed)
        return cls(LoadedNetwork(backbone), tuple(backbone.columns(options.nodes)), settled, store, space, cluster)

    def features(self, given: GivenImages, *, silent: bool) -> tuple[np.ndarray, Rejects, Damage]:
        """Computes or looks up the features of all images.

        Returns:
            float32 (n, D) in the order given, NaN where an image cannot be used; by row of the source why; and by row what
            is wrong with images that were kept although they are damaged.

        Raises:
            UsageError: the network is not the one that was settled.
        """
        width = sum(self.widths)
        if not len(given):
            return np.zeros((0, width), np.float32), {}, {}
        if self._store is None:
            rows, rejects, damage = self._streamed(given.source, len(given.ids), silent=silent)
        else:
            rows, rejects, damage = self._through_store(given.source, self._store, silent=silent)
        in_order = len(given.ids) == len(given)
        return (rows if in_order else rows[given.place]), rejects, damage

    def _streamed(self, source: Source, count: int, *, silent: bool) -> tuple[np.ndarray, Rejects, Damage]:
        job = self._job(source, None)
        stream = FeatureStream(job.session)
        rows = np.full((count, sum(self.widths)), np.nan, np.float32)
        rejects: Rejects = {}
        damage: Damage = {}
        with show(count, "features", silent=silent) as progress:
            for batch in stream.batches(source, job.plan.listing, clock=job.clock, progress=progress):
                if len(batch.rows):
                    rows[batch.rows] = batch.vectors()
                rejects.update(batch.rejects)
                damage.update(batch.damage)
        return rows, rejects, damage

    def _through_store(
        self, source: Source, kept: FeatureStore | str | PathLike[str], *, silent: bool
    ) -> tuple[np.ndarray, Rejects, Damage]:
        store = kept if isinstance(kept, FeatureStore) else FeatureStore(kept)
        with store.lock(shared=True):
            job = self._job(source, store)
            if not len(job.plan.todo):
                ledger = self._compute(store, job, LocalExecutor(), Silent())
            else:
                with _one_at_a_time(store), executor_on(self._cluster, say=announcer(silent=silent)) as executor:
                    executor.check(store.path)
                    job = self._job(source, store, executor)  # others may have computed meanwhile what we lacked
                    with show(len(job.plan.todo), "features", silent=silent) as progress:
                        ledger = self._compute(store, job, executor, progress)
            return self._read(job, ledger), ledger.reasons, ledger.damage

    def _job(self, source: Source, store: FeatureStore | None, executor: Executor | None = None) -> ExtractionSpec:
        say, is_dry = Silent().say, store is None
        job = prepare(
            source, store, None, self._options, say,
            dry_run=is_dry, is_listing=False, loaded=self._loaded, executor=executor,
        )  # fmt: skip
        changed = differences(self.space, job.fields)
        if changed:
            raise UsageError(
                f"the network {self._options.backbone} is not the one that was fitted: {', '.join(changed)} differ; fit again"
            )
        return replace(job, session=replace(job.session, columns=self.columns))

    def _compute(
        self, store: FeatureStore, job: ExtractionSpec, executor: Executor, progress: Progress
    ) -> ExtractionLedger:
        """Computes and commits what the store lacks; leaves a run record if there was anything."""
        run = begin_run(store, job, "transform")
        compute(job, executor, run.id, run.ledger, StopRequest(), progress)
        run.ledger.check()
        if run.ledger.computed:
            run.end("done", 0)
        return run.ledger

    def _read(self, job: ExtractionSpec, ledger: ExtractionLedger) -> np.ndarray:
        """Reads by key what the store now holds."""
        usable = ledger.has_key.copy()
        usable[list(ledger.reasons)] = False
        rows = np.full((len(usable), sum(self.widths)), np.nan, np.float32)
        start = 0
        for column, width in zip(map(str, self.columns), self.widths, strict=True):
            index = job.existing_space.index([column])
            part, row, _ = index.locate(ledger.keys[usable], column)
            found = ColumnRows.of(column, index.parts, part, row, width=width)
            rows[usable, start : start + width] = found.read(np.float32)
            start += width
        return rows


def _with(options: ExtractionOptions, settings: Settings) -> ExtractionOptions:
    """The options with all that is ``auto`` settled."""
    values: dict[str, Any] = settings.values()
    return replace(options, **values)


@contextmanager
def _one_at_a_time(store: FeatureStore) -> Iterator[None]:
    """Waits until no other process or thread computes here: those of a grid search want nearly the same images.

    The lock is on a folder that nobody else locks, and the kernel drops it when a process dies.
    """
    descriptor = os.open(checked_folder(store.path / "spaces"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        locked(descriptor, LOCK_EX)  # else the same images may be computed twice, which does no harm
        yield
    finally:
        os.close(descriptor)
