"""Who predicts the rows of a listing: this process, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from featurepipe import records
from featurepipe.extraction.options import AUTO
from featurepipe.extraction.stream import StageSeconds
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.images import Source
from featurepipe.interrupt import StopRequest
from featurepipe.prediction.ready import ReadyBundle, make_ready
from featurepipe.prediction.scored import Scored
from featurepipe.progress import Progress

SCORE = "score"


@dataclass(frozen=True)
class Network:
    """How to run the bundle's network; the fields are arguments of `featurepipe.prediction.ready.make_ready`."""

    weights: str | PathLike[str] | None = None
    device: str = AUTO
    batch_size: int | str = AUTO
    workers: int | None = None
    trust_code: bool = False

    def ready(self, bundle: Bundle | str | PathLike[str]) -> ReadyBundle:
        """Loads the network of a bundle; raises as ``make_ready``."""
        return make_ready(bundle, **asdict(self))

    def in_full(self) -> Network:
        """The same for processes that stand in another folder."""
        is_file = self.weights is not None and Path(self.weights).exists()
        return replace(self, weights=str(Path(self.weights or "").absolute())) if is_file else self


class Scorer(Protocol):
    """Predicts the rows of a listing.

    Attributes:
        bundle: the bundle that it predicts with.
    """

    bundle: Bundle

    def scored(self, images: Source, listing: pa.Table, stop: StopRequest, progress: Progress) -> Iterator[Scored]:
        """Yields all rows of a listing in its order; once ``stop()`` is true, those that are done are the last."""
        ...

    def facts(self, wall: float) -> dict[str, Any]:
        """What the record of ``wall`` seconds says of where it ran: ``seconds`` by stage, ``machine``, ``verdict``."""
        ...


@contextmanager
def scorer(bundle: Any, network: Network, cluster: Any, say: Callable[[str], None]) -> Iterator[Scorer]:
    """Makes ready what predicts: here, or on a cluster, which is let go at the end of the block.

    Raises:
        BundleError: the bundle cannot be used, or the network gives other features.
        ClusterError: there is no such cluster, or none of its workers can be used.
    """
    if cluster is None:
        yield Here(network.ready(bundle))
        return
    from featurepipe.prediction.on_cluster import workers_of

    with workers_of(cluster, bundle, network, say) as there:
        yield there


class Here:
    """Predicts in this process."""

    def __init__(self, ready: ReadyBundle) -> None:
        self.bundle = ready.bundle
        self._ready, self._clock = ready, StageSeconds()

    def scored(self, images: Source, listing: pa.Table, stop: StopRequest, progress: Progress) -> Iterator[Scored]:
        """Yields the rows in their order, as many at a time as are worth scoring."""
        for group in self._ready.groups(images, listing, clock=self._clock, stop=stop, progress=progress):
            with self._clock.stage(SCORE):
                scored = Scored.of(self._ready, group)
            yield scored

    def facts(self, wall: float) -> dict[str, Any]:
        """See `Scorer`."""
        machine, seconds = self._ready.stream.machine, self._clock.totals
        return {
            "seconds": dict(seconds),
            "machine": {"device": machine.device, "batch_size": machine.batch_size, "workers": machine.workers},
            "verdict": verdict(seconds, wall, device=machine.device),
        }


def verdict(seconds: Mapping[str, float], wall: float, *, device: str) -> str:
    """One line that says what a prediction waited for, as `featurepipe.records.verdict`, or that it was the head."""
    scoring = seconds.get(SCORE, 0.0)
    if wall > records.TELLING_SECONDS and scoring > wall / 2:
        share = f"{100 * scoring / wall:.0f} %"
        return f"head-bound: scoring took {share} of the time; a linear head is many times faster"
    return records.verdict(seconds, wall, device=device)
