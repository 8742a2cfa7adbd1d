"""The `[cluster]` table, checked before anything is started, and for each kind of cluster the class of Dask's that starts it."""

from __future__ import annotations

import asyncio
import atexit
import importlib
import logging
import multiprocessing
import os
import re
import shutil
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from featurepipe.display import seconds_of, without_password
from featurepipe.errors import ClusterError, UsageError, pip_install, unknown
from featurepipe.execution.worker import gpu_names
from featurepipe.interrupt import handlers_kept, signals_held

KINDS = ("local", "ssh", "slurm", "pbs", "kubernetes")
SCHEMES = ("tcp", "tls", "ucx", "ws", "wss")
PATIENCE = {"local": 60.0, "ssh": 120.0, "slurm": 3600.0, "pbs": 3600.0, "kubernetes": 1800.0}
"""Seconds to wait for a first worker: queues take their time."""

FORMS = "give tcp://HOST:PORT, a scheduler file (.json), local:N, or a TOML file with a [cluster] table"


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _seen_from_file(scheduler: str | None, info: ValidationInfo) -> str | None:
    """A scheduler file's path is relative to the file that names it."""
    if scheduler is None:
        return None
    if scheduler.partition("://")[0] in SCHEMES:
        if not scheduler.startswith("ws") and not re.search(r":\d+/?$", scheduler):  # of ws the port is implied
            raise UsageError(
                f"has no port; write {scheduler.rstrip('/')}:8786, or what the scheduler says when it starts"
            )
        return scheduler
    if not scheduler.endswith(".json"):
        raise UsageError("is no address; write tcp://HOST:PORT, or name a scheduler file, .json")
    return str(Path((info.context or {}).get("folder", ".")) / scheduler)


MOST_LOCAL = 1024
"""Workers on this machine: more are a slip of the keyboard, and would be started one by one until the system refuses."""


