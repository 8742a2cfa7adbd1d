"""Networks from the user's own code."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from featurepipe.backbones import Column, load_backbone
from featurepipe.errors import UsageError

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.fc = nn.Linear(5, 2)
    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def make():
    net = Net()
    nn.init.constant_(net.fc.weight, 7.0)
    net.preprocessing = dict(resize=16, crop=(12, 14), mean=(0.5,) * 3, std=(0.5,) * 3)
    return net

def make_timm_like():
    net = Net()
    net.default_cfg = {"input_size": (3, 10, 10), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    return net

def make_silent():
    return Net()

def make_nothing():
    return 3

class Aliasing(Net):
    def forward(self, x):
        y = self.conv(x)
        z = y
        y += 1
        return self.fc((y * z).mean((2, 3)))

def make_aliasing():
    net = Aliasing()
    net.preprocessing = dict(resize=16, crop=(12, 14), mean=(0.5,) * 3, std=(0.5,) * 3)
    return net

class OwnParameter(Net):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

def make_own_parameter():
    return OwnParameter()

SIZE = 3
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """The module my_networks in the current folder, forgotten afterwards."""
    (tmp_path / "my_networks.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("my_networks", None)


def test_a_factory_in_the_current_folder(own_code) -> None:
    path = list(sys.path)
    backbone = load_backbone("my_networks:make")
    assert sys.path == path
    assert backbone.architecture == "user/my_networks:make"
    assert backbone.weights == "as built"
    assert not backbone.is_random
    assert backbone.bottleneck == "mean"
    assert backbone.columns(["bottleneck", "conv:max2x2"]) == [Column("mean", "gap"), Column("conv", "max2x2")]
    assert backbone.preprocessing.input_shape == (3, 12, 14)
    assert backbone.module.fc.weight.unique().tolist() == [7.0]
    assert not backbone.module.training
    identity = backbone.identity()
    assert identity["source_sha256"] == hashlib.sha256(CODE.encode()).hexdigest()
    again = load_backbone("my_networks:make").identity()
    assert again == identity  # the factory's own random numbers are the same each night


def test_another_preprocessing_is_another_identity(own_code) -> None:
    assert load_backbone("my_networks:make_timm_like").preprocessing.input_shape == (3, 10, 10)


def test_a_random_control_loses_the_weights_that_the_factory_set(own_code) -> None:
    control = load_backbone("my_networks:make", "none", seed=2)
    assert control.is_random
    assert control.module.fc.weight.abs().max() < 1
    assert control.weights_sha256 == load_backbone("my_networks:make", "none", seed=2).weights_sha256
    with pytest.raises(UsageError, match=r"cannot draw the parameters of the network .OwnParameter.* reset_parameters"):
        _ = load_backbone("my_networks:make_own_parameter", "none").module


def test_own_weights_in_a_file(own_code) -> None:
    state = load_backbone("my_networks:make", "none", seed=8).module.state_dict()
    torch.save(state, "trained.pth")
    backbone = load_backbone("my_networks:make", "./trained.pth")
    assert backbone.weights == "file:trained.pth"
    assert torch.equal(backbone.module.fc.weight, state["fc.weight"])


def test_a_network_that_tracing_would_change_is_hooked_instead(own_code) -> None:
    backbone = load_backbone("my_networks:make_aliasing")
    assert not backbone.traceable
    assert backbone.graph(["conv"]) is None
    assert [info.name for info in backbone.nodes()] == ["conv", "fc"]
    assert backbone.bottleneck == "conv"
    assert backbone.hook_names(["conv"]) == ["conv"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks:mak", "unknown factory 'mak' in my_networks; nearest: make"),
        ("my_networks:SIZE", "SIZE is a int, not a function"),
        ("no_such_networks:make", "no module named 'no_such_networks'"),
        (":make", "must be written package.module:factory"),
        ("my_networks:", "must be written package.module:factory"),
    ],
)
def test_names_that_are_wrong(own_code, name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_backbone(name)
    assert message in str(caught.value)


def test_weights_that_do_not_exist(own_code) -> None:
    with pytest.raises(UsageError, match="unknown weights 'V2' in my_networks:make; choices: DEFAULT, none"):
        load_backbone("my_networks:make", "V2")


def test_a_network_that_does_not_say_what_it_expects(own_code) -> None:
    with pytest.raises(
        UsageError, match=r"attribute 'preprocessing' .* module.preprocessing = .*Preprocessing\(resize"
    ):
        _ = load_backbone("my_networks:make_silent").preprocessing
    with pytest.raises(UsageError, match=r"make_nothing returned a int; it must return a torch.nn.Module"):
        _ = load_backbone("my_networks:make_nothing").module


def test_the_current_folder_is_importable_for_console_scripts_too(own_code) -> None:
    code = "from featurepipe.backbones import load_backbone; print(load_backbone('my_networks:make').bottleneck)"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=own_code, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "mean", done.stderr
