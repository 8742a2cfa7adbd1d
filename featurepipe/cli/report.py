"""``featurepipe report``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from featurepipe.cli.options import (
    Commands,
    add_command,
    add_dataset,
    add_last,
    add_quiet,
    add_store,
    existing_store,
)
from featurepipe.cli.output import say, this_command
from featurepipe.errors import UsageError

NIGHTS = 30
OF_NIGHTS = {"last": NIGHTS, "job": None}
"""Options that only a page of nights takes, with their defaults."""
OF_FINDINGS = dict.fromkeys(("bundle", "dataset", "split", "source", "labels"))
"""Options that only a page of a comparison or a bundle takes."""


def add(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "report",
        run,
        "one HTML page of what a comparison of layers, or the test of a bundle, found; or of the last nights",
    )
    option = command.add_argument
    add_store(command)
    option("--bundle", metavar="BUNDLE",
           help="report on this bundle, evaluated on the dataset, instead of the last comparison")  # fmt: skip
    add_dataset(command)
    option("--split", metavar="NAME", help="of the bundle's evaluation, as for featurepipe evaluate")
    option("--source", metavar="SOURCE", help="the images, for thumbnails (default: where they were extracted from)")
    option("--labels", metavar="FILE", help="the labels that were compared with, if they were not the dataset's")
    option("--nights", action="store_true", help="the trend of the last nights instead: images, time, drift, rejects")
    add_last(command, "nights", NIGHTS)
    option(
        "--job", metavar="NAME", help="of these nights, or a dataset that has no job (default: the one that ran last)"
    )
    option("--to", required=True, metavar="FILE.html", help="the page to write")
    add_quiet(command)


def run(args: Namespace) -> int:
    """Runs the command; the page's path is what it prints."""
    _check(args)
    say(args, str(_nights(args) if args.nights else _findings(args)))
    return 0


def _check(args: Namespace) -> None:
    """Refuses options of the other kind of page, which would be passed over in silence."""
    others = OF_FINDINGS if args.nights else OF_NIGHTS
    given = [f"--{name}" for name, default in others.items() if getattr(args, name) != default]
    if given:
        raise UsageError(f"{', '.join(given)}: {'not' if args.nights else 'only'} together with --nights")


def _nights(args: Namespace) -> Path:
    from featurepipe.reporting.nights import nights_report

    return nights_report(existing_store(args), args.to, last=args.last, job=args.job, silent=args.quiet)


def _findings(args: Namespace) -> Path:
    from featurepipe.reporting.from_store import report

    return report(
        existing_store(args),
        args.to,
        bundle=args.bundle,
        dataset=args.dataset,
        split=args.split,
        source=args.source,
        labels=args.labels,
        command=this_command(),
        silent=args.quiet,
    )
