"""Each kind of cluster and the class of Dask's that starts it, with one process for each GPU."""

from __future__ import annotations

import asyncio
import atexit
import importlib
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import MappingProxyType
from typing import Any

from featurepipe.cluster.table import ClusterTable
from featurepipe.cluster.worker import gpu_names
from featurepipe.errors import ClusterError
from featurepipe.interrupt import handlers_kept

QUIET = logging.CRITICAL
"""What Dask logs of our own clusters is less than we say ourselves."""
ANY_PORT = {"dashboard_address": ":0"}
"""Dask's page on any free port: a second cluster on a machine is nothing to warn of."""


LONGEST = 300
"""Characters of an error of Dask's or of a queue's that a message repeats."""
START_SECONDS = 120.0
"""How long it may take to start processes, or to submit jobs."""


@contextmanager
def opened(table: ClusterTable) -> Iterator[Any]:
    """What a client connects to, for as long as the block runs: arguments of `Client`, or a cluster that is started here.

    Raises:
        ClusterError: the cluster cannot be started, or a package for it is missing.
    """
    if table.scheduler:
        is_file = table.scheduler.endswith(".json")
        if is_file and not Path(table.scheduler).exists():  # Dask would wait for it
            raise ClusterError(
                f"scheduler file {table.scheduler} does not exist; start one with: dask scheduler --scheduler-file FILE"
            )
        yield {"scheduler_file": table.scheduler} if is_file else {"address": table.scheduler}
        return
    kind = str(table.kind)
    try:
        cluster = _KINDS[kind](table)
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise ClusterError(
            f"a cluster of kind {kind!r} cannot be started: {in_a_line(error)}; look at the options in [cluster]"
        ) from error
    with cluster:
        yield {"address": cluster}


def scale(cluster: Any, table: ClusterTable) -> None:
    """Asks for workers: so many, or as many as the work needs.

    Raises:
        ClusterError: they cannot be started.
    """
    from distributed import SpecCluster

    try:
        if table.is_adaptive:
            bounds = {"minimum": table.minimum or 0, "maximum": table.maximum}
            cluster.adapt(**bounds | ({"Adaptive": _one_task_a_worker()} if isinstance(cluster, SpecCluster) else {}))
        else:
            cluster.scale(table.workers or 1)
            cluster.sync(_settled, cluster)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        with suppress(AssertionError, TimeoutError):  # about jobs that were never submitted
            cluster.close(timeout=2)
        cluster.shutdown_on_close = False  # Dask would try that again for ten seconds when Python ends
        raise ClusterError(f"workers of kind {table.kind!r} cannot be started: {in_a_line(error)}") from error


async def _settled(cluster: Any) -> None:
    """Waits until all processes are started, or jobs submitted; raises what is wrong with them, which `scale` only logs."""
    deadline = time.monotonic() + START_SECONDS
    while not set(cluster.worker_spec) <= set(cluster.workers):
        if time.monotonic() > deadline:
            raise RuntimeError(f"workers did not start within {START_SECONDS:g} s")
        await asyncio.sleep(0.01)
    for worker in list(cluster.workers.values()):
        await worker


def _one_task_a_worker() -> type:
    from distributed.deploy.adaptive import Adaptive

    class OneTaskAWorker(Adaptive):
        """Dask counts threads and thinks one worker of eight threads enough for eight tasks; each of ours fills a worker."""

        async def target(self) -> int:
            scheduler: Any = getattr(self.cluster, "scheduler")  # noqa: B009 - of the clusters that are told how to start workers
            tasks = len(scheduler.unrunnable) + sum(len(worker.processing) for worker in scheduler.workers.values())
            return max(tasks, int(await super().target()))  # type: ignore[no-untyped-call]

    return OneTaskAWorker


