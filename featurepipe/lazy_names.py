"""Names of a package that load what they need when they are first used (PEP 562), and names that modules had before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a package's ``__init__.py`` calls ``__getattr__`` and ``__dir__``.

    Args:
        package: its ``__name__``.
        homes: for each name the module in it that has it.

    Example:
        >>> load, names = lazy_names("featurepipe", {"bytes_of": "display"})
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


def former_modules(package: str, homes: Mapping[str, str]) -> None:
    """Lets pickles and bundles name the modules in which their classes were when they were written.

    Args:
        package: In which the modules were.
        homes: For each module that is gone, the one in the package that has its classes now.

    Example:
        >>> former_modules("featurepipe", {"lengths": "display"})
        >>> importlib.import_module("featurepipe.lengths").bytes_of("2 KiB")
        2048
    """
    sys.meta_path.append(_FormerModules({f"{package}.{old}": f"{package}.{new}" for old, new in homes.items()}))


class _FormerModules(MetaPathFinder, Loader):
    """Finds modules that are gone: each takes every name from the module that has what was in it."""

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes = homes

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the protocol's
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """What ``import`` asks after no file was found."""
        return ModuleSpec(fullname, self) if fullname in self._homes else None

    def exec_module(self, module: ModuleType) -> None:
        """Fills the module that ``import`` has made."""
        home = importlib.import_module(self._homes[module.__name__])
        vars(module)["__getattr__"] = lambda name: getattr(home, name)
