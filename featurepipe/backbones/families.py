"""Families of backbones: where an architecture comes from, how it is built, where its weights are; those of torchvision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, get_model_weights, list_models
from typing_extensions import override

from featurepipe.backbones import preprocessing, weights
from featurepipe.backbones.checkpoints import present_name
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import Option, unknown

SEE = "featurepipe backbones"
RANDOM = (Option("weights", "none"), " and a ", Option("seed"))
"""What to give for a random network, as parts of a message."""


class Family(ABC):
    """One architecture of one origin; what ``Backbone`` asks of it.

    The parameter ``name`` is always the name of pretrained weights as ``resolve`` returns it, and None for a random
    control or weights from a file.
    """

    architecture: str
    parts: tuple[str, ...] = ()
    """The networks that stand side by side in it; empty for one network."""
    is_tested = True
    """Whether tracing is known to keep what the networks compute; where not, each network is tried with its values."""

    @abstractmethod
    def choices(self) -> list[str]:
        """Returns the names of the pretrained weights; empty where there are none."""

    @abstractmethod
    def resolve(self, name: str) -> str:
        """Turns ``DEFAULT`` into the name of the weights it stands for; raises for a name that is not a choice."""

    @abstractmethod
    def build(self, name: str | None) -> nn.Module:
        """Builds the network with fresh parameters from torch's global generator."""

    @abstractmethod
    def state(self, name: str) -> StateDict:
        """Loads pretrained weights; raises ``WeightsNotFound`` where they are not at hand."""

    @abstractmethod
    def at_hand(self, name: str) -> bool:
        """Whether ``state`` would need no network."""

    @abstractmethod
    def preprocessing(self, name: str | None) -> Preprocessing:
        """Returns what the weights expect; without a name what the default weights expect."""

    def classes(self, name: str) -> Sequence[str]:  # noqa: ARG002 - of subclasses
        """Returns the names of the classes that pretrained weights tell apart, by output; empty where none are known."""
        return ()

    def try_forward(self, module: nn.Module, images: Tensor) -> Any:
        """Runs a network on images (N, C, H, W); a family whose networks may fail says so in words."""
        with torch.inference_mode():
            return module(images)

    def skeleton(self, name: str | None) -> nn.Module:
        """Builds the network quickly, for a state dict to fill: parameters may have no values yet."""
        with NoValues():
            return self.build(name)

    def random(self) -> nn.Module:
        """Builds the random control from torch's global generator."""
        return self.build(None)

    def identity(self) -> dict[str, str]:
        """Returns what else, beside the architecture's name, changes what the network computes."""
        return {}


class NoValues(TorchFunctionMode):
    """Gives new parameters no memory: modules built inside cost no time, and a state dict fills them.

    Only ``torch.empty`` is affected, which is what layers make their parameters with; tables that a module computes for
    itself keep their values, unlike under ``torch.device("meta")``. What would draw initial values for parameters without
    memory returns at once: it computes shapes only, in more time than all else.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in _INITIALISERS and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        return func(*args, **kwargs)


_INITIALISERS = {
    *(getattr(torch.Tensor, f"{name}_") for name in ("normal", "uniform", "zero", "fill", "erfinv", "mul", "add", "clamp")),
    *(getattr(torch.nn.init, f"{name}_") for name in ("kaiming_normal", "kaiming_uniform", "normal", "uniform", "constant")),
}  # fmt: skip


def resolve(name: str, choices: Sequence[str], default: str, backbone: str) -> str:
    """Turns ``DEFAULT`` into ``default`` and checks any other name of weights.

    Raises:
        UsageError: The name is not among ``choices``.
    """
    if name == "DEFAULT":
        return default
    if name in choices:
        return name
    raise unknown("weights", name, [*choices, "DEFAULT", "none"], where=backbone, see=SEE)


_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def classification_names() -> list[str]:
    """Returns the names of all classification models of the installed torchvision."""
    return list(list_models(module=torchvision.models))


def imagenet_classes() -> Sequence[str]:
    """Returns the names of ImageNet's 1,000 classes in the usual order, no two of them the same."""
    names: Sequence[str] = get_model_weights("resnet50").DEFAULT.meta["categories"]
    return names


class Torchvision(Family):
    """A classification model of torchvision."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.architecture = f"torchvision/{name}"
        self._weights = get_model_weights(name)

    @override
    def choices(self) -> list[str]:
        return [member.name for member in self._weights]

    @override
    def resolve(self, name: str) -> str:
        return resolve(name, self.choices(), self._weights.DEFAULT.name, self.name)

    @override
    def build(self, name: str | None) -> nn.Module:
        options: dict[str, Any] = {}
        if self.name in _AUXILIARY:
            # As the pretrained models are: without the auxiliary heads of training, and with their own input scaling.
            options = {"aux_logits": False, "transform_input": True, "init_weights": True}
        if self.name.startswith("vit_"):
            options = {"image_size": self._preset(name).meta["min_size"][0]}
        module: nn.Module = get_model(self.name, weights=None, **options)
        return module

    @override
    def state(self, name: str) -> StateDict:
        state = weights.torchvision_state_dict(self._weights[name])
        return {present_name(key): tensor for key, tensor in state.items() if not self._is_auxiliary(key)}

    @override
    def at_hand(self, name: str) -> bool:
        return weights.hub_file(self._weights[name].url).is_file()

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        return preprocessing.from_weights(self._preset(name).transforms())

    @override
    def classes(self, name: str) -> Sequence[str]:
        return self._weights[name].meta["categories"] or ()  # VGG16's IMAGENET1K_FEATURES have no classifier

    def _preset(self, name: str | None) -> Any:
        return self._weights[name] if name else self._weights.DEFAULT

    def _is_auxiliary(self, key: str) -> bool:
        return key.startswith(_AUXILIARY.get(self.name, ()))
