"""The executor on the workers of a Dask cluster."""

from __future__ import annotations

import hashlib
import secrets
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from featurepipe.display import displayed, without_password
from featurepipe.errors import ClusterError, StoreError, UsageError
from featurepipe.execution.dispatch import dispatch
from featurepipe.execution.executor import Arrived, Executor, Function, MapOptions
from featurepipe.execution.launchers import QUIET, ClusterTable, in_a_line, opened, read_spec
from featurepipe.execution.local import LocalExecutor
from featurepipe.execution.row_shards import SpreadFeatures, spread
from featurepipe.execution.worker import Attempt, Carried, pickled
from featurepipe.execution.worker_pool import WorkerPool

if TYPE_CHECKING:
    from distributed import Client


S = TypeVar("S")
R = TypeVar("R")

INLINE_BYTES = 1 << 16
"""A context up to this size travels with every shard; a larger one is kept in a file of the store, for as long as it is used.

Dask could hold it as the result of a task, or scatter it. But it gives tasks to those workers first that have what they need,
and so all to one; and what it has scattered is lost with the workers that have it.
"""


class DaskExecutor(WorkerPool, Executor):
    """Maps functions on the workers of a Dask cluster. Made by `featurepipe.execution.connect`."""

    is_local = False

    def _results(
        self, function: Function[R], shards: Iterator[S], context: Any, options: MapOptions
    ) -> Generator[Arrived[S, R], None, None]:
        with self._carried(context) as carried:
            attempt = Attempt(function, carried, self.requirements, secrets.token_hex(8))
            yield from dispatch(self, shards, attempt, options)

    def rows(self, features: Any) -> SpreadFeatures:
        """See `Executor`."""
        return spread(features, self)

    def describe(self) -> dict[str, Any]:
        """See `Executor`."""
        return {"scheduler": self.address, "refused": dict(self.refused)}

    def describe_workers(self) -> dict[str, Any]:
        """See `Executor`."""
        workers = self.workers()
        return {
            "scheduler": without_password(self.address),
            "workers": len(workers),
            "threads": sum(worker.threads for worker in workers),
            "hosts": len({worker.host for worker in workers}),
        }

    @contextmanager
    def _carried(self, context: Any) -> Iterator[Carried | None]:
        """A context as it travels; its file is removed at the end of the block, or by `gc` should we be killed.

        Raises:
            UsageError: it cannot travel.
            StoreError: the store cannot be written.
        """
        if context is None:
            yield None
            return
        content = pickled(context)
        digest, token = hashlib.sha256(content).hexdigest(), self.requirements.token
        if len(content) <= INLINE_BYTES or token is None:
            yield Carried(digest, content)
            return
        file = Path(token).parent / f".context-{secrets.token_hex(8)}.tmp"
        try:
            try:
                file.write_bytes(content)
            except OSError as error:
                raise StoreError(f"cannot write into the store {file.parent}: {error.strerror}") from error
            yield Carried(digest, file=str(file))
        finally:
            with suppress(OSError):
                file.unlink(missing_ok=True)


CONNECT_SECONDS = 10.0


def _to_stderr(text: str) -> None:
    print(displayed(text), file=sys.stderr)


@contextmanager
def connect(spec: Any, *, say: Callable[[str], None] = _to_stderr) -> Iterator[DaskExecutor]:
    """Connects to a cluster, or starts one, for as long as the block runs.

    Args:
        spec: a `distributed.Client` or cluster object; the scheduler's address (`tcp://host:8786`) or its file (`.json`);
            `local:2` for two processes here; a TOML file with a `[cluster]` table, or that table; or a `DaskExecutor`.
        say: where messages go; by default to standard error.

    Yields:
        The executor. What was opened here is closed at the end; a client or cluster that was given stays open.

    Raises:
        UsageError: the spec is none of these, or is for use with `await`.
        ClusterError: nobody answers at the address, the client is closed, or the cluster cannot be started.
    """
    from distributed import Client

    if getattr(spec, "asynchronous", False):
        raise UsageError(
            f"the {type(spec).__name__} is asynchronous, and waiting for it would block the loop that it runs in; give its "
            "scheduler's address, from a thread of its own (asyncio.to_thread), or one without asynchronous=True"
        )
    if isinstance(spec, DaskExecutor):
        yield spec
        return
    table = ClusterTable(kind="local")
    with ExitStack() as stack:
        if isinstance(spec, Client):
            client = spec
            if client.status == "closed":
                raise ClusterError("the Client is closed; give one that is open, or its scheduler's address")
        else:
            stack.enter_context(_quiet())
            where = {"address": spec}
            if not hasattr(spec, "scheduler_address"):
                table = read_spec(spec)
                where = stack.enter_context(opened(table))
            client = stack.enter_context(_client(where))
        executor = DaskExecutor(client, say=say, patience=table.patience, most=table.most)
        yield stack.enter_context(closing(executor))


