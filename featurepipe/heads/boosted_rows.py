"""How xgboost gets rows: block by block, from one place or several, quantised as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost

from featurepipe.errors import FeaturepipeError
from featurepipe.heads.blocks import Array, Blocks, iterate, rows_per_block
from featurepipe.heads.inputs import Codes, Floats


@dataclass(frozen=True)
class Piece:
    """Rows to learn from or to check on.

    Attributes:
        blocks: (m, D) features.
        codes: (m,) class numbers.
        weights: (m,) weights; None for ones.
    """

    blocks: Blocks
    codes: Codes
    weights: Floats | None = None


class Batches(xgboost.DataIter):
    """Hands blocks to xgboost, which asks for all of them several times.

    Args:
        pieces: one after the other.
        width: values a row, for a place without rows.
        memory: what the blocks alive at one time may take.
        holding: keep an error of reading in ``error`` and hand over zeros, instead of raising. Where several processes count
            quantiles together, one that stops in the middle would leave the others waiting.
    """

    def __init__(
        self, pieces: Sequence[Piece], width: int, memory: int | str | None = None, *, holding: bool = False
    ) -> None:
        super().__init__()
        self._pieces, self._width, self._memory, self._holding = pieces, width, memory, holding
        self._coming: Iterator[tuple[Array, Codes, Floats | None]] = iter(())
        self.error: FeaturepipeError | None = None

    def reset(self) -> None:
        """Starts again at the first row."""
        self._coming = self._batches()

    def next(self, input_data: Any) -> bool:
        """Hands over the next block; false at the end."""
        block, codes, weights = next(self._coming, (None, None, None))
        if block is None:
            return False
        input_data(data=block, label=codes, **({} if weights is None else {"weight": weights}))
        return True

    def _batches(self) -> Iterator[tuple[Array, Codes, Floats | None]]:
        if not any(piece.blocks.shape[0] for piece in self._pieces):
            yield np.empty((0, self._width), np.float32), np.empty(0, np.int64), None
        for piece in self._pieces:
            for place, block in self._blocks(piece.blocks):
                yield block, piece.codes[place], None if piece.weights is None else piece.weights[place]

    def _blocks(self, blocks: Blocks) -> Iterator[tuple[slice, Array]]:
        done = 0
        try:
            for place, block in iterate(blocks, memory=self._memory, dtype=np.float32):
                yield place, block
                done = place.stop
        except FeaturepipeError as error:
            if not self._holding:
                raise
            self.error = error
            rows, step = blocks.shape[0], rows_per_block(self._width, np.float32, self._memory)
            for start in range(done, rows, step):
                place = slice(start, min(rows, start + step))
                yield place, np.zeros((place.stop - start, self._width), np.float32)
