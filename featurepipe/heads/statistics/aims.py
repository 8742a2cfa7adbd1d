"""What a threshold is to reach, as people write it; imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from featurepipe.errors import UsageError

AIMS = ("recall", "precision", "cost", "f1")


@dataclass(frozen=True)
class Wish:
    """What a threshold is to reach.

    Attributes:
        aim: ``recall``, ``precision``, ``cost`` or ``f1``.
        least: The recall or precision, above 0 and at most 1; for cost how many false alarms a miss costs as much as, above 0; 0
            for f1, which is to be the largest.
        text: As it was written.
    """

    aim: str
    least: float
    text: str

    @classmethod
    def of(cls, text: str) -> Wish:
        """Reads ``recall=0.95`` (or ``recall>=0.95``), ``precision=0.9``, ``cost=10:1`` (a miss : a false alarm) or ``f1``.

        Raises:
            UsageError: It is none of these.

        Example:
            >>> Wish.of("recall=0.95").least, Wish.of("cost=10:1").least
            (0.95, 10.0)
        """
        aim, equals, value = text.replace(" ", "").replace(">=", "=").partition("=")
        if aim == "f1" and not equals:
            return cls(aim, 0.0, text)
        parts = value.split(":")
        try:
            numbers = [float(part.rstrip("%")) / (100 if part.endswith("%") else 1) for part in parts]
        except ValueError:
            numbers = []
        fits = len(numbers) == (2 if aim == "cost" else 1) and all(0 < number < math.inf for number in numbers)
        if aim not in AIMS or aim == "f1" or not fits or (aim != "cost" and numbers[0] > 1):
            raise UsageError(
                f"{text!r} is no aim of a threshold; write recall=0.95, precision=0.9, cost=10:1 (what a miss costs : what a "
                "false alarm costs) or f1 (the largest F1); a recall or precision lies above 0 and is at most 1",
                option="threshold",
            )
        return cls(aim, numbers[0] / numbers[1] if aim == "cost" else numbers[0], text)

    @property
    def has_margin(self) -> bool:
        """Whether its lower confidence limit can be asked to reach it."""
        return self.aim in ("recall", "precision")
