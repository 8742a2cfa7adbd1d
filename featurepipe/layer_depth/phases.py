"""The phases of a long comparison: which of how many is under way, about how long they take, and what a stop keeps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from featurepipe.errors import Interrupted
from featurepipe.layer_depth.folds import CHOOSING, ENOUGH_TO_CHOOSE
from featurepipe.layer_depth.measure import NODE_SECONDS
from featurepipe.layer_depth.probes import TURNABLE, TURNED_FROM
from featurepipe.layer_depth.study import DepthColumn, Protocol

EXTRACT, MEASURE, JOIN, DESCRIBE = "extract", "measure", "side by side", "describe"
PHASES = {
    EXTRACT: "the features of all columns, from one pass over the images",
    MEASURE: "a head on each column and each fold",
    JOIN: "a head on the two, the three and all of the best columns together",
    DESCRIBE: "timing the network up to each column, likeness of columns, scores without heads, every image",
}
"""The phases of `featurepipe.depth`, and what is done in each."""
SETS = 3
"""Sets of columns side by side that are measured at most."""
KEPT = "what was computed and measured is kept in the store; the same command goes on from there"
KEPT_OF_EXTRACTION = "features that were written to the store, if any, are kept; the same command goes on from there"


class Phases:
    """Says each phase as it begins, takes its time, and says what is kept where Ctrl-C ends it.

    Args:
        names: of all phases, in order, and what is done in each.
        say: told of each.

    Attributes:
        seconds: of the phases that have ended.
    """

    def __init__(self, names: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._names, self._say = names, say
        self.seconds: dict[str, float] = {}

    def title(self, name: str) -> str:
        """Which of how many a phase is, and its name."""
        return f"phase {list(self._names).index(name) + 1} of {len(self._names)}, {name}"

    @contextmanager
    def phase(self, name: str, more: str = "") -> Iterator[None]:
        """Runs a phase.

        Args:
            name: which.
            more: what else there is to say of it.

        Raises:
            Interrupted: Ctrl-C, where nothing inside the phase has caught it.
        """
        self._say(f"{self.title(name)}: {self._names[name]}{more}")
        start = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt as error:
            kept = KEPT_OF_EXTRACTION if name == EXTRACT else KEPT
            raise Interrupted(f"stopped by SIGINT in {self.title(name)}: {kept}", signal.SIGINT) from error
        self.seconds[name] = time.perf_counter() - start


def divisions_of(rows: int) -> int:
    """How many divisions of so many training images choose a head's parameters; see `with_choices` of the folds."""
    return min(CHOOSING, -(-ENOUGH_TO_CHOOSE // max(1, rows // CHOOSING)))


class HeadSeconds(NamedTuple):
    """How long a head takes on one core, as recorded: for each fit ``start + scale * rows^by_rows * values^by_values``.

    Attributes:
        start: seconds of a fit of next to nothing.
        scale: seconds of a fit of one image with one value.
        by_rows: the power of the training images.
        by_values: the power of the values of an image; of a head that works in the span of the images, where these are fewer, of
            their number.
        by_classes: whether the scale is that of 10 classes, and grows with them.
    """

    start: float
    scale: float
    by_rows: float
    by_values: float
    by_classes: bool = False


HEAD_SECONDS: Mapping[str, HeadSeconds] = {
    "logistic": HeadSeconds(0.022, 2.75e-6, 0.2, 1.45, by_classes=True),
    "linear-svm": HeadSeconds(0.0, 6.58e-10, 0.67, 2.75, by_classes=True),
    "ridge": HeadSeconds(0.0, 4.85e-7, 0.31, 1.64),
    "lda": HeadSeconds(0.0, 1.87e-6, 0.0, 1.95),
    "knn": HeadSeconds(0.0, 1.16e-6, 0.73, 0.97),
    "centroid": HeadSeconds(0.0, 1.67e-6, 0.68, 0.68),
    "rbf-svm": HeadSeconds(0.0, 0.143, 0.15, 0.12),
    "xgboost": HeadSeconds(0.0, 3.63e-5, 0.93, 0.71, by_classes=True),
}
"""Of Fashion-MNIST and emoji, 10 classes, 40 to 1,600 training images, 64 to 1,280 values, and of logistic up to 5,000; all
parameters that are tried count to the fit of a division. The recorded seconds are in tests/layer_depth/test_text.py."""
SPAN_SECONDS = 3e-10
"""Of going over to the span of the images, for each value of each pair of them."""


def fit_seconds(rows: int, width: int, classes: int, *, divisions: int | None = None, head: str = "logistic") -> float:
    """About how long a head takes on one column and fold, on one core: its grid on every division, and the last fit.

    Args:
        rows: training images.
        width: values of an image.
        classes: to tell apart.
        divisions: of the training images; None for as many as depth takes.
        head: a key of `HEAD_SECONDS`.
    """
    known = HEAD_SECONDS[head]
    values = min(rows, width) if head in TURNABLE else width
    scale = known.scale * (classes / 10 if known.by_classes else 1.0)
    fits = 1 + (divisions_of(rows) if divisions is None else divisions)
    span = SPAN_SECONDS * rows * rows * width if head in TURNABLE and width > TURNED_FROM * rows else 0.0
    each: float = known.start + scale * rows**known.by_rows * values**known.by_values
    return span + fits * each


def not_estimated(heads: Sequence[str]) -> list[str]:
    """The heads of which no estimate of time is known."""
    return [head for head in heads if head not in HEAD_SECONDS]


def outlook(
    protocol: Protocol, columns: Sequence[DepthColumn], *, networks: int, images: int, classes: int, jobs: int | None
) -> dict[str, float | None]:
    """About how long each phase after the extraction takes, in seconds; None where nothing is known of any head.

    Heads that nothing is known of (`not_estimated`) do not count.

    Args:
        protocol: how it is measured.
        columns: what is compared.
        networks: the pretrained one, and the control.
        images: of the dataset.
        classes: of its labels; of numbers 1.
        jobs: fits at once; None for one per CPU.
    """
    cells = (protocol.folds or 1) * protocol.seeds
    rows = round(images * (1 - 1 / (protocol.folds or 5)))
    heads = [head for head in protocol.heads if head in HEAD_SECONDS]
    if not heads:
        return {MEASURE: None, JOIN: None, DESCRIBE: None}

    def each(width: int) -> float:
        """The mean over heads: which of them is best, and so fitted again, is not known yet."""
        return sum(fit_seconds(rows, width, classes, head=head) for head in heads) / len(heads)

    single = [each(column.width) for column in columns]
    widest = sum(column.width for column in columns)
    at_once = jobs or os.cpu_count() or 1
    return {
        MEASURE: len(heads) * networks * cells * sum(single) / at_once,
        JOIN: SETS * cells * each(widest) / at_once,
        DESCRIBE: NODE_SECONDS * len(columns) + (protocol.folds or 1) * max(single),
    }