@contextmanager
def _client(where: dict[str, Any]) -> Iterator[Client]:
    from distributed import Client

    at = " ".join(map(str, where.values()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatched versions")  # we look at versions ourselves
            client = Client(**where, timeout=CONNECT_SECONDS)
    except TypeError as error:  # Dask's, when it was told of no certificate
        raise ClusterError(
            f"{at} takes certificates, and none is set here: Dask reads them from its configuration "
            "(distributed.comm.tls.ca-file, .client.cert, .client.key), or from DASK_DISTRIBUTED__COMM__TLS__CA_FILE and so on; "
            "see SECURITY.md"
        ) from error
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"no scheduler answers at {at} ({in_a_line(error)}); is it running? Start one with: dask scheduler, "
            "and workers with: dask worker ADDRESS"
        ) from error
    try:
        yield client
    finally:
        with suppress(TimeoutError):
            client.close(timeout=5)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Dask's own log lines back while an executor is at work: what a user has to know, we say."""
    from distributed.utils import silence_logging_cmgr

    with ExitStack() as stack:
        for root in ("distributed", "tornado", "asyncio"):
            stack.enter_context(silence_logging_cmgr(level=QUIET, root=root))
        yield


@contextmanager
def executor_on(cluster: Any, *, say: Callable[[str], None] = _to_stderr) -> Iterator[Executor]:
    """The executor of a cluster, which stays connected for as long as the block runs; without one, this process.

    Args:
        cluster: what `connect` takes, or an executor; None for this process.
        say: where messages go.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if cluster is None or isinstance(cluster, LocalExecutor):
        yield cluster or LocalExecutor()
        return
    with connect(cluster, say=say) as executor:
        yield executor


ExecutorWhenNeeded: TypeAlias = "Callable[[], DaskExecutor | None]"
"""Gives the executor of a cluster; None where all is done in this process."""


@contextmanager
def executor_when_needed(cluster: Any, say: Callable[[str], None]) -> Iterator[ExecutorWhenNeeded]:
    """One executor for several commands, connected to when it is first needed.

    If its scheduler goes away, the next command that asks is given another.

    Args:
        cluster: what `connect` takes; None for this process.
        say: where messages go.

    Yields:
        A function that gives the executor; it raises `ClusterError` if that cannot be done.
    """
    with ExitStack() as stack:
        known: list[DaskExecutor] = []

        def executor() -> DaskExecutor | None:
            if cluster is not None and (not known or known[-1].scheduler.is_lost):
                known.append(stack.enter_context(connect(cluster, say=say)))
            return known[-1] if known else None

        yield executor


def in_this_process() -> None:
    """No executor of a cluster: all is done in this process."""


def cluster_name(cluster: Any) -> str | None:
    """Names what `connect` takes, for people and for a bundle: no password, no folder of this machine.

    Example:
        >>> cluster_name("tls://me:secret@head:8786"), cluster_name("/home/me/slurm.toml"), cluster_name({"kind": "ssh"})
        ('tls://head:8786', 'slurm.toml', 'ssh')
    """
    if cluster is None or isinstance(cluster, LocalExecutor):
        return None
    if isinstance(cluster, Mapping):
        cluster = cluster.get("scheduler") or cluster.get("kind")
    for name in ("address", "scheduler_address"):  # of a DaskExecutor and of a Dask cluster
        cluster = getattr(cluster, name, cluster)
    scheduler = getattr(cluster, "scheduler", None)  # of a Client
    text = str(cluster if scheduler is None else scheduler.address)
    return without_password(text) if "://" in text else Path(text).name
