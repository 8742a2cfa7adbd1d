"""Stage one over the workers of a cluster: slices of the listing go out, what became of their images comes back.

Features never travel: each worker reads the source, computes, and commits parts of its own. The client alone writes rejects,
the snapshot and the run record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from featurepipe.backbones import Backbone, Column
from featurepipe.backbones.engine import Engine
from featurepipe.cluster import Team
from featurepipe.errors import UsageError
from featurepipe.extraction import worker_tasks
from featurepipe.extraction.at_worker import Network, identity_of
from featurepipe.extraction.auto import MeasurePrecision
from featurepipe.extraction.books import SliceBooks
from featurepipe.extraction.compute import Outcome, RejectLog
from featurepipe.extraction.machine import Machine, settle_machine
from featurepipe.extraction.options import Options
from featurepipe.extraction.place import SAMPLE, Here, Place
from featurepipe.extraction.prepare import Job
from featurepipe.extraction.share import Order
from featurepipe.extraction.slices import Done, Sizes, Slice, cut
from featurepipe.images import Source
from featurepipe.progress import Progress
from featurepipe.records import bottleneck
from featurepipe.store.identity import canonical_json

PROBES = 16
"""Images from all over the source by which a worker tells that it still sees it."""
LARGEST_SOURCE = 4 * 1024 * 1024
"""Bytes of a source that travels, with every slice: paths and names are far below, a pile of arrays in memory is above."""


@contextmanager
def place_of(cluster: Any, options: Options, say: Callable[[str], None]) -> Iterator[Place]:
    """Where to compute: here, or on a cluster, which stays connected for as long as the block runs.

    Args:
        cluster: what `featurepipe.cluster.connect` takes; None for here.
        options: how to extract.
        say: where messages go.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if cluster is None:
        yield Here()
        return
    from featurepipe.cluster import connect

    with connect(cluster, say=say) as team:
        yield OnWorkers(team, options)


