"""A few images that one thread loads at a time, and that another goes on with where an image takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from featurepipe.images.budgets import DECODE_SECONDS, MEMORY, READ_SECONDS, Budget, Lease
from featurepipe.images.listing import UNKNOWN
from featurepipe.threads import GivenUp

Payload = bytes | np.ndarray


@dataclass(slots=True)
class Loaded:
    """One image after loading.

    Attributes:
        row: its row in the listing.
        key: SHA-256 of its bytes; None when they could not be read.
        missing: the columns to compute for it; empty when everything is known (then it was not decoded).
        pixels: uint8 (C, H, W), resized and cropped; None when there is nothing to compute.
        reason: why it was rejected, or None.
        damage: why some of its pixels are lost, though it was kept on request; or None.
    """

    row: int
    key: bytes | None = None
    missing: tuple[str, ...] = ()
    pixels: torch.Tensor | None = None
    reason: str | None = None
    damage: str | None = None

    def refuse(self, reason: str, payload: Payload, size: int) -> None:
        """Rejects the image for what was read of it; ``size`` is that of the listing.

        Bytes of another number than listed are perhaps not all of them, and are not remembered as a reject.
        """
        self.reason, self.missing = reason, ()
        if isinstance(payload, bytes) and size not in (UNKNOWN, len(payload)):
            self.reason = f"{reason} (read {len(payload):,} bytes, listed with {size:,})"
            self.key = None

    def postpone(self, reason: str) -> None:
        """Rejects the image in this run only: the next one may have more time, or more memory."""
        self.reason, self.missing, self.key, self.pixels = reason, (), None, None


class LoadTask:
    """Images to load, how far that is, and which thread is at it.

    A thread does every step in `step`, and writes down what came of it within `settle`; both raise `GivenUp` in a thread that
    the task was taken from.

    Args:
        rows: of the listing.
        locators: of the images.
        sizes: as listed.

    Attributes:
        images: the results.
        payloads: what was read so far, one for each image; None for what needs no decoding.
        decoded: how many of the others are decoded or rejected.
        future: gets the images when all are done.
    """

    def __init__(self, rows: Iterable[int], locators: Sequence[bytes], sizes: Sequence[int]) -> None:
        self.images = [Loaded(int(row)) for row in rows]
        self.locators, self.sizes = locators, sizes
        self.payloads: list[Payload | None] = []
        self.decoded = 0
        self.future: Future[list[Loaded]] = Future()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._lease: Lease | None = None
        self._image: Loaded | None = None
        self._budget, self._until = DECODE_SECONDS, float("inf")

    @property
    def to_decode(self) -> list[int]:
        """The places of images that are read and neither decoded nor rejected."""
        return [place for place, payload in enumerate(self.payloads) if payload is not None][self.decoded :]

    def begin(self) -> None:
        """Makes the calling thread the one whose results count."""
        with self._lock:
            self._thread = threading.current_thread()

    @contextmanager
    def settle(self) -> Iterator[None]:
        """A block in which the calling thread writes down what came of its step, undisturbed."""
        with self._lock:
            if self._thread is not threading.current_thread():
                raise GivenUp
            self._image, self._until = None, float("inf")
            yield

    def step(self, place: int, budget: Budget) -> None:
        """Notes that work on an image begins, for which there are so many seconds."""
        with self._lock:
            if self._thread is not threading.current_thread():
                raise GivenUp
            self._image, self._budget, self._until = self.images[place], budget, time.monotonic() + budget()

    @contextmanager
    def claim(self) -> Iterator[Callable[[int], None]]:
        """For the images decoded in the block: waits for memory; the time that takes is not the image's."""
        with MEMORY.lease() as lease:
            with self._lock:
                self._lease = lease

            def claimed(amount: int) -> None:
                self._clock(float("inf"))
                lease(amount)
                self._clock(time.monotonic() + DECODE_SECONDS())

            yield claimed

    def _clock(self, until: float) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                raise GivenUp
            self._until = until

    def give_up(self) -> threading.Thread | None:
        """Rejects the image that takes too long, if there is one; gives the thread that is stuck with it."""
        with self._lock:
            image, thread = self._image, self._thread
            if image is None or time.monotonic() < self._until:
                return None
            what = "read" if self._budget is READ_SECONDS else "decode"
            image.postpone(
                f"time: takes more than {self._budget():,} seconds to {what}, the limit of {self._budget.variable}"
            )
            if what == "read":
                self.payloads.append(None)
            else:
                self.decoded += 1
            if self._lease is not None:
                self._lease.end()
            self._image, self._thread, self._lease = None, None, None
            return thread
