"""A bundle as one object, images in, labels and probabilities out; its network and linear head as one PyTorch module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import override

from featurepipe.backbones import Backbone, Column
from featurepipe.backbones.engine import HookedNetwork
from featurepipe.backbones.nodes import freeze, frozen_copy
from featurepipe.backbones.pooling import pool
from featurepipe.errors import BundleError, UsageError
from featurepipe.extraction.given import RAISE, check_on_reject, images_given
from featurepipe.features.options import AUTO, REJECT
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.bundle.files import CONTINUOUS, MULTILABEL
from featurepipe.heads.families import families_for
from featurepipe.heads.linear.linear_map import linear_map
from featurepipe.heads.linear.ordinal import LEAST
from featurepipe.prediction.options import BundleOptions
from featurepipe.prediction.ready import ReadyBundle, make_ready
from featurepipe.results import Result, optional
from featurepipe.store.choice import is_mirrored

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from featurepipe.features.stream import FeatureBatch


class ImageClassifier:
    """A trained head with the network that its features come from; make one with ``ImageClassifier.load``.

    Features are computed as `featurepipe.extract` computes them, in the bundle's own feature space, so that an image gets the
    label here that it gets from its cached feature.

    It can be pickled and copied, by joblib and multiprocessing too: the bundle travels, and the network is loaded anew where it
    arrives (its weights, and a network's own module, must be at hand there).

    Attributes:
        bundle: The head and all that is known of it.
        classes_: (K,) class names, in the order of the probabilities; none of a bundle that predicts a number.
        weights_note: What was ignored or guessed when a file of weights was loaded; empty if all is as usual.
        on_reject: What an image that cannot be used does: ``raise`` or ``nan``.
    """

    def __init__(self, ready: ReadyBundle, *, on_reject: str = RAISE) -> None:
        self.bundle = ready.bundle
        self.classes_ = np.array(ready.bundle.classes, dtype=object)
        self.weights_note = ready.backbone.weights_note
        self.on_reject = on_reject
        self._ready = ready

    @classmethod
    def load(
        cls,
        path: str | PathLike[str] | Bundle,
        *,
        weights: str | PathLike[str] | None = None,
        device: str = AUTO,
        batch_size: int | str = AUTO,
        workers: int | None = None,
        engine: str = AUTO,
        damaged: str = REJECT,
        trust_code: bool = False,
        on_reject: str = RAISE,
    ) -> Self:
        """Reads a bundle and loads its network.

        Args:
            path: The bundle's folder.
            weights: The network's weights, if they are a file that is not in the bundle.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
            batch_size: Images per forward, or ``auto``.
            workers: Threads that read and decode; by default one per CPU, at most 16.
            engine: What runs fp32 networks on a CPU: ``pytorch``, ``openvino``, or ``auto``: OpenVINO where it is installed, for
                1,000 images or more.
            damaged: What a JPEG does of which libjpeg could only repair what was left: ``reject`` raises as for any image that
                cannot be used, ``keep`` predicts it, and a warning names it.
            trust_code: Whether a network ``package.module:factory`` may be loaded, which runs that module.
            on_reject: What an image that cannot be used does: ``raise`` an error that names it, or ``nan``: its label is None
                (its number nan), its probabilities are nan, and the others are predicted.

        Raises:
            BundleError: The bundle is damaged, or the network gives other features here; the message names what differs.
            UsageError: An argument is wrong.
            WeightsNotFound: The network's weights are not at hand.
        """
        options = BundleOptions(
            weights=weights,
            device=device,
            batch_size=batch_size,
            workers=workers,
            engine=engine,
            damaged=damaged,
            trust_code=trust_code,
        )
        check_on_reject(on_reject)  # before a network is loaded
        return cls(make_ready(path, options), on_reject=on_reject)

    def __repr__(self) -> str:
        bundle = self.bundle
        columns = " + ".join(bundle.columns)
        what = f"{len(bundle.classes)} {'labels' if bundle.target_type == MULTILABEL else 'classes'}"
        what = f"the number {bundle.target_name}" if bundle.target_type == CONTINUOUS else what
        return f"<ImageClassifier {bundle.family} on {columns} of {bundle.backbone['name']}, {what}>"

    def _repr_html_(self) -> str:
        """The card that a notebook shows."""
        return self.bundle._repr_html_()

    def to_pandas(self, images: Any) -> pd.DataFrame:
        """Predicts images, a row for each: ``predicted``, and a column for each class with its probability.

        Args:
            images: As ``predict`` takes them.

        Raises:
            UsageError: pandas is not installed; or as ``predict``.
        """
        pandas = optional("pandas", "to_pandas()")
        if self.bundle.target_type == CONTINUOUS:
            return pandas.DataFrame({"predicted": self.predict(images)})
        given = list(images)
        likely = pandas.DataFrame(self.predict_proba(given), columns=list(self.classes_))
        if self.bundle.target_type == MULTILABEL:
            return likely
        likely.insert(0, "predicted", self._labels(likely.to_numpy()), allow_duplicates=True)
        return likely

    def plot(self, what: str | None = None, *, ax: Axes | None = None, **how: Any) -> Axes:
        """Draws what the bundle found on its test images when it was trained: ``"confusion"`` or ``"mistakes"``; see ``Result``.

        Raises:
            UsageError: matplotlib is not installed, or the bundle has no test images.
        """
        return Result({"metrics": self.bundle.metrics}, "bundle").plot(what, ax=ax, **how)

    def predict(self, images: Any) -> npt.NDArray[Any]:
        """Labels images, or estimates their number.

        Args:
            images: A list, array, Series or one-column DataFrame of paths, a list of PIL images, or uint8 arrays: a list of
                (H, W) and (H, W, 3), or one array (N, H, W) or (N, H, W, 3).

        Returns:
            (n,) labels, text, in the order of the images (see ``Bundle.predict``); of a bundle that predicts a number
            float64, and ``bundle.half_width`` less and more are the limits of the prediction intervals. Of several labels
            (n, K), 1 where one is predicted and 0 elsewhere, in the order of ``classes_``. With ``on_reject="nan"`` None, or
            nan (of several labels in float64), for images that cannot be used.

        Raises:
            UsageError: These are no images, or one of them cannot be used (unless ``on_reject="nan"``); names it and its
                position.
        """
        if self.bundle.target_type == CONTINUOUS:
            return self._of_each(images, self._ready.numbers)
        if self.bundle.target_type == MULTILABEL:
            scores = self._of_each(images, self._ready.label_scores, len(self.classes_))
            present = (scores > self.bundle.thresholds).astype(np.int64)
            return present if self.on_reject == RAISE else np.where(np.isnan(scores), np.nan, present)
        return self._labels(self.predict_proba(images))

    def _labels(self, likely: npt.NDArray[np.float64]) -> npt.NDArray[np.object_]:
        """(n,) the labels that (n, K) probabilities mean; None where they are nan."""
        labels: npt.NDArray[np.object_] = self.classes_[self.bundle.codes(likely)]
        labels[np.isnan(likely).any(axis=1)] = None
        return labels

    def predict_proba(self, images: Any) -> npt.NDArray[np.float64]:
        """Returns the (n, K) probabilities of the classes, or of several labels; takes and raises as ``predict``.

        Raises:
            BundleError: The bundle predicts a number, which has no classes.
        """
        if self.bundle.target_type == CONTINUOUS:
            raise BundleError(
                f"this bundle predicts a number ({self.bundle.target_name}), it has no probabilities: use predict"
            )
        return self._of_each(images, self._ready.probabilities, len(self.classes_))

    def _of_each(
        self,
        images: Any,
        score: Callable[[Sequence[FeatureBatch]], npt.NDArray[np.float64]],
        *width: int,
    ) -> npt.NDArray[np.float64]:
        """What is predicted of each image, in the order of the images: one number, or as many as ``width`` says."""
        given = images_given(images, name="images")
        found = np.full((len(given.ids), *width), np.nan)
        damage: dict[int, str] = {}
        listing = given.source.scan().combine_chunks()
        for group in self._ready.groups(given.source, listing):
            rejects = [reject for batch in group for reject in batch.rejects]
            if rejects and self.on_reject == RAISE:
                row, reason = rejects[0]
                raise given.refuse(row, reason, has_labels=False)
            damage.update(found for batch in group for found in batch.damage)
            rows = np.concatenate([batch.rows for batch in group])
            found[rows] = score(group)
        given.warn_of(damage)
        in_order: npt.NDArray[np.float64] = found[given.place]
        return in_order

    def to_torch(self) -> TorchClassifier:
        """Returns network, pooling and head as one module that maps images to logits, or to a number; see ``TorchClassifier``.

        Raises:
            UsageError: The head is not linear.
        """
        return torch_classifier(self._ready)


Floats = npt.NDArray[np.float64]


class TorchClassifier(nn.Module):
    """Maps images to the logits of a linear head.

    The input is a batch (N, C, h, w) of images that are resized and cropped as the network's weights want it
    (``backbone.preprocessing.resize_crop``, or the resizing of ``weights.transforms()``): uint8, which is normalised here, or
    floats, which are taken to be normalised already. The output is float32 (N, K), in the order of ``classes``: the head's
    decision values; ``softmax(logits / temperature)`` are the bundle's probabilities. Of a bundle that predicts a number it is
    that number, (N, 1), without classes. Of ordered classes the logits are log-probabilities, made of the steps between them
    (``featurepipe.heads.linear.ordinal``).

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
        ordered: bool = False,
    ) -> None:
        super().__init__()
        self.classes, self.temperature = list(classes), temperature
        nodes = list(dict.fromkeys(column.node for column in columns))
        graph = backbone.graph(nodes)
        self.network = HookedNetwork(frozen_copy(backbone.module), nodes) if graph is None else frozen_copy(graph)
        self._columns = [(column.node, column.pooling, backbone.channel_axis(column.node)) for column in columns]
        self._half, self._ordered = half, ordered
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
        found = nn.functional.linear(
            self.features(images).to(exact), self.head.weight.to(exact), self.head.bias.to(exact)
        )
        return _of_steps(found) if self._ordered else found

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


