"""Backbones that are classification models of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models
from typing_extensions import override

from featurepipe.backbones import preprocessing, weights
from featurepipe.backbones.checkpoints import present_name
from featurepipe.backbones.families import Family, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict

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
