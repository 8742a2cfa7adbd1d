"""The way of an image from its source to a batch: read, key, decode, resize and crop, in threads, through a bounded window."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch

from featurepipe.errors import ForgottenBytes, Reject, SourceError, Unavailable
from featurepipe.features.reading import PatientReader
from featurepipe.images import Source, key_of
from featurepipe.images.budgets import DECODE_SECONDS, MEMORY, READ_SECONDS, Budget, BudgetLease, check_bytes
from featurepipe.images.decode import Claim, Kept, as_reject
from featurepipe.images.listing import UNKNOWN
from featurepipe.images.regions import (
    CLIPPED,
    LARGEST_TASK,
    Frame,
    FramesFile,
    Payload,
    Region,
    Whole,
    crop,
    image_of,
    is_of_one_image,
    key_of_frame,
    key_of_region,
    split_frame,
    split_region,
)
from featurepipe.partitions import take
from featurepipe.threads import GivenUp, LoadingThreads


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
        remarks: what else is to be said of how it was decoded, as `CLIPPED`; counted, not listed.
    """

    row: int
    key: bytes | None = None
    missing: tuple[str, ...] = ()
    pixels: torch.Tensor | None = None
    reason: str | None = None
    damage: str | None = None
    remarks: tuple[str, ...] = ()

    def refuse(self, reason: str, payload: Payload, size: int) -> None:
        """Rejects the image for what was read of it; ``size`` is that of the listing.

        Bytes of another number than listed are perhaps not all of them, and are not remembered as a reject.
        """
        self.reason, self.missing = reason, ()
        payload = image_of(payload)
        payload = payload.file.content if isinstance(payload, Frame) else payload
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
        self._lease: BudgetLease | None = None
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


TASK_IMAGES = 8
"""Images per task: enough that handing a task to a thread costs nothing beside decoding."""

_TAKEN_ROWS = 128 * TASK_IMAGES
"""Rows whose locators are Python objects at a time."""

PATIENCE = 2.0
"""Seconds that the end of loading waits for threads to finish the image they are at."""

Decoded = torch.Tensor | Kept | Reject
Decoder = Callable[[Sequence[Payload], Claim], Iterable[Decoded]]


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
        decoder: turns payloads, of a region the whole of its image, into uint8 images (C, H, W), or the `Reject` that says
            why not, in their order.
        prepare: resizes and crops one decoded image of a row of the listing, uint8 (C, H, W) to uint8 (C, h, w).
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
        prepare: Callable[[torch.Tensor, int], torch.Tensor],
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
        """Yields batches of loaded images in the order of ``rows``, and ends early once ``stop()`` is true.

        Args:
            listing: of the source, or of a shard of it.
            rows: what to load of it.
            stop: asked between images.
            probes: locators of images all over the source, by which to tell whether it is still there; by default those of
                the listing.

        Raises:
            SourceError: nothing can be read any more; what was loaded before has been yielded.
        """
        reader = PatientReader(self._source, listing["locator"] if probes is None else probes)
        ahead: deque[LoadTask] = deque()
        images = 0
        threads = LoadingThreads(self._workers, "featurepipe-load")
        work = partial(self._work, reader)
        try:
            for task in _tasks(listing.select(["locator", "size"]), rows):
                ahead.append(task)
                images += max(TASK_IMAGES, len(task.images))
                threads.submit(partial(work, task))
                while ahead and images >= self._window and self._ready(ahead, stop, threads, work):
                    images -= max(TASK_IMAGES, len(ahead[0].images))
                    yield ahead.popleft().future.result()
                if stop():
                    return
            while ahead and self._ready(ahead, stop, threads, work):
                yield ahead.popleft().future.result()
            if not stop():
                reader.check_at_end()
        finally:
            reader.close()
            threads.close(PATIENCE)
            self.tried_again = reader.tried_again

    def _ready(
        self,
        ahead: Sequence[LoadTask],
        stop: Callable[[], bool],
        threads: LoadingThreads,
        work: Callable[[LoadTask], None],
    ) -> bool:
        """Waits until the first task is done, or it is time to stop; has others go on where a thread is stuck."""
        with self._clock.stage("waiting"):
            while not stop():
                if wait([ahead[0].future], timeout=0.5).done:
                    return True
                for task in ahead:  # not the first alone: a later one may hold the memory that it waits for
                    if stuck := task.give_up():
                        threads.replace(stuck, partial(work, task))
        return False

    def _work(self, reader: PatientReader, task: LoadTask) -> None:
        """Loads what is left of a task, in the thread that calls it."""
        task.begin()
        try:
            once = _ReadOnce(reader)
            for place in range(len(task.payloads), len(task.images)):
                self._read(once, task, place)
            with self._clock.stage("decode"):
                self._decode(task)
        except GivenUp:
            raise
        except BaseException as error:  # noqa: BLE001  # such as that the source is gone: it is raised where it is waited for
            with task.settle():
                task.future.set_exception(error)
        else:
            with task.settle():
                task.future.set_result(task.images)

    def _read(self, reader: _ReadOnce, task: LoadTask, place: int) -> None:
        """Reads one image and looks its key up."""
        found = Loaded(task.images[place].row)
        payload: Payload | None = None
        task.step(place, READ_SECONDS)
        try:
            check_bytes(task.sizes[place])
            with self._clock.stage("read"):
                payload, found.key = reader(task.locators[place])
            missing = self._missing(found.key)
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001  # one image's trouble is not that of the run
            missing = as_reject(error)
        if isinstance(missing, ForgottenBytes):
            found.key = None
        if isinstance(missing, Reject):
            found.reason = str(missing)
        else:
            found.missing = missing
        with task.settle():
            task.images[place] = found
            task.payloads.append(payload if found.missing else None)

    def _decode(self, task: LoadTask) -> None:
        """Decodes and prepares the images of a task that want it."""
        places = task.to_decode
        if not places:
            return
        payloads = [payload for place in places if (payload := task.payloads[place]) is not None]
        with task.claim() as claim:
            results = self._decoded(payloads, claim)
            for place, payload in zip(places, payloads, strict=True):
                task.step(place, DECODE_SECONDS)
                found = self._prepared(next(results), payload, task.images[place].row)
                with task.settle():
                    task.decoded += 1
                    _note(task.images[place], found, payload, task.sizes[place])

    def _decoded(self, payloads: Sequence[Payload], claim: Claim) -> Iterator[Decoded]:
        """The whole image of each payload, decoded once for the regions of it that follow each other."""
        together = [list(group) for _, group in groupby(payloads, key=lambda payload: id(image_of(payload)))]
        results = iter(self._decoder([group[0] for group in together], claim))
        last_file: FramesFile | None = None
        for group in together:
            whole = next(results)
            for _ in group:
                yield whole
            del whole  # not two decoded images at a time
            if isinstance(image := image_of(group[0]), Frame) and image.file is not last_file:
                if last_file is not None:
                    last_file.parsed = None
                last_file = image.file

    def _prepared(self, found: Decoded, payload: Payload, row: int) -> Kept | Reject:
        """The image, or what a region is of it, resized and cropped."""
        if isinstance(found, Reject):
            return found
        try:
            pixels, damage, remarks = found if isinstance(found, Kept) else Kept(found)
            if isinstance(payload, Region):
                edges = payload.box.edges(pixels.shape[2], pixels.shape[1])
                pixels, remarks = crop(pixels, edges), (*remarks, *[CLIPPED] * edges.clipped)
            return Kept(self._prepare(pixels, row), damage, remarks)
        except Exception as error:  # noqa: BLE001  # such as too little memory: one image's trouble is not that of the run
            return as_reject(error)


