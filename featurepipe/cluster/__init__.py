"""The same verbs on a Dask cluster: connecting, knowing the workers, and keeping work in flight. It knows none of the verbs.

Dask schedules, retries and moves work; this room decides which workers are fit, how much is asked for at a time, and what the
user is told. Names load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurepipe.errors import ClusterError, WorkerRefused
from featurepipe.lazy_names import lazy_names

if TYPE_CHECKING:
    from featurepipe.cluster.connection import connect
    from featurepipe.cluster.flow import results
    from featurepipe.cluster.spreading import SpreadFeatures, spread
    from featurepipe.cluster.team import Team, WorkerFacts
    from featurepipe.cluster.worker import one_at_a_time, stop_of_task, this_worker

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
    "this_worker",
]

_HOMES = {
    "SpreadFeatures": "spreading",
    "Team": "team",
    "WorkerFacts": "team",
    "connect": "connection",
    "one_at_a_time": "worker",
    "results": "flow",
    "spread": "spreading",
    "stop_of_task": "worker",
    "this_worker": "worker",
}


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
