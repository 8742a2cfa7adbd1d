"""Work measured in a process of its own: its seconds, and its memory at rest and at its peak.

``python -m benchmarks.alone MODULE FUNCTION ARGUMENT...`` calls the function, which sets everything up and returns the
work; then the work is timed and its answer printed as one JSON line.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MB = 1_000_000


def alone(module: str, function: str, *arguments: str | int | Path) -> dict[str, Any]:
    """Runs ``function(*arguments)()`` in a process of its own; arguments arrive as text.

    Returns:
        ``seconds`` of the work, ``idle_mb`` resident before it, ``peak_mb`` resident at most, ``growth_mb`` between the
        two, and ``answer``, what the work returned.
    """
    command = [sys.executable, "-m", "benchmarks.alone", module, function, *map(str, arguments)]
    ran = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{function} failed:\n{ran.stderr}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _measured(module: str, function: str, arguments: list[str]) -> dict[str, Any]:
    work = getattr(import_module(module), function)(*arguments)
    idle = resident("VmRSS")
    start = time.perf_counter()
    answer = work()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    return {
        "seconds": round(seconds, 3),
        "idle_mb": round(idle / MB),
        "peak_mb": round(peak / MB),
        "growth_mb": round((peak - idle) / MB, 1),
        "answer": answer,
    }


def resident(name: str) -> int:
    """Bytes of this process's resident memory: now (VmRSS), at most so far (VmHWM), or what of it belongs to no file (RssAnon).

    Linux counts what a process was before ``exec`` into ``getrusage``'s maximum, so a parent's memory would show there.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps(_measured(sys.argv[1], sys.argv[2], sys.argv[3:])))
