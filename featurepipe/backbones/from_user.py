"""Backbones from the user's own code: ``package.module:factory``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from featurepipe.backbones import preprocessing
from featurepipe.backbones.families import SEE, Family
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import UsageError, unknown

AS_BUILT = "as built"


class User(Family):
    """A network that a function of the user's makes.

    The function is called without arguments and returns an ``nn.Module`` whose attribute ``preprocessing`` (or
    ``default_cfg``, as timm has it) says what images it expects. Weights ``DEFAULT`` are those that it comes with.
    """

    is_tested = False

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.architecture = f"user/{spec}"
        self._factory, self._source = _import_factory(spec)
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
        with _current_folder_importable():
            module = self._factory()
        if not isinstance(module, nn.Module):
            raise UsageError(f"{self.spec} returned a {type(module).__name__}; it must return a torch.nn.Module")
        return module

    @override
    def random(self) -> nn.Module:
        """Builds the network and draws every layer's parameters anew, in case the factory loaded trained ones."""
        module = self.build(None)
        for name, layer in module.named_modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif next(layer.parameters(recurse=False), None) is not None:
                raise UsageError(
                    f"--weights none cannot draw the parameters of {name or 'the network'} ({type(layer).__name__}) in "
                    f"{self.spec} anew: give that class a reset_parameters() method"
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
            "resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
        )

    @override
    def identity(self) -> dict[str, str]:
        digest = hashlib.sha256(self._source.read_bytes()).hexdigest() if self._source else ""
        return {"source_sha256": digest}


def _import_factory(spec: str) -> tuple[Callable[[], Any], Path | None]:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"backbone {spec!r} must be written package.module:factory")
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"backbone {spec!r}: no module named {error.name!r}; it must be importable from the current folder "
                f"or be installed (try: python -c 'import {module_name}')"
            ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown("factory", attribute, names or ["(none)"], where=module_name)
    if not callable(factory):
        raise UsageError(
            f"backbone {spec!r}: {attribute} is a {type(factory).__name__}, not a function that makes a network"
        )
    source = inspect.getsourcefile(module)
    return factory, Path(source) if source else None


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
