"""Predictions as rows and as files: one row per listed image, in the listing's order, whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from featurepipe.display import neutralised
from featurepipe.errors import Message, Option, UsageError
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.bundle.files import CONTINUOUS, MANIFEST, MULTILABEL
from featurepipe.images.regions import REGION_MARK, split_region
from featurepipe.store.atomic import atomic_file

if TYPE_CHECKING:
    from featurepipe.features.stream import FeatureBatch
    from featurepipe.prediction.ready import ReadyBundle

SUFFIXES = (".csv", ".jsonl", ".parquet")
DIGITS = 6
"""Significant digits of a probability in text."""


class Writer:
    """Writes record batches of ``schema_of(...)``.

    Attributes:
        neutralised: cells that a spreadsheet would have taken for formulas, and that were changed.
    """

    def __init__(self, write: Callable[[pa.RecordBatch], None], *, neutralise: bool = False) -> None:
        self._write, self._neutralise = write, neutralise
        self.neutralised = 0

    def __call__(self, batch: pa.RecordBatch) -> None:
        """Writes rows."""
        if self._neutralise:
            batch, changed = neutralised(batch)
            self.neutralised += changed
        self._write(batch)


def schema_of(classes: Sequence[str]) -> pa.Schema:
    """The columns of a file of predictions.

    ``id``; ``label``, the most probable class or that of the threshold; ``confidence``, its probability; ``reason``, why there
    is no prediction; and for every class ``p(<class>)``, its probability. Of an image that could not be used all but id and
    reason is empty.
    """
    probability = [pa.field(f"p({name})", pa.float32()) for name in classes]
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("confidence", pa.float32()),
            pa.field("reason", pa.string()),
            *probability,
        ]
    )


REGION_FIELDS = (pa.field("image", pa.string()), pa.field("box", pa.string()))
"""The further columns of a file of predictions of regions, after the id.

``image``, the path of the whole image as a manifest has it, of other sources its id; ``box``, ``x y w h`` in the unit in which
it was given, empty for a whole image.
"""


def has_regions(listing: pa.Table) -> bool:
    """Whether some rows of a listing are regions."""
    locators = listing["locator"]
    marked = locators.filter(pc.match_substring(locators, REGION_MARK.decode()))
    return any(split_region(locator)[1] is not None for locator in marked.to_pylist())


def with_regions(
    batch: pa.RecordBatch, locators: Sequence[bytes], path_of: Callable[[bytes], str | None] | None = None
) -> pa.RecordBatch:
    """Rows of a file of predictions with `REGION_FIELDS`; ``path_of`` an image's locator is its path, or None for the id."""
    found = [split_region(locator) for locator in locators]
    boxes = [box for _, box in found]
    ids = batch.column("id").to_pylist()
    paths = [None if path_of is None else path_of(image) for image, _ in found]
    images = [
        path or (id_ if box is None else id_.rpartition("#")[0])
        for id_, box, path in zip(ids, boxes, paths, strict=True)
    ]
    texts = [None if box is None else " ".join(box.text.split(" ")[:4]) for box in boxes]
    columns = [pa.array(images, pa.string()), pa.array(texts, pa.string())]
    return pa.RecordBatch.from_arrays(
        [batch.columns[0], *columns, *batch.columns[1:]], schema=_with_region_fields(batch.schema)
    )


def _with_region_fields(schema: pa.Schema) -> pa.Schema:
    return pa.schema([schema.field(0), *REGION_FIELDS, *list(schema)[1:]])


NUMBERS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("predicted", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("reason", pa.string()),
    ]
)
"""The columns of a file of predicted numbers.

``id``; ``predicted``, in the unit of what was learned; ``low`` and ``high``, the limits of the prediction interval, empty for a
bundle without one; ``reason``, why there is no prediction.
"""


def check_top(top: int | None, bundle: Bundle) -> None:
    """Checks how many classes of each image are asked for.

    Raises:
        UsageError: The bundle has fewer, or predicts no classes.
    """
    if top is None:
        return
    if bundle.target is not None:
        raise UsageError(
            Message(Option("top", top), f": this bundle predicts {bundle.target_text}, not one class of several")
        )
    if top > len(bundle.classes):
        raise UsageError(Message(Option("top", top), f" is more than the {len(bundle.classes)} classes that there are"))


