"""The workers of a cluster as they are now: who they are, who is fit, and who is not and why."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featurepipe.cluster.flow import results
from featurepipe.cluster.worker import DIGITS, Terms, facts, installed
from featurepipe.errors import ClusterError, StoreError

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
R = TypeVar("R")

ANSWER_SECONDS = 30.0
"""How long a worker may take to say who it is."""


@dataclass(frozen=True)
class WorkerFacts:
    """A worker that is there.

    Attributes:
        address: such as ``tcp://10.0.0.7:40123``.
        name: as Dask calls it.
        host: its machine.
        pid: its process.
        threads: tasks that it takes at once, and threads that one task may use.
        memory_limit: bytes, 0 for none.
        gpus: NVIDIA devices that it sees.
        versions: of python, featurepipe, torch, torchvision, numpy, distributed.
    """

    address: str
    name: str
    host: str
    pid: int
    threads: int
    memory_limit: int
    gpus: int
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name} ({self.address}, {self.host})"


class Team:
    """Workers that do what they are given. Made by `featurepipe.cluster.connect`.

    Args:
        client: of Dask's scheduler.
        say: where messages go.
        patience: seconds to wait for a worker while there is none.
        most: how many workers there may be, on a cluster that grows with its work.

    Attributes:
        refused: why each address that must not be used is refused.
    """

    def __init__(
        self, client: Client, *, say: Callable[[str], None] = print, patience: float = 60.0, most: int = 0
    ) -> None:
        self.client, self.say, self.patience, self.most = client, say, patience, most
        self.refused: dict[str, str] = {}
        self.terms = Terms(tuple((name, text) for name, text in installed().items() if name in DIGITS))
        self._token: Path | None = None

    @property
    def address(self) -> str:
        """The scheduler's."""
        return str(self.client.scheduler.address) if self.client.scheduler else "(gone)"

    def addresses(self) -> list[str]:
        """Workers that are there now and are not refused; asks the scheduler."""
        with self.reaching():
            there = self.client.scheduler_info(n_workers=-1)["workers"]
        return [address for address in there if address not in self.refused]

    def wait_for_workers(self, count: int = 1) -> None:
        """Waits until there is a worker that is not refused.

        Raises:
            ClusterError: none comes in time.
        """
        deadline = time.monotonic() + self.patience
        told = time.monotonic() + 5
        while len(self.addresses()) < count:
            if time.monotonic() > deadline:
                raise self.no_worker()
            if time.monotonic() > told:
                told += 60
                self.say(f"waiting for workers of {self.address}, at most {self.patience:.0f} s")
            time.sleep(0.1)

    def no_worker(self) -> ClusterError:
        """The error for a team without workers."""
        if self.refused:
            return ClusterError(
                f"no worker of {self.address} can be used: "
                + "; ".join(f"{who}: {why}" for who, why in self.refused.items())
            )
        return ClusterError(
            f"no worker came to the scheduler {self.address} within {self.patience:.0f} s; start some, such as: "
            f"dask worker {self.address}, and give the same command again"
        )

    def workers(self) -> list[WorkerFacts]:
        """The workers that are there now and are not refused; each says for itself who it is."""
        with self.reaching():
            known = self.client.scheduler_info(n_workers=-1)["workers"]
        answers = self.ask(facts, (address for address in known if address not in self.refused))
        return [_facts(address, known[address], said) for address, said in answers.items() if isinstance(said, dict)]

    def check(self, store: str | PathLike[str] | None = None) -> list[str]:
        """Looks at every worker that is there, and refuses by name those that are not fit. Workers that come later are looked at
        when they begin their first task.

        Args:
            store: a folder that every worker must see; a small file is kept there until the team is closed.

        Returns:
            The addresses of the workers that may be used.

        Raises:
            ClusterError: no worker comes in time, or none is fit; it names each and says why.
            StoreError: the folder cannot be written.
        """
        self.wait_for_workers()
        if store is not None:
            self._show(Path(store))
        for address, said in self.ask(self.terms.refusal, self.addresses()).items():
            if isinstance(said, Exception):
                said = f"it gave no answer ({type(said).__name__}: {said})"
            if said:
                self.refuse(address, said)
        good = self.addresses()
        if not good:
            raise self.no_worker()
        return good

    def refuse(self, address: str, why: str) -> None:
        """Notes that a worker must not be used, and says so, once."""
        if address not in self.refused:
            self.refused[address] = why
            self.say(f"worker {self._name(address)} is not used: {why}")

    def _name(self, address: str) -> str:
        worker = self.client.scheduler_info(n_workers=-1)["workers"].get(address, {})
        name = str(worker.get("id", address))
        return address if name == address else f"{name} ({address})"

    def _show(self, folder: Path) -> None:
        """Puts a file into a folder, for workers to find."""
        self.hide()
        folder = folder.absolute()
        secret = secrets.token_hex(8)
        token = folder / f".cluster-{secret}.tmp"  # a name that `gc` removes, should we be killed
        try:
            token.write_text(secret)
        except OSError as error:
            raise StoreError(f"cannot write into the store {folder}: {error.strerror}") from error
        self._token = token
        self.terms = Terms(self.terms.versions, str(token), secret)

    def hide(self) -> None:
        """Removes the file that `check` put into the store."""
        if self._token is not None:
            self._token.unlink(missing_ok=True)
        self._token, self.terms = None, Terms(self.terms.versions)

    def ask(
        self, question: Callable[[], Any], addresses: Iterable[str], seconds: float = ANSWER_SECONDS
    ) -> dict[str, Any]:
        """Has each worker's process call a function, beside its tasks: their answers, or the exceptions instead."""
        asked = list(addresses)

        async def one(address: str) -> Any:
            return await asyncio.wait_for(self.client.run(question, workers=[address]), seconds)

        async def everyone() -> list[Any]:
            return await asyncio.gather(*map(one, asked), return_exceptions=True)

        with self.reaching():
            said = self.client.sync(everyone)
        found = zip(asked, said, strict=True)
        return {who: what.get(who) if isinstance(what, dict) else what for who, what in found}

    def results(self, tasks: Iterator[T], work: Callable[[T], R], **options: Any) -> Iterator[tuple[T, R]]:
        """Has tasks done, see `featurepipe.cluster.flow.results`."""
        return results(self, tasks, work, **options)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turns what Dask raises when its scheduler is gone into our error."""
        if self.client.status != "running":
            raise self.lost()
        try:
            yield
        except (OSError, TimeoutError) as error:
            raise self.lost() from error

    def lost(self) -> ClusterError:
        """The error for a scheduler that is gone."""
        return ClusterError(
            "the scheduler of the cluster is gone; what its workers had committed stands. Start it again, then "
            "give the same command again: it goes on where it was"
        )


def _facts(address: str, known: dict[str, Any], said: dict[str, Any]) -> WorkerFacts:
    return WorkerFacts(
        address=address,
        name=str(known["id"]),
        threads=int(known["nthreads"]),
        memory_limit=int(known.get("memory_limit") or 0),
        **said,
    )
