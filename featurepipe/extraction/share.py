"""What a process of a cluster does with a slice: a function of the slice and the store, which knows nothing of Dask."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from featurepipe.backbones import Column
from featurepipe.errors import FeaturepipeError, SourceError, StoreError
from featurepipe.extraction.at_worker import Desk, Network, Ready, job_of, load_network, needing, open_travelled, probed
from featurepipe.extraction.auto import Settings
from featurepipe.extraction.compute import Outcome, compute_into
from featurepipe.extraction.load_task import Loaded
from featurepipe.extraction.options import KEEP, REJECT
from featurepipe.extraction.plan import KeySet, Plan, make_plan
from featurepipe.extraction.slices import COMPUTED, KNOWN, REJECTED, UNTOUCHED, Done, Slice, Worked
from featurepipe.extraction.wanted import Wanted
from featurepipe.images import Source
from featurepipe.store import FeatureStore, PartWriter, Space
from featurepipe.store.known_files import KNOWN_FILES, known_files
from featurepipe.store.parts import PartInfo


@dataclass(frozen=True)
class Order:
    """What the slices of a run have in common; it travels with each, so it is small.

    Attributes:
        store: path of the store.
        space: name of the feature space in it.
        run_id: names the parts.
        dataset: which the images' ids belong to.
        location: of the source, for messages.
        source: the source, pickled.
        probes: locators of images from all over the source.
        network: what computes.
        workers: threads that read and decode; None for as many as a worker may use.
        retry_rejects: whether bytes that were rejected are tried again.
        damaged: what becomes of JPEGs that libjpeg could only repair, see `Options`.
    """

    store: str
    space: str
    run_id: str
    dataset: str
    location: str
    source: bytes = field(repr=False)
    probes: tuple[bytes, ...] = field(repr=False)
    network: Network
    workers: int | None
    retry_rejects: bool
    damaged: str = REJECT


def compute_slice(order: Order, piece: Slice, desk: Desk, stop: Callable[[], bool]) -> Done:
    """Reads, keys, decodes, computes and commits the images of a slice that the store lacks.

    A slice may be worked on a second time, by this process or another one: what was committed for it stays, and only
    the rest is computed.

    Args:
        order: what the run wants.
        piece: the images.
        desk: who works on it.
        stop: whether to come back with what is done.

    Raises:
        WorkerRefused: this process would not compute the same features, or cannot read the source.
    """
    ready = load_network(order.network, desk.threads)
    source = open_travelled(order.source)
    with needing(source, order.probes) as doubt:
        store, space, wanted = _known(
            order.store, order.space, order.network.columns, order.retry_rejects, order.damaged, order.run_id
        )
        with store.lock(shared=True):
            share = _Share(order, piece, desk, space, wanted, ready, source)
            return share.work(stop, doubt)


class _Share:
    """One attempt at a slice."""

    def __init__(
        self, order: Order, piece: Slice, desk: Desk, space: Space, wanted: Wanted, ready: Ready, source: Source
    ) -> None:
        self.order, self.piece, self.desk, self.space = order, piece, desk, space
        self.names = _names(order)
        earlier = space.parts_of_share(order.run_id, piece.share)
        self.there = Wanted(None, order.network.columns).share(earlier)
        mine = wanted.share(earlier)
        settled = Settings.of_space(space.fields, why="as in the space")
        job = job_of(order.network, ready, source, settled, desk.machine(order.network, order.workers))
        self.job = replace(
            job,
            options=replace(job.options, damaged=order.damaged),
            dataset=order.dataset,
            space=space,
            wanted=mine,
            plan=_plan(piece, mine, earlier),
        )
        self.outcome = Outcome.of(self.job)
        self.untouched = np.zeros(piece.rows, bool)
        self.untouched[self.job.plan.todo] = True
        self.made = np.zeros((piece.rows, len(self.names)), bool)
        self.said: list[str] = []
        self.parts = self.bytes = 0

    def work(self, stop: Callable[[], bool], doubt: Callable[[Iterable[str], int], None]) -> Done:
        start, error = time.perf_counter(), None
        writer = self._writer()
        try:
            with writer:
                compute_into(writer, self.job, self.outcome, stop, self._follow, probes=probed(self.order.probes))
            doubt(self.outcome.reasons.values(), int(np.count_nonzero(~self.untouched)))
        except SourceError:
            raise  # this process alone may have lost the source
        except FeaturepipeError as ours:
            error = ours
        self.parts, self.bytes = len(writer.parts), writer.bytes
        return self._done(time.perf_counter() - start, error)

    def _writer(self) -> PartWriter:
        return self.space.writer(
            self.order.run_id,
            dataset=self.order.dataset,
            share=self.piece.share,
            part_bytes=self.desk.part_bytes,
            on_overflow=self.said.append,
        )

    def _follow(self, images: list[Loaded]) -> None:
        for image in images:
            self.untouched[image.row] = False
            if image.reason is None and image.missing:
                self.made[image.row, [self.names.index(name) for name in image.missing]] = True

    def _done(self, seconds: float, error: FeaturepipeError | None) -> Done:
        keys = np.ascontiguousarray(self.outcome.keys[self.outcome.has_key])
        for place, name in enumerate(self.names):  # what an earlier attempt has computed counts as this run's work
            self.made[self.outcome.has_key, place] |= self.there.holds(keys, name)
        self.made[list(self.outcome.reasons)] = False
        status = np.where(self.outcome.has_key, KNOWN, UNTOUCHED).astype(np.uint16)
        status[list(self.outcome.reasons)] = REJECTED
        computed = self.made.any(axis=1)
        sets, which = np.unique(self.made[computed], axis=0, return_inverse=True)
        status[computed] = COMPUTED + which.reshape(-1)
        status[self.untouched] = UNTOUCHED
        kinds = [tuple(name for name, has in zip(self.names, made, strict=True) if has) for made in sets]
        outcome, worked = self.outcome, self._worked(seconds)
        return Done(status, kinds, keys, outcome.has_key, outcome.reasons, worked, error, outcome.damage)

    def _worked(self, seconds: float) -> Worked:
        about = {"parts": self.parts, "bytes": self.bytes, "tried_again": self.outcome.tried_again}
        return self.desk.worked(self.job.machine, seconds, self.job.clock, **about, said=tuple(self.said))


def _plan(piece: Slice, wanted: Wanted, earlier: list[PartInfo]) -> Plan:
    """All of a slice, or what an earlier attempt has left of it."""
    listing, files = piece.table(), KNOWN_FILES.empty_table()
    if earlier:
        files = known_files(earlier, files, listing["id"], on_damage=lambda _part, _error: None)
    return make_plan(listing, files, wanted, KeySet(wanted.reasons))


def _names(order: Order) -> tuple[str, ...]:
    return tuple(str(column) for column in order.network.columns)


@lru_cache(maxsize=1)
def _known(
    store: str, space: str, columns: tuple[Column, ...], retry_rejects: bool, damaged: str, _run_id: str
) -> tuple[FeatureStore, Space, Wanted]:
    """What the store held when this process began to work for the run; its index is built once."""
    opened = FeatureStore(store, create=False)
    found = next((held for held in opened.spaces() if held.name == space), None)
    if found is None:
        raise StoreError(f"{store} has no feature space {space} as seen from {socket.gethostname()}")
    return opened, found, Wanted(found, columns, retry_rejects=retry_rejects, keep_damaged=damaged == KEEP)
