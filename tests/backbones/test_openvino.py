"""A network in OpenVINO gives the features that PyTorch gives, or PyTorch runs and the reason is said."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import pytest
import torch
from torch import nn

from featurepipe.backbones import Backbone, Preprocessing, load_backbone, openvino
from featurepipe.backbones import engine as engine_module
from featurepipe.backbones.engine import OPENVINO, PYTORCH, Engine
from featurepipe.backbones.openvino import NotConvertedError, network_of
from featurepipe.errors import UsageError
from featurepipe.features.options import MachineOptions
from featurepipe.features.settings import ENOUGH_TO_CONVERT, Machine, settle_machine

PREPROCESSING = Preprocessing(
    resize=20, crop=(16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)


class Residual(nn.Module):
    """Two convolutions with a skip around them, the second depthwise, and a hard activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6())
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        return self.fc(x.mean((2, 3)))


class Untraceable(Residual):
    """A forward that looks at its values."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def made(network: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    module = network()
    module.preprocessing = PREPROCESSING
    return module


def residual() -> nn.Module:
    return made(Residual)


def untraceable() -> nn.Module:
    return made(Untraceable)


def backbone_of(factory: Callable[[], nn.Module]) -> Backbone:
    return load_backbone(f"{__name__}:{factory.__name__}", "none")


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    backbone = backbone_of(residual)
    columns = backbone.columns(["stem:avg2x2", "block:map", "bottleneck"])
    return Engine(backbone, columns), Engine(backbone, columns, engine=OPENVINO)


def test_features_of_all_columns_are_those_of_pytorch(engines):
    ours, theirs = (engine(images_of(7)) for engine in engines)
    assert engines[1].runtime == {"engine": "openvino", "version": version("openvino")}
    assert list(ours) == list(theirs)
    for name, expected in ours.items():
        assert theirs[name].dtype == np.float32
        apart = np.linalg.norm(theirs[name] - expected, axis=1)
        assert (apart <= openvino.TOLERANCE * np.linalg.norm(expected, axis=1)).all()


def test_an_image_has_the_same_bits_in_any_batch_and_on_any_thread(engines):
    images = images_of(33)
    whole = engines[1](images)
    alone = [engines[1](images[place : place + 1]) for place in range(4)]
    with ThreadPoolExecutor(6) as threads:
        beside = list(threads.map(lambda at: engines[1](images[at : at + 3]), range(0, 33, 3)))
    for name, values in whole.items():
        assert np.array_equal(values[:4], np.concatenate([one[name] for one in alone]))
        assert np.array_equal(values, np.concatenate([three[name] for three in beside]))


def test_a_result_is_not_overwritten_by_the_next_batch(engines):
    first = engines[1].submit(images_of(2)).result()
    kept = {name: values.copy() for name, values in first.items()}
    for seed in range(1, 5):
        engines[1].submit(images_of(2, seed)).result()
    assert all(np.array_equal(values, kept[name]) for name, values in first.items())


def test_what_openvino_cannot_run_pytorch_runs_and_says_why(monkeypatch):
    hooked = backbone_of(untraceable)
    engine = Engine(hooked, hooked.columns(["stem"]), engine=OPENVINO)
    assert engine.runtime == {
        "engine": "pytorch",
        "version": torch.__version__,
        "reason": "the network cannot be traced",
    }
    assert engine.streams == 1
    backbone = backbone_of(residual)
    columns = backbone.columns(["stem"])
    reduced = Engine(backbone, columns, precision="bf16", engine=OPENVINO)
    assert reduced.runtime["reason"] == "OpenVINO runs fp32 on a CPU, this is bf16 on cpu"
    monkeypatch.setattr(engine_module, "openvino_is_installed", lambda: False)
    absent = Engine(backbone, columns, engine=OPENVINO)
    assert absent.runtime["reason"] == "OpenVINO is not installed; see featurepipe doctor"
    expected = Engine(backbone, columns)(images_of(3))["stem:gap"]
    assert np.array_equal(absent(images_of(3))["stem:gap"], expected)


def test_activations_that_differ_are_refused(monkeypatch):
    backbone = backbone_of(residual)
    monkeypatch.setattr(openvino, "TOLERANCE", -1.0)
    with pytest.raises(NotConvertedError, match="activations at stem differ from PyTorch's by"):
        network_of(backbone, ["stem", "block"], 1)


@pytest.mark.parametrize(
    ("expected", "found", "distance"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0),
        ([[3.0, 4.0], [0.0, 5.0]], [[3.0, 4.0], [0.0, 5.5]], 0.1),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ([[float("nan"), 1.0]], [[float("nan"), 1.0]], 0.0),
        ([[float("inf"), 1.0]], [[float("nan"), 1.0]], float("inf")),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], float("inf")),
    ],
)
def test_distance_is_a_share_of_the_length(expected, found, distance):
    measured = openvino._distance(torch.tensor(expected), torch.tensor(found))
    assert measured == pytest.approx(distance)


def test_a_value_that_is_not_finite_here_alone_is_far():
    assert not openvino._distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, float("nan")]])) <= 1


def test_auto_converts_for_many_images_or_as_the_store_did():
    machine = settle_machine(MachineOptions(device="cpu"), "cpu", has_openvino=True)
    assert machine.engine == "auto"
    assert machine.for_images(ENOUGH_TO_CONVERT).engine == OPENVINO
    assert machine.for_images(ENOUGH_TO_CONVERT - 1).engine == PYTORCH
    assert machine.for_images(1, held=OPENVINO).engine == OPENVINO
    assert settle_machine(MachineOptions(device="cpu"), "cpu", has_openvino=False).engine == PYTORCH
    asked = settle_machine(MachineOptions(device="cpu", engine=PYTORCH), "cpu", has_openvino=True)
    assert asked.for_images(10**9, held=OPENVINO).engine == PYTORCH
    assert Machine("cpu", 1, 1).for_images(10**9).engine == PYTORCH


def test_openvino_that_is_asked_for_must_be_possible():
    with pytest.raises(UsageError, match=r"not installed; run: pip install 'featurepipe\[cpu\]'"):
        settle_machine(MachineOptions(device="cpu", engine=OPENVINO), "cpu", has_openvino=False)
    with pytest.raises(UsageError, match="needs device='cpu'; here the device is cuda"):
        settle_machine(MachineOptions(device="cuda", engine=OPENVINO), "cpu", has_cuda=True, has_openvino=True)
    with pytest.raises(UsageError, match=r"choices: auto, pytorch, openvino"):
        MachineOptions(engine="onnx")
