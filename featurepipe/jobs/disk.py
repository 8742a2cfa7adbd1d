"""What a store takes on its disk, and what is left there."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from featurepipe.jobs.steps.stopping import within_time

PATIENCE = 3.0
"""Seconds for which a store is measured: a night that is stopped ends soon, however many files there are."""


def disk_figures(store: Path) -> dict[str, int | None]:
    """``store_bytes`` and ``free_bytes``; None where the disk is too slow to tell."""

    def work() -> dict[str, Any]:
        return {"store_bytes": bytes_in(store), "free_bytes": shutil.disk_usage(store).free}

    found = within_time(time.monotonic() + PATIENCE, work, "the store was not measured")
    return {name: found.get(name) for name in ("store_bytes", "free_bytes")}


def bytes_in(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files in a folder, each once however many names it has; files that vanish meanwhile count nothing."""
    sizes: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - as many as there are parts
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())
