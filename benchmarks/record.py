"""What all benchmarks share: the machine's description, the result file, the arguments."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the versions that figures belong to."""
    import torch

    from featurepipe.records import versions

    cpu = next(
        (line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": versions(),
    }


def median(values: Sequence[float], digits: int = 3) -> float:
    """The median, rounded for people."""
    return round(statistics.median(values), digits)


def main(
    name: str, description: str, add: Callable[[argparse.ArgumentParser], None], run: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Parses arguments, runs a benchmark, prints its result and, if asked, records it under ``benchmarks/results``.

    Where only parts were run that say themselves when, and on which machine, what is recorded of others stays.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    add(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    parser.add_argument("--record", action="store_true", help=f"write benchmarks/results/{name}.json")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds that only shows that the benchmark works")
    args = parser.parse_args()
    found = run(args)
    result = save(name, found) if args.record else described(name, found)
    text = json.dumps(result, indent=2)
    if args.json:
        print(text)
    else:
        print(json.dumps({k: v for k, v in result.items() if k not in ("machine", "rounds")}, indent=2))
    return found


def described(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark found, with its name, the time and the machine."""
    return {
        "benchmark": name,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **found,
    }


def save(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Records what a benchmark found, all or so far, under ``benchmarks/results``; returns it described."""
    result, path = described(name, found), RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    of_its_own = all(isinstance(part, dict) and "when" in part for part in found.values())
    recorded = json.loads(path.read_text()) | found if of_its_own and path.exists() else result
    path.write_text(json.dumps(recorded, indent=2) + "\n")
    return result


def note(message: str) -> None:
    """A line on standard error."""
    print(message, file=sys.stderr, flush=True)


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
