"""What a training learns from, in a few bytes, and what it leaves: a bundle with the head, its metrics and where it came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator

from featurepipe.errors import BundleError, Message, Option, UsageError
from featurepipe.heads.bundle.bundle import Bundle, group_hashes, read_bundle, salt_of, write_bundle
from featurepipe.heads.bundle.files import (
    BOOSTER,
    CONTINUOUS,
    GROUPS,
    HEAD,
    MANIFEST,
    MULTILABEL,
    SEEN,
    WEIGHTS,
    check_bundle_target,
    read_manifest,
)
from featurepipe.heads.statistics.metrics import score_table, untested_text
from featurepipe.heads.statistics.multilabel import unmeasured_text
from featurepipe.heads.statistics.regression import number_table
from featurepipe.records import now
from featurepipe.store import Space
from featurepipe.training.fit import Calibration
from featurepipe.training.splits import near_training
from featurepipe.training.task import Recipe, Task
from featurepipe.training.tuning import Search

if TYPE_CHECKING:
    from featurepipe.store.labelled_images import LabelledImages
    from featurepipe.training.options import TrainOptions
    from featurepipe.training.selection import Selection


@dataclass(frozen=True)
class Inputs:
    """What decides the outcome of a training.

    Attributes:
        fingerprint: of the feature space.
        columns: ``node:pooling``, in the order of the feature vector.
        rows: SHA-256 of the images that train or validate, each with its label and its part.
        images: how many those are.
        settings: the head's and the search's, as JSON values.
        is_own: whether the bundle has another space or other columns than these, its network being tuned from them, or its values
            selected from them.
    """

    fingerprint: str
    columns: tuple[str, ...]
    rows: str
    images: int
    settings: Mapping[str, Any]
    is_own: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What a bundle keeps of it, under ``training.inputs``; the space and the columns are entries of its own, if the same."""
        own = {"space": self.fingerprint, "columns": list(self.columns)} if self.is_own else {}
        return {"rows": self.rows, "images": self.images, "settings": dict(self.settings), **own}


def inputs_of(task: Task, recipe: Recipe, options: TrainOptions) -> Inputs:
    """Sums up what a task learns from.

    Images count by their bytes, so that one that was moved or touched changes nothing, and their order does not count.
    Test images teach nothing and are left out: the head would be the same.
    """
    settings: dict[str, Any] = {
        "head": recipe.head,
        "params": recipe.params,
        "pca": recipe.pca,
        "class_weight": recipe.class_weight,
        "seed": recipe.seed,
        "tune": options.tune,
        "calibration": options.calibration,
    }
    if options.threshold is not None:
        settings["threshold"] = [options.threshold, options.positive, options.threshold_margin]
    elif options.positive is not None:
        settings["positive"] = options.positive
    if options.protocol is not None:
        settings["protocol"] = options.protocol
    if options.ordered is not None:
        settings["ordered"] = list(options.ordered)
    if options.select is not None:
        settings["select"] = options.select
    if options.target is not None:
        settings["target"] = options.target
    if task.is_multilabel:
        settings["multilabel"] = list(task.classes)
    return Inputs(
        fingerprint=task.features.space_fingerprint,
        columns=task.features.columns,
        settings=json.loads(
            json.dumps({**settings, **weights_learned(task)}, default=dict)
        ),  # as it will come back from a file
        is_own=options.select is not None,
        **rows_learned(task),
    )


def rows_learned(task: Task) -> dict[str, Any]:
    """The fields ``rows`` and ``images`` of `Inputs`."""
    rows = _learned(task)
    targets = None if task.targets is None else task.targets[rows]
    digest = digest_of(task.features.take(rows), np.isin(rows, task.division.validation), targets)
    return {"rows": digest, "images": len(rows)}


def weights_learned(task: Task) -> dict[str, str]:
    """The setting ``weight`` of `Inputs`: a digest of the weights of the rows; nothing where all weigh alike."""
    rows = _learned(task)
    if (weights := task.weights(rows)) is None:
        return {}
    order = np.lexsort((weights, task.features.keys64[rows]))
    return {"weight": hashlib.sha256(np.ascontiguousarray(weights[order], "<f8")).hexdigest()}


def _learned(task: Task) -> npt.NDArray[Any]:
    return np.union1d(task.division.final, task.division.validation)


