"""The line to Dask's scheduler: it is asked patiently, and found out when it is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from featurepipe.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Client, Future

R = TypeVar("R")

SCHEDULER_SECONDS = 300.0
"""How long a scheduler to which there is a connection may be silent before it is taken to be lost; so long does it itself wait
for its workers. One that has ended is known at once, and one whose machine has gone as soon as Dask's connection times out."""

BUSY_SECONDS = 20.0
"""After so long without an answer a scheduler is asked again: on a machine that has too much to do it may stand still."""

_AGAIN_SECONDS = 0.2  # in which Dask notices that a connection has ended


class Scheduler:
    """A scheduler as its client sees it.

    Args:
        client: of Dask.
        say: where messages go.

    Attributes:
        address: such as ``tcp://10.0.0.7:8786``.
    """

    def __init__(self, client: Client, say: Callable[[str], None]) -> None:
        self.client, self.say = client, say
        self.address = str(client.scheduler.address) if client.scheduler else "(gone)"
        self._is_lost = False

    def ask(self, question: str, **about: Any) -> dict[str, Any]:
        """What the scheduler's handler of that name answers.

        Raises:
            ClusterError: it is gone.
        """
        return dict(self.answer(lambda: getattr(self.client.scheduler, question)(**about)))

    def answer(self, question: Callable[[], Awaitable[R]]) -> R:
        """The scheduler's answer, for which it is asked again for as long as it may be busy; a wrong verdict costs a night.

        Raises:
            ClusterError: it is gone.
        """

        async def ask() -> R:
            return await asyncio.wait_for(question(), min(BUSY_SECONDS, SCHEDULER_SECONDS))

        start, told = time.monotonic(), False
        while True:
            with self.reaching():
                try:
                    answer: R = self.client.sync(ask)
                    return answer
                except OSError:  # a timeout is one, too
                    if time.monotonic() >= start + SCHEDULER_SECONDS:
                        raise
            time.sleep(_AGAIN_SECONDS)
            if not told and time.monotonic() >= start + BUSY_SECONDS:
                told = True
                self.say(
                    f"the scheduler {self.address} does not answer; waiting for it, at most {SCHEDULER_SECONDS:g} s"
                )

    def submit(self, function: Callable[..., R], *arguments: Any, **options: Any) -> Future[R]:
        """Begins a task, as ``Client.submit`` does. What others take as an argument travels once, as the task's result.

        A result outlives its worker, since Dask does the task again; what ``Client.scatter`` has sent is lost with it. Dask is
        not to warn of large arguments: they travel this once.

        Raises:
            ClusterError: the scheduler is gone.
        """
        import dask.config

        with self.reaching(), dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
            return self.client.submit(function, *arguments, **options)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turns what Dask raises when its scheduler is gone into our error."""
        from distributed.client import ClosedClientError

        self.check()
        try:
            yield
        except (OSError, TimeoutError, ClosedClientError) as error:
            raise self.lost() from error

    def check(self) -> None:
        """Looks whether the scheduler is still there.

        Raises:
            ClusterError: it is not.
        """
        if self.is_lost:
            raise self.lost()

    @property
    def is_lost(self) -> bool:
        """Whether the scheduler is gone, or was found not to answer."""
        return self._is_lost or self.client.status != "running"

    def lost(self) -> ClusterError:
        """The error for a scheduler that is gone; from now on, nothing more is asked of it."""
        self._is_lost = True
        return ClusterError(
            f"the scheduler {self.address} is gone, or does not answer; what its workers had committed stands. Start the cluster "
            "anew and give the same command again: it goes on where it was"
        )