def top_schema(top: int) -> pa.Schema:
    """The columns of a file of the ``top`` most probable classes.

    The first four are those of `schema_of`; then ``label_2`` and ``confidence_2`` for the second class, and so on.
    """
    further = [
        field
        for place in range(2, top + 1)
        for field in (pa.field(f"label_{place}", pa.string()), pa.field(f"confidence_{place}", pa.float32()))
    ]
    return pa.schema([*schema_of(()), *further])


def classes_batch(
    ids: pa.Array,
    probabilities: npt.NDArray[np.float32],
    codes: npt.NDArray[np.integer[Any]],
    reasons: pa.Array,
    classes: Sequence[str],
    top: int | None = None,
) -> pa.RecordBatch:
    """Rows of a file of predicted classes.

    Args:
        ids: (n,) ids.
        probabilities: (n, K), NaN for images that could not be used.
        codes: (n,) the label of each, -1 for those.
        reasons: (n,) why they could not be used, or null.
        classes: K names.
        top: how many classes of each image to give, the label and then the most probable others; None for a column for each.
    """
    empty, names = codes < 0, pa.array(classes, pa.string())
    facts = [
        ids,
        names.take(pa.array(codes, mask=empty)),
        pa.array(of_label(probabilities, codes), mask=empty),
        reasons,
    ]
    if top is None:
        columns = [pa.array(np.ascontiguousarray(column), mask=empty) for column in probabilities.T]
        return pa.RecordBatch.from_arrays([*facts, *columns], schema=schema_of(classes))
    ranks = np.where(np.isnan(probabilities), 0, -probabilities)
    np.put_along_axis(
        ranks, np.maximum(codes, 0)[:, None], -np.inf, axis=1
    )  # by a threshold it may be the less probable one
    order = np.argsort(ranks, axis=1, kind="stable")[:, 1:top]
    further = [
        column
        for place in order.T
        for column in (
            names.take(pa.array(place, mask=empty)),
            pa.array(of_label(probabilities, place), mask=empty),
        )
    ]
    return pa.RecordBatch.from_arrays([*facts, *further], schema=top_schema(top))


def columns_for(bundle: Bundle, top: int | None = None) -> Sequence[str] | pa.Schema:
    """What ``predictions_file`` takes for a bundle: its classes, or the columns of numbers, several labels or top classes."""
    if top is not None:
        return top_schema(top)
    if bundle.target_type == MULTILABEL:
        return labels_schema(bundle.classes)
    return NUMBERS if bundle.target_type == CONTINUOUS else bundle.classes


def labels_schema(names: Sequence[str]) -> pa.Schema:
    """The columns of a file of several labels.

    ``id``; ``labels``, the predicted ones, as ``red|round`` (as a JSON list where a name has a ``|``), empty text for none;
    ``reason``, why there is no prediction; and for every label ``p(<label>)``, its probability. Of an image that could not be
    used all but id and reason is empty.
    """
    facts = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("labels", pa.string()),
        pa.field("reason", pa.string()),
    ]
    return pa.schema([*facts, *(pa.field(f"p({name})", pa.float32()) for name in names)])


def labels_batch(ids: pa.Array, scores: npt.NDArray[np.float64], reasons: pa.Array, bundle: Bundle) -> pa.RecordBatch:
    """Rows of a file of several labels.

    Args:
        ids: (n,) ids.
        scores: (n, K) scores, NaN for images that could not be used.
        reasons: (n,) why they could not, or null.
        bundle: whose scores they are.
    """
    empty = np.asarray(np.isnan(scores).any(axis=1))
    names = np.array(bundle.classes, dtype=object)
    joined: Callable[[list[str]], str] = "|".join if _are_joined(bundle.classes) else json.dumps
    above = scores > bundle.thresholds
    texts = [None if lacks else joined(list(names[above[row]])) for row, lacks in enumerate(empty)]
    probabilities = bundle.label_probabilities(scores).astype(np.float32)
    columns = [pa.array(np.ascontiguousarray(column), mask=empty) for column in probabilities.T]
    return pa.RecordBatch.from_arrays(
        [ids, pa.array(texts, pa.string()), reasons, *columns], schema=labels_schema(bundle.classes)
    )


