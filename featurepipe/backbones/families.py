"""Families of backbones: where an architecture comes from, how it is built, and where its weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import unknown

SEE = "featurepipe backbones"


class Family(Protocol):
    """One architecture of one origin."""

    architecture: str

    def choices(self) -> list[str]:
        """Names of the pretrained weights, best last; empty where there are none."""
        ...

    def resolve(self, name: str) -> str:
        """Turns ``DEFAULT`` into the name of the weights it stands for; raises for a name that is not a choice."""
        ...

    def skeleton(self, name: str | None) -> nn.Module:
        """Builds the network for the weights ``name``, quickly: parameters may have no values yet."""
        ...

    def random(self) -> nn.Module:
        """Builds the network with fresh random parameters from torch's global generator."""
        ...

    def state(self, name: str) -> StateDict:
        """Loads pretrained weights; raises ``WeightsNotFound`` where they are not at hand."""
        ...

    def at_hand(self, name: str) -> bool:
        """Whether ``state`` would need no network."""
        ...

    def preprocessing(self, name: str | None) -> Preprocessing:
        """What the weights ``name`` expect; for None (random, or a file) what the default weights expect."""
        ...

    def identity(self) -> dict[str, str]:
        """What else, beside the architecture's name, changes what the network computes."""
        ...


class NoValues(TorchFunctionMode):
    """Gives large new tensors no memory: modules built inside cost no time and get their values from a state dict.

    Only ``torch.empty`` is affected, which is what layers make their parameters with; tables that a module computes for
    itself keep their values, unlike under ``torch.device("meta")``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


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
