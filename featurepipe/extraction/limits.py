"""What an extraction may cost: rejects, images gone from the source, space on the disk."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from featurepipe.errors import DiskFull, Message, Option, SourceError, UsageError
from featurepipe.sizes import bytes_of
from featurepipe.tables import size

ALL = "100%"
"""The share that puts up with a source that lists nothing."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the free space."""


def allowance(limit: int | str, images: int, name: str = "max_rejects") -> float:
    """How many of ``images`` a limit allows, whether it is a number or a share.

    Args:
        limit: what the user gave.
        images: what a share is of.
        name: of the limit, for the message.

    Raises:
        UsageError: it is neither a count nor a share.

    Example:
        >>> allowance("1%", 250), allowance(3, 250)
        (2.5, 3.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(limit).strip())
    if match is None:
        raise UsageError(f"{name} {limit!r} must be a number of images such as 10, or a share such as 1%")
    number = float(match[1])
    return number / 100 * images if match[2] else number


@dataclass(frozen=True)
class Limits:
    """What makes an extraction refuse to begin, or fail; each is an argument of `featurepipe.extract`.

    Raises:
        UsageError: one of them is no limit.
    """

    max_rejects: int | str = "1%"
    max_gone: int | str | None = None
    min_free: int | str | None = None

    def __post_init__(self) -> None:
        allowance(self.max_rejects, 0)
        if self.max_gone is not None:
            allowance(self.max_gone, 0, "max_gone")
        self._floor()

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
        if self.max_gone is not None and gone > allowance(self.max_gone, before, "max_gone"):
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
        return DiskFloor(folder, self._floor())

    def _floor(self) -> int:
        if not self.min_free:
            return 0
        try:
            return bytes_of(self.min_free)
        except UsageError:
            raise UsageError(
                f"min_free {self.min_free!r} is no amount of space; give bytes or text such as '500MB', '20GB'"
            ) from None


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
