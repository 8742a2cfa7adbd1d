"""The parser of all commands, in the order in which people meet them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn, cast

from featurepipe import __version__
from featurepipe.cli import demo, depth, heads, run, stores
from featurepipe.display import displayed

if TYPE_CHECKING:
    from featurepipe.cli.options import Commands

EXIT_CODES = """exit codes:
  0  done, or nothing to do     3  done, some images rejected (fewer than --max-rejects)
  1  failure                    4  more images rejected than --max-rejects
  2  wrong usage               75  another process holds the store's lock, or runs the same job
  130, 143  stopped by Ctrl-C or SIGTERM, everything in flight committed
"""


class _Parser(argparse.ArgumentParser):
    """Shows what was typed without obeying it."""

    def error(self, message: str) -> NoReturn:
        super().error(displayed(message))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; a parsed command's ``run`` is the function that runs it."""
    parser = _Parser(
        prog="featurepipe",
        description="A frozen ConvNet as a fixed feature extractor: images in, HDF5 features out, once and never twice.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"featurepipe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    in_order = (
        demo.add_demo, demo.add_networks, stores.add_extract, stores.add, heads.add_train, heads.add_finetune,
        heads.add_evaluate, heads.add_predict, depth.add_depth, depth.add_routes, depth.add_report, run.add,
        depth.add_monitoring, demo.add_doctor,
    )  # fmt: skip
    for add in in_order:
        add(cast("Commands", commands))  # a parser of ours is one of argparse's
    return parser
