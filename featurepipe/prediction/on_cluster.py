"""Predicting on a cluster: workers take slices of the listing, the client puts what they answer in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa

from featurepipe.cluster import Team, connect, one_at_a_time, stop_of_task
from featurepipe.errors import Reject, SourceError, UsageError
from featurepipe.extraction.at_worker import Desk
from featurepipe.extraction.options import AUTO
from featurepipe.extraction.slices import Sizes, Slice, Worked, cut
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

CPU_BATCH, GPU_BATCH = 16, 256
"""Slices are multiples of what is a batch by default, so that images share batches with those that they would share here."""


MOST_SOURCE_BYTES = 1 << 20
"""A source that takes more is not a name of images but holds them."""

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
        yield OnWorkers(team, model, folder, network.in_full())


@dataclass
class OnWorkers:
    """Predicts on a team.

    Attributes:
        team: the workers.
        bundle: the bundle, as read here.
        folder: where workers find it.
        network: how they run its network.
        worked: how a worker fared with each slice, as they came in.
    """

    team: Team
    bundle: Bundle
    folder: str
    network: Network
    worked: list[Worked] = field(default_factory=list)

    def scored(self, images: Source, listing: pa.Table, stop: StopRequest, progress: Progress) -> Iterator[Scored]:
        """Yields the rows in their order; answers that come early wait, and workers do not run far ahead of them."""
        order = Order(
            self.folder, digest_of(self.folder), self.network, travelling(images), readable(images, listing["locator"])
        )
        self._check(order)
        sizes = WholeBatches(self._batch(), most=ANSWER_BYTES // (4 * len(self.bundle.classes) + 64))
        slices = cut(listing, np.arange(listing.num_rows), sizes, self._counts())
        waiting: dict[int, Predicted] = {}
        following = 0
        for piece, answer in self.team.results(slices, partial(_predicted, order), stop=stop, ahead=AHEAD):
            self._note(piece, answer, sizes, progress)
            waiting[piece.number] = answer
            while following in waiting:
                yield from waiting.pop(following).scored
                following += 1

    def _check(self, order: Order) -> None:
        """Refuses workers that do not see the bundle or the source, before any work."""
        self.team.check()
        for address, said in self.team.ask(partial(refusal, order), self.team.addresses()).items():
            if said:
                self.team.refuse(address, str(said))
        if not self.team.addresses():
            raise self.team.no_worker()

    def _note(self, piece: Slice, answer: Predicted, sizes: Sizes, progress: Progress) -> None:
        said = {line for worked in self.worked for line in worked.said}
        for line in answer.worked.said:
            if line not in said:
                progress.say(line)
        sizes.note(piece.rows, answer.worked.seconds)
        self.worked.append(answer.worked)
        progress.advance(piece.rows)

    def _counts(self) -> Iterator[int]:
        while True:
            yield len(self.team.addresses())

    def _batch(self) -> int:
        given = self.network.batch_size
        if given != AUTO:
            return int(given)
        return GPU_BATCH if any(worker.gpus for worker in self.team.workers()) else CPU_BATCH

    def facts(self, wall: float) -> dict[str, Any]:
        """See `Scorer`; stages are added up over workers."""
        seconds: dict[str, float] = {}
        for worked in self.worked:
            for stage, value in worked.stages.items():
                seconds[stage] = seconds.get(stage, 0.0) + value
        busy = sum(worked.seconds for worked in self.worked)
        device = "+".join(sorted({worked.device for worked in self.worked}))
        threads = max((worked.threads for worked in self.worked), default=0)
        return {
            "seconds": seconds,
            "machine": {"device": device, "batch_size": self.network.batch_size, "workers": threads},
            "cluster": {"workers": self._of_each_worker()},
            "verdict": verdict(seconds, busy, device=device) if self.worked else f"nothing came in {wall:.1f} s",
        }

    def _of_each_worker(self) -> list[Mapping[str, Any]]:
        each: dict[str, dict[str, Any]] = {}
        for worked in self.worked:
            about = {"host": worked.host, "pid": worked.pid, "device": worked.device, "slices": 0, "seconds": 0.0}
            found = each.setdefault(worked.worker, about)
            found["slices"] += 1
            found["seconds"] = round(found["seconds"] + worked.seconds, 3)
        return [{"name": name, **about} for name, about in each.items()]


def _predicted(order: Order, piece: Slice) -> Predicted:
    """A task, as it runs in a worker."""
    from distributed import get_worker

    worker = get_worker()
    desk = Desk(str(worker.name), worker.state.nthreads, worker.memory_manager.memory_limit or 0)
    with one_at_a_time():
        return predict_slice(order, piece, desk, stop_of_task())


def travelling(images: Source) -> bytes:
    """A source as it is sent to workers.

    Raises:
        UsageError: it holds images in memory.
    """
    content: bytes = cloudpickle.dumps(images)  # also of a class that workers cannot import
    if len(content) > MOST_SOURCE_BYTES:
        raise UsageError(
            f"the source {images.name} takes {len(content):,} bytes to send, which every slice of it would: its images, or "
            "their paths, are in memory. Write the images to files that all workers see, or the paths to a manifest"
        )
    return content


def readable(images: Source, locators: pa.ChunkedArray) -> tuple[bytes, ...]:
    """Locators of a few images, all over the source, that can be read here."""
    picked = np.unique(np.linspace(0, len(locators) - 1, 4 * PROBES).astype(int))
    in_turn = np.concatenate([picked[start::4] for start in range(4)])
    found: list[bytes] = []
    for locator in locators.take(pa.array(in_turn)).to_pylist():
        with suppress(Reject, SourceError):
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
