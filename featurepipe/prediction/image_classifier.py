"""A bundle as one object: images in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from featurepipe.errors import BundleError
from featurepipe.extraction.given import images_given
from featurepipe.features.options import AUTO, REJECT
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.bundle.files import CONTINUOUS, MULTILABEL
from featurepipe.prediction.options import BundleOptions
from featurepipe.prediction.ready import ReadyBundle, make_ready

if TYPE_CHECKING:
    from featurepipe.features.stream import FeatureBatch
    from featurepipe.prediction.torch_module import TorchClassifier


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
    """

    def __init__(self, ready: ReadyBundle) -> None:
        self.bundle = ready.bundle
        self.classes_ = np.array(ready.bundle.classes, dtype=object)
        self.weights_note = ready.backbone.weights_note
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
        damaged: str = REJECT,
        trust_code: bool = False,
    ) -> Self:
        """Reads a bundle and loads its network.

        Args:
            path: The bundle's folder.
            weights: The network's weights, if they are a file that is not in the bundle.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
            batch_size: Images per forward, or ``auto``.
            workers: Threads that read and decode; by default one per CPU, at most 16.
            damaged: What a JPEG does of which libjpeg could only repair what was left: ``reject`` raises as for any image that
                cannot be used, ``keep`` predicts it, and a warning names it.
            trust_code: Whether a network ``package.module:factory`` may be loaded, which runs that module.

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
            damaged=damaged,
            trust_code=trust_code,
        )
        return cls(make_ready(path, options))

    def __repr__(self) -> str:
        bundle = self.bundle
        columns = " + ".join(bundle.columns)
        what = f"{len(bundle.classes)} {'labels' if bundle.target_type == MULTILABEL else 'classes'}"
        what = f"the number {bundle.target_name}" if bundle.target_type == CONTINUOUS else what
        return f"<ImageClassifier {bundle.family} on {columns} of {bundle.backbone['name']}, {what}>"

    def predict(self, images: Any) -> npt.NDArray[Any]:
        """Labels images, or estimates their number.

        Args:
            images: A list, array, Series or one-column DataFrame of paths, a list of PIL images, or uint8 arrays: a list of
                (H, W) and (H, W, 3), or one array (N, H, W) or (N, H, W, 3).

        Returns:
            (n,) labels, text, in the order of the images (see ``Bundle.predict``); of a bundle that predicts a number
            float64, and ``bundle.half_width`` less and more are the limits of the prediction intervals. Of several labels
            (n, K), 1 where one is predicted and 0 elsewhere, in the order of ``classes_``.

        Raises:
            UsageError: These are no images, or one of them cannot be used; names it and its position.
        """
        if self.bundle.target_type == CONTINUOUS:
            return self._of_each(images, self._ready.numbers, np.zeros)
        if self.bundle.target_type == MULTILABEL:
            scores = self._of_each(
                images, self._ready.label_scores, lambda count: np.zeros((count, len(self.classes_)))
            )
            return (scores > self.bundle.thresholds).astype(np.int64)
        labels: npt.NDArray[np.object_] = self.classes_[self.bundle.codes(self.predict_proba(images))]
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
        return self._of_each(images, self._ready.probabilities, lambda count: np.zeros((count, len(self.classes_))))

    def _of_each(
        self,
        images: Any,
        score: Callable[[Sequence[FeatureBatch]], npt.NDArray[np.float64]],
        empty: Callable[[int], npt.NDArray[np.float64]],
    ) -> npt.NDArray[np.float64]:
        """What is predicted of each image, in the order of the images."""
        given = images_given(images, name="images")
        found = empty(len(given.ids))
        damage: dict[int, str] = {}
        listing = given.source.scan().combine_chunks()
        for group in self._ready.groups(given.source, listing):
            for row, reason in (reject for batch in group for reject in batch.rejects):
                raise given.refuse(row, reason)
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
        from featurepipe.prediction.torch_module import torch_classifier

        return torch_classifier(self._ready)
