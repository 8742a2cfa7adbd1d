"""What a training learns from, in a few bytes: whether another one could give anything else than the bundle that is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import BundleError
from featurepipe.heads.bundle.bundle import read_bundle

if TYPE_CHECKING:
    from featurepipe.heads.bundle.bundle import Bundle
    from featurepipe.store.labels import LabelledImages
    from featurepipe.training.options import TrainOptions
    from featurepipe.training.task import Recipe, Task


@dataclass(frozen=True)
class Inputs:
    """What decides the outcome of a training.

    Attributes:
        fingerprint: of the feature space.
        columns: ``node:pooling``, in the order of the feature vector.
        rows: SHA-256 of the images that train or validate, each with its label and its part.
        images: how many those are.
        settings: the head's and the search's, as JSON values.
    """

    fingerprint: str
    columns: tuple[str, ...]
    rows: str
    images: int
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What a bundle keeps of it, under ``training.inputs``; the space and the columns are entries of its own."""
        return {"rows": self.rows, "images": self.images, "settings": dict(self.settings)}


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
    if options.target is not None:
        settings["target"] = options.target
    if task.is_multilabel:
        settings["multilabel"] = list(task.classes)
    rows = np.union1d(task.division.final, task.division.validation)
    if (weights := task.weights(rows)) is not None:
        order = np.lexsort((weights, task.features.keys64[rows]))
        settings["weight"] = hashlib.sha256(np.ascontiguousarray(weights[order], "<f8")).hexdigest()
    return Inputs(
        fingerprint=task.features.space_fingerprint,
        columns=task.features.columns,
        rows=digest_of(
            task.features.take(rows),
            np.isin(rows, task.division.validation),
            None if task.targets is None else task.targets[rows],
        ),
        images=len(rows),
        settings=json.loads(json.dumps(settings, default=dict)),  # as it will come back from a file
    )


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
    if bundle.fingerprint != inputs.fingerprint:
        found.append(f"features of another space: {inputs.fingerprint[:12]}, before {bundle.fingerprint[:12]}")
    if bundle.columns != inputs.columns:
        found.append(f"other columns: {' + '.join(inputs.columns)}, before {' + '.join(bundle.columns)}")
    before = dict(known["settings"])
    changed = sorted(name for name in {*before, *inputs.settings} if before.get(name) != inputs.settings.get(name))
    if changed:
        found.append(f"other settings: {', '.join(changed)}")
    if known["rows"] != inputs.rows:
        found.append(f"its images or their labels changed: {inputs.images:,} to learn from, {known['images']:,} before")
    return found
