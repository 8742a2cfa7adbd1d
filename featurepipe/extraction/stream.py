"""The way of an image from its source to a batch: read, key, decode, resize and crop, in threads, through a bounded window."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from featurepipe.backbones import Backbone
from featurepipe.errors import Reject
from featurepipe.extraction.machine import Machine
from featurepipe.extraction.reading import PatientReader, Payload
from featurepipe.images import Source, key_of
from featurepipe.images.decode import decode
from featurepipe.images.listing import UNKNOWN
from featurepipe.threads import pool_of

SLICE = 8
"""Images per task: enough that handing a task to a thread costs nothing beside decoding."""

Decoder = Callable[[Sequence[Payload]], Iterable["torch.Tensor | Reject"]]


@dataclass(slots=True)
class Loaded:
    """One image after loading.

    Attributes:
        row: its row in the listing.
        key: SHA-256 of its bytes; None when they could not be read.
        missing: the columns to compute for it; empty when everything is known (then it was not decoded).
        pixels: uint8 (C, H, W), resized and cropped; None when there is nothing to compute.
        reason: why it was rejected, or None.
    """

    row: int
    key: bytes | None = None
    missing: tuple[str, ...] = ()
    pixels: torch.Tensor | None = None
    reason: str | None = None

    def refuse(self, reason: str, payload: Payload, size: int) -> None:
        """Rejects the image for what was read of it; ``size`` is that of the listing.

        Bytes of another number than listed are perhaps not all of them, and are not remembered as a reject.
        """
        self.reason, self.missing = reason, ()
        if isinstance(payload, bytes) and size not in (UNKNOWN, len(payload)):
            self.reason = f"{reason} (read {len(payload):,} bytes, listed with {size:,})"
            self.key = None


@dataclass
class StageSeconds:
    """Seconds spent per stage, added up over threads; the clock of the bottleneck verdict.

    ``waiting`` is what the main thread spent waiting for images, the one figure that is wall-clock time lost.
    """

    totals: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "decode", "forward", "write", "waiting"), 0.0)
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of a ``with`` block to stage ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds ``seconds`` to stage ``name``."""
        with self._lock:
            self.totals[name] = self.totals.get(name, 0.0) + seconds


