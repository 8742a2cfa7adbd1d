"""Backbones that featurepipe brings itself: ``efficientnet_lite0`` and ``lenet5``."""

from __future__ import annotations

from torch import nn

from featurepipe.backbones import efficientnet_lite, lenet, weights
from featurepipe.backbones.families import NoValues, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import UsageError, WeightsNotFound


class EfficientNetLite:
    """``efficientnet_lite0``, whose ImageNet weights come with a Python package."""

    architecture = "featurepipe/efficientnet_lite0"

    def choices(self) -> list[str]:
        return [efficientnet_lite.WEIGHTS_NAME]

    def resolve(self, name: str) -> str:
        return resolve(name, self.choices(), efficientnet_lite.WEIGHTS_NAME, "efficientnet_lite0")

    def skeleton(self, name: str | None) -> nn.Module:
        with NoValues():
            return efficientnet_lite.EfficientNetLite0()

    def random(self) -> nn.Module:
        return efficientnet_lite.EfficientNetLite0()

    def state(self, name: str) -> StateDict:
        return efficientnet_lite.rename_packaged(weights.read_state_dict(efficientnet_lite.package_file()))

    def at_hand(self, name: str) -> bool:
        try:
            return efficientnet_lite.package_file().is_file()
        except WeightsNotFound:
            return False

    def preprocessing(self, name: str | None) -> Preprocessing:
        return efficientnet_lite.PREPROCESSING

    def identity(self) -> dict[str, str]:
        return {}


class LeNet:
    """``lenet5``, for which there are no pretrained weights."""

    architecture = "featurepipe/lenet5"

    def choices(self) -> list[str]:
        return []

    def resolve(self, name: str) -> str:
        raise UsageError(
            f"lenet5 has no pretrained weights ({name!r} was asked for); use --weights none --seed N for a random "
            "network, or --weights FILE.pth for your own. See: featurepipe backbones"
        )

    def skeleton(self, name: str | None) -> nn.Module:
        with NoValues():
            return lenet.LeNet5()

    def random(self) -> nn.Module:
        return lenet.LeNet5()

    def state(self, name: str) -> StateDict:
        return {}

    def at_hand(self, name: str) -> bool:
        return False

    def preprocessing(self, name: str | None) -> Preprocessing:
        return lenet.PREPROCESSING

    def identity(self) -> dict[str, str]:
        return {}
