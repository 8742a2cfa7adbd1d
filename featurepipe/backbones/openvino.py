"""A frozen network converted to OpenVINO, which runs many networks faster on a CPU than PyTorch does."""

from __future__ import annotations

import platform
import queue
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from featurepipe.backbones import conversions
from featurepipe.backbones.fusion import fold_batch_norm
from featurepipe.backbones.nodes import frozen_copy
from featurepipe.records import versions

if TYPE_CHECKING:
    from featurepipe.backbones.loading import Backbone
    from featurepipe.backbones.preprocessing import Preprocessing

TOLERANCE = 1e-5
"""Largest distance of fp32 features from those of PyTorch, as a share of their length, image by image."""
_CHECKED = 3  # images on which both are compared; another number than the batch that is traced
_MOST_IMAGES = 65_536  # of a batch, as the trace is told
_FIRST_BATCH = threading.Lock()


class NotConvertedError(Exception):
    """The network cannot be converted, or gives other features then; says why."""


def network_of(backbone: Backbone, nodes: Sequence[str], streams: int) -> OpenVinoNetwork:
    """A network converted to OpenVINO, as it was kept by an earlier run where that can be, else converted, compared and kept.

    What is kept follows from the network's identity, the nodes, the versions of all packages that could matter, and the kind of
    processor. A network of the user's own code is converted each time: what its code imports is not part of its identity.

    Args:
        backbone: The network.
        nodes: Of the activations.
        streams: Batches at once.

    Raises:
        NotConvertedError: It cannot be traced or converted, or its activations differ by more than `TOLERANCE`.
        UsageError: A node is unknown.
    """
    name = _name_of(backbone, nodes)
    found = None if name is None else conversions.find(name)
    if name is not None and found is not None:
        try:
            return OpenVinoNetwork(_core().read_model(found.model), nodes, found.facts["axes"], streams)
        except (RuntimeError, NotConvertedError, KeyError):  # written as it should be, and of no use here
            conversions.forget(name)
    graph = backbone.graph(nodes)
    if graph is None:
        raise NotConvertedError("the network cannot be traced")
    graph = frozen_copy(graph)
    fold_batch_norm(graph)
    whole = _Normalised(graph, backbone.preprocessing).eval()
    model = _converted(whole, backbone.preprocessing.input_shape)
    axes = {node: backbone.channel_axis(node) for node in nodes}
    with conversions.draft() if name is not None else nullcontext() as folder:
        if folder is not None:
            model = _written(model, folder) or model
        network = OpenVinoNetwork(model, nodes, axes, streams)
        network.check(whole, backbone.preprocessing.input_shape)
        if folder is not None and name is not None:
            conversions.keep(folder, name, {"axes": axes})
    return network


def _name_of(backbone: Backbone, nodes: Sequence[str]) -> str | None:
    """What a conversion is kept by; None for one that is not."""
    identity = backbone.identity()
    if "source_sha256" in identity:
        return None
    return conversions.name_of(
        {
            "identity": identity,
            "nodes": list(nodes),
            "versions": {**versions(), "openvino": version("openvino")},
            "processor": [platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability()],
        }
    )


