"""What p-values together say: adjusted for their number, and held against thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featurepipe.errors import UsageError

NO_DRIFT, WARNING, DRIFT, TOO_FEW = "no drift", "warning", "drift", "too few images"

_LEAST_PERMUTATIONS = 9_999
_MOST_PERMUTATIONS = 1_000_000


@dataclass(frozen=True)
class Thresholds:
    """Adjusted p-values below which a night is warned of, and below which it fails.

    Attributes:
        warn: Below it there is a warning.
        fail: Below it there is drift; None for never.
    """

    warn: float
    fail: float | None

    def __post_init__(self) -> None:
        for name, value in (("warn", self.warn), ("fail", self.fail)):
            if value is not None and not 0 < value < 1:
                raise UsageError(
                    f"{name}={value} is no p-value to compare with; give one between 0 and 1, such as 0.01"
                )
        if self.fail is not None and self.fail > self.warn:
            raise UsageError(
                f"fail={self.fail} is above warn={self.warn}: nothing would ever be warned of; give a smaller fail"
            )

    def permutations(self, tests: int) -> int:
        """How many are needed for the least adjusted p-value of so many tests to be half the lower threshold.

        Raises:
            UsageError: More than a million, which would take minutes.
        """
        least = self.warn if self.fail is None else self.fail
        needed = int(np.ceil(2 * tests / least))
        if needed > _MOST_PERMUTATIONS:
            raise UsageError(
                f"a p-value below {least} in {tests} tests would take {needed:,} permutations; thresholds of "
                f"{2 * tests / _MOST_PERMUTATIONS:.2g} and more can be tested"
            )
        return max(_LEAST_PERMUTATIONS, needed - 1)

    def verdict(self, adjusted: Sequence[float]) -> str:
        """Says what the least of the adjusted p-values means."""
        least = min(adjusted)
        if self.fail is not None and least < self.fail:
            return DRIFT
        return WARNING if least < self.warn else NO_DRIFT


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values so that the least of them is below t with a probability of t at most, if nothing has changed.

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure"; for tests that depend on each other in any way.

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    stepped = np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]
