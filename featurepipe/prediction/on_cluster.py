"""Predicting on a cluster: workers take slices of the listing, the client puts what they answer in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurepipe.cluster import Team, connect, stop_of_task
from featurepipe.errors import UsageError
from featurepipe.extraction.books import WorkerBooks
from featurepipe.extraction.machine import Machine
from featurepipe.extraction.on_cluster import OnWorkers as ExtractingWorkers
from featurepipe.extraction.on_cluster import travelling
from featurepipe.extraction.options import Options
from featurepipe.extraction.slices import Sizes, Slice, Worked, cut
from featurepipe.extraction.worker_tasks import alone_at_desk
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.images import Source
from featurepipe.interrupt import StopRequest
from featurepipe.prediction.at_worker import Order, Predicted, digest_of, predict_slice, refusal
from featurepipe.prediction.scored import Scored
from featurepipe.prediction.scorers import Network, verdict
from featurepipe.progress import Progress

ANSWER_BYTES = 8 << 20
"""Probabilities that a worker sends at once, about."""

AHEAD = 3
"""Slices for each worker that are under way, or wait for an earlier one: so many answers may be in memory at once."""

PROBES = 4
"""Images by which workers show that they can read the source."""


@contextmanager
def workers_of(cluster: Any, bundle: Any, network: Network, say: Callable[[str], None]) -> Iterator[OnWorkers]:
    """Connects to a cluster for as long as the block runs.

    Raises:
        BundleError: the bundle cannot be read here.
        ClusterError: there is no such cluster, or none of its workers can be used.
        UsageError: the bundle is not in a folder.
    """
    if not isinstance(bundle, str | PathLike):
        raise UsageError(
            "on a cluster each worker reads the bundle for itself, so give its folder, under a path that all workers see; "
            "write it there with featurepipe.heads.bundle.bundle.write_bundle(path, bundle)"
        )
    model, folder = read_bundle(bundle), str(Path(bundle).absolute())
    with connect(cluster, say=say) as team:
        yield OnWorkers(team, model, folder, network.in_full(), team.address)


@dataclass
class OnWorkers:
    """Predicts on a team.

    Attributes:
        team: the workers.
        bundle: the bundle, as read here.
        folder: where workers find it.
        network: how they run its network.
        address: of the scheduler.
        machine: device, batch size and threads of the workers, once settled.
        books: what each worker process has done, by name, host and process.
    """

    team: Team
    bundle: Bundle
    folder: str
    network: Network
    address: str
    machine: Machine | None = None
    books: dict[tuple[str, str, int], WorkerBooks] = field(default_factory=dict)

    def scored(self, images: Source, listing: pa.Table, stop: StopRequest, progress: Progress) -> Iterator[Scored]:
        """Yields the rows in their order; answers that come early wait, and workers do not run far ahead of them."""
        self.team.check()
        self.machine = ExtractingWorkers(self.team, Options()).machine(self._options())
        network = replace(self.network, device=self.machine.device, batch_size=self.machine.batch_size)
        probes = readable(images, listing["locator"])
        order = Order(self.folder, digest_of(self.folder), network, travelling(images), probes)
        self._check(order)
        sizes = WholeBatches(self.machine.batch_size, most=ANSWER_BYTES // (4 * len(self.bundle.classes) + 64))
        slices = cut(listing, np.arange(listing.num_rows), sizes, iter(self.team.expected, -1))
        waiting: dict[int, Predicted] = {}
        following = 0
        flow = self.team.results(slices, partial(_predicted, order), stop=stop, ahead=AHEAD)
        with closing(flow) as answers:
            for piece, answer in answers:
                self._note(piece, answer.worked, sizes, progress)
                waiting[piece.number] = answer
                while following in waiting:
                    yield from waiting.pop(following).scored
                    following += 1

    def _check(self, order: Order) -> None:
        """Refuses workers that do not see the bundle or the source, before any work.

        A worker that is too busy to answer is looked at when it begins its first slice.
        """
        for address, said in self.team.ask(partial(refusal, order), self.team.addresses()).items():
            if said and isinstance(said, str):
                self.team.refuse(address, said)
        if not self.team.addresses():
            raise self.team.no_worker()

    def _note(self, piece: Slice, worked: Worked, sizes: Sizes, progress: Progress) -> None:
        for line in worked.said:
            progress.say(f"worker {worked.worker}: {line}")
        sizes.note(piece.rows, worked.seconds)
        books = self.books.setdefault((worked.worker, worked.host, worked.pid), WorkerBooks(worked))
        books.add(piece.rows, worked)
        progress.advance(piece.rows)

    def _options(self) -> Options:
        network, decode = self.network, str(self.bundle.space["decode"])
        return Options(device=network.device, batch_size=network.batch_size, workers=network.workers, decode=decode)

    def facts(self, wall: float) -> dict[str, Any]:
        """See `Scorer`; stages are added up over workers."""
        stages: Counter[str] = Counter()
        for books in self.books.values():
            stages.update(books.stages)
        busy = sum(books.seconds for books in self.books.values())
        workers = [books.as_dict() for _, books in sorted(self.books.items())]
        about = asdict(self.machine) if self.machine else {}
        return {
            "seconds": dict(stages),
            "machine": about,
            "cluster": {"scheduler": self.address, "refused": dict(self.team.refused), "workers": workers},
            "verdict": verdict(stages, min(busy, wall * len(workers)), device=about.get("device", "")),
        }


def _predicted(order: Order, piece: Slice) -> Predicted:
    """A task, as it runs in a worker."""
    with alone_at_desk() as desk:
        return predict_slice(order, piece, desk, stop_of_task())


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


class WholeBatches(Sizes):
    """Sizes that are multiples of a batch."""

    def __init__(self, batch: int, *, most: int) -> None:
        super().__init__(most=max(batch, most // batch * batch))
        self._batch = batch

    def next(self, left: int, workers: int) -> int:
        """See `Sizes`."""
        return min(left, -(-super().next(left, workers) // self._batch) * self._batch)
