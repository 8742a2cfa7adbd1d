"""EfficientNet-Lites side by side as one network: each sees an image as it does alone, and the bottleneck is all of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from featurepipe.backbones.families import Family
from featurepipe.backbones.packaged import LITE, EfficientNetLite, EfficientNetLiteNetwork
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import UsageError

BESIDE = "+"
"""Between the names of networks that stand side by side, as in ``efficientnet_lite0+efficientnet_lite2``."""


@dataclass(frozen=True)
class SideBySidePreprocessing(Preprocessing):
    """The inputs of several networks beside each other on one canvas, each exactly as its network sees it alone.

    Attributes:
        parts: How each network's input is made, from the left to the right. All have the same normalisation.
    """

    parts: tuple[Preprocessing, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Preprocessing]) -> SideBySidePreprocessing:
        """The canvas of some inputs: as high as the highest, as wide as all."""
        shape = max(part.crop[0] for part in parts), sum(part.crop[1] for part in parts)
        first = parts[0]
        return cls(
            resize=shape, crop=shape, mean=first.mean, std=first.std, interpolation=first.interpolation,
            antialias=first.antialias, colour=first.colour, scale=first.scale, parts=tuple(parts),
        )  # fmt: skip

    @override
    def as_dict(self) -> dict[str, Any]:
        return {"side_by_side": [part.as_dict() for part in self.parts]}

    @override
    def resize_crop(self, image: Tensor) -> Tensor:
        inputs = [part.resize_crop(image) for part in self.parts]
        return torch.cat([functional.pad(one, (0, 0, 0, self.crop[0] - one.shape[-2])) for one in inputs], dim=-1)


class SideBySideNetwork(nn.Module):
    """Networks side by side: a canvas (N, 3, H, W) to logits (N, 1000).

    Every network is a submodule of its own name; ``flatten`` is their bottlenecks one after the other. The logits are the mean
    of all networks' logits, which is a linear layer on that.

    Args:
        names: Of the networks, some of `LITE`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.widths = {name: LITE[name].size for name in names}
        for name in names:
            network = EfficientNetLiteNetwork(LITE[name])
            network.add_module("classifier", nn.Identity())
            self.add_module(name, network)
        self.flatten = _Concatenation()
        self.classifier = nn.Linear(1280 * len(names), 1000)

    def forward(self, canvas: Tensor) -> Tensor:
        """Returns logits (N, 1000) of normalised canvases (N, 3, H, W)."""
        features, left = [], 0
        for name, side in self.widths.items():
            features.append(self.get_submodule(name)(canvas[:, :, :side, left : left + side]))
            left += side
        logits: Tensor = self.classifier(self.flatten(*features))
        return logits


class _Concatenation(nn.Module):
    def forward(self, *features: Tensor) -> Tensor:
        """Returns features (N, D1 + D2 + ...) of features (N, D1), (N, D2), ..."""
        return torch.cat(features, dim=1)


def joined_state(states: Mapping[str, StateDict]) -> dict[str, Tensor]:
    """The tensors of `SideBySideNetwork` from those of each network, by name."""
    joined = {
        f"{name}.{key}": tensor
        for name, state in states.items()
        for key, tensor in state.items()
        if not key.startswith("classifier.")
    }
    count = len(states)
    weights = [state["classifier.weight"] for state in states.values()]
    biases = [state["classifier.bias"] for state in states.values()]
    joined["classifier.weight"] = torch.cat(weights, dim=1) / count
    joined["classifier.bias"] = torch.stack(biases).mean(dim=0)
    return joined


class SideBySide(Family):
    """Several of `LITE`, each with its ImageNet weights.

    Args:
        name: Their names with `BESIDE` between them.

    Raises:
        UsageError: One of them is no such network, or is there twice.
    """

    def __init__(self, name: str) -> None:
        self.parts = tuple(name.split(BESIDE))
        for part in self.parts:
            if part not in LITE or self.parts.count(part) > 1:
                raise UsageError(
                    f"{name!r}: networks that stand side by side are different ones of {', '.join(LITE)}; features of other "
                    "networks are extracted one by one"
                )
        self.architecture = f"featurepipe/{name}"
        self._families = {part: EfficientNetLite(part) for part in self.parts}

    @override
    def choices(self) -> list[str]:
        return self._families[self.parts[0]].choices()

    @override
    def resolve(self, name: str) -> str:
        return self._families[self.parts[0]].resolve(name)

    @override
    def build(self, name: str | None) -> nn.Module:
        return SideBySideNetwork(self.parts)

    @override
    def state(self, name: str) -> StateDict:
        return joined_state({part: family.state(name) for part, family in self._families.items()})

    @override
    def at_hand(self, name: str) -> bool:
        return all(family.at_hand(name) for family in self._families.values())

    @override
    def classes(self, name: str) -> Sequence[str]:
        return self._families[self.parts[0]].classes(name)

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        return SideBySidePreprocessing.of([family.preprocessing(name) for family in self._families.values()])
