"""A frozen network as a scikit-learn transformer: images in, features out, with a store as its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from featurepipe.errors import UsageError
from featurepipe.extraction.given import RAISE, check_on_reject, images_given
from featurepipe.extraction.limits import ExtractionOptions
from featurepipe.features.options import AUTO, REJECT

if TYPE_CHECKING:
    from os import PathLike

    from sklearn.utils import Tags

    from featurepipe.extraction.transform import Transformation
    from featurepipe.store import FeatureStore

NAME = "cnn-features"
"""The dataset under which features are kept in the store; it never has a snapshot."""


class CNNFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turns images into features of a frozen, pretrained network, for use in scikit-learn's pipelines.

    Images are a list, array, Series or one-column DataFrame of paths (or URLs), a list of PIL images, or arrays: a list
    of (H, W) and (H, W, 3), or one array (N, H, W) or (N, H, W, 3), of uint8 or of other numbers for which ``intensity`` is
    asked. For boxes in images, a list of `featurepipe.region` of any of these.

    With a store, features are looked up by the images' content, and only those that are missing are computed and kept: a
    grid search over heads extracts once, and images that ``featurepipe extract`` has seen cost no forward. To know its
    content a file is read, unless it was computed here before and path, size and time are as they were. Any number of
    processes may share the store: one at a time computes, the others wait and find what it has left. No snapshot names
    these features; ``featurepipe gc`` leaves them all the same, as the work of runs that have not finished, and
    ``compact`` merges them.

    ``fit`` learns nothing from the images but settles what is ``"auto"``, so that all features of one fitted transformer
    come from one feature space. Whatever is measured or computed is the same with and without labels.

    Args:
        backbone: As `featurepipe.extract` takes it.
        node: ``NODE`` or ``NODE:POOLING``, or several of them, which are put side by side.
        weights: Name of pretrained weights, ``DEFAULT``, a file with the network's tensors (a state dict, checkpoint or
            .safetensors), or ``none`` for a random control.
        store: Path of a feature store (made if it is missing), or a ``FeatureStore``, or None for none.
        seed: Of the random control.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: with a store as `featurepipe.extract` chooses, else ``fp32``.
        dtype: ``float16``, ``float32`` or ``auto``: what the store keeps; without a store ``float32``.
        decode: ``cpu``, ``gpu``, ``scaled``, ``scaled=N`` or ``auto``, as `featurepipe.extract` takes it.
        intensity: Which values are black and white in images of more than eight bits, as `featurepipe.extract` takes it.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        batch_size: Images per forward, or ``auto``.
        workers: Threads that read and decode; by default one per CPU, at most 16.
        engine: What runs fp32 networks on a CPU, as in `featurepipe.extract`.
        cluster: Whose workers compute what the store lacks, as `featurepipe.execution.connect` takes it, such as the scheduler's
            address; they see the images and the store under the same paths. With a store only.
        damaged: What becomes of a JPEG of which libjpeg could only repair what was left: ``reject`` makes it an image that
            cannot be used, ``keep`` computes its features; a warning names it, and so does the run record of a store.
        on_reject: What an image that cannot be used does: ``raise`` an error that names it, or give a row of ``nan``.
        verbose: Whether to show progress.

    Attributes:
        columns_: The columns, ``node:pooling``, in the order of the features.
        n_features_out_: Values per image.
        weights_note_: What was ignored or guessed when a file of weights was loaded; empty if all is as usual.
        space_: Fields of the feature space: network, SHA-256 of its weights, preprocessing, precision and so on.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
        >>> model = make_pipeline(CNNFeatures("lenet5", weights="none"), LogisticRegression())
        >>> model.fit(images, list("abcabc")).predict(images).shape
        (6,)
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        node: str | Sequence[str] = "bottleneck",
        *,
        weights: str = "DEFAULT",
        store: FeatureStore | str | PathLike[str] | None = None,
        seed: int = 0,
        precision: str = "auto",
        dtype: str = "auto",
        decode: str = "auto",
        intensity: str = "auto",
        device: str = "auto",
        batch_size: int | str = "auto",
        workers: int | None = None,
        engine: str = "auto",
        cluster: Any = None,
        damaged: str = REJECT,
        on_reject: str = "raise",
        verbose: bool = False,
    ) -> None:
        self.backbone = backbone
        self.node = node
        self.weights = weights
        self.store = store
        self.seed = seed
        self.precision = precision
        self.dtype = dtype
        self.decode = decode
        self.intensity = intensity
        self.device = device
        self.batch_size = batch_size
        self.workers = workers
        self.engine = engine
        self.cluster = cluster
        self.damaged = damaged
        self.on_reject = on_reject
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002 (scikit-learn's signature)
        """Settles the network, the columns and the feature space.

        Args:
            X: Images; some of them serve to choose the precision, where that is ``auto`` and the store holds none.
            y: Ignored.

        Raises:
            UsageError: An argument is wrong, or ``X`` holds no images.
            WeightsNotFound: The weights are not at hand.
        """
        check_on_reject(self.on_reject)
        given = images_given(X, name=NAME)
        if not len(given):
            raise UsageError("there are no images to fit on: X is empty")
        from featurepipe.extraction.transform import Transformation

        self._transformation = Transformation.settle(given, self._options(), self.store, self.cluster)
        self.columns_ = tuple(map(str, self._transformation.columns))
        self.n_features_out_ = sum(self._transformation.widths)
        self.weights_note_ = self._transformation.weights_note
        self.space_ = self._transformation.space
        self._widths = self._transformation.widths
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """Computes features, or takes them from the store.

        Args:
            X: n images.

        Returns:
            (n, D) float32, in the order of the images.

        Raises:
            UsageError: ``X`` holds no images, one of them cannot be used (unless ``on_reject="nan"``), or the network is not
                the one of ``fit`` any more.
            StoreLocked: The store is being compacted or cleared of what nobody needs.
        """
        check_is_fitted(self, "space_")
        given = images_given(X, name=NAME)
        features, rejects, damage = self._ready().features(given, silent=not self.verbose)
        if rejects and self.on_reject == RAISE:
            row = min(rejects)
            raise given.refuse(row, rejects[row])
        given.warn_of(damage)
        return features

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:  # noqa: ARG002 (as above)
        """Names of the features: ``layer4:gap_0``, ``layer4:gap_1``, ..."""
        check_is_fitted(self, "space_")
        names = [
            f"{column}_{number}"
            for column, width in zip(self.columns_, self._widths, strict=True)
            for number in range(width)
        ]
        return np.array(names, dtype=object)

    def _options(self) -> ExtractionOptions:
        return ExtractionOptions(
            backbone=self.backbone,
            weights=self.weights,
            seed=self.seed,
            nodes=(self.node,) if isinstance(self.node, str) else tuple(self.node),
            precision=self.precision if self.store is not None or self.precision != AUTO else "fp32",
            dtype=self.dtype if self.store is not None or self.dtype != AUTO else "float32",
            decode=self.decode,
            intensity=self.intensity,
            device=self.device,
            batch_size=self.batch_size,
            workers=self.workers,
            engine=self.engine,
            damaged=self.damaged,
        )

    def _ready(self) -> Transformation:
        """What ``fit`` made ready; made anew where the transformer was unpickled."""
        if getattr(self, "_transformation", None) is None:
            from featurepipe.extraction.transform import Transformation

            self._transformation = Transformation.resume(self._options(), self.store, self.space_, self.cluster)
        return self._transformation

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_transformation"}

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = tags.input_tags.three_d_array = tags.input_tags.string = True
        tags.no_validation = True  # images have no number of features
        return tags
