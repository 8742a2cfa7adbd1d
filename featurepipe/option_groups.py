"""Options declared once: groups of them as frozen dataclasses, from which command line, job files and records are made.

A group is a dataclass of `option` fields that says name, type, default, help text and check of each option. The command line
adds its arguments (`featurepipe.cli.options.add_options`), a table of a job file inherits its fields
(`featurepipe.jobs.job.BaseTable`), functions pack their keyword arguments into one, and a run record keeps what was asked for
(`as_asked`). Larger groups inherit from smaller ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, ClassVar, Self, Union, cast, get_args, get_origin, get_type_hints

from featurepipe.display import bytes_of
from featurepipe.errors import Message, Option, UsageError

_KEY = "declaration"
LEARNING, ROWS, NETWORK, READING, MACHINE, LIMITS, ANSWER = PURPOSES = (
    "what is learned, and how",
    "which images, features and labels",
    "the network, and what is kept of it",
    "how a source is read",
    "where it is computed",
    "limits, and images that cannot be used",
    "the answer",
)
"""What options that several commands share are for, in the order of a long help."""
Check = Callable[[Any], str | None]
"""Says what a value must be, such as ``must be at least 1``; None if it is right. Or raises `UsageError` in words of its own."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is said of an option where it is declared.

    Attributes:
        help: What it means, in lower case and without a full stop.
        choices: All values that it may have; empty where its type and ``check`` say which.
        metavar: What its values look like on the command line; by default the choices, or ``N`` for a number.
        check: What its values must be, besides of their type.
        read: Makes the value of what people write, as ``"1h30m"`` is a number of seconds; None if that is the value.
        repeated: Whether the command line takes it several times, and ``read`` gets a tuple of texts.
        recorded: What a record keeps of a value, where that is not the value; None if it is.
        is_path: Whether a text is a path, which a job file gives relative to its own folder; None if none is.
        name: Its name in Python.
        default: Its default.
        types: Of its values; ``tuple`` where it may be repeated.
        purpose: What it is for, of `PURPOSES`; empty for an option of a command's own.
    """

    help: str
    choices: tuple[str, ...] = ()
    metavar: str = ""
    check: Check | None = None
    read: Callable[[Any], Any] | None = None
    repeated: bool = False
    recorded: Callable[[Any], Any] | None = None
    is_path: Callable[[str], bool] | None = None
    name: str = ""
    default: Any = None
    types: frozenset[type] = frozenset()
    purpose: str = ""

    def read_from(self, given: Any) -> Any:
        """The value that people mean by what they write."""
        return given if given is None or self.read is None else self.read(given)

    def told(self, value: Any) -> Any:
        """What a record keeps of a value."""
        return value if value is None or self.recorded is None else self.recorded(value)

    def wrong(self, value: Any) -> str | None:
        """What a value must be; None if it is right."""
        return None if self.check is None or self._is_left_out(value) else self.check(value)

    def _is_left_out(self, value: Any) -> bool:
        return value is None and NoneType in self.types

    def checked(self, value: Any) -> None:
        """Checks a value.

        Raises:
            UsageError: It is wrong; names the option, the value and the choices.
        """
        if self.choices and value not in self.choices and not self._is_left_out(value):
            raise UsageError(f"unknown {self.name} {value!r}; choices: {', '.join(self.choices)}", option=self.name)
        if said := self.wrong(value):
            told = (Option(self.name, value),) if isinstance(value, tuple) else (Option(self.name), f" {value!r}")
            raise UsageError(Message(*told, f" {said}"))


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 - as argparse calls it
    """Declares an option as a field of a group; ``more`` are attributes of `Declaration`."""
    return field(default=default, metadata={_KEY: Declaration(help=help, default=default, **more)})


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Options that belong together; a group of one's own is a frozen dataclass, too.

    Attributes:
        purpose: What the options are for that this group declares itself.

    Raises:
        UsageError: One of them is wrong.
    """

    purpose: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, one in declared(type(self)).items():
            one.checked(getattr(self, name))

    def arguments(self) -> dict[str, Any]:
        """All options by name, as keyword arguments of a function."""
        return {name: getattr(self, name) for name in declared(type(self))}

    @classmethod
    def of(cls, larger: OptionGroup) -> Self:
        """The options of this group out of a larger one."""
        return cls(**{name: getattr(larger, name) for name in declared(cls)})


