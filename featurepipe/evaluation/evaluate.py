"""From a bundle and cached features to metrics with intervals, and what is to be known before they are believed."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.annotations import split_asked
from featurepipe.display import first_names
from featurepipe.errors import Message, Option, UsageError
from featurepipe.evaluation import leakage
from featurepipe.evaluation.options import EvaluateOptions
from featurepipe.execution.local import features_at
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.heads.bundle.files import AS_IT_IS, CONTINUOUS, MULTILABEL
from featurepipe.heads.statistics.metrics import score_table
from featurepipe.heads.statistics.regression import number_table
from featurepipe.option_groups import as_asked
from featurepipe.prediction.from_store import features_for
from featurepipe.progress import announcer
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore
from featurepipe.store.locks import starts_again
from featurepipe.store.options import RoleOptions, RowOptions, columns_of
from featurepipe.store.roles import with_roles

if TYPE_CHECKING:
    from featurepipe.heads.blocks import Blocks
    from featurepipe.store.views import FeatureSet


@shown_as("evaluate")
@starts_again
def evaluate(
    bundle: Bundle | str | os.PathLike[str] | None = None,
    store: FeatureStore | str | os.PathLike[str] | None = None,
    *,
    backbone: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    labels: Any = None,
    label: str | None = None,
    group: str | None = None,
    split_column: str | None = None,
    target: str | None = None,
    multilabel: str | Sequence[str] | None = None,
    positive: str | None = None,
    ignore_unknown_classes: bool = False,
    weights: str | os.PathLike[str] | None = None,
    mapping: str | os.PathLike[str] | Mapping[str, str] | None = None,
    among_labels: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    cluster: Any = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Scores a bundle on the cached features of a dataset; features are read block by block.

    Args:
        bundle: The bundle or its folder; None with ``backbone``.
        store: The feature store or its path.
        backbone: In place of a bundle, a pretrained network with its own classifier and classes, of whose bottleneck the store
            has features. Labels are matched with classes by name, whatever the case and with ``_`` or ``-`` for spaces.
        dataset: Name of the dataset; by default the store's only one.
        split: Which rows: a split's name, or ``all``. By default ``test`` if the dataset has that split, else the images
            that the head was not trained on, nor on others of their groups, else all.
        labels: A mapping or file to use instead of the dataset's labels, as in ``FeatureSet.with_labels``.
        label: The column of the class, by default that of the training, or ``label``: of ``labels``, else of the manifest that
            was extracted.
        group: The column of what belongs together, such as a patient: intervals are of so many independent groups, and groups
            that are in several splits are named; by default that of the training, or ``group``, where there is one; ``none``
            for no groups.
        split_column: The column of the splits; by default that of the training, else the dataset's own splits; ``none`` for no
            splits.
        target: Of a bundle that predicts a number, the column of the true one; by default the one that it was trained on.
        multilabel: Of a bundle that predicts several labels, the columns of the true ones; by default those that it was trained
            on. Labels that the bundle does not know are named, and left out; of those that are in no column nothing is known.
        positive: The class of two, or the label of several, of which sensitivity, specificity, curves and reliability are
            measured; by default the one that was looked for when the head was trained, else the second class, and no label.
        ignore_unknown_classes: Leave out images whose label the bundle does not know, instead of refusing.
        weights: Of ``backbone`` the name of pretrained weights, by default the best.
        mapping: Of ``backbone``, labels by class, or a CSV file with the columns ``class`` and ``label``, in place of matching
            by name. The probabilities of several classes of one label add up.
        among_labels: Leave classes without a label out of the choice, instead of counting them as wrong answers.
        bootstrap: Resamples behind each 95 % interval; 0 for no intervals.
        seed: Of the resamples.
        cluster: Where to score instead of here, as `featurepipe.execution.connect` takes it: workers read the features, and
            send scores back.
        silent: Say nothing on standard error.

    Returns:
        JSON values: ``bundle``, ``dataset``, ``split`` (null if not one split) and ``scope`` (the same in words),
        ``counts`` (images, scored, groups where there are any, unlabelled, unknown_classes, unmatched labels, rejected,
        duplicates), ``metrics``
        (``featurepipe.heads.statistics.metrics.score_table``, and of two classes, unless ``bootstrap`` is 0, ``screening``, as
        ``Bundle.screening`` returns it; of numbers
        ``featurepipe.heads.statistics.regression.number_table``, of several labels
        ``featurepipe.heads.statistics.multilabel.label_table``, with ``screening`` of a label that is looked for), ``leakage``
        (``trained_on``, of images with groups ``trained_groups`` (`leakage.of_trained_groups`), and ``leakage.report`` of the
        whole dataset), with ``backbone`` ``own_classes``
        (``matched``, classes by label; ``unmatched`` labels; how many
        ``classes`` have no label; ``answers``, how many images got which of them), ``options`` as they were asked for,
        ``seconds``.

    Raises:
        BundleError: The bundle cannot be used, or the store has no features of its feature space.
        StoreError: Features of some images are missing.
        UsageError: The dataset or split is unknown, nothing is labelled, or labels are not among the bundle's classes.
        ClusterError: There is no such cluster, or none of its workers can be used.
    """
    started = time.monotonic()
    options = EvaluateOptions(
        backbone=backbone,
        weights=weights,
        mapping=mapping,
        among_labels=among_labels,
        dataset=dataset,
        split=split,
        labels=labels,
        label=label,
        group=group,
        split_column=split_column,
        target=target,
        multilabel=columns_of(multilabel) or None,
        positive=positive,
        ignore_unknown_classes=ignore_unknown_classes,
        bootstrap=bootstrap,
        seed=seed,
    )
    if store is None or (bundle is None) == (backbone is None):
        raise UsageError(
            Message("give the store and either a bundle or a network as it is, with ", Option("backbone", "NAME"))
        )
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    if bundle is None:
        from featurepipe.prediction.own_classes import stored_classifier  # a bundle is evaluated without loading torch

        _, model = stored_classifier(source, dataset or source.only_dataset(), str(backbone), weights)
    else:
        _check_only_own(options)
        model = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    features = features_for(model, source, dataset or source.only_dataset())
    asked = _Asked(model, bundle, source, features, options, cluster, started, announcer(silent=silent))
    if options.multilabel and model.target_type != MULTILABEL:
        raise UsageError(
            Message(
                Option("multilabel", ",".join(options.multilabel)), ": this bundle predicts one thing of each image"
            )
        )
    model.check_positive(positive)
    if model.target_type == MULTILABEL and target is None:
        return _evaluate_labels(asked)
    if model.target_type == CONTINUOUS:
        return _evaluate_numbers(asked)
    if target is not None:
        raise UsageError(
            Message(
                Option("target", target),
                ": this bundle predicts classes, no number; name their column with ",
                Option("label" if model.target_type != MULTILABEL else "multilabel"),
            )
        )
    return _evaluate_classes(asked) if bundle is not None else _evaluate_own(asked)


