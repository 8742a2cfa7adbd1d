"""``featurepipe report``."""

from __future__ import annotations

from argparse import Namespace

from featurepipe.cli.options import Commands, add_command, add_dataset, add_quiet, add_store, existing_store
from featurepipe.cli.output import say, this_command


def add(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "report", run, "one HTML page of what a comparison of layers, or the test of a bundle, found"
    )
    option = command.add_argument
    add_store(command)
    option("--bundle", metavar="BUNDLE",
           help="report on this bundle, evaluated on the dataset, instead of the last comparison")  # fmt: skip
    add_dataset(command)
    option("--split", metavar="NAME", help="of the bundle's evaluation, as for featurepipe evaluate")
    option("--source", metavar="SOURCE", help="the images, for thumbnails (default: where they were extracted from)")
    option("--labels", metavar="FILE", help="the labels that were compared with, if they were not the dataset's")
    option("--to", required=True, metavar="FILE.html", help="the page to write")
    add_quiet(command)


def run(args: Namespace) -> int:
    """Runs the command; the page's path is what it prints."""
    from featurepipe.reporting.from_store import report

    path = report(
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
    say(args, str(path))
    return 0
