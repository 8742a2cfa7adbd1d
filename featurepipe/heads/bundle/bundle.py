"""A bundle: all that predicts on images, in one folder that holds no code. The format is written down in ``BUNDLE.md``."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import BundleError
from featurepipe.heads.blocks import Blocks
from featurepipe.heads.bundle.files import (
    BOOSTER,
    HEAD,
    SEEN,
    WEIGHTS,
    check_file,
    read_file,
    read_manifest,
    record_file,
    write_manifest,
)
from featurepipe.heads.bundle.folder import check_bundle_target, existing_folder, folder_in_place
from featurepipe.heads.bundle.head import check_head, head_files, load_head
from featurepipe.heads.bundle.record import plain_record, warn_of_versions
from featurepipe.heads.bundle.tensors import check_weights, seen_bytes, seen_of
from featurepipe.heads.calibration import class_scores, probabilities


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A trained head and everything that says which features it is for.

    Attributes:
        backbone: ``name``, ``weights`` (as ``load_backbone`` takes it, or ``"file"``: a file of the user's own), ``seed``,
            ``description``.
        space: Fields of the feature space.
        fingerprint: SHA-256 of their canonical JSON.
        columns: ``node:pooling``, in the order of the feature vector.
        family: Name of the head, as ``make_head`` takes it.
        params: Its parameters.
        head: The fitted estimator; its ``classes_`` are text.
        classes: Class names, in the order of every matrix of scores.
        temperature: Scores are divided by it before the softmax; None if the head was not calibrated.
        metrics: What was measured, as JSON values.
        training: Dataset, split, rows, and whatever else tells how it came about, as JSON values.
        seen: (n,) uint64, the first 8 bytes (little-endian) of the keys of the images that it was fitted, tuned or
            calibrated on.
        weights_file: The backbone's own weights inside the bundle, if it has them. Set by ``read_bundle``.
        software: Versions it was written with. Set by ``read_bundle``.
    """

    backbone: dict[str, Any]
    space: dict[str, Any]
    fingerprint: str
    columns: tuple[str, ...]
    family: str
    params: dict[str, Any]
    head: Any
    classes: tuple[str, ...]
    temperature: float | None
    metrics: dict[str, Any]
    training: dict[str, Any]
    seen: npt.NDArray[np.uint64]
    weights_file: Path | None = None
    software: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> int:
        """Values of one feature vector."""
        return int(self.head.n_features_in_)

    def scores(self, X: Blocks | npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scores features, block by block, in memory that does not grow with n but for the result.

        Args:
            X: (n, D) features: an array, or ``Blocks`` such as a ``FeatureSet`` (then the space is checked as well).

        Returns:
            (n, K) log-probabilities, or decision values where the head has none, in the order of ``classes``.

        Raises:
            BundleError: Features of another space, other columns or another width.
        """
        features = X if isinstance(X, Blocks) else np.asarray(X)
        self.check(features)
        return class_scores(self.head, features)

    def probabilities(self, X: Blocks | npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Returns (n, K) probabilities: the softmax of the scores over the temperature (1 if not calibrated)."""
        return probabilities(self.scores(X), 1.0 if self.temperature is None else self.temperature)

    def predict(self, X: Blocks | npt.ArrayLike) -> npt.NDArray[Any]:
        """Returns (n,) labels: for each row the class of the highest score, and so of the highest probability.

        An ``SVC`` asked directly counts votes between pairs of classes instead, which can differ where it is unsure.
        """
        labels: npt.NDArray[Any] = np.asarray(self.head.classes_)[self.scores(X).argmax(axis=1)]
        return labels

    def check(self, features: Any) -> None:
        """Checks that features are those that the head was trained on.

        Args:
            features: Anything with ``shape`` (n, D) and, if it knows them, ``space_fingerprint`` and ``columns`` (or
                ``column``).

        Raises:
            BundleError: They are of another space, other columns, or another width; says what both are.
        """
        fingerprint = getattr(features, "space_fingerprint", None)
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise BundleError(
                f"these features are of the feature space {fingerprint[:12]}, the bundle is for {self.fingerprint[:12]} "
                f"({self.backbone['name']}); extract them as the bundle says (featurepipe info BUNDLE), or train on these"
            )
        columns = getattr(features, "columns", None) or getattr(features, "column", None)
        columns = (columns,) if isinstance(columns, str) else columns
        if columns is not None and tuple(columns) != self.columns:
            raise BundleError(
                f"these features are the columns {', '.join(columns)}, the bundle is for {', '.join(self.columns)}; "
                f"take them so: store.features(..., node={list(self.columns)})"
            )
        shape = tuple(features.shape)
        if len(shape) != 2 or shape[1] != self.width:
            raise BundleError(
                f"these features have the shape {shape}, the bundle takes (n, {self.width}): "
                f"{', '.join(self.columns)} of {self.backbone['name']}"
            )


def write_bundle(
    path: str | os.PathLike[str], bundle: Bundle, *, weights_file: str | os.PathLike[str] | None = None
) -> Path:
    """Writes a bundle, complete or not at all; one that is already there is replaced in one step.

    Args:
        path: The folder to make. Its parents are made too.
        bundle: What to write.
        weights_file: The backbone's own weights (.safetensors), to be copied into the bundle, so that the folder can go
            where that file is not. By default ``bundle.weights_file``.

    Returns:
        Where it is: ``path``, absolute and without links.

    Raises:
        BundleError: Something else is at ``path``; the bundle holds what cannot be written or loaded again; or the disk
            refuses.
    """
    target = check_bundle_target(path)
    record = plain_record(bundle)
    weights = weights_file if weights_file is not None else bundle.weights_file
    contents = {**head_files(bundle.head), SEEN: seen_bytes(bundle.seen)}
    with folder_in_place(target) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        if weights is not None:
            shutil.copyfile(check_weights(Path(weights)), folder / WEIGHTS)
        files = {file.name: record_file(folder, file.name) for file in folder.iterdir()}
        write_manifest(folder, {**record, "files": files})
        read_bundle(folder)  # nothing takes its place that could not be read again
    return target


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads a bundle: every file's checksum is compared, and nothing in it is run, unpickled or imported by name.

    Raises:
        BundleError: It is none, of a newer format, damaged, or holds more than data and known estimators; names the
            file and the next step.

    Warns:
        UserWarning: It was written with another minor version of scikit-learn.
    """
    folder = existing_folder(path)
    record = read_manifest(folder)
    try:
        bundle = _read(folder, record)
    except BundleError:
        if read_manifest(folder) == record:
            raise
        return read_bundle(path)  # it was replaced while we read
    warn_of_versions(folder, bundle.software)
    return bundle


def _read(folder: Path, record: Mapping[str, Any]) -> Bundle:
    listed = record["files"]
    contents = {name: read_file(folder, name, listed[name]) for name in (HEAD, BOOSTER, SEEN) if name in listed}
    for name in listed.keys() - contents.keys():
        check_file(folder, name, listed[name])
    head = load_head(contents, folder)
    check_head(head, tuple(record["classes"]), str(folder / HEAD), width=record["width"])
    names = {field.name for field in dataclasses.fields(Bundle)}
    return Bundle(
        **{name: value for name, value in record.items() if name in names - {"columns", "classes", "head", "seen"}},
        columns=tuple(record["columns"]),
        classes=tuple(record["classes"]),
        head=head,
        seen=seen_of(contents[SEEN], folder / SEEN),
        weights_file=folder / WEIGHTS if WEIGHTS in listed else None,
    )
