"""What an extraction may cost: rejects, images gone from the source, space on the disk."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from featurepipe.display import bytes_of, seconds_of, size
from featurepipe.errors import DiskFull, Message, Option, SourceError, UsageError
from featurepipe.features.options import (
    DamageOptions,
    MachineOptions,
    MirrorOption,
    Options,
    SettingOptions,
    SourceOptions,
)
from featurepipe.option_groups import OptionGroup, is_bytes, is_number, option

ALL = "100%"
"""The share that puts up with a source that lists nothing."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the free space."""


LONGEST = 366 * 86_400
"""Seconds: no clock or timer of the system is asked for more."""
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(%?)")


def allowance(limit: float | str, images: int) -> float:
    """How many of ``images`` a limit allows, whether it is a number or a share.

    Args:
        limit: what the user gave.
        images: what a share is of.

    Raises:
        UsageError: it is neither a count nor a share.

    Example:
        >>> allowance("1%", 250), allowance(3, 250)
        (2.5, 3.0)
    """
    match = _AMOUNT.fullmatch(str(limit).strip())
    if match is None:
        raise UsageError(f"{limit!r} {_NO_SHARE}")
    number = float(match[1])
    return number / 100 * images if match[2] else number


_NO_SHARE = "must be a number of images such as 10, or a share such as '1%'"


def _share(given: Any) -> str | None:
    is_one = (isinstance(given, str) or is_number(given, Real)) and _AMOUNT.fullmatch(str(given).strip())
    return None if is_one else _NO_SHARE


def _space(given: Any) -> str | None:
    is_one = (is_number(given, Real) and given == 0) or given == "0" or is_bytes(given)
    return None if is_one else "is no amount of space; give bytes or text such as '500MB', '20GB'; 0 for no limit"


def seconds_at_most(given: Any) -> float:
    """Reads a duration that clocks can count.

    Raises:
        UsageError: It is none, or more than a year.
    """
    seconds = seconds_of(given)
    if seconds > LONGEST:
        raise UsageError(f"{given!r} is too long: a run, or a wait, is of 366 days at most")
    return seconds


@dataclass(frozen=True, kw_only=True)
class RejectLimit(OptionGroup):
    """How many images may be unusable."""

    max_rejects: int | float | str = option(
        "1%", "tolerate up to N or P % unusable images (default: 1%)", metavar="N|P%", check=_share
    )


EXTRACTION_GROUPS = (SettingOptions, MachineOptions, SourceOptions, DamageOptions, RejectLimit)
"""Options of extraction that commands pass on which extract on the way."""


@dataclass(frozen=True, kw_only=True)
class Limits(RejectLimit):
    """What makes an extraction refuse to begin, end early, or fail."""

    max_gone: int | float | str | None = option(
        None, "refuse if more images of the last snapshot are gone (default: if all are; 100%: never)",
        metavar="N|P%", check=_share,
    )  # fmt: skip
    min_free: int | float | str | None = option(
        None, "stop while this much is still free on the store's disk, such as 20GB", metavar="AMOUNT", check=_space
    )
    time_budget: float | None = option(
        None, "stop after so long, such as 90s, 30min or 6h; the next run goes on", metavar="TIME", read=seconds_at_most
    )

    def check_gone(self, name: str, listed: int, before: int, gone: int) -> None:
        """Refuses a listing that lacks too many images.

        Args:
            name: the source's.
            listed: images that it lists now.
            before: images in the dataset's last snapshot.
            gone: how many of those it no longer lists.

        Raises:
            SourceError: it does, or it is empty.
        """
        all_may_go = str(self.max_gone).strip() == ALL
        if not listed and not all_may_go:
            text = f"no images in {name}: nothing there has the suffix of an image. Check the path"
            if not before:
                raise SourceError(text)
            lost = f"{text}, though the last snapshot has {before:,}. If they are gone on purpose: "
            raise SourceError(Message(lost, Option("max_gone", ALL)))
        if self.max_gone is not None and gone > allowance(self.max_gone, before):
            raise SourceError(
                Message(
                    f"{gone:,} of the {before:,} images in the last snapshot are gone from {name}, more than ",
                    Option("max_gone", self.max_gone),
                    " allows. If they were deleted or renamed on purpose: ",
                    Option("max_gone", gone),
                )
            )

    def floor(self, folder: Path) -> DiskFloor:
        """Watches the free space of the disk that ``folder`` is on."""
        return DiskFloor(folder, 0 if self.min_free in (None, 0, "0") else bytes_of(self.min_free))


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions(Limits, SourceOptions, MirrorOption, Options):
    """All options of `featurepipe.extract`, where they are explained."""


class DiskFloor:
    """Whether a disk still has the space that must stay free.

    Args:
        folder: on the disk.
        floor: bytes; 0 for no such limit.

    Attributes:
        reached: whether there was less at the last look; it stays so.
    """

    def __init__(self, folder: Path, floor: int) -> None:
        self._folder, self._floor = folder, floor
        self._looked: float | None = None
        self.reached = False

    def __call__(self) -> bool:
        """Whether less is free; looks every second at most."""
        now = time.monotonic()
        if self._floor and not self.reached and (self._looked is None or now - self._looked >= LOOK_EVERY):
            self._looked = now
            self.reached = shutil.disk_usage(self._folder).free < self._floor
        return self.reached

    def check(self) -> None:
        """Raises `DiskFull` if less is free."""
        if self():
            free = shutil.disk_usage(self._folder).free
            raise DiskFull(
                Message(
                    f"{size(free)} are free on the disk of {self._folder}, less than the {size(self._floor)} of ",
                    Option("min_free"),
                    "; everything computed before is kept. Free some space (featurepipe gc STORE) and run again",
                )
            )
