"""The options of every command, one function per command, in the order in which people meet them."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from featurepipe import __version__
from featurepipe.heads.families import HEADS

EXIT_CODES = """exit codes:
  0  done, or nothing to do     3  done, some images rejected (fewer than --max-rejects)
  1  failure                    4  more images rejected than --max-rejects
  2  wrong usage               75  another process holds the store's lock
  130, 143  stopped by Ctrl-C or SIGTERM, everything in flight committed
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="featurepipe",
        description="A frozen ConvNet as a fixed feature extractor: images in, HDF5 features out, once and never twice.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"featurepipe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_backbones(commands)
    _add_nodes(commands)
    _add_extract(commands)
    _add_store_commands(commands)
    _add_export(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_depth(commands)
    _add_report(commands)
    _add_doctor(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001


def _command(commands: Commands, name: str, summary: str, **kwargs: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=kwargs.get("description", summary), epilog=kwargs.get("epilog")
    )
    command.set_defaults(run=name)
    return command


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output, nothing else there"
    )


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights", default="DEFAULT", metavar="NAME|none|FILE",
        help="a weights enum of torchvision, DEFAULT, a state-dict file, or none: a random control network",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="of the random control network (default: 0)")


def _add_demo(commands: Commands) -> None:
    command = _command(commands, "demo", "the main job on 2,000 bundled images, offline, ending in a picture")
    command.add_argument(
        "--out",
        dest="folder",
        default="featurepipe-demo",
        metavar="DIR",
        help="where to put store and picture (default: %(default)s)",
    )


def _add_backbones(commands: Commands) -> None:
    command = _command(
        commands, "backbones", "list the networks: input size, parameters, bottleneck width, weights at hand",
        epilog="timm/NAME and package.module:factory are backbones too; featurepipe nodes BACKBONE shows one of them",
    )  # fmt: skip
    _add_json(command)


def _add_nodes(commands: Commands) -> None:
    command = _command(
        commands, "nodes", "list a network's nodes in execution order: shape, width after gap, share of the cost"
    )
    command.add_argument(
        "backbone", metavar="BACKBONE", help="as featurepipe backbones lists them, timm/NAME or package.module:factory"
    )
    _add_json(command)


def _add_extract(commands: Commands) -> None:
    command = _command(
        commands, "extract", "compute the features that the store lacks for the images of a source",
        epilog="Stopped or killed at any moment, the same command goes on where it was. See exit codes in featurepipe --help.",
    )  # fmt: skip
    add = command.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder, .csv/.parquet/.jsonl manifest, .tar/.zip, IDX, .npz or .h5 arrays, or an fsspec URL",
    )
    add("--store", required=True, metavar="DIR", help="the feature store; made when it does not exist")
    add("--dataset", metavar="NAME", help="name of the source in the store (default: the source's own name)")
    add("--backbone", default="resnet50", metavar="NAME", help="see featurepipe backbones (default: %(default)s)")
    _add_weights(command)
    add(
        "--node",
        action="append",
        dest="nodes",
        metavar="NODE[:POOLING]",
        help="what to keep, may be repeated; poolings: gap, gmp, gem, avgKxK, maxKxK, flatten, map (default: bottleneck:gap)",
    )
    add(
        "--precision",
        default="auto",
        metavar="auto|fp32|bf16|fp16",
        help="auto: as in the store, else the fastest that agrees with fp32",
    )
    add(
        "--dtype",
        default="auto",
        metavar="auto|float16|float32",
        help="stored dtype (auto: as in the store, else float16)",
    )
    add(
        "--decode",
        default="auto",
        metavar="auto|cpu|gpu",
        help="where JPEGs are decoded (auto: as in the store, else cpu)",
    )
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="default: cuda where there is one")
    add(
        "--batch-size",
        default="auto",
        metavar="auto|N",
        help="images per forward (auto: 16 on a CPU, 256 on CUDA, halved when memory runs out)",
    )
    add("--workers", type=int, metavar="N", help="threads that read and decode (default: one per CPU, at most 16)")
    add("--max-rejects", default="1%", metavar="N|P%", help="unusable images to put up with (default: 1%%)")
    add(
        "--dry-run",
        action="store_true",
        help="say what is new, how long it will take and how many bytes it needs; change nothing",
    )
    add("--quiet", action="store_true", help="no progress")
    _add_json(command)


def _add_store_commands(commands: Commands) -> None:
    for name, summary in (
        ("info", "what a store holds: spaces, columns, datasets, runs; or what a bundle is"),
        ("verify", "recompute every checksum; damaged parts are named and set aside, and extract computes them anew"),
        ("compact", "merge small parts and drop duplicate rows"),
        ("gc", "remove what no snapshot needs, and what killed runs left behind"),
    ):
        command = _command(commands, name, summary)
        command.add_argument("store", metavar="STORE")
        if name in ("compact", "gc"):
            command.add_argument("--dry-run", action="store_true", help="say what would be done; change nothing")
        if name == "gc":
            command.add_argument(
                "--keep-snapshots", type=int, metavar="N", help="keep the last N of each dataset (default: all)"
            )
        _add_json(command)


