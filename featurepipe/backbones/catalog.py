"""The catalogue of backbones: what can be had by name, how large it is, and whether its weights are at hand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from featurepipe.backbones.families import Family
from featurepipe.backbones.from_torchvision import Torchvision, classification_names
from featurepipe.backbones.packaged import EfficientNetLite, LeNet


@dataclass(frozen=True)
class BackboneInfo:
    """One line of the catalogue.

    Attributes:
        name: What ``load_backbone`` takes.
        input_size: (channels, height, width) of the images that the network sees with its default weights.
        parameters: Number of parameters, those of auxiliary training heads left out.
        bottleneck_width: Width of the features that feed the final classifier.
        weights: Names of the pretrained weights.
        at_hand: Whether the default weights are on this machine.
    """

    name: str
    input_size: tuple[int, int, int]
    parameters: int
    bottleneck_width: int
    weights: tuple[str, ...]
    at_hand: bool


def list_backbones() -> list[BackboneInfo]:
    """Lists featurepipe's own backbones and all classification models of torchvision; downloads nothing.

    timm's models (``timm/NAME``) are too many to build one by one: ``timm.list_models()`` names them.
    """
    own: dict[str, Family] = {"efficientnet_lite0": EfficientNetLite(), "lenet5": LeNet()}
    families: dict[str, Family] = {**own, **{name: Torchvision(name) for name in classification_names()}}
    return [_describe(name, family) for name, family in families.items()]


def timm_models() -> int:
    """Returns how many models the installed timm offers, 0 if it is not installed."""
    try:
        import timm
    except ImportError:
        return 0
    return len(timm.list_models())


def _describe(name: str, family: Family) -> BackboneInfo:
    choices = family.choices()
    default = family.resolve("DEFAULT") if choices else None
    network = family.skeleton(default)
    return BackboneInfo(
        name=name,
        input_size=family.preprocessing(default).input_shape,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        bottleneck_width=_classifier_inputs(network),
        weights=tuple(choices),
        at_hand=default is not None and family.at_hand(default),
    )


def _classifier_inputs(network: nn.Module) -> int:
    """Width of what feeds the classifier: in all these networks the last Linear or, in SqueezeNet, convolution."""
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    last = layers[-1]
    return last.in_features if isinstance(last, nn.Linear) else last.in_channels
