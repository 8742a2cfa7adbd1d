"""A pretrained network as it is: its own classifier as the head of a bundle, and its own classes as the labels."""

from __future__ import annotations

import csv
import logging
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from featurepipe.annotations import plain_name, read_csv
from featurepipe.backbones import Backbone, Column, load_backbone
from featurepipe.backbones.engine import NUMERICS, Engine
from featurepipe.display import first_names
from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.execution.executor import Executor
from featurepipe.extraction.prepare import History, held_spaces, precision_on
from featurepipe.features.options import AUTO, Options
from featurepipe.features.session import Session, settle_machine_for
from featurepipe.features.settings import SETTINGS, resolve
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.bundle.files import AS_IT_IS
from featurepipe.heads.linear.linear_map import head_of_map
from featurepipe.images import Source
from featurepipe.prediction.options import BundleOptions, PredictOptions
from featurepipe.prediction.shards import Prediction
from featurepipe.store import FeatureStore, fingerprint

_logger = logging.getLogger(__name__)

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
            training={AS_IT_IS: True},
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
        say(f"precision {settings.precision}")
        _logger.debug("precision %s: %s", settings.precision, settings.why["precision"])
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


@dataclass(frozen=True)
class LabelsOfClasses:
    """Which of the user's labels each of a network's classes means.

    Attributes:
        labels: L labels, sorted.
        places: (K,) int64, the position in ``labels`` of each class; -1 for classes that mean none.
    """

    labels: tuple[str, ...]
    places: npt.NDArray[np.int64]

    @classmethod
    def by_name(cls, classes: Sequence[str], labels: Sequence[str]) -> LabelsOfClasses:
        """Matches names, whatever their case, with ``_`` or ``-`` for spaces; labels that match no class are left out.

        A label that several classes are called (`told_apart`) means all of them.

        Raises:
            UsageError: Two labels match one class.
        """
        there, found = _numbers_by_name(classes), dict[int, str]()
        for label in labels:
            for number in there.get(_folded(label), ()):
                if number in found:
                    raise UsageError(
                        Message(
                            f"the labels {found[number]!r} and {label!r} both match the class {classes[number]!r}; say which "
                            "means what in a file with the columns class and label: ",
                            Option("mapping", "FILE.csv"),
                        )
                    )
                found[number] = label
        return cls._of(found, len(classes))

    @classmethod
    def given(cls, mapping: str | PathLike[str] | Mapping[str, str], classes: Sequence[str]) -> LabelsOfClasses:
        """Takes labels by class from a mapping, or a CSV file with the columns ``class`` and ``label``.

        Raises:
            UsageError: The file cannot be read, a class is unknown, or it has two labels.
        """
        there, found = _numbers_by_name(classes), dict[int, str]()
        for name, label in mapping.items() if isinstance(mapping, Mapping) else _pairs(Path(mapping)):
            numbers = there.get(_folded(name))
            if numbers is None:
                raise unknown("class", name, classes, where="the network's own")
            for number in numbers:
                if found.setdefault(number, label) != label:
                    raise UsageError(
                        f"the mapping gives the class {classes[number]!r} two labels, {found[number]!r} and {label!r}",
                        option="mapping",
                    )
        return cls._of(found, len(classes))

    @classmethod
    def _of(cls, found: Mapping[int, str], classes: int) -> LabelsOfClasses:
        labels = tuple(sorted(set(found.values())))
        return cls(labels, np.array([labels.index(found[k]) if k in found else -1 for k in range(classes)], np.int64))

    def classes_of(self, label: str, classes: Sequence[str]) -> list[str]:
        """The names of the classes that mean a label."""
        return [classes[int(number)] for number in np.flatnonzero(self.places == self.labels.index(label))]

    def probabilities(self, scores: Floats, *, among_labels: bool) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Adds up the probabilities of the classes that mean a label.

        Args:
            scores: (n, K) logits or log-probabilities of the classes.
            among_labels: Whether classes that mean no label count as impossible.

        Returns:
            (n, L) probabilities of the labels, or (n, L + 1) with that of all classes without a label as the last; and (n,)
            answers: the most probable of the labels and of the single classes without one, which are all called L.
        """
        has = self.places >= 0
        if among_labels or has.all():
            summed = self._summed(softmax(scores[:, has], axis=1), has)
            return summed, summed.argmax(axis=1)
        single = softmax(scores, axis=1)
        summed, others = self._summed(single[:, has], has), single[:, ~has]
        answers = np.where(others.max(axis=1) > summed.max(axis=1), len(self.labels), summed.argmax(axis=1))
        return np.column_stack([summed, others.sum(axis=1)]), answers

    def _summed(self, values: Floats, has: npt.NDArray[np.bool_]) -> Floats:
        return np.asarray(values @ np.eye(len(self.labels))[self.places[has]])


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()


def _numbers_by_name(classes: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the classes called so, with and without the number that tells them apart."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        for one in {_folded(name), _folded(name.removesuffix(f" ({number})"))}:
            found.setdefault(one, []).append(number)
    return found


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Class and label of each row that has a label."""
    try:
        with path.open("rb") as file:
            table = read_csv(file, ("class", "label"))
            names, rows = [plain_name(name) for name in table.names], list(table.rows)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the mapping {path}: {error}", option="mapping") from error
    if not {"class", "label"} <= set(names):
        raise UsageError(
            f"{path} has the columns {', '.join(table.names)}; a mapping has class and label", option="mapping"
        )
    pairs = []
    for line, fields in rows:
        name, label = fields[names.index("class")], fields[names.index("label")]
        if name is None:
            raise UsageError(f"{path}: line {line} names no class", option="mapping")
        if label is not None:
            pairs.append((name, label))
    return pairs


def stored_classifier(
    store: FeatureStore, dataset: str, name: str, weights: str | PathLike[str] | None
) -> tuple[OwnClassifier, Bundle]:
    """Takes the classifier out of a network, for the features that a store holds of its bottleneck.

    Raises:
        UsageError: As `OwnClassifier.of`; or the store holds no such features, and the command that computes them.
    """
    own = OwnClassifier.of_network(load_backbone(name, str(weights or "DEFAULT")))
    spaces = held_spaces(store, own.backbone, History.of(store, dataset))
    space = next((space for space in spaces if str(own.column) in space.columns()), None)
    if space is None:
        asked = [] if weights is None else ["--weights", str(weights)]
        words = [
            "featurepipe",
            "extract",
            "SOURCE",
            "--store",
            str(store.path),
            "--dataset",
            dataset,
            "--backbone",
            name,
        ]
        held = first_names([one.name for one in store.spaces()]) or "no features"
        raise UsageError(
            f"{store.path} has no features of the bottleneck ({own.column}) of {name} with the weights {own.backbone.weights}; "
            f"it has {held}. Compute them with: {shlex.join([*words, *asked, '--node', 'bottleneck'])}"
        )
    return own, own.bundle(space.fields)
