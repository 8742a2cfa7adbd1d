"""``featurepipe evaluate``."""

from __future__ import annotations

from argparse import Namespace

from featurepipe.cli.options import (
    Commands,
    add_cluster,
    add_command,
    add_dataset,
    add_json,
    add_labels,
    add_quiet,
    add_seed,
    add_store,
    cluster,
    existing_store,
)
from featurepipe.cli.output import show


def add(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "evaluate", run,
        "metrics of a bundle on cached features, each with its confidence interval; leaks between splits",
    )  # fmt: skip
    option = command.add_argument
    option("bundle", metavar="BUNDLE")
    add_store(command)
    add_dataset(command)
    option("--split", metavar="NAME",
           help="default: test where the dataset has it, else the images not trained on; all: every labelled one")  # fmt: skip
    add_labels(command)
    option("--ignore-unknown-classes", action="store_true",
           help="leave out images of classes that the bundle does not know, instead of refusing")  # fmt: skip
    option("--bootstrap", type=int, default=1000, metavar="N",
           help="resamples behind the intervals (default: %(default)s)")  # fmt: skip
    add_seed(command, "the resamples")
    add_cluster(command)
    add_quiet(command)
    add_json(command)


def run(args: Namespace) -> int:
    """Runs the command."""
    from featurepipe.evaluation.evaluate import evaluate
    from featurepipe.evaluation.text import text

    result = evaluate(
        args.bundle,
        existing_store(args),
        dataset=args.dataset,
        split=args.split,
        labels=args.labels,
        ignore_unknown_classes=args.ignore_unknown_classes,
        bootstrap=args.bootstrap,
        seed=args.seed,
        silent=args.quiet,
        **cluster(args),
    )
    show(args, result, text)
    return 0
