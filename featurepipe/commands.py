"""What each command does with its parsed arguments: calls a verb, prints its result, returns the exit code."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from featurepipe import summary
from featurepipe.errors import UsageError
from featurepipe.progress import duration
from featurepipe.tables import share, size, table


def demo(args: Namespace) -> int:
    """``featurepipe demo``."""
    from featurepipe.demo import run_demo

    run_demo(Path(args.folder), say=partial(print, file=args.stdout))
    return 0


def backbones(args: Namespace) -> int:
    """``featurepipe backbones``."""
    from featurepipe.backbones import list_backbones

    infos = list_backbones()
    rows = [
        [
            i.name,
            "x".join(map(str, i.input_size)),
            i.parameters,
            i.bottleneck_width,
            i.at_hand,
            ", ".join(i.weights) or "-",
        ]
        for i in infos
    ]
    header = ["backbone", "input", "parameters", "bottleneck", "at hand", "weights"]
    return _print(args, [asdict(info) for info in infos], lambda _: table(header, rows))


def nodes(args: Namespace) -> int:
    """``featurepipe nodes``."""
    from featurepipe.backbones import load_backbone

    backbone = load_backbone(args.backbone, "none")
    infos = backbone.nodes()
    found = {
        "backbone": backbone.name,
        "bottleneck": backbone.bottleneck,
        "traceable": backbone.traceable,
        "input_shape": list(backbone.preprocessing.input_shape),
        "nodes": [asdict(info) for info in infos],
    }

    def text(_: Any) -> str:
        rows = [[i.name, "x".join(map(str, i.shape)), i.width, share(i.cost), " ".join(i.blocks)] for i in infos]
        shape = "x".join(map(str, backbone.preprocessing.input_shape))
        title = (
            f"{backbone.name}, input {shape}, bottleneck {backbone.bottleneck}; cost: share of the forward up to there"
        )
        return title + "\n" + table(["node", "shape", "gap width", "cost", "ends block"], rows)

    return _print(args, found, text)


def extract(args: Namespace) -> int:
    """``featurepipe extract``."""
    from featurepipe.extraction.extract import extract as run

    result = run(
        args.source,
        args.store,
        dataset=args.dataset,
        backbone=args.backbone,
        weights=args.weights,
        seed=args.seed,
        nodes=args.nodes or ["bottleneck"],
        precision=args.precision,
        dtype=args.dtype,
        decode=args.decode,
        device=args.device,
        batch_size=args.batch_size,
        workers=args.workers,
        max_rejects=args.max_rejects,
        dry_run=args.dry_run,
        silent=args.quiet,
    )
    _print(args, result, _estimate_text if args.dry_run else _run_text)
    return int(result.get("exit_code", 0))


def info(args: Namespace) -> int:
    """``featurepipe info``."""
    if (Path(args.store) / "bundle.json").is_file():
        from featurepipe.heads.bundle.bundle import read_bundle
        from featurepipe.heads.bundle.description import bundle_text, describe_bundle

        bundle = read_bundle(args.store)
        return _print(args, describe_bundle(bundle), lambda _: bundle_text(bundle))
    from featurepipe.store import describe

    return _print(args, describe(_store(args)), summary.info_text)


def verify(args: Namespace) -> int:
    """``featurepipe verify``."""
    from featurepipe.store import verify_store

    report = verify_store(_store(args))
    _print(args, asdict(report), lambda _: summary.verify_text(report))
    return 1 if report.problems else 0


def compact(args: Namespace) -> int:
    """``featurepipe compact``."""
    from featurepipe.store import compact_store

    report = compact_store(_store(args), dry_run=args.dry_run)
    return _print(args, asdict(report), lambda _: summary.compact_text(report, dry_run=args.dry_run))


def gc(args: Namespace) -> int:
    """``featurepipe gc``."""
    from featurepipe.store import gc_store

    report = gc_store(_store(args), dry_run=args.dry_run, keep_snapshots=args.keep_snapshots)
    return _print(args, asdict(report), lambda _: summary.gc_text(report, dry_run=args.dry_run))


def export(args: Namespace) -> int:
    """``featurepipe export``."""
    from featurepipe.store import export as write

    store = _store(args)
    features = store.features(
        args.dataset or store.only_dataset(), node=args.node, backbone=args.backbone, split=args.split
    )
    path = write(features, Path(args.to))
    rows, width = features.shape
    result = {
        "file": str(path),
        "rows": rows,
        "width": width,
        "dtype": str(features.dtype),
        "bytes": path.stat().st_size,
    }
    return _print(args, result, lambda r: f"{r['file']}: {rows:,} x {width:,} {r['dtype']}, {size(r['bytes'])}")


def train(args: Namespace) -> int:
    """``featurepipe train``."""
    from featurepipe.training.text import cost_text, train_text
    from featurepipe.training.train import train as run

    result = run(
        args.store,
        dataset=args.dataset,
        nodes=args.nodes or ["bottleneck"],
        head=args.head,
        out=args.out,
        backbone=args.backbone,
        labels=args.labels,
        split=args.split,
        params=_parameters(args.params),
        pca=None if args.pca is None else _value(args.pca),
        class_weight=args.class_weight,
        tune=args.tune,
        calibration=not args.no_calibration,
        min_class_size=args.min_class_size,
        memory=args.memory,
        jobs=args.jobs,
        seed=args.seed,
        weights=args.weights,
        dry_run=args.dry_run,
        silent=args.quiet,
    )
    return _print(args, result, cost_text if args.dry_run else train_text)


def evaluate(args: Namespace) -> int:
    """``featurepipe evaluate``."""
    from featurepipe.evaluation.evaluate import evaluate as run
    from featurepipe.evaluation.text import text

    result = run(
        args.bundle,
        _store(args),
        dataset=args.dataset,
        split=args.split,
        labels=args.labels,
        ignore_unknown_classes=args.ignore_unknown_classes,
        bootstrap=args.bootstrap,
        seed=args.seed,
        silent=args.quiet,
    )
    return _print(args, result, text)


def predict(args: Namespace) -> int:
    """``featurepipe predict``."""
    from featurepipe.prediction.predict import predict as run
    from featurepipe.prediction.text import text

    result = run(
        args.bundle,
        args.source,
        args.to,
        weights=args.weights,
        device=args.device,
        batch_size=args.batch_size,
        workers=args.workers,
        max_rejects=args.max_rejects,
        trust_code=args.trust_code,
        silent=args.quiet,
    )
    _print(args, result, text)
    return int(result.get("exit_code", 0))


def depth(args: Namespace) -> int:
    """``featurepipe depth``."""
    from featurepipe.layer_depth.depth import depth as run
    from featurepipe.layer_depth.text import plan_text, text

    result = run(
        args.source,
        args.store,
        dataset=args.dataset,
        backbone=args.backbone,
        weights=args.weights,
        nodes=args.nodes or "auto",
        heads=_list(args.heads),
        folds=args.folds,
        split=args.split,
        pooling=_list(args.pooling) if args.pooling else None,
        max_width=args.max_width,
        seeds=args.seeds,
        control=args.control,
        test_source=args.test_source,
        labels=args.labels,
        extraction={
            name: getattr(args, name) for name in ("precision", "device", "batch_size", "workers", "max_rejects")
        },
        jobs=args.jobs,
        command=shlex.join(["featurepipe", *sys.argv[1:]]),
        report=args.report,
        dry_run=args.dry_run,
        silent=args.quiet,
    )
    return _print(args, result, plan_text if args.dry_run else text)


def report(args: Namespace) -> int:
    """``featurepipe report``."""
    from featurepipe.reporting.from_store import report as run

    path = run(
        _store(args),
        args.to,
        bundle=args.bundle,
        dataset=args.dataset,
        split=args.split,
        source=args.source,
        labels=args.labels,
        command=shlex.join(["featurepipe", *sys.argv[1:]]),
        silent=args.quiet,
    )
    print(path, file=args.stdout)
    return 0


def doctor(args: Namespace) -> int:
    """``featurepipe doctor``."""
    from featurepipe.doctor import examine

    report = examine(Path(args.store or "."))
    _print(args, report.as_dict(), lambda _: report.text())
    return 0 if report.healthy else 1


def _list(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _parameters(settings: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as keyword arguments."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise UsageError(f"--set {setting!r} is no NAME=VALUE; write for instance --set C=0.1")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """A number, true, false or null as JSON has them, else the text itself."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return None if text == "None" else text


