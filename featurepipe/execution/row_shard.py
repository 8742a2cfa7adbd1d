"""One shard of the rows, inside the worker that keeps it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from dask.sizeof import sizeof

from featurepipe.display import bytes_of
from featurepipe.errors import WorkerRefused
from featurepipe.execution.worker import Requirements
from featurepipe.heads.blocks import Array, ArrayBlocks, Blocks, MappedBlocks, in_memory

if TYPE_CHECKING:
    from distributed import Future

Change = Callable[[Blocks], Blocks]

KEPT = 0.5
"""Of a worker's memory limit: features are kept while its process, with them, takes no more."""

_KEEPING = threading.Lock()  # else two shards that move to one worker would both find room for one


@dataclass(frozen=True)
class StoredRows:
    """Some neighbouring rows of features as ``Blocks``, read from where they are stored.

    Attributes:
        source: The rows.
        first: The number of the first of them among all rows.
    """

    source: Any
    first: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        rows, width = self.source.shape
        return rows, width

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the values are stored."""
        dtype: np.dtype[Any] = np.dtype(self.source.dtype)
        return dtype

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Reads some of the rows, numbered from 0."""
        return np.asarray(self.source.read(dtype, rows=rows))


@dataclass(frozen=True)
class PlacedShard:
    """One worker's shard.

    Attributes:
        worker: The address of the worker that it was given to.
        rows: Which of all rows.
        kept: The features, and the arrays beside them; None for an array that is None.
    """

    worker: str
    rows: slice
    kept: tuple[Future[Any] | None, ...]


@dataclass(frozen=True)
class Placement:
    """Where the shards are.

    Attributes:
        places: The shards, in the order of the rows.
        memory: Bytes that a work may take at a worker, beside the features; None where workers have no limit.
        changes: What is done to features as they are read.
    """

    places: tuple[PlacedShard, ...]
    memory: int | None
    changes: tuple[Change, ...] = ()


def begin(source: Any, first: int, requirements: Requirements) -> StoredRows:
    """The shard as its worker begins with it.

    Raises:
        WorkerRefused: The worker must not be used.
    """
    why = requirements.refusal()
    if why:
        raise WorkerRefused(f"a shard of the features came to a worker that must not be used: {why}")
    return StoredRows(source, first)


def keep(changes: tuple[Change, ...], dtype: np.dtype[Any], memory: int | str | None, shard: Blocks) -> Blocks:
    """The shard's features in memory as ``dtype``; as they are stored if only that fits; else as they are, to be read anew.

    Args:
        changes: What is done to them as they are read.
        dtype: To compute in.
        memory: What the user lets the fit take; half of it is for these.
        shard: As stored.
    """
    with _KEEPING, all_threads():
        room = room_here() if memory is None else min(room_here(), bytes_of(memory) // 2)
        blocks = changed(shard, changes)
        if bytes_as(blocks, dtype) <= room:
            return in_memory(blocks, dtype)
        if bytes_as(shard, shard.dtype) <= room:
            return changed(in_memory(shard, shard.dtype), changes)
        return blocks


def ask(order: bytes, changes: tuple[Change, ...], shard: Blocks, *rows: Array | None) -> Any:
    """Has a work, which comes pickled, done on the shard, by as many threads as the worker has."""
    from distributed.protocol.pickle import loads

    work = loads(order)
    with all_threads():
        return work(changed(shard, changes), *rows)


def same(value: Any) -> Any:
    """What it is given: a value that tasks shard travels as the result of a task of its own, which Dask can do again."""
    return value


def packed(array: Array) -> tuple[Array, int, np.dtype[Any]]:
    """An array (..., m) as it travels: zeros and ones as bits, other whole numbers in the smallest dtype.

    Returns:
        What `unpacked` takes.
    """
    rows, dtype = array.shape[-1], array.dtype
    if np.logical_or(array == 0, array == 1).all():
        return np.packbits(array.astype(bool), axis=-1), rows, dtype
    if dtype.kind in "iu":
        least, most = np.min_scalar_type(array.min()), np.min_scalar_type(array.max())
        array = array.astype(np.result_type(least, most))
    return np.ascontiguousarray(array), 0, dtype


def unpacked(array: Array, bits: int, dtype: np.dtype[Any]) -> Array:
    """Floats as they were, and whole numbers in whatever dtype holds them.

    Args:
        array: As it has travelled.
        bits: How many on the last axis, if it holds bits; else 0.
        dtype: Of what was sent.
    """
    if bits:
        return np.unpackbits(array, axis=-1, count=bits).astype(np.uint8 if dtype.kind in "iu" else dtype, copy=False)
    return array


def changed(blocks: Blocks, changes: tuple[Change, ...]) -> Blocks:
    """The blocks as they are read through all changes."""
    for change in changes:
        blocks = change(blocks)
    return blocks


def bytes_as(blocks: Blocks, dtype: npt.DTypeLike) -> int:
    """What they take in memory."""
    return blocks.shape[0] * blocks.shape[1] * np.dtype(dtype).itemsize


def room_here() -> int:
    """Bytes that this worker's process may take for features, now."""
    import psutil  # type: ignore[import-untyped,unused-ignore]
    from distributed import get_worker
    from distributed.system import MEMORY_LIMIT

    limit = get_worker().memory_manager.memory_limit or MEMORY_LIMIT
    return int(KEPT * limit) - int(psutil.Process().memory_info().rss)


def all_threads() -> AbstractContextManager[Any]:
    """Lets matrix products use all threads of the worker, for which Dask allows them one, as if each had a task."""
    from distributed import get_worker

    limited: AbstractContextManager[Any] = _libraries().limit(limits=get_worker().state.nthreads)
    return limited


@cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # looking for them takes milliseconds


@sizeof.register(ArrayBlocks)  # type: ignore[no-untyped-call,untyped-decorator]
def _array_size(blocks: ArrayBlocks) -> int:
    """Dask places tasks, and judges a worker's memory, by this."""
    return blocks.array.nbytes


@sizeof.register(MappedBlocks)  # type: ignore[no-untyped-call,untyped-decorator]
def _mapped_size(blocks: MappedBlocks) -> int:
    return int(sizeof(blocks.source)) + 1000
