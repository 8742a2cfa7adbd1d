"""Where rows are, there they are worked on: the seam by which heads learn from features that several machines keep.

What heads compute of many rows are sums over them, or one result a row. Both can be had share by share: ``shares_of`` tells where
the shares of some features are. Features in this process are one share, and working on it is a plain call; features that
are spread over a cluster (``featurepipe.execution.spread``) offer ``shared()``, and the work travels to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featurepipe.heads.blocks import Array, ArrayBlocks, Blocks, as_blocks, in_memory
from featurepipe.sizes import bytes_of

Change = Callable[[Blocks], Blocks]
Work = Callable[..., Any]


@dataclass(frozen=True)
class Seat:
    """One process's place among several that work at the same time and talk to each other.

    Attributes:
        number: From 0.
        count: How many there are.
        threads: That it may use.
        desk: What the desk where they meet has to tell.
        stop: Whether nobody wants the result any more.
    """

    number: int
    count: int
    threads: int
    desk: Mapping[str, Any]
    stop: Callable[[], bool] = bool


class Shares(Protocol):
    """Rows in contiguous shares, each at a place that keeps its features and whatever was sent there beside them.

    A work is called once a share, at its place, with the share's features as ``Blocks`` and its rows of the arrays that were
    sent, in that order. It must be picklable (a function of a module, a ``partial`` of one, an object) and change nothing.
    """

    @property
    def rows(self) -> int:
        """How many there are in all shares."""

    @property
    def memory(self) -> int | None:
        """Bytes that a work may take at each place, apart from the features; None where nothing but the user limits it."""

    def through(self, change: Change) -> Shares:
        """The same rows, changed row by row as they are read; nothing is computed yet."""

    def kept(self, dtype: npt.DTypeLike, memory: int | str | None) -> Shares:
        """The same rows in memory as ``dtype``, wherever they fit; ``memory`` is the user's limit for one place."""

    def beside(self, *rows: Array | None) -> Shares:
        """The same rows with further arrays, the rows on their last axis; each share's part is sent once, and stays."""

    def added(self, work: Work) -> Any:
        """The sum of what the work returns of each share, by ``+``."""

    def listed(self, work: Work) -> list[Any]:
        """What the work returns of each share, in the order of the rows."""

    def at_once(self, work: Work, desk: Callable[[str, int], Any], *others: Shares) -> list[Any]:
        """Has all places work at the same time, for work whose processes talk to each other.

        Args:
            work: Called once a place with its ``Seat``, and for these rows and each of the others with a list of the place's
                shares: (features, *rows beside them).
            desk: Where they meet: called at one place with its host and the number of places; has ``told()``, what all must
                know, and ``close()``, after which nobody waits there.
            *others: Rows on the same places.

        Returns:
            What the work returned at each place.
        """


class Here:
    """All rows as one share, in this process."""

    memory: int | None = None

    def __init__(self, blocks: Blocks, *rows: Array | None) -> None:
        self._blocks, self._beside = blocks, rows

    @property
    def rows(self) -> int:
        """See ``Shares``."""
        return self._blocks.shape[0]

    def through(self, change: Change) -> Here:
        """See ``Shares``."""
        return Here(change(self._blocks), *self._beside)

    def kept(self, dtype: npt.DTypeLike, memory: int | str | None) -> Here:
        """See ``Shares``."""
        blocks, wanted = self._blocks, np.dtype(dtype)
        at_hand = isinstance(blocks, ArrayBlocks) and blocks.dtype == wanted
        rows, width = blocks.shape
        if not at_hand and (memory is None or 2 * rows * width * wanted.itemsize <= bytes_of(memory)):
            blocks = in_memory(blocks, wanted)
        return Here(blocks, *self._beside)

    def beside(self, *rows: Array | None) -> Here:
        """See ``Shares``."""
        return Here(self._blocks, *self._beside, *rows)

    def added(self, work: Work) -> Any:
        """See ``Shares``."""
        return work(self._blocks, *self._beside)

    def listed(self, work: Work) -> list[Any]:
        """See ``Shares``."""
        return [self.added(work)]

    def at_once(self, work: Work, desk: Callable[[str, int], Any], *others: Shares) -> list[Any]:
        """Nobody is here to talk to: whoever has such work does it without the seam."""
        raise NotImplementedError


def shares_of(features: Blocks | Array) -> Shares:
    """Where the rows of some features are: elsewhere if they offer ``shared()`` and it says so, else here, in one share."""
    elsewhere = shares_elsewhere(features)
    return Here(as_blocks(features)) if elsewhere is None else elsewhere


def shares_elsewhere(features: Blocks | Array) -> Shares | None:
    """The shares of features that are spread over other places; None for those that are read here."""
    share_out = getattr(features, "shared", None)
    found: Shares | None = None if share_out is None else share_out()
    return found


def together(parts: list[Array]) -> Array:
    """One array of the shares' rows, in their order; the only share's own where there is but one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
