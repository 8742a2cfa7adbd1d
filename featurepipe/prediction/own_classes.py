"""A pretrained network as it is: its own classifier as the head of a bundle, and its own classes as the labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy.special import log_softmax
from torch import nn

from featurepipe.backbones import Backbone, Column, load_backbone
from featurepipe.backbones.engine import NUMERICS, Engine
from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.executor import Executor
from featurepipe.extraction.prepare import precision_on
from featurepipe.features.options import AUTO, Options
from featurepipe.features.session import Session, settle_machine_for
from featurepipe.features.settings import SETTINGS, resolve
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.linear.linear_map import head_of_map
from featurepipe.images import Source
from featurepipe.prediction.options import BundleOptions, PredictOptions
from featurepipe.prediction.shards import Prediction
from featurepipe.store import fingerprint

TOP = 5
"""Classes of each image that are written by default."""
PROBES = 3
"""Images of noise on which the classifier taken out of a network is compared with the network."""
LARGEST_DIFFERENCE = 1e-4
"""By which probabilities on them may differ; logits by ten times that share of their spread."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OwnClassifier:
    """The classifier of a pretrained network: an affine map of its bottleneck, and the classes that the weights were trained on.

    Attributes:
        backbone: the network.
        column: its bottleneck.
        classes: K names, no two the same.
        weight: (K, D).
        bias: (K,).
    """

    backbone: Backbone
    column: Column
    classes: tuple[str, ...]
    weight: Floats
    bias: Floats

    @classmethod
    def of(cls, name: str, options: PredictOptions) -> OwnClassifier:
        """Loads a network, and takes its classifier out of it.

        Raises:
            UsageError: the network or its weights are unknown, nothing tells the names of its classes, or its output is no affine
                map of its bottleneck.
            WeightsNotFound: the weights are not at hand.
        """
        return cls.of_network(load_backbone(name, str(options.weights or "DEFAULT")))

    @classmethod
    def of_network(cls, backbone: Backbone) -> OwnClassifier:
        """Takes the classifier out of a network; raises as `of` does."""
        classes = told_apart(backbone.classes)
        if not classes:
            raise UsageError(
                Message(
                    f"{backbone.name} with the weights {backbone.weights} has no class names of its own: only pretrained weights "
                    "of torchvision, timm and the packaged networks bring them. Choose such weights with ",
                    Option("weights", "NAME"),
                    ", or train a head on your labels: featurepipe train",
                ),
                option="backbone",
            )
        (column,) = backbone.columns(["bottleneck"])
        return cls(backbone, column, classes, *classifier_of(backbone, column, len(classes)))

    def bundle(self, fields: Mapping[str, Any]) -> Bundle:
        """The bundle that predicts the network's classes from features of the feature space of these fields."""
        backbone = self.backbone
        return Bundle(
            backbone={
                "name": backbone.name,
                "weights": backbone.weights,
                "seed": 0,
                "description": backbone.description(),
            },
            space=dict(fields),
            fingerprint=fingerprint(fields),
            columns=(str(self.column),),
            family="logistic",
            params={},
            head=head_of_map("multiclass", self.classes, self.weight, self.bias),
            classes=self.classes,
            temperature=None,
            metrics={},
            training={},
            seen=np.empty(0, np.uint64),
        )

    def prediction(
        self,
        executor: Executor,
        source: Source,
        listing: pa.Table,
        options: PredictOptions,
        say: Callable[[str], None],
    ) -> Prediction:
        """A prediction of the images of a source, with settings resolved as `extract` resolves them for an empty store."""
        machine = settle_machine_for(executor, options)
        asked = Options(backbone=self.backbone.name, weights=self.backbone.weights, workers=options.workers)
        session = Session.of(self.backbone, (self.column,), machine, asked)
        settings = resolve(dict.fromkeys(SETTINGS, AUTO), (), precision_on(executor, session, source, listing))
        say(f"precision {settings.precision}: {settings.why['precision']}")
        fields = {**self.backbone.identity(), **settings.fields(), "numerics": NUMERICS}
        return Prediction.of(executor, self.bundle(fields), BundleOptions.of(options), loaded=self.backbone)


def told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes; those that occur more than once get the number of their output.

    Example:
        >>> told_apart(["crane", "daisy", "crane"])
        ('crane (0)', 'daisy', 'crane (2)')
    """
    counts = Counter(names)
    return tuple(f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(names))


def classifier_of(backbone: Backbone, column: Column, classes: int) -> tuple[Floats, Floats]:
    """Finds the affine map from a network's bottleneck to its output.

    It is a Linear layer or a 1 x 1 convolution (exact where nothing but pooling follows), the last one that gives the network's
    own probabilities and logits on images of noise.

    Returns:
        weight (K, D) and bias (K,).

    Raises:
        UsageError: There is none; SqueezeNet, for example, has a ReLU between its last convolution and the pooling.
    """
    width = int(np.prod(backbone.feature_shape(column)))
    noise = torch.randint(
        0, 256, (PROBES, *backbone.preprocessing.input_shape), generator=torch.Generator().manual_seed(0)
    ).to(torch.uint8)
    with torch.inference_mode():
        given = backbone.module(backbone.preprocessing.normalise(noise))
    if isinstance(given, torch.Tensor) and given.shape == (PROBES, classes):
        logits = given.double().numpy()
        features = Engine(backbone, [column])(noise)[str(column)].astype(np.float64)
        for layer in reversed(list(backbone.module.modules())):
            found = _affine(layer)
            if found is None or found[0].shape != (classes, width):
                continue
            if _agree(features @ found[0].T + found[1], logits):
                return found
    raise UsageError(
        Message(
            f"{backbone.name} cannot be used as it is: its output is no linear layer of its bottleneck {backbone.bottleneck} "
            f"with {classes} classes (such as SqueezeNet's, where a ReLU follows the last convolution). Choose another with ",
            Option("backbone", "NAME"),
            ", or train a head: featurepipe train",
        ),
        option="backbone",
    )


def _affine(layer: nn.Module) -> tuple[Floats, Floats] | None:
    """The weight (K, D) and bias (K,) of a Linear layer or an ungrouped 1 x 1 convolution."""
    is_pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    if not (isinstance(layer, nn.Linear) or is_pointwise):
        return None
    parameters: Any = layer
    weight = parameters.weight.detach().double().flatten(1).numpy()
    bias = np.zeros(len(weight)) if parameters.bias is None else parameters.bias.detach().double().numpy()
    return weight, bias


def _agree(found: Floats, expected: Floats) -> bool:
    """Whether logits (n, K) give the same probabilities, and are the same but for a constant of each image."""
    ours, theirs = log_softmax(found, axis=1), log_softmax(expected, axis=1)
    spread = float(np.ptp(theirs, axis=1).max())
    return bool(
        np.abs(np.exp(ours) - np.exp(theirs)).max() <= LARGEST_DIFFERENCE
        and np.abs(ours - theirs).max() <= 10 * LARGEST_DIFFERENCE * spread
    )
