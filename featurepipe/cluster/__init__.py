"""The same verbs on a Dask cluster: connecting, knowing the workers, and keeping work in flight. It knows none of the verbs.

Dask schedules, retries and moves work; this room decides which workers are fit, how much is asked for at a time, and what the
user is told. Names load what they need when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurepipe.cluster.connection import connect
    from featurepipe.cluster.flow import results
    from featurepipe.cluster.spreading import SpreadFeatures, spread
    from featurepipe.cluster.team import Team, WorkerFacts
    from featurepipe.cluster.worker import one_at_a_time, stop_of_task
    from featurepipe.errors import ClusterError, WorkerRefused

__all__ = [
    "ClusterError",
    "SpreadFeatures",
    "Team",
    "WorkerFacts",
    "WorkerRefused",
    "connect",
    "one_at_a_time",
    "results",
    "spread",
    "stop_of_task",
]

_HOMES = {
    "ClusterError": "featurepipe.errors",
    "SpreadFeatures": "featurepipe.cluster.spreading",
    "Team": "featurepipe.cluster.team",
    "WorkerFacts": "featurepipe.cluster.team",
    "WorkerRefused": "featurepipe.errors",
    "connect": "featurepipe.cluster.connection",
    "one_at_a_time": "featurepipe.cluster.worker",
    "results": "featurepipe.cluster.flow",
    "spread": "featurepipe.cluster.spreading",
    "stop_of_task": "featurepipe.cluster.worker",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featurepipe.cluster' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
