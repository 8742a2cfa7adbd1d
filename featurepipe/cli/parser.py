"""The parser of all commands, grouped by the job that people do with them; the module of a command is imported for it alone."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, cast

from featurepipe import __version__
from featurepipe.cli.options import add_command
from featurepipe.display import displayed
from featurepipe.errors import nearest, unknown
from featurepipe.option_groups import PURPOSES

if TYPE_CHECKING:
    from featurepipe.cli.options import Commands

COMMANDS = {
    "first steps": {
        "demo": ("demo", "the main job on 2,000 bundled images, offline, ending in a picture"),
        "doctor": ("demo", "check versions, devices, bf16, threads, disk, and which weights are at hand"),
        "backbones": ("demo", "list the networks: input size, parameters, bottleneck width, weights at hand"),
        "nodes": ("demo", "list a network's nodes in execution order: shape, width after gap, share of the cost"),
    },
    "features": {
        "extract": ("extract", "compute the features that the store lacks for the images of a source"),
        "export": ("stores", "write one column's features, of all images or what is new, to a file or a folder of Parquet files"),
        "duplicates": ("depth", "copies, near copies, and those on both sides of a split"),
        "similar": ("curation", "the images of a store that look most like some image, of the store or new"),
        "labels": ("curation", "labels that look wrong: ranked, with what each should perhaps be"),
        "outliers": ("curation", "images that lie apart: far from all others, from their class, or from what was there before"),
        "select": ("curation", "which images to label next, given what is labelled"),
    },
    "heads": {
        "train": ("heads", "fit a head on cached features and keep it in a bundle that predicts on images"),
        "finetune": ("heads", "tune the layers above a node, or all layers, to your images"),
        "evaluate": ("heads", "metrics of a bundle on cached features, each with its confidence interval; leaks between splits"),
        "predict": ("heads", "label the images of a source with a bundle: id, label, one probability per class"),
    },
    "layers and routes": {
        "depth": ("depth", "which layer of a network transfers best: every stage measured alike, with intervals"),
        "routes": ("depth", "use a network as it is, freeze it, tune it, or start from scratch: every route measured alike at "
                   "several numbers of images"),
        "report": ("depth", "one HTML page of what a comparison of layers, or the test of a bundle, found; or of the last runs"),
    },
    "nights": {
        "run": ("run", "one night of a job: what is new, then heads, predictions, drift, upkeep, report"),
        "runs": ("run", "the last runs of a store: when, of which job, how they ended; or one run, or its rejects"),
        "drift": ("depth", "whether the new images are like those of an earlier snapshot"),
    },
    "the store": {
        "info": ("stores", "what a store holds: spaces, columns, datasets, runs; or what a bundle is"),
        "verify": ("stores", "recompute every checksum; damaged parts are named and set aside, and extract computes them anew"),
        "compact": ("stores", "merge small parts and drop duplicate rows"),
        "gc": ("stores", "remove what no snapshot needs, and what killed runs left behind"),
        "forget": ("stores", "remove images for good: rows, names and keys, in earlier snapshots too; then read it back"),
    },
}  # fmt: skip
"""Of each job its commands, in the order of the help: name, module of `featurepipe.cli` that has ``add_NAME``, what it does."""

VERBOSE = ("-v", "--verbose")

EXIT_CODES = """exit codes:
  0  done, or nothing to do     3  done, some images rejected (fewer than --max-rejects)
  1  failure                    4  more images rejected than --max-rejects
  2  wrong usage               75  another process holds the store's lock, or runs the same job
  130, 143  stopped by Ctrl-C or SIGTERM, everything in flight committed
"""


MANY = 20
"""Options from which on a command's help puts them under what they are for."""


def sections(parser: argparse.ArgumentParser) -> list[tuple[str, list[argparse.Action]]]:
    """The parts of a command's help: arguments, options, and of many options those that commands share, by what they are for."""
    arguments, own = (group._group_actions for group in parser._action_groups[:2])  # noqa: SLF001
    told: dict[str, list[argparse.Action]] = {}
    if len(own) > MANY:
        told = {purpose: [one for one in own if vars(one).get("purpose") == purpose] for purpose in PURPOSES}
        own = [one for one in own if not vars(one).get("purpose")]
    return [(name, some) for name, some in {"positional arguments": arguments, "options": own, **told}.items() if some]


