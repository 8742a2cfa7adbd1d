"""Options that several commands share, each said once."""

from __future__ import annotations

import argparse
import glob
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, TypeAlias

from featurepipe.errors import BundleError, Message, Option, UsageError, missing, on_command_line, unsearchable
from featurepipe.option_groups import MACHINE, Declaration, OptionGroup, declared

Commands: TypeAlias = "argparse._SubParsersAction[ArgumentParser]"  # noqa: SLF001


def add_command(commands: Commands, name: str, summary: str) -> ArgumentParser:
    """A command without options yet; ``add_NAME`` of its module declares them."""
    command: ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    return command


def define(command: ArgumentParser, run: Callable[[Namespace], int], epilog: str | None = None) -> None:
    """Says what a command does: ``run`` gets its parsed arguments and returns the exit code."""
    command.set_defaults(run=run)
    command.epilog = epilog


class InPlaceOfBundle(argparse.Action):
    """An option that stands in place of BUNDLE, the first of two arguments without a flag: one is then enough.

    argparse cannot leave out the first of two, so the second becomes optional, and `bundle_and` puts it where it belongs.
    """

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, _flag: str | None = None) -> None:
        """Keeps the value, and makes the second argument optional."""
        setattr(namespace, self.dest, values)
        second = parser._get_positional_actions()[1]  # noqa: SLF001 - there is no public way
        second.nargs, second.required = "?", False


def bundle_and(args: Namespace, second: str) -> tuple[str | None, str]:
    """BUNDLE and the argument after it; without a bundle where `InPlaceOfBundle` was given.

    Raises:
        UsageError: A bundle is there as well; or there is none at that path.
    """
    last = getattr(args, second)
    if args.backbone is None:
        existing_bundle(args.bundle)
        return args.bundle, last
    if last is not None:
        raise UsageError(
            Message(
                f"{args.bundle} and {last}: with ",
                Option("backbone", args.backbone),
                f" give {second.upper()} alone, and no BUNDLE",
            )
        )
    return None, args.bundle


def add_json(command: ArgumentParser) -> None:
    """``--json``: what `featurepipe.cli.output.show` looks at."""
    command.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output, nothing else there"
    )


def add_quiet(command: ArgumentParser, what: str = "messages on the way") -> None:
    """``--quiet``."""
    command.add_argument("--quiet", action="store_true", help=f"no {what}")


def add_options(
    command: ArgumentParser,
    *groups: type[OptionGroup],
    leave_out: Collection[str] = (),
    types: Mapping[str, Callable[[str], Any]] = MappingProxyType({}),
    actions: Mapping[str, type[argparse.Action]] = MappingProxyType({}),
) -> None:
    """Declares the options of groups, as the groups say them.

    ``types`` are argparse's of some, where a number is too little; ``actions`` those of some that do more than keep a value.
    """
    for one in _of(groups, leave_out):
        say: dict[str, Any] = {"dest": one.name, "help": one.help.replace("%", "%%")}
        metavar = one.metavar or "|".join(one.choices)
        flag = on_command_line(Option(one.name))
        if one.default is True:
            flag, say["help"], say["action"] = f"--no-{flag[2:]}", f"do not {say['help']}", "store_false"
        elif one.default is False and one.read is None:
            say["action"] = "store_true"
        elif one.default is False:  # a value says more than yes
            say |= {"nargs": "?", "const": True, "metavar": metavar}
        elif one.repeated or (tuple in one.types and one.read is None):
            say |= {"action": "append", "metavar": metavar}
        elif one.read is None and one.types <= {int, float, NoneType}:
            kind = types.get(one.name, float if float in one.types else int)
            say |= {"type": kind, "metavar": metavar or "N", "default": one.default}
        else:
            say |= {"metavar": metavar, "default": None if one.read else one.default}
        say |= {"action": actions[one.name]} if one.name in actions else {}
        _for(one.purpose, command.add_argument(flag, **say))


def _for(purpose: str, *actions: argparse.Action) -> None:
    """Keeps what options are for, which a long help puts them under."""
    for action in actions:
        vars(action)["purpose"] = purpose


def options(args: Namespace, *groups: type[OptionGroup], leave_out: Collection[str] = ()) -> dict[str, Any]:
    """What `add_options` declared, as keyword arguments of a function.

    Raises:
        UsageError: What was written cannot be read.
    """
    return {one.name: _value(one, getattr(args, one.name)) for one in _of(groups, leave_out)}


def given(args: Namespace, *groups: type[OptionGroup], leave_out: Collection[str] = ()) -> list[str]:
    """The options of groups that are not their defaults, as the command line spells them."""
    asked = options(args, *groups, leave_out=leave_out)
    return [on_command_line(Option(one.name)) for one in _of(groups, leave_out) if asked[one.name] != one.default]


def _value(one: Declaration, given: Any) -> Any:
    return one.default if given is None else one.read_from(tuple(given) if one.repeated else given)


def _of(groups: Sequence[type[OptionGroup]], leave_out: Collection[str]) -> list[Declaration]:
    return [one for group in groups for one in declared(group).values() if one.name not in leave_out]


def add_cluster(command: ArgumentParser) -> None:
    """``--scheduler`` and ``--cluster``: where the work is done, if not here."""
    where = command.add_mutually_exclusive_group()
    scheduler = where.add_argument(
        "--scheduler", metavar="ADDRESS", help="work on the Dask cluster of this scheduler, tcp://HOST:PORT"
    )
    started = where.add_argument(
        "--cluster", metavar="local:N|FILE",
        help="work on a cluster started for this: N processes here, or what the [cluster] table of a TOML file says",
    )  # fmt: skip
    _for(MACHINE, scheduler, started)


def cluster(args: Namespace) -> dict[str, Any]:
    """What `add_cluster` declared, as keyword argument of a command; empty if the work is done here."""
    spec = args.scheduler or args.cluster
    return {"cluster": spec} if spec else {}


def add_store(command: ArgumentParser) -> None:
    """The store that a command reads."""
    command.add_argument("store", metavar="STORE", help="the folder of features that featurepipe extract --store wrote")


def counted(text: str) -> int:
    """A number from 1, as argparse's ``type``."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def existing_source(given: str | None) -> None:
    """Checks that a local source is there, before anything is loaded, or said of it; None is none that was named.

    Raises:
        UsageError: There is no such file or folder; names the nearest.
    """
    if given is None:
        return
    path = os.path.expanduser(given)  # noqa: PTH111 (Path raises where there is no such user)
    is_there = os.path.lexists(path) or unsearchable(path)  # what may not be looked at is refused where it is opened
    if not is_there and "://" not in given and not glob.has_magic(path):
        raise UsageError(f"{given}: {missing(path)}")


def existing_bundle(given: str) -> None:
    """Checks that a folder is a bundle, before anything is loaded.

    Raises:
        UsageError: There is none; names the nearest.
    """
    from featurepipe.heads.bundle.files import check_is_bundle

    try:
        check_is_bundle(Path(given))
    except BundleError as error:
        raise UsageError(error.message) from error


def existing_store(args: Namespace) -> Any:
    """The store that `add_store` names; it is not made."""
    from featurepipe.store import FeatureStore

    return FeatureStore(args.store, create=False)
