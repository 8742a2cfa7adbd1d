"""``featurepipe demo`` and ``featurepipe doctor``: whether the main job works on this machine."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from featurepipe.cli.options import Commands, add_command, add_json
from featurepipe.cli.output import say, show


def add_demo(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(commands, "demo", demo, "the main job on 2,000 bundled images, offline, ending in a picture")
    command.add_argument(
        "--out", dest="folder", default="featurepipe-demo", metavar="DIR",
        help="where to put store and picture (default: %(default)s)",
    )  # fmt: skip


def demo(args: Namespace) -> int:
    """Runs the command."""
    from featurepipe.demo import run_demo

    run_demo(Path(args.folder), say=partial(say, args))
    return 0


def add_doctor(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "doctor", doctor, "check versions, devices, bf16, threads, disk, and which weights are at hand"
    )
    command.add_argument("--store", metavar="DIR", help="a folder to check for space and writability (default: here)")
    add_json(command)


def doctor(args: Namespace) -> int:
    """Runs the command; a machine on which the main job does not work is a failure."""
    from featurepipe.doctor import examine

    report = examine(Path(args.store or "."))
    show(args, report.as_dict(), lambda _: report.text())
    return 0 if report.healthy else 1