@dataclass
class NumberSummary:
    """How many numbers were predicted, and what they are like.

    Attributes:
        count: of them.
        total: their sum.
        least: the least.
        greatest: the greatest.
    """

    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    greatest: float = float("-inf")

    def add(self, numbers: npt.NDArray[np.float64]) -> None:
        """Counts numbers, (n,)."""
        if len(numbers):
            self.count += len(numbers)
            self.total += float(numbers.sum())
            self.least = min(self.least, float(numbers.min()))
            self.greatest = max(self.greatest, float(numbers.max()))

    def as_dict(self) -> dict[str, float] | None:
        """``mean``, ``least`` and ``greatest``; None without any."""
        if not self.count:
            return None
        return {"mean": self.total / self.count, "least": self.least, "greatest": self.greatest}


def range_text(found: Mapping[str, float]) -> str:
    """A summary of numbers in words."""
    return f"numbers from {found['least']:.4g} to {found['greatest']:.4g}, mean {found['mean']:.4g}"


def numbers_batch(
    ids: pa.Array, numbers: npt.NDArray[np.float64], reasons: pa.Array, half_width: float | None
) -> pa.RecordBatch:
    """Rows of a file of predicted numbers.

    Args:
        ids: (n,) ids.
        numbers: (n,) predictions, NaN for images that could not be used.
        reasons: (n,) why they could not, or null.
        half_width: half the width of the prediction intervals; None for none.
    """
    empty = np.isnan(numbers)
    limits = [pa.nulls(len(ids), pa.float64())] * 2
    if half_width is not None:
        limits = [pa.array(numbers + offset, mask=empty) for offset in (-half_width, half_width)]
    return pa.RecordBatch.from_arrays([ids, pa.array(numbers, mask=empty), *limits, reasons], schema=NUMBERS)


def checked_target(to: str | PathLike[str], *, spared: Sequence[Any] = ()) -> Path:
    """The path to write, if a file can be made there.

    Args:
        to: the path.
        spared: files that must not be replaced, and bundles of which no file may be; what is no path is passed over.

    Raises:
        UsageError: it would replace what predictions are made from, its suffix names no format, or its folder is missing
            or cannot be written into.
    """
    path = Path(to)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot write predictions to {path}: its suffix must be one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise UsageError(f"cannot write predictions to {path}: it is a folder; name a file in it")
    for place in (Path(given) for given in spared if isinstance(given, str | PathLike)):
        inside = (place / MANIFEST).is_file() and path.resolve().is_relative_to(place.resolve())
        if inside or (path.exists() and place.exists() and path.samefile(place)):
            raise UsageError(
                f"cannot write predictions to {path}: that would replace what they are made from; name another file"
            )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UsageError(
            f"cannot write predictions to {path}: {error.strerror} ({path.parent}); make the folder, or name another"
        ) from error