class _Parser(argparse.ArgumentParser):
    """Takes options by their whole names, says what is wrong on one line with the nearest, and shows what was typed unobeyed."""

    _words: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self) -> str:
        """The help, in the parts that `sections` gives."""
        if not self.get_default("run"):  # the list of commands
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in sections(self):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what a command does not know itself, so that its options are shown, not the list of commands."""
        self._words = list(args or ())
        found, others = super().parse_known_args(args, namespace)
        others = self._listed_last(found, others)
        if others and self.get_default("run"):
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found, others

    def _listed_last(self, found: Any, others: list[str]) -> list[str]:
        """Adds words after options to the list that ends the arguments: argparse takes none for it where it meets the first."""
        lists = [action.dest for action in self._actions if not action.option_strings and action.nargs == "*"]
        if not lists or any(word.startswith("-") for word in others):
            return others
        setattr(found, lists[-1], [*(getattr(found, lists[-1]) or ()), *others])
        return []

    def error(self, message: str) -> NoReturn:
        see = f". See: {self.prog} --help"
        whole = message.removesuffix(see) + self._hint() + see
        self.exit(2, f"{self.prog}: error: {displayed(whole)}\n")

    def _hint(self) -> str:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        words = self._words[: self._words.index("--")] if "--" in self._words else self._words
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        near = {flag: _nearest_options(flag, known) for flag in flags if flag not in known}
        return "".join(f"; nearest to {flag}: {', '.join(names)}" for flag, names in near.items() if names)


def _nearest_options(flag: str, known: Sequence[str]) -> list[str]:
    """The option that looks most like a flag; of one that was cut short, those that begin so, three at most."""
    begun = [name for name in known if name.startswith(flag)]
    return begun[:3] or [f"--{name}" for name in nearest(flag[2:], [name[2:] for name in known])[:1]]


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of every command; a parsed command's ``run`` is the function that runs it.

    Args:
        command: The only one whose options are declared, so that no other's module is imported; by default all have them.
    """
    parser = _Parser(
        prog="featurepipe",
        usage="%(prog)s [-h] [--version] [-v] COMMAND ...",
        description="A frozen ConvNet as a fixed feature extractor: images in, HDF5 features out, once and never twice.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"featurepipe {__version__}")
    parser.add_argument(
        *VERBOSE, action="store_true", help="say why: what was looked up, decided and passed over; anywhere on the line"
    )
    commands = parser.add_subparsers(
        title="commands", description=_overview(), metavar="COMMAND", prog=parser.prog, help=argparse.SUPPRESS
    )
    for name, (module, summary) in _every().items():
        one = add_command(cast("Commands", commands), name, summary)  # a parser of ours is one of argparse's
        if command in (None, name):
            getattr(import_module(f"featurepipe.cli.{module}"), f"add_{name}")(one)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace | None:
    """The arguments of the command that words ask for; prints the help and returns None if they ask for none.

    Raises:
        SystemExit: With code 2, they are wrong; with 0, they ask for help or the version.
    """
    is_verbose = any(word in VERBOSE for word in words)
    words = [word for word in words if word not in VERBOSE]
    command = next((word for word in words if not word.startswith("-")), "")
    parser = build_parser(command)
    if command and command == words[0] and command not in _every():
        parser.error(str(unknown("command", command, _every(), see="featurepipe --help")))
    args = parser.parse_args(words)
    if hasattr(args, "run"):
        args.verbose = is_verbose
        return args
    parser.print_help()
    return None


def _every() -> dict[str, tuple[str, str]]:
    return {name: told for of_job in COMMANDS.values() for name, told in of_job.items()}


def _overview() -> str:
    """The commands under the job that each is for, as the help shows them."""
    width = max(map(len, _every())) + 4
    lines: list[str] = []
    for job, of_job in COMMANDS.items():
        lines.append(f"{job}:")
        for name, (_, summary) in of_job.items():
            told = textwrap.wrap(summary, max(shutil.get_terminal_size().columns - width - 4, 20))
            lines += [f"{f'  {name}':{width}}{told[0]}", *(" " * width + more for more in told[1:])]
    return "\n".join(lines)


def offer_values(parser: argparse.ArgumentParser) -> None:
    """Gives options the values that a shell offers after them: the words that their help names, networks, heads.

    Options that take a file keep what the shell offers, which is files.
    """
    for action in parser._actions:  # noqa: SLF001  # argparse has no public list of them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                offer_values(command)
        elif action.option_strings and action.nargs != 0:
            named = str(action.metavar or "").split("|")
            words = [word.partition("[")[0] for word in named]
            literal = [word for word in words if re.fullmatch(r"[a-z][a-z0-9,-]*", word)]
            offered = _OFFERED.get(action.option_strings[-1]) or (partial(_given, literal) if literal else None)
            if offered and not {"FILE", "DIR"} & set(words):
                action.completer = offered  # type: ignore[attr-defined]  # argcomplete calls it


def _given(words: list[str], **_: Any) -> list[str]:
    return words


def _networks(**_: Any) -> list[str]:
    from featurepipe.backbones import list_backbones

    return [network.name for network in list_backbones()]


def _heads(**_: Any) -> list[str]:
    from featurepipe.heads.families import HEADS

    return list(HEADS)


_OFFERED: dict[str, Callable[..., list[str]]] = {"--backbone": _networks, "--heads": _heads}
