"""``featurepipe doctor``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from featurepipe.cli.options import Commands, add_command, add_json
from featurepipe.cli.output import show


def add(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "doctor", run, "check versions, devices, bf16, threads, disk, and which weights are at hand"
    )
    command.add_argument("--store", metavar="DIR", help="a folder to check for space and writability (default: here)")
    add_json(command)


def run(args: Namespace) -> int:
    """Runs the command; a machine on which the main job does not work is a failure."""
    from featurepipe.doctor import examine

    report = examine(Path(args.store or "."))
    show(args, report.as_dict(), lambda _: report.text())
    return 0 if report.healthy else 1