def local(table: ClusterTable) -> Any:
    """Processes on this machine, which share its cores, GPUs and memory out; reachable from nowhere else."""
    from dask.system import CPU_COUNT
    from distributed import LocalCluster
    from distributed.system import MEMORY_LIMIT

    _refuse_to_start_from_a_worker()
    gpus = gpu_names()
    most = table.workers or table.maximum or len(gpus) or max(1, CPU_COUNT // 4)
    given = {
        "threads_per_worker": max(1, CPU_COUNT // most),
        "memory_limit": MEMORY_LIMIT // most,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": QUIET,
        "preload": ["featurepipe.cluster.preload"],
    }

    class OnThisMachine(LocalCluster):
        def new_worker_spec(self) -> dict[Any, Any]:
            spec: dict[Any, Any] = super().new_worker_spec()  # type: ignore[no-untyped-call]
            return {name: _with_gpu(worker, gpus, int(name)) for name, worker in spec.items()}

    start: Any = OnThisMachine
    with _signals_for_us_alone():
        cluster = start(n_workers=0, processes=True, **given | table.options)
    scale(cluster, table.model_copy(update={} if table.is_adaptive else {"workers": most}))
    return cluster


def _refuse_to_start_from_a_worker() -> None:
    """A worker's process imports the script that started it, which must not start a cluster then."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ClusterError(
            "a script that has processes started imports itself in each of them; put what it does under: "
            'if __name__ == "__main__":'
        )


@contextmanager
def _signals_for_us_alone() -> Iterator[None]:
    """Threads that begin in the block, and their processes, take no SIGINT and SIGTERM.

    A terminal and systemd send those to all processes; we hear them, and call the tasks back with what they have.
    """
    resource_tracker.ensure_running()  # when it starts, it lets those signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _with_gpu(worker: dict[str, Any], gpus: list[str], number: int) -> dict[str, Any]:
    if not gpus:
        return worker
    options = worker["options"]
    env = (options.get("env") or {}) | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    return worker | {"options": options | {"env": env}}


def ssh(table: ClusterTable) -> Any:
    """A scheduler on the first host, a process for each further mention of a host; with GPUs the k-th there gets GPU k."""
    from distributed import SpecCluster
    from distributed.deploy.ssh import Scheduler, SSHCluster, Worker

    importlib.import_module("asyncssh")
    if len(table.hosts) < 2:
        raise ValueError("hosts must name the scheduler's machine and at least one worker's")
    if not table.gpus:
        return SSHCluster(list(table.hosts), **{"silence_logs": QUIET} | table.options)
    options = {"connect_options": {}, "remote_python": None, "worker_class": "distributed.Nanny"} | table.options
    shared = {"connect_options": options["connect_options"], "remote_python": options["remote_python"]}
    head = {"address": table.hosts[0], "kwargs": ANY_PORT | options.get("scheduler_options", {}), **shared}
    workers, seen = {}, Counter[str]()
    for number, host in enumerate(table.hosts[1:]):
        env = {"CUDA_VISIBLE_DEVICES": str(seen[host])}
        seen[host] += 1
        own = {"address": host, "worker_class": options["worker_class"], **shared}
        own["kwargs"] = options.get("worker_options", {}) | {"env": env}
        workers[number] = {"cls": Worker, "options": own}
    return SpecCluster(workers, {"cls": Scheduler, "options": head}, name="SSHCluster", silence_logs=QUIET)


def slurm(table: ClusterTable) -> Any:
    """A job for each worker, through dask-jobqueue."""
    cluster_class = _imported("dask_jobqueue", "SLURMCluster", table)
    return _queued(cluster_class, table, "sbatch", {"job_extra_directives": ["--gres=gpu:1"]})


def pbs(table: ClusterTable) -> Any:
    """A job for each worker, through dask-jobqueue."""
    cluster_class = _imported("dask_jobqueue", "PBSCluster", table)
    cores, memory = table.options.get("cores"), table.options.get("memory")
    return _queued(cluster_class, table, "qsub", {"resource_spec": f"select=1:ncpus={cores}:ngpus=1:mem={memory}"})


def _queued(cluster_class: Any, table: ClusterTable, command: str, for_a_gpu: Mapping[str, Any]) -> Any:
    if not shutil.which(command):
        raise OSError(f"{command} is not on this machine; start this where jobs are submitted")
    cluster = cluster_class(**queue_options(table, for_a_gpu))
    scale(cluster, table)
    return cluster


def queue_options(table: ClusterTable, for_a_gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for dask-jobqueue: one process a job, which thereby has the job's GPU for itself."""
    given = {"processes": 1, "scheduler_options": ANY_PORT, "silence_logs": QUIET}
    if table.gpus:
        given |= for_a_gpu
        if "job_extra_directives" in table.options:
            extra = [*table.options["job_extra_directives"], *for_a_gpu.get("job_extra_directives", [])]
            return given | table.options | {"job_extra_directives": extra}
    return given | table.options


def kubernetes(table: ClusterTable) -> Any:
    """Pods through the operator of dask-kubernetes; the scheduler's pod gets no GPU and no volume."""
    cluster_class = _imported("dask_kubernetes.operator", "KubeCluster", table)
    options = dict(table.options)
    if table.gpus or table.volumes:
        options = {"custom_cluster_spec": pod_spec(table)} | {
            name: options[name] for name in options if name not in _OF_PODS
        }
    try:
        cluster = cluster_class(**{"n_workers": table.workers or table.minimum or 0, "quiet": True} | options)
    except BaseException:
        _forget_what_never_began()
        raise
    if table.is_adaptive:
        scale(cluster, table)
    return cluster


def _forget_what_never_began() -> None:
    """At exit dask-kubernetes ends all of its clusters, and stumbles over one that could not be made."""
    with suppress(ImportError, AttributeError):
        atexit.unregister(importlib.import_module("dask_kubernetes.operator.kubecluster.kubecluster").reap_clusters)


_OF_PODS = ("name", "image", "resources", "env", "worker_command", "scheduler_service_type", "idle_timeout", "jupyter")


def pod_spec(table: ClusterTable) -> dict[str, Any]:
    """What the operator is asked for, with the volumes and a GPU for each worker, and neither for the scheduler."""
    make: Callable[..., dict[str, Any]] = _imported("dask_kubernetes.operator", "make_cluster_spec", table)
    options = {"name": f"featurepipe-{os.getpid()}"} | {n: v for n, v in table.options.items() if n in _OF_PODS}
    spec = make(n_workers=table.workers or table.minimum or 0, **options)
    pod = spec["spec"]["worker"]["spec"]
    claims = {f"volume-{number}": claim for number, claim in enumerate(table.volumes.values())}
    pod["volumes"] = [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim in claims.items()]
    for container in pod["containers"]:
        container["volumeMounts"] = [
            {"name": name, "mountPath": path} for name, path in zip(claims, table.volumes, strict=True)
        ]
        if table.gpus:
            resources = container.get("resources") or {}
            container["resources"] = resources | {"limits": {"nvidia.com/gpu": 1} | resources.get("limits", {})}
    return spec


def _imported(module: str, name: str, table: ClusterTable) -> Any:
    try:
        with handlers_kept():  # dask_jobqueue.runner takes SIGINT for itself as it is imported
            return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; pip install 'featurepipe[{table.kind}]'") from error


def in_a_line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


_KINDS: Mapping[str, Callable[[ClusterTable], Any]] = MappingProxyType(
    {"local": local, "ssh": ssh, "slurm": slurm, "pbs": pbs, "kubernetes": kubernetes}
)
