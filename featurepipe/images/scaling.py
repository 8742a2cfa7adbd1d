"""JPEGs decoded at a half, a quarter or an eighth of their size, by libjpeg's transforms of fewer frequencies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from featurepipe.errors import UsageError

ROUTES: Final = ("cpu", "gpu")
"""Where JPEGs are decoded in full."""
TIMES: Final = 2.0
"""How many times the size that an image is resized to ``scaled`` keeps at least."""
MOST_TIMES: Final = 16
CHOICES: Final = "auto, cpu, gpu, scaled, scaled=N"
_DIVISORS: Final = (8, 4, 2)
"""Of the sizes. libjpeg also knows odd eighths, which take longer to decode than the next of these, or than all of the image."""


@dataclass(frozen=True)
class Scaling:
    """How small a JPEG may be decoded.

    Attributes:
        times: How many times ``target`` is kept at least.
        target: What the image is resized to next: pixels of the shorter side, or (height, width).
    """

    times: float
    target: int | tuple[int, int]

    @classmethod
    def of(cls, route: str, target: int | tuple[int, int]) -> Self | None:
        """That of a decode route; None where it decodes in full.

        Raises:
            UsageError: The route is unknown.
        """
        times = parse_route(route)[1]
        return None if times is None else cls(times, target)

    def divisor(self, height: int, width: int) -> int:
        """By what an upright image's height and width may be divided: 1, 2, 4 or 8.

        Example:
            >>> Scaling(2, 256).divisor(3000, 4000), Scaling(2, 256).divisor(1023, 4000), Scaling(2, (64, 8)).divisor(256, 300)
            (4, 1, 2)
        """
        if isinstance(self.target, int):
            height, width, target = min(height, width), max(height, width), (self.target, 1)
        else:
            target = self.target
        shares = (height / (self.times * target[0]), width / (self.times * target[1]))
        return next((divisor for divisor in _DIVISORS if divisor <= min(shares)), 1)


def parse_route(text: str) -> tuple[str, float | None]:
    """Reads where and how JPEGs are decoded.

    Returns:
        The route as a feature space has it, and the times that a scaled one keeps, else None.

    Raises:
        UsageError: It is none; names the choices.

    Example:
        >>> parse_route("cpu"), parse_route("scaled"), parse_route("scaled=1.50")
        (('cpu', None), ('scaled=2', 2.0), ('scaled=1.5', 1.5))
    """
    if text in ROUTES:
        return text, None
    found = re.fullmatch(r"scaled(?:=(\d{1,2}(?:\.\d{1,4})?))?", text)
    times = float(found[1] or TIMES) if found else 0.0
    if not 1 <= times <= MOST_TIMES:
        raise UsageError(
            f"unknown decode {text!r}; choices: {CHOICES}, with N from 1 to {MOST_TIMES}: how many times the size that images "
            f"are resized to is kept at least ({TIMES:g} if not said)",
            option="decode",
        )
    return f"scaled={times:g}", times
