"""One column, or one bundle's classes, of new images against those of a reference: numbers and the ids behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featurepipe.errors import BundleError
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.statistics.two_sample import class_shift, two_sample
from featurepipe.monitoring.samples import Columns, Side
from featurepipe.store import FeatureStore, Space
from featurepipe.store.views import FeatureSet

LEAST = 10
"""Images of a side below which nothing is tested."""

_CLASSES = 20  # listed at most


@dataclass(frozen=True)
class Pair:
    """The features of both sides in one column, or in a bundle's columns.

    Attributes:
        reference: Of at least ``LEAST`` images of the reference.
        new: Of at least ``LEAST`` new images.
        bundle: Whose classes are compared; None where the features are.
    """

    reference: FeatureSet
    new: FeatureSet
    bundle: Bundle | None = None

    def __str__(self) -> str:
        what = f"{' + '.join(self.new.columns)} of {self.new.origin.space}"
        return what if self.bundle is None else f"classes predicted from {what}"


def column_pairs(
    asked: Sequence[tuple[Space, list[str]]], dataset: str, reference: Side, new: Side, *, named: bool
) -> Iterator[Pair | str]:
    """Looks up the features of every column, one after the other.

    Args:
        asked: Columns, by feature space.
        dataset: The dataset's name.
        reference: Its images.
        new: The images that are new.
        named: Whether the user named the columns; columns that were not named and that no new image has are passed over.

    Yields:
        The features of both sides, or why a column is not compared.
    """
    for space, names in asked:
        group = Columns.of(space, names)
        for name in names:
            pair = _looked_up(group, [name], dataset, reference, new)
            if named or len(pair.new):
                yield _enough(pair, reference, new)


def bundle_pair(store: FeatureStore, bundle: Bundle, dataset: str, reference: Side, new: Side) -> Pair | str:
    """Looks up the features that a bundle predicts on; see ``column_pairs``.

    Raises:
        BundleError: The store has no features of the bundle's space.
    """
    spaces = {space.fingerprint: space for space in store.spaces()}
    if bundle.fingerprint not in spaces:
        raise BundleError(
            f"the bundle is for features of the space {bundle.backbone['name']}-{bundle.fingerprint[:12]}, and {store.path} "
            f"has {', '.join(space.name for space in spaces.values()) or 'none'}; take a bundle trained on these, or "
            "extract the features that it needs (featurepipe info BUNDLE)"
        )
    group = Columns.of(spaces[bundle.fingerprint], bundle.columns)
    pair = _looked_up(group, bundle.columns, dataset, reference, new)
    return _enough(replace(pair, bundle=bundle), reference, new)


def compare(pair: Pair, permutations: int, seed: int) -> dict[str, Any]:
    """Tests one column, or a bundle's classes; JSON values as in ``drift``, without ``adjusted``."""
    if pair.bundle is None:
        return _compare_features(pair, permutations, seed)
    return _compare_classes(pair, pair.bundle, permutations, seed)


def _compare_features(pair: Pair, permutations: int, seed: int) -> dict[str, Any]:
    found = two_sample(pair.reference, pair.new, permutations=permutations, seed=seed)
    ids = pair.new.ids
    return {
        "column": pair.new.column,
        "space": pair.new.origin.space,
        "p_value": found.p_value,
        "effect": found.effect,
        "auc": found.auc,
        "compared": {"reference": found.reference, "new": len(found.new)},
        "farthest": [str(name) for name in ids[found.farthest]],
        "typical": [str(name) for name in ids[found.typical]],
    }


def _compare_classes(pair: Pair, bundle: Bundle, permutations: int, seed: int) -> dict[str, Any]:
    width = len(bundle.classes)
    before, after = (
        np.bincount(bundle.scores(side).argmax(axis=1), minlength=width) for side in (pair.reference, pair.new)
    )
    found = class_shift(before, after, permutations=permutations, seed=seed)
    shares = before / before.sum(), after / after.sum()
    order = np.argsort(-np.abs(shares[1] - shares[0]), kind="stable")[:_CLASSES]
    return {
        "space": pair.new.origin.space,
        "columns": list(bundle.columns),
        "p_value": found.p_value,
        "total_variation": found.total_variation,
        "by_chance": found.by_chance,
        "compared": {"reference": int(before.sum()), "new": int(after.sum())},
        "classes": [
            {"class": bundle.classes[k], "reference": float(shares[0][k]), "new": float(shares[1][k])}
            for k in order
            if before[k] + after[k]
        ],
    }


def _looked_up(group: Columns, names: Sequence[str], dataset: str, reference: Side, new: Side) -> Pair:
    before, after = (group.features(side.images, names, dataset) for side in (reference, new))
    return Pair(before, after)


def _enough(found: Pair, reference: Side, new: Side) -> Pair | str:
    """What was found if it is enough, else why not."""
    for features, side, which in ((found.new, new, "new"), (found.reference, reference, "reference's")):
        if len(features) < LEAST:
            asked = len(side.images.keys)
            return f"{found}: not compared, since {len(features):,} of {asked:,} of the {which} images have them"
    return found
