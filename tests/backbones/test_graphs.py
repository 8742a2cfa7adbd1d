"""Whether a forward runs as it is or as a CUDA graph; where there is no CUDA device, stand-ins for graph and clock."""

from __future__ import annotations

import pytest
import torch

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import BATCH_TOLERANCE, Engine, worst_cosine
from featurepipe.backbones.graphs import MeasuredForward


def eager(batch):
    return {"a:gap": batch.float().mean((2, 3)) + 1}


def agree(expected, found):
    return all(1 - worst_cosine(expected[name].numpy(), found[name].numpy()) <= 1e-5 for name in expected)


def images(count, seed=0):
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Recorded:
    """A forward that remembers the sizes of its batches."""

    def __init__(self, forward):
        self.forward, self.sizes = forward, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        return self.forward(batch)


def measured(graph, milliseconds, starting=0.9):
    """Stand-ins: a capture that gives ``graph``, and a clock that says what each forward takes."""
    eagerly = Recorded(eager)
    forward = MeasuredForward(
        eagerly,
        4,
        agree,
        capture=lambda _forward, _batch: graph,
        seconds=lambda forward, _: milliseconds["eager" if forward is eagerly else "graph"] / 1000,
        starting=lambda *_: (starting, 1.0),
    )
    return forward, eagerly


def test_the_faster_one_is_kept_and_others_than_full_batches_run_as_they_are():
    graph = Recorded(eager)
    forward, eagerly = measured(graph, {"eager": 2.0, "graph": 1.5})
    assert forward.choice is None
    forward(images(3))
    assert (forward.choice, graph.sizes) == (None, [])
    found = forward(images(4, seed=1))
    assert forward.choice == "CUDA graph: 2.00 ms a batch of 4 eagerly, 1.50 as a CUDA graph"
    torch.testing.assert_close(found, eager(images(4, seed=1)))
    before = len(eagerly.sizes), len(graph.sizes)
    forward(images(4)), forward(images(2)), forward(images(4))
    assert (len(eagerly.sizes) - before[0], len(graph.sizes) - before[1]) == (1, 2)


def test_a_graph_that_gains_next_to_nothing_is_not_kept():
    graph = Recorded(eager)
    forward, _ = measured(graph, {"eager": 2.0, "graph": 1.96})
    forward(images(4))
    checked = len(graph.sizes)
    forward(images(4))
    assert forward.choice == "eager: 2.00 ms a batch of 4 eagerly, 1.96 as a CUDA graph"
    assert len(graph.sizes) == checked == 2


def test_no_graph_is_made_where_the_device_has_work_waiting_anyway():
    graph = Recorded(eager)
    forward, eagerly = measured(graph, {"eager": 2.0, "graph": 0.1}, starting=0.4)
    torch.testing.assert_close(forward(images(4)), eager(images(4)))
    assert forward.choice == "eager: 400.00 of 1000.00 ms a batch of 4 go into starting it"
    forward(images(4))
    assert (len(eagerly.sizes), graph.sizes) == (3, [])


@pytest.mark.parametrize("stale", [True, False])
def test_a_graph_that_gives_other_features_is_not_kept_however_fast(stale):
    kept = eager(images(4))
    graph = (
        (lambda _: kept) if stale else (lambda batch: {"a:gap": eager(batch)["a:gap"] * torch.tensor([1.0, 1.1, 1.0])})
    )
    forward, _ = measured(graph, {"eager": 2.0, "graph": 0.1})
    torch.testing.assert_close(forward(images(4)), kept)
    assert forward.choice == "eager, as a CUDA graph gave other features"


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen stream is capturing"), torch.OutOfMemoryError()]
)
def test_where_no_graph_can_be_made_the_forward_runs_as_it_is_and_that_is_said(error):
    def capture(_forward, _batch):
        raise error

    forward = MeasuredForward(eager, 4, agree, capture=capture, starting=lambda *_: (1.0, 1.0))
    torch.testing.assert_close(forward(images(4)), eager(images(4)))
    why = "operation not permitted" if type(error) is RuntimeError else "OutOfMemoryError"
    assert forward.choice == f"eager, as no CUDA graph could be made: {why}"


def test_an_engine_uses_the_choice_and_its_runtime_says_it():
    """The engine of a CPU, with what one on CUDA has."""
    backbone = load_backbone("lenet5", "none")
    engine = Engine(backbone, backbone.columns([]), batch_size=4)
    batch = torch.randint(0, 256, (4, *backbone.preprocessing.input_shape), dtype=torch.uint8)
    expected = engine(batch)
    assert "forward" not in engine.runtime
    graph = Recorded(engine._eager)
    engine._measured = MeasuredForward(
        engine._eager,
        4,
        engine._agree,
        capture=lambda *_: graph,
        seconds=lambda forward, _: 1.0 - (forward is graph),
        starting=lambda *_: (1.0, 1.0),
    )
    engine.submit(batch).result()
    found = engine.submit(batch).result()
    assert graph.sizes == [4, 4, 4, 4]  # two to compare, then each batch
    assert engine.runtime["forward"].startswith("CUDA graph: 1000.00 ms a batch of 4 eagerly, 0.00")
    assert all(worst_cosine(expected[name], found[name]) > 1 - 1e-6 for name in expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_cuda_a_graph_gives_the_features_of_the_forward_and_batches_in_flight_stay_apart(precision, monkeypatch):
    from featurepipe.backbones import graphs

    monkeypatch.setattr(graphs, "GAIN", -1e9)  # whichever is faster: the graph is kept
    monkeypatch.setattr(graphs, "STARTING", 0)
    backbone = load_backbone("resnet18", "none")
    columns = backbone.columns(["layer2", "bottleneck"])
    plain = Engine(backbone, columns, precision=precision, device="cuda", batch_size=8, graphs=False)
    graphed = Engine(backbone, columns, precision=precision, device="cuda", batch_size=8)
    shape = backbone.preprocessing.input_shape
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator) for size in (8, 8, 8, 3, 8)
    ]
    pending = [graphed.submit(batch) for batch in batches]
    assert graphed.runtime["forward"].startswith("CUDA graph: ")
    for batch, waiting in zip(batches, pending, strict=True):
        expected, found = plain(batch), waiting.result()
        assert all(1 - worst_cosine(expected[name], found[name]) <= BATCH_TOLERANCE[precision] for name in expected)
