"""``featurepipe depth``, ``routes``, ``report``, ``drift``, ``duplicates``: what features show of images."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from featurepipe.cli.options import (
    add_cluster,
    add_json,
    add_options,
    add_quiet,
    add_store,
    cluster,
    counted,
    define,
    existing_bundle,
    existing_source,
    existing_store,
    given,
    options,
)
from featurepipe.cli.output import say, show, this_command
from featurepipe.errors import UsageError
from featurepipe.extraction.limits import EXTRACTION_GROUPS
from featurepipe.layer_depth.options import AnsweredOptions, ComparedOptions, DepthOptions
from featurepipe.monitoring.options import DriftOptions, DuplicatesOptions
from featurepipe.option_groups import OptionGroup, declared
from featurepipe.reporting.options import FindingsOptions, NightsOptions
from featurepipe.store.options import DatasetOption, TrustOption
from featurepipe.transfer_routes.options import RoutesOptions, RoutesSourceOptions

NOT_OF_DEPTH = ("dtype", "decode")
NOT_OF_ROUTES = (*NOT_OF_DEPTH, "batch_size")  # of tuning; images in a forward are as many as suit the device
DEPTH_GROUPS = (ComparedOptions, DepthOptions, AnsweredOptions)
"""Options of `featurepipe.depth` itself, in the order of the help; consent to code follows those of extraction."""


def add_depth(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run_depth,
        epilog="All columns come from one pass over the images and stay in the store; what has been measured is kept as well. "
        "Stopped at any moment, the same command goes on. featurepipe train --node recommended uses the answer.",
    )  # fmt: skip
    option = command.add_argument
    option("source", metavar="SOURCE", help="images, as for featurepipe extract; or a feature store, compared as it is")
    add_options(command, *DEPTH_GROUPS)
    _add_extraction(
        command, NOT_OF_DEPTH, dry_run="say which columns, how long extracting takes and how much is measured"
    )


def run_depth(args: Namespace) -> int:
    """Runs the command."""
    for one in (args.source, args.test_source):
        existing_source(one)
    from featurepipe.layer_depth.depth import depth
    from featurepipe.layer_depth.text import plan_text, text

    return _compared(args, depth, DEPTH_GROUPS, NOT_OF_DEPTH, plan_text if args.dry_run else text)


ROUTES_GROUPS = (RoutesSourceOptions, RoutesOptions)
"""Options of `featurepipe.routes` itself, in the order of the help."""


def add_routes(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run_routes,
        epilog="Features and activations stay in the store, and what has been measured is kept as well. Stopped at any moment, "
        "the same command goes on. featurepipe train and featurepipe finetune take the route that is recommended.",
    )  # fmt: skip
    option = command.add_argument
    option("source", metavar="SOURCE", help="images, as for featurepipe extract; or a feature store, used as it is")
    add_options(command, *ROUTES_GROUPS, types={"rate": float})
    _add_extraction(command, NOT_OF_ROUTES, dry_run="say what would be extracted and measured, and how long that takes")


def run_routes(args: Namespace) -> int:
    """Runs the command."""
    existing_source(args.source)
    from featurepipe.transfer_routes.answers import plan_text, text
    from featurepipe.transfer_routes.routes import routes

    return _compared(args, routes, ROUTES_GROUPS, NOT_OF_ROUTES, plan_text if args.dry_run else text)


def _add_extraction(command: ArgumentParser, leave_out: Sequence[str], *, dry_run: str) -> None:
    """Options of a comparison that extracts on the way, after its own."""
    add_options(command, *EXTRACTION_GROUPS, leave_out=leave_out)
    add_options(command, TrustOption)
    command.add_argument("--dry-run", action="store_true", help=dry_run)
    add_cluster(command)
    add_quiet(command, "progress")
    add_json(command)


def _compared(
    args: Namespace,
    compare: Callable[..., dict[str, Any]],
    groups: Sequence[type[OptionGroup]],
    leave_out: Sequence[str],
    text: Callable[[dict[str, Any]], str],
) -> int:
    """Runs a comparison, and shows what it found."""
    result = compare(
        args.source,
        **options(args, *groups, TrustOption),
        extraction=options(args, *EXTRACTION_GROUPS, leave_out=leave_out),
        command=this_command(),
        dry_run=args.dry_run,
        silent=args.quiet,
        **cluster(args),
    )
    show(args, result, text)
    return int(result.get("provenance", {}).get("exit_code", 0))


def add_report(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, run_report)
    option = command.add_argument
    add_store(command)
    add_options(command, FindingsOptions)
    option("--nights", action="store_true", help="the trend of the last runs instead: images, time, drift, rejects")
    add_options(command, NightsOptions, types={"last": counted})
    option("--to", required=True, metavar="FILE.html", help="the page to write")
    add_quiet(command)


def run_report(args: Namespace) -> int:
    """Runs the command; the page's path is what it prints."""
    _check(args)
    say(args, str(_nights(args) if args.nights else _findings(args)))
    return 0


def _check(args: Namespace) -> None:
    """Refuses options of the other kind of page, which would be passed over in silence."""
    if others := given(args, FindingsOptions if args.nights else NightsOptions):
        raise UsageError(f"{', '.join(others)}: {'not' if args.nights else 'only'} together with --nights")


def _nights(args: Namespace) -> Path:
    from featurepipe.reporting.nights import nights_report

    return nights_report(existing_store(args), args.to, **options(args, NightsOptions), silent=args.quiet)


def _findings(args: Namespace) -> Path:
    for one in (args.source, args.test_source):
        existing_source(one)
    if args.bundle is not None:
        existing_bundle(args.bundle)
    from featurepipe.reporting.from_store import report

    return report(
        existing_store(args),
        args.to,
        command=this_command(),
        silent=args.quiet,
        **options(args, FindingsOptions),
    )


def add_drift(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, drift)
    option = command.add_argument
    add_store(command)
    add_options(command, DriftOptions)
    option(
        "--accept",
        metavar="RUN-ID|last",
        help="accept the images that this run of a job warned of, so that its next run may compare with them; tests nothing",
    )
    add_quiet(command)
    add_json(command)


def add_duplicates(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, duplicates)
    add_store(command)
    add_options(command, DuplicatesOptions)
    add_quiet(command)
    add_json(command)


def drift(args: Namespace) -> int:
    """Runs ``featurepipe drift``; drift beyond ``--fail`` is a failure."""
    if args.accept is not None:
        return _accept(args)
    from featurepipe.monitoring.drift import drift as test
    from featurepipe.monitoring.text import drift_text

    found = test(
        existing_store(args),
        **options(args, DriftOptions),
        silent=args.quiet,
    )
    show(args, found, drift_text)
    return int(found.get("exit_code", 0))


def _accept(args: Namespace) -> int:
    from featurepipe.monitoring.standing_warnings import accept_drift, accepted_text

    if tests := given(args, DriftOptions, leave_out=declared(DatasetOption)):
        raise UsageError(f"--accept tests nothing: leave {', '.join(tests)} out")
    show(args, accept_drift(existing_store(args), args.accept, dataset=args.dataset), accepted_text)
    return 0


def duplicates(args: Namespace) -> int:
    """Runs ``featurepipe duplicates``."""
    from featurepipe.monitoring.duplicates import duplicates as find
    from featurepipe.monitoring.text import duplicates_text

    found = find(
        existing_store(args),
        **options(args, DuplicatesOptions),
        silent=args.quiet,
    )
    show(args, found, duplicates_text)
    return 0
