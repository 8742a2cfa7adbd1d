"""What an extraction may cost: rejects, images gone from the source, space on the disk."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from featurepipe.display import bytes_of, first_names, seconds_of, share, size
from featurepipe.errors import DiskFull, Message, Option, SourceError, UsageError
from featurepipe.features.options import (
    DamageOptions,
    MachineOptions,
    MirrorOption,
    Options,
    SettingOptions,
    SourceOptions,
)
from featurepipe.option_groups import LIMITS, OptionGroup, is_bytes, is_number, option

ALL = "100%"
"""The share of missing images that tolerates a source that lists nothing."""
GONE_IN_JOBS = "50%"
"""The images that may be gone from a job's source where its file does not say."""
_MANY_GONE = 0.1
"""The share of the last snapshot's images that may go without a warning."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the free space."""


LONGEST = 366 * 86_400
"""Seconds: no clock or timer of the system is asked for more."""


class ImagesGone(SourceError):
    """A source that lists no image, or lacks too many: an empty folder, or one on which a share is not mounted yet."""


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


@dataclass(frozen=True)
class Losses:
    """What a listing lacks of the last snapshot.

    Attributes:
        images: in the last snapshot.
        gone: how many of their ids the listing lacks: deleted, or renamed.
        labels: those that two images or more had and no image has any more, with how many had each.
    """

    images: int = 0
    gone: int = 0
    labels: Mapping[str, int] = field(default_factory=dict)

    def warnings(self, max_gone: float | str | None) -> Iterator[Message]:
        """Says that a tenth or more of the images are gone, or a label is, although ``max_gone`` allows it; else nothing."""
        told: list[str] = []
        if self.gone and self.gone >= _MANY_GONE * self.images:
            told.append(f"{share(self.gone / self.images)} of the images are gone or renamed ({self})")
        if self.labels:
            names = [f"{name} (of {count:,} images)" for name, count in self.labels.items()]
            told.append(f"no image has the label{'' if len(names) == 1 else 's'} {first_names(names, 5)} any more")
        if told:
            yield Message("; ".join(told), _allowing(max_gone))

    def __str__(self) -> str:
        """How many are gone."""
        return f"{self.gone:,} of the {self.images:,} in the last snapshot"


def _allowing(max_gone: float | str | None) -> Message:
    """Why a run goes on although images are gone, and what would refuse it."""
    if max_gone is None:
        return Message(
            ". Without ", Option("max_gone"), f" only an empty source is refused; jobs refuse more than {GONE_IN_JOBS}"
        )
    return Message(
        ". ",
        Option("max_gone", max_gone),
        f" allows it (default of jobs: {GONE_IN_JOBS}); a smaller one refuses such runs",
    )


@dataclass(frozen=True, kw_only=True)
class RejectLimit(OptionGroup):
    """How many images may be unusable."""

    purpose: ClassVar[str] = LIMITS

    max_rejects: int | float | str = option(
        "1%", "tolerate up to N or P % unusable images (default: 1%)", metavar="N|P%", check=_share
    )


EXTRACTION_GROUPS = (SettingOptions, MachineOptions, SourceOptions, DamageOptions, RejectLimit)
"""Options of extraction that commands pass on which extract on the way."""


@dataclass(frozen=True, kw_only=True)
class Limits(RejectLimit):
    """What makes an extraction refuse to begin, end early, or fail."""

    purpose: ClassVar[str] = LIMITS

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

    def check_gone(self, name: str, listed: int, losses: Losses) -> None:
        """Refuses a listing that lacks too many images.

        Args:
            name: the source's.
            listed: images that it lists now.
            losses: what it lacks of the dataset's last snapshot.

        Raises:
            ImagesGone: it does, or it is empty.
        """
        before, gone = losses.images, losses.gone
        all_may_go = str(self.max_gone).strip() == ALL
        if not listed and not all_may_go:
            text = f"no images in {name}: nothing there has the suffix of an image. Check the path"
            if not before:
                raise ImagesGone(text)
            lost = f"{text}, though the last snapshot has {before:,}. If they are gone on purpose: "
            raise ImagesGone(Message(lost, Option("max_gone", ALL)))
        if self.max_gone is not None and gone > allowance(self.max_gone, before):
            raise ImagesGone(
                Message(
                    f"{gone:,} of the {before:,} images in the last snapshot are gone from {name}, more than ",
                    Option("max_gone", self.max_gone),
                    " allows. If they were deleted or renamed on purpose: ",
                    Option("max_gone", gone),
                )
            )

    def check_owner(self, dataset: str, before: str | None, now: str, losses: Losses, *, is_named: bool) -> None:
        """Refuses another source that merely has the name of a dataset: most of the dataset's images are not in it.

        Args:
            dataset: its name.
            before: the other place that it was last taken from, if any.
            now: the source.
            losses: what the source lacks of the dataset's last snapshot.
            is_named: whether somebody has said that this is the dataset.

        Raises:
            UsageError: it is another source, and nothing says how many images may go.
        """
        if before and not is_named and self.max_gone is None and losses.gone > allowance(GONE_IN_JOBS, losses.images):
            raise UsageError(
                Message(
                    f"dataset {dataset} was last taken from {before}, and {now} has the same name but lacks {losses.gone:,} of "
                    f"its {losses.images:,} images: it would put its own in their place. To keep the two apart: ",
                    Option("dataset", f"{dataset}-2"),
                    "; if those images have moved here, and others were deleted: ",
                    Option("max_gone", losses.gone),
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
                    "; everything computed before is kept. Free some space (featurepipe gc STORE --dry-run says if it "
                    "could) and run again",
                )
            )
