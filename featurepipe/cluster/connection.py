"""From what the user names to a team: an address, `local:2`, a file, a table, or a client that is there."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from featurepipe.cluster.kinds import QUIET, in_a_line, opened
from featurepipe.cluster.table import ClusterTable, read_spec
from featurepipe.cluster.team import Team
from featurepipe.display import displayed
from featurepipe.errors import ClusterError, UsageError

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 10.0


def _to_stderr(text: str) -> None:
    print(displayed(text), file=sys.stderr)


@contextmanager
def connect(spec: Any, *, say: Callable[[str], None] = _to_stderr) -> Iterator[Team]:
    """Connects to a cluster, or starts one, for as long as the block runs.

    Args:
        spec: a `distributed.Client` or cluster object; the scheduler's address (`tcp://host:8786`) or its file (`.json`);
            `local:2` for two processes here; a TOML file with a `[cluster]` table, or that table; or a `Team`, used as it is.
        say: where messages go; by default to standard error.

    Yields:
        The team. What was opened here is closed at the end; a client or cluster that was given stays open.

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
    if isinstance(spec, Team):
        yield spec
    elif isinstance(spec, Client):
        if spec.status == "closed":
            raise ClusterError("the Client is closed; give one that is open, or its scheduler's address")
        with _team(spec, say, ClusterTable(kind="local")) as team:
            yield team
    elif hasattr(spec, "scheduler_address"):
        with _quiet(), _client({"address": spec}) as client, _team(client, say, ClusterTable(kind="local")) as team:
            yield team
    else:
        table = read_spec(spec)
        with _quiet(), opened(table) as where, _client(where) as client, _team(client, say, table) as team:
            yield team


@contextmanager
def _team(client: Client, say: Callable[[str], None], table: ClusterTable) -> Iterator[Team]:
    team = Team(client, say=say, patience=table.patience, most=table.most)
    try:
        yield team
    finally:
        team.close()


@contextmanager
def _client(where: dict[str, Any]) -> Iterator[Client]:
    from distributed import Client

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatched versions")  # we look at versions ourselves
            client = Client(**where, timeout=CONNECT_SECONDS)
    except TypeError as error:  # Dask's, when it was told of no certificate
        at = " ".join(str(part) for part in where.values())
        raise ClusterError(
            f"{at} takes certificates, and none is set here: Dask reads them from its configuration "
            "(distributed.comm.tls.ca-file, .client.cert, .client.key), or from DASK_DISTRIBUTED__COMM__TLS__CA_FILE and so on; "
            "see SECURITY.md"
        ) from error
    except (OSError, ValueError, TimeoutError) as error:
        at = " ".join(str(part) for part in where.values())
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
    """Keeps Dask's own log lines back while a team is at work: what a user has to know, we say."""
    from distributed.utils import silence_logging_cmgr

    with ExitStack() as stack:
        for root in ("distributed", "tornado", "asyncio"):
            stack.enter_context(silence_logging_cmgr(level=QUIET, root=root))
        yield
