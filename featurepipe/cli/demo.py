"""``featurepipe demo``, ``doctor``, ``backbones`` and ``nodes``: what works on this machine, and which networks there are."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from featurepipe.cli.options import add_json, define
from featurepipe.cli.output import say, show
from featurepipe.display import named_columns, share, table


def add_demo(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, demo)
    command.add_argument(
        "--out", dest="folder", default="featurepipe-demo", metavar="DIR",
        help="where to put store and picture (default: %(default)s)",
    )  # fmt: skip


def demo(args: Namespace) -> int:
    """Runs the command."""
    from featurepipe.demo import run_demo

    run_demo(Path(args.folder), say=partial(say, args))
    return 0


def add_doctor(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, doctor)
    command.add_argument("--store", metavar="DIR", help="a folder to check for space and writability (default: here)")
    add_json(command)


def doctor(args: Namespace) -> int:
    """Runs the command; a machine on which the main job does not work is a failure."""
    from featurepipe.doctor import examine

    report = examine(Path(args.store or "."))
    show(args, report.as_dict(), lambda _: report.text())
    return 0 if report.healthy else 1


def add_backbones(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command,
        backbones,
        epilog="timm/NAME and package.module:factory are backbones too; featurepipe nodes BACKBONE shows one of them",
    )
    add_json(command)


def add_nodes(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, nodes)
    command.add_argument(
        "backbone", metavar="BACKBONE", help="as featurepipe backbones lists them, timm/NAME or package.module:factory"
    )
    command.add_argument(
        "--stages", action="store_true", help="only what featurepipe depth compares by default: one node for each stage"
    )
    add_json(command)


def backbones(args: Namespace) -> int:
    """Runs ``featurepipe backbones``."""
    from featurepipe.backbones import list_backbones

    show(args, [asdict(info) for info in list_backbones()], _backbones_text)
    return 0


def nodes(args: Namespace) -> int:
    """Runs ``featurepipe nodes``."""
    from featurepipe.functions import nodes as listed

    show(args, listed(args.backbone, stages=args.stages), _nodes_text)
    return 0


def _backbones_text(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            info["name"],
            _shape(info["input_size"]),
            info["parameters"],
            info["bottleneck_width"],
            info["at_hand"],
            ", ".join(info["weights"]) or "-",
        ]
        for info in found
    ]
    return table(["backbone", "input", "parameters", "bottleneck", "at hand", "weights"], rows)


def _nodes_text(found: Mapping[str, Any]) -> str:
    rows = [
        [
            named_columns(info["name"], found["bottleneck"]),
            _shape(info["shape"]),
            info["width"],
            share(info["cost"]),
            " ".join(info["blocks"]),
        ]
        for info in found["nodes"]
    ]
    title = (
        f"{found['backbone']}, input {_shape(found['input_shape'])}, bottleneck {found['bottleneck']}; "
        "cost: share of the forward up to there"
    )
    return title + "\n" + table(["node", "shape", "gap width", "cost", "ends block"], rows)


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
