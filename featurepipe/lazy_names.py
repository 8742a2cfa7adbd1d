"""Names that load what they need when they are first used (PEP 562), here and in a library; and names that modules had before."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
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


def former_method(former: str, now: str, **arguments: str) -> Callable[..., Any]:
    """A method by its former name: it warns with `DeprecationWarning`, and calls the one of today.

    Args:
        former: The name.
        now: That of the method today.
        **arguments: Today's name of each argument that had another.
    """

    def called(self: Any, *values: Any, **named: Any) -> Any:
        kind = type(self).__name__
        warnings.warn(f"{kind}.{former} is now {kind}.{now}", DeprecationWarning, stacklevel=2)
        return getattr(self, now)(*values, **{arguments.get(name, name): value for name, value in named.items()})

    return called


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


def import_within(packages: Sequence[str], context: Callable[[], AbstractContextManager[None]]) -> None:
    """Has packages executed within a context when they are first imported, by whomever; imported ones stay as they are."""
    sys.meta_path[:0] = [_WithinContext(package, context) for package in packages if package not in sys.modules]


class _WithinContext(MetaPathFinder, Loader):
    """Finds one package where it is, and executes it within a context."""

    def __init__(self, package: str, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._package, self._context = package, context
        self._loader: Loader | None = None

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """The package's own, with this loader."""
        if fullname != self._package:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the package's own loader does."""
        assert self._loader is not None  # noqa: S101 - set by `find_spec`, which gave this loader
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the package."""
        assert self._loader is not None and module.__spec__ is not None  # noqa: S101, PT018 - as above
        module.__spec__.loader = module.__loader__ = self._loader
        with self._context():
            self._loader.exec_module(module)


@contextmanager
def without_modules(*names: str) -> Iterator[None]:
    """Importing these within fails as if they were not installed, unless they have been imported before."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # what `import` takes for a module that is not there
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules[name] is None:
                del sys.modules[name]


@contextmanager
def without_compiler() -> Iterator[None]:
    """Keeps who is imported from loading PyTorch's compiler, ``torch._dynamo``, before there is anything to compile.

    That takes longer than all the rest of torchvision, which takes one function from there and marks another as not to be
    compiled. The function is then loaded when it is called, and the mark is set when what it marks is.
    """
    torch = importlib.import_module(
        "torch"
    )  # called for torchvision alone; heads and stores, which import this file, have none
    name, compiler = "torch._dynamo.utils", torch.compiler
    before, on_call = compiler.disable, getattr(torch, "_disable_dynamo", None)
    stand_in = _StandIn(name)
    if "torch._dynamo" in sys.modules or on_call is None:
        yield
        return
    sys.modules[name] = stand_in
    vars(compiler)["disable"] = lambda fn=None, recursive=True, **_reason: on_call(fn, recursive)
    try:
        yield
    finally:
        vars(compiler)["disable"] = before
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module of functions that load the real one when they are called."""

    def __getattr__(self, attribute: str) -> Callable[..., Any]:
        if attribute.startswith("__"):
            raise AttributeError(attribute)

        def called(*arguments: Any, **named: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), attribute)(*arguments, **named)

        return called
