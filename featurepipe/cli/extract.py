"""``featurepipe extract``."""

from __future__ import annotations

from argparse import Namespace

from featurepipe.cli.options import (
    Commands,
    add_cluster,
    add_command,
    add_json,
    add_machine,
    add_quiet,
    add_weights,
    cluster,
    machine,
)
from featurepipe.cli.output import show
from featurepipe.sizes import seconds_of


def add(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "extract", run, "compute the features that the store lacks for the images of a source",
        epilog="Stopped or killed at any moment, the same command goes on where it was. See exit codes in featurepipe --help.",
    )  # fmt: skip
    option = command.add_argument
    option("source", metavar="SOURCE",
           help="folder, .csv/.parquet/.jsonl manifest, .tar/.zip, IDX, .npz or .h5 arrays, or an fsspec URL")  # fmt: skip
    option("--store", required=True, metavar="DIR", help="the feature store; made when it does not exist")
    option("--dataset", metavar="NAME", help="name of the source in the store (default: the source's own name)")
    option("--backbone", default="resnet50", metavar="NAME", help="see featurepipe backbones (default: %(default)s)")
    add_weights(command)
    option(
        "--node", action="append", dest="nodes", metavar="NODE[:POOLING]",
        help="what to keep, may be repeated; poolings: gap, gmp, gem, avgKxK, maxKxK, flatten, map (default: bottleneck:gap)",
    )  # fmt: skip
    option("--precision", default="auto", metavar="auto|fp32|bf16|fp16",
           help="auto: as in the store, else the fastest that agrees with fp32")  # fmt: skip
    option("--dtype", default="auto", metavar="auto|float16|float32",
           help="stored dtype (auto: as in the store, else float16)")  # fmt: skip
    option("--decode", default="auto", metavar="auto|cpu|gpu",
           help="where JPEGs are decoded (auto: as in the store, else cpu)")  # fmt: skip
    option("--intensity", default="auto", metavar="auto|declared|full|bits=N|window=LO:HI|minmax",
           help="black and white of images of more than 8 bits (auto: as in the store, else as the files declare)")  # fmt: skip
    add_machine(command, batch_size="auto: 16 on a CPU, 256 on CUDA, halved when memory runs out")
    option("--max-gone", metavar="N|P%",
           help="refuse if more images of the last snapshot are gone (default: if all are; 100%%: never)")  # fmt: skip
    option("--retry-rejects", action="store_true", help="try images again whose bytes were rejected before")
    option("--damaged", choices=("reject", "keep"), default="reject",
           help="JPEGs that lost pixels, as in a broken copy; those kept are listed (default: %(default)s)")  # fmt: skip
    option("--min-free", metavar="AMOUNT", help="stop while this much is still free on the store's disk, such as 20GB")
    option("--time-budget", metavar="TIME",
           help="stop after so long, such as 90s, 30min or 6h; the next run goes on")  # fmt: skip
    option("--dry-run", action="store_true",
           help="say what is new, how long it will take and how many bytes it needs; change nothing")  # fmt: skip
    add_cluster(command)
    add_quiet(command, "progress")
    add_json(command)


def run(args: Namespace) -> int:
    """Runs the command; rejects make the exit code."""
    from featurepipe.extraction.extract import extract
    from featurepipe.extraction.text import estimate_text, text

    result = extract(
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
        intensity=args.intensity,
        **machine(args),
        **cluster(args),
        max_gone=args.max_gone,
        min_free=args.min_free,
        retry_rejects=args.retry_rejects,
        damaged=args.damaged,
        time_budget=None if args.time_budget is None else seconds_of(args.time_budget),
        dry_run=args.dry_run,
        silent=args.quiet,
    )
    show(args, result, estimate_text if args.dry_run else text)
    return int(result.get("exit_code", 0))
