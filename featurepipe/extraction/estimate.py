"""What an extraction would cost, from its plan and a short timed sample."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from featurepipe.backbones import Column
from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor
from featurepipe.extraction.prepare import ExtractionSpec
from featurepipe.features.session import Sample, SampleContext, sample_rate

ITEM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Estimate:
    """The answer of ``--dry-run``.

    Attributes:
        dataset: name of the snapshots.
        listed: images in the source.
        known: images that need nothing.
        rejected: images that were rejected before and have not changed.
        to_read: images that would be read; among them are moved and copied ones, which cost a read but no forward.
        new: of these, images never seen under this name, size and time; the others lack a column.
        seconds: expected duration, or None when nothing could be sampled.
        images_per_second: measured on the sample, or None.
        sampled: images in the timed sample.
        bytes_per_column: bytes of features that each column would add, if no image is a copy of another.
        space: the feature space that would be used.
        new_space: whether it would be a new one, and why.
        listing: what the source lists, ignores and guesses; see `ListingSummary`.
    """

    dataset: str
    listed: int
    known: int
    rejected: int
    to_read: int
    new: int
    seconds: float | None
    images_per_second: float | None
    sampled: int
    bytes_per_column: dict[str, int]
    space: dict[str, Any]
    new_space: str | None
    listing: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"dry_run": True, **asdict(self)}


def estimate(job: ExtractionSpec, sample_size: int, executor: Executor | None = None) -> Estimate:
    """Times a sample of the images that would be read where they would be computed (by default here), and extrapolates."""
    plan = job.plan
    executor = executor or LocalExecutor()
    sample = Sample(plan.listing, plan.todo, sample_size)
    rate, sampled = executor.once(sample_rate, sample, context=SampleContext.on(executor, job.session, job.source))
    if rate is not None:
        rate *= max(executor.count(), 1)  # the others are taken to be as fast
    return Estimate(
        dataset=job.dataset,
        listed=plan.listing.num_rows,
        known=plan.known,
        rejected=len(plan.rejected),
        to_read=len(plan.todo),
        new=int((~plan.has_key).sum()),
        seconds=len(plan.todo) / rate if rate else (None if len(plan.todo) else 0.0),
        images_per_second=rate,
        sampled=sampled,
        bytes_per_column={
            str(column): _lacking(job, column) * _bytes_per_image(job, column) for column in job.session.columns
        },
        space=dict(job.fields),
        new_space=job.why_new,
        listing=job.listing.as_dict(),
    )


def _lacking(job: ExtractionSpec, column: Column) -> int:
    """How many of the images to read lack the column, as far as their keys are known."""
    todo = job.plan.todo
    if job.space is None:
        return len(todo)
    keys = job.plan.keys[todo][job.plan.has_key[todo]]
    return len(todo) - int(job.space.index([str(column)]).contains(keys).sum())


def _bytes_per_image(job: ExtractionSpec, column: Column) -> int:
    return math.prod(job.session.backbone.feature_shape(column)) * ITEM_BYTES[job.session.settled.dtype]
