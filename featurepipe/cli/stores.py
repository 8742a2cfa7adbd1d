"""``featurepipe info``, ``verify``, ``compact``, ``gc`` and ``export``: what is in a store, its upkeep, and a way out of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from featurepipe.cli.options import (
    add_json,
    add_options,
    add_store,
    define,
    existing_store,
    options,
)
from featurepipe.cli.output import show
from featurepipe.display import displayed_values, size
from featurepipe.store.options import DryRunOption, ExportOptions, GcOptions, RoleOptions

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


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
    from featurepipe.summary import info_text

    store = existing_store(args)
    found = describe(store)
    show(args, {**found, "runs": runs_with_ends(store, found["runs"])}, info_text)
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
