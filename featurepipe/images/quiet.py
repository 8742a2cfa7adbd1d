"""PIL's warnings, silenced while we decode and at no other time."""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import Any, cast


class PillowQuiet:
    """A context in which PIL warns about nothing, entered by any number of threads.

    PIL warns about odd metadata that has no bearing on the pixels. ``warnings.catch_warnings`` swaps the filters of
    the whole process and puts them back in the order of exit, which goes wrong between threads; so the first thread in
    adds one filter, for PIL's modules only, and the last one out removes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            filters = cast("list[Any]", warnings.filters)
            if self._filter is None or self._filter not in filters:
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._filter = filters[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            filters = cast("list[Any]", warnings.filters)
            if not self._inside and self._filter in filters:
                filters.remove(self._filter)
