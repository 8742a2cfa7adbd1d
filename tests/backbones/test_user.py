"""Networks from the user's own code."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap

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

class Repeating(Net):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)])
    def forward(self, x):
        x = self.conv(x)
        for stage in self.stages:
            x = stage(x)
        if x.sum() > 1e9:
            x = x + 1
        return self.fc(x.mean((2, 3)))

def make_repeating():
    net = Repeating()
    net.preprocessing = dict(resize=16, crop=(12, 14), mean=(0.5,) * 3, std=(0.5,) * 3)
    return net

class Asserting(Net):
    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        return super().forward(x)

def make_asserting():
    net = Asserting()
    net.preprocessing = dict(resize=16, crop=(12, 14), mean=(0.5,) * 3, std=(0.5,) * 3)
    return net

def make_raising():
    raise KeyError("width")

def make_leaving():
    raise SystemExit(3)

def make_sized(width):
    return Net()

def make_flat():
    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 2))
    net.preprocessing = make().preprocessing
    return net

def make_half():
    return make().half()

def make_double():
    return make().double()

class Halving(Net):
    def forward(self, x):
        return super().forward(x.half())

def make_halving():
    net = Halving()
    net.preprocessing = make().preprocessing
    return net

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
    assert len(identity["source_sha256"]) == 64
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


def test_names_of_hooked_nodes_are_modules_that_a_hook_sees(own_code) -> None:
    backbone = load_backbone("my_networks:make_repeating")
    assert not backbone.traceable
    assert [column.node for column in backbone.columns(["stages.0", "bottleneck"])] == ["stages.0", "stages.1"]
    with pytest.raises(UsageError, match="unknown node 'stages' in my_networks:make_repeating; nearest: stages"):
        backbone.columns(["stages"])  # a list of modules is never called itself


def test_a_network_whose_assertions_fail_on_proxies_is_hooked(own_code) -> None:
    assert not load_backbone("my_networks:make_asserting").traceable


@pytest.mark.parametrize("factory", ["make_half", "make_double"])
def test_other_precisions_become_float32(own_code, factory: str) -> None:
    backbone = load_backbone(f"my_networks:{factory}")
    assert backbone.bottleneck == "mean"
    assert {value.dtype for value in backbone.module.state_dict().values()} == {torch.float32}
    assert backbone.module.fc.weight.unique().tolist() == [7.0]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "make_raising",
            "make_raising() fails with KeyError: 'width'; it is called without arguments; to see all of it",
        ),
        ("make_leaving", "make_leaving() fails with SystemExit: 3; "),
        ("make_sized", "TypeError: make_sized() missing 1 required positional argument: 'width'; it is called without"),
        ("make_flat", "its forward on images (2, 3, 12, 14) fails with RuntimeError: "),
        ("make_flat", "(2x504 and 10x2); let its attribute 'preprocessing' describe images that it takes"),
        ("make_halving", "let it compute in float32"),
    ],
)
def test_failures_of_the_users_code_are_told_in_a_line(own_code, factory: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_backbone(f"my_networks:{factory}").columns([])
    assert f"backbone 'my_networks:{factory}': " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def make(:", "importing broken_networks fails with SyntaxError: "),
        ("import no_such_layers", "fails with ModuleNotFoundError: No module named 'no_such_layers'; to see all of it"),
        ("from torch import no_such_name", "fails with ImportError: cannot import name 'no_such_name'"),
        ("1 / 0", "fails with ZeroDivisionError: division by zero; to see all of it, run: python -c 'import broken"),
    ],
)
def test_modules_that_cannot_be_imported(own_code, code: str, message: str) -> None:
    (own_code / "broken_networks.py").write_text(code)
    with pytest.raises(UsageError) as caught:
        load_backbone("broken_networks:make")
    assert message in str(caught.value)


PACKAGE = {
    "__init__.py": "from pk.model import make",
    "model.py": """
        from pk import layers
        from . import sizes
        def make():
            import pk.late
            net = layers.Head(sizes.WIDTH)
            net.preprocessing = dict(resize=8, crop=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
            return net
        """,
    "layers.py": """
        from torch import nn
        from pk.base import Base
        class Head(Base):
            pass
        """,
    "base.py": """
        from torch import nn
        class Base(nn.Sequential):
            def __init__(self, width):
                super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width))
        """,
    "sizes.py": "WIDTH = 2",
    "late.py": "",
    "train.py": "",
}


def source_sha256_of_package(folder, edited: str = "") -> str:
    """The identity that the package has when it is imported anew, with a comment added to one file."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pk"]:
        del sys.modules[name]
    (folder / "pk").mkdir(parents=True)
    for name, code in PACKAGE.items():
        (folder / "pk" / name).write_text(textwrap.dedent(code) + ("\n# edited" if name == edited else ""))
    os.chdir(folder)
    importlib.invalidate_caches()
    return load_backbone("pk:make").identity()["source_sha256"]


def test_every_file_that_the_network_comes_from_is_in_its_identity(own_code) -> None:
    try:
        plain = source_sha256_of_package(own_code / "a")
        assert source_sha256_of_package(own_code / "b") == plain  # wherever it lies
        edited = {name: source_sha256_of_package(own_code / f"edited_{name}", name) for name in PACKAGE}
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "pk"]:
            del sys.modules[name]
    assert edited.pop("train.py") == plain  # nothing here imports it
    assert len({plain, *edited.values()}) == 1 + len(edited)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./my_networks.py:make", "must be written package.module:factory"),
        ("my_networks:mak", "unknown factory 'mak' in my_networks; nearest: make"),
        (
            "my_networks:zzzzz",
            "unknown factory 'zzzzz' in my_networks; choices: Net, make, make_timm_like, make_silent, ",
        ),
        ("my_networks:make_zzzed", "nearest: make_silent, make_double, make"),  # make_sized needs an argument
        ("timm:mobilenetv3_small_050", "networks of timm are written timm/NAME: timm/mobilenetv3_small_050. See"),
        ("timm.models:resnet18d5", "networks of timm are written timm/NAME: timm/resnet18d, timm/"),
        ("torchvision:resnet18", "networks of torchvision are written NAME: resnet18. See"),
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


def test_the_current_folder_is_importable_for_console_scripts_too(own_code, launcher) -> None:
    """Their `sys.path` names the folder that they lie in, and not the current one."""
    code = """
        import sys
        sys.path[:] = [folder for folder in sys.path if folder]
        from featurepipe.backbones import load_backbone
        print(load_backbone("my_networks:make").bottleneck)
    """
    done = launcher.start(code, cwd=own_code).wait()
    assert done.out == "mean\n", done.err