def _store(args: Namespace) -> Any:
    from featurepipe.store import FeatureStore

    return FeatureStore(args.store, create=False)


def _print(args: Namespace, value: Any, text: Callable[[Any], str]) -> int:
    if args.json:
        print(json.dumps(value, indent=2), file=args.stdout)  # ASCII only, which every terminal and pipe can take
    else:
        print(text(value), file=args.stdout)
    return 0


def _run_text(record: Mapping[str, Any]) -> str:
    counts, seconds = record["counts"], record["seconds"]
    lines = [
        f"{record['dataset']}: {counts['listed']:,} images listed, {counts['computed']:,} computed, {counts['known']:,} known, "
        f"{counts['rejected']:,} rejected",
    ]
    if record["gone"]:
        lines.append(f"{record['gone']:,} images of the last snapshot are gone")
    if record["rejects"]:
        lines.append("rejected: " + ", ".join(f"{count} {code}" for code, count in record["reject_reasons"].items()))
        lines += [f"  {reject['id']}: {reject['reason']}" for reject in record["rejects"][:5]]
        if counts["rejected"] > 5:
            lines.append(f"  ... all in {record['rejects_file']}")
    if counts["computed"]:
        by_column = record["computed_by_column"].items()
        lines.append("; ".join(f"{name} {f'computed for {n:,}' if n else 'was there'}" for name, n in by_column))
        stages = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("read", "decode", "forward", "write"))
        lines.append(f"{duration(seconds['wall'])} at {record['images_per_second']:,.1f} img/s ({stages})")
        lines.append(record["verdict"])
    lines.append(f"space {record['space']}")
    return "\n".join(lines)


def _estimate_text(estimate: Mapping[str, Any]) -> str:
    lines = [
        f"{estimate['dataset']}: {estimate['listed']:,} images listed, {estimate['known']:,} known, {estimate['rejected']:,} "
        f"rejected before, {estimate['to_read']:,} to read (at most {estimate['new']:,} new ones: copies are known once read)"
    ]
    if estimate["images_per_second"]:
        lines.append(
            f"about {duration(estimate['seconds'])} at {estimate['images_per_second']:,.1f} img/s, "
            f"from a timed sample of {estimate['sampled']} images"
        )
    lines += [f"{column}: {size(count)}" for column, count in estimate["bytes_per_column"].items()]
    return "\n".join([*lines, "dry run: nothing was changed"])