def digest_of(images: LabelledImages, part: npt.NDArray[Any], targets: npt.NDArray[Any] | None = None) -> str:
    """SHA-256 of the (key, label, part) of each image, in no order, without a Python object a row.

    Args:
        images: n images.
        part: (n,) whole numbers, what each image is for.
        targets: (n,) numbers, or (n, K) several labels, that are learned in place of the classes.
    """
    if targets is not None:
        order = np.lexsort((part, *np.atleast_2d(targets.T), images.keys64))
        digest = hashlib.sha256(b"target")
        for numbers in (images.keys, targets.astype("<f8"), part.astype("<i8")):
            digest.update(np.ascontiguousarray(numbers[order]))
        return digest.hexdigest()
    classes = images.classes
    codes = images.codes(classes)
    order = np.lexsort((part, codes, images.keys64))
    found = hashlib.sha256(json.dumps(classes).encode())
    for column in (images.keys, codes.astype("<i8"), part.astype("<i8")):
        found.update(np.ascontiguousarray(column[order]))
    return found.hexdigest()


def why_train(target: Path, inputs: Inputs) -> list[str]:
    """Says why a training could give another bundle than the one at ``target``; nothing if it could not."""
    if not os.path.lexists(target) or not any(target.iterdir()):
        return ["there is no bundle yet"]
    try:
        bundle = read_bundle(target)
    except BundleError as error:
        return [f"the bundle cannot be read ({error})"]
    known = bundle.training.get("inputs")
    if not isinstance(known, dict) or not {"rows", "images", "settings"} <= known.keys():
        return ["the bundle does not say what it was trained on"]
    return _differences(bundle, known, inputs)


def _differences(bundle: Bundle, known: Mapping[str, Any], inputs: Inputs) -> list[str]:
    found = []
    space, columns = known.get("space", bundle.fingerprint), tuple(known.get("columns", bundle.columns))
    if space != inputs.fingerprint:
        found.append(f"features of another space: {inputs.fingerprint[:12]}, before {space[:12]}")
    if columns != inputs.columns:
        found.append(f"other columns: {' + '.join(inputs.columns)}, before {' + '.join(columns)}")
    before = dict(known["settings"])
    changed = sorted(name for name in {*before, *inputs.settings} if before.get(name) != inputs.settings.get(name))
    if changed:
        found.append(f"other settings: {', '.join(changed)}")
    if known["rows"] != inputs.rows:
        found.append(f"its images or their labels changed: {inputs.images:,} to learn from, {known['images']:,} before")
    return found


LONG = ("confusion", "confused", "mistakes")
"""Parts of the metrics that ``featurepipe evaluate`` gives anew and a bundle need not carry."""


@dataclass(frozen=True)
class Network:
    """What a bundle says of the network that makes its features.

    Attributes:
        backbone: how to load it again; see `featurepipe.heads.bundle.bundle.Bundle`.
        fields: of the feature space.
        fingerprint: of the feature space.
    """

    backbone: Mapping[str, Any]
    fields: Mapping[str, Any]
    fingerprint: str

    @classmethod
    def of(cls, space: Space) -> Network:
        """That of a feature space of the store."""
        return cls(_backbone(space), space.fields, space.fingerprint)


