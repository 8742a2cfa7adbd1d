"""A forward on CUDA, as it is or replayed as a CUDA graph: whichever a measurement on the first full batch finds faster.

A graph starts all kernels of a forward at once, which pays where they are shorter than the time to start them one by one. It
holds the memory of its activations, so it is kept only where it is faster and gives the same features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Features = dict[str, torch.Tensor]
Forward = Callable[[torch.Tensor], Features]
"""From uint8 images (N, C, H, W) on a device to features (N, D) by column."""

GAIN = 0.03
"""By which share of the time a graph must be faster to be kept: less is noise, and costs memory."""
STARTING = 0.5
"""Share of a forward's time that this process must take to start its kernels for a graph to be tried: where it is less, the
device has work waiting all the time, and the forwards of the trial would be lost."""
_ROUNDS, _IN_A_ROW, _WARM_UPS = 3, 3, 3


class MeasuredForward:
    """Runs batches as they are until one of ``size`` images comes; then those of that size by what is faster.

    Attributes:
        choice: What was chosen, and why; None before.
    """

    def __init__(
        self,
        eager: Forward,
        size: int,
        agree: Callable[[Features, Features], bool],
        *,
        capture: Callable[[Forward, torch.Tensor], Forward] | None = None,
        seconds: Callable[[Forward, torch.Tensor], float] | None = None,
        starting: Callable[[Forward, torch.Tensor], tuple[float, float]] | None = None,
    ) -> None:
        """Stores what to run.

        Args:
            eager: The forward.
            size: Images of a full batch.
            agree: Whether features of two forwards may stand for each other.
            capture: Makes a graph of the forward for batches like one; PyTorch's by default.
            seconds: Times some forwards of a batch; by default with the device's work done.
            starting: Times one: the seconds until all is started, and until all is done.
        """
        self.choice: str | None = None
        self._eager, self._size, self._agree = eager, size, agree
        self._capture, self._seconds = capture or captured, seconds or seconds_of
        self._starting = starting or started_and_done
        self._full: Forward | None = None

    def __call__(self, batch: torch.Tensor) -> Features:
        """Features of a batch."""
        if len(batch) != self._size:
            return self._eager(batch)
        if self._full is None:
            self._full, self.choice = self._chosen(batch)
        return self._full(batch)

    def _chosen(self, batch: torch.Tensor) -> tuple[Forward, str]:
        self._eager(batch)  # what is done once for this shape
        started, done = self._starting(self._eager, batch)
        if started < STARTING * done:
            return (
                self._eager,
                f"eager: {1000 * started:.2f} of {1000 * done:.2f} ms a batch of {self._size} go into starting it",
            )
        try:
            graph = self._capture(self._eager, batch)
            others = batch.roll(1, 0)  # a graph that kept what it was captured with would show on other images
            same = all(self._agree(self._eager(images), graph(images)) for images in (batch, others))
        except RuntimeError as error:  # out of memory, too
            if batch.device.type == "cuda":
                torch.cuda.empty_cache()
            return (
                self._eager,
                f"eager, as no CUDA graph could be made: {str(error).partition(chr(10))[0] or type(error).__name__}",
            )
        if not same:
            return self._eager, "eager, as a CUDA graph gave other features"
        rounds = [(self._seconds(self._eager, batch), self._seconds(graph, batch)) for _ in range(_ROUNDS)]
        eagerly, graphed = (1000 * statistics.median(times) for times in zip(*rounds, strict=True))
        kept = graphed <= (1 - GAIN) * eagerly
        told = f"{eagerly:.2f} ms a batch of {self._size} eagerly, {graphed:.2f} as a CUDA graph"
        return (graph, f"CUDA graph: {told}") if kept else (self._eager, f"eager: {told}")


def seconds_of(forward: Forward, batch: torch.Tensor) -> float:
    """Seconds of one of a few forwards in a row."""
    torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    for _ in range(_IN_A_ROW):
        forward(batch)
    torch.cuda.synchronize(batch.device)
    return (time.perf_counter() - start) / _IN_A_ROW


def started_and_done(forward: Forward, batch: torch.Tensor) -> tuple[float, float]:
    """Seconds until a forward's kernels are started, and until they are done."""
    torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    forward(batch)
    started = time.perf_counter() - start
    torch.cuda.synchronize(batch.device)
    return started, time.perf_counter() - start


def captured(forward: Forward, like: torch.Tensor) -> Forward:
    """A forward of batches like one as a CUDA graph. Its results are copies, which later batches leave alone.

    Raises:
        RuntimeError: PyTorch cannot capture it, or memory is too little.
    """
    images = like.clone()
    aside = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            forward(images)
    torch.cuda.current_stream(like.device).wait_stream(aside)
    torch.cuda.synchronize(like.device)
    graph = torch.cuda.CUDAGraph()
    # Threads that decode go on using the device meanwhile, which is no error of this one.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = forward(images)

    def replay(batch: torch.Tensor) -> Features:
        images.copy_(batch, non_blocking=True)
        graph.replay()
        return {name: values.clone() for name, values in results.items()}

    return replay
