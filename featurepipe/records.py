"""The run record: who ran what with which versions, what came of it, and where the time went."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from featurepipe.errors import Message, Option

PACKAGES = ("featurepipe", "torch", "torchvision", "numpy", "h5py", "pyarrow", "pillow", "timm", "torchcodec")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that can change a feature, and of ``more``; without those not installed."""
    found = {name: _version_of(name) for name in (*PACKAGES, *more)}
    return {"python": platform.python_version(), **{name: known for name, known in found.items() if known is not None}}


@cache
def _version_of(package: str) -> str | None:
    """Of an installed package, None if it is not; its metadata is a mail of pages, which is parsed once a process."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def host() -> dict[str, Any]:
    """The machine a run took place on."""
    return {"name": socket.gethostname(), "system": platform.system(), "cpus": os.cpu_count(), "pid": os.getpid()}


def processor_name() -> str:
    """What this machine's processor is called, as its system says."""
    listing = Path("/proc/cpuinfo")  # Linux
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


ACCEPTANCE = "accept drift"
"""The command of a record that is no run: somebody has accepted images that a run warned of."""

RUNNING, KILLED = "running", "killed"
"""Statuses of a run that has left no word of its end: it goes on, or a later run found that it does not."""

SUCCESS = (0, 3)
"""Exit codes of a run that did its work: without rejects, or with as many as are allowed; also of one that ran out of time."""


def is_success(run: Mapping[str, Any]) -> bool:
    """Whether a run did all of its work; one that ran out of time has exit code 0, and still some to do."""
    return run.get("status") == "done" and run.get("exit_code") in SUCCESS


TELLING_SECONDS = 5.0
"""Shorter runs are mostly set-up, and their shares say nothing."""


MOST_WAITING = 0.2
"""Share of its time that a process may wait for a core while a network is timed."""


def is_undisturbed(measured: Mapping[str, Any]) -> bool:
    """Whether times of a network are worth keeping: on a busy machine they tell about the others."""
    return bool(measured["waited"] <= MOST_WAITING)


def verdict(seconds: Mapping[str, float], wall: float, *, device: str) -> Message:
    """One line that says what a run waited for and what would help.

    Args:
        seconds: per stage; ``waiting`` is the main thread waiting for images, ``forward`` and ``write`` are main-thread time
            too, ``read`` and ``decode`` are summed over loader threads.
        wall: seconds of the whole computation.
        device: where the network ran.

    Example:
        >>> verdict({"waiting": 7.0, "decode": 20.0, "read": 1.0, "forward": 2.0, "write": 0.1}, 10.0, device="cuda")
        'decode-bound: the network waited 70 % of the time; add --workers or use --decode gpu'
    """
    if wall <= 0:
        return Message("nothing to compute")
    if wall < TELLING_SECONDS:
        return Message(f"done in {wall:.1f} s, too short to tell what it waited for")
    stage = bottleneck(seconds)
    if stage == "forward":
        share = seconds["forward"] / wall
        more = "" if device.startswith("cuda") else "; a GPU, or a node nearer the input, would help"
        return Message(f"forward-bound: the network was busy {100 * share:.0f} % of the time{more}")
    share = seconds["write" if stage == "write" else "waiting"] / wall
    faster = (" or use ", Option("decode", "gpu")) if device.startswith("cuda") else (", or cores",)
    advice: dict[str, tuple[str | Option, ...]] = {
        "read": ("the source is slow; add ", Option("workers"), ", or copy the images to a nearer disk"),
        "decode": ("add ", Option("workers"), *faster),
        "write": ("the store's disk is slow; use a faster one, or fewer and narrower columns",),
    }
    who = "the run waited for the store" if stage == "write" else "the network waited"
    return Message(f"{stage}-bound: {who} {100 * share:.0f} % of the time; ", *advice[stage])


def bottleneck(seconds: Mapping[str, float]) -> str:
    """The stage that the main thread loses most time to: ``forward``, ``write``, or what it waits for, ``read`` or ``decode``."""
    mains = {"forward": seconds["forward"], "write": seconds["write"], "waiting": seconds["waiting"]}
    worst = max(mains, key=lambda name: mains[name])
    if worst != "waiting":
        return worst
    return "read" if seconds["read"] > seconds["decode"] else "decode"
