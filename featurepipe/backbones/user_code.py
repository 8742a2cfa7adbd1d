"""Code that is not ours: importing it, telling its errors from our own, and naming it by its content."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from featurepipe.errors import FeaturepipeError, Message, Option, UsageError, unknown

_NOT_USERS = {*sys.stdlib_module_names, "torch", "torchvision", "timm"}


def check_trusted(
    name: str, trust_code: bool | Collection[str], *, named_by: str, error: type[FeaturepipeError] = UsageError
) -> None:
    """Refuses a network ``package.module:factory`` that a store or a bundle names, unless the user says that it may run.

    Args:
        name: The network's name. One that the user typed needs no check.
        trust_code: Whether code may run, or the names of the networks whose code may.
        named_by: What names it, such as ``the bundle``; begins the message.
        error: What to raise.

    Raises:
        FeaturepipeError: Of the type ``error``: loading it would import and run a module, and nobody allowed that.
    """
    allowed = trust_code if isinstance(trust_code, bool) else name in trust_code
    if ":" in name and not allowed:
        raise error(
            Message(
                f"{named_by}'s network is {name}: loading it imports and runs that module. If you know who made {named_by}: ",
                Option("trust_code", value=True),
            )
        )


def import_factory(spec: str) -> Callable[[], Any]:
    """Imports the function that ``package.module:factory`` names, also from the current folder.

    Raises:
        UsageError: There is no such module or function, or importing it fails.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute or module_name.startswith(".") or "/" in module_name:
        raise UsageError(f"backbone {spec!r} must be written package.module:factory")
    with running(spec, f"importing {module_name}", f"to see all of it, run: python -c 'import {module_name}'"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise
            module = None
    if module is None:
        raise UsageError(
            f"backbone {spec!r}: no module named {module_name!r}; it must be importable from the current folder or be "
            f"installed (try: python -c 'import {module_name}')"
        )
    factory = getattr(module, attribute, None)
    if factory is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown("factory", attribute, names or ["(none)"], where=module_name)
    if isinstance(factory, nn.Module):
        raise UsageError(
            f"backbone {spec!r}: {attribute} is a network ({type(factory).__name__}), not a function that makes one; write "
            f"for instance: def make_{attribute}(): return {attribute}"
        )
    if not callable(factory):
        raise UsageError(
            f"backbone {spec!r}: {attribute} is a {type(factory).__name__}, not a function that makes a network"
        )
    found: Callable[[], Any] = factory
    return found


@contextmanager
def running(spec: str, doing: str, advice: str) -> Iterator[None]:
    """Runs the user's code with the current folder importable, and turns whatever it raises into a ``UsageError``.

    Args:
        spec: The backbone as the user wrote it.
        doing: What is done, such as ``importing my_networks``.
        advice: What the user can type or change to go on.
    """
    try:
        with _current_folder_importable():
            yield
    except (Exception, SystemExit) as error:  # all of it, on purpose: the user's code may raise anything
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise UsageError(Message(f"backbone {spec!r}: {doing} fails with {cause}; ", advice)) from error


def code_sha256(spec: str, factory: Callable[[], Any], network: nn.Module) -> str:
    """Returns the SHA-256 of the source files that a user's network comes from, as hexadecimal digits.

    These are the files of the factory, of the classes of all modules of the network with their base classes, and of what
    those files import from their own package or folder. PyTorch, torchvision, timm and the standard library are left out.

    It cannot see what leaves no trace in classes and import statements: configuration files and data that the code
    reads, helper functions of other packages, modules imported by a computed name, code that is generated (TorchScript).
    Change the spec's own file when one of these changes.
    """
    while isinstance(factory, functools.partial):
        factory = factory.func
    classes = {base for module in network.modules() for base in type(module).__mro__}
    homes = {inspect.unwrap(factory).__module__, *(kind.__module__ for kind in classes)}
    names = _with_imports({spec.partition(":")[0], *filter(_is_users, homes)})
    digest = hashlib.sha256()
    for name in sorted(names):
        content = _content(name)
        digest.update(struct.pack("<QQ", len(name.encode()), len(content)) + name.encode() + content)
    return digest.hexdigest()


def _is_users(module_name: str) -> bool:
    return module_name.partition(".")[0] not in _NOT_USERS


def _with_imports(names: set[str]) -> set[str]:
    """Adds the modules that these, and those in turn, import from their own package or folder."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {other for other in _imported(name) if _belong_together(name, other)} - found
    return found


def _imported(name: str) -> set[str]:
    """The loaded modules that a module's import statements name.

    The statements are read from its text: the attributes of a package also hold what others have imported from it.
    """
    package = name if hasattr(sys.modules.get(name), "__path__") else name.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(_parsed(name)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return {other for other in names if other in sys.modules and _is_users(other)}


def _parsed(module_name: str) -> ast.AST:
    file = _file(module_name)
    if file is None or file.suffix != ".py":
        return ast.Module([], [])
    try:
        return ast.parse(_content(module_name))
    except (SyntaxError, ValueError):  # edited since it was imported
        return ast.Module([], [])


def _belong_together(name: str, other: str) -> bool:
    if name.partition(".")[0] == other.partition(".")[0]:
        return True
    file, other_file = _file(name), _file(other)
    return file is not None and other_file is not None and file.parent == other_file.parent


def _content(module_name: str) -> bytes:
    file = _file(module_name)
    return file.read_bytes() if file is not None and file.is_file() else b""


def _file(module_name: str) -> Path | None:
    file = getattr(sys.modules.get(module_name), "__file__", None)
    return Path(file) if file else None


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As ``python -m`` has it: modules in the current folder can be imported."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