def _add_export(commands: Commands) -> None:
    command = _command(commands, "export", "write one column's features to one plain HDF5, .npz or .parquet file")
    add = command.add_argument
    add("store", metavar="STORE")
    add("--node", required=True, metavar="NODE[:POOLING]", help="which column; see featurepipe info STORE")
    add("--to", required=True, metavar="FILE", help="X, y, ids, classes; .h5, .npz or .parquet")
    add("--dataset", metavar="NAME", help="default: the store's only dataset")
    add(
        "--backbone",
        metavar="NAME",
        help="a backbone, a space's name or fingerprint; default: the only one with that column",
    )
    add("--split", metavar="NAME", help="only this split")
    _add_json(command)


def _add_train(commands: Commands) -> None:
    command = _command(
        commands, "train", "fit a head on cached features and keep it in a bundle that predicts on images",
        epilog="The dataset's splits train, val and test are taken as they are. What is missing is set aside by class, and by "
        "key, so that copies of one image never land on both sides. The test images choose nothing.",
    )  # fmt: skip
    add = command.add_argument
    add("store", metavar="STORE")
    add("--dataset", metavar="NAME", help="default: the store's only dataset")
    add("--node", action="append", dest="nodes", metavar="COLUMN",
        help="a column as featurepipe info lists it; several are put side by side; recommended: "
        "as featurepipe depth found (default: bottleneck)")  # fmt: skip
    add("--backbone", metavar="NAME", help="a backbone, a space's name or fingerprint, where the store holds several")
    add("--head", default="logistic", metavar="|".join(HEADS), help="default: %(default)s")
    add(
        "--out",
        required=True,
        metavar="BUNDLE",
        help="folder to write; an older bundle there is replaced at the very end",
    )
    add(
        "--labels",
        metavar="FILE",
        help="labels to use instead of the dataset's: .csv, .parquet or .jsonl with id and label",
    )
    add("--split", metavar="NAME", help="the split to train on (default: train)")
    add("--set", action="append", default=[], dest="params", metavar="NAME=VALUE",
        help="a parameter of the head, such as C=0.1; may be repeated")  # fmt: skip
    add("--tune", action="store_true", help="search the head's parameters on the val split, or on 5 folds")
    add(
        "--pca",
        metavar="N|SHARE",
        help="principal components to keep: a number, or a share of the variance such as 0.95",
    )
    add("--class-weight", choices=["balanced"], help="weigh classes equally, however many images each has")
    add("--no-calibration", action="store_true", help="leave probabilities as the head gives them; saves one fit")
    add(
        "--min-class-size",
        type=int,
        default=2,
        metavar="N",
        help="refuse classes with fewer images (default: %(default)s)",
    )
    add(
        "--memory",
        metavar="AMOUNT",
        help="what fitting may take, such as 2GB; above it, heads read blocks (default: half of the free)",
    )
    add("--jobs", type=int, default=1, metavar="N", help="fits at once in a search in memory (default: %(default)s)")
    add(
        "--weights",
        metavar="FILE",
        help="the backbone's weights file, if it has one of your own: a copy goes into the bundle",
    )
    add("--seed", type=int, default=0, help="of draws and estimators (default: %(default)s)")
    add("--dry-run", action="store_true", help="say which images, how much memory and how long; write nothing")
    add("--quiet", action="store_true", help="no messages on the way")
    _add_json(command)


