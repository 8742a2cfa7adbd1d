"""``featurepipe depth`` and ``featurepipe report``: which layer transfers best, and the pages that show what was found."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from featurepipe.cli.options import (
    Commands,
    add_cluster,
    add_command,
    add_dataset,
    add_json,
    add_labels,
    add_last,
    add_options,
    add_quiet,
    add_store,
    add_trust_code,
    cluster,
    existing_store,
    options,
)
from featurepipe.cli.output import say, show, this_command
from featurepipe.errors import Option, UsageError, on_command_line
from featurepipe.extraction.limits import RejectLimit
from featurepipe.features.options import DamageOptions, MachineOptions, SettingOptions, SourceOptions
from featurepipe.layer_depth.options import DepthOptions
from featurepipe.option_groups import declared

EXTRACTION_GROUPS = (SettingOptions, MachineOptions, SourceOptions, DamageOptions, RejectLimit)
"""Options of extraction that `featurepipe.depth` passes on."""
NOT_OF_DEPTH = ("dtype", "decode")


def add_depth(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "depth", run_depth, "which layer of a network transfers best: every stage measured alike, with intervals",
        epilog="All columns come from one pass over the images and stay in the store; what has been measured is kept as well. "
        "Stopped at any moment, the same command goes on. featurepipe train --node recommended uses the answer.",
    )  # fmt: skip
    option = command.add_argument
    option("source", metavar="SOURCE", help="images, as for featurepipe extract; or a feature store, compared as it is")
    option("--store", metavar="DIR", help="where features of SOURCE go (default: features)")
    option("--dataset", metavar="NAME", help="name of the source in the store (default: the source's own name)")
    option("--backbone", metavar="NAME", help="see featurepipe backbones (default: resnet50, or what STORE holds)")
    option("--weights", default="DEFAULT", metavar="NAME|none|FILE", help="of the network, as for featurepipe extract")
    option("--node", action="append", dest="nodes", metavar="auto|NODE[:POOLING]",
           help="may be repeated; auto: the network's stages and its bottleneck (default: auto)")  # fmt: skip
    add_options(command, DepthOptions)
    option("--test-source", metavar="SOURCE",
           help="images of the same classes from elsewhere, which heads are tested on, too")  # fmt: skip
    add_labels(command, of="source")
    option("--report", metavar="FILE.html", help="write the page: curves, tables, a map of the images, mistakes")
    add_options(command, *EXTRACTION_GROUPS, leave_out=NOT_OF_DEPTH)
    add_trust_code(command, "store")
    option("--dry-run", action="store_true",
           help="say which columns, how long extracting takes and how much is measured")  # fmt: skip
    add_cluster(command)
    add_quiet(command, "progress")
    add_json(command)


def run_depth(args: Namespace) -> int:
    """Runs the command."""
    from featurepipe.layer_depth.depth import depth
    from featurepipe.layer_depth.text import plan_text, text

    result = depth(
        args.source,
        args.store,
        dataset=args.dataset,
        backbone=args.backbone,
        weights=args.weights,
        nodes=args.nodes or "auto",
        **options(args, DepthOptions),
        test_source=args.test_source,
        labels=args.labels,
        extraction=options(args, *EXTRACTION_GROUPS, leave_out=NOT_OF_DEPTH),
        trust_code=args.trust_code,
        command=this_command(),
        report=args.report,
        dry_run=args.dry_run,
        silent=args.quiet,
        **cluster(args),
    )
    show(args, result, plan_text if args.dry_run else text)
    return int(result.get("provenance", {}).get("exit_code", 0))


NIGHTS = 30
OF_NIGHTS = {"last": NIGHTS, "job": None}
"""Options that only a page of nights takes, with their defaults."""
OF_FINDINGS = {
    **dict.fromkeys(("bundle", "dataset", "split", "source", "test_source")),
    **{name: one.default for name, one in declared(SourceOptions).items()},
    "labels": None,
}
"""Options that only a page of a comparison or a bundle takes, with their defaults."""


def add_report(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "report",
        run_report,
        "one HTML page of what a comparison of layers, or the test of a bundle, found; or of the last runs",
    )
    option = command.add_argument
    add_store(command)
    option("--bundle", metavar="BUNDLE",
           help="report on this bundle, evaluated on the dataset, instead of the last comparison")  # fmt: skip
    add_dataset(command)
    option("--split", metavar="NAME", help="of the bundle's evaluation, as for featurepipe evaluate")
    option("--source", metavar="SOURCE", help="the images, for thumbnails (default: where they were extracted from)")
    option("--test-source", metavar="SOURCE", help="the same of the other source that a comparison was tested on")
    add_options(command, SourceOptions)
    option("--labels", metavar="FILE", help="the labels that were compared with, if they were not the dataset's")
    option("--nights", action="store_true", help="the trend of the last runs instead: images, time, drift, rejects")
    add_last(command, "nights", NIGHTS)
    option(
        "--job", metavar="NAME", help="of these nights, or a dataset that has no job (default: the one that ran last)"
    )
    option("--to", required=True, metavar="FILE.html", help="the page to write")
    add_quiet(command)


def run_report(args: Namespace) -> int:
    """Runs the command; the page's path is what it prints."""
    _check(args)
    say(args, str(_nights(args) if args.nights else _findings(args)))
    return 0


def _check(args: Namespace) -> None:
    """Refuses options of the other kind of page, which would be passed over in silence."""
    others = OF_FINDINGS if args.nights else OF_NIGHTS
    given = [on_command_line(Option(name)) for name, default in others.items() if getattr(args, name) != default]
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
        test_source=args.test_source,
        labels=args.labels,
        command=this_command(),
        silent=args.quiet,
        **options(args, SourceOptions),
    )
