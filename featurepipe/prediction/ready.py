"""From a bundle to the network that it was trained on: loaded, compared with the bundle's feature space, ready for images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.backbones import Backbone
from featurepipe.backbones.from_user import check_trusted
from featurepipe.backbones.weights import is_file_name
from featurepipe.display import has
from featurepipe.errors import BundleError, Message, Option, UsageError
from featurepipe.features.loader import StageSeconds
from featurepipe.features.options import Options
from featurepipe.features.session import Session
from featurepipe.features.settings import Settings
from featurepipe.features.stream import FeatureBatch, FeatureStream
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.images import Source
from featurepipe.images.intensity import parse_intensity
from featurepipe.prediction.options import BundleOptions
from featurepipe.progress import Progress

SCORED_BYTES = 32 * 1024 * 1024
"""Features that are scored at once: some heads are many times faster on more rows."""

_BY_DEFAULT = BundleOptions()


@dataclass(frozen=True)
class ReadyBundle:
    """A bundle and what computes its features.

    Attributes:
        bundle: the head and all that is known of it.
        session: the network, and the settings of the bundle's feature space.
        options: what ``make_ready`` was given beside the bundle.
    """

    bundle: Bundle
    session: Session
    options: BundleOptions

    def __reduce__(self) -> tuple[Callable[..., ReadyBundle], tuple[Bundle, BundleOptions]]:
        """Pickles and copies the bundle and the options, from which the network is loaded again wherever it arrives."""
        return make_ready, (self.bundle, self.options)

    @property
    def backbone(self) -> Backbone:
        """The network."""
        return self.session.backbone

    def groups(
        self,
        source: Source,
        listing: pa.Table,
        *,
        clock: StageSeconds | None = None,
        stop: Callable[[], bool] = bool,
        progress: Progress | None = None,
        probes: pa.ChunkedArray | None = None,
    ) -> Iterator[list[FeatureBatch]]:
        """Yields the features of every row as `FeatureStream.batches` does, as many batches at a time as are worth scoring."""
        bundle = self.bundle
        enough = min(8192, max(16, SCORED_BYTES // (4 * (bundle.width + 4 * len(bundle.classes)))))
        group: list[FeatureBatch] = []
        rows = 0
        for batch in FeatureStream(self.session.for_images(listing.num_rows)).batches(
            source, listing, clock=clock, stop=stop, progress=progress, probes=probes
        ):
            group.append(batch)
            rows += len(batch.rows) + len(batch.rejects)
            if rows >= enough:
                yield group
                group, rows = [], 0
        if group:
            yield group

    def probabilities(self, group: Sequence[FeatureBatch]) -> npt.NDArray[np.float64]:
        """Probabilities (m, K) of the m images of a group that have features, in order."""
        vectors = [batch.vectors() for batch in group if len(batch.rows)]
        if not vectors:
            return np.zeros((0, len(self.bundle.classes)))
        return self.bundle.probabilities(np.concatenate(vectors))

    def label_scores(self, group: Sequence[FeatureBatch]) -> npt.NDArray[np.float64]:
        """Scores (m, K) of several labels of the m images of a group that have features, in order; see `Bundle.scores`."""
        vectors = [batch.vectors() for batch in group if len(batch.rows)]
        return self.bundle.scores(np.concatenate(vectors)) if vectors else np.zeros((0, len(self.bundle.classes)))

    def numbers(self, group: Sequence[FeatureBatch]) -> npt.NDArray[np.float64]:
        """Predicted numbers (m,) of the m images of a group that have features, in order; see `Bundle.numbers`."""
        vectors = [batch.vectors() for batch in group if len(batch.rows)]
        return self.bundle.numbers(np.concatenate(vectors)) if vectors else np.zeros(0)


def make_ready(
    bundle: Bundle | str | PathLike[str],
    options: BundleOptions = _BY_DEFAULT,
    *,
    loaded: Backbone | None = None,
) -> ReadyBundle:
    """Loads a bundle's network and checks that its features will be those that the head was trained on.

    Args:
        bundle: the bundle or its folder.
        options: how to run the network.
        loaded: the network, if this process has it already.

    Raises:
        BundleError: the bundle is damaged; its weights are needed; it names a module and its code is not trusted; or this
            network, these weights or this version of featurepipe give other features, and names what differs.
        UsageError: an argument is wrong.
        WeightsNotFound: the network's weights are not at hand.
    """
    found = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    check_trusted(found.backbone["name"], options.trust_code, named_by="the bundle", error=BundleError)
    try:
        parse_intensity(Settings.of_space(found.space, why=_WHY).intensity)
    except UsageError as error:
        raise BundleError(f"the bundle's features have an {error}; use the version that it was trained with") from error
    asked = Options(
        backbone=found.backbone["name"],
        weights=str(options.weights or found.backbone["weights"]) if loaded else _weights(found, options.weights),
        seed=found.backbone["seed"],
        workers=options.workers,
        damaged=options.damaged,
    )
    session = Session.of_space(
        found.space,
        found.columns,
        options,
        asked,
        why=_WHY,
        refuse=_refusal,
        like=found.backbone.get("like"),
        loaded=loaded,
    )
    _check_width(found, session)
    return ReadyBundle(found, session, options.in_full())


_WHY = "as in the bundle"


def _refusal(network: Backbone, changed: list[str]) -> BundleError:
    return BundleError(
        Message(
            f"the bundle's head was trained on other features than {network.name} gives here: {', '.join(changed)} "
            f"{'differs' if len(changed) == 1 else 'differ'}. ",
            _advice(changed),
        )
    )


def _weights(bundle: Bundle, given: str | PathLike[str] | None) -> str:
    if given is not None:
        return str(given)
    named = str(bundle.backbone["weights"])
    if is_file_name(named):
        raise BundleError(
            f"the bundle names the file {named} for its network's weights, which no bundle may; do not use it"
        )
    if named != "file":
        return named
    if bundle.weights_file is not None:
        return str(bundle.weights_file)
    label = bundle.backbone.get("description", {}).get("weights", "a file of your own")
    raise BundleError(
        Message(
            f"the bundle's network {bundle.backbone['name']} has weights of your own ({label}), which are not in the bundle; "
            "give them: ",
            Option("weights", "FILE"),
        )
    )


def _advice(changed: list[str]) -> str:
    if changed == ["weights_sha256"]:
        return Message("Give the weights that it was trained with: ", Option("weights", "FILE"))
    return "Use the versions that it was trained with (they are in the bundle), or extract and train again"


def _check_width(bundle: Bundle, session: Session) -> None:
    backbone, columns = session.backbone, session.columns
    width = sum(math.prod(backbone.feature_shape(column)) for column in columns)
    if width != bundle.width:
        raise BundleError(
            f"the bundle's head takes {bundle.width} values per image, but {', '.join(bundle.columns)} of {backbone.name} "
            f"{has(len(columns))} {width}; train it again"
        )
