"""Row shards: the seam by which heads learn from features where they are, in this process or at several workers.

What heads compute of many rows are sums over them, or one result a row. Both can be had shard by shard: ``row_shards_of`` tells
where the shards of some features are. Features in this process are one shard, and working on it is a plain call; features that
are spread over a cluster (``featurepipe.execution.spread``) offer ``row_shards()``, and the work travels to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featurepipe.display import bytes_of
from featurepipe.heads.blocks import Array, ArrayBlocks, Blocks, as_blocks, in_memory
from featurepipe.heads.devices import on_device

Change = Callable[[Blocks], Blocks]
Work = Callable[..., Any]


@dataclass(frozen=True)
class Rank:
    """One process's rank among several that work at the same time and talk to each other.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        threads: That it may use.
        rendezvous: What the place where they meet has to tell.
        stop: Whether nobody wants the result any more.
    """

    rank: int
    world_size: int
    threads: int
    rendezvous: Mapping[str, Any]
    stop: Callable[[], bool] = bool


class RowShards(Protocol):
    """Rows in contiguous shards, each at a place that keeps its features and whatever was sent there beside them.

    A work is called once a shard, at its place, with the shard's features as ``Blocks`` and its rows of the arrays that were
    sent, in that order. It must be picklable (a function of a module, a ``partial`` of one, an object) and change nothing.
    """

    @property
    def rows(self) -> int:
        """How many there are in all shards."""

    @property
    def memory(self) -> int | None:
        """Bytes that a work may take at each place, apart from the features; None where nothing but the user limits it."""

    def through(self, change: Change) -> RowShards:
        """The same rows, changed row by row as they are read; nothing is computed yet."""

    def kept(self, dtype: npt.DTypeLike, memory: int | str | None) -> RowShards:
        """The same rows in memory as ``dtype``, wherever they fit; ``memory`` is the user's limit for one place."""

    def beside(self, *rows: Array | None) -> RowShards:
        """The same rows with further arrays, the rows on their last axis; each shard's part is sent once, and stays."""

    def reduce(self, work: Work) -> Any:
        """The sum of what the work returns of each shard, by ``+``."""

    def map(self, work: Work) -> list[Any]:
        """What the work returns of each shard, in the order of the rows."""

    def gang_run(self, work: Work, rendezvous: Callable[[str, int], Any], *others: RowShards) -> list[Any]:
        """Has all places work at the same time, for work whose processes talk to each other.

        Args:
            work: Called once a place with its ``Rank``, and for these rows and each of the others with a list of the place's
                shards: (features, *rows beside them).
            rendezvous: Where they meet: called at one place with its host and the number of places; has ``told()``, what all must
                know, and ``close()``, after which nobody waits there.
            *others: Rows on the same places.

        Returns:
            What the work returned at each place.
        """


class LocalRowShards:
    """All rows as one shard, in this process."""

    memory: int | None = None

    def __init__(self, blocks: Blocks, *rows: Array | None) -> None:
        self._blocks, self._beside = blocks, rows

    @property
    def rows(self) -> int:
        """See ``RowShards``."""
        return self._blocks.shape[0]

    def through(self, change: Change) -> LocalRowShards:
        """See ``RowShards``."""
        return LocalRowShards(change(self._blocks), *self._beside)

    def kept(self, dtype: npt.DTypeLike, memory: int | str | None) -> LocalRowShards:
        """See ``RowShards``."""
        blocks, wanted = self._blocks, np.dtype(dtype)
        if (there := on_device(blocks)) is not None:  # which keeps them if its memory is enough
            return LocalRowShards(there, *self._beside)
        at_hand = isinstance(blocks, ArrayBlocks) and blocks.dtype == wanted
        rows, width = blocks.shape
        if not at_hand and (memory is None or 2 * rows * width * wanted.itemsize <= bytes_of(memory)):
            blocks = in_memory(blocks, wanted)
        return LocalRowShards(blocks, *self._beside)

    def beside(self, *rows: Array | None) -> LocalRowShards:
        """See ``RowShards``."""
        return LocalRowShards(self._blocks, *self._beside, *rows)

    def reduce(self, work: Work) -> Any:
        """See ``RowShards``."""
        return work(self._blocks, *self._beside)

    def map(self, work: Work) -> list[Any]:
        """See ``RowShards``."""
        return [self.reduce(work)]

    def gang_run(self, work: Work, rendezvous: Callable[[str, int], Any], *others: RowShards) -> list[Any]:
        """Nobody is here to talk to: whoever has such work does it without the seam."""
        raise NotImplementedError


def row_shards_of(features: Blocks | Array) -> RowShards:
    """Where the rows of some features are: elsewhere if they offer ``row_shards()`` and it says so, else here, in one shard."""
    elsewhere = remote_row_shards(features)
    return LocalRowShards(as_blocks(features)) if elsewhere is None else elsewhere


def remote_row_shards(features: Blocks | Array) -> RowShards | None:
    """The shards of features that are spread over other places; None for those that are read here."""
    shards_of = getattr(features, "row_shards", None)
    found: RowShards | None = None if shards_of is None else shards_of()
    return found


def concatenated(parts: list[Array]) -> Array:
    """One array of the shards' rows, in their order; the only shard's own where there is but one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