class OpenVinoNetwork:
    """A network in OpenVINO: uint8 images in, activations of some nodes out, in one pass. Made by `network_of`.

    Normalisation is part of it. Each of ``streams`` threads may run a batch of any size at the same time, each on one core.
    Activations are float32.

    Args:
        model: OpenVINO's, for batches of any size.
        nodes: of the activations, in the order of the model's outputs.
        axes: of the channels of each node's activations, with the batch as axis 0.
        streams: batches at once.

    Raises:
        NotConvertedError: OpenVINO cannot compile it.
    """

    def __init__(self, model: Any, nodes: Sequence[str], axes: Mapping[str, int], streams: int) -> None:
        self.nodes = tuple(nodes)
        self.axes = {node: int(axes[node]) for node in self.nodes}
        self._model = _compiled(model, streams)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(self._model.create_infer_request())
        self._warm_up()

    def _warm_up(self) -> None:
        """Runs an image, one thread of the process at a time.

        At a process's first batch, OpenVINO's Python part sets up what its threads share, under a lock of C++ in which Python
        code runs. A second thread that begins then waits for that lock with Python's own lock in hand: both wait for good.
        """
        shape = [size.get_length() for size in list(self._model.input(0).get_partial_shape())[1:]]
        with _FIRST_BATCH, _refused(), self.activations(torch.zeros((1, *shape), dtype=torch.uint8)):
            pass

    @contextmanager
    def activations(self, batch: torch.Tensor) -> Iterator[Mapping[str, torch.Tensor]]:
        """Activations (N, ...) of a uint8 batch (N, C, H, W) by node, which the next batch overwrites."""
        request = self._requests.get()
        try:
            found = request.infer([batch.contiguous().numpy()], share_inputs=True, share_outputs=True)
            values = (torch.from_numpy(found[place]) for place in range(len(self.nodes)))
            yield dict(zip(self.nodes, values, strict=True))
        finally:
            self._requests.put(request)

    def check(self, whole: nn.Module, shape: tuple[int, int, int]) -> None:
        """Compares a few images with PyTorch, in batches of two sizes.

        Raises:
            NotConvertedError: they differ.
        """
        images = torch.randint(
            0, 256, (_CHECKED, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        with torch.inference_mode():
            expected = dict(zip(self.nodes, whole(images), strict=True))
        for batch, rows in ((images, slice(None)), (images[:1], slice(0, 1))):
            with self.activations(batch) as found:
                for node, values in found.items():
                    distance = _distance(expected[node][rows], values)
                    if not distance <= TOLERANCE:
                        raise NotConvertedError(f"its activations at {node} differ from PyTorch's by {distance:.1g}")


class _Normalised(nn.Module):
    """A graph from uint8 images, with its activations as a tuple."""

    def __init__(self, network: fx.GraphModule, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.factor, self.offset = (values.clone() for values in preprocessing.affine())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network(torch.addcmul(self.offset, images.to(torch.float32), self.factor)).values())


def _converted(whole: nn.Module, shape: tuple[int, int, int]) -> Any:
    """The network as a model of OpenVINO, for batches of any size."""
    openvino = _openvino()
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    with _refused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's and OpenVINO's own code
        exported = torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))
        model = openvino.convert_model(exported)
        model.reshape(openvino.PartialShape([-1, *shape]))
        return model


def _written(model: Any, folder: Path) -> Any:
    """The model as a next run will read it, so that both compute the same bits; None if it cannot be written."""
    try:
        _openvino().save_model(model, folder / "network.xml", compress_to_fp16=False)
        return _core().read_model(folder / "network.xml")
    except (RuntimeError, OSError):  # such as a full disk
        return None


def _openvino() -> Any:
    """The package, without its messages to its makers.

    Imported or converting, it sends them what it does and with which versions, from a forked process, unless the module that
    sends is missing; nobody has asked the user. What a program has imported before stays as the program wants it.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it fails then
    import openvino  # type: ignore[import-untyped]

    return openvino


def _core() -> Any:
    core = _openvino().Core()
    core.set_property({"ENABLE_MMAP": False})  # a file that is mapped cannot be removed everywhere
    return core


def _compiled(model: Any, streams: int) -> Any:
    with _refused():
        return _core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "f32",
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": streams,
                "ENABLE_CPU_PINNING": False,  # decoding shares the cores
            },
        )


@contextmanager
def _refused() -> Iterator[None]:
    """A block in which any error means that the network cannot be converted."""
    try:
        yield
    except Exception as error:  # whatever PyTorch's exporter and OpenVINO raise at operations that they do not know
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NotConvertedError(f"OpenVINO cannot convert it ({reason[:200]})") from error


def _distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest distance of an image's values, as a share of their length; NaN and infinities agree with themselves alone."""
    a, b = (values.flatten(1).to(torch.float64).numpy() for values in (expected, found))
    if a.shape != b.shape:
        return float("inf")
    odd = ~np.isfinite(a)
    if not np.array_equal(a[odd], b[odd], equal_nan=True):
        return float("inf")
    a, b = np.where(odd, 0.0, a), np.where(odd, 0.0, b)
    lengths = np.linalg.norm(a, axis=1)
    apart = np.linalg.norm(a - b, axis=1)
    return float(np.max(np.where(apart == 0, 0.0, apart / np.maximum(lengths, np.finfo(np.float64).tiny)), initial=0.0))