def _check_only_own(options: EvaluateOptions) -> None:
    """Refuses with a bundle what says something of a network as it is."""
    for name in ("weights", "mapping", "among_labels"):
        if value := getattr(options, name):
            raise UsageError(
                Message(
                    Option(name, value), " is of a network as it is: ", Option("backbone", "NAME"), ", not of a bundle"
                )
            )


@dataclass(frozen=True)
class _Asked:
    """What is asked, of which bundle and which store; ``features`` are those of the whole dataset."""

    model: Bundle
    given: Bundle | str | os.PathLike[str] | None
    store: FeatureStore
    features: FeatureSet
    options: EvaluateOptions
    cluster: Any
    started: float
    say: Callable[[str], None]

    def with_roles(self, roles: RowOptions) -> _Asked:
        """The same, of features that have what the roles name: labels, numbers, groups."""
        trained = self.model.training.get("roles")
        found = with_roles(
            self.store, self.features, self.options.labels, roles, self.say,
            trained=trained if isinstance(trained, dict) else None,
        )  # fmt: skip
        return replace(self, features=found)

    def scored(self, chosen: FeatureSet, scope: str) -> AbstractContextManager[Blocks]:
        """The rows to score, where they are scored; says how many they are."""
        self.say(f"scoring {len(chosen):,} images of dataset {self.features.origin.dataset}: {scope}")
        return features_at(self.cluster, chosen, self.store, self.say)


