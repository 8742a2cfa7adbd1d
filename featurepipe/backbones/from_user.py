"""Backbones from the user's own code: ``package.module:factory``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from featurepipe.backbones import preprocessing
from featurepipe.backbones.families import SEE, Family
from featurepipe.backbones.nodes import attributes_kept, freeze, uncompiled
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.user_code import code_sha256, import_factory, running
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import Message, Option, UsageError, unknown

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
            "resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
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
