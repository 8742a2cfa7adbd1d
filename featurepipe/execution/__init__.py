"""Where work runs: executors, which map a function over shards, in this process or on the workers of a Dask cluster.

Dask schedules, retries and moves work; this package decides which workers are fit, how much is in flight at a time, and what the
user is told. It knows no command. Names load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurepipe.errors import ClusterError, WorkerRefused
from featurepipe.lazy_names import lazy_names

if TYPE_CHECKING:
    from featurepipe.execution.dask import DaskExecutor, connect
    from featurepipe.execution.executor import Executor, Report, Stop, Worker, WorkerFacts
    from featurepipe.execution.local import LocalExecutor, ProcessExecutor, executor_on
    from featurepipe.execution.row_shards import SpreadFeatures, spread

__all__ = [
    "ClusterError",
    "DaskExecutor",
    "Executor",
    "LocalExecutor",
    "ProcessExecutor",
    "Report",
    "SpreadFeatures",
    "Stop",
    "Worker",
    "WorkerFacts",
    "WorkerRefused",
    "connect",
    "executor_on",
    "spread",
]

_HOMES = {
    "DaskExecutor": "dask",
    "Executor": "executor",
    "LocalExecutor": "local",
    "ProcessExecutor": "local",
    "Report": "executor",
    "SpreadFeatures": "row_shards",
    "Stop": "executor",
    "Worker": "executor",
    "WorkerFacts": "executor",
    "connect": "dask",
    "executor_on": "local",
    "spread": "row_shards",
}


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
