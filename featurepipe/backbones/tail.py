"""Layers of a network that can be trained, above a node, from stored activations, or all, from images; and a head on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featurepipe.backbones import fusion, nodes
from featurepipe.backbones.engine import DTYPES
from featurepipe.backbones.pooling import Column, pool
from featurepipe.backbones.weights import LIKE
from featurepipe.errors import Message, Option, UsageError

if TYPE_CHECKING:
    from featurepipe.backbones.loading import Backbone


State = dict[str, Tensor]


class TunedLayers(nn.Module):
    """Layers of a network up to its bottleneck, with weights of their own that take gradients.

    Attributes:
        node: Where they begin.
        bottleneck: The column that comes out, ``node:pooling``.
        width: Values of one feature vector that comes out.
        input_shape: Of what goes in for one image.
        network: The layers; parameters have the names that they have in the backbone.
    """

    node: str
    bottleneck: str
    width: int
    input_shape: tuple[int, ...]
    network: nn.Module
    _folded: tuple[nn.Module] | None = None

    def blocks(self) -> dict[str, list[str]]:
        """Names of the trainable parameters by block, from the lowest to the highest: what learns at one rate."""
        found: dict[str, list[str]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                found.setdefault(block_of(name), []).append(name)
        return found

    def statistics(self) -> dict[str, Tensor]:
        """What BatchNorm learns beside its parameters, by name; nothing where it keeps its statistics."""
        return {}

    @contextmanager
    def learning(self, draw: tuple[int, ...]) -> Iterator[None]:  # noqa: ARG002 - of subclasses
        """While the block runs, a step is made; ``draw`` is what random changes, as those of dropout, follow from."""
        yield

    def save(self, backbone: Backbone, path: Path) -> None:
        """Writes all weights of the network, with the tuned ones in place, as a .safetensors file."""
        from safetensors.torch import save_file

        state = {name: value.clone() for name, value in backbone.state().items()}
        learned = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        for name, value in {**learned, **self.statistics()}.items():
            state[name] = value.detach().cpu().to(state.get(name, value).dtype)
        metadata = {} if backbone.like is None else {LIKE: backbone.like}
        save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)

    def folded(self) -> nn.Module:
        """The layers with frozen BatchNorm folded into convolutions over the same parameters; as they are, if not traced."""
        if self._folded is None:  # in a tuple, so that no parameter has a second name
            network = self.network
            self._folded = (fusion.with_folded_norms(network) if isinstance(network, fx.GraphModule) else network,)
        return self._folded[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._folded = None  # its statistics are tensors that stay where they were
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


class Tail(TunedLayers):
    """Maps stored activations of a node to features of the bottleneck.

    The weights are a copy of the network's, under its names, and take gradients; BatchNorm keeps its statistics and dropout
    is off, as in the frozen network, so that at the start the features are the network's own.

    Attributes:
        node: The node whose activations go in.
        column: The column that holds them, ``node:map`` or ``node:flatten``.
        dtype: Of weights and activations.

    Args:
        backbone: The network.
        node: Where to cut it.

    Raises:
        UsageError: It is several networks side by side; the node is unknown; the network cannot be traced, or cut there since
            something beside the node leads from below to above it; or no weights lie above it. Names nodes where it can be cut.
    """

    def __init__(self, backbone: Backbone, node: str) -> None:
        super().__init__()
        refuse_joined(backbone)
        info = backbone.node(backbone.bottleneck if node == "bottleneck" else node)
        self.node = info.name
        is_map = len(info.shape) == 3
        self.column = f"{node}:{'map' if is_map else 'flatten'}"
        self._shape, self._axis = tuple(info.shape), info.channel_axis if is_map else None
        self.input_shape = (math.prod(self._shape),)
        (found,) = backbone.columns([])
        self.bottleneck = str(found)
        self._out, self._pooling, self._out_axis = found.node, found.pooling, backbone.channel_axis(found.node)
        (self.width,) = backbone.feature_shape(found)
        self.dtype = torch.float32
        self.network = trainable(_cut(backbone, self.node, found.node, asked=node))
        if is_map:
            self.network.to(memory_format=torch.channels_last)  # convolutions on a CPU take 0.7 of the time so
        if not any(True for _ in self.network.parameters()):
            raise UsageError(
                Message(
                    Option("from_node", node), f" leaves no weights to tune above it; {_choices(backbone, found.node)}"
                )
            )

    def forward(self, stored: Tensor) -> Tensor:
        """Features (N, D), float32, of activations (N, C * H * W) as the store has them."""
        outputs = self.folded()(self.activations(stored).to(self.dtype))
        return pool(outputs, self._pooling, channel_axis=self._out_axis).flatten(1)

    def activations(self, stored: Tensor) -> Tensor:
        """What the node gave the network, of activations (N, C * H * W) as the store has them."""
        if self._axis is None:
            return stored.reshape(len(stored), *self._shape)
        channels_first = list(self._shape)  # so the store has them, however the network orders its axes
        channels_first.insert(0, channels_first.pop(self._axis - 1))
        found = stored.reshape(len(stored), *channels_first).movedim(1, self._axis)
        return found.contiguous(memory_format=torch.channels_last) if self._axis == 1 else found

    def as_engine(self, precision: str) -> Tail:
        """Returns a frozen copy that computes as an `Engine` of a precision does: BatchNorm folded, weights of that dtype."""
        copied = nodes.frozen_copy(self)
        if isinstance(copied.network, fx.GraphModule):
            fusion.fold_batch_norm(copied.network)
        copied.dtype = DTYPES[precision]
        return copied.to(dtype=copied.dtype)


class TailEngine:
    """Computes columns of a network from stored activations of a node, as an `Engine` of a precision does from images.

    Args:
        backbone: The network.
        node: Whose activations go in.
        columns: Of nodes above it, or of itself.
        precision: As for `Engine`.

    Raises:
        UsageError: The network cannot be cut there, or a column takes more from below than the activations.
    """

    def __init__(self, backbone: Backbone, node: str, columns: Sequence[Column], precision: str) -> None:
        self._tail, self._columns, self._dtype = Tail(backbone, node), tuple(columns), DTYPES[precision]
        self._places = {column: backbone.node(column.node).name for column in columns}
        self._axes = {column: backbone.channel_axis(column.node) for column in columns}
        below = [str(column) for column in columns if column not in columns_above(backbone, node, columns)]
        found = nodes.trace(backbone.module)
        graph = (
            None if below or found is None else found.above(self._tail.node, [*dict.fromkeys(self._places.values())])
        )
        if graph is None:
            raise UsageError(f"{', '.join(below)} of {backbone.name} cannot be computed from the activations at {node}")
        network = nodes.frozen_copy(graph)
        fusion.fold_batch_norm(network)
        self._network = network.to(dtype=self._dtype)
        for parameter in network.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, stored: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        """Features (N, D), float32, by column, of activations (N, C * H * W) as the store has them."""
        outputs = self._network(self._tail.activations(stored).to(self._dtype))
        return {
            str(column): pool(outputs[self._places[column]], column.pooling, channel_axis=self._axes[column])
            .flatten(1)
            .numpy()
            for column in self._columns
        }


def columns_above(backbone: Backbone, node: str, columns: Sequence[Column]) -> list[Column]:
    """Those columns that follow from the activations of a node alone, its own among them."""
    found = nodes.trace(backbone.module) if backbone.traceable else None
    if found is None:
        return []
    cut = backbone.node(node).name
    return [column for column in columns if found.above(cut, backbone.node(column.node).name) is not None]


FROZEN, TRAINED = ("frozen", "train")
"""What becomes of BatchNorm's statistics."""


