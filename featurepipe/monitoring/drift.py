"""Whether today's images are like those of before, by their features and by what a bundle predicts of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.display import counted
from featurepipe.errors import BundleError, StoreError
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.heads.bundle.files import CONTINUOUS, MULTILABEL
from featurepipe.heads.statistics.comparison import holm
from featurepipe.heads.statistics.prediction_shift import class_shift, label_shift, number_shift
from featurepipe.heads.statistics.two_sample import two_sample
from featurepipe.monitoring.options import DriftOptions
from featurepipe.monitoring.samples import (
    Columns,
    Side,
    columns_to_compare,
    reference_snapshot,
    sides,
    snapshot_of_run,
)
from featurepipe.monitoring.standing_warnings import DRIFT, PREDICTIONS, TOO_FEW, Thresholds
from featurepipe.option_groups import as_asked
from featurepipe.progress import announcer
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore, Space
from featurepipe.store.choice import require_snapshot
from featurepipe.store.locks import starts_again
from featurepipe.store.options import NO_GROUP
from featurepipe.store.snapshots import PREVIOUS
from featurepipe.store.space import extract_command
from featurepipe.store.views import FeatureSet

Units = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Question:
    """What is asked of which images, settled."""

    store: FeatureStore
    dataset: str
    columns: Sequence[str] | None
    backbone: str | None
    bundle: Bundle | None
    thresholds: Thresholds
    group: str | None
    seed: int
    say: Callable[[str], None]


@shown_as("drift")
@starts_again
def drift(
    store: FeatureStore | str | os.PathLike[str],
    *,
    dataset: str | None = None,
    columns: Sequence[str] | None = None,
    backbone: str | None = None,
    reference: str = PREVIOUS,
    snapshot: str | None = None,
    bundle: Bundle | str | os.PathLike[str] | None = None,
    warn: float = 0.01,
    fail: float | None = None,
    group: str | None = None,
    seed: int = 0,
    silent: bool = False,
) -> dict[str, Any]:
    """Tests whether the images that are new since a reference snapshot are like those of that snapshot.

    Every column is tested by `featurepipe.heads.statistics.two_sample.two_sample` on up to 1,024 images a side, what a bundle
    predicts by ``class_shift`` (classes), ``label_shift`` (several labels) or ``number_shift`` (a number) beside it, on up to
    20,000; ordered classes are classes. Copies of one image count once. P-values are adjusted for the number of tests, so
    that a night without drift is warned of with a probability of ``warn`` at most; that is so for images that come
    independently of each other. Images that do not, such as views of one patient or frames of one film, need groups: whole ones
    are then dealt to both sides, and a new patient with many images is one new patient.

    Args:
        store: The feature store or its path.
        dataset: Name of the dataset; by default the store's only one.
        columns: Nodes, ``node:pooling`` or aliases; by default every column that the new images have.
        backbone: Of which network, space or fingerprint; by default every space.
        reference: ``previous`` (the snapshot before), ``first``, or a run id; a job's stands for its last extraction.
        snapshot: Run id of the snapshot that is tested, likewise; by default the current one.
        bundle: A bundle or its folder, whose predictions are compared, too.
        warn: Adjusted p-value below which the verdict is ``warning``.
        fail: Adjusted p-value below which the verdict is ``drift``; by default never.
        group: The manifest's column of what belongs together, or a file with ``id`` and ``group``; by default ``group``, where
            there is one; ``none`` to compare each image for itself.
        seed: Of what is drawn.
        silent: Say nothing on standard error.

    Returns:
        JSON values. ``dataset``; ``reference`` and ``snapshot`` (run ids; the first is null if there is none); ``images``
        (``reference`` and ``new``: distinct ones); ``groups`` (``column``, and how many of the ``reference`` and ``new`` are
        compared; null without groups); ``columns``, each with ``column``, ``bottleneck`` (the network's, if known), ``space``,
        ``p_value``, ``adjusted``, ``effect`` and ``auc`` (see `two_sample.Comparison`), ``compared`` (images of each side),
        ``farthest`` and ``typical`` (ids of new images); ``classes``, ``labels`` and ``numbers``, of which the one that the
        bundle predicts is not null, each with ``space``, ``columns``, ``p_value``, ``adjusted`` and ``compared``. ``classes`` has
        ``total_variation``, ``by_chance`` and ``classes`` (shares, those that changed most first); ``labels`` has ``effect``
        (the greatest change of a rate), ``tested`` and ``constant`` (how many labels were, and how many both sides have on no
        image or on all) and ``labels``: of the 100 of the least p-values ``label``, ``p_value``, ``adjusted``
        (Benjamini-Hochberg, over the labels), and the rates ``reference``, ``new`` and their difference ``change``, with
        ``value``, ``low`` and ``high``; ``numbers`` has ``target`` (its name), ``ks``, ``wasserstein``, ``effect`` (the same in
        standard deviations of the reference), ``change`` (of the mean, with an interval) and ``quantiles`` of both sides;
        ``thresholds``; ``options`` as they were asked for; ``verdict`` (``no drift``, ``warning``, ``drift`` or ``too few
        images``); ``exit_code`` (1 for ``drift``, else 0); ``warnings``; ``seconds``.

    Raises:
        UsageError: A dataset, snapshot, column or space is unknown, or a threshold cannot be.
        BundleError: The bundle cannot be used, or the store has no features of its space.
        StoreError: The new images have none of the columns.
    """
    started = time.monotonic()
    options = DriftOptions(
        dataset=dataset,
        columns=None if columns is None else tuple(columns),
        backbone=backbone,
        reference=reference,
        snapshot=snapshot,
        bundle=bundle,
        warn=warn,
        fail=fail,
        group=group,
        seed=seed,
    )
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    question = _Question(
        source,
        dataset or source.only_dataset(),
        options.columns,
        backbone,
        read_bundle(bundle) if isinstance(bundle, str | os.PathLike) else bundle,
        Thresholds(warn, fail),
        group,
        seed,
        announcer(silent=silent),
    )
    current = _settled(question, snapshot)
    earlier = reference_snapshot(source, question.dataset, current, reference)
    return {
        "dataset": question.dataset,
        "reference": earlier,
        "snapshot": current,
        **_answer(question, current, earlier),
        "thresholds": {"warn": warn, "fail": fail},
        "options": as_asked(options),
        "seconds": round(time.monotonic() - started, 3),
    }


def _settled(question: _Question, snapshot: str | None) -> str:
    known = question.store.snapshot_ids(question.dataset)
    if snapshot is not None:
        snapshot = snapshot_of_run(question.store, question.dataset, snapshot)
    if not known or (snapshot is not None and snapshot not in known):
        require_snapshot(question.store, question.dataset, snapshot)  # raises, and says what there is
    return snapshot or known[-1]


def _answer(question: _Question, snapshot: str, reference: str | None) -> dict[str, Any]:
    """Counts the images and, if they are enough, tests them."""
    if reference is None:
        why = f"{snapshot} is the first snapshot of {question.dataset}: there is nothing to compare it with yet"
        return _untested(0, 0, why)
    before, new = sides(question.store, question.dataset, snapshot, reference, group=question.group, seed=question.seed)
    if min(before.count, new.count) < LEAST:
        found = f"{counted(new.count, 'image')} {'is' if new.count == 1 else 'are'} new since {reference}"
        why = f"{found}, which has {before.count:,}: {LEAST} of each are needed"
        return _untested(before.count, new.count, why)
    name = before.group or new.group
    groups = {"column": name, "reference": before.groups, "new": new.groups} if name else None
    if groups is not None and min(before.groups, new.groups) < _LEAST_GROUPS:
        why = (
            f"the {counted(new.count, 'new image')} are of {counted(new.groups, 'group')} ({name}), those of {reference} of "
            f"{before.groups:,}: {_LEAST_GROUPS} of each are needed; --group {NO_GROUP} compares each image for itself"
        )
        return _untested(before.count, new.count, why, groups)
    in_groups = f", {counted(new.groups, 'group')} ({name}) against {before.groups:,}" if groups else ""
    question.say(
        f"{question.dataset}: {counted(new.count, 'new image')} against {before.count:,} of {reference}{in_groups}"
    )
    tested = _tested(question, before, new)
    tested["warnings"] += _doubts_of_groups(
        before, new, len(tested["columns"]) + (question.bundle is not None), question
    )
    return {"images": {"reference": before.count, "new": new.count}, "groups": groups, **tested}


def _doubts_of_groups(before: Side, new: Side, tests: int, question: _Question) -> Iterator[str]:
    """What to say where groups are missing on a side, or so few that no p-value can be small."""
    if bool(before.group) != bool(new.group):
        has, lacks = ("new images", "reference") if new.group else ("images of the reference", "new images")
        yield f"the {has} have groups (column {before.group or new.group}); the {lacks} have none, and each counts for itself"
    if before.group or new.group:
        deals = comb(before.groups + new.groups, new.groups)
        if deals < tests / question.thresholds.warn:
            yield (
                f"{counted(new.groups, 'group')} and {before.groups:,} can be dealt in {deals:,} ways: no adjusted p-value is "
                f"below {tests / deals:.2g}, so that nothing is warned of at {question.thresholds.warn:g}"
            )


def _untested(reference: int, new: int, why: str, groups: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "images": {"reference": reference, "new": new},
        "groups": groups,
        "columns": [],
        **dict.fromkeys(PREDICTIONS),
        "verdict": TOO_FEW,
        "exit_code": 0,
        "warnings": [why],
    }


def _tested(question: _Question, before: Side, new: Side) -> dict[str, Any]:
    asked = columns_to_compare(question.store, question.dataset, question.columns, question.backbone)
    found = list(column_pairs(asked, question.dataset, before, new, named=question.columns is not None))
    if question.bundle is not None:
        found.append(bundle_pair(question.store, question.bundle, question.dataset, before, new))
    warnings = [why for why in found if isinstance(why, str)]
    ready = [pair for pair in found if isinstance(pair, Pair)]
    if not ready:
        raise StoreError("; ".join(warnings) or _no_features(question, new.count))
    permutations = question.thresholds.permutations(len(ready))
    tests = []
    for number, pair in enumerate(ready, 1):
        question.say(f"{number} of {len(ready)}: {pair}")
        tests.append(compare(pair, permutations, question.seed))
    adjusted = holm([test["p_value"] for test in tests])
    tests = [{**test, "adjusted": value} for test, value in zip(tests, adjusted, strict=True)]
    verdict = question.thresholds.verdict(adjusted)
    return {
        "columns": [test for test, pair in zip(tests, ready, strict=True) if pair.bundle is None],
        **dict.fromkeys(PREDICTIONS),
        **{pair.predictions: test for test, pair in zip(tests, ready, strict=True) if pair.bundle is not None},
        "verdict": verdict,
        "exit_code": int(verdict == DRIFT),
        "warnings": warnings,
    }


def _no_features(question: _Question, count: int) -> str:
    command = extract_command(question.store.path, dataset=question.dataset)
    return f"none of the {count:,} new images of {question.dataset} has features; run: {command}"


LEAST = 10
"""Images of a side below which nothing is tested."""
_LEAST_GROUPS = 2

_CLASSES = 20  # listed at most
_LABELS = 100  # likewise
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_PREDICTIONS = {MULTILABEL: "labels", CONTINUOUS: "numbers"}


@dataclass(frozen=True)
class Pair:
    """The features of both sides in one column, or in a bundle's columns.

    Attributes:
        reference: Of at least ``LEAST`` images of the reference.
        new: Of at least ``LEAST`` new images.
        bundle: Whose predictions are compared; None where the features are.
    """

    reference: FeatureSet
    new: FeatureSet
    bundle: Bundle | None = None

    @property
    def groups(self) -> tuple[Units, Units] | None:
        """What belongs together, (n,) of the reference and (m,) new; None without groups."""
        if self.reference.groups is None and self.new.groups is None:
            return None
        first, second = (np.unique(side.units(), return_inverse=True)[1] for side in (self.reference, self.new))
        return first, second

    @property
    def predictions(self) -> str:
        """What the bundle predicts: ``classes``, ``labels`` or ``numbers``; empty without a bundle."""
        return "" if self.bundle is None else _PREDICTIONS.get(self.bundle.target_type, "classes")

    def __str__(self) -> str:
        what = f"{' + '.join(self.new.columns)} of {self.new.origin.space}"
        return what if self.bundle is None else f"{self.predictions} predicted from {what}"


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
    """Tests one column, or a bundle's predictions; JSON values as in ``drift``, without ``adjusted``."""
    if pair.bundle is None:
        return _compare_features(pair, permutations, seed)
    about = {"space": pair.new.origin.space, "columns": list(pair.bundle.columns)}
    if pair.predictions == "labels":
        return about | _compare_labels(pair, pair.bundle, permutations, seed)
    if pair.predictions == "numbers":
        return about | _compare_numbers(pair, pair.bundle, permutations, seed)
    return about | _compare_classes(pair, pair.bundle, permutations, seed)


def _compare_features(pair: Pair, permutations: int, seed: int) -> dict[str, Any]:
    found = two_sample(pair.reference, pair.new, permutations=permutations, seed=seed, groups=pair.groups)
    ids = pair.new.ids
    return {
        "column": pair.new.column,
        "bottleneck": pair.new.origin.bottleneck,
        "space": pair.new.origin.space,
        "p_value": found.p_value,
        "effect": found.effect,
        "auc": found.auc,
        "compared": {"reference": found.reference, "new": len(found.new)},
        "farthest": [str(name) for name in ids[found.farthest]],
        "typical": [str(name) for name in ids[found.typical]],
    }


def _codes(bundle: Bundle, side: Any) -> npt.NDArray[np.int64]:
    """(n,) the labels that the bundle gives, as positions of classes."""
    if bundle.threshold is None:
        return np.asarray(bundle.scores(side).argmax(axis=1), np.int64)
    return bundle.codes(bundle.probabilities(side))


def _compare_classes(pair: Pair, bundle: Bundle, permutations: int, seed: int) -> dict[str, Any]:
    width = len(bundle.classes)
    said = [np.eye(width, dtype=np.int64)[_codes(bundle, side)] for side in (pair.reference, pair.new)]
    before, after = (side.sum(axis=0) for side in said)
    found = class_shift(*_by_group(pair, said), permutations=permutations, seed=seed)
    shares = before / before.sum(), after / after.sum()
    order = np.argsort(-np.abs(shares[1] - shares[0]), kind="stable")[:_CLASSES]
    return {
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


def _by_group(pair: Pair, values: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """Sums of the (n, K) and (m, K) values of both sides; (G, K) by group where there are groups, else (K,) of all."""
    if pair.groups is None:
        return [side.sum(axis=0) for side in values]
    found = []
    for units, side in zip(pair.groups, values, strict=True):
        sums = np.zeros((int(units.max()) + 1, side.shape[1]), np.int64)
        np.add.at(sums, units, side)
        found.append(sums)
    return found


def _compare_labels(pair: Pair, bundle: Bundle, permutations: int, seed: int) -> dict[str, Any]:
    images = (len(pair.reference), len(pair.new))
    said = [np.asarray(bundle.predict(side)).astype(np.int64) for side in (pair.reference, pair.new)]
    sizes = _by_group(pair, [np.ones((count, 1), np.int64) for count in images])
    (before, after), (first, second) = _by_group(pair, said), (size[..., 0] for size in sizes)
    found = label_shift(before, after, (first, second), permutations=permutations, seed=seed)
    change = found.new - found.reference
    tested = np.flatnonzero(~np.isnan(found.p_values))
    order = tested[np.lexsort((-np.abs(change[tested]), found.p_values[tested]))]
    return {
        "p_value": found.p_value,
        "effect": float(np.abs(change).max()),
        "compared": dict(zip(("reference", "new"), images, strict=True)),
        "tested": len(tested),
        "constant": len(change) - len(tested),
        "labels": [
            {
                "label": bundle.classes[k],
                "p_value": float(found.p_values[k]),
                "adjusted": float(found.adjusted[k]),
                "reference": _estimate(found.reference[k], found.reference_limits[k]),
                "new": _estimate(found.new[k], found.new_limits[k]),
                "change": _estimate(change[k], found.change_limits[k]),
            }
            for k in order[:_LABELS]
        ],
    }


def _compare_numbers(pair: Pair, bundle: Bundle, permutations: int, seed: int) -> dict[str, Any]:
    before, after = (bundle.numbers(side) for side in (pair.reference, pair.new))
    found = number_shift(before, after, groups=pair.groups, permutations=permutations, seed=seed)
    return {
        "target": bundle.target_name,
        "p_value": found.p_value,
        "effect": found.effect,
        "ks": found.ks,
        "wasserstein": found.wasserstein,
        "change": _estimate(found.change, found.change_limits),
        "compared": {"reference": len(before), "new": len(after)},
        "quantiles": [
            {"quantile": quantile, "reference": float(old), "new": float(new)}
            for quantile, old, new in zip(
                _QUANTILES, np.quantile(before, _QUANTILES), np.quantile(after, _QUANTILES), strict=True
            )
        ],
    }


def _estimate(value: float, limits: tuple[float, float]) -> dict[str, float]:
    return {"value": float(value), "low": limits[0], "high": limits[1]}


def _looked_up(group: Columns, names: Sequence[str], dataset: str, reference: Side, new: Side) -> Pair:
    before, after = (group.features(side.images, names, dataset) for side in (reference, new))
    return Pair(before, after)


def _enough(found: Pair, reference: Side, new: Side) -> Pair | str:
    """What was found if it is enough, else why not."""
    for features, side, which in ((found.new, new, "new"), (found.reference, reference, "reference's")):
        if len(features) < LEAST:
            asked = len(side.images.keys)
            return f"{found}: not compared, since {len(features):,} of {asked:,} of the {which} images have them"
        if found.groups is not None and len(np.unique(features.units())) < _LEAST_GROUPS:
            return f"{found}: not compared, since the {which} images that have them are of one group"
    return found