def _of_steps(scores: Tensor) -> Tensor:
    """Log-probabilities (N, K) of ordered classes from the (N, K - 1) scores of the steps between them."""
    steps = nn.functional.pad(torch.cummin(scores, dim=1).values, (1, 0), value=torch.inf)
    steps = nn.functional.pad(steps, (0, 1), value=-torch.inf)
    upper, lower = steps[:, :-1], steps[:, 1:]
    # sigmoid(upper) - sigmoid(lower), without the loss of digits where both are near 1
    apart = torch.sigmoid(upper) * torch.sigmoid(-lower) * -torch.expm1(lower - upper)
    found = apart.clamp(min=LEAST)
    return torch.log(found / found.sum(dim=1, keepdim=True))


def torch_classifier(ready: ReadyBundle) -> TorchClassifier:
    """The module of a bundle with a linear head.

    Raises:
        UsageError: The head is not linear; names those that are. Or it is of mirrored images.
    """
    bundle = ready.bundle
    families = families_for(bundle.target_type)
    family = families.get(bundle.family)
    if family is not None and not family.linear:
        linear = ", ".join(name for name, other in families.items() if other.linear)
        raise UsageError(
            f"a {bundle.family} head is no linear layer, so there is no module of it; linear are: {linear}"
        )
    if is_mirrored(bundle.space):
        raise UsageError(
            "the bundle is of mirrored images, and a module takes images as they are; predict mirrors them"
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
        ordered=bundle.ordered,
    )
