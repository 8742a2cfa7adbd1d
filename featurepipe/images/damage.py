"""What decoders raise, warn of and print on damaged files: it becomes the reason of a reject, and nothing else."""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, cast

from featurepipe.errors import Reject

# What PIL's parsers raise on damaged files, besides OSError and SyntaxError.
DAMAGE: Final = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError,
    AttributeError, OverflowError, ZeroDivisionError, NotImplementedError,
)  # fmt: skip


@contextmanager
def damage_as_reject(*more: type[Exception]) -> Iterator[None]:
    """A block in which what a decoder raises on a damaged file becomes a `Reject`.

    Args:
        more: Exceptions of this decoder, besides ``DAMAGE``.

    Raises:
        Reject: ``truncated`` or ``corrupt``, with the first line of the decoder's error.
    """
    kinds: tuple[type[Exception], ...] = (*DAMAGE, *more)
    try:
        yield
    except kinds as error:
        code = "truncated" if says_truncated(error) else "corrupt"
        raise Reject(f"{code}: {first_line(error) or type(error).__name__}") from error


def says_truncated(error: Exception | str) -> bool:
    """Whether a decoder's error, or its text, means that the file ends too early."""
    words = ("truncat", "eof", "end of file", "premature end", "unpack requires", "not enough", "incomplete")
    return isinstance(error, EOFError | struct.error | IndexError) or any(word in str(error).lower() for word in words)


def first_line(error: Exception) -> str:
    """The first line of an error's text, not too long."""
    return str(error).partition("\n")[0][:200]


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


# PIL and pydicom warn about odd metadata, of which what matters is checked; torchvision, from 0.29 on, about its own future.
QUIET: Final = QuietModules(r"(PIL|pillow_heif|pydicom|torchvision\.io)\b")
"""Entered around calls of PIL, pydicom and torchvision.io, from any thread."""


def silence_libtiff() -> bool:
    """Has the libtiff that PIL has loaded print nothing; its errors come through PIL as exceptions all the same.

    Its default is to print each bad line of a damaged fax, past Python. The handlers belong to the library of PIL's wheel, and to
    the whole process where PIL uses the system's.

    Returns:
        Whether a libtiff was found: only where the system tells which libraries are loaded (Linux).
    """
    found = False
    with suppress(OSError, AttributeError):
        for path in {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libtiff" in line
        }:
            library = ctypes.CDLL(path)
            for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                setter(None)
            found = True
    return found


silence_libtiff()
# What PIL logs of a damaged file is in its exceptions, too: Python would print it where nobody has set up logging.
for _name in ("PIL", "pydicom", "pillow_heif"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