def _evaluate_classes(asked: _Asked) -> dict[str, Any]:
    """Scores a bundle that predicts classes; see ``evaluate``."""
    model, options = asked.model, asked.options
    asked = asked.with_roles(RowOptions.of(options))
    chosen = choose_rows(model, asked.features, options.split, ignore_unknown_classes=options.ignore_unknown_classes)
    with asked.scored(chosen.features, chosen.scope) as scored:
        probabilities = model.probabilities(scored)
    called, groups = model.codes(probabilities), chosen.features.groups
    metrics = score_table(
        probabilities,
        chosen.codes,
        model.classes,
        ids=chosen.features.ids,
        groups=groups,
        predicted=called,
        ordered=model.ordered,
        bootstrap=options.bootstrap,
        seed=options.seed,
    )
    if (len(model.classes) == 2 and options.bootstrap) or options.positive is not None:
        metrics["screening"] = model.screening(probabilities, chosen.codes, groups, positive=options.positive)
    return _record_of_classes(asked, chosen, metrics, called)


def _evaluate_own(asked: _Asked) -> dict[str, Any]:
    """Scores a network's own classes against the user's labels; see ``evaluate``."""
    from featurepipe.prediction.own_classes import LabelsOfClasses

    model, options = asked.model, asked.options
    asked = asked.with_roles(RowOptions.of(options))
    there = [str(label) for label in asked.features.classes]
    means = (
        LabelsOfClasses.by_name(model.classes, there)
        if options.mapping is None
        else LabelsOfClasses.given(options.mapping, model.classes)
    )
    matched = {label: means.classes_of(label, model.classes) for label in means.labels if label in there}
    unmatched = [label for label in there if label not in matched]
    name = model.backbone["name"]
    if not matched:
        what = f"is a class of {name}" if options.mapping is None else "is in the mapping"
        raise UsageError(
            Message(
                f"none of the labels ({first_names(there, _NAMED)}) {what}; say which classes mean them in a file with the ",
                "columns class and label: ",
                Option("mapping", "FILE.csv"),
            )
        )
    known = replace(model, classes=means.labels)
    chosen = choose_rows(known, asked.features, options.split, ignore_unknown_classes=options.ignore_unknown_classes)
    with asked.scored(chosen.features, chosen.scope) as scored:
        scores = model.scores(scored)
    probabilities, called = means.probabilities(scores, among_labels=options.among_labels)
    further = (WITHOUT_LABEL,) if probabilities.shape[1] > len(means.labels) else ()
    metrics = score_table(
        probabilities, chosen.codes, (*means.labels, *further),
        ids=chosen.features.ids, groups=chosen.features.groups, predicted=called, bootstrap=options.bootstrap, seed=options.seed,
    )  # fmt: skip
    strange = np.flatnonzero(called == len(means.labels))
    answers = Counter(model.classes[k] for k in np.where(means.places < 0, scores[strange], -np.inf).argmax(axis=1))
    own = {
        "matched": matched,
        "unmatched": unmatched,
        "without_images": [label for label in means.labels if label not in there],
        "classes": int((means.places < 0).sum()),
        "among_labels": options.among_labels,
        "answers": dict(answers.most_common()),
    }
    return {**_record_of_classes(asked, chosen, metrics, called), "own_classes": own}


