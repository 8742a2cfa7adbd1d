"""What others see of a night: the page of the last nights, figures for Prometheus."""

from __future__ import annotations

import time
from typing import Any

from featurepipe.jobs.job import MetricsTable, ReportTable
from featurepipe.jobs.step import Night, within_time

PATIENCE = 5.0
"""Seconds that figures may take; a night that was stopped writes them, too."""


def report(night: Night, table: ReportTable) -> dict[str, Any]:
    """Writes the page of the last nights, with tonight as it stands."""
    from featurepipe.reporting.nights import nights_report

    table.to.parent.mkdir(parents=True, exist_ok=True)
    page = nights_report(
        night.store, table.to, last=table.last, job=night.job.name, tonight=night.record, silent=night.silent
    )
    return {"file": str(page), "text": page.name}


def metrics(night: Night, table: MetricsTable) -> dict[str, Any]:
    """Writes the figures of tonight as it stands, whatever became of it."""
    from featurepipe.jobs.prometheus import write_metrics

    def work() -> dict[str, Any]:
        path = write_metrics(table.prometheus, night.record, night.store)
        return {"file": str(path), "text": path.name}

    return within_time(time.monotonic() + PATIENCE, work, "the figures stay those of an earlier night")
