"""The executor on the workers of a Dask cluster."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from featurepipe.display import without_password
from featurepipe.errors import StoreError
from featurepipe.execution.dispatch import dispatch
from featurepipe.execution.executor import Arrived, Executor, Function, MapOptions
from featurepipe.execution.row_shards import SpreadFeatures, spread
from featurepipe.execution.worker import Attempt, Carried, pickled
from featurepipe.execution.worker_pool import WorkerPool

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
