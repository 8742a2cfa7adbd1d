"""What a threshold of two classes is to reach, as people write it; imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from featurepipe.errors import UsageError

AIMS = ("recall", "precision", "cost")


@dataclass(frozen=True)
class Wish:
    """What a threshold is to reach.

    Attributes:
        aim: ``recall``, ``precision`` or ``cost``.
        least: The recall or precision, above 0 and at most 1; for cost how many false alarms a miss costs as much as, above 0.
        text: As it was written.
    """

    aim: str
    least: float
    text: str

    @classmethod
    def of(cls, text: str) -> Wish:
        """Reads ``recall=0.95``, ``precision=0.9`` or ``cost=10:1`` (a miss : a false alarm).

        Raises:
            UsageError: It is none of these.

        Example:
            >>> Wish.of("recall=0.95").least, Wish.of("cost=10:1").least
            (0.95, 10.0)
        """
        aim, _, value = text.replace(" ", "").partition("=")
        parts = value.split(":")
        try:
            numbers = [float(part.rstrip("%")) / (100 if part.endswith("%") else 1) for part in parts]
        except ValueError:
            numbers = []
        fits = len(numbers) == (2 if aim == "cost" else 1) and all(0 < number < math.inf for number in numbers)
        if aim not in AIMS or not fits or (aim != "cost" and numbers[0] > 1):
            raise UsageError(
                f"{text!r} is no aim of a threshold; write recall=0.95, precision=0.9 or cost=10:1 (what a miss costs : what a "
                "false alarm costs); a recall or precision lies above 0 and is at most 1",
                option="threshold",
            )
        return cls(aim, numbers[0] / numbers[1] if aim == "cost" else numbers[0], text)