def declared(group: type) -> Mapping[str, Declaration]:
    """The options of a group, or of a job's table that inherits from one, by name; none of any other class."""
    return _declared(cast("Hashable", group)) if issubclass(group, OptionGroup) else MappingProxyType({})


@cache
def _declared(group: Any) -> Mapping[str, Declaration]:
    types = get_type_hints(group)
    # A table of a job is no dataclass itself, so it has the fields of each group that it inherits from.
    groups = [base for base in reversed(group.__mro__) if is_dataclass(base)]
    ours = {one.name: one for base in groups for one in fields(base) if _KEY in one.metadata}.values()
    purposes: dict[str, str] = {}
    for base in groups:  # the first that has an option declares it, even where a larger group says it in other words
        for one in fields(base):
            purposes.setdefault(one.name, vars(base).get("purpose", ""))
    return MappingProxyType(
        {
            one.name: replace(
                one.metadata[_KEY], name=one.name, types=_types_in(types[one.name]), purpose=purposes[one.name]
            )
            for one in ours
        }
    )


def _types_in(hint: Any) -> frozenset[type]:
    """The types in a union."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return frozenset(get_origin(part) or part for part in parts)


def as_asked(group: OptionGroup) -> dict[str, Any]:
    """The values of a group's options as JSON has them, by name, for a record."""
    return {name: _plain(one.told(getattr(group, name))) for name, one in declared(type(group)).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list | AbstractSet):
        return [_plain(one) for one in (sorted(value) if isinstance(value, AbstractSet) else value)]
    if is_number(value):
        return int(value)  # NumPy's, too
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def file_or_kind(given: Any) -> str:
    """What a record says of what may be a file or an object of Python, which may be as long as the dataset."""
    return os.fspath(given) if isinstance(given, str | os.PathLike) else f"given as a {type(given).__name__}"


def by_commas(text: str) -> tuple[str, ...]:
    """Names separated by commas.

    Example:
        >>> by_commas("gap, avg2x2,")
        ('gap', 'avg2x2')
    """
    return tuple(name.strip() for name in text.split(",") if name.strip())


def is_number(value: Any, kind: Any = Integral) -> bool:
    """Whether a value is a number of a kind, NumPy's too, and not a bool."""
    return isinstance(value, kind) and not isinstance(value, bool)


def at_least(least: int, most: int | None = None) -> Check:
    """The check of a number.

    Example:
        >>> at_least(1, 1024)(0), at_least(1, 1024)(2000), at_least(1)(5)
        ('must be at least 1', 'must be at most 1024', None)
    """

    def check(value: Any) -> str | None:
        if not is_number(value):
            return "must be a whole number"
        if value < least:
            return f"must be at least {least}"
        return f"must be at most {most}" if most is not None and value > most else None

    return check


def is_bytes(value: Any, kind: Any = Real) -> bool:
    """Whether a value is an amount of bytes: a number of a kind, or text such as ``20GB``."""
    try:
        return (isinstance(value, str) or is_number(value, kind)) and bytes_of(value) > 0
    except (UsageError, OverflowError):  # infinity, which TOML can say, is no number of bytes
        return False


def is_memory(value: Any) -> str | None:
    """The check of an amount of memory."""
    right = is_bytes(value, (int, float))
    return None if right else "is no amount of memory; give bytes or text such as '512MB', '2GB', '1.5GiB'"


def is_text(value: Any) -> str | None:
    """The check of a text."""
    return None if isinstance(value, str) else "must be text"


def not_empty(value: Any) -> str | None:
    """The check of a text or a tuple that must not be empty."""
    return "must not be empty" if value in ("", ()) else None
