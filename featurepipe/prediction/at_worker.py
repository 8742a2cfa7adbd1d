"""What a worker of a cluster does to predict a slice: a function of the slice and the bundle, which knows nothing of Dask."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from featurepipe.errors import FeaturepipeError, WorkerRefused
from featurepipe.extraction.at_worker import Desk, keep_memory, needing, open_travelled, probed
from featurepipe.extraction.slices import Slice, Worked
from featurepipe.extraction.stream import StageSeconds
from featurepipe.heads.bundle.files import MANIFEST
from featurepipe.prediction.ready import ReadyBundle
from featurepipe.prediction.scored import Scored
from featurepipe.prediction.scorers import SCORE, Network
from featurepipe.progress import Silent


@dataclass(frozen=True)
class Order:
    """What all slices of a prediction have in common; it travels with each, so it is small.

    Attributes:
        bundle: the bundle's folder.
        digest: of that bundle, see `digest_of`.
        network: how to run its network; ``workers`` is None for as many threads as a worker may use.
        source: the source, pickled.
        probes: locators of images from all over the source that the client can read.
    """

    bundle: str
    digest: str
    network: Network
    source: bytes = field(repr=False)
    probes: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Predicted:
    """What a worker answers.

    Attributes:
        scored: the rows of the slice, in order.
        worked: how the worker fared.
    """

    scored: Sequence[Scored]
    worked: Worked


def digest_of(folder: str) -> str:
    """SHA-256 of what a bundle says of its files, and so of the bundle; empty if there is none to be seen."""
    try:
        return hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def refusal(order: Order) -> str:
    """Why this process cannot predict, as far as that is quickly told; empty if nothing speaks against it."""
    digest = digest_of(order.bundle)
    if digest != order.digest:
        there = "another bundle is at" if digest else "it does not see the bundle"
        return f"{there} {order.bundle}"
    try:
        source = open_travelled(order.source)
    except WorkerRefused as error:
        return str(error)
    said = ""
    for probe in order.probes:
        try:
            source.read(probe)
        except Exception as error:  # noqa: BLE001  # whatever it is, this process cannot read that image
            said = f"it cannot read the source: {error}"
        else:
            return ""
    return said


def predict_slice(order: Order, piece: Slice, desk: Desk, stop: Callable[[], bool]) -> Predicted:
    """Reads, computes and scores the images of a slice.

    Args:
        order: with what.
        piece: the images.
        desk: who works on it.
        stop: whether to come back with what is done.

    Raises:
        WorkerRefused: this process does not see the bundle or the source, or would not compute the same features.
    """
    ready, source = _made_ready(order, desk.threads), open_travelled(order.source)
    start, clock, lines, scored = time.perf_counter(), StageSeconds(), _Lines(), []
    table, probes = piece.table(), probed(order.probes)
    groups = ready.groups(source, table, clock=clock, stop=stop, progress=lines, probes=probes)
    with needing(source, order.probes) as doubt, threadpool_limits(desk.threads, user_api="blas"):
        for group in groups:
            with clock.stage(SCORE):
                scored.append(Scored.of(ready, group, first=piece.start))
        reasons = [reason for rows in scored for reason in rows.reasons.values()]
        doubt(reasons, sum(len(rows.numbers) for rows in scored))
    seconds = time.perf_counter() - start
    return Predicted(scored, desk.worked(ready.stream.machine, seconds, clock, said=tuple(lines.said)))


class _Lines(Silent):
    """Keeps what is said, for the client."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        """Keeps a line."""
        self.said.append(message)


@lru_cache(maxsize=1)
def _made_ready(order: Order, threads: int) -> ReadyBundle:
    """The bundle with its network, loaded when this process first needs it."""
    if why := refusal(order):
        raise WorkerRefused(why)
    torch.set_num_threads(threads)
    keep_memory()
    try:
        return replace(order.network, workers=order.network.workers or threads).ready(order.bundle)
    except FeaturepipeError as error:
        raise WorkerRefused(str(error)) from error
