"""Times of a network that stops at a node: what is run, how turns are taken, how a time is made of it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featurepipe.backbones import engine as timing
from featurepipe.backbones import load_backbone, node_times
from featurepipe.backbones.engine import Engine, NodeTimes
from featurepipe.errors import UsageError


def test_stopping_early_takes_less_than_the_whole_network() -> None:
    backbone = load_backbone("resnet18", "none")
    times = node_times(backbone, ["maxpool", "bottleneck"], batch=2, seconds=0).milliseconds
    assert list(times) == ["maxpool", "bottleneck"]
    assert 0 < 2 * times["maxpool"] < times["bottleneck"]  # 7 % of the operations against all


def test_the_pruned_network_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []
    submitted: list[tuple[int, torch.dtype, tuple[int, ...]]] = []

    class Watched(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

        def submit(self, batch: torch.Tensor) -> Any:
            submitted.append((made.index(self), batch.dtype, tuple(batch.shape)))
            return super().submit(batch)

    monkeypatch.setattr(timing, "Engine", Watched)
    nodes = ["s2", "s4:avg3x3", "bottleneck"]
    times = node_times(load_backbone("lenet5", "none"), nodes, precision="bf16", batch=3, seconds=0.05).milliseconds
    assert list(times) == nodes
    assert [[str(column) for column in engine.columns] for engine in made] == [["s2:gap"], ["s4:avg3x3"], ["f6.1:gap"]]
    assert {(engine.precision, engine.largest_batch) for engine in made} == {("bf16", 3)}
    layers = [{name.split(".")[0] for name, _ in engine._network.named_modules()} for engine in made]
    assert [{"c1", "c3", "c5", "f6", "output"} & names for names in layers] == [
        {"c1"},
        {"c1", "c3"},
        {"c1", "c3", "c5", "f6"},
    ]
    assert {(dtype, shape) for _, dtype, shape in submitted} == {(torch.uint8, (3, 1, 32, 32))}
    turns = [engine for engine, _ in itertools.groupby(submitted, key=lambda call: call[0])]
    assert turns == [0, 1, 2] * (len(turns) // 3)
    assert len(turns) // 3 > timing.LEAST_ROUNDS


class FakeEngine:
    """Two streams; the seconds that its rounds take are given, the first round's being the warm-up."""

    seconds: dict[str, list[float]]
    clock = 0.0
    batches = 0
    log: list[str]

    def __init__(
        self, backbone: Any, columns: Any, *, precision: str, device: str, batch_size: int, graphs: bool
    ) -> None:
        assert not graphs  # a graph of each node would take memory, and the time to choose
        self.backbone, self.streams, self.device = backbone, 2, torch.device(device)
        self.node = columns[0].node
        self.log.append(f"made {self.node}")
        self._rounds = iter(self.seconds[self.node])

    def submit(self, batch: torch.Tensor) -> SimpleNamespace:
        FakeEngine.batches += 1
        if FakeEngine.batches % self.in_a_row(self.device) == 1:
            FakeEngine.clock += next(self._rounds)
            self.log.append(self.node)
        return SimpleNamespace(result=lambda: None)

    @staticmethod
    def in_a_row(device: torch.device) -> int:
        return 2 if device.type == "cpu" else 4


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    FakeEngine.clock, FakeEngine.batches, FakeEngine.log = 0.0, 0, []
    monkeypatch.setattr(timing, "Engine", FakeEngine)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: FakeEngine.clock))
    return FakeEngine


@pytest.mark.parametrize(("device", "in_a_row"), [("cpu", 2), ("cuda", 4)])
def test_the_median_of_rounds_per_image_without_the_warm_up(fake: type[FakeEngine], device: str, in_a_row: int) -> None:
    fake.seconds = {"s2": [9, 0.1, 5, 0.2], "s4": [9, 0.3, 0.6, 0.4]}
    times = node_times(load_backbone("lenet5", "none"), ["s2", "s4"], batch=5, seconds=3, device=device).milliseconds
    images = in_a_row * 5
    assert times == {"s2": pytest.approx(200 / images), "s4": pytest.approx(400 / images)}
    assert fake.log == ["made s2", "made s4", *["s2", "s4"] * 4]  # three rounds took 6.6 s, more than 2 * 3 s


def test_rounds_go_on_for_the_time_given(fake: type[FakeEngine]) -> None:
    fake.seconds = {"s2": [9, *[0.25] * 50]}
    times = node_times(load_backbone("lenet5", "none"), ["s2"], batch=1, seconds=2).milliseconds
    assert times == {"s2": 125}
    assert fake.log.count("s2") == 1 + 2 / 0.25


def test_copies_of_a_large_network_do_not_fill_the_memory(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.seconds = dict.fromkeys(["s2", "s4", "c5.1"], [1.0] * 5)
    monkeypatch.setattr(timing, "MOST_BYTES", 3 * 4 * 61_706 - 1)  # not quite three copies
    node_times(load_backbone("lenet5", "none"), ["s2", "s4", "c5.1"], seconds=0)
    assert fake.log == ["made s2", "made s4", *["s2", "s4"] * 4, "made c5.1", *["c5.1"] * 4]


def test_waiting_for_a_core_is_noticed(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    fake.seconds = {"s2": [1.0] * 5}
    clocks = iter([(10.0, 1.0), (13.0, 2.0)])
    monkeypatch.setattr(timing, "_computed_and_waited", lambda: next(clocks))
    assert node_times(load_backbone("lenet5", "none"), ["s2"], seconds=0).waited == pytest.approx(1 / 4)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_two_threads_on_one_core_wait_half_of_the_time() -> None:
    import os
    import subprocess
    import sys

    core = {min(os.sched_getaffinity(0))}
    spin = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    own = os.sched_getaffinity(0)
    try:
        for process in others:
            os.sched_setaffinity(process.pid, core)
        os.sched_setaffinity(0, core)
        before, start, used = timing._computed_and_waited(), time.monotonic(), time.process_time()
        while time.process_time() < used + 0.4 and time.monotonic() < start + 25:
            pass
        after, wall = timing._computed_and_waited(), time.monotonic() - start
    finally:
        os.sched_setaffinity(0, own)
        for process in others:
            process.kill()
            process.wait()
    computed, waited = after[0] - before[0], after[1] - before[1]
    assert computed > 0.05
    assert waited / (computed + waited) > 0.3
    assert 0.8 * wall < computed + waited < 2 * wall + 1


def test_wrong_arguments_are_named() -> None:
    backbone = load_backbone("lenet5", "none")
    with pytest.raises(UsageError, match="unknown node 's5' in lenet5; nearest: s"):
        node_times(backbone, ["s2", "s5"])
    with pytest.raises(UsageError, match="unknown precision 'fp8'; nearest: fp"):
        node_times(backbone, ["s2"], precision="fp8")
    with pytest.raises(UsageError, match="batch 0 must be a number from 1"):
        node_times(backbone, ["s2"], batch=0)
    assert node_times(backbone, []) == NodeTimes({}, 0.0)
