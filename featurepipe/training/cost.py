"""What a fit will take: memory by what each family keeps, time by fitting small samples first; and so where it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurepipe.display import size
from featurepipe.errors import Message, Option, UsageError
from featurepipe.heads.families import SHARED_PASSES, SMALL_VALUES, HeadFamily, families_for
from featurepipe.progress import spoken

LEAST_ROWS = 1024
"""Rows for whose values there must be memory: blocks smaller than that are all overhead."""

PILOT_ROWS = (1000, 3000)
WHOLE_ROWS = 4000
"""Rows up to which one fit of a search is made as it is to know how long all take: small ones tell little of it."""
LONG_PILOT = 15.0  # seconds of the smaller fit after which no larger one is made
"""Rows of the small fits from which time is extrapolated."""
WARM = 1.5
"""By so much at least the larger of them takes longer than the smaller; else that is fitted again."""


@dataclass(frozen=True)
class Cost:
    """How a fit is going to run.

    Attributes:
        rows: rows of the fit.
        width: values per row.
        in_memory_bytes: what a fit in memory would take, beyond this process.
        budget_bytes: what it may take; None for what workers' own limits leave.
        out_of_core: whether it reads blocks from the store instead of holding X.
        solver: ``scikit-learn`` (or ``xgboost``) for their own estimators in memory, ``blocks`` for ours.
        seconds: about how long all fits will take; None where no pilot was run.
        fits: how many fits that is.
        search_seconds: of these, the fits of a search; None where there is none, or it is not estimated.
        device: where features are multiplied, ``cpu`` or ``cuda``.
        cluster: the cluster over whose workers the rows are spread; None where the fit runs here.
    """

    rows: int
    width: int
    in_memory_bytes: int
    budget_bytes: int | None
    out_of_core: bool
    solver: str
    seconds: float | None = None
    fits: int = 1
    cluster: str | None = None
    search_seconds: float | None = None
    device: str = "cpu"

    @property
    def is_spread(self) -> bool:
        """Whether the rows are spread over a cluster's workers."""
        return self.cluster is not None

    @property
    def text(self) -> str:
        """One line for people."""
        if self.is_spread:
            limit = "" if self.budget_bytes is None else f", {size(self.budget_bytes)} allowed at each"
            spread = f"{self.rows:,} x {self.width:,} features, spread over the workers of {self.cluster}{limit}: {self.solver}"
            return f"{spread}; {_fits(self.fits)}, whose time is not estimated on a cluster"
        where = "out of core" if self.out_of_core else "in memory"
        where = where if self.device == "cpu" else f"on {self.device}"
        how_long = (
            "; no estimate of the time"
            if self.seconds is None
            else f"; about {spoken(self.seconds)} for {_fits(self.fits)}"
        )
        return (
            f"{self.rows:,} x {self.width:,} features, {size(self.in_memory_bytes)} in memory, {size(self.budget_bytes or 0)} "
            f"allowed: {where}, {self.solver}{how_long}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def choose_route(
    family: HeadFamily, rows: int, width: int, budget: int, target_type: str = "multiclass", *, device: str = "cpu"
) -> Cost:
    """Decides between memory and blocks.

    Args:
        family: of the head.
        rows: rows of the largest fit.
        width: values per row.
        budget: bytes that the fit may take.
        target_type: of what is learned, to name other heads.
        device: where features are multiplied; on another than the CPU they are read in blocks, however few they are.

    Raises:
        UsageError: the family needs more memory than allowed and has no out-of-core form, or is not fitted on the device.
    """
    _check(budget, width)
    need = rows * width * family.bytes_per_value
    streams = family.out_of_core
    fits_in = need <= budget
    on_cpu = device == "cpu"
    if not on_cpu and (family.name not in SHARED_PASSES or target_type == "continuous"):
        raise UsageError(
            Message(
                Option("device", device), f": {family.name} is fitted on the CPU; leave it out, or choose one of the heads that "
                f"are fitted there, which learn classes and several labels: {', '.join(SHARED_PASSES)}",
            )
        )  # fmt: skip
    if fits_in and on_cpu and (not streams or rows * width <= SMALL_VALUES):
        return Cost(rows, width, need, budget, out_of_core=False, solver="scikit-learn")
    if streams:
        prepared = 2 * rows * width * np.dtype(np.float32).itemsize
        return Cost(rows, width, need, budget, out_of_core=prepared > budget, solver="blocks", device=device)
    others = ", ".join(name for name, other in families_for(target_type).items() if other.out_of_core)
    raise UsageError(
        Message(
            f"{family.name} on {rows:,} x {width:,} features needs about {size(need)} of memory, {size(budget)} are allowed, and "
            "it has no out-of-core form; allow more with ",
            Option("memory"),
            f", or choose one that has: {others}",
        )
    )