def publish(
    target: Path,
    network: Network,
    task: Task,
    recipe: Recipe,
    head: BaseEstimator,
    *,
    inputs: Inputs,
    search: Search | None,
    calibration: Calibration | dict[str, Any] | None,
    weights: Path | None,
    labels: str | None,
    column: str | None,
    multilabel: Sequence[str],
    threshold: dict[str, Any] | None,
    positive: str | None,
    roles: Mapping[str, Any],
    seconds: float,
    say: Callable[[str], None],
    tuning: Mapping[str, Any] | None = None,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """Tests the head on the test rows, writes the bundle, and returns what was done as JSON values.

    Args:
        target: the bundle's folder.
        network: that makes the features.
        task: what was settled.
        recipe: of the head.
        head: fitted on all rows that may train.
        inputs: what decided the outcome.
        search: of the parameters, if there was one.
        calibration: of classes the temperature, of numbers the prediction interval (`fit.prediction_interval`).
        weights: the backbone's own weights.
        labels: where the labels were from.
        column: of the number that is learned; None for classes.
        multilabel: the columns of several labels that are learned; none for classes.
        threshold: of two classes, if one was chosen (`fit.fit_threshold`).
        positive: of several labels the one that is looked for, if there is one.
        roles: the columns that were asked for, by role.
        seconds: that it all took.
        say: told what was written.
        tuning: how the network itself was tuned, if it was.
        selection: which values the head was fitted on, if not on all.
    """
    lost = classes_lost(target, task.classes)
    if selection is not None:
        head, task = selection.of_all_values(head), replace(task, features=selection.features)
    training = {
        **task.as_dict(),
        "head": recipe.head,
        "params": dict(recipe.params),
        **({} if recipe.protocol is None else {"protocol": recipe.protocol}),
        "seed": task.seed,
        "labels": labels,
        **({"roles": dict(roles)} if roles else {}),
        **({"unused_columns": unused} if (unused := task.features.unused_columns) else {}),
        "inputs": inputs.as_dict(),
        **({} if selection is None else {"selection": selection.as_dict()}),
        "search": search.as_dict() if search else None,
        "cluster": task.executor.describe_workers(),
        **({"lost_classes": lost} if lost else {}),
        "when": now(),
        "seconds": round(seconds, 2),
        **({} if tuning is None else {"tuning": dict(tuning)}),
    }
    bundle = Bundle(
        backbone=dict(network.backbone),
        space=dict(network.fields),
        fingerprint=network.fingerprint,
        columns=task.features.columns,
        family=recipe.head,
        params=dict(recipe.params),
        head=head,
        classes=() if task.is_numeric else tuple(str(name) for name in head.classes_),
        temperature=calibration.temperature if isinstance(calibration, Calibration) else None,
        metrics={},
        training=training,
        **_trained_on(task),
        target=_target(task, column, multilabel, calibration, positive),
        threshold=threshold,
        ordered=task.is_ordered,
    )
    test = _tested_numbers if task.is_numeric else _tested_labels if task.is_multilabel else _tested
    tested = test(bundle, task)
    features, division = task.features, task.division
    near = None
    if tested and features.groups is None and not task.cost.is_spread:
        near = near_training(features, division.final, division.test, seed=task.seed)
    calibrated = asdict(calibration) if isinstance(calibration, Calibration) else calibration
    if tested and tested.get("untested"):
        say(untested_text(tested["untested"]))
    if tested and tested.get("unmeasured"):
        say(unmeasured_text(tested["unmeasured"]))
    if tested and calibrated and task.targets is None:  # on images that neither the head nor the temperature has seen
        plain = _tested(replace(bundle, temperature=None), task, bootstrap=0)
        calibrated |= {
            "test_ece_before": plain["ece"]["value"] if plain else None,
            "test_ece_after": tested["ece"]["value"],
        }
    metrics = {
        "test": {k: v for k, v in tested.items() if k not in LONG} if tested else None,
        "calibration": calibrated,
    }
    bundle = replace(bundle, metrics=metrics)
    clear_torn(target)
    replaced = ", in place of the bundle that was there" if target.is_dir() and any(target.iterdir()) else ""
    path = write_bundle(target, bundle, weights_file=weights)
    say(f"wrote {target}{replaced}")
    return {
        "bundle": str(path),
        "backbone": bundle.backbone["name"],
        "bottleneck": task.features.origin.bottleneck,
        **training,
        **({} if near is None else {"test_near": near}),
        "test_left_out": 0 if task.is_multilabel else int((task.codes[task.division.test] < 0).sum()),
        "test_seen": int(bundle.was_trained_on(task.features.take(task.division.test).keys64).sum()),
        "calibration": calibrated,
        **({} if threshold is None else {"threshold": threshold}),
        "test": tested,
    }


def classes_lost(target: Path, classes: Collection[str]) -> list[str]:
    """The classes, or labels, that the bundle at ``target`` knows and one of ``classes`` will not; none if there is no bundle.

    A bundle, or a new one, that estimates a number has no classes to lose.
    """
    if not classes or not os.path.lexists(target / MANIFEST):
        return []
    try:
        known = read_manifest(target)["classes"]
    except BundleError:  # which is replaced, and tells nothing
        return []
    return [str(name) for name in known if name not in classes]


@contextmanager
def weights_copy(
    space: Space, weights: str | PathLike[str] | None, *, trust_code: bool | Collection[str] = False
) -> Iterator[Path | None]:
    """The backbone's own weights as a .safetensors file for the bundle, checked to be those of the features.

    Raises:
        UsageError: it holds other weights, the backbone's are not from a file, or loading it would run code that is not trusted.
    """
    if weights is None:
        yield None
        return
    if not str(space.notes.get("backbone", {}).get("weights", "")).startswith("file:"):
        raise UsageError(
            Message(
                f"the features of {space.name} were not computed with a weights file of yours; leave ",
                Option("weights"),
                " out",
            )
        )
    from safetensors.torch import save_file

    from featurepipe.backbones import load_backbone
    from featurepipe.backbones.from_user import check_trusted

    check_trusted(space.backbone, trust_code, named_by="the store")
    found = load_backbone(space.backbone, str(weights))
    if found.weights_sha256 != space.fields["weights_sha256"]:
        raise UsageError(f"{weights} holds other weights than those the features of {space.name} were computed with")
    if str(weights).endswith(".safetensors"):
        yield Path(weights)
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.safetensors"
        save_file({name: values.clone().contiguous() for name, values in found.state().items()}, copy)
        yield copy


def _backbone(space: Space) -> dict[str, Any]:
    """How to load the backbone again, on any machine."""
    description: Mapping[str, Any] = space.notes.get("backbone", {})
    label = str(description.get("weights", "DEFAULT"))
    weights = "none" if description.get("random") else "file" if label.startswith("file:") else label
    return {
        "name": space.backbone,
        "weights": weights,
        "seed": description.get("seed") or 0,
        "description": dict(description),
    }


def _tested(bundle: Bundle, task: Task, *, bootstrap: int = 1000) -> dict[str, Any] | None:
    """Metrics on the test rows whose class the head knows."""
    rows = task.division.test
    features = task.features.take(rows)
    codes = features.codes(bundle.classes)
    if not (codes >= 0).any():
        return None
    known = rows[codes >= 0]
    probabilities, truth = bundle.probabilities(task.rows(known)), codes[codes >= 0]
    tested = task.features.take(known)
    called = bundle.codes(probabilities)
    found = score_table(
        probabilities, truth, bundle.classes, ids=tested.ids, groups=tested.groups, predicted=called, bootstrap=bootstrap,
        seed=task.seed, ordered=bundle.ordered,
    )  # fmt: skip
    if bundle.threshold is not None and bootstrap:
        found["screening"] = bundle.screening(probabilities, truth, tested.groups, curves=False)
    return found


def _tested_numbers(bundle: Bundle, task: Task) -> dict[str, Any] | None:
    """Metrics on the test rows."""
    rows = task.division.test
    if not len(rows):
        return None
    tested = task.features.take(rows)
    predicted = bundle.numbers(task.rows(rows))
    return number_table(
        predicted,
        task.answers(rows),
        half_width=bundle.half_width,
        ids=tested.ids,
        groups=tested.groups,
        seed=task.seed,
        plots=False,
    )


def _trained_on(task: Task) -> dict[str, Any]:
    """What a bundle keeps of the images that it was fitted, tuned or calibrated on: keys, and hashes of their groups."""
    images = task.features.take(np.union1d(task.division.final, task.division.validation))
    seen = np.unique(images.keys64)
    if images.groups is None or not images.group_column:
        return {"seen": seen}
    salt = salt_of(seen)
    names = sorted({name for name in images.groups if name is not None})
    return {
        "seen": seen,
        "groups": np.sort(group_hashes(names, salt)),
        "grouping": {"column": images.group_column, "salt": salt},
    }


def _target(
    task: Task,
    column: str | None,
    multilabel: Sequence[str],
    calibration: Calibration | dict[str, Any] | None,
    positive: str | None,
) -> dict[str, Any] | None:
    """What the bundle says of its target; None for classes."""
    if task.is_numeric:
        return {"type": CONTINUOUS, "column": column, "interval": calibration}
    if task.is_multilabel:
        looked_for = {} if positive is None else {"positive": positive}
        return {"type": MULTILABEL, "columns": list(multilabel), **looked_for, "calibration": calibration}
    return None


def _tested_labels(bundle: Bundle, task: Task) -> dict[str, Any] | None:
    """Metrics on the test rows."""
    rows = task.division.test
    if not len(rows):
        return None
    tested = task.features.take(rows)
    scores, truth = bundle.scores(task.rows(rows)), task.answers(rows)
    found = bundle.label_measures(scores, truth, tested.groups, tested.ids, seed=task.seed, plots=False)
    if bundle.looked_for is not None:
        found |= bundle.label_screening(bundle.looked_for, scores, truth, tested.groups, curves=False)
    return found


_FILES = frozenset({MANIFEST, HEAD, BOOSTER, SEEN, GROUPS, WEIGHTS})


def bundle_target(path: str | os.PathLike[str]) -> Path:
    """Checks that a bundle may be written to ``path``; the remains of one count as one.

    Returns:
        The path, absolute and without links.

    Raises:
        BundleError: something else is there.
    """
    try:
        return check_bundle_target(path)
    except BundleError:
        target = Path(os.path.realpath(path))
        if not _is_torn(target):
            raise
        return target


def clear_torn(target: Path) -> None:
    """Removes the remains of a bundle, that a new one can take its place; leaves all else as it is.

    Args:
        target: as `bundle_target` returned it.

    Raises:
        BundleError: a file cannot be removed.
    """
    if not _is_torn(target):
        return
    try:
        for file in target.iterdir():
            file.unlink()
    except OSError as error:
        raise BundleError(f"cannot remove the damaged bundle {target}: {error.strerror}; remove it yourself") from error


def _is_torn(folder: Path) -> bool:
    """Whether a folder holds a bundle's files and nothing else, and its ``bundle.json`` is cut short."""
    if not (folder / MANIFEST).is_file():
        return False
    if not all(file.name in _FILES and file.is_file() and not file.is_symlink() for file in folder.iterdir()):
        return False
    try:
        json.loads((folder / MANIFEST).read_bytes())
    except ValueError:  # no JSON; a manifest that is some, of a newer version say, is somebody's
        return True
    return False
