"""Networks of benchmarks: EfficientNet-Lite0 with its ImageNet weights on smaller images than it was trained with.

``--backbone benchmarks.networks:efficientnet_lite0_112 --trust-code``
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import featurepipe as fp
from featurepipe.backbones.packaged import LITE, EfficientNetLiteNetwork


def efficientnet_lite0_112() -> nn.Module:
    """The network on images of 112 x 112 pixels: a quarter of the work, enough for images of 28 x 28."""
    return _smaller("efficientnet_lite0", 112)


def _smaller(name: str, pixels: int) -> nn.Module:
    usual = fp.load_backbone(name)
    network = EfficientNetLiteNetwork(LITE[name]._replace(size=pixels))
    network.load_state_dict(usual.module.state_dict())
    network.preprocessing = replace(usual.preprocessing, resize=pixels, crop=(pixels, pixels))
    return network.eval()
