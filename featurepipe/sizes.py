"""Amounts of memory, and of time, as people write them."""

from __future__ import annotations

import re

from featurepipe.errors import UsageError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SECONDS |= {
    f"{word}{end}": n
    for word, n in (("second", 1), ("minute", 60), ("hour", 3600), ("day", 86400))
    for end in ("", "s")
}
_DURATION = rf"(\d+(?:\.\d+)?)\s*({'|'.join(sorted(_SECONDS, key=len, reverse=True))})\s*"


def bytes_of(amount: float | str) -> int:
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


def seconds_of(duration: float | str) -> float:
    """Returns a duration in seconds.

    Args:
        duration: Seconds, or text: numbers with units (s, m or min, h, d, or "6 hours"), or a number alone, which is seconds.

    Raises:
        UsageError: It is no positive duration.

    Example:
        >>> seconds_of("30min"), seconds_of("1h30m"), seconds_of("0.5 d"), seconds_of("6 hours"), seconds_of(1.5)
        (1800.0, 5400.0, 43200.0, 21600.0, 1.5)
    """
    text = str(duration).strip().lower()
    if re.fullmatch(r"[\d.]+", text):
        text += "s"
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_DURATION, text))
    if not seconds or not re.fullmatch(f"(?:{_DURATION})+", text):
        raise UsageError(f"{duration!r} is no duration; give seconds or text such as '90s', '30min', '6h', '1h30m'")
    return seconds
