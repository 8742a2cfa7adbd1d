"""Names of a package that load what they need when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a package's ``__init__.py`` calls ``__getattr__`` and ``__dir__``.

    Args:
        package: its ``__name__``.
        homes: for each name the module in it that has it.

    Example:
        >>> load, names = lazy_names("featurepipe", {"bytes_of": "sizes"})
        >>> load("bytes_of")("2 KiB")
        2048
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names())}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    def names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return load, names