class _ReadOnce:
    """Reads images one after another, and the regions or frames of one file that follow each other once.

    Args:
        reader: of whole images.
    """

    def __init__(self, reader: PatientReader) -> None:
        self._reader = reader
        self._file: bytes | None = None
        self._image: Whole = b""
        self._key = b""
        self._frames = FramesFile(b"")

    def __call__(self, locator: bytes) -> tuple[Payload, bytes]:
        """What was read, and its key."""
        image, box = split_region(locator)
        file, number = split_frame(image)
        if box is None and number is None:
            payload = self._reader(locator)
            return payload, key_of(payload)
        if box is not None:
            box.check()
        if file != self._file:
            self._file = None
            self._image = image_of(self._reader(file))
            self._key, self._file = key_of(self._image), file
            self._frames = FramesFile(self._image if isinstance(self._image, bytes) else b"")
        whole, key = self._image, self._key
        if number is not None:
            whole, key = Frame(self._frames, number), key_of_frame(key, number)
        return (whole, key) if box is None else (Region(whole, box), key_of_region(key, box))


def _tasks(listed: pa.Table, rows: np.ndarray) -> Iterator[LoadTask]:
    """Tasks of some rows each, made when they are asked for; regions of one image stay together up to the largest task."""
    first, images = 0, list[tuple[bytes, int]]()
    for start in range(0, len(rows), _TAKEN_ROWS):
        taken = take(listed, rows[start : start + _TAKEN_ROWS])
        for image in zip(*(column.to_pylist() for column in taken.columns), strict=True):
            is_full = len(images) >= TASK_IMAGES
            if is_full and (len(images) >= LARGEST_TASK or not is_of_one_image(images[-1][0], image[0])):
                yield LoadTask(rows[first : first + len(images)], *zip(*images, strict=True))
                first, images = first + len(images), []
            images.append(image)
    if images:
        yield LoadTask(rows[first:], *zip(*images, strict=True))


def _note(image: Loaded, found: Kept | Reject, payload: Payload, size: int) -> None:
    if isinstance(found, Unavailable):
        image.postpone(str(found))
    elif isinstance(found, Reject):
        image.refuse(str(found), payload, size)
    else:
        image.pixels, image.damage, image.remarks = found.pixels, found.damage or None, found.remarks
