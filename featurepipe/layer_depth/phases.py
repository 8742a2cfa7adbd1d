"""The phases of a long comparison: which of how many is under way, about how long they take, and what a stop keeps."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from featurepipe.errors import Interrupted
from featurepipe.heads.families import SHARED_PASSES
from featurepipe.layer_depth.folds import CHOOSING, ENOUGH_TO_CHOOSE
from featurepipe.layer_depth.measure import NODE_SECONDS
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


def fit_seconds(rows: int, width: int, classes: int, *, divisions: int | None = None) -> float:
    """About how long a logistic head takes on one column and fold, on one core: every C on every division, and the last fit.

    Args:
        rows: training images.
        width: values of an image; a head on more than there are images works in the span of these.
        classes: to tell apart.
        divisions: of the training images; None for as many as depth takes.
    """
    values = classes * rows * min(rows, width)
    fits = 1 + (divisions_of(rows) if divisions is None else divisions)
    return fits * (0.25 + 4e-4 * math.sqrt(values) + 2e-8 * values)  # of Fashion-MNIST, 100 to 2,000 images


def not_estimated(heads: Sequence[str]) -> list[str]:
    """The heads of which no estimate of time is known."""
    return [head for head in heads if head not in SHARED_PASSES]


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
    single = [fit_seconds(rows, column.width, classes) for column in columns]
    widest = sum(column.width for column in columns)
    at_once = jobs or os.cpu_count() or 1
    heads = len(protocol.heads) - len(not_estimated(protocol.heads))
    if not heads:
        return {MEASURE: None, JOIN: None, DESCRIBE: None}
    return {
        MEASURE: heads * networks * cells * sum(single) / at_once,
        JOIN: SETS * cells * fit_seconds(rows, widest, classes) / at_once,
        DESCRIBE: NODE_SECONDS * len(columns) + (protocol.folds or 1) * max(single),
    }
