"""``featurepipe drift`` and ``featurepipe duplicates``: what is odd about the images, as their features show it."""

from __future__ import annotations

from argparse import Namespace

from featurepipe.cli.options import (
    Commands,
    add_command,
    add_json,
    add_options,
    add_quiet,
    add_store,
    existing_store,
    given,
    options,
)
from featurepipe.cli.output import show
from featurepipe.errors import UsageError
from featurepipe.monitoring.options import DriftOptions, DuplicatesOptions
from featurepipe.option_groups import declared
from featurepipe.store.options import DatasetOption


def add(commands: Commands) -> None:
    """Declares both commands."""
    _add_drift(commands)
    _add_duplicates(commands)


def _add_drift(commands: Commands) -> None:
    command = add_command(commands, "drift", drift, "whether the new images are like those of an earlier snapshot")
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


def _add_duplicates(commands: Commands) -> None:
    command = add_command(
        commands,
        "duplicates",
        duplicates,
        "copies, near copies, and those on both sides of a split",
    )
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
