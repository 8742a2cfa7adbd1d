"""A bundle: all that predicts on images, in one folder that holds no code. The format is written down in ``BUNDLE.md``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from featurepipe.display import first_names, named_columns
from featurepipe.errors import BundleError, Message, Option, UsageError, unknown
from featurepipe.heads.blocks import Blocks
from featurepipe.heads.bundle.files import (
    BOOSTER,
    CONTINUOUS,
    GROUPS,
    HEAD,
    MULTILABEL,
    SEEN,
    WEIGHTS,
    check_bundle_target,
    check_file,
    existing_folder,
    folder_in_place,
    plain,
    read_file,
    read_manifest,
    record_file,
    sha256_of,
    write_manifest,
)
from featurepipe.heads.bundle.head import check_head, head_files, load_head
from featurepipe.heads.calibration import class_scores, label_scores, predicted_numbers, probabilities
from featurepipe.heads.label_calibration import label_calibration_errors
from featurepipe.heads.statistics.multilabel import label_table
from featurepipe.heads.statistics.screening import HALF, screening_table
from featurepipe.results import card, headline, tables_of


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
        groups: (m,) uint64, hashes (`group_hashes`) of the groups of these images; none if they had none.
        grouping: ``column`` (by which groups were named) and ``salt`` of the hashes; None without groups.
        target: What is predicted, if it is a number: ``type`` (``"continuous"``), ``column`` (its name), and ``interval``: None,
            or ``level`` and ``half_width`` of the prediction intervals and the ``images`` that gave it. If it is several labels
            of each image: ``type`` (``"multilabel"``), ``columns`` (that they were learned from), ``positive`` (a label that is
            looked for, if there is one), and ``calibration``: None, or (K,) ``slopes``, ``offsets`` and ``thresholds``, the
            ``images`` that gave them, and how (``heads.calibration.calibrated_labels``). None for classes.
        threshold: Of two classes, from which probability (``value``) on an image is labelled ``positive`` (a class, and
            ``negative`` the other), and how that was chosen: ``wish``, ``margin``, ``reached``, ``reason``, ``images`` and
            ``rates``. None if the label is the more probable class.
        ordered: Whether the classes are in an order, the lowest first.
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
    groups: npt.NDArray[np.uint64] = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))
    grouping: dict[str, Any] | None = None
    target: dict[str, Any] | None = None
    threshold: dict[str, Any] | None = None
    ordered: bool = False
    weights_file: Path | None = None
    software: dict[str, str] = dataclasses.field(default_factory=dict)

    def _repr_html_(self) -> str:
        """The card that a notebook shows: what it is for, and how good it was on its test images."""
        facts = {
            "head": self.family,
            "columns": named_columns(self.columns, (self.backbone.get("description") or {}).get("bottleneck")),
            "backbone": f"{self.backbone['name']}, weights {self.backbone['weights']}",
            "predicts": self.target_text,
            "trained on": f"{len(self.seen):,} different images",
        }
        test = self.metrics.get("test") or {}
        note = "" if test else "no test images were set aside when it was trained: evaluate it on others"
        classes = {"classes": ", ".join(self.classes)} if self.classes else {}
        return card("Bundle", facts | headline({"metrics": test}) | classes, tables=tables_of(test), note=note)

    @property
    def width(self) -> int:
        """Values of one feature vector."""
        return int(self.head.n_features_in_)

    @property
    def target_type(self) -> str:
        """``"multiclass"``, ``"multilabel"`` for several labels of each image, or ``"continuous"`` for a number."""
        return "multiclass" if self.target is None else str(self.target["type"])

    @property
    def target_name(self) -> str:
        """The name of the number that is predicted; empty for classes."""
        return str((self.target or {}).get("column", ""))

    @property
    def target_text(self) -> str:
        """What is predicted, in words."""
        if self.target_type == MULTILABEL:
            return f"several labels ({first_names(self.classes)})"
        return f"a number ({self.target_name})" if self.target_type == CONTINUOUS else f"{len(self.classes)} classes"

    @property
    def half_width(self) -> float | None:
        """Half the width of the prediction intervals of a number, in its unit; None without them."""
        interval = (self.target or {}).get("interval")
        return None if interval is None else float(interval["half_width"])

    def was_trained_on(self, keys64: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tells which images the head was fitted, tuned or calibrated on, or on copies of them, (n,); others it never saw.

        Args:
            keys64: (n,) first 8 bytes of the images' keys, as ``features.keys64``.
        """
        return np.isin(keys64, self.seen)

    def was_trained_on_groups(self, names: Sequence[str], column: str) -> npt.NDArray[np.bool_]:
        """Tells which groups the head was trained on, (m,), as far as the bundle keeps them.

        Args:
            names: m names.
            column: What they are called, such as ``patient``: those of a column of another name are others.
        """
        if self.grouping is None or self.grouping["column"].lower() != column.lower():
            return np.zeros(len(names), np.bool_)
        return np.isin(group_hashes(names, self.grouping["salt"]), self.groups)

    def numbers(self, X: Blocks | npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Predicts numbers, block by block.

        Args:
            X: (n, D) features; see ``scores``.

        Returns:
            (n,) numbers; ``half_width`` less and more are the limits of the prediction interval.

        Raises:
            BundleError: The head predicts classes; or features of another space, other columns or another width.
        """
        if self.target_type != CONTINUOUS:
            what = "classes" if self.target is None else self.target_text
            raise BundleError(f"this bundle predicts {what}, no number: ask for probabilities or predict")
        features = X if isinstance(X, Blocks) else np.asarray(X)
        self.check(features)
        return predicted_numbers(self.head, features)

    def scores(self, X: Blocks | npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scores features, block by block, in memory that does not grow with n but for the result.

        Args:
            X: (n, D) features: an array, or ``Blocks`` such as a ``FeatureSet`` (then the space is checked as well).

        Returns:
            (n, K) log-probabilities, or decision values where the head has none, in the order of ``classes``; of several labels
            decision values.

        Raises:
            BundleError: The head predicts a number; or features of another space, other columns or another width.
        """
        if self.target_type == CONTINUOUS:
            raise BundleError(
                f"this bundle predicts a number ({self.target_name}), it has no classes: ask for numbers or predict"
            )
        features = X if isinstance(X, Blocks) else np.asarray(X)
        self.check(features)
        return (label_scores if self.target_type == MULTILABEL else class_scores)(self.head, features)

    @property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """(K,) of several labels: scores above are predictions; 0 for a head that was not calibrated."""
        return self._of_labels("thresholds", 0.0)

    @property
    def looked_for(self) -> str | None:
        """Of several labels the one that is looked for; None if there is none."""
        return (self.target or {}).get("positive")

    def check_positive(self, name: str | None) -> None:
        """Checks that a name is one of two classes, or one of several labels, so that it can be looked for.

        Raises:
            UsageError: It is not; names the choices.
        """
        if name is None:
            return
        if self.target_type == CONTINUOUS or (self.target is None and len(self.classes) != 2):
            raise UsageError(
                Message(
                    Option("positive", name), ": one of two classes, or one of several labels, can be looked for; this bundle "
                    f"predicts {self.target_text}",
                )
            )  # fmt: skip
        if name not in self.classes:
            raise unknown("label" if self.target else "class", name, self.classes, where="the bundle")

    def label_measures(
        self, scores: npt.NDArray[np.float64], truth: npt.NDArray[np.floating[Any]], groups: Any, ids: Any, **more: Any
    ) -> dict[str, Any]:
        """Measures how several labels are found, at the bundle's thresholds; `heads.statistics.multilabel.label_table`.

        Beside its measures each label has ``ece``, see `heads.label_calibration.label_calibration_errors`.

        Args:
            scores: (n, K), see ``scores``.
            truth: (n, K): 1 present, 0 absent, NaN unknown.
            groups: (n,) what images belong together; None if each is by itself.
            ids: (n,) of the images.
            more: Further arguments of ``label_table``.
        """
        likely = self.label_probabilities(scores)
        found = label_table(
            scores,
            truth,
            self.classes,
            thresholds=self.thresholds,
            groups=groups,
            ids=ids,
            probabilities=likely,
            **more,
        )
        resampled = found["bootstrap"]
        errors = label_calibration_errors(
            likely, truth, in_groups=groups is not None, draws=resampled["resamples"], seed=resampled["seed"]
        )
        for entry, error in zip(found["per_label"], errors, strict=True):
            entry["ece"] = error
        return found

    def label_screening(
        self,
        name: str,
        scores: npt.NDArray[np.float64],
        truth: npt.NDArray[np.floating[Any]],
        groups: Any,
        *,
        curves: bool = True,
    ) -> dict[str, Any]:
        """Measures how one of several labels is found, on the images for which it is known.

        Args:
            name: Of the label.
            scores: (n, K), see ``scores``.
            truth: (n, K): 1 present, 0 absent, NaN unknown.
            groups: (n,) what images belong together; None if each is by itself.
            curves: Whether to give curves and reliability, too.

        Returns:
            ``screening``: what ``screening`` returns of classes, with ``label`` true, the threshold as a probability, and what is
            called positive by the bundle's threshold of scores; empty where the label is known for no image.

        Raises:
            UsageError: The bundle has no such label.
        """
        self.check_positive(name)
        k = self.classes.index(name)
        rows = np.flatnonzero(~np.isnan(truth[:, k]))
        if not len(rows):
            return {}
        cut, members = self.thresholds, None if groups is None else np.asarray(groups, dtype=object)[rows]
        found = screening_table(
            self.label_probabilities(scores)[rows, k], truth[rows, k] == 1, scores[rows, k] > cut[k],
            threshold=float(self.label_probabilities(cut[None])[0, k]), groups=members, curves=curves,
        )  # fmt: skip
        chosen = (self.target or {}).get("calibration") is not None
        return {"screening": {"positive": name, "negative": f"not {name}", "label": True, "chosen": chosen, **found}}

    def _of_labels(self, name: str, without: float) -> npt.NDArray[np.float64]:
        found = (self.target or {}).get("calibration") or {}
        return np.asarray(found.get(name, [without] * len(self.classes)), np.float64)

    def label_probabilities(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns the (n, K) probability of each of several labels, from their scores; rows need not sum to 1."""
        return np.asarray(expit(scores * self._of_labels("slopes", 1.0) + self._of_labels("offsets", 0.0)))

    def probabilities(self, X: Blocks | npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Returns (n, K) probabilities: the softmax of the scores over the temperature (1 if not calibrated).

        Of several labels it is the probability of each, ``1 / (1 + exp(-(slope * score + offset)))``.
        """
        if self.target_type == MULTILABEL:
            return self.label_probabilities(self.scores(X))
        return probabilities(self.scores(X), 1.0 if self.temperature is None else self.temperature)

    def codes(self, probabilities: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
        """Returns (n,) positions of the labels in ``classes``: of the most probable class, or by the threshold if there is one.

        Args:
            probabilities: (n, K), of the classes.
        """
        if self.threshold is None:
            return np.asarray(probabilities.argmax(axis=1), np.int64)
        positive = self.classes.index(self.threshold["positive"])
        return np.where(probabilities[:, positive] >= self.threshold["value"], positive, 1 - positive)

    def screening(
        self,
        probabilities: npt.NDArray[np.float64],
        codes: npt.NDArray[np.int64],
        groups: Any,
        *,
        positive: str | None = None,
        curves: bool = True,
    ) -> dict[str, Any]:
        """Measures how a bundle of two classes finds one of them.

        Args:
            probabilities: (n, 2).
            codes: (n,) positions of the true classes.
            groups: (n,) what images belong together; None if each is by itself.
            positive: That class; by default the threshold's, else the second.
            curves: Whether to give curves and reliability, too.

        Returns:
            ``positive`` and ``negative`` (classes), ``chosen`` (whether the bundle has a threshold, which else is 0.5), and what
            ``heads.statistics.screening.screening_table`` returns.
        """
        own = self.threshold or {"positive": positive or self.classes[1], "value": HALF}
        code = self.classes.index(own["positive"] if positive is None else positive)
        value = own["value"] if self.classes[code] == own["positive"] else 1 - own["value"]
        found = screening_table(
            probabilities[:, code], codes == code, self.codes(probabilities) == code,
            threshold=value, groups=groups, curves=curves,
        )  # fmt: skip
        names = {"positive": self.classes[code], "negative": self.classes[1 - code]}
        return {**names, "chosen": self.threshold is not None, **found}

    def predict(self, X: Blocks | npt.ArrayLike) -> npt.NDArray[Any]:
        """Returns (n,) labels: for each row the class of the highest score, and so of the highest probability; or numbers.

        With a threshold the label is its ``positive`` class from that probability on, and the other class below it.

        Of several labels it is (n, K), 1 where the score is above the label's threshold and 0 elsewhere.

        An ``SVC`` asked directly counts votes between pairs of classes instead, which can differ where it is unsure.
        """
        if self.target_type == CONTINUOUS:
            return self.numbers(X)
        if self.target_type == MULTILABEL:
            return (self.scores(X) > self.thresholds).astype(np.int64)
        codes = self.scores(X).argmax(axis=1) if self.threshold is None else self.codes(self.probabilities(X))
        labels: npt.NDArray[Any] = np.asarray(self.head.classes_)[codes]
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
    if weights is not None:
        record["software"] = _software(*_OF_NETWORKS)
    contents = {**head_files(bundle.head), SEEN: seen_bytes(bundle.seen)}
    if bundle.grouping is not None:
        contents[GROUPS] = seen_bytes(bundle.groups, _GROUPS)
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
    contents = {name: read_file(folder, name, listed[name]) for name in (HEAD, BOOSTER, SEEN, GROUPS) if name in listed}
    for name in listed.keys() - contents.keys():
        check_file(folder, name, listed[name])
    head = load_head(contents, folder)
    check_head(head, tuple(record["classes"]), str(folder / HEAD), width=record["width"])
    names = {field.name for field in dataclasses.fields(Bundle)} - {"columns", "classes", "head", "seen", "groups"}
    return Bundle(
        **{name: value for name, value in record.items() if name in names},
        columns=tuple(record["columns"]),
        classes=tuple(record["classes"]),
        head=head,
        seen=seen_of(contents[SEEN], folder / SEEN),
        groups=seen_of(contents[GROUPS], folder / GROUPS, _GROUPS) if GROUPS in contents else np.empty(0, np.uint64),
        weights_file=folder / WEIGHTS if WEIGHTS in listed else None,
    )


_PACKAGES = ("featurepipe", "numpy", "safetensors", "scikit-learn", "scipy", "skops", "xgboost")
_OF_NETWORKS = ("torch", "torchvision")  # told where a bundle has weights of its own, as those of a tuned network
_JSON = ("backbone", "space", "params", "metrics", "training", "temperature", "columns", "classes")
_WITHOUT_PATHS = ("backbone", "space", "params", "training")


def plain_record(bundle: Bundle) -> dict[str, Any]:
    """Turns a bundle into JSON values, all but its files.

    Raises:
        BundleError: A value is no JSON value, a path of this machine, or does not fit the others.
    """
    check_head(bundle.head, bundle.classes, "the head")
    record = {name: plain(getattr(bundle, name), name) for name in _JSON}
    for name in _WITHOUT_PATHS:
        for where, text in _texts(record[name], name):
            if Path(text).is_absolute() and os.path.lexists(text):
                raise BundleError(
                    f"{where} is {text!r}, a path of this machine, on which no bundle may depend; leave it out"
                )
    if sha256_of(record["space"]) != bundle.fingerprint:
        raise BundleError(
            f"{bundle.fingerprint!r} is not the fingerprint of the bundle's space; take both from the same space"
        )
    if bundle.temperature is not None and not bundle.temperature > 0:
        raise BundleError(
            f"the temperature is {bundle.temperature}, give one above 0, or None for a head that is not calibrated"
        )
    software = _software()
    if bundle.target is not None:
        record["target"] = plain(bundle.target, "target")
    if bundle.grouping is not None:
        record["grouping"] = plain(bundle.grouping, "grouping")
    if bundle.ordered:
        record["ordered"] = True
    if bundle.threshold is not None:
        record["threshold"] = plain(bundle.threshold, "threshold")
    return {
        **record,
        "family": bundle.family,
        "fingerprint": bundle.fingerprint,
        "width": bundle.width,
        "software": software,
    }


def warn_of_versions(folder: Path, software: Mapping[str, Any]) -> None:
    """Warns in one line if scikit-learn is of another minor version than the one that wrote the head."""
    then, now = str(software.get("scikit-learn", "")), version("scikit-learn")
    if then and _minor(then) != _minor(now):
        warnings.warn(
            f"{folder.name} was written with scikit-learn {then}, this is {now}: compare a few predictions, "
            "or train again to be sure",
            stacklevel=3,
        )


def _minor(release: str) -> list[str]:
    return release.split(".")[:2]


def _software(*more: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{number}]")


_NAME, _GROUPS = "seen", "groups"
_LARGEST_HEADER = 100_000_000  # the limit of safetensors


def group_hashes(names: Iterable[str], salt: str) -> npt.NDArray[np.uint64]:
    """Hashes names of groups, as a bundle keeps them: a patient's name is not to be read there.

    A hash does not hide a name from whoever tries all that there may be, such as the numbers up to a million.

    Args:
        names: m distinct names.
        salt: Of the bundle: one group has other hashes in other bundles.

    Returns:
        (m,) uint64, the first 8 bytes (little-endian) of the SHA-256 of salt and name, each UTF-8.
    """
    digests = (hashlib.sha256(f"{salt}{name}".encode("utf-8", "surrogatepass")).digest()[:8] for name in names)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def salt_of(seen: npt.NDArray[np.uint64]) -> str:
    """The salt of a bundle's groups: of the images trained on, so that the same training gives the same bundle."""
    return hashlib.sha256(b"groups" + np.sort(seen).astype("<u8").tobytes()).hexdigest()[:32]


def seen_bytes(seen: npt.NDArray[np.uint64], name: str = _NAME) -> bytes:
    """Returns the content of ``seen.safetensors``, or of ``groups.safetensors``.

    Raises:
        BundleError: ``seen`` is not (n,) uint64.
    """
    import safetensors.numpy

    keys = np.asarray(seen)
    if keys.ndim != 1 or keys.dtype != np.uint64:
        what = "key" if name == _NAME else "hash"
        raise BundleError(
            f"{name} must be (n,) uint64, the first 8 bytes of each {what}; it is {keys.dtype} {keys.shape}"
        )
    return bytes(safetensors.numpy.save({name: np.ascontiguousarray(keys)}))


def seen_of(content: bytes, path: Path, name: str = _NAME) -> npt.NDArray[np.uint64]:
    """Reads what ``seen_bytes`` made.

    Raises:
        BundleError: It is something else.
    """
    import safetensors
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BundleError(f"{path} is not a safetensors file ({error}); train again") from error
    keys = tensors.get(name)
    if keys is None or keys.ndim != 1 or keys.dtype != np.uint64:
        raise BundleError(f"{path} holds no (n,) uint64 keys named {name!r}; train again")
    return np.asarray(keys, np.uint64)


def check_weights(path: Path) -> Path:
    """Checks that a weights file may go into a bundle: tensors and nothing that would have to be unpickled.

    Raises:
        BundleError: It is missing, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _LARGEST_HEADER else None
    except OSError as error:
        raise BundleError(f"cannot read the weights file {path}: {error.strerror}") from error
    except (struct.error, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise BundleError(
            f"the weights file {path} is not a safetensors file, and a bundle holds no pickle; convert it with "
            "safetensors.torch.save_file, or leave it out and give it again when predicting"
        )
    return path
