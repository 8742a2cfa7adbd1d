"""Backbones from the user's own code, `package.module:factory`: importing it, whose errors are whose, naming it by content."""

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
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from featurepipe.backbones import preprocessing
from featurepipe.backbones.families import SEE, Family, classification_names
from featurepipe.backbones.nodes import attributes_kept, freeze, uncompiled
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import FeaturepipeError, Message, Option, UsageError, nearest, unknown

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
        if module_name.partition(".")[0] in _CATALOGUES:
            raise _misspelt(spec)
        raise unknown("factory", attribute, _factories(module) or ["(none)"], where=module_name)
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


_CATALOGUES = {"timm": "timm/", "torchvision": ""}
"""Packages whose networks have names of their own, and what is written before these."""


def _misspelt(spec: str) -> UsageError:
    """What to say of a network of a package that is written as if it were a user's own."""
    module_name, _, name = spec.partition(":")
    package = module_name.partition(".")[0]
    if package == "timm":
        import timm

        names = timm.list_models()
    else:
        names = classification_names()
    near = [name] if name.partition(".")[0] in names else nearest(name, names)
    hint = f": {', '.join(_CATALOGUES[package] + one for one in near)}" if near else ""
    return UsageError(
        f"backbone {spec!r}: {module_name} has no function {name!r}; networks of {package} are written "
        f"{_CATALOGUES[package]}NAME{hint}. See: featurepipe backbones"
    )


def _factories(module: ModuleType) -> list[str]:
    """The names in a user's module of what may make a network: classes of networks, and functions, that need no argument."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_users(_home(value)) and _may_make(value)
    ]


def _home(value: Any) -> str:
    """The module that a function or class was written in."""
    made = value.func if isinstance(value, functools.partial) else value
    return str(getattr(made, "__module__", None) or "torch")


def _may_make(value: Any) -> bool:
    if not callable(value) or (isinstance(value, type) and not issubclass(value, nn.Module)):
        return False
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):
        return False
    needed = [one for one in signature.parameters.values() if one.default is one.empty and one.kind not in _OPEN]
    return not needed and signature.return_annotation not in (None, "None")


_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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


AS_BUILT = "as built"


class User(Family):
    """A network that a function of the user's makes.

    The function is called without arguments and returns an ``nn.Module`` whose attribute ``preprocessing`` (or
    ``default_cfg``, as timm has it) says what images it expects. Weights ``DEFAULT`` are those that it comes with.
    It is brought to the CPU and to float32, whatever the factory made of it; the engine chooses the precision.
    """

    is_tested = False

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.architecture = f"user/{spec}"
        self._factory = import_factory(spec)
        self._built: nn.Module | None = None

    @override
    def choices(self) -> list[str]:
        return [AS_BUILT]

    @override
    def resolve(self, name: str) -> str:
        if name in ("DEFAULT", AS_BUILT):
            return AS_BUILT
        raise unknown("weights", name, ["DEFAULT", "none"], where=self.spec, see=SEE)

    @override
    def skeleton(self, name: str | None) -> nn.Module:
        if self._built is None:
            self._built = self.build(name)
        return self._built

    @override
    def build(self, name: str | None) -> nn.Module:
        module_name, _, factory = self.spec.partition(":")
        command = f"python -c 'import {module_name} as m; m.{factory}()'"
        with running(self.spec, f"{factory}()", f"it is called without arguments; to see all of it, run: {command}"):
            module = self._factory()
        if not isinstance(module, nn.Module):
            raise UsageError(f"{self.spec} returned a {type(module).__name__}; it must return a torch.nn.Module")
        given = getattr(module, "preprocessing", None) or getattr(module, "default_cfg", None)
        module = uncompiled(module)
        if given is not None and not hasattr(module, "preprocessing"):
            module.preprocessing = given
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{self.spec} returned a TorchScript module ({type(module).__name__}), whose insides cannot be kept; return the "
                "network as it is before torch.jit.script or torch.jit.trace"
            )
        with running(self.spec, "bringing the network to the CPU and float32", "return it from the factory like that"):
            module = module.cpu().float()
        with running(self.spec, "putting the network into eval mode", "return a network for which eval() works"):
            return freeze(module)

    @override
    def try_forward(self, module: nn.Module, images: Tensor) -> Any:
        shape = tuple(images.shape)
        advice = "let its attribute 'preprocessing' describe images that it takes, and let it compute in float32"
        doing = f"its forward on images {shape}"
        with running(self.spec, doing, advice), torch.inference_mode(), attributes_kept(module):
            expected, again, alone = module(images), module(images), module(images[:1])
        self._check_repeats(
            expected, again, "a second time, so something random runs in eval mode, too (dropout with training=True?)"
        )
        self._check_repeats(
            [values[:1] for values in _per_image(expected, len(images))],
            _per_image(alone, 1),
            "in another batch, so it looks at its batch in eval mode, too (BatchNorm with track_running_stats=False?)",
        )
        return expected

    def _check_repeats(self, one: Any, other: Any, when: str) -> None:
        """Refuses a network whose outputs, on real values, are other ones the second time."""
        pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=False))
        if not all(_alike(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)):
            raise UsageError(f"backbone {self.spec!r} computes other values for the same images {when}")

    @override
    def random(self) -> nn.Module:
        """Builds the network and draws every layer's parameters anew, in case the factory loaded trained ones."""
        module = self.build(None)
        for name, layer in module.named_modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                with running(
                    self.spec,
                    f"reset_parameters() of {type(layer).__name__}",
                    Message(Option("weights", "none"), " calls it without arguments"),
                ):
                    reset()
            elif next(layer.parameters(recurse=False), None) is not None:
                raise UsageError(
                    Message(
                        Option("weights", "none"),
                        f" cannot draw the parameters of {name or 'the network'} ({type(layer).__name__}) in {self.spec} anew: "
                        "give that class a reset_parameters() method",
                    )
                )
        return module

    @override
    def state(self, name: str) -> StateDict:
        return dict(self.skeleton(name).state_dict())

    @override
    def at_hand(self, name: str) -> bool:
        return True

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        module = self.skeleton(name)
        for attribute in ("preprocessing", "default_cfg"):
            value = getattr(module, attribute, None)
            if value is not None:
                return preprocessing.from_value(value)
        raise UsageError(
            f"{self.spec} does not say what images it expects; set the attribute 'preprocessing' (or 'default_cfg') on "
            "the module that it returns, for instance: module.preprocessing = featurepipe.backbones.Preprocessing("
            "resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), or these as a dictionary"
        )

    @override
    def identity(self) -> dict[str, str]:
        return {"source_sha256": code_sha256(self.spec, self._factory, self.skeleton(None))}


def _per_image(outputs: Any, count: int) -> list[Tensor]:
    """The outputs that have a row for each of ``count`` images."""
    leaves = [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]
    return [value for value in leaves if value.ndim and len(value) == count]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by rounding at most."""
    if one.shape != other.shape or not one.is_floating_point():
        return True
    size = float(one.abs().nan_to_num(posinf=0.0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * size, equal_nan=True)
