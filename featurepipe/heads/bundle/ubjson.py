"""UBJSON as xgboost writes it, and nothing more: keys and lengths of 8 bytes, counted lists, typed arrays, big-endian."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_NUMBERS = {b"i": ">i1", b"U": ">u1", b"I": ">i2", b"l": ">i4", b"L": ">i8", b"d": ">f4", b"D": ">f8"}
_WORDS = {b"T": True, b"F": False, b"Z": None}


def parse_ubjson(content: bytes) -> Any:
    """Reads one value; typed arrays become NumPy arrays.

    Raises:
        ValueError: It is anything else, cut short, or followed by more.
        RecursionError: It is nested too deep.
    """
    reader = _Reader(content)
    value = reader.value(reader.take(1))
    if reader.place != len(content):
        raise ValueError(f"{len(content) - reader.place} bytes too many")
    return value


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0

    def take(self, count: int) -> bytes:
        end = self.place + count
        if count < 0 or end > len(self.content):
            raise ValueError(f"it ends too early, at {self.place}")
        taken = self.content[self.place : end]
        self.place = end
        return taken

    def value(self, marker: bytes) -> Any:
        if marker in _NUMBERS:
            kind = np.dtype(_NUMBERS[marker])
            return np.frombuffer(self.take(kind.itemsize), kind)[0].item()
        if marker in _WORDS:
            return _WORDS[marker]
        if marker == b"S":
            return self.text()
        if marker == b"{":
            return self.members()
        if marker == b"[":
            return self.elements()
        raise ValueError(f"unknown marker {marker!r} at {self.place - 1}")

    def length(self) -> int:
        if self.take(1) != b"L":
            raise ValueError(f"no length at {self.place - 1}")
        (count,) = struct.unpack(">q", self.take(8))
        return int(count)

    def text(self) -> str:
        return self.take(self.length()).decode()

    def members(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.content[self.place : self.place + 1] != b"}":
            name = self.text()
            if name in found:
                raise ValueError(f"{name!r} comes twice")
            found[name] = self.value(self.take(1))
        self.take(1)
        return found

    def elements(self) -> Any:
        marker = self.take(1)
        if marker == b"$":
            kind = np.dtype(_NUMBERS.get(self.take(1), "V0"))
            if kind.itemsize == 0 or self.take(1) != b"#":
                raise ValueError(f"an array of no known type at {self.place - 1}")
            return np.frombuffer(self.take(self.length() * kind.itemsize), kind)
        if marker != b"#":
            raise ValueError(f"a list without a count at {self.place - 1}")
        count = self.length()
        if count > len(self.content):
            raise ValueError(f"a list of {count} at {self.place}")
        return [self.value(self.take(1)) for _ in range(count)]
