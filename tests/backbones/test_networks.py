"""What our graphs keep is what an untouched network computes: bottleneck and three inner nodes of each kind."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from featurepipe.backbones import load_backbone
from featurepipe.backbones.families import NoValues
from featurepipe.backbones.packaged import LITE, EfficientNetLiteNetwork

# name: (bottleneck, classifier in front of which the reference looks, options of the reference, inner modules)
NETWORKS = {
    "alexnet": ("classifier.5", "classifier.6", {}, ["features.0", "features.5", "features.12"]),
    "googlenet": (
        "dropout",
        "fc",
        {"aux_logits": False, "transform_input": True, "init_weights": False},
        ["conv1.bn", "inception3b.branch2", "inception4e"],
    ),
    "resnet50": ("flatten", "fc", {}, ["layer1.0.bn3", "layer2", "layer4.2.conv2"]),
    "efficientnet_b0": ("classifier.0", "classifier.1", {}, ["features.1", "features.4.1.block.2", "features.8.1"]),
    "mobilenet_v3_large": ("classifier.2", "classifier.3", {}, ["features.0", "features.6.block.2", "classifier.0"]),
    "densenet121": ("flatten", "classifier", {}, ["features.conv0", "features.denseblock2", "features.norm5"]),
    "convnext_tiny": ("classifier.1", "classifier.2", {}, ["features.1", "features.3.2.block.0", "features.7"]),
    "squeezenet1_1": ("classifier.0", "classifier.1", {}, ["features.3.squeeze", "features.7", "features.12"]),
    "swin_t": ("flatten", "head", {}, ["features.1", "features.4", "norm"]),
    "inception_v3": (
        "flatten",
        "fc",
        {"aux_logits": False, "transform_input": True, "init_weights": False},
        ["Conv2d_1a_3x3", "Mixed_5b", "Mixed_7c.branch3x3_1"],
    ),
    "vit_b_16": (
        "getitem_5",
        "heads.head",
        {},
        ["conv_proj", "encoder.layers.encoder_layer_3", "encoder.layers.encoder_layer_11.mlp"],
    ),
    "vgg16": ("classifier.5", "classifier.6", {}, ["features.3", "features.16", "classifier.0"]),
    "vgg19": ("classifier.5", "classifier.6", {}, ["features.1", "features.27", "classifier.1"]),
}


def forward_with_hooks(
    network: nn.Module, images: torch.Tensor, classifier: str, inner: list[str]
) -> dict[str, torch.Tensor]:
    """The classifier's input, under the name "bottleneck", and the outputs of modules, each copied at once."""
    kept: dict[str, torch.Tensor] = {}
    network.get_submodule(classifier).register_forward_pre_hook(
        lambda _module, given: kept.update(bottleneck=given[0].clone())
    )
    for name in inner:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _given, output, name=name: kept.update({name: output.clone()})
        )
    with torch.inference_mode():
        network(images)
    return kept


# 4 to 10 s each: many layers to trace, or 140 million random weights to draw. The others have additions, concatenations,
# squeeze and excitation, and attention.
BIG = ("densenet121", "swin_t", "convnext_tiny", "inception_v3", "efficientnet_b0", "vgg16", "vgg19")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in BIG else []) for n in NETWORKS])
def test_nodes_equal_a_plain_forward_with_hooks(name: str) -> None:
    bottleneck, classifier, options, inner = NETWORKS[name]
    backbone = load_backbone(name, "none", seed=3)
    assert backbone.bottleneck == bottleneck
    with NoValues():
        reference = torchvision.models.get_model(name, weights=None, **options)
    reference.load_state_dict(backbone.module.state_dict(), assign=True)
    batch = 1 if name.startswith(("vgg", "vit")) else 2
    images = torch.randn(batch, *backbone.preprocessing.input_shape, generator=torch.Generator().manual_seed(1))
    expected = forward_with_hooks(reference.eval(), images, classifier, inner)
    graph = backbone.graph([bottleneck, *inner])
    assert graph is not None
    with torch.inference_mode():
        kept = graph(images)
    assert set(kept) == {bottleneck, *inner}
    for node in kept:
        value = expected["bottleneck" if node == bottleneck else node]
        assert value.std() > 0
        assert kept[node].shape == value.shape
        assert (kept[node] - value).abs().max() <= 1e-5 * value.abs().max(), node
        info = backbone.node(node)
        assert info.shape == value.shape[1:]


def test_lenet_equals_a_plain_forward_with_hooks() -> None:
    backbone = load_backbone("lenet5", "none", seed=3)
    assert backbone.bottleneck == "f6.1"
    images = torch.randn(4, 1, 32, 32)
    inner = ["c1", "s4", "c5.0"]
    reference = type(backbone.module)()
    reference.load_state_dict(backbone.module.state_dict())
    expected = forward_with_hooks(reference.eval(), images, "output", inner)
    kept = backbone.graph(["f6.1", *inner])(images)  # type: ignore[misc]
    for node in kept:
        assert torch.equal(kept[node], expected["bottleneck" if node == "f6.1" else node]), node


def test_efficientnet_lite0_equals_a_plain_forward_with_hooks(lite0, photos) -> None:
    images = lite0.preprocessing.normalise(
        torch.stack([lite0.preprocessing.resize_crop(photo) for photo in photos[:2]])
    )
    inner = ["blocks.0", "blocks.4.depthwise.conv", "head"]
    reference = EfficientNetLiteNetwork(LITE["efficientnet_lite0"])
    reference.load_state_dict(lite0.module.state_dict())
    expected = forward_with_hooks(reference.eval(), images, "classifier", inner)
    kept = lite0.graph([lite0.bottleneck, *inner])(images)
    for node in kept:
        assert torch.equal(kept[node], expected["bottleneck" if node == "flatten" else node]), node


def test_a_value_that_the_network_overwrites_is_kept_as_it_was_made() -> None:
    """ResNet adds the shortcut onto bn2's output in place; the node bn2 means what bn2 returned."""
    backbone = load_backbone("resnet18", "none")
    images = torch.randn(1, 3, 64, 64)
    with NoValues():
        reference = torchvision.models.resnet18()
    reference.load_state_dict(backbone.module.state_dict(), assign=True)
    expected = forward_with_hooks(reference.eval(), images, "fc", ["layer1.0.bn2", "layer1.0"])
    kept = backbone.graph(["layer1.0.bn2", "layer1.0"])(images)  # type: ignore[misc]
    assert torch.equal(kept["layer1.0.bn2"], expected["layer1.0.bn2"])
    assert torch.equal(kept["layer1.0"], expected["layer1.0"])
    assert kept["layer1.0.bn2"].min() < 0


def test_the_graph_stops_at_the_deepest_node() -> None:
    backbone = load_backbone("resnet18", "none")
    graph = backbone.graph(["layer2"])
    assert graph is not None
    names = {name for name, _ in graph.named_modules()}
    assert "layer2.1.bn2" in names
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name in names)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_input_scaling_of_the_pretrained_models_is_kept_and_training_heads_are_not(name: str) -> None:
    module = load_backbone(name, "none").module
    assert module.transform_input is True
    assert not any("aux" in key.lower() for key in module.state_dict())
    assert isinstance(module(torch.zeros(1, 3, 96, 96)), torch.Tensor)


@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
def test_the_module_is_frozen(name: str) -> None:
    module = load_backbone(name, "none").module
    assert not any(layer.training for layer in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(getattr(layer, "inplace", False) for layer in module.modules())