@contextmanager
def predictions_file(
    path: Path, classes: Sequence[str] | pa.Schema, *, raw_ids: bool = False, regions: bool = False
) -> Iterator[Writer]:
    """Opens a file of predictions for writing; it appears when the block ends, and not at all when it fails.

    Args:
        path: the file.
        classes: of the bundle, or the columns of another kind of file.
        raw_ids: whether texts of a CSV file stay as they are, formulas as well; see `featurepipe.display`.
        regions: whether rows have `REGION_FIELDS`.

    Yields:
        A function that takes record batches of ``schema_of(classes)``, or of the columns given.

    Raises:
        DiskFull: no space is left.
    """
    schema = classes if isinstance(classes, pa.Schema) else schema_of(classes)
    exact = schema == NUMBERS  # whose digits are no noise
    if regions:
        schema = _with_region_fields(schema)
    with atomic_file(path) as file, ExitStack() as stack:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield Writer(stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd")).write_batch)
        elif suffix == ".csv":
            writer = stack.enter_context(pyarrow.csv.CSVWriter(file, _rounded_schema(schema)))
            yield Writer(lambda batch: writer.write_batch(batch if exact else _rounded(batch)), neutralise=not raw_ids)
        else:
            names = None if isinstance(classes, pa.Schema) else classes
            yield Writer(lambda batch: _write_lines(file, batch if exact else _rounded(batch), names))


def _write_lines(file: IO[bytes], batch: pa.RecordBatch, classes: Sequence[str] | None) -> None:
    """One JSON object per line; the probabilities are an object by class, and null without a prediction.

    Without classes the columns are as they are; several labels are a list, and their probabilities an object.
    """
    if classes is None and "labels" in batch.schema.names:
        first = batch.schema.names.index("reason") + 1
        batch, names = _rounded(batch), [name[2:-1] for name in batch.schema.names[first:]]
        for row in batch.to_pylist():
            facts = {name: row[name] for name in batch.schema.names[:first]}
            facts["labels"] = _parted(row["labels"], names)
            found = None if row["labels"] is None else {name: row[f"p({name})"] for name in names}
            file.write(json.dumps({**facts, "probabilities": found}, ensure_ascii=False).encode() + b"\n")
        return
    if classes is None:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch.to_pylist())
        return
    facts = batch.select(batch.schema.names[: batch.schema.names.index("reason") + 1]).to_pylist()
    columns = [batch.column(f"p({name})").to_pylist() for name in classes]
    for row, values in zip(facts, zip(*columns, strict=True), strict=True):
        found = None if row["label"] is None else dict(zip(classes, values, strict=True))
        file.write(json.dumps({**row, "probabilities": found}, ensure_ascii=False).encode() + b"\n")


def _are_joined(names: Sequence[str]) -> bool:
    """Whether labels of these names are written as ``red|round``, not as a JSON list."""
    return not any("|" in name for name in names)


def _parted(text: str | None, names: Sequence[str]) -> list[str] | None:
    """The labels in a text of ``labels_batch``."""
    if text is None:
        return None
    if _are_joined(names):
        return text.split("|") if text else []
    parted: list[str] = json.loads(text)
    return parted


def _rounded_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(pa.float64()) if pa.types.is_floating(field.type) else field for field in schema])


def _rounded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Probabilities as the float64 that print with few digits."""
    schema = _rounded_schema(batch.schema)
    columns = [_six_digits(column) if pa.types.is_floating(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _six_digits(column: pa.Array) -> pa.Array:
    values: np.ndarray[Any, Any] = column.to_numpy(zero_copy_only=False).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = DIGITS - 1 - np.floor(np.log10(np.abs(values)))
        # Division by a power of ten gives the float64 nearest to the decimal number, multiplication by 0.1 ** n does not.
        small = np.where(np.isfinite(places) & (places < 300), places, 0)
        rounded = np.round(values * 10.0**small) / 10.0**small
    return pa.array(rounded, pa.float64(), mask=~np.isfinite(values))


def of_label(probabilities: npt.NDArray[np.float32], codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
    """(n,) the probability of each row's label, of (n, K) probabilities and (n,) labels (-1 for none, which gives any)."""
    return np.take_along_axis(probabilities, np.maximum(codes, 0)[:, None], axis=1)[:, 0]


