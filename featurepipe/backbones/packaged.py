"""Backbones that featurepipe brings itself: ``efficientnet_lite0`` and ``lenet5``."""

from __future__ import annotations

from torch import nn
from typing_extensions import override

from featurepipe.backbones import efficientnet_lite, lenet, weights
from featurepipe.backbones.families import SEE, Family, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import UsageError, WeightsNotFound


class EfficientNetLite(Family):
    """``efficientnet_lite0``, whose ImageNet weights come with a Python package."""

    architecture = "featurepipe/efficientnet_lite0"

    @override
    def choices(self) -> list[str]:
        return [efficientnet_lite.WEIGHTS_NAME]

    @override
    def resolve(self, name: str) -> str:
        return resolve(name, self.choices(), efficientnet_lite.WEIGHTS_NAME, "efficientnet_lite0")

    @override
    def build(self, name: str | None) -> nn.Module:
        return efficientnet_lite.EfficientNetLite0()

    @override
    def state(self, name: str) -> StateDict:
        return efficientnet_lite.rename_packaged(weights.read_state_dict(efficientnet_lite.package_file()))

    @override
    def at_hand(self, name: str) -> bool:
        try:
            return efficientnet_lite.package_file().is_file()
        except WeightsNotFound:
            return False

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        return efficientnet_lite.PREPROCESSING


class LeNet(Family):
    """``lenet5``, for which there are no pretrained weights."""

    architecture = "featurepipe/lenet5"

    @override
    def choices(self) -> list[str]:
        return []

    @override
    def resolve(self, name: str) -> str:
        raise UsageError(
            f"lenet5 has no pretrained weights ({name!r} was asked for); use --weights none --seed N for a random "
            f"network, or --weights FILE.pth for your own. See: {SEE}"
        )

    @override
    def build(self, name: str | None) -> nn.Module:
        return lenet.LeNet5()

    @override
    def state(self, name: str) -> StateDict:
        self.resolve(name)
        return {}

    @override
    def at_hand(self, name: str) -> bool:
        return False

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        return lenet.PREPROCESSING
