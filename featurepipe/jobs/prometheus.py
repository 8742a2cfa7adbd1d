"""What a run did, as figures in the text format of Prometheus, for the textfile collector of its node exporter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from featurepipe.display import displayed
from featurepipe.errors import UsageError
from featurepipe.monitoring.standing_warnings import prediction_tests, standing
from featurepipe.records import is_success

if TYPE_CHECKING:
    from featurepipe.store import FeatureStore

STATUSES = ("done", "out of time", "interrupted", "failed")


def write_metrics(path: str | os.PathLike[str], record: Mapping[str, Any], store: FeatureStore) -> Path:
    """Writes the figures of a run, done or failed; the file is replaced in one step.

    Args:
        path: the file, ``*.prom``; its folder is made if it is missing.
        record: the run record.
        store: where it ran, and where the records of earlier runs are.

    Raises:
        UsageError: the file cannot be written.
    """
    target = Path(path)
    registry = registry_of(record, store.runs())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(target), registry)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}; name another file") from error
    return target


def registry_of(record: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> CollectorRegistry:
    """Gathers the figures of a run in a registry of their own, each labelled with its job.

    Args:
        record: the run record.
        runs: records of all runs of the store, oldest first; the run's own may be among them.
    """
    figures = _Figures(CollectorRegistry(), str(record["job"]))
    earlier = [run for run in runs if run.get("job") == record["job"] and run["run_id"] != record["run_id"]]
    successes = [_ended(run) for run in [*earlier, record] if is_success(run)]
    figures.gauge(
        "last_success_timestamp_seconds",
        "When the job last ended with all its work done; 0 if it never has.",
        successes[-1] if successes else 0.0,
    )
    figures.gauge("last_run_timestamp_seconds", "When the job last ended.", _ended(record))
    figures.gauge("last_run_exit_code", "How the job last ended; 0 and 3 are good.", record["exit_code"])
    figures.gauges(
        "last_run_status",
        "How the job last ended: 1 for that status, 0 for the others.",
        "status",
        {status: float(status == record["status"]) for status in STATUSES},
    )
    figures.gauge("run_duration_seconds", "How long the last run took.", record["seconds"]["wall"])
    figures.images(record.get("counts_by_space", {}))
    figures.gauges("changes", "What happened to images since the run before.", "kind", record["changes"])
    figures.gauge(
        "images_per_second", "Images computed per second in the last run.", record["images_per_second"] or 0.0
    )
    for name, key, text in (
        ("store_bytes", "store_bytes", "What the store takes on its disk."),
        ("store_free_bytes", "free_bytes", "What is free on the store's disk."),
    ):
        if record.get(key) is not None:
            figures.gauge(name, text, record[key])
    runs = [*(run for run in runs if run["run_id"] != record["run_id"]), record]
    warnings = standing(runs, job=str(record["job"]))
    text = "Drift warnings of the job that nobody has accepted and whose images are not gone."
    figures.gauge("drift_warnings_standing", text, len(warnings))
    p_values, effects = _drift(record)
    figures.gauges(
        "drift_p_value",
        "Chance of a difference as large if nothing had changed, adjusted for the number of columns.",
        "column",
        p_values,
    )
    figures.gauges("drift_effect", "How far this run's images are from those of before.", "column", effects)
    return figures.registry


class _Figures:
    """Gauges of one job."""

    def __init__(self, registry: CollectorRegistry, job: str) -> None:
        self.registry = registry
        self._job = displayed(job)

    def gauge(self, name: str, text: str, value: float) -> None:
        Gauge(f"featurepipe_{name}", text, ["job"], registry=self.registry).labels(self._job).set(value)

    def images(self, by_space: Mapping[str, Mapping[str, float]]) -> None:
        """Of each feature space by itself: one may know images that another has to compute."""
        labels = ["job", "space", "outcome"]
        text = "Images of the last run, in each feature space."
        gauge = Gauge("featurepipe_images", text, labels, registry=self.registry)
        for space, counts in by_space.items():
            for outcome, count in counts.items():
                gauge.labels(self._job, displayed(space), outcome).set(count)

    def gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> None:
        gauge = Gauge(f"featurepipe_{name}", text, ["job", label], registry=self.registry)
        for key, value in values.items():
            gauge.labels(self._job, displayed(key)).set(value)


def _ended(run: Mapping[str, Any]) -> float:
    """Seconds since the epoch; of a run that has not ended, now."""
    return datetime.fromisoformat(run["ended"]).timestamp() if "ended" in run else datetime.now(UTC).timestamp()


def _drift(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """P-value and effect of each column, and of a bundle's predictions, if the step drift came to test them."""
    results = [entry.get("result") or {} for entry in record["steps"] if entry["step"] == "drift"]
    tests = [test for result in results for test in result.get("columns") or ()]
    several = len({test.get("space") for test in tests}) > 1
    names = [f"{test.get('space')}/{test['column']}" if several else test["column"] for test in tests]
    p_values = {name: test["adjusted"] for name, test in zip(names, tests, strict=True)}
    effects = {name: test["effect"] for name, test in zip(names, tests, strict=True) if test["effect"] is not None}
    for name, test, effect in (one for result in results for one in prediction_tests(result)):
        p_values[name], effects[name] = test["adjusted"], effect
    return p_values, effects