def _record_of_classes(
    asked: _Asked, chosen: Chosen, metrics: dict[str, Any], called: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """The record of an evaluation of classes; ``called`` are the positions of the answers among the classes."""
    groups = chosen.features.groups
    return _record(
        asked, chosen.features, metrics,
        split=chosen.split, scope=chosen.scope, images=chosen.images, unlabelled=chosen.unlabelled, unknown=chosen.unknown,
        groups=None if groups is None else len({name for name in groups if name is not None}),
        leaks=_leaks(asked, chosen.features, called == chosen.codes),
    )  # fmt: skip


def _evaluate_numbers(asked: _Asked) -> dict[str, Any]:
    """Scores a bundle that predicts a number; see ``evaluate``."""
    model, options = asked.model, asked.options
    roles = RoleOptions(**RowOptions.of(options).arguments(), target=options.target or model.target_name or None)
    if roles.target is None:
        raise UsageError(
            Message("the bundle's number has no name; name the column of the true one with ", Option("target"))
        )
    asked = asked.with_roles(roles)
    candidates, name, scope = _of_split(model, asked.features, options.split)
    if candidates.unlabelled == len(candidates):
        raise UsageError(
            Message(
                f"none of the {len(candidates):,} images of {scope} has a number in ", Option("target", roles.target),
                "; name a file that has it with ", Option("labels", "FILE.csv"),
            )
        )  # fmt: skip
    chosen = candidates.select(labelled=True)
    with asked.scored(chosen, scope) as scored:
        predicted = model.numbers(scored)
    metrics = number_table(
        predicted, np.asarray(chosen.targets, np.float64),
        half_width=model.half_width, ids=chosen.ids, groups=chosen.groups, bootstrap=options.bootstrap, seed=options.seed,
    )  # fmt: skip
    return _record(
        asked, chosen, metrics,
        split=name, scope=scope, images=len(candidates), unlabelled=candidates.unlabelled, unknown={},
        groups=metrics.get("groups"), leaks=_leaks(asked, chosen),
    )  # fmt: skip


def _evaluate_labels(asked: _Asked) -> dict[str, Any]:
    """Scores a bundle that predicts several labels; see ``evaluate``."""
    model, options = asked.model, asked.options
    columns = options.multilabel or tuple((model.target or {}).get("columns", ()))
    roles = RoleOptions(**RowOptions.of(options).arguments(), multilabel=columns or None)
    if not columns:
        raise UsageError(Message("name the columns of the true labels with ", Option("multilabel", "COLUMN,...")))
    asked = asked.with_roles(roles)
    features = asked.features
    candidates, name, scope = _of_split(model, features, options.split)
    shared = [label for label in model.classes if label in features.target_names]
    strange = [label for label in features.target_names if label not in model.classes]
    missing = [label for label in model.classes if label not in features.target_names]
    for names, what in (
        (strange, "labels that the bundle does not know, left out"),
        (missing, "labels of the bundle of which the columns say nothing, not measured"),
    ):
        if names:
            asked.say(f"{what}: {first_names(names, _NAMED)}")
    truth = np.full((len(candidates), len(model.classes)), np.nan, np.float32)
    given_truth = np.asarray(candidates.targets, np.float32)
    for label in shared:
        truth[:, model.classes.index(label)] = given_truth[:, features.target_names.index(label)]
    rows = np.flatnonzero(~np.isnan(truth).all(axis=1))
    if not len(rows):
        raise UsageError(
            Message(
                f"none of the {len(candidates):,} images of {scope} has a known label of the bundle's in ",
                Option("multilabel", ",".join(columns)), "; name a file that has them with ",
                Option("labels", "FILE.csv"),
            )
        )  # fmt: skip
    chosen, truth = candidates.take(rows), truth[rows]
    with asked.scored(chosen, scope) as scored:
        scores = model.scores(scored)
    metrics = model.label_measures(
        scores, truth, chosen.groups, chosen.ids, bootstrap=options.bootstrap, seed=options.seed
    )
    looked_for = options.positive or (model.looked_for if options.bootstrap else None)
    if looked_for is not None:
        metrics |= model.label_screening(looked_for, scores, truth, chosen.groups)
        if "screening" not in metrics:
            asked.say(f"label {looked_for!r} is known for no image of {scope}, so nothing is measured of finding it")
    unknown = {label: int((given_truth[:, features.target_names.index(label)] == 1).sum()) for label in strange}
    return _record(
        asked, chosen, metrics,
        split=name, scope=scope, images=len(candidates), unlabelled=len(candidates) - len(rows), unknown=unknown,
        groups=metrics.get("groups"), leaks=_leaks(asked, chosen),
    )  # fmt: skip


def _record(
    asked: _Asked,
    scored: FeatureSet,
    metrics: dict[str, Any],
    *,
    split: str | None,
    scope: str,
    images: int,
    unlabelled: int,
    unknown: dict[str, int],
    groups: int | None,
    leaks: dict[str, Any],
) -> dict[str, Any]:
    """What ``evaluate`` returns."""
    return {
        "bundle": {**_about(asked.model, asked.given), "bottleneck": asked.features.origin.bottleneck},
        "dataset": asked.features.origin.dataset,
        "split": split,
        "scope": scope,
        "counts": {
            "images": images,
            "scored": len(scored),
            **({} if groups is None else {"groups": groups}),
            "unlabelled": unlabelled,
            "unknown_classes": unknown,
            "unmatched": scored.unmatched,
            "rejected": scored.rejected,
            "duplicates": scored.duplicates,
        },
        "metrics": metrics,
        "leakage": {**leaks, **leakage.report(asked.features)},
        **({"unused_columns": unused} if (unused := asked.features.unused_columns) else {}),
        "options": as_asked(asked.options),
        "seconds": round(time.monotonic() - asked.started, 3),
    }


def _leaks(asked: _Asked, scored: FeatureSet, correct: npt.NDArray[np.bool_] | None = None) -> dict[str, Any]:
    """What the head was trained on among the scored rows: images, and others of their groups."""
    seen = asked.model.seen
    groups = leakage.of_trained_groups(scored, seen, leakage.trained_groups(asked.features, asked.model), correct)
    found = {"trained_on": leakage.trained_on(scored, seen, correct)}
    return found if groups is None else {**found, "trained_groups": groups}


def _about(bundle: Bundle, given: Bundle | str | os.PathLike[str] | None) -> dict[str, Any]:
    return {
        "path": None if given is None or isinstance(given, Bundle) else os.fspath(given),
        "head": bundle.family,
        "backbone": bundle.backbone["name"],
        "columns": list(bundle.columns),
        "fingerprint": bundle.fingerprint,
        "classes": len(bundle.classes),
        "temperature": bundle.temperature,
        **({} if bundle.threshold is None else {"threshold": bundle.threshold}),
        **({} if bundle.target is None else {"target": bundle.target}),
    }


DEFAULT_SPLIT, EVERY_SPLIT = "test", "all"
WITHOUT_LABEL = "(a class without a label)"
"""What measures call all of a network's own classes that mean none of the user's labels."""
_NAMED = 10


@dataclass(frozen=True)
class Chosen:
    """What is scored.

    Attributes:
        features: The n rows, each with a label that the head knows.
        codes: (n,) position of each label in the bundle's classes.
        split: Name of the split; None if rows of all splits are there.
        scope: The same in words.
        images: Usable images of the split.
        unlabelled: Those among them without a label.
        unknown: Labels that the head does not know, with the number of images left out for it.
    """

    features: FeatureSet
    codes: npt.NDArray[np.int64]
    split: str | None
    scope: str
    images: int
    unlabelled: int
    unknown: dict[str, int]


def choose_rows(
    bundle: Bundle, features: FeatureSet, split: str | None, *, ignore_unknown_classes: bool = False
) -> Chosen:
    """Chooses the rows to score.

    Args:
        bundle: Whose head is scored.
        features: All rows of the dataset.
        split: Its name, or ``all`` for every row; by default ``test`` if the dataset has it, else the images that the
            head was not trained on, or if there are none every image.
        ignore_unknown_classes: Leave out images of classes that the head does not know.

    Raises:
        UsageError: There is no such split, no labelled image in it, or a label that the head does not know.
    """
    candidates, name, scope = _of_split(bundle, features, split)
    if candidates.unlabelled == len(candidates):
        raise UsageError(
            Message(
                f"none of the {len(candidates):,} images of {scope} has a label; name a file with the columns id and label: ",
                Option("labels", "FILE.csv"),
            )
        )
    labels = candidates.table["label"]
    codes = candidates.codes(bundle.classes)
    unknown = _unknown(labels.filter(pa.array(codes < 0)).drop_null())
    known = np.flatnonzero(codes >= 0)
    if unknown and not (ignore_unknown_classes and len(known)):
        raise UsageError(_unknown_text(bundle, unknown, scope, some_known=bool(len(known))))
    return Chosen(
        features=candidates.take(known),
        codes=codes[known],
        split=name,
        scope=scope,
        images=len(candidates),
        unlabelled=candidates.unlabelled,
        unknown=unknown,
    )


def _of_split(bundle: Bundle, features: FeatureSet, split: str | None) -> tuple[FeatureSet, str | None, str]:
    splits = features.splits
    wanted = split_asked(split or DEFAULT_SPLIT, features.split_names())
    if (splits == wanted).any() or split not in {None, EVERY_SPLIT}:
        return features.select(split=wanted), wanted, f"split {wanted}"
    if split is None:
        named = bundle.training.get("dataset") == features.origin.dataset  # elsewhere a patient 1 may be another one
        groups = leakage.trained_groups(features, bundle if named else replace(bundle, grouping=None))
        old = bundle.was_trained_on(features.keys64)
        others = leakage.in_groups(features, groups) & ~old
        new = ~(old | others)
        if new.any() and not new.all():
            beside = f", nor on others of their {_group_of(features)}" if others.any() else ""
            return (
                features.take(new),
                None,
                f"the images that the head was not trained on{beside} (there is no split test)",
            )
    return features, None, "all images" if split else "all images (there is no split test)"


def _group_of(features: FeatureSet) -> str:
    return features.group_column or "group"


def _unknown(labels: pa.ChunkedArray) -> dict[str, int]:
    """Label to number of images, the most frequent first."""
    counts = {str(pair["values"]): int(pair["counts"]) for pair in labels.value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _unknown_text(bundle: Bundle, unknown: dict[str, int], scope: str, *, some_known: bool) -> Message:
    named = first_names([f"{label!r} ({count:,})" for label, count in unknown.items()], _NAMED)
    known = first_names([repr(str(name)) for name in bundle.classes], _NAMED)
    leave = ("leave these images out with ", Option("ignore_unknown_classes", value=True), ", ") if some_known else ()
    if bundle.training.get(AS_IT_IS):
        return Message(
            f"in {scope}, {sum(unknown.values()):,} have labels that mean no class of {bundle.backbone['name']}: {named}. Say "
            "which classes mean them in a file with the columns class and label (",
            Option("mapping", "FILE.csv"),
            "), ",
            *leave,
            "or train a head: featurepipe train",
        )
    own = bundle.training.get("labels")
    hint = f" (the bundle was trained with labels of its own: {own})" if own else ""
    return Message(
        f"in {scope}, {sum(unknown.values()):,} have labels that the bundle does not know: {named}; it knows {known}{hint}. "
        "Correct the labels (",
        Option("labels", "FILE.csv"),
        "), ",
        *leave,
        "or train a bundle that knows them",
    )
