"""``featurepipe train``, ``evaluate`` and ``predict``: a head on features, how good it is, and what it says of images."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from featurepipe.cli.options import (
    InPlaceOfBundle,
    add_cluster,
    add_json,
    add_options,
    add_quiet,
    add_store,
    bundle_and,
    cluster,
    define,
    existing_source,
    existing_store,
    options,
)
from featurepipe.cli.output import show, start_up
from featurepipe.evaluation.options import EvaluateOptions
from featurepipe.extraction.limits import EXTRACTION_GROUPS, RejectLimit
from featurepipe.features.options import SourceOptions
from featurepipe.option_groups import declared
from featurepipe.prediction.options import BundleOptions, OwnClassesOption, RawIdsOption, TopOption
from featurepipe.store.options import DatasetOption, SpaceOption
from featurepipe.training.options import TrainOptions
from featurepipe.tuning.options import NOT_OF_TUNING, TuneOptions

PREDICT_GROUPS = (OwnClassesOption, BundleOptions, SourceOptions, RejectLimit, TopOption, RawIdsOption)
"""All options of `featurepipe.predict`, in the order of the help."""


def add_train(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run_train,
        epilog="The dataset's splits train, val and test are taken as they are. What is missing is set aside by class, and by "
        "key, so that copies of one image, and images of one --group, never land on both sides. The test images choose nothing.",
    )  # fmt: skip
    option = command.add_argument
    add_store(command)
    add_options(command, DatasetOption, SpaceOption)
    option("--out", required=True, metavar="BUNDLE",
           help="folder to write; an older bundle there is replaced at the very end")  # fmt: skip
    add_options(command, TrainOptions, leave_out={*declared(DatasetOption), *declared(SpaceOption)})
    add_cluster(command)
    option("--dry-run", action="store_true", help="say which images, how much memory and how long; write nothing")
    add_quiet(command)
    add_json(command)


def run_train(args: Namespace) -> int:
    """Runs the command."""
    from featurepipe.training.text import cost_text, train_text
    from featurepipe.training.train import train

    result = train(
        args.store,
        out=args.out,
        **options(args, TrainOptions),
        dry_run=args.dry_run,
        silent=args.quiet,
        **cluster(args),
    )
    show(args, result, cost_text if args.dry_run else lambda found: train_text(found, start_up=start_up(args, found)))
    return 0


def add_finetune(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run_finetune,
        epilog="Images are extracted first, once: their activations at the node (column NODE:map) and the bottleneck go into a "
        "store. An exact head on the frozen bottleneck comes first, then the layers are tuned with it at small rates; validation "
        "images decide when to stop, and how much of the tuned weights is kept. A run that was stopped or killed goes on when "
        "called again.",
    )  # fmt: skip
    option = command.add_argument
    option(
        "source", metavar="SOURCE", help="images, as for featurepipe extract; or a feature store with their activations"
    )
    option("--out", required=True, metavar="BUNDLE",
           help="folder to write; an older bundle there is replaced at the very end")  # fmt: skip
    option("--store", metavar="DIR",
           help="where activations of images go; what is there is not computed again (default: BUNDLE.features)")  # fmt: skip
    add_options(command, TuneOptions)
    add_options(command, *EXTRACTION_GROUPS, leave_out=NOT_OF_TUNING)
    add_cluster(command)
    option("--dry-run", action="store_true",
           help="say what would be extracted and tuned, how large that is and how long it takes; write nothing")  # fmt: skip
    add_quiet(command)
    add_json(command)


def run_finetune(args: Namespace) -> int:
    """Runs the command."""
    existing_source(args.source)
    from featurepipe.training.text import dry_text, finetune_text
    from featurepipe.tuning.finetune import finetune
    from featurepipe.tuning.peers import processes

    result = finetune(
        args.source,
        args.store,
        out=args.out,
        **options(args, TuneOptions),
        extraction=options(args, *EXTRACTION_GROUPS, leave_out=NOT_OF_TUNING),
        dry_run=args.dry_run,
        silent=args.quiet,
        **cluster(args),
    )
    if processes()[0] == 0:  # of those that torchrun starts, the first speaks
        told = dry_text if args.dry_run else lambda found: finetune_text(found, start_up=start_up(args, found))
        show(args, result, told)
    return 0


def add_evaluate(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run_evaluate,
        epilog="With --backbone NAME a pretrained network is measured as it is, its own classes against your labels: give STORE "
        "alone, with features of its bottleneck.",
    )  # fmt: skip
    option = command.add_argument
    option("bundle", metavar="BUNDLE", help="the folder that featurepipe train --out wrote; left out with --backbone")
    add_store(command)
    add_options(command, EvaluateOptions, actions={"backbone": InPlaceOfBundle})
    add_cluster(command)
    add_quiet(command)
    add_json(command)


def run_evaluate(args: Namespace) -> int:
    """Runs the command."""
    bundle, args.store = bundle_and(args, "store")
    from featurepipe.evaluation.evaluate import evaluate
    from featurepipe.evaluation.text import text

    result = evaluate(
        bundle,
        existing_store(args),
        **options(args, EvaluateOptions),
        silent=args.quiet,
        **cluster(args),
    )
    show(args, result, text)
    return 0


def add_predict(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run_predict,
        epilog="With --backbone NAME a pretrained network labels them with its own classes: give SOURCE alone. "
        "BUNDLE decides backbone, weights, preprocessing and precision; see exit codes in featurepipe --help. One that "
        "was trained on a --target gives id, predicted, and low and high, the limits of its prediction interval; on "
        "--multilabel id, labels, and one probability per label.",
    )  # fmt: skip
    option = command.add_argument
    option("bundle", metavar="BUNDLE", help="the folder that featurepipe train --out wrote; left out with --backbone")
    option("source", metavar="SOURCE", help="as for featurepipe extract")
    option("--to", required=True, metavar="FILE", help=".csv, .jsonl or .parquet")
    add_options(command, *PREDICT_GROUPS, actions={"backbone": InPlaceOfBundle})
    add_cluster(command)
    add_quiet(command, "progress")
    add_json(command)


def run_predict(args: Namespace) -> int:
    """Runs the command; rejects make the exit code."""
    bundle, source = bundle_and(args, "source")
    existing_source(source)
    from featurepipe.prediction.predict import predict, text

    result = predict(
        bundle,
        source,
        args.to,
        **options(args, *PREDICT_GROUPS),
        **cluster(args),
        silent=args.quiet,
    )
    show(args, result, text)
    return int(result.get("exit_code", 0))
