"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from featurepipe.errors import UsageError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


def bytes_of(amount: int | str) -> int:
    """Returns an amount of memory in bytes.

    Args:
        amount: Bytes, or text: a number and a unit, decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB).

    Raises:
        UsageError: It is no positive amount.

    Example:
        >>> bytes_of("512MB"), bytes_of("1.5 GiB"), bytes_of(4096)
        (512000000, 1610612736, 4096)
    """
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower())
        number = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    else:
        number = amount
    if not number >= 1:
        raise UsageError(
            f"memory {amount!r} is no amount of memory; give bytes or text such as '512MB', '2GB', '1.5GiB'"
        )
    return int(number)
