"""What decoders raise on damaged files, and the rejects that it becomes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

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