class Loader:
    """Loads rows of a listing in order, with ``workers`` threads and at most ``window`` images ahead.

    Args:
        source: where the bytes are.
        missing: tells for a key which columns are to be computed, and None when the key is to be rejected again.
        decoder: turns payloads into uint8 images (C, H, W), or the `Reject` that says why not, in their order.
        prepare: resizes and crops one decoded image, uint8 (C, H, W) to uint8 (C, h, w).
        clock: where the stages' time is added up.
        workers: threads; they spend their time in code that releases the interpreter's lock.
        window: how many images may be loaded but not yet taken.

    Attributes:
        tried_again: how many images could be read only at a further try.
    """

    def __init__(
        self,
        source: Source,
        missing: Callable[[bytes], tuple[str, ...] | Reject],
        decoder: Decoder,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        *,
        clock: StageSeconds,
        workers: int,
        window: int,
    ) -> None:
        self._source, self._missing, self._decoder, self._prepare = source, missing, decoder, prepare
        self._clock, self._workers, self._window = clock, workers, window
        self.tried_again = 0

    def load(
        self,
        listing: pa.Table,
        rows: np.ndarray,
        stop: Callable[[], bool] = bool,
        *,
        probes: pa.ChunkedArray | None = None,
    ) -> Generator[list[Loaded]]:
        """Yields slices of loaded images in the order of ``rows``, and ends early once ``stop()`` is true.

        Args:
            listing: of the source, or of a share of it.
            rows: what to load of it.
            stop: asked between images.
            probes: locators of images all over the source, by which to tell whether it is still there; by default those of
                the listing.

        Raises:
            SourceError: nothing can be read any more; what was loaded before has been yielded.
        """
        starts, listed = range(0, len(rows), SLICE), listing.select(["locator", "size"])
        tasks = (listed.take(pa.array(rows[start : start + SLICE])) for start in starts)
        reader = PatientReader(self._source, listing["locator"] if probes is None else probes)
        ahead: deque[Future[list[Loaded]]] = deque()
        pool = pool_of(self._workers, "featurepipe-load")
        try:
            for start, task in zip(starts, tasks, strict=True):
                ahead.append(pool.submit(self._load_slice, reader, rows[start : start + SLICE], task))
                if len(ahead) * SLICE >= self._window and self._ready(ahead[0], stop):
                    yield ahead.popleft().result()
                if stop():
                    return
            while ahead and self._ready(ahead[0], stop):
                yield ahead.popleft().result()
            if not stop():
                reader.check_at_end()
        finally:
            reader.close()
            pool.shutdown(wait=False, cancel_futures=True)
            self.tried_again = reader.tried_again

    def _ready(self, future: Future[list[Loaded]], stop: Callable[[], bool]) -> bool:
        """Waits until ``future`` is done, or it is time to stop."""
        with self._clock.stage("waiting"):
            while not stop():
                if wait([future], timeout=0.5).done:
                    return True
        return False

    def _load_slice(self, reader: PatientReader, rows: np.ndarray, listed: pa.Table) -> list[Loaded]:
        images = [Loaded(int(row)) for row in rows]
        payloads: list[Payload] = []
        wanted: list[tuple[Loaded, int]] = []
        for image, locator, size in zip(images, *(column.to_pylist() for column in listed.columns), strict=True):
            payload = self._read(reader, image, locator)
            if payload is not None and image.missing:
                payloads.append(payload)
                wanted.append((image, size))
        if not wanted:
            return images
        with self._clock.stage("decode"):
            for (image, size), payload, pixels in zip(wanted, payloads, self._decoder(payloads), strict=True):
                if isinstance(pixels, Reject):
                    image.refuse(str(pixels), payload, size)
                else:
                    image.pixels = self._prepare(pixels)
        return images

    def _read(self, reader: PatientReader, image: Loaded, locator: bytes) -> Payload | None:
        """Reads the bytes and looks their key up; None when they cannot be read."""
        try:
            with self._clock.stage("read"):
                payload = reader(locator)
                image.key = key_of(payload)
            missing = self._missing(image.key)
        except Reject as reject:
            image.reason = str(reject)
            return None
        if isinstance(missing, Reject):
            image.reason = str(missing)
        else:
            image.missing = missing
        return payload


def decoder_for(route: str, colour: Literal["rgb", "grey"], device: str) -> Decoder:
    """The decoder of a decode route: ``cpu``, or ``gpu`` for JPEGs on the CUDA device and the CPU for all else."""
    if route == "gpu":
        from featurepipe.images.decode_gpu import decode_batch

        return partial(decode_batch, colour=colour, device=device)
    return partial(_decode_on_cpu, colour=colour)


def _decode_on_cpu(payloads: Sequence[Payload], *, colour: Literal["rgb", "grey"]) -> Iterator[torch.Tensor | Reject]:
    for payload in payloads:
        try:
            yield decode(payload, colour=colour)
        except Reject as reject:
            yield reject


def loader_for(
    source: Source,
    missing: Callable[[bytes], tuple[str, ...] | Reject],
    backbone: Backbone,
    machine: Machine,
    route: str,
    clock: StageSeconds,
) -> Loader:
    """A loader of what a backbone wants, with a window of four batches."""
    preprocessing = backbone.preprocessing
    return Loader(
        source,
        missing,
        decoder_for(route, preprocessing.colour, machine.device),
        preprocessing.resize_crop,
        clock=clock,
        workers=machine.workers,
        window=4 * machine.batch_size,
    )


def load_sample(
    source: Source, listing: pa.Table, backbone: Backbone, machine: Machine, rows: np.ndarray, images: int
) -> torch.Tensor:
    """The first usable images among ``rows``: uint8 (n, C, h, w) with n <= ``images``."""
    found: list[torch.Tensor] = []
    loader = loader_for(source, lambda _key: ("sample",), backbone, machine, "cpu", StageSeconds())
    with closing(loader.load(listing, rows[: 4 * images])) as batches:
        for batch in batches:
            found += [image.pixels for image in batch if image.pixels is not None]
            if len(found) >= images:
                break
    return (
        torch.stack(found[:images])
        if found
        else torch.zeros((0, *backbone.preprocessing.input_shape), dtype=torch.uint8)
    )