class ClusterTable(BaseModel):
    """``[cluster]``: where the work is done; without it, here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    scheduler: Annotated[str | None, AfterValidator(_seen_from_file)] = None
    """The address of a scheduler that runs, such as `tcp://10.0.0.5:8786`, or its scheduler file, `.json`."""
    kind: Literal["local", "ssh", "slurm", "pbs", "kubernetes"] | None = None
    """What to start instead, for as long as the work takes."""
    workers: int | None = Field(default=None, ge=1)
    """How many processes; one per GPU, where there are GPUs."""
    minimum: int | None = Field(default=None, ge=0)
    """Of a cluster that grows and shrinks with its work."""
    maximum: int | None = Field(default=None, ge=1)
    """Of a cluster that grows and shrinks with its work."""
    hosts: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """With `ssh`: the scheduler's machine, then those of the workers; a machine named twice has two processes."""
    gpus: bool = False
    """One GPU for each worker. On this machine that needs no asking; with `ssh` the k-th process of a host gets its GPU k."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """With `kubernetes`: where each claim of a persistent volume is mounted, such as `"/data" = "images"`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Handed to LocalCluster, SSHCluster, SLURMCluster, PBSCluster or KubeCluster."""
    wait: Annotated[float, BeforeValidator(seconds_of)] | None = None
    """How long to wait while there is no worker, such as `10min`; by default 1 min, for queues up to 1 h."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        started = self.model_fields_set - {"scheduler", "wait"}
        if self.scheduler and started:
            raise UsageError(f"names a scheduler that runs, and says how to start one: {', '.join(sorted(started))}")
        if not self.scheduler and not self.kind:
            raise UsageError(
                f"needs scheduler, the address of one that runs, or kind, what to start: {', '.join(KINDS)}"
            )
        self._check_number()
        return self

    def _check_number(self) -> None:
        if self.is_adaptive and self.workers:
            raise UsageError("give workers, or minimum and maximum for a cluster that grows with its work, not both")
        if self.is_adaptive and (self.maximum is None or self.maximum < (self.minimum or 0)):
            raise UsageError("a cluster that grows with its work needs a maximum, no less than minimum")
        if self.kind == "local" and (most := max(self.workers or 0, self.most)) > MOST_LOCAL:
            raise UsageError(f"{most:,} processes on this machine; at most {MOST_LOCAL:,}")
        if self.is_adaptive and self.kind == "ssh":
            raise UsageError("machines reached by ssh are as many as hosts names; leave minimum and maximum out")
        if self.volumes and self.kind != "kubernetes":
            raise UsageError('volumes are mounted in pods, so only with kind = "kubernetes"')
        if (self.kind == "ssh") != bool(self.hosts):
            raise UsageError(
                "ssh needs hosts, the scheduler's machine first, then those of the workers; no other kind has hosts"
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether the cluster grows and shrinks."""
        return self.minimum is not None or self.maximum is not None

    @property
    def most(self) -> int:
        """How many workers there may be, where the cluster grows; else 0."""
        return self.maximum or 0

    @property
    def patience(self) -> float:
        """Seconds to wait for a worker while there is none."""
        return self.wait or PATIENCE.get(self.kind or "", 60.0)

    def __str__(self) -> str:
        number = f"{self.minimum or 0} to {self.maximum}" if self.is_adaptive else self.workers or "its"
        return without_password(self.scheduler or "") or f"{self.kind}, {number} workers"


def checked_spec(spec: Any) -> Any:
    """What names a cluster, read if it is text, a path or a mapping; a client or a cluster stays as it is.

    Raises:
        UsageError: it names no cluster.
    """
    return read_spec(spec) if isinstance(spec, str | PathLike | Mapping) else spec


def read_spec(spec: Any) -> ClusterTable:
    """Reads what names a cluster; connects to nothing.

    Args:
        spec: text as on the command line, a path, or a mapping: the table.

    Raises:
        UsageError: it names no cluster; says what may be given.

    Example:
        >>> read_spec("local:2").workers, read_spec("tcp://10.0.0.5:8786").scheduler
        (2, 'tcp://10.0.0.5:8786')
    """
    if isinstance(spec, ClusterTable):
        return spec
    if isinstance(spec, Mapping):
        return _table(spec, "cluster", Path())
    text = str(spec)
    if match := re.fullmatch(r"local(?::(\d+))?", text):
        return _table({"kind": "local"} | ({"workers": int(match[1])} if match[1] else {}), text, Path())
    if text.partition("://")[0] in SCHEMES or text.endswith(".json"):
        return _table({"scheduler": text}, "cluster", Path())
    if text.endswith(".toml"):
        return _from_file(Path(text))
    raise UsageError(f"cluster {text!r} names no cluster; {FORMS}")


def _from_file(path: Path) -> ClusterTable:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; {FORMS}") from error
    except (ValueError, RecursionError) as error:  # also of numbers and nesting beyond Python's limits, and of no UTF-8
        raise UsageError(f"{path} is not TOML: {error}") from error
    if not isinstance(content.get("cluster"), dict):
        raise UsageError(f"{path} has no [cluster] table; it has: {', '.join(content) or 'nothing'}")
    return _table(content["cluster"], f"{path}: cluster", path.parent)


def _table(values: Mapping[str, Any], where: str, folder: Path) -> ClusterTable:
    try:
        return ClusterTable.model_validate(dict(values), context={"folder": folder})
    except ValidationError as error:
        raise UsageError("\n".join(_line(details, where) for details in error.errors())) from error


def _line(details: ErrorDetails, where: str) -> str:
    key = ".".join([where, *map(str, details["loc"])])
    if details["type"] == "extra_forbidden":
        return str(unknown("key", key, ClusterTable.model_fields))
    if details["type"] == "literal_error":
        return f"{key}: {unknown('kind', details['input'], KINDS)}"
    if details["type"] == "greater_than_equal" and details["loc"]:
        return f"{key} = {details['input']!r} is too few; give a number from {details['ctx']['ge']}"
    given = "" if isinstance(details["input"], dict) else f" = {details['input']!r}"
    return f"{key}{given}: {details.get('ctx', {}).get('error') or details['msg']}"


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
    logging.getLogger("distributed.process").setLevel(logging.WARNING)  # silent about workers that end after us
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
        "preload": ["featurepipe.execution.worker"],
    }

    class OnThisMachine(LocalCluster):
        def new_worker_spec(self) -> dict[Any, Any]:
            spec: dict[Any, Any] = super().new_worker_spec()  # type: ignore[no-untyped-call]
            return {name: _with_gpu(worker, gpus, int(name)) for name, worker in spec.items()}

    start: Any = OnThisMachine
    with signals_held():
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
    return _queued("SLURMCluster", table, "sbatch", {"job_extra_directives": ["--gres=gpu:1"]})


def pbs(table: ClusterTable) -> Any:
    """A job for each worker, through dask-jobqueue."""
    cores, memory = table.options.get("cores"), table.options.get("memory")
    return _queued("PBSCluster", table, "qsub", {"resource_spec": f"select=1:ncpus={cores}:ngpus=1:mem={memory}"})


def _queued(name: str, table: ClusterTable, command: str, for_a_gpu: Mapping[str, Any]) -> Any:
    cluster_class = _imported("dask_jobqueue", name, table)
    if not shutil.which(command):
        raise OSError(f"{command} is not on this machine; start this where jobs are submitted")
    cluster = cluster_class(**queue_options(table, for_a_gpu))
    scale(cluster, table)
    return cluster


def queue_options(table: ClusterTable, for_a_gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for dask-jobqueue: one process a job, which thereby has the job's GPU for itself."""
    for_a_gpu = for_a_gpu if table.gpus else {}
    given = {"processes": 1, "scheduler_options": ANY_PORT, "silence_logs": QUIET, **for_a_gpu, **table.options}
    if "job_extra_directives" in for_a_gpu:
        users = table.options.get("job_extra_directives", [])
        given["job_extra_directives"] = [*users, *for_a_gpu["job_extra_directives"]]
    return given


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
        raise ImportError(f"{error.name} is not installed; {pip_install(str(table.kind))}") from error


def in_a_line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


_KINDS: Mapping[str, Callable[[ClusterTable], Any]] = MappingProxyType(
    {"local": local, "ssh": ssh, "slurm": slurm, "pbs": pbs, "kubernetes": kubernetes}
)
