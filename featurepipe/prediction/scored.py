"""What a bundle says of consecutive rows of a listing, and as rows of a file of predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.features.stream import FeatureBatch
from featurepipe.prediction.files import schema_of
from featurepipe.prediction.ready import ReadyBundle


@dataclass(frozen=True)
class Scored:
    """What became of consecutive rows; it travels from a worker of a cluster to whoever writes the file.

    Attributes:
        numbers: int64 (n,), the rows, ascending.
        codes: int32 (n,), the most probable class of each, -1 for images that could not be used.
        probabilities: float32 (n, K), NaN for those.
        reasons: why an image could not be used, by row.
        damage: what is wrong with an image that was kept although it is damaged, by row.
    """

    numbers: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float32]
    reasons: Mapping[int, str]
    damage: Mapping[int, str] = field(default_factory=dict)

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
        exact = ready.probabilities(group)
        probabilities[place] = exact
        codes[place] = exact.argmax(axis=1)
        reasons = {row + first: reason for row, reason in reasons.items()}
        return cls(numbers + first, codes, probabilities, reasons, damage)

    def rows_of_file(self, ids: pa.ChunkedArray, classes: Sequence[str]) -> pa.RecordBatch:
        """The rows as a file of predictions has them; ``ids`` are those of the whole listing."""
        empty = self.codes < 0
        columns = [
            ids.take(pa.array(self.numbers)).combine_chunks(),
            pa.array(classes, pa.string()).take(pa.array(self.codes, mask=empty)),
            pa.array(self.probabilities.max(axis=1), mask=empty),
            pa.array([self.reasons.get(int(number)) for number in self.numbers], pa.string()),
            *(pa.array(np.ascontiguousarray(column), mask=empty) for column in self.probabilities.T),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema_of(classes))


@dataclass
class Predictions:
    """What became of the rows of a listing.

    Attributes:
        predicted: images with a prediction.
        labels: how many images were given each class, by its number.
        reasons: why an image could not be used, by row.
        damage: what is wrong with an image that was kept although it is damaged, by row.
        neutralised: cells of the file that would have been formulas in a spreadsheet, and were changed.
        writing: seconds in writing.
        wall: seconds of it all, from the first image on.
    """

    predicted: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)
    damage: dict[int, str] = field(default_factory=dict)
    neutralised: int = 0
    writing: float = 0.0
    wall: float = 0.0

    def add(self, scored: Scored) -> None:
        """Counts rows."""
        codes = scored.codes[scored.codes >= 0]
        self.predicted += len(codes)
        self.labels.update(codes.tolist())
        self.reasons.update(scored.reasons)
        self.damage.update(scored.damage)
