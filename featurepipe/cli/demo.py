"""``featurepipe demo``."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from featurepipe.cli.options import Commands, add_command
from featurepipe.cli.output import say


def add(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(commands, "demo", run, "the main job on 2,000 bundled images, offline, ending in a picture")
    command.add_argument(
        "--out", dest="folder", default="featurepipe-demo", metavar="DIR",
        help="where to put store and picture (default: %(default)s)",
    )  # fmt: skip


def run(args: Namespace) -> int:
    """Runs the command."""
    from featurepipe.demo import run_demo

    run_demo(Path(args.folder), say=partial(say, args))
    return 0