class Trunk(TunedLayers):
    """Maps images to features of the bottleneck: all of a network but its classifier.

    The weights are a copy of the network's, under its names, and take gradients. From pretrained weights dropout is off, and
    BatchNorm keeps its statistics unless they are to be trained; a network with random weights learns as networks do, with
    both. Stochastic depth, which a traced graph does not have, is always off.

    Args:
        backbone: The network.
        statistics: ``frozen`` or ``train``; by default as said.

    Raises:
        UsageError: It is several networks side by side.
    """

    def __init__(self, backbone: Backbone, statistics: str | None = None) -> None:
        super().__init__()
        refuse_joined(backbone)
        (found,) = backbone.columns([])
        self.node, self.bottleneck = "images", str(found)
        self._out, self._pooling, self._out_axis = found.node, found.pooling, backbone.channel_axis(found.node)
        (self.width,) = backbone.feature_shape(found)
        self._preprocessing = backbone.preprocessing
        self.input_shape = self._preprocessing.input_shape
        graph = backbone.graph([found.node])
        self.network = trainable(backbone.module if graph is None else graph)
        self._kept: Tensor | None = None
        if graph is None:
            self.network.get_submodule(found.node).register_forward_hook(self._keep)
        needed = backbone.needed(found.node)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in needed)
        self.network.to(memory_format=torch.channels_last)  # convolutions on a CPU take 0.7 of the time so
        self._is_random = backbone.is_random
        self.batch_norm = statistics or (TRAINED if backbone.is_random else FROZEN)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D) of images as they are loaded, uint8 (N, C, h, w)."""
        inputs = self._preprocessing.normalise(images).contiguous(memory_format=torch.channels_last)
        outputs = (self.folded() if self.batch_norm == FROZEN else self.network)(inputs)
        outputs = outputs[self._out] if self._kept is None else self._kept
        self._kept = None
        return pool(outputs, self._pooling, channel_axis=self._out_axis).flatten(1)

    def statistics(self) -> dict[str, Tensor]:
        """What BatchNorm learns beside its parameters, by name; nothing where it keeps its statistics."""
        if self.batch_norm == FROZEN:
            return {}
        norms = {name: layer for name, layer in self.network.named_modules() if isinstance(layer, _BatchNorm)}
        return {f"{at}.{name}": value for at, layer in norms.items() for name, value in layer.named_buffers()}

    @contextmanager
    def learning(self, draw: tuple[int, ...]) -> Iterator[None]:
        """While the block runs, a step is made: BatchNorm and dropout are as they are asked for."""
        if self.batch_norm == FROZEN and not self._is_random:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0]))
            for layer in self.network.modules():
                layer.training = self.batch_norm == TRAINED if isinstance(layer, _BatchNorm) else self._is_random
            try:
                yield
            finally:
                self.network.eval()

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._kept = output


class Model(nn.Module):
    """A body that makes features (N, D), and a linear head (K, D) on them.

    Args:
        body: What makes features.
        weight: (K, D), of the head.
        bias: (K,).
    """

    def __init__(self, body: TunedLayers, weight: npt.NDArray[Any], bias: npt.NDArray[Any]) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(np.asarray(weight, np.float32)))
            self.head.bias.copy_(torch.from_numpy(np.asarray(bias, np.float32)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores (N, K)."""
        scores: Tensor = self.head(self.body(inputs))
        return scores

    def weights(self) -> State:
        """A copy of all that learns, by name: parameters, and statistics of BatchNorm where they are trained."""
        learns: State = {name: value for name, value in self.named_parameters() if value.requires_grad}
        learns |= {f"body.network.{name}": value for name, value in self.body.statistics().items()}
        return {name: value.detach().clone() for name, value in learns.items()}

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over what `weights` gave."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)