def choose_on_cluster(family: HeadFamily, rows: int, width: int, limit: int | None, cluster: str) -> Cost:
    """The cost of a fit over a cluster's workers; how much memory these have is not known before they are asked.

    Args:
        family: one that learns from blocks.
        rows: rows of the largest fit.
        width: values per row.
        limit: bytes that the fit may take at each worker, if the user said so.
        cluster: its name.

    Raises:
        UsageError: the limit is too small for blocks.
    """
    if limit is not None:
        _check(limit, width)
    need = rows * width * family.bytes_per_value
    return Cost(rows, width, need, limit, out_of_core=True, solver="blocks", cluster=cluster)


def _check(budget: int, width: int) -> None:
    least = LEAST_ROWS * width * np.dtype(np.float32).itemsize
    if budget < least:
        raise UsageError(
            Message(
                Option("memory", size(budget)),
                f" is too little for {width:,} values an image; give {size(least)} or more",
            )
        )


def available_memory() -> int:
    """Bytes that this process may still take, by the kernel's account and the control group's limit."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
    return free


def time_of(fit: Callable[[int], object], rows: int, *, steepest: float, whole: bool = False) -> float:
    """Extrapolates the seconds of a fit from two small ones.

    A fit that passes over the data grows by a straight line, a kernel's by a power of the number of rows, which in small fits is
    hidden by what grows less: it is taken half-way between the one that they show and the largest. Where the smaller fit
    takes long already, it alone has to do, with the steepest growth, so that the estimate comes before a long wait.

    Args:
        fit: fits on so many rows.
        rows: what to extrapolate to.
        steepest: the largest exponent that the family can have: 1 for passes, 2 for kernels.
        whole: whether the fit itself may be timed, after the smaller one: up to `WHOLE_ROWS`, or where it takes seconds.
    """
    small, large = (max(min(count, rows // divisor), 1) for count, divisor in zip(PILOT_ROWS, (8, 4), strict=True))
    first = seconds_of(fit, small)
    if whole and (rows <= WHOLE_ROWS or first * rows / small <= LONG_PILOT):
        return seconds_of(fit, rows)
    if first > LONG_PILOT:
        return float(first * (rows / small) ** steepest)
    second = seconds_of(fit, large)
    if second < WARM * first and large > small:
        first = seconds_of(fit, small)  # without what is done once: imports, opening, warming up
    seconds = [first, second]
    if large == small:
        return seconds[1] * rows / large
    if steepest == 1:
        slope = max((seconds[1] - seconds[0]) / (large - small), 0.0)
        return seconds[1] + slope * (rows - large)
    shown = float(np.clip(np.log(seconds[1] / seconds[0]) / np.log(large / small), 1.0, steepest))
    return float(seconds[1] * (rows / large) ** ((shown + steepest) / 2))


def seconds_of(fit: Callable[[int], object], rows: int) -> float:
    """Times one fit on so many rows."""
    start = time.perf_counter()
    fit(rows)
    return max(time.perf_counter() - start, 1e-4)


def _fits(count: int) -> str:
    return "1 fit" if count == 1 else f"{count} fits"
