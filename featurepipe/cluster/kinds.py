"""Each kind of cluster and the class of Dask's that starts it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from featurepipe.cluster.table import ClusterTable


@contextmanager
def opened(table: ClusterTable) -> Iterator[Any]:
    """What a client connects to, for as long as the block runs: arguments of `Client`, or a cluster that is started here."""
    if table.scheduler:
        is_file = table.scheduler.endswith(".json")
        yield {"scheduler_file": table.scheduler} if is_file else table.scheduler
        return
    with local(table) as cluster:
        yield cluster


def local(table: ClusterTable) -> Any:
    """Processes on this machine, which share its cores and memory out; reachable from nowhere else."""
    from distributed import LocalCluster
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    workers = table.workers or max(1, CPU_COUNT // 4)
    threads = max(1, CPU_COUNT // workers)
    env = {
        name: os.environ.get(name, str(threads))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    given = {
        "n_workers": workers, "threads_per_worker": threads, "processes": True, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0",
        "memory_limit": MEMORY_LIMIT // workers, "silence_logs": logging.CRITICAL, "env": env,
    }  # fmt: skip
    return LocalCluster(**given | table.options)
