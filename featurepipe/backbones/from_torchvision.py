"""Backbones that are classification models of torchvision."""

from __future__ import annotations

import re
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from featurepipe.backbones import preprocessing, weights
from featurepipe.backbones.families import NoValues, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict

_DENSENET_KEY = re.compile(r"\.(norm|relu|conv)\.([12])\.")
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def classification_names() -> list[str]:
    """Returns the names of all classification models of the installed torchvision."""
    return list(list_models(module=torchvision.models))


class Torchvision:
    """A classification model of torchvision."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.architecture = f"torchvision/{name}"
        self._weights = get_model_weights(name)

    def choices(self) -> list[str]:
        return [member.name for member in self._weights]

    def resolve(self, name: str) -> str:
        return resolve(name, self.choices(), self._weights.DEFAULT.name, self.name)

    def skeleton(self, name: str | None) -> nn.Module:
        with NoValues():
            return self._build(name, init_weights=False)

    def random(self) -> nn.Module:
        return self._build(None, init_weights=True)

    def state(self, name: str) -> StateDict:
        state = weights.torchvision_state_dict(self._weights[name])
        return {self._renamed(key): tensor for key, tensor in state.items() if not self._is_auxiliary(key)}

    def at_hand(self, name: str) -> bool:
        return weights.hub_file(self._weights[name].url).is_file()

    def preprocessing(self, name: str | None) -> Preprocessing:
        return preprocessing.from_weights(self._preset(name).transforms())

    def identity(self) -> dict[str, str]:
        return {}

    def _preset(self, name: str | None) -> Any:
        return self._weights[name] if name else self._weights.DEFAULT

    def _build(self, name: str | None, *, init_weights: bool) -> nn.Module:
        options: dict[str, Any] = {}
        if self.name in _AUXILIARY:
            # As the pretrained models are: without the auxiliary heads of training, and with their own input scaling.
            options = {"aux_logits": False, "transform_input": True, "init_weights": init_weights}
        if self.name.startswith("vit_"):
            options = {"image_size": self._preset(name).meta["min_size"][0]}
        module: nn.Module = get_model(self.name, weights=None, **options)
        return module

    def _renamed(self, key: str) -> str:
        return _DENSENET_KEY.sub(r".\1\2.", key) if self.name.startswith("densenet") else key

    def _is_auxiliary(self, key: str) -> bool:
        return key.startswith(_AUXILIARY.get(self.name, ()))
