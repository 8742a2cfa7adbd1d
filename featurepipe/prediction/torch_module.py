"""Network, pooling and linear head as one PyTorch module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from featurepipe.backbones import Backbone, Column
from featurepipe.backbones.engine import HookedNetwork
from featurepipe.backbones.nodes import freeze, frozen_copy
from featurepipe.backbones.pooling import pool
from featurepipe.errors import UsageError
from featurepipe.heads.families import families_for
from featurepipe.heads.linear.linear_map import linear_map
from featurepipe.prediction.ready import ReadyBundle


class TorchClassifier(nn.Module):
    """Maps images to the logits of a linear head.

    The input is a batch (N, C, h, w) of images that are resized and cropped as the network's weights want it
    (``backbone.preprocessing.resize_crop``, or the resizing of ``weights.transforms()``): uint8, which is normalised here, or
    floats, which are taken to be normalised already. The output is float32 (N, K), in the order of ``classes``: the head's
    decision values; ``softmax(logits / temperature)`` are the bundle's probabilities. Of a bundle that predicts a number it is
    that number, (N, 1), without classes.

    Everything is float32 whatever the bundle's precision; where its features are stored as float16, they are rounded here
    as well. Brought to another dtype (``.to(torch.bfloat16)``, ``.half()``), the network computes in it, while normalisation,
    pooling and head stay in float32 (float64 after ``.double()``), the head with rounded weights. The network is frozen and
    stays in eval mode under ``.train()``; the head's weights may be trained.

    Attributes:
        classes: Class names; none where a number is predicted.
        temperature: What the bundle divides logits by before the softmax.
        network: From images to the activations of the nodes.
        head: The linear layer, with scaling and PCA folded in.
    """

    factor: Tensor
    offset: Tensor

    def __init__(
        self,
        backbone: Backbone,
        columns: Sequence[Column],
        weight: np.ndarray,
        bias: np.ndarray,
        *,
        classes: Sequence[str],
        temperature: float = 1.0,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.classes, self.temperature = list(classes), temperature
        nodes = list(dict.fromkeys(column.node for column in columns))
        graph = backbone.graph(nodes)
        self.network = HookedNetwork(frozen_copy(backbone.module), nodes) if graph is None else frozen_copy(graph)
        self._columns = [(column.node, column.pooling, backbone.channel_axis(column.node)) for column in columns]
        self._half = half
        preprocessing = backbone.preprocessing
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self.register_buffer("factor", preprocessing.scale / std)
        self.register_buffer("offset", -mean / std)
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight))
            self.head.bias.copy_(torch.from_numpy(bias))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K), or numbers (N, 1), of images (N, C, h, w)."""
        if images.dtype == torch.uint8:
            images = torch.addcmul(self.offset, images.float(), self.factor)
        exact = torch.promote_types(torch.float32, self.head.weight.dtype)
        return nn.functional.linear(
            self.features(images).to(exact), self.head.weight.to(exact), self.head.bias.to(exact)
        )

    @override
    def train(self, mode: bool = True) -> Self:
        """Sets the head's mode; the network, which is frozen, stays in eval mode."""
        super().train(mode)
        freeze(self.network)
        return self

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves everything, but keeps the normalisation's numbers exact: they are no weights, and 8 bits are too few."""
        exact = self.factor, self.offset
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.factor, self.offset = (
            values.to(moved.device) for values, moved in zip(exact, (self.factor, self.offset), strict=True)
        )
        return self

    def _network_dtype(self) -> torch.dtype:
        parameters = (value.dtype for value in self.network.parameters() if value.is_floating_point())
        return next(parameters, torch.float32)

    def features(self, images: Tensor) -> Tensor:
        """The columns side by side, (N, D), of normalised images."""
        if any(
            layer.training for layer in self.network.modules()
        ):  # a copy, or someone's train() on the network itself
            freeze(self.network)
        outputs = self.network(images.to(self._network_dtype()))
        vectors = [pool(outputs[node], pooling, channel_axis=axis).flatten(1) for node, pooling, axis in self._columns]
        features = torch.cat(vectors, dim=1)
        if not self._half:
            return features
        rounded = features.half().float()
        return torch.where(torch.isfinite(rounded), rounded, features)


def torch_classifier(ready: ReadyBundle) -> TorchClassifier:
    """The module of a bundle with a linear head.

    Raises:
        UsageError: The head is not linear; names those that are.
    """
    bundle = ready.bundle
    families = families_for(bundle.target_type)
    family = families.get(bundle.family)
    if family is not None and not family.linear:
        linear = ", ".join(name for name, other in families.items() if other.linear)
        raise UsageError(
            f"a {bundle.family} head is no linear layer, so there is no module of it; linear are: {linear}"
        )
    weight, bias = linear_map(bundle.head)
    return TorchClassifier(
        ready.backbone,
        ready.session.columns,
        weight,
        bias,
        classes=bundle.classes,
        temperature=bundle.temperature or 1.0,
        half=bundle.space["dtype"] == "float16",
    )
