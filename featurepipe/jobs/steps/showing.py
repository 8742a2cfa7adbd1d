"""What others see of a night: the page of the last nights, figures for Prometheus."""

from __future__ import annotations

from typing import Any

from featurepipe.jobs.job import MetricsTable, ReportTable
from featurepipe.jobs.night import Night


def report(night: Night, table: ReportTable) -> dict[str, Any]:
    """Writes the page of the last nights, with tonight as it stands."""
    from featurepipe.reporting.nights import nights_report

    table.to.parent.mkdir(parents=True, exist_ok=True)
    page = nights_report(night.store, table.to, last=table.last, job=night.job.name, silent=night.silent)
    return {"file": str(page), "text": page.name}


def metrics(night: Night, table: MetricsTable) -> dict[str, Any]:
    """Writes the figures of tonight as it stands, whatever became of it."""
    from featurepipe.jobs.prometheus import write_metrics

    path = write_metrics(table.prometheus, night.record, night.store)
    return {"file": str(path), "text": path.name}
