"""``featurepipe extract``: features of images into a store."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

from featurepipe.cli.options import (
    add_cluster,
    add_json,
    add_options,
    add_quiet,
    cluster,
    define,
    existing_source,
    options,
)
from featurepipe.cli.output import show
from featurepipe.extraction.limits import Limits
from featurepipe.features.options import (
    MachineOptions,
    MirrorOption,
    NetworkOptions,
    RejectOptions,
    SettingOptions,
    SourceNameOption,
    SourceOptions,
)

EXTRACT_GROUPS = (
    SourceNameOption,
    NetworkOptions,
    SettingOptions,
    MirrorOption,
    MachineOptions,
    SourceOptions,
    RejectOptions,
    Limits,
)
"""All options of `featurepipe.extract`, in the order of the help."""


def add_extract(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run_extract,
        epilog="Stopped or killed at any moment, the same command goes on where it was. See exit codes in featurepipe --help.",
    )  # fmt: skip
    option = command.add_argument
    option("source", metavar="SOURCE",
           help="folder, .csv/.parquet/.jsonl manifest, .tar/.zip, IDX, .npz or .h5 arrays, or an fsspec URL")  # fmt: skip
    option("--store", default="features", metavar="DIR",
           help="the feature store; made when it does not exist (default: features)")  # fmt: skip
    add_options(command, *EXTRACT_GROUPS)
    option("--dry-run", action="store_true",
           help="say what is new, how long it will take and how many bytes it needs; change nothing")  # fmt: skip
    add_cluster(command)
    add_quiet(command, "progress")
    add_json(command)


def _named(path: str, record: Mapping[str, Any]) -> str | None:
    """What the next command must be given as its backbone, if the store has features of other networks, too."""
    from featurepipe.store import FeatureStore
    from featurepipe.store.choice import name_among

    if record.get("status") != "done":
        return None
    store = FeatureStore(path, create=False)
    return name_among(store, store.space(record["fingerprint"]))


def run_extract(args: Namespace) -> int:
    """Runs the command; rejects make the exit code."""
    existing_source(args.source)
    from featurepipe.extraction.extract import extract
    from featurepipe.extraction.text import estimate_text, text_and_next

    result = extract(
        args.source,
        args.store,
        **options(args, *EXTRACT_GROUPS),
        **cluster(args),
        dry_run=args.dry_run,
        silent=args.quiet,
    )
    if args.dry_run:
        show(args, result, estimate_text)
    else:
        show(args, result, partial(text_and_next, store=args.store, backbone=_named(args.store, result)))
    return int(result.get("exit_code", 0))
