"""What storing does to a feature's value: float16 where that holds it, float32 elsewhere, and never NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import NonFiniteFeatures, UsageError
from featurepipe.store.parts import all_finite

ROW_MAXIMUM_SAFE = 1.0
"""A row whose largest value is beyond this loses nothing that matters to float16's coarse steps near zero, unless it is
wider than a hundred million values."""


class Rounding:
    """Gives features their stored values, batch after batch of one run.

    A column that float16 cannot hold stays float32 from that batch on. The writer of parts rounds with it, and so does
    whatever uses features without storing them.

    Args:
        dtype: The space's stored dtype, ``float16`` or ``float32``.
        on_overflow: Called once for each column that float16 cannot hold.
    """

    def __init__(self, dtype: str, on_overflow: Callable[[str], None] | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._on_overflow = on_overflow
        self._wide: set[str] = set()

    def __call__(self, column: str, values: npt.NDArray[Any], ids: Sequence[str]) -> npt.NDArray[Any]:
        """Returns a copy of (n, D) features in the stored dtype, checked to be finite.

        Raises:
            NonFiniteFeatures: A value is NaN or infinite; names the images.
            UsageError: These are no (n, D) floats.
        """
        if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind != "f":
            raise UsageError(f"{column}: features must be (n, D) floats, not {values.shape} {values.dtype}")
        narrow = self._dtype == np.float16 and column not in self._wide
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16 if narrow else np.float32)
        if not all_finite(stored):
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any() or not narrow:
                where = np.flatnonzero(bad)
                names = ", ".join(ids[i] for i in where[:5]) + (", ..." if len(where) > 5 else "")
                raise NonFiniteFeatures(f"{column}: NaN or infinity for {len(where)} of {len(values)} images: {names}")
            return self._widened(column, values, f"a value of {np.abs(values).max():g} does not fit (largest 65504)")
        if narrow and len(values) and _loses_small_values(values, stored):
            return self._widened(
                column, values, f"values as small as {np.abs(values).mean():g} on average lose their digits"
            )
        return stored

    def _widened(self, column: str, values: npt.NDArray[Any], why: str) -> npt.NDArray[Any]:
        """Keeps the column as float32 from here on, and says so."""
        self._wide.add(column)
        if self._on_overflow is not None:
            self._on_overflow(f"{column}: float16 cannot hold it: {why}; this column is stored as float32 from here on")
        return values.astype(np.float32)


def _loses_small_values(values: npt.NDArray[Any], stored: npt.NDArray[Any]) -> bool:
    """Whether float16's fixed steps of 6e-8 below 6e-5 cost some row more than a thousandth of its length."""
    if np.maximum(values.max(axis=1), -values.min(axis=1)).min() > ROW_MAXIMUM_SAFE:
        return False
    lost = np.linalg.norm(values - stored, axis=1)
    return bool((lost > 1e-3 * np.linalg.norm(values, axis=1)).any())
