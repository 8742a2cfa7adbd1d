"""The workers of a Dask cluster as they are now: who they are, which are fit and why not, and the line to the scheduler."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featurepipe.errors import ClusterError, StoreError
from featurepipe.execution.executor import WorkerFacts
from featurepipe.execution.worker import DIGITS, Requirements, facts, installed

if TYPE_CHECKING:
    from distributed import Client, Future


T = TypeVar("T")
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


ANSWER_SECONDS = 30.0
"""How long a worker may take to say who it is, before it is told of and asked once more."""

LAST_SECONDS = 120.0
"""How long a worker that did not answer may take then; its machine, or the scheduler's, may have too much to do."""

TOLD_SECONDS = 5.0
"""From when on waiting for workers is told of."""


_MEMORY_TOPIC = "worker-restart-memory"
"""Where Dask's nannies tell of a worker that they ended because of its memory."""


class WorkerPool:
    """The workers of a Dask cluster. Made by `featurepipe.execution.connect`.

    Args:
        client: of Dask's scheduler.
        say: where messages go.
        patience: seconds to wait for a worker while there is none.
        most: how many workers there may be, on a cluster that grows with its work.

    Attributes:
        scheduler: the line to it.
        address: the scheduler's.
        requirements: what a worker must fulfil.
        refused: why each address that must not be used is refused.
    """

    def __init__(
        self, client: Client, *, say: Callable[[str], None] = print, patience: float = 60.0, most: int = 0
    ) -> None:
        self.client, self.say, self.patience, self.most = client, say, patience, most
        self.scheduler = Scheduler(client, say)
        self.address = self.scheduler.address
        self.refused: dict[str, str] = {}
        self.requirements = Requirements(tuple((name, text) for name, text in installed().items() if name in DIGITS))
        self._shown: dict[Path, Requirements] = {}
        self._too_large: set[str] = set()
        self._told_paused: set[str] = set()
        client.subscribe_topic(_MEMORY_TOPIC, self._note_too_large)

    def addresses(self) -> list[str]:
        """Workers that are there now and are not refused; asks the scheduler."""
        return [address for address in self.scheduler.ask("ncores", workers=None) if address not in self.refused]

    def idle(self, addresses: Iterable[str]) -> list[str]:
        """Those of some workers that have nothing to do."""
        busy = self.scheduler.ask("processing", workers=list(addresses))
        return [address for address, tasks in busy.items() if not tasks]

    def paused(self, addresses: Iterable[str]) -> list[str]:
        """Those of some workers that have no task and take none, since their memory is nearly full, and how full; says so once.

        Dask pauses a worker above four fifths of its limit (``distributed.worker.memory.pause``) until it has less.
        """
        known, found = self._known(), list[str]()
        for address in addresses:
            worker = known.get(address, {})
            metrics = worker.get("metrics", {})
            if worker.get("status") != "paused" or metrics.get("task_counts", {}).get("executing"):
                continue
            used, limit = (int(size or 0) / 2**20 for size in (metrics.get("memory"), worker.get("memory_limit")))
            text = f"worker {worker['id']} ({address}) uses {used:,.0f} of its {limit:,.0f} MiB"
            found.append(text)
            if address not in self._told_paused:
                self._told_paused.add(address)
                self.say(f"{text} and takes no task until it has more free")
        return found

    def wait_for_workers(self, count: int = 1) -> None:
        """Waits until there is a worker that is not refused.

        Raises:
            ClusterError: none comes in time.
        """
        if len(self.addresses()) >= count:
            return
        deadline = time.monotonic() + self.patience
        told = time.monotonic() + TOLD_SECONDS
        wanted = self.scheduler.submit(bool, pure=False)  # a cluster that grows with its work needs work to grow
        while len(self.addresses()) < count:
            if time.monotonic() > deadline:
                raise self.no_worker()
            if time.monotonic() > told:
                told = time.monotonic() + 60
                self.say(f"waiting for workers of {self.address}, at most {self.patience:g} s")
            time.sleep(0.1)
        wanted.release()

    def result(self, future: Future[R], what: str, timeout: float | None = None) -> R:
        """What a task has come to.

        Args:
            future: of the task.
            what: names it, should it kill its workers.
            timeout: seconds to wait for the result of a task that is done.

        Raises:
            ClusterError: the scheduler is gone, or the task killed its workers.
            Exception: the task's own, or `TimeoutError`.
        """
        from distributed import CancelledError, KilledWorker

        try:
            return future.result(timeout=timeout)
        except CancelledError as error:
            raise self.scheduler.lost() from error  # by Dask, as soon as the connection breaks
        except KilledWorker as error:
            raise ClusterError(
                f"every worker that began {what} died of it, {error.allowed_failures + 1} in all, the last "
                f"{error.last_worker.address}: it needs more memory than they have, or something in it crashes them. Use more "
                "workers, or give them more memory; see their logs; what was committed stands"
            ) from error

    def no_worker(self, left: str = "") -> ClusterError:
        """The error for a pool without workers.

        Args:
            left: what is not done.
        """
        what = f"; {left}" if left else ""
        if self.refused:
            reasons = "; ".join(f"{who}: {why}" for who, why in self.refused.items())
            return ClusterError(f"no worker of {self.address} can be used: {reasons}{what}")
        return ClusterError(
            f"no worker came to the scheduler {self.address} within {self.patience:g} s{what}; start some, such as: "
            f"dask worker {self.address}, and give the same command again: it goes on where it was"
        )

    def workers(self) -> list[WorkerFacts]:
        """The workers that are there now and are not refused; each says for itself who it is."""
        known = self._known()
        answers = self.each(facts, (address for address in known if address not in self.refused))
        return [_facts(address, known[address], said) for address, said in answers.items() if isinstance(said, dict)]

    def check(self, store: str | PathLike[str] | None = None) -> list[str]:
        """Looks at every worker that is there, and refuses by name those that are not fit.

        Workers that come later are looked at when they begin their first task.

        Args:
            store: a folder that every worker must see; a small file is kept there until the pool is closed.

        Returns:
            The addresses of the workers that may be used.

        Raises:
            ClusterError: no worker comes in time, none is fit (each is named), or the scheduler cannot read our tasks.
            StoreError: the folder cannot be written.
        """
        self._check_scheduler()
        self.requirements = (
            self._show(Path(store)) if store is not None else replace(self.requirements, token=None, secret="")
        )
        self.wait_for_workers()
        for address, said in self.each(self.requirements.refusal, self.addresses()).items():
            if said:
                self.refuse(address, _reason(said) if isinstance(said, Exception) else said)
        good = self.addresses()
        if not good:
            raise self.no_worker()
        return good

    def _check_scheduler(self) -> None:
        """Dask's scheduler reads tasks before it passes them on, so it needs the package, too."""

        def importable() -> str:  # travels as code, since the package may not be there
            from importlib import import_module

            try:
                import_module("featurepipe.execution.worker")
            except ImportError as error:
                return str(error)
            return ""

        missing = self.scheduler.answer(lambda: self.client.run_on_scheduler(importable))
        if missing:
            raise ClusterError(
                f"the scheduler {self.address} cannot read our tasks ({missing}); start it where featurepipe is installed"
            )

    def require(self, refusal: Callable[[], str]) -> None:
        """See `featurepipe.execution.executor.Executor`."""
        for address, said in self.each(refusal).items():
            if said and isinstance(said, str):
                self.refuse(address, said)
        if not self.addresses():
            raise self.no_worker()

    def refuse(self, address: str, why: str) -> None:
        """Notes that a worker must not be used, and says so, once."""
        if address not in self.refused:
            self.refused[address] = why
            self.say(f"worker {self._name(address)} is not used: {why}")

    def note_gone(self, address: str) -> None:
        """Says that a worker is gone, and why, where Dask knows."""
        if address in self._too_large:
            self.say(
                f"worker {address} needed more memory than it may have and was ended; what it was doing is done elsewhere"
            )
        elif not self.most:  # a cluster that shrinks when there is less to do says nothing of it
            self.say(f"worker {address} is gone; what it was doing is done elsewhere")

    def _note_too_large(self, event: tuple[float, dict[str, Any]]) -> None:
        self._too_large.add(str(event[1]["worker"]))

    def _known(self) -> dict[str, dict[str, Any]]:
        return dict(self.scheduler.ask("identity", n_workers=-1)["workers"])

    def _name(self, address: str) -> str:
        name = str(self._known().get(address, {}).get("id", address))
        return address if name == address else f"{name} ({address})"

    def _show(self, folder: Path) -> Requirements:
        """Puts a file into a folder, for workers to find; one for each folder."""
        folder = folder.absolute()
        if folder not in self._shown:
            secret = secrets.token_hex(8)
            token = folder / f".cluster-{secret}.tmp"  # a name that `gc` removes a day later, should we be killed
            self._shown[folder] = Requirements(self.requirements.versions, str(token), secret)
        shown = self._shown[folder]
        token = Path(shown.token or "")
        try:
            if token.exists():
                token.touch()  # so that `gc` does not take it for a dead one's
            else:
                token.write_text(shown.secret)
        except OSError as error:
            raise StoreError(f"cannot write into the store {folder}: {error.strerror}") from error
        return shown

    def close(self) -> None:
        """Removes the files that `check` put into stores; the client stays as it is."""
        for shown in self._shown.values():
            with suppress(OSError):  # such as storage that is away; `gc` removes it
                Path(shown.token or "").unlink(missing_ok=True)
        self._shown.clear()
        if not self.scheduler.is_lost:
            self.client.unsubscribe_topic(_MEMORY_TOPIC)

    def each(
        self, question: Callable[[], Any], addresses: Iterable[str] | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """Has each worker's process call a function, beside its tasks: their answers, or the exceptions instead.

        Args:
            question: the function.
            addresses: of the workers; by default of all that are not refused.
            seconds: how long they may take; by default long enough for workers that are busy, too.
        """
        asked = self.addresses() if addresses is None else addresses
        answers = self._asked(question, asked, seconds or ANSWER_SECONDS)
        silent = [address for address, said in answers.items() if isinstance(said, TimeoutError)]
        if silent and seconds is None:
            self.say(f"no answer from {', '.join(silent)}; waiting for it, at most {LAST_SECONDS:g} s")
            answers |= self._asked(question, silent, LAST_SECONDS)
        return answers

    def _asked(self, question: Callable[[], Any], addresses: Iterable[str], seconds: float) -> dict[str, Any]:
        asked = list(addresses)

        async def one(address: str) -> Any:
            return await asyncio.wait_for(self.client.run(question, workers=[address]), seconds)

        async def everyone() -> list[Any]:
            return await asyncio.gather(*map(one, asked), return_exceptions=True)

        with self.scheduler.reaching():
            said = self.client.sync(everyone)
        found = zip(asked, said, strict=True)
        return {who: what.get(who) if isinstance(what, dict) else what for who, what in found}

    def count(self) -> int:
        """How many workers are there now and are not refused."""
        return len(self.addresses())

    def expected(self) -> int:
        """See `featurepipe.execution.executor.Executor`."""
        return max(self.count(), self.most, 1)


def _reason(error: Exception) -> str:
    """Why a worker that did not answer is not used."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed there"
    return f"it gave no answer ({type(error).__name__}: {error})"


def _facts(address: str, known: dict[str, Any], said: dict[str, Any]) -> WorkerFacts:
    return WorkerFacts(
        address=address,
        name=str(known["id"]),
        threads=int(known["nthreads"]),
        memory_limit=int(known.get("memory_limit") or 0),
        **said,
    )
