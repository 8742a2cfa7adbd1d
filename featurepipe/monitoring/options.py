"""The options of the test for drift; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featurepipe.option_groups import OptionGroup, at_least, is_number, option


def _p_value(given: Any) -> str | None:
    return (
        None if is_number(given, (int, float)) and 0 < given < 1 else "must be a p-value between 0 and 1, such as 0.01"
    )


@dataclass(frozen=True, kw_only=True)
class DriftOptions(OptionGroup):
    """What new images are compared with, and which difference matters."""

    reference: str = option(
        "previous", "the snapshot to compare with (default: previous)", metavar="previous|first|RUN-ID"
    )
    warn: float = option(
        0.01, "warn below this p-value, adjusted for the number of tests (default: 0.01)", metavar="P", check=_p_value
    )
    fail: float | None = option(
        None, "fail, with exit code 1, below this p-value (default: never)", metavar="P", check=_p_value
    )
    seed: int = option(0, "of what is drawn (default: 0)", check=at_least(0))
