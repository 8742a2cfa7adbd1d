"""The commands that fill a store (``featurepipe extract``), look into it (``info``, ``export``) and look after it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from featurepipe import summary
from featurepipe.cli.options import (
    Commands,
    add_cluster,
    add_command,
    add_json,
    add_options,
    add_quiet,
    add_store,
    cluster,
    existing_store,
    options,
)
from featurepipe.cli.output import show
from featurepipe.display import displayed_values, size
from featurepipe.extraction.limits import Limits
from featurepipe.features.options import (
    MachineOptions,
    NetworkOptions,
    RejectOptions,
    SettingOptions,
    SourceNameOption,
    SourceOptions,
)
from featurepipe.store.options import DryRunOption, ExportOptions, GcOptions, RoleOptions

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


EXTRACT_GROUPS = (
    SourceNameOption,
    NetworkOptions,
    SettingOptions,
    MachineOptions,
    SourceOptions,
    RejectOptions,
    Limits,
)
"""All options of `featurepipe.extract`, in the order of the help."""


def add_extract(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "extract", run_extract, "compute the features that the store lacks for the images of a source",
        epilog="Stopped or killed at any moment, the same command goes on where it was. See exit codes in featurepipe --help.",
    )  # fmt: skip
    option = command.add_argument
    option("source", metavar="SOURCE",
           help="folder, .csv/.parquet/.jsonl manifest, .tar/.zip, IDX, .npz or .h5 arrays, or an fsspec URL")  # fmt: skip
    option("--store", required=True, metavar="DIR", help="the feature store; made when it does not exist")
    add_options(command, *EXTRACT_GROUPS)
    option("--dry-run", action="store_true",
           help="say what is new, how long it will take and how many bytes it needs; change nothing")  # fmt: skip
    add_cluster(command)
    add_quiet(command, "progress")
    add_json(command)


def run_extract(args: Namespace) -> int:
    """Runs the command; rejects make the exit code."""
    from featurepipe.extraction.extract import extract
    from featurepipe.extraction.text import estimate_text, text

    result = extract(
        args.source,
        args.store,
        **options(args, *EXTRACT_GROUPS),
        **cluster(args),
        dry_run=args.dry_run,
        silent=args.quiet,
    )
    show(args, result, estimate_text if args.dry_run else text)
    return int(result.get("exit_code", 0))


UPKEEP = {"compact": DryRunOption, "gc": GcOptions}


def add(commands: Commands) -> None:
    """Declares the five commands."""
    for name, run, purpose in (
        ("info", info, "what a store holds: spaces, columns, datasets, runs; or what a bundle is"),
        ("verify", verify,
         "recompute every checksum; damaged parts are named and set aside, and extract computes them anew"),
        ("compact", compact, "merge small parts and drop duplicate rows"),
        ("gc", gc, "remove what no snapshot needs, and what killed runs left behind"),
    ):  # fmt: skip
        command = add_command(commands, name, run, purpose)
        add_store(command)
        if name in UPKEEP:
            add_options(command, UPKEEP[name])
        add_json(command)
    _add_export(commands)


def _add_export(commands: Commands) -> None:
    command = add_command(
        commands, "export", export, "write one column's features to one plain HDF5, .npz or .parquet file"
    )
    option = command.add_argument
    add_store(command)
    option("--node", required=True, metavar="NODE[:POOLING]", help="which column; see featurepipe info STORE")
    option("--to", required=True, metavar="FILE", help="X, y, ids, classes, and roles; .h5, .npz or .parquet")
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
    from featurepipe.jobs.lock import runs_with_ends
    from featurepipe.store import describe

    store = existing_store(args)
    found = describe(store)
    show(args, {**found, "runs": runs_with_ends(store, found["runs"])}, summary.info_text)
    return 0


def verify(args: Namespace) -> int:
    """Runs ``featurepipe verify``; damage is a failure."""
    from featurepipe.store import verify_store

    report = verify_store(existing_store(args))
    show(args, asdict(report), lambda _: summary.verify_text(displayed_values(report)))
    return 1 if report.problems else 0


def compact(args: Namespace) -> int:
    """Runs ``featurepipe compact``."""
    from featurepipe.store import compact_store

    report = compact_store(existing_store(args), dry_run=args.dry_run)
    show(args, asdict(report), lambda _: summary.compact_text(displayed_values(report), dry_run=args.dry_run))
    return 0


def gc(args: Namespace) -> int:
    """Runs ``featurepipe gc``."""
    from featurepipe.store import gc_store

    report = gc_store(existing_store(args), **options(args, GcOptions))
    show(args, asdict(report), lambda _: summary.gc_text(report, dry_run=args.dry_run))
    return 0


def export(args: Namespace) -> int:
    """Runs ``featurepipe export``."""
    from featurepipe.progress import announcer
    from featurepipe.store import export as write
    from featurepipe.store.locks import starts_again
    from featurepipe.store.roles import with_roles

    store = existing_store(args)
    asked = ExportOptions(**options(args, ExportOptions))
    dataset = asked.dataset or store.only_dataset()
    speak = announcer()

    @starts_again
    def written() -> tuple[FeatureSet, Path]:
        features = store.features(dataset, node=args.node, backbone=asked.backbone, snapshot=asked.snapshot)
        features = with_roles(store, features, asked.labels, RoleOptions.of(asked), speak, snapshot=asked.snapshot)
        features = features if asked.split is None else features.select(split=asked.split)
        return features, write(features, Path(args.to))

    features, path = written()
    rows, width = features.shape
    result = {
        "file": str(path),
        "rows": rows,
        "width": width,
        "dtype": str(features.dtype),
        "bytes": path.stat().st_size,
    }
    show(args, result, lambda r: f"{r['file']}: {rows:,} x {width:,} {r['dtype']}, {size(r['bytes'])}")
    return 0