@dataclass(frozen=True)
class Scored:
    """What became of consecutive rows; it travels from a worker of a cluster to whoever writes the file.

    Attributes:
        numbers: int64 (n,), the rows, ascending.
        codes: int32 (n,), the label of each (of a number or several labels 0), -1 for images that could not be
            used.
        probabilities: float32 (n, K), NaN for those.
        estimates: float64 (n,), predicted numbers, or (n, K), scores of several labels; NaN for those; None of a bundle with
            classes.
        having: int64 (K,), how many of the images have each of several labels.
        remarks: how many images were decoded in which way that is to be said, see `Loaded.remarks`.
        reasons: why an image could not be used, by row.
        damage: what is wrong with an image that was kept although it is damaged, by row.
    """

    numbers: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float32]
    reasons: Mapping[int, str]
    damage: Mapping[int, str] = field(default_factory=dict)
    estimates: npt.NDArray[np.float64] | None = None
    having: npt.NDArray[np.int64] | None = None
    remarks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, ready: ReadyBundle, group: Sequence[FeatureBatch], *, first: int = 0) -> Scored:
        """Scores consecutive rows of a listing that begins at row ``first`` of the whole one."""
        rows = np.concatenate([batch.rows for batch in group])
        reasons = {row: reason for batch in group for row, reason in batch.rejects}
        damage = {row + first: what for batch in group for row, what in batch.damage}
        numbers = np.sort(np.concatenate([rows, np.fromiter(reasons, np.int64, len(reasons))]))
        place = np.searchsorted(numbers, rows)
        probabilities = np.full((len(numbers), len(ready.bundle.classes)), np.nan, np.float32)
        codes = np.full(len(numbers), -1, np.int32)
        reasons = {row + first: reason for row, reason in reasons.items()}
        estimates: npt.NDArray[np.float64] | None = None
        having = None
        if ready.bundle.target_type == MULTILABEL:
            estimates = np.full((len(numbers), len(ready.bundle.classes)), np.nan)
            estimates[place] = ready.label_scores(group)
            codes[place] = 0
            having = (estimates > ready.bundle.thresholds).sum(axis=0)
        elif ready.bundle.target_type == CONTINUOUS:
            estimates = np.full(len(numbers), np.nan)
            estimates[place] = ready.numbers(group)
            codes[place] = 0
        else:
            exact = ready.probabilities(group)
            probabilities[place] = exact
            codes[place] = ready.bundle.codes(exact)
        remarks = sum((Counter(batch.remarks) for batch in group), Counter[str]())
        return cls(numbers + first, codes, probabilities, reasons, damage, estimates, having, remarks)

    def rows_of_file(self, ids: pa.ChunkedArray, bundle: Bundle, top: int | None = None) -> pa.RecordBatch:
        """The rows as a file of the bundle's predictions has them; ``ids`` are those of the whole listing."""
        own = ids.take(pa.array(self.numbers)).combine_chunks()
        reasons = pa.array([self.reasons.get(int(number)) for number in self.numbers], pa.string())
        if self.estimates is not None and self.having is not None:
            return labels_batch(own, self.estimates, reasons, bundle)
        if self.estimates is not None:
            return numbers_batch(own, self.estimates, reasons, bundle.half_width)
        return classes_batch(own, self.probabilities, self.codes, reasons, bundle.classes, top)


@dataclass
class Predictions:
    """What became of the rows of a listing.

    Attributes:
        predicted: images with a prediction.
        labels: how many images were given each class, by its number.
        reasons: why an image could not be used, by row.
        damage: what is wrong with an image that was kept although it is damaged, by row.
        remarks: how many images were decoded in which way that is to be said, see `Loaded.remarks`.
        neutralised: cells of the file that would have been formulas in a spreadsheet, and were changed.
        estimates: what predicted numbers are like.
        writing: seconds in writing.
        wall: seconds of it all, from the first image on.
    """

    predicted: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)
    damage: dict[int, str] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    neutralised: int = 0
    estimates: NumberSummary = field(default_factory=NumberSummary)
    writing: float = 0.0
    wall: float = 0.0

    def add(self, scored: Scored) -> None:
        """Counts rows."""
        codes = scored.codes[scored.codes >= 0]
        self.predicted += len(codes)
        if scored.having is not None:
            self.labels.update(dict(enumerate(scored.having.tolist())))
        elif scored.estimates is None:
            self.labels.update(codes.tolist())
        else:
            self.estimates.add(scored.estimates[scored.codes >= 0])
        self.reasons.update(scored.reasons)
        self.damage.update(scored.damage)
        self.remarks.update(scored.remarks)
