"""What one image may cost, and all images together that are being decoded; documented in ``docs/limits.md``."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Final, NamedTuple, Self

from featurepipe.display import bytes_of, seconds_of
from featurepipe.errors import Reject, UsageError


class Budget(NamedTuple):
    """A limit that an environment variable sets.

    Attributes:
        variable: its name.
        default: its value where the variable is not set, as a user would write it.
        parse: from that text to a number; raises `UsageError`.
    """

    variable: str
    default: str
    parse: Callable[[str], float]

    def __call__(self) -> int:
        """The limit in this process.

        Raises:
            UsageError: the variable holds no such amount.
        """
        return _value(self, os.environ.get(self.variable, "").strip() or self.default)


@lru_cache
def _value(budget: Budget, text: str) -> int:
    try:
        return max(1, int(budget.parse(text)))
    except UsageError as error:
        raise UsageError(f"{budget.variable}={text!r}: {error}; the default is {budget.default}") from None


def _count(text: str) -> float:
    if not text.isdecimal() or not int(text):
        raise UsageError("give a whole number from 1")
    return int(text)


FILE_BYTES: Final = Budget("FEATUREPIPE_MAX_FILE_BYTES", "1GB", bytes_of)
PIXELS: Final = Budget("FEATUREPIPE_MAX_PIXELS", "178956970", _count)  # what PIL refuses as a decompression bomb
JPEG_SCANS: Final = Budget("FEATUREPIPE_MAX_JPEG_SCANS", "100", _count)
DECODE_BYTES: Final = Budget("FEATUREPIPE_DECODE_MEMORY", "1GB", bytes_of)
DECODE_SECONDS: Final = Budget("FEATUREPIPE_DECODE_SECONDS", "60s", seconds_of)
READ_SECONDS: Final = Budget("FEATUREPIPE_READ_SECONDS", "10min", seconds_of)
TRIMMED_BYTES: Final = 256_000_000
"""An image that took so much leaves nothing behind: trimming costs milliseconds, which such an image takes a hundred times."""
ALL: Final = (FILE_BYTES, PIXELS, JPEG_SCANS, DECODE_BYTES, DECODE_SECONDS, READ_SECONDS)


def check_budgets() -> None:
    """Reads every budget once, so that a wrong one is told before the first image.

    Raises:
        UsageError: a variable holds no such amount.
    """
    for budget in ALL:
        budget()


def check_bytes(size: int) -> None:
    """Rejects an encoded image of more than ``FILE_BYTES``; a negative size is one that is not known."""
    if size > FILE_BYTES():
        raise Reject(f"budget: {size:,} bytes, more than {FILE_BYTES.variable} allows ({FILE_BYTES():,})")


def check_pixels(width: int, height: int) -> None:
    """Rejects an image of more than ``PIXELS`` pixels, a decompression bomb perhaps, before it is decoded."""
    if width * height > PIXELS():
        raise Reject(f"bomb: {width}x{height} pixels, more than {PIXELS()}, the limit of {PIXELS.variable}")
    if width * height == 0:
        raise Reject(f"empty: {width}x{height} pixels")


class DecodeMemory:
    """Memory for decoding, shared by all threads of the process: who comes first is served first.

    An image that takes more than there is at all waits until it is alone, and then takes everything.

    Args:
        limit: gives the bytes that there are.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._queue: deque[BudgetLease] = deque()
        self._held = 0

    def lease(self) -> BudgetLease:
        """A lease of nothing yet, given back at the end of the block that it is entered for."""
        return BudgetLease(self)

    def take(self, lease: BudgetLease, amount: int) -> int:
        """Waits until there is room; gives the bytes that are taken."""
        limit = self._limit()
        amount = min(amount, limit)
        with self._changed:
            self._queue.append(lease)
            try:
                self._changed.wait_for(lambda: self._queue[0] is lease and self._held + amount <= limit)
                self._held += amount
            finally:
                self._queue.remove(lease)
                self._changed.notify_all()
        return amount

    def give(self, amount: int) -> None:
        """Takes memory back."""
        with self._changed:
            self._held -= amount
            self._changed.notify_all()


class BudgetLease:
    """Memory for one image, or for several that are decoded in one call; see `DecodeMemory`."""

    def __init__(self, memory: DecodeMemory) -> None:
        self._memory, self._lock, self._amount = memory, threading.Lock(), 0

    def __call__(self, amount: int) -> None:
        """Waits for ``amount`` bytes, instead of those that the lease held before."""
        self.end()
        taken = self._memory.take(self, amount)
        with self._lock:
            self._amount = taken

    def end(self) -> None:
        """Gives everything back; may be called from another thread, and again."""
        with self._lock:
            amount, self._amount = self._amount, 0
        if amount >= TRIMMED_BYTES:
            _trim()
        if amount:
            self._memory.give(amount)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _trim() -> None:
    """Has glibc give freed memory back to the system; of a thread's own heap it would keep hundreds of megabytes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


MEMORY: Final = DecodeMemory(DECODE_BYTES.__call__)
"""That of this process."""
