"""Backbones from timm, with random weights, as nothing can be downloaded here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featurepipe.backbones import Column, load_backbone, timm_models, weights_at_hand
from featurepipe.backbones.engine import Engine
from featurepipe.errors import UsageError, WeightsNotFound

timm = pytest.importorskip("timm")


def test_a_traceable_model() -> None:
    backbone = load_backbone("timm/resnet18", "none", seed=1)
    assert backbone.architecture == "timm/resnet18"
    assert backbone.columns(["layer4", "bottleneck"]) == [Column("layer4", "gap"), Column("global_pool.flatten", "gap")]
    torch.manual_seed(1)
    reference = timm.create_model("resnet18", pretrained=False).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        kept = backbone.graph(["global_pool.flatten", "layer2"])(images)  # type: ignore[misc]
        assert torch.allclose(
            kept["global_pool.flatten"], reference.forward_head(reference.forward_features(images), pre_logits=True)
        )
        assert torch.equal(backbone.module(images), reference(images))


def test_preprocessing_is_the_weights_own() -> None:
    lite = load_backbone("timm/tf_efficientnet_lite0", "none").preprocessing
    assert (lite.mean, lite.resize, lite.interpolation) == ((0.5,) * 3, 256, "bicubic")
    assert load_backbone("timm/resnet18").weights == "a1_in1k"
    assert load_backbone("timm/resnet18").preprocessing.resize == 235  # floor(224 / 0.95)
    assert load_backbone("timm/resnet18.tv_in1k").weights == "tv_in1k"
    assert load_backbone("timm/resnet18", "tv_in1k").preprocessing.resize == 256


def test_a_model_that_cannot_be_traced_has_its_modules_for_nodes() -> None:
    backbone = load_backbone("timm/tf_efficientnet_lite0", "none")
    assert not backbone.traceable
    assert backbone.graph(["blocks.2"]) is None
    assert backbone.bottleneck == "global_pool"
    assert backbone.node("blocks.2").shape == (40, 28, 28)


def test_the_bottleneck_before_a_linear_of_timms_own() -> None:
    backbone = load_backbone("timm/mobilenetv3_small_050")
    assert backbone.node(backbone.bottleneck).shape == (1024,)


def test_old_names_are_those_that_timm_has_given_them() -> None:
    backbone = load_backbone("timm/tf_efficientnet_b0_ns")
    assert backbone.architecture == "timm/tf_efficientnet_b0"
    assert backbone.weights == "ns_jft_in1k"
    assert load_backbone("timm/tf_inception_v3", "none").preprocessing.input_shape == (3, 299, 299)


@pytest.mark.slow
def test_features_of_a_channels_last_map_are_means_over_its_positions() -> None:
    backbone = load_backbone("timm/swin_tiny_patch4_window7_224", "none", seed=1)
    torch.manual_seed(1)
    reference = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).eval()
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    found = Engine(backbone, backbone.columns(["layers.1:gap"]))(images)["layers.1:gap"]
    kept = []
    reference.layers[1].register_forward_hook(lambda _module, _given, output: kept.append(output))
    with torch.inference_mode():
        reference(backbone.preprocessing.normalise(images))
    np.testing.assert_allclose(found, kept[0].mean((1, 2)), rtol=1e-3, atol=1e-4)


def test_names_that_are_wrong() -> None:
    with pytest.raises(UsageError, match=r"unknown backbone 'timm/resnet19'; nearest: timm/resnet"):
        load_backbone("timm/resnet19")
    with pytest.raises(UsageError, match=r"unknown weights 'v9' in timm/resnet18"):
        load_backbone("timm/resnet18.v9")
    assert timm_models() > 500


def test_a_dead_network_is_asked_once_and_the_error_says_what_to_do(monkeypatch, tmp_path) -> None:
    asked = []

    def unreachable(url: str, *, timeout: float) -> None:
        asked.append((url.removeprefix("https://huggingface.co/"), timeout < 10))
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr(timm, "create_model", lambda *_args, **_kwargs: pytest.fail("the slow attempt was made"))
    with pytest.raises(WeightsNotFound) as caught:
        _ = load_backbone("timm/resnet18").weights_sha256
    assert asked == [("timm/resnet18.a1_in1k/resolve/main/model.safetensors", True)]
    for part in (
        "'a1_in1k' of timm/resnet18",
        "model.safetensors of the Hugging Face repository timm/resnet18.a1_in1k",
        "backbone='timm/resnet18.a1_in1k' weights='FILE'",
        f"{tmp_path} (HF_HUB_CACHE)",
        "efficientnet_lite0",
    ):
        assert part in str(caught.value)


def test_when_the_hub_answers_the_download_is_made_without_its_warnings(monkeypatch, tmp_path) -> None:
    from huggingface_hub import logging

    levels = []

    def create_model(_name: str, *, pretrained: bool) -> torch.nn.Module:
        assert pretrained
        levels.append(logging.get_verbosity())
        raise FileNotFoundError("lost on the way")

    backbone = load_backbone("timm/resnet18")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _url, **_timeout: None)
    monkeypatch.setattr(timm, "create_model", create_model)
    before = logging.get_verbosity()
    with pytest.raises(WeightsNotFound, match="FileNotFoundError"):
        _ = backbone.weights_sha256
    assert levels == [logging.ERROR]
    assert logging.get_verbosity() == before != logging.ERROR


def test_at_hand_looks_into_the_cache_only(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert not weights_at_hand("timm/resnet18")
