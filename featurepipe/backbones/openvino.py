"""A frozen network converted to OpenVINO, which runs many networks faster on a CPU than PyTorch does."""

from __future__ import annotations

import queue
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

if TYPE_CHECKING:
    from featurepipe.backbones.preprocessing import Preprocessing

TOLERANCE = 1e-5
"""Largest distance of fp32 features from those of PyTorch, as a share of their length, image by image."""
_CHECKED = 3  # images on which both are compared; another number than the batch that is traced
_MOST_IMAGES = 65_536  # of a batch, as the trace is told


class NotConvertedError(Exception):
    """The network cannot be converted, or gives other features then; says why."""


class OpenVinoNetwork:
    """A traced network in OpenVINO: uint8 images in, activations of some nodes out, in one pass.

    Normalisation is part of it. Each of ``streams`` threads may run a batch of any size at the same time, each on one core.
    Activations are float32.

    Args:
        graph: maps images (N, C, H, W) to ``{node: activations}``, float32, on the CPU, as `Backbone.graph` gives it.
        preprocessing: how images are normalised.
        nodes: of the activations, in the order of the graph's outputs.
        streams: batches at once.

    Raises:
        NotConvertedError: the network cannot be converted, or its activations differ by more than `TOLERANCE`.
    """

    def __init__(self, graph: fx.GraphModule, preprocessing: Preprocessing, nodes: Sequence[str], streams: int) -> None:
        self.nodes = tuple(nodes)
        whole = _Normalised(graph, preprocessing).eval()
        self._model = _compiled(whole, preprocessing.input_shape, streams)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(self._model.create_infer_request())
        self._check(whole, preprocessing.input_shape)

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

    def _check(self, whole: nn.Module, shape: tuple[int, int, int]) -> None:
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


def _compiled(whole: nn.Module, shape: tuple[int, int, int], streams: int) -> Any:
    """The network compiled by OpenVINO for batches of any size."""
    import openvino  # type: ignore[import-untyped]

    example = torch.zeros((2, *shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's and OpenVINO's own code
            exported = torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))
            model = openvino.convert_model(exported)
            model.reshape(openvino.PartialShape([-1, *shape]))
            return openvino.Core().compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": "f32",
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": streams,
                    "ENABLE_CPU_PINNING": False,  # decoding shares the cores
                },
            )
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
