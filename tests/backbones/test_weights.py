"""State dict files, content hashes, downloads that fail."""

from __future__ import annotations

import socket
import urllib.error

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights

from featurepipe.backbones import load_backbone, weights_at_hand
from featurepipe.backbones.weights import read_state_dict, sha256_of
from featurepipe.errors import UsageError, WeightsNotFound


@pytest.fixture(scope="module")
def lenet_state() -> dict[str, torch.Tensor]:
    return dict(load_backbone("lenet5", "none", seed=5).module.state_dict())


def test_the_hash_is_of_names_dtypes_shapes_and_values() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    first = sha256_of(state)
    assert len(first) == 64
    assert sha256_of(dict(reversed(state.items()))) == first
    assert sha256_of({**state, "a": state["a"].t().contiguous().t()}) == first
    assert sha256_of({**state, "bn.num_batches_tracked": torch.tensor(7)}) == first
    changed = state["a"].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        {**state, "a": changed},
        {**state, "a": state["a"].view(3, 2)},
        {**state, "a": state["a"].double()},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
        {**state, "empty": torch.empty(0)},
    ]
    assert len({first, *(sha256_of(other) for other in others)}) == 7


def test_a_hash_is_that_of_the_network_it_belongs_to(lite0, tmp_path, lenet_state) -> None:
    assert lite0.weights_sha256 == sha256_of(lite0.module.state_dict())
    torch.save(lenet_state, tmp_path / "mine.pth")
    assert load_backbone("lenet5", str(tmp_path / "mine.pth")).weights_sha256 == sha256_of(lenet_state)
    assert load_backbone("lenet5", "none", seed=5).weights_sha256 == sha256_of(lenet_state)


def test_one_changed_weight_changes_the_hash_and_the_identity(tmp_path, lenet_state) -> None:
    torch.save(lenet_state, tmp_path / "a.pth")
    changed = {name: tensor.clone() for name, tensor in lenet_state.items()}
    changed["c3.0.weight"][3, 2, 1, 0] += 1e-7
    torch.save(changed, tmp_path / "b.pth")
    a, b = (load_backbone("lenet5", str(tmp_path / name)).identity() for name in ("a.pth", "b.pth"))
    assert a["weights_sha256"] != b["weights_sha256"]
    assert {**a, "weights_sha256": ""} == {**b, "weights_sha256": ""}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: tensor.double() for name, tensor in state.items()},
    ],
)
def test_files_are_unwrapped_and_loaded(wrap, tmp_path, lenet_state) -> None:
    path = tmp_path / "own.pt"
    torch.save(wrap(lenet_state), path)
    backbone = load_backbone("lenet5", str(path))
    assert backbone.weights == "file:own.pt"
    assert not backbone.is_random
    for name, tensor in backbone.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, lenet_state[name]), name


def test_safetensors(tmp_path, lenet_state) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(lenet_state, tmp_path / "own.safetensors")
    backbone = load_backbone("lenet5", str(tmp_path / "own.safetensors"))
    assert backbone.weights_sha256 == sha256_of(lenet_state)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"bad.safetensors' is not a safetensors file"):
        load_backbone("lenet5", str(tmp_path / "bad.safetensors"))


def test_missing_and_surplus_keys_and_wrong_shapes_are_named(tmp_path, lenet_state) -> None:
    wrong = dict(lenet_state)
    wrong["head.weight"] = wrong.pop("output.weight")
    wrong["f6.0.bias"] = torch.zeros(85)
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(UsageError) as caught:
        load_backbone("lenet5", str(tmp_path / "wrong.pth")).columns([])
    message = str(caught.value)
    assert "weights 'file:wrong.pth' do not fit lenet5" in message
    assert "1 keys are missing (output.weight)" in message
    assert "1 keys are not in the network (head.weight)" in message
    assert "f6.0.bias has shape (85,) instead of (84,)" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3}, "holds a dict with keys epoch, not a state dict"),
        ({}, "not a state dict"),
    ],
)
def test_files_without_a_state_dict(content, message, tmp_path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=message):
        load_backbone("lenet5", str(tmp_path / "odd.pth"))


def test_code_in_a_file_is_not_run(tmp_path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pth")
    with pytest.raises(UsageError, match=r"is not a state dict that torch.load"):
        load_backbone("lenet5", str(tmp_path / "pickled.pth"))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_files_that_are_something_else(content, tmp_path) -> None:
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(UsageError, match=r"is not a state dict that torch.load"):
        read_state_dict(tmp_path / "page.pth")


def test_a_file_that_does_not_exist() -> None:
    assert not weights_at_hand("resnet18", "nowhere/best.pth")
    with pytest.raises(UsageError, match=r"weights file 'nowhere/best.pth' does not exist; give DEFAULT, none, a name"):
        load_backbone("resnet18", "nowhere/best.pth")


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("timed out"), socket.gaierror(-2, "unknown")]
)
def test_offline_the_error_names_the_file_the_folder_and_the_alternative(error, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def urlopen(*_args, **_kwargs):
        assert socket.getdefaulttimeout() is not None
        raise error

    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    backbone = load_backbone("resnet18")
    assert backbone.weights == "IMAGENET1K_V1"
    assert not weights_at_hand("resnet18")
    with pytest.raises(WeightsNotFound) as caught:
        _ = backbone.module
    message = str(caught.value)
    assert "resnet18-f37072fd.pth" in message
    assert str(tmp_path / "hub" / "checkpoints") in message
    assert "backbone='efficientnet_lite0'" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert socket.getdefaulttimeout() is None
    assert backbone.bottleneck == "flatten"  # looking at a network needs no weights


def test_weights_in_torchs_folder_are_at_hand_and_are_used(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state = load_backbone("resnet18", "none", seed=1).module.state_dict()
    torch.save(state, folder / ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1])
    assert weights_at_hand("resnet18")
    backbone = load_backbone("resnet18")
    assert backbone.weights_sha256 == sha256_of(state)
    assert torch.equal(backbone.module.state_dict()["fc.weight"], state["fc.weight"])


def test_a_damaged_file_in_torchs_folder_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    with pytest.raises(WeightsNotFound, match=r"is damaged .*; delete it"):
        _ = load_backbone("resnet18").weights_sha256


@pytest.mark.slow
def test_old_checkpoints_of_densenet_and_googlenet_load(monkeypatch, tmp_path) -> None:
    """DenseNet's file has the names norm.1 and conv.1, GoogLeNet's the heads of training; both are as published."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, file in (("densenet121", "densenet121-a639ec97.pth"), ("googlenet", "googlenet-1378be20.pth")):
        state = dict(load_backbone(name, "none", seed=1).module.state_dict())
        if name == "densenet121":
            published = {
                key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: tensor
                for key, tensor in state.items()
                if "num_batches_tracked" not in key
            }
            assert "features.denseblock1.denselayer1.norm.1.weight" in published
        else:
            published = {**state, "aux1.fc1.weight": torch.zeros(2, 2), "aux2.conv.bn.bias": torch.zeros(2)}
        torch.save(published, folder / file)
        backbone = load_backbone(name)
        for key, tensor in backbone.module.state_dict().items():
            assert torch.equal(tensor, state[key]), key
        assert backbone.weights_sha256 == sha256_of(state)
