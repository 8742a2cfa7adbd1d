"""P-values by drawing what chance would give, no longer than needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_STOP = 100  # draws at least as extreme as the data after which the p-value is known to a tenth of itself
_BATCH = 500
_EQUAL = 1e-6  # relative: two statistics that differ by less differ by rounding


def sequential_p_value(observed: float, draw: Callable[[int], npt.NDArray[np.floating]], most: int) -> float:
    """Counts how often chance gives what was observed, or more, and stops as soon as it has done so often enough.

    Besag & Clifford 1991, "Sequential Monte Carlo p-values": if the h-th such draw is the l-th of all, ``h / l`` is a
    p-value whose level is exact, like ``(1 + how many) / (1 + draws)`` after all of them.

    Args:
        observed: The statistic of the data; large ones count.
        draw: Returns the statistics (n,) of n draws under the hypothesis, independent of all before.
        most: Draws at most.
    """
    least = observed - _EQUAL * abs(observed)
    exceeding = done = 0
    while done < most:
        batch = min(_BATCH, most - done)
        at = done + 1 + np.flatnonzero(draw(batch) >= least)
        if exceeding + len(at) >= _STOP:
            return _STOP / float(at[_STOP - exceeding - 1])
        exceeding, done = exceeding + len(at), done + batch
    return (1 + exceeding) / (1 + most)