class OnWorkers:
    """The workers of a team, as the `Place` where images are computed.

    Args:
        team: of workers, who may come and go.
        options: how to extract.
    """

    def __init__(self, team: Team, options: Options) -> None:
        self._team, self._options = team, options

    def check(self, store: Path | None) -> None:
        """Refuses workers by name whose versions differ or that do not see the store.

        Raises:
            ClusterError: none is left.
        """
        self._team.check(store)

    def machine(self, options: Options) -> Machine:
        """Settles device, batch size and threads for the workers. All compute on one kind of device: CUDA if any has it.

        Raises:
            UsageError: no worker has the device asked for, or the request makes no sense.
        """
        workers = self._team.workers()
        answers = self._team.ask(worker_tasks.has_cuda, [worker.address for worker in workers])
        with_cuda = {address for address, has in answers.items() if has is True}
        machine = settle_machine(
            options.device,
            options.batch_size,
            options.workers,
            options.decode,
            has_cuda=bool(with_cuda),
            cpus=max((worker.threads for worker in workers), default=1),
        )
        if machine.device.startswith("cuda"):
            for address, has in answers.items():
                if has is False:
                    self._team.refuse(address, "it has no CUDA device, and this run computes on cuda")
        return machine

    def precision(
        self, source: Source, listing: pa.Table, backbone: Backbone, columns: Sequence[Column], machine: Machine
    ) -> MeasurePrecision:
        """Has a worker compare precisions."""
        network = self._network(backbone, columns, machine)
        sample = Slice.of(0, 0, listing.slice(0, 4 * SAMPLE))

        def measure(tried: str | None, intensity: str) -> tuple[str, str]:
            content, workers = travelling(source), self._options.workers
            work = partial(worker_tasks.measure_precision, network, content, workers, tried, intensity)
            return self._team.once(sample, work)

        return measure

    def engines(self) -> dict[frozenset[Column], Engine]:
        """None in this process."""
        return {}

    def rate(self, job: Job, images: int) -> tuple[float | None, int]:
        """Has one worker time a sample, and takes the others to be as fast."""
        sample = Slice.of(0, 0, job.plan.listing.take(pa.array(job.plan.todo[: 4 * images])))
        network = self._network(job.backbone, job.columns, job.machine)
        source, workers = travelling(job.source), self._options.workers
        work = partial(worker_tasks.sample_rate, network, source, job.settings, workers, images)
        rate, sampled = self._team.once(sample, work)
        return None if rate is None else rate * len(self._team.addresses()), sampled

    def compute(self, job: Job, run_id: str, outcome: Outcome, stop: Callable[[], bool], progress: Progress) -> None:
        """Has the workers compute and commit what the plan asks for, until done or asked to stop.

        Raises:
            ClusterError: the scheduler or the last worker is gone; what was committed stands.
            FeaturepipeError: what a worker ran into; it, and the others, have committed what they had computed.
        """
        if not len(job.plan.todo):
            return
        books, sizes, start = SliceBooks(job, outcome), Sizes(), time.perf_counter()
        rejects = RejectLog(job.plan.listing, job.existing_space, job.dataset, run_id)
        pieces = cut(job.plan.listing, job.plan.todo, sizes, iter(self._team.expected, -1))
        work = partial(worker_tasks.compute_slice, self._order(job, run_id))
        answers = cast(
            "Generator[tuple[Slice, Done]]",
            self._team.results(pieces, work, stop=lambda: stop() or books.error is not None),
        )
        try:
            with rejects, closing(answers):
                for piece, done in answers:
                    rejects.take(books.take(piece, done))
                    reached = int(np.count_nonzero(done.status))
                    sizes.note(reached, done.worked.seconds)
                    for line in done.worked.said:
                        progress.say(f"worker {done.worked.worker}: {line}")
                    progress.advance(reached, self._how(job))
        finally:
            books.close()
            outcome.seconds, outcome.busy = time.perf_counter() - start, books.seconds
            outcome.cluster = {"scheduler": self._team.address, "refused": dict(self._team.refused), **books.as_dict()}
        if books.error is not None:
            raise books.error

    def _how(self, job: Job) -> str:
        workers = len(self._team.addresses())
        return f"{bottleneck(job.clock.totals)}-bound, {workers} worker{'s' * (workers != 1)}"

    def _network(self, backbone: Backbone, columns: Sequence[Column], machine: Machine) -> Network:
        options = self._options
        weights = str(Path(options.weights).absolute()) if Path(options.weights).is_file() else options.weights
        return Network(
            backbone=options.backbone,
            weights=weights,
            seed=options.seed,
            columns=tuple(columns),
            identity=canonical_json(identity_of(backbone)),
            device=machine.device,
            batch_size=machine.batch_size,
        )

    def _order(self, job: Job, run_id: str) -> Order:
        space, listing = job.existing_space, job.plan.listing
        places = np.unique(np.linspace(0, listing.num_rows - 1, PROBES).astype(int))
        return Order(
            store=str(space.path.absolute().parents[1]),
            space=space.name,
            run_id=run_id,
            dataset=job.dataset,
            location=job.source.location,
            source=travelling(job.source),
            probes=tuple(listing["locator"].take(pa.array(places)).to_pylist()),
            network=self._network(job.backbone, job.columns, job.machine),
            workers=job.options.workers,
            retry_rejects=job.options.retry_rejects,
            damaged=job.options.damaged,
        )


def travelling(source: Source) -> bytes:
    """A source as bytes, for workers to read by.

    Raises:
        UsageError: it cannot travel, since it holds images, or something of this process.
    """
    import cloudpickle  # type: ignore[import-untyped]

    remedy = (
        "on a cluster, images come from where every worker can read them: a folder, a manifest, archives, "
        "array files (.npz, .h5), or a URL"
    )
    if source.location.startswith("memory://"):
        raise UsageError(f"{source.location} is in this process' memory, where no worker can read it; {remedy}")
    try:
        content: bytes = cloudpickle.dumps(source)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the source {source.location} cannot be sent to workers ({error}); {remedy}") from error
    if len(content) > LARGEST_SOURCE:
        raise UsageError(
            f"the source {source.location} holds {len(content) / 2**20:,.0f} MiB in memory, which would travel to the "
            f"workers with every task; {remedy}"
        )
    return content
