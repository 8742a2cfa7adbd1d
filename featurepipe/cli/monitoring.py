"""``featurepipe drift`` and ``featurepipe duplicates``: what is odd about the images, as their features show it."""

from __future__ import annotations

from argparse import Namespace

from featurepipe.cli.options import (
    Commands,
    add_command,
    add_dataset,
    add_json,
    add_options,
    add_quiet,
    add_raw_ids,
    add_space,
    add_store,
    existing_store,
    options,
)
from featurepipe.cli.output import show
from featurepipe.errors import UsageError
from featurepipe.monitoring.options import DriftOptions


def add(commands: Commands) -> None:
    """Declares both commands."""
    _add_drift(commands)
    _add_duplicates(commands)


def _add_drift(commands: Commands) -> None:
    command = add_command(commands, "drift", drift, "whether the new images are like those of an earlier snapshot")
    option = command.add_argument
    add_store(command)
    add_dataset(command)
    option("--node", action="append", dest="nodes", metavar="COLUMN",
           help="a column as featurepipe info lists it; may be repeated (default: all)")  # fmt: skip
    add_space(command)
    add_options(command, DriftOptions)
    option("--snapshot", metavar="RUN-ID", help="the snapshot whose images are tested (default: the current one)")
    option("--bundle", metavar="BUNDLE", help="compare the classes that this bundle predicts as well")
    option(
        "--accept",
        metavar="RUN-ID|last",
        help="accept the images that this run of a job warned of, so that its next run may compare with them; tests nothing",
    )
    add_quiet(command)
    add_json(command)


def _add_duplicates(commands: Commands) -> None:
    command = add_command(
        commands,
        "duplicates",
        duplicates,
        "copies, near copies, and those on both sides of a split",
    )
    option = command.add_argument
    add_store(command)
    add_dataset(command)
    option("--node", default="bottleneck", metavar="COLUMN", help="whose distances count (default: %(default)s)")
    add_space(command)
    option("--near", type=_distance, metavar="auto|DISTANCE",
           help="list images nearly alike, too: their features' cosine distance is at most so much")  # fmt: skip
    option("--to", metavar="FILE", help="write all groups, one image a line: .csv, .jsonl or .parquet")
    add_raw_ids(command)
    add_quiet(command)
    add_json(command)


def _distance(text: str) -> float | str:
    """A number; what is none may be ``auto``, and else the verb refuses it and says why."""
    try:
        return float(text)
    except ValueError:
        return text


def drift(args: Namespace) -> int:
    """Runs ``featurepipe drift``; drift beyond ``--fail`` is a failure."""
    if args.accept is not None:
        return _accept(args)
    from featurepipe.monitoring.drift import drift as test
    from featurepipe.monitoring.text import drift_text

    found = test(
        existing_store(args),
        dataset=args.dataset,
        columns=args.nodes,
        backbone=args.backbone,
        snapshot=args.snapshot,
        bundle=args.bundle,
        **options(args, DriftOptions),
        silent=args.quiet,
    )
    show(args, found, drift_text)
    return int(found.get("exit_code", 0))


def _accept(args: Namespace) -> int:
    from featurepipe.monitoring.standing_warnings import accept_drift, accepted_text

    tests = ("nodes", "backbone", "snapshot", "bundle", "fail")
    given = [f"--{name.removesuffix('s')}" for name in tests if getattr(args, name) is not None]
    given += ["--reference"] if args.reference != "previous" else []
    if given:
        raise UsageError(f"--accept tests nothing: leave {', '.join(given)} out")
    show(args, accept_drift(existing_store(args), args.accept, dataset=args.dataset), accepted_text)
    return 0


def duplicates(args: Namespace) -> int:
    """Runs ``featurepipe duplicates``."""
    from featurepipe.monitoring.duplicates import duplicates as find
    from featurepipe.monitoring.text import duplicates_text

    found = find(
        existing_store(args),
        dataset=args.dataset,
        node=args.node,
        backbone=args.backbone,
        near=args.near,
        to=args.to,
        raw_ids=args.raw_ids,
        silent=args.quiet,
    )
    show(args, found, duplicates_text)
    return 0
