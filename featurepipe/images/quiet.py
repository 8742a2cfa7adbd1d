"""Warnings of the decoding libraries, silenced while we decode and at no other time."""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import Any, cast


class QuietModules:
    """A context in which some modules warn about nothing, entered by any number of threads.

    ``warnings.catch_warnings`` swaps the filters of the whole process and puts them back in the order of exit, which
    goes wrong between threads. Here the first thread in adds one filter, for these modules only, and the last one out
    removes it.

    Args:
        pattern: A regular expression for the start of the modules' names.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._lock = threading.Lock()
        self._inside = 0
        self._filter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            filters = cast("list[Any]", warnings.filters)
            if self._filter is None or self._filter not in filters:
                warnings.filterwarnings("ignore", module=self.pattern)
                self._filter = filters[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            filters = cast("list[Any]", warnings.filters)
            if not self._inside and self._filter in filters:
                filters.remove(self._filter)
