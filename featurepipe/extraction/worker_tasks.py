"""Stage one's tasks as Dask's workers run them: `at_worker`, at the desk that Dask has given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from featurepipe.cluster import one_at_a_time, stop_of_task, this_worker
from featurepipe.extraction import at_worker, share
from featurepipe.extraction.at_worker import Desk, Network
from featurepipe.extraction.auto import Settings
from featurepipe.extraction.share import Order
from featurepipe.extraction.slices import Done, Slice


def has_cuda() -> bool:
    """Whether this process could compute on a GPU."""
    return torch.cuda.is_available()


def compute_slice(order: Order, piece: Slice) -> Done:
    """Computes a slice; see `share.compute_slice`."""
    with alone_at_desk() as desk:
        return share.compute_slice(order, piece, desk, stop_of_task())


def measure_precision(
    network: Network, source: bytes, workers: int | None, tried: str | None, intensity: str, sample: Slice
) -> tuple[str, str]:
    """Compares precisions; see `at_worker.measure_precision`."""
    with alone_at_desk() as desk:
        return at_worker.measure_precision(network, source, workers, tried, intensity, sample, desk)


def sample_rate(
    network: Network, source: bytes, settings: Settings, workers: int | None, images: int, sample: Slice
) -> tuple[float | None, int]:
    """Times a sample; see `at_worker.sample_rate`."""
    with alone_at_desk() as desk:
        return at_worker.sample_rate(network, source, settings, workers, images, sample, desk)


@contextmanager
def alone_at_desk() -> Iterator[Desk]:
    """The worker that runs this task, with all its cores; its other threads wait."""
    with one_at_a_time():
        desk = this_desk()
        torch.set_num_threads(desk.threads)
        yield desk


def this_desk() -> Desk:
    """The worker that runs this task."""
    return Desk(*this_worker())
