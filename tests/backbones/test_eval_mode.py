"""Whatever network a factory returns, its forward runs in eval mode: in any batch, in any copy, in another process."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine
from featurepipe.backbones.nodes import attributes_kept, freeze, frozen_copy
from featurepipe.errors import UsageError

CODE = '''
import functools
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torchvision.models.feature_extraction import create_feature_extractor

EXPECTS = dict(resize=12, crop=(12, 12), mean=(0.5,) * 3, std=(0.25,) * 3)

def expecting(net):
    net.preprocessing = EXPECTS
    return net

class Branching(nn.Sequential):
    def forward(self, x):
        if x.sum() > 1e9:
            x = -x
        return super().forward(x)

class Forgetful(nn.Sequential):
    """Its train() leaves out the layers inside, and returns nothing."""
    def train(self, mode=True):
        self.training = mode

class Stubborn(nn.Sequential):
    """Keeps training, as code that wants Monte Carlo dropout does."""
    def train(self, mode=True):
        return super().train(True)

class Caching(nn.Sequential):
    """Keeps what it computed, as the attention biases of LeViT are kept."""
    def __init__(self, *layers):
        super().__init__(*layers)
        self.kept = {}
    def forward(self, x):
        if "gain" not in self.kept:
            self.kept["gain"] = self[1].weight[None, :, None, None] * 1.5
        for i, layer in enumerate(self):
            x = layer(x) * self.kept["gain"] if i == 3 else layer(x)
        return x

class Wrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        return self.net(x)

def layers(norm=lambda layer: layer):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(6)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2.0)
    return (norm(nn.Conv2d(3, 6, 3)), bn, nn.ReLU(), nn.Dropout(0.4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

def plain(kind=nn.Sequential):
    net = kind(*layers())
    net.train()
    return expecting(net)

def branching(): return plain(Branching)
def forgetful(): return plain(Forgetful)
def stubborn(): return plain(Stubborn)
def caching(): return plain(Caching)
def extractor(): return expecting(create_feature_extractor(plain(), ["1", "5"]).train())
def extractor_in_eval(): return expecting(create_feature_extractor(plain(), ["1", "5"]).eval())
def extractor_inside(): return expecting(Wrapper(create_feature_extractor(plain(), ["5"])))
def extractor_copied(): return expecting(Wrapper(__import__("copy").deepcopy(extractor_in_eval())))
def graph(): return expecting(torch.fx.symbolic_trace(plain()))
def parallel(): return expecting(nn.DataParallel(plain()))
def parallel_of_two():
    net = nn.DataParallel(plain())
    net.device_ids, net.output_device, net.src_device_obj = [0, 1], 0, torch.device("cuda:0")
    return expecting(net)
def compiled(): return expecting(torch.compile(plain()))
def compiled_inside(): return expecting(Wrapper(torch.compile(nn.Sequential(torch.compile(plain()), nn.Identity()))))
def compiled_in_place():
    net = plain()
    net.compile()
    return net
def nested(): return expecting(Wrapper(Wrapper(Wrapper(plain(Branching)))))
def normed(): return expecting(nn.Sequential(*layers(weight_norm)))
def parametrized(): return expecting(nn.Sequential(*layers(parametrizations.weight_norm)))
def spectral(): return expecting(nn.Sequential(*layers(torch.nn.utils.spectral_norm)))
def without_gradients():
    with torch.inference_mode():
        return plain()
partial = functools.partial(plain, kind=Branching)
def scripted(): return expecting(torch.jit.script(plain()))
def traced(): return expecting(torch.jit.trace(plain().eval(), torch.zeros(1, 3, 12, 12)))
def exported(): return expecting(torch.export.export(plain().eval(), (torch.zeros(2, 3, 12, 12),)).module())
network = plain()

class Random(nn.Sequential):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))
def random(): return plain(Random)
def batch_statistics():
    bn = nn.BatchNorm2d(6, track_running_stats=False)
    return expecting(nn.Sequential(nn.Conv2d(3, 6, 3), bn, nn.Flatten(), nn.Linear(600, 2)))
'''
EXACT = [
    "plain",
    "branching",
    "forgetful",
    "stubborn",
    "extractor",
    "extractor_in_eval",
    "extractor_inside",
    "extractor_copied",
    "graph",
    "parallel",
    "parallel_of_two",
    "compiled",
    "compiled_inside",
    "compiled_in_place",
    "nested",
    "parametrized",
    "without_gradients",
    "partial",
]
OWN = ["caching", "normed", "spectral"]  # networks that compute something else than the plain one


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "kinds_of_networks.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("kinds_of_networks", None)


def pictures(count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 12, 12), generator=generator, dtype=torch.uint8) // (
        torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1)
    )


def features(name: str, batch: int) -> np.ndarray:
    """What comes out of the BatchNorm after pooling, for eight images in batches of ``batch``."""
    backbone = load_backbone(f"kinds_of_networks:{name}")
    (node,) = [info.name for info in backbone.nodes() if info.shape == (6,)][-1:]
    engine = Engine(backbone, backbone.columns([node]), batch_size=batch)
    images = pictures()
    return np.concatenate([engine(images[at : at + batch])[f"{node}:gap"] for at in range(0, len(images), batch)])


def expected() -> np.ndarray:
    import kinds_of_networks

    net = kinds_of_networks.plain().eval()
    with torch.no_grad():
        return net[:6]((pictures() / 255 - 0.5) / 0.25).numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("name", [*EXACT, *OWN])
def test_every_kind_of_network_computes_in_eval_mode(code, name) -> None:
    truth = expected() if name in EXACT else features(name, 8)
    for batch in (1, 2, 8):
        np.testing.assert_allclose(features(name, batch), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_another_process_computes_the_same(code, launcher) -> None:
    program = (
        "import sys, json, warnings; warnings.simplefilter('ignore'); "
        f"sys.path[:0] = [{str(code)!r}, {str(Path(__file__).parent)!r}]; import test_eval_mode as t; "
        f"print(json.dumps({{n: t.features(n, 2).tolist() for n in {[*EXACT, *OWN]!r}}}))"
    )
    done = launcher.start(program).wait()
    assert done.code == 0, done.err
    for name, values in done.json().items():
        np.testing.assert_allclose(values, features(name, 8), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.filterwarnings("ignore:.torch.jit.:FutureWarning", "ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scripted", "returned a TorchScript module"),
        ("traced", "returned a TorchScript module"),
        ("exported", "putting the network into eval mode fails with NotImplementedError"),
        ("random", "other values for the same images a second time, so something random runs in eval mode"),
        ("batch_statistics", "other values for the same images in another batch, so it looks at its batch"),
        ("network", "network is a network .Sequential., not a function that makes one"),
    ],
)
def test_networks_that_cannot_be_right_are_refused_in_words(code, name, message) -> None:
    with pytest.raises(UsageError, match=message):
        load_backbone(f"kinds_of_networks:{name}").columns([])


def test_a_copy_of_a_feature_extractor_stays_in_eval_mode(code) -> None:
    import kinds_of_networks

    net = freeze(kinds_of_networks.extractor())
    assert copy.deepcopy(net).training  # torchvision's copies are in training mode
    assert not any(layer.training for layer in frozen_copy(net).modules())


def test_what_a_forward_keeps_on_the_network_is_taken_back() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache, self.seen = {"a": 1}, [1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache["b"], self.last = x, x
            self.seen.append(2)
            self.register_buffer("new", x)
            return x

    net = nn.Sequential(Keeping())
    with attributes_kept(net):
        net(torch.zeros(1))
    assert net[0].cache == {"a": 1}
    assert net[0].seen == [1]
    assert not hasattr(net[0], "last")
    assert dict(net.named_buffers()) == {}


@pytest.mark.parametrize("name", ["levit_128s", pytest.param("efficientformer_l1", marks=pytest.mark.slow)])
def test_networks_that_keep_attention_biases_are_traced_twice(name) -> None:
    pytest.importorskip("timm")
    backbone = load_backbone(f"timm/{name}", "none")
    node = backbone.bottleneck
    first, second = backbone.graph([node]), backbone.graph([node])
    images = torch.zeros(1, *backbone.preprocessing.input_shape)
    with torch.inference_mode():
        torch.testing.assert_close(first(images)[node], second(images)[node])
