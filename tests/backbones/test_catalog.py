"""The catalogue against real instances."""

from __future__ import annotations

import pytest
import torchvision

from featurepipe.backbones import BackboneInfo, list_backbones, load_backbone, weights_at_hand


@pytest.fixture(scope="module")
def catalogue() -> dict[str, BackboneInfo]:
    return {info.name: info for info in list_backbones()}


def test_everything_of_torchvision_and_our_own_is_listed(catalogue) -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert list(catalogue) == ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "lenet5", *names]
    assert len(names) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_0", "shufflenet_v2_x0_5", "mnasnet0_5", "swin_t", "vit_b_32"])
def test_widths_and_sizes_are_those_of_the_bottleneck(catalogue, name: str) -> None:
    backbone = load_backbone(name)
    info = catalogue[name]
    assert info.bottleneck_width == backbone.node(backbone.bottleneck).width
    assert info.input_size == backbone.preprocessing.input_shape


def test_known_figures(catalogue) -> None:
    def figures(name: str) -> tuple[int, int, tuple[int, int, int]]:
        info = catalogue[name]
        return info.parameters, info.bottleneck_width, info.input_size

    assert figures("resnet50") == (25_557_032, 2048, (3, 224, 224))
    assert figures("vgg16") == (138_357_544, 4096, (3, 224, 224))
    assert figures("googlenet") == (6_624_904, 1024, (3, 224, 224))
    assert figures("inception_v3") == (23_834_568, 2048, (3, 299, 299))  # without the auxiliary head's 3.3 million
    assert figures("vit_h_14") == (633_470_440, 1280, (3, 518, 518))
    assert figures("efficientnet_lite0") == (4_652_008, 1280, (3, 224, 224))
    assert figures("lenet5") == (61_706, 84, (1, 32, 32))
    assert catalogue["resnet50"].weights == ("IMAGENET1K_V1", "IMAGENET1K_V2")


def test_parameters_agree_with_torchvisions_own_count(catalogue) -> None:
    heads = {"inception_v3"}  # torchvision counts its auxiliary head
    for name, info in catalogue.items():
        if name.startswith("efficientnet_lite") or name in ("lenet5", *heads):
            continue
        assert info.parameters == torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"], name


def test_at_hand(catalogue, monkeypatch, tmp_path) -> None:
    assert catalogue["efficientnet_lite0"].at_hand
    assert not catalogue["lenet5"].at_hand
    assert not weights_at_hand("lenet5")
    assert weights_at_hand("lenet5", "none")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not weights_at_hand("alexnet")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "alexnet-owt-7be5be79.pth").touch()
    assert weights_at_hand("alexnet")
