"""What every step of a night sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featurepipe.jobs.job import Job
from featurepipe.jobs.tonights_team import TeamOf, nobody

if TYPE_CHECKING:
    from featurepipe.interrupt import StopRequest
    from featurepipe.store import FeatureStore


@dataclass(frozen=True)
class Night:
    """One run of a job, as its steps see it.

    A step is a function ``(night, table) -> dict`` of plain JSON values: what it did; ``{"skipped": why}`` when there was
    nothing to do; ``"warnings"`` holds texts for the summary. It fails by raising a `FeaturepipeError`.

    Attributes:
        job: the job file.
        dataset: the dataset's name; empty if nobody knows it, and then only steps of the whole store are taken.
        store: the feature store.
        run_id: of this run; its record is ``runs/<run_id>.json``.
        before: the dataset's snapshot before tonight's extractions, None on the first night. Each extraction of the night
            writes a snapshot, so that the last but one is tonight's, too, where there are several feature spaces.
        stop: asks steps to stop.
        say: a line for people.
        silent: what verbs are told, so that only ``say`` speaks.
        extracted: the run records of tonight's extractions that were done.
        record: the run record as far as it is known: counts, changes, seconds, the steps before this one,
            and the status that the night will end with if all that is left succeeds. In the store it is still running.
        team: the night's workers, see `featurepipe.jobs.tonights_team`.
    """

    job: Job
    dataset: str
    store: FeatureStore
    run_id: str
    before: str | None
    stop: StopRequest
    say: Callable[[str], None]
    silent: bool
    extracted: tuple[dict[str, Any], ...]
    record: dict[str, Any]
    team: TeamOf = nobody