def refuse_joined(backbone: Backbone) -> None:
    """Refuses several networks side by side, which no node lies below and whose images are parts of one canvas.

    Raises:
        UsageError: They are; says what can be done instead.
    """
    if backbone.parts:
        raise UsageError(
            Message(
                f"{backbone.name} is {len(backbone.parts)} networks side by side, which are not tuned together: tune one of "
                "them, with ", Option("backbone", backbone.parts[0]), " and the images as the source, or fit a head on the "
                "features of all (featurepipe train)",
            )
        )  # fmt: skip


def trainable(network: nn.Module) -> nn.Module:
    """Returns a copy in eval mode whose weights take gradients."""
    copied = copy.deepcopy(network)
    copied.eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(True)  # noqa: FBT003
    return copied


def block_of(name: str) -> str:
    """The block of a parameter: its name up to the first number, or without the layer and the parameter itself.

    Example:
        >>> block_of("layer4.1.conv2.weight"), block_of("features.28.bias"), block_of("head.conv.weight")
        ('layer4.1', 'features.28', 'head')
    """
    parts = name.split(".")[:-1]
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if number is not None:
        return ".".join(parts[: number + 1])
    return ".".join(parts[:-1] or parts)


def _cut(backbone: Backbone, node: str, out: str, *, asked: str) -> fx.GraphModule:
    found = nodes.trace(backbone.module) if backbone.traceable else None
    if found is None:
        raise UsageError(
            f"{backbone.name} cannot be traced by torch.fx, so it cannot be cut into a frozen part and a tail; tune it from "
            "the images, or take a backbone of torchvision"
        )
    order = list(found.names.values())
    if order.index(node) >= order.index(out):
        raise UsageError(
            Message(Option("from_node", asked), f" lies at or above the bottleneck {out}; {_choices(backbone, out)}")
        )
    graph = found.above(node, out)
    if graph is None:
        raise UsageError(
            Message(
                f"{backbone.name} cannot be cut at ", Option("from_node", asked), ": what lies above it takes more from below "
                f"than this node, a skip around it for instance; {_choices(backbone, out)}",
            )
        )  # fmt: skip
    return graph


def cuts(backbone: Backbone) -> list[str]:
    """The stages of a network at which it can be cut, from the lowest to the highest; none for one that cannot be traced."""
    found = nodes.trace(backbone.module) if backbone.traceable else None
    if found is None:
        return []
    out = backbone.node(backbone.bottleneck).name
    stages = [name for name in backbone.stages() if name != backbone.bottleneck]
    above = {name: found.above(backbone.node(name).name, out) for name in stages}
    return [name for name, graph in above.items() if graph is not None and any(True for _ in graph.parameters())]


def _choices(backbone: Backbone, out: str) -> str:
    usable = cuts(backbone)
    return f"it can be cut at {', '.join(usable)}" if usable else f"it cannot be cut below {out}"
