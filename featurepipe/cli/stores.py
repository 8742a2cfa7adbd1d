"""``featurepipe info``, ``verify``, ``compact``, ``gc``, ``forget``, ``export``: what a store holds, its upkeep, ways out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from featurepipe.cli.options import (
    add_json,
    add_options,
    add_quiet,
    add_store,
    define,
    existing_store,
    options,
)
from featurepipe.cli.output import show
from featurepipe.display import displayed_values
from featurepipe.store.options import DryRunOption, ExportOptions, GcOptions


def add_info(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, info)
    add_store(command)
    add_json(command)


def add_verify(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, verify)
    add_store(command)
    add_json(command)


def add_compact(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, compact)
    add_store(command)
    add_options(command, DryRunOption)
    add_json(command)


def add_gc(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, gc)
    add_store(command)
    add_options(command, GcOptions)
    add_json(command)


def add_export(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, export)
    option = command.add_argument
    add_store(command)
    option(
        "--node", default="bottleneck", metavar="NODE[:POOLING]",
        help="which column; see featurepipe info STORE (default: bottleneck)",
    )  # fmt: skip
    option(
        "--to", required=True, metavar="PATH",
        help="X, y, ids, classes, and roles; .h5, .npz or .parquet; a name without a suffix is a folder of Parquet files",
    )  # fmt: skip
    add_options(command, ExportOptions)
    add_json(command)


def info(args: Namespace) -> int:
    """Runs ``featurepipe info``, on a store or a bundle."""
    if (Path(args.store) / "bundle.json").is_file():
        from featurepipe.heads.bundle.bundle import read_bundle
        from featurepipe.heads.bundle.text import bundle_text, describe_bundle

        bundle = read_bundle(args.store)
        show(args, describe_bundle(bundle), lambda _: bundle_text(bundle))
        return 0
    from featurepipe.functions import info as found_in
    from featurepipe.summary import info_text

    show(args, found_in(existing_store(args)), info_text)
    return 0


def verify(args: Namespace) -> int:
    """Runs ``featurepipe verify``; damage is a failure."""
    from featurepipe.store import verify_store
    from featurepipe.summary import verify_text

    report = verify_store(existing_store(args))
    show(args, asdict(report), lambda _: verify_text(displayed_values(report)))
    return 1 if report.problems else 0


def compact(args: Namespace) -> int:
    """Runs ``featurepipe compact``."""
    from featurepipe.store import compact_store
    from featurepipe.summary import compact_text

    report = compact_store(existing_store(args), dry_run=args.dry_run)
    show(args, asdict(report), lambda _: compact_text(displayed_values(report), dry_run=args.dry_run))
    return 0


def gc(args: Namespace) -> int:
    """Runs ``featurepipe gc``."""
    from featurepipe.store import gc_store
    from featurepipe.summary import gc_text

    report = gc_store(existing_store(args), **options(args, GcOptions))
    show(args, asdict(report), lambda _: gc_text(report, dry_run=args.dry_run))
    return 0


def add_forget(command: ArgumentParser) -> None:
    """Declares the command."""
    from featurepipe.curation.options import ForgetOptions

    define(command, forget)
    option = command.add_argument
    add_store(command)
    option(
        "--ids", metavar="FILE", help="the images: .txt with an id a line, or .csv, .parquet, .jsonl with a column id"
    )
    option("--id", action="append", default=[], metavar="ID", help="an image; may be repeated")
    add_options(command, ForgetOptions)
    add_quiet(command)
    add_json(command)


def forget(args: Namespace) -> int:
    """Runs ``featurepipe forget``; a trace that is left is a failure."""
    from featurepipe.curation.forget import forget as remove
    from featurepipe.curation.forget import forget_text, ids_of
    from featurepipe.curation.options import ForgetOptions

    ids = [*(ids_of(args.ids) if args.ids is not None else ()), *args.id]
    told = remove(existing_store(args), ids, request=args.ids, **options(args, ForgetOptions), silent=args.quiet)
    show(args, told, lambda found: forget_text(displayed_values(found)))
    return 1 if told["left"] else 0


def export(args: Namespace) -> int:
    """Runs ``featurepipe export``."""
    from featurepipe.store import export_dataset
    from featurepipe.summary import export_text

    result = export_dataset(existing_store(args), args.node, args.to, **options(args, ExportOptions))
    show(args, result, export_text)
    return 0
