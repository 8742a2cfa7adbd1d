"""What storing does to a feature's value, for features that are used without being stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import NonFiniteFeatures

ROW_MAXIMUM_SAFE = 1.0
"""As in the store's writer: rows with a larger value lose nothing that matters to float16's coarse steps near zero."""


class Rounding:
    """Gives features the values that the store's writer would keep, batch after batch of one run.

    float16 where the space says so and the column fits; a column that does not fit stays float32 from that batch on.
    ``featurepipe.store.writer.PartWriter`` decides the same way, and a test holds the two together.

    Args:
        dtype: the space's stored dtype, ``float16`` or ``float32``.
        say: told once for each column that float16 cannot hold.
    """

    def __init__(self, dtype: str, say: Callable[[str], None]) -> None:
        self._narrow = np.dtype(dtype) == np.float16
        self._say = say
        self._wide: set[str] = set()

    def __call__(self, column: str, values: npt.NDArray[np.float32], ids: Sequence[str]) -> npt.NDArray[Any]:
        """Rounds the float32 (N, D) features of one batch.

        Raises:
            NonFiniteFeatures: a value is NaN or infinite; names the images.
        """
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            names = ", ".join(ids[row] for row in np.flatnonzero(bad)[:5]) + (", ..." if bad.sum() > 5 else "")
            raise NonFiniteFeatures(f"{column}: NaN or infinity for {bad.sum()} of {len(values)} images: {names}")
        if not self._narrow or column in self._wide:
            return values
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
        if np.isfinite(stored).all() and not _loses_small_values(values, stored):
            return stored
        self._wide.add(column)
        self._say(f"{column}: float16 cannot hold it; this column is float32 from here on, as it would be in a store")
        return values


def _loses_small_values(values: npt.NDArray[np.float32], stored: npt.NDArray[np.float16]) -> bool:
    """Whether float16's fixed steps of 6e-8 below 6e-5 cost some row more than a thousandth of its length."""
    if np.abs(values).max(axis=1).min() > ROW_MAXIMUM_SAFE:
        return False
    lost = np.linalg.norm(values - stored, axis=1)
    return bool((lost > 1e-3 * np.linalg.norm(values, axis=1)).any())
