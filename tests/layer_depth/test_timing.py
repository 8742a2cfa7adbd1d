"""What is timed and where; a user's own network too, and once on each machine."""

from dataclasses import replace

import pytest
import torch

from featurepipe.layer_depth import measure as module
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import Timing, least_disturbed, network_to_time

CODE = """
import torch
from torch import nn
from featurepipe.backbones import Preprocessing

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        {own}

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def make():
    network = Scaled()
    network.preprocessing = Preprocessing(resize=8, crop=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.no_grad():
        network.fc.weight.fill_(7)
    return network
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Writes a module with a network of one's own; its name."""

    def write(name, *, can_be_drawn_anew):
        own = "" if can_be_drawn_anew else "self.scale = nn.Parameter(torch.ones(1))"
        (tmp_path / f"{name}.py").write_text(CODE.format(own=own))
        monkeypatch.syspath_prepend(tmp_path)
        return f"{name}:make"

    return write


def test_a_network_of_the_users_own_is_timed_whether_it_can_be_drawn_anew_or_not(network):
    anew = network_to_time(network("drawn_anew", can_be_drawn_anew=True))
    assert anew.is_random
    as_built = network_to_time(network("not_drawn_anew", can_be_drawn_anew=False))
    assert not as_built.is_random
    assert (as_built.module.fc.weight == 7).all()
    measured = Timing("not_drawn_anew:make", ("conv", "bottleneck"), "fp32", "cpu", 4).measure()
    assert 0 <= measured["waited"] < 1
    times = measured["milliseconds"]
    assert list(times) == ["conv", "bottleneck"]
    assert all(0 < time < 1000 for time in times.values())


def test_what_is_timed_where_names_the_times(monkeypatch):
    given = Timing("lenet5", ("c1", "f6"), "fp32", "cpu", 4)
    assert given.key == Timing("lenet5", ("c1", "f6"), "fp32", "cpu", 4).key
    others = [
        replace(given, backbone="resnet18"), replace(given, nodes=("c1",)), replace(given, precision="bf16"),
        replace(given, batch=8),
    ]  # fmt: skip
    keys = {given.key, *(other.key for other in others)}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        keys.add(given.key)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(module, "host", lambda: {"name": "elsewhere"})
    keys.add(given.key)
    assert len(keys) == 7
    assert given.as_dict() == {
        "device": "cpu", "precision": "fp32", "batch": 4, "host": "elsewhere", "processor": "cpu", "threads": threads,
    }  # fmt: skip


def test_the_least_disturbed_times_are_kept_and_tried_again_after_an_hour(tmp_path, monkeypatch):
    waits, clock = iter((0.6, 0.9, 0.3, 0.1)), [1e9]
    monkeypatch.setattr(Timing, "measure", lambda _: {"milliseconds": {"c1": 5.0}, "waited": next(waits)})
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    given = Timing("lenet5", ("c1",), "fp32", "cpu", 4)
    found = []
    for later in (0, 60, 3600, 60, 3600, 60, 3600, 36000):
        clock[0] += later
        found.append(least_disturbed(given, Journal(tmp_path / "journal"))["waited"])  # as another process reads it
    assert found == [0.6, 0.6, 0.6, 0.6, 0.3, 0.3, 0.1, 0.1]  # the second try was worse; the last one lasts


@pytest.mark.gpu
def test_on_cuda_the_device_is_named_and_timed():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    given = Timing("lenet5", ("c1", "f6"), "fp32", "cuda", 64)
    assert given.as_dict()["processor"] == torch.cuda.get_device_name("cuda")
    assert given.key != replace(given, device="cpu").key
    assert all(0 < time < 100 for time in given.measure()["milliseconds"].values())
