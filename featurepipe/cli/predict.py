"""``featurepipe predict``."""

from __future__ import annotations

from argparse import Namespace

from featurepipe.cli.options import (
    Commands,
    add_cluster,
    add_command,
    add_json,
    add_machine,
    add_quiet,
    add_raw_ids,
    add_trust_code,
    cluster,
    machine,
)
from featurepipe.cli.output import show


def add(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "predict", run, "label the images of a source with a bundle: id, label, one probability per class",
        epilog="BUNDLE decides backbone, weights, preprocessing and precision; see exit codes in featurepipe --help.",
    )  # fmt: skip
    option = command.add_argument
    option("bundle", metavar="BUNDLE")
    option("source", metavar="SOURCE", help="as for featurepipe extract")
    option("--to", required=True, metavar="FILE", help=".csv, .jsonl or .parquet")
    option("--weights", metavar="FILE",
           help="the backbone's weights file, where it was your own and the bundle has no copy")  # fmt: skip
    add_raw_ids(command)
    add_machine(command)
    add_trust_code(command, "bundle")
    add_cluster(command)
    add_quiet(command, "progress")
    add_json(command)


def run(args: Namespace) -> int:
    """Runs the command; rejects make the exit code."""
    from featurepipe.prediction.predict import predict
    from featurepipe.prediction.text import text

    result = predict(
        args.bundle,
        args.source,
        args.to,
        weights=args.weights,
        **machine(args),
        **cluster(args),
        trust_code=args.trust_code,
        raw_ids=args.raw_ids,
        silent=args.quiet,
    )
    show(args, result, text)
    return int(result.get("exit_code", 0))