def _add_evaluate(commands: Commands) -> None:
    command = _command(
        commands,
        "evaluate",
        "metrics of a bundle on cached features, each with its confidence interval; leaks between splits",
    )
    add = command.add_argument
    add("bundle", metavar="BUNDLE")
    add("store", metavar="STORE")
    add("--dataset", metavar="NAME", help="default: the store's only dataset")
    add(
        "--split",
        metavar="NAME",
        help="default: test where the dataset has it, else the images not trained on; all: every labelled one",
    )
    add(
        "--labels",
        metavar="FILE",
        help="labels to use instead of the dataset's: .csv, .parquet or .jsonl with id and label",
    )
    add(
        "--ignore-unknown-classes",
        action="store_true",
        help="leave out images of classes that the bundle does not know, instead of refusing",
    )
    add(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples behind the intervals (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    add("--quiet", action="store_true", help="no messages on the way")
    _add_json(command)


def _add_predict(commands: Commands) -> None:
    command = _command(
        commands, "predict", "label the images of a source with a bundle: id, label, one probability per class",
        epilog="BUNDLE decides backbone, weights, preprocessing and precision; see exit codes in featurepipe --help.",
    )  # fmt: skip
    add = command.add_argument
    add("bundle", metavar="BUNDLE")
    add("source", metavar="SOURCE", help="as for featurepipe extract")
    add("--to", required=True, metavar="FILE", help=".csv, .jsonl or .parquet")
    add(
        "--weights",
        metavar="FILE",
        help="the backbone's weights file, where it was your own and the bundle has no copy",
    )
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="default: cuda where there is one")
    add("--batch-size", default="auto", metavar="auto|N", help="images per forward (default: auto)")
    add("--workers", type=int, metavar="N", help="threads that read and decode (default: one per CPU, at most 16)")
    add("--max-rejects", default="1%", metavar="N|P%", help="unusable images to put up with (default: 1%%)")
    add("--trust-code", action="store_true", help="let a bundle of a package.module:factory network run that module")
    add("--quiet", action="store_true", help="no progress")
    _add_json(command)


def _add_depth(commands: Commands) -> None:
    command = _command(
        commands, "depth", "which layer of a network transfers best: every stage measured alike, with intervals",
        epilog="All columns come from one pass over the images and stay in the store; what has been measured is kept as well. "
        "Stopped at any moment, the same command goes on. featurepipe train --node recommended uses the answer.",
    )  # fmt: skip
    add = command.add_argument
    add("source", metavar="SOURCE", help="images, as for featurepipe extract; or a feature store, compared as it is")
    add("--store", metavar="DIR", help="where features of SOURCE go (default: features)")
    add("--dataset", metavar="NAME", help="name of the source in the store (default: the source's own name)")
    add("--backbone", metavar="NAME", help="see featurepipe backbones (default: resnet50, or what STORE holds)")
    add("--weights", default="DEFAULT", metavar="NAME|none|FILE", help="of the network, as for featurepipe extract")
    add("--node", action="append", dest="nodes", metavar="auto|NODE[:POOLING]",
        help="may be repeated; auto: the network's stages and its bottleneck (default: auto)")  # fmt: skip
    add(
        "--heads",
        default="logistic",
        metavar="LIST",
        help=f"of {', '.join(HEADS)}; separated by commas (default: %(default)s)",
    )
    add("--folds", type=int, default=5, metavar="N", help="of the cross-validation (default: %(default)s)")
    add("--split", action="store_true", help="train on the dataset's split train and test on test, instead of folds")
    add("--seeds", type=int, default=3, metavar="N", help="how many times folds are dealt anew (default: %(default)s)")
    add("--pooling", metavar="LIST",
        help="such as gap,avg2x2 (default: the finest average grid within --max-width)")  # fmt: skip
    add("--max-width", type=int, default=9000, metavar="N", help="values per image of a column (default: %(default)s)")
    add("--control", choices=["random"], help="measure the same network with random weights as well")
    add(
        "--test-source",
        metavar="SOURCE",
        help="images of the same classes from elsewhere, which heads are tested on, too",
    )
    add(
        "--labels",
        metavar="FILE",
        help="labels to use instead of the source's: .csv, .parquet or .jsonl with id and label",
    )
    add("--report", metavar="FILE.html", help="write the page: curves, tables, a map of the images, mistakes")
    add("--precision", default="auto", metavar="auto|fp32|bf16|fp16", help="as for featurepipe extract")
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="default: cuda where there is one")
    add("--batch-size", default="auto", metavar="auto|N", help="images per forward (default: auto)")
    add("--workers", type=int, metavar="N", help="threads that read and decode (default: one per CPU, at most 16)")
    add("--max-rejects", default="1%", metavar="N|P%", help="unusable images to put up with (default: 1%%)")
    add("--jobs", type=int, metavar="N", help="measurements at once (default: one per CPU)")
    add("--dry-run", action="store_true", help="say which columns, how long extracting takes and how much is measured")
    add("--quiet", action="store_true", help="no progress")
    _add_json(command)


def _add_report(commands: Commands) -> None:
    command = _command(
        commands, "report", "one HTML page of what a comparison of layers, or the test of a bundle, found"
    )
    add = command.add_argument
    add("store", metavar="STORE")
    add(
        "--bundle",
        metavar="BUNDLE",
        help="report on this bundle, evaluated on the dataset, instead of the last comparison",
    )
    add("--dataset", metavar="NAME", help="default: the store's only dataset")
    add("--split", metavar="NAME", help="of the bundle's evaluation, as for featurepipe evaluate")
    add("--source", metavar="SOURCE", help="the images, for thumbnails (default: where they were extracted from)")
    add("--labels", metavar="FILE", help="the labels that were compared with, if they were not the dataset's")
    add("--to", required=True, metavar="FILE.html", help="the page to write")
    add("--quiet", action="store_true", help="no messages on the way")


def _add_doctor(commands: Commands) -> None:
    command = _command(
        commands, "doctor", "check versions, devices, bf16, threads, disk, and which weights are at hand"
    )
    command.add_argument("--store", metavar="DIR", help="a folder to check for space and writability (default: here)")
    _add_json(command)
