"""Where an extraction computes: in this process, or (`on_cluster`) in those of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa

from featurepipe.backbones import Backbone, Column
from featurepipe.backbones.engine import Engine
from featurepipe.backbones.precision import choose_precision
from featurepipe.extraction.auto import MeasurePrecision
from featurepipe.extraction.machine import Machine, settle_machine
from featurepipe.extraction.options import Options
from featurepipe.extraction.stream import load_sample
from featurepipe.images import Source
from featurepipe.progress import Progress

if TYPE_CHECKING:
    from featurepipe.extraction.compute import Outcome
    from featurepipe.extraction.prepare import Job

SAMPLE = 16
"""Images on which precisions are compared."""


class Place(Protocol):
    """Settles what depends on where images are computed, and has them computed there."""

    def check(self, store: Path | None) -> None:
        """Refuses what cannot compute, or does not see the store."""
        ...

    def machine(self, options: Options) -> Machine:
        """Device, batch size and threads; see `settle_machine`."""
        ...

    def precision(
        self, source: Source, listing: pa.Table, backbone: Backbone, columns: Sequence[Column], machine: Machine
    ) -> MeasurePrecision:
        """What compares precisions on a source's first images, when asked to."""
        ...

    def engines(self) -> dict[frozenset[Column], Engine]:
        """The networks built so far in this process, by their columns."""
        ...

    def rate(self, job: Job, images: int) -> tuple[float | None, int]:
        """Images per second over a sample of those to be read, None without one, and the size of the sample."""
        ...

    def compute(self, job: Job, run_id: str, outcome: Outcome, stop: Callable[[], bool], progress: Progress) -> None:
        """Computes what the plan asks for; see `featurepipe.extraction.compute.compute`."""
        ...


class Here:
    """This process."""

    def __init__(self) -> None:
        self._measurement: PrecisionMeasurement | None = None

    def check(self, store: Path | None) -> None:
        """Finds nothing to refuse."""

    def machine(self, options: Options) -> Machine:
        """Settles it for this machine."""
        return settle_machine(options.device, options.batch_size, options.workers, options.decode)

    def precision(
        self, source: Source, listing: pa.Table, backbone: Backbone, columns: Sequence[Column], machine: Machine
    ) -> MeasurePrecision:
        """Compares precisions here."""
        self._measurement = PrecisionMeasurement(source, listing, backbone, columns, machine)
        return self._measurement

    def engines(self) -> dict[frozenset[Column], Engine]:
        """The network that was built to compare precisions, if one was."""
        measured = self._measurement
        return {frozenset(measured.columns): measured.engine} if measured and measured.engine else {}

    def rate(self, job: Job, images: int) -> tuple[float | None, int]:
        """Times a sample here."""
        from featurepipe.extraction.estimate import sample_rate

        return sample_rate(job, images)

    def compute(self, job: Job, run_id: str, outcome: Outcome, stop: Callable[[], bool], progress: Progress) -> None:
        """Computes here."""
        from featurepipe.extraction.compute import compute

        compute(job, run_id, outcome, stop, progress)


class PrecisionMeasurement:
    """Compares a reduced precision with fp32 on a source's first images, when asked to.

    Attributes:
        columns: whose features must agree.
        engine: what was built for the precision that was chosen, if anything was.
    """

    def __init__(
        self, source: Source, listing: pa.Table, backbone: Backbone, columns: Sequence[Column], machine: Machine
    ) -> None:
        self._source, self._listing, self._machine = source, listing, machine
        self._backbone, self.columns = backbone, columns
        self.engine: Engine | None = None

    def __call__(self, tried: str | None, intensity: str) -> tuple[str, str]:
        """The precision to take, and why; see `MeasurePrecision`."""
        rows = np.arange(self._listing.num_rows)
        sample = load_sample(self._source, self._listing, self._backbone, self._machine, rows, SAMPLE, intensity)
        choice, self.engine = choose_precision(
            self._backbone,
            self.columns,
            sample,
            self._machine.device,
            tried=tried,
            batch_size=self._machine.batch_size,
        )
        return choice.precision, choice.reason
