"""Reads and validates a job file: everything that is wrong with it is said at once, a line for each problem.

Messages name the keys of the job file; `keys_of` has those of functions that take options do so, too.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from featurepipe.errors import Message, Option, Spelling, UsageError, on_command_line, unknown
from featurepipe.heads.bundle.files import MANIFEST, existing_folder
from featurepipe.jobs.job import (
    LONGEST_NAME,
    BaseTable,
    DepthTable,
    FeaturesTable,
    Job,
    RoutesTable,
    is_name,
)
from featurepipe.jobs.step import QUESTIONS
from featurepipe.layer_depth.options import ComparisonOptions
from featurepipe.option_groups import OptionGroup, declared
from featurepipe.training.options import TrainOptions
from featurepipe.transfer_routes.options import RoutesOptions
from featurepipe.tuning.options import LoopOptions

_MUST_BE = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "tuple_type": "must be an array",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
}


LONGEST_SHOWN = 80
"""Characters of a value that a message repeats."""


Problem: TypeAlias = tuple[str, Any, str]
"""Key, what was given (None where the message says it), and what is wrong with it."""


def told(problems: Iterable[Problem], file: str | PathLike[str] | None) -> list[str]:
    """A line for each problem: the file, the key, what was given, and what is wrong with it."""
    begin = "" if file is None else f"{fspath(file)}: "
    return [f"{begin}{_line(problem)}" for problem in problems]


def _line(problem: Problem) -> str:
    key, given, message = problem
    return f"{key}: {message}" if given is None else f"{key} = {_shown(given)}: {message}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def problem_of(details: ErrorDetails) -> Problem:
    """What is wrong, in the words of a job file: its key, what was given, and the choices or the nearest name."""
    place, given = details["loc"], details["input"]
    kind, key = details["type"], _dotted(place)
    if kind == "extra_forbidden":
        return key, None, _unknown_key(place)
    if kind == "missing":
        return key, None, f"is missing: {_description(place)}"
    return _brackets(kind, key, given) or (key, given, _message(details))


def _message(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":  # our own errors, see job.py
        return str(context["error"])
    if kind != "literal_error":
        return _MUST_BE.get(kind, details["msg"]).format(**context)
    given, choices = details["input"], _choices(details["loc"])
    return str(unknown("value", given, choices)) if isinstance(given, str) else f"choices: {', '.join(choices)}"


def _brackets(kind: str, key: str, given: Any) -> Problem | None:
    """The two ways of TOML to open a table are easily taken for one another."""
    if kind == "tuple_type" and isinstance(given, dict):
        return key, None, f"write [[{key}]], with double brackets: there may be several"
    if kind == "model_type" and isinstance(given, list):
        return key, None, f"write [{key}], with single brackets: there is only one"
    return None


def _dotted(place: Iterable[int | str]) -> str:
    """A place as TOML writes it, such as ``train[0].head``."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _unknown_key(place: tuple[int | str, ...]) -> str:
    name, table = str(place[-1]), _table_at(place)
    keys = list(table.model_fields)
    near = difflib.get_close_matches(name, keys, n=3, cutoff=0.6)
    homes = [home for home in ("", *Job.model_fields) if name in table_called(home).model_fields]
    if homes and not near:
        where = " or ".join(f"[{home}]" if home else "the top of the file, before the first table" for home in homes)
        return f"unknown key; it belongs to {where}"
    if not keys:
        return "unknown key; this table has none"
    return f"unknown key; nearest: {', '.join(near)}" if near else f"unknown key; choices: {', '.join(keys)}"


def _description(place: tuple[int | str, ...]) -> str:
    field = _table_at(place).model_fields[str(place[-1])]
    text = (field.description or "").rstrip(".")
    return text[:1].lower() + text[1:]


def _choices(place: tuple[int | str, ...]) -> list[str]:
    annotation = _table_at(place).model_fields[next(str(step) for step in place[::-1] if isinstance(step, str))]
    return [text for text in _leaves(annotation.annotation) if isinstance(text, str)]


def _table_at(place: tuple[int | str, ...]) -> type[BaseModel]:
    return table_called(str(place[0])) if len(place) > 1 else Job


def table_called(name: str) -> type[BaseModel]:
    """The class of a table by its name in the file; the job itself for the top, and for keys that are no tables."""
    if not name:
        return Job
    kinds = [kind for kind in _leaves(Job.model_fields[name].annotation) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), _NoTable)


class _NoTable(BaseTable, frozen=True):
    """Stands for keys at the top that hold no table."""


def _leaves(annotation: Any) -> list[Any]:
    """What a type is made of: the classes in unions and tuples, the texts in literals."""
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [annotation]


RECOMMENDED = ("recommended",)
EVERY = ("all",)
"""Nodes of `[[train]]`: every column that is there. Of `[[features]]`: every block, whose names the network alone knows."""
_NETWORK = ("backbone", "weights", "seed", "precision", "dtype", "decode", "intensity")
_PREDICTIONS = (".parquet", ".csv", ".jsonl")
_EXPORTS = (".parquet", ".h5", ".npz", "")


def _waits(job: Job) -> Iterator[Problem]:
    source = job.source
    if source.first_wait > source.longest_wait:
        yield (
            "source.first_wait",
            None,
            f"{source.first_wait:g} s is longer than longest_wait, {source.longest_wait:g} s",
        )


def _same_network_twice(job: Job) -> Iterator[Problem]:
    seen: dict[tuple[Any, ...], int] = {}
    for place, table in enumerate(job.features):
        network = tuple(getattr(table, name) for name in _NETWORK)
        first = seen.setdefault(network, place)
        if first != place:
            message = f"the same network as features[{first}]; name all nodes there, and images pass through it once"
            yield f"features[{place}].backbone", table.backbone, message


def _decoding(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.features):
        if table.decode == "gpu" and job.machine.device == "cpu":
            yield f"features[{place}].decode", "gpu", 'needs a CUDA device, and machine.device is "cpu"'


def _same_target_twice(job: Job) -> Iterator[Problem]:
    seen: dict[Path, str] = {}
    for key, target in job.targets:
        first = seen.setdefault(target, key)
        if first != key:
            yield key, target, f"{first} is written to the same place; one would replace the other"


def _listed_by_the_job(job: Job) -> Iterator[Problem]:
    for key, target in job.targets:
        if job.forget and target == job.forget.ids:
            yield "forget.ids", target, f"{key} writes it: whom to forget is for people to say; name a file of theirs"


def _bundle_places(job: Job) -> Iterator[Problem]:
    """A bundle among the images would be listed as some; one in the store is nobody's there, and replaces what is."""
    folders = {"store": job.store}
    if "://" not in job.source.path:
        folders["source.path"] = Path(job.source.path)
    for place, out in job.bundles.items():
        for key, folder in folders.items():
            if out.is_relative_to(folder) or folder.is_relative_to(out):
                yield place, out, f"a bundle has a folder of its own, apart from {key}, {folder}"


def _suffixes(job: Job) -> Iterator[Problem]:
    if job.report and job.report.to.suffix.lower() not in (".html", ".htm"):
        yield "report.to", job.report.to, "the page is an .html file"
    for name, table in _comparisons(job):
        if table.report and table.report.suffix.lower() not in (".html", ".htm"):
            yield f"{name}.report", table.report, "the page is an .html file"
    if job.metrics and job.metrics.prometheus.suffix != ".prom":
        yield "metrics.prometheus", job.metrics.prometheus, "Prometheus' node exporter reads files named *.prom only"


def _question_columns(job: Job) -> Iterator[Problem]:
    for key, table in job.questions.items():
        if table.node != "bottleneck" or _with_columns(job, ["bottleneck"]):
            yield from _columns_of_one_network(job, key, [table.node], table.backbone, key="node")
        if Path(table.to).suffix.lower() not in (*_PREDICTIONS, ".html"):
            yield f"{key}.to", table.to, f"the suffix must be one of {', '.join((*_PREDICTIONS, '.html'))}"


def _predictions(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.predict):
        if Path(table.to).suffix.lower() not in _PREDICTIONS:
            yield f"predict[{place}].to", table.to, f"the suffix must be one of {', '.join(_PREDICTIONS)}"
        if table.images == "new" and "{date" not in table.to and "{run" not in table.to:
            message = 'each night would replace the last one\'s predictions; put {date} or {run} in, or images = "all"'
            yield f"predict[{place}].to", table.to, message


def _exports(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.export):
        if Path(table.to).suffix.lower() not in _EXPORTS:
            message = f"the suffix must be one of {', '.join(filter(None, _EXPORTS))}, or there is none: a folder"
            yield f"export[{place}].to", table.to, message
        if table.images == "new" and "{date" not in table.to and "{run" not in table.to:
            message = 'each night would replace what the last one handed on; put {date} or {run} in, or images = "all"'
            yield f"export[{place}].to", table.to, message


def _bundles(job: Job) -> Iterator[Problem]:
    trained = set(job.bundles.values())
    wanted = [(f"predict[{place}].bundle", table.bundle) for place, table in enumerate(job.predict)]
    if job.drift and job.drift.bundle:
        wanted.append(("drift.bundle", job.drift.bundle))
    lacking = {table.out for table in job.finetune if not table.store_features}
    for key, bundle in wanted:
        if bundle in lacking:
            yield key, bundle, "needs the tuned features: store_features = true in its [[finetune]]"
        elif bundle not in trained and not (existing_folder(bundle) / MANIFEST).is_file():
            outs = ", ".join(map(str, sorted(trained))) or "nothing"
            yield key, bundle, f"no bundle is there, and no [[train]] or [[finetune]] makes it (they make {outs})"


def _thresholds(job: Job) -> Iterator[Problem]:
    if job.drift and job.drift.fail is not None and job.drift.fail > job.drift.warn:
        yield "drift.fail", job.drift.fail, f"is above drift.warn, {job.drift.warn:g}: it would fail before it warns"


def _drift_columns(job: Job) -> Iterator[Problem]:
    if job.drift:
        for column in job.drift.columns or ():
            if not _with_columns(job, [column]):
                yield "drift.columns", column, _not_computed(job, column)


def _train_columns(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.train):
        if table.nodes not in (RECOMMENDED, EVERY):
            yield from _columns_of_one_network(job, f"train[{place}]", table.nodes, table.backbone)
        elif table.backbone is not None:
            yield from _known_network(job, f"train[{place}]", table.backbone)


def _tuned_columns(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.finetune):
        if table.from_node is None:
            yield (
                f"finetune[{place}].from_node",
                None,
                'is missing: a node whose activations [[features]] has, as "NODE:map", or "images"',
            )
            continue
        if table.is_from_images:
            yield from _columns_of_one_network(
                job, f"finetune[{place}]", ["bottleneck"], table.backbone, key="from_node"
            )
            continue
        columns = []
        for cut in table.cuts:
            either = [f"{cut}:{pooling}" for pooling in ("map", "flatten")]
            columns += ([column for column in either if _with_columns(job, [column])] or either)[:1]
        yield from _columns_of_one_network(job, f"finetune[{place}]", columns, table.backbone, key="from_node")


def _settings_together(job: Job) -> Iterator[Problem]:
    """What options of one table say of each other, such as two kinds of target."""
    tables: list[tuple[str, BaseTable, type[OptionGroup]]] = [
        (f"train[{place}]", table, TrainOptions) for place, table in enumerate(job.train)
    ]
    tables += [(f"finetune[{place}]", table, LoopOptions) for place, table in enumerate(job.finetune)]
    tables += [("depth", job.depth, ComparisonOptions)] if job.depth else []
    tables += [("routes", job.routes, RoutesOptions)] if job.routes else []
    for key, table, group in tables:
        try:
            group(**{name: getattr(table, name) for name in declared(group) if hasattr(table, name)})
        except UsageError as error:
            yield key, None, "\n".join(error.spelled(_key_alone))


def _key_alone(option: Option) -> str:
    return option.name if option.value is None else f"{option.name} = {json.dumps(option.value, default=str)}"


def _comparisons(job: Job) -> Iterator[tuple[str, DepthTable | RoutesTable]]:
    """The tables that compare what the store has of one network, by name."""
    if job.depth:
        yield "depth", job.depth
    if job.routes:
        yield "routes", job.routes


def _compared_network(job: Job) -> Iterator[Problem]:
    for name, table in _comparisons(job):
        if table.backbone is not None:
            yield from _known_network(job, name, table.backbone)
        elif len(job.features) > 1:
            yield f"{name}.backbone", None, f"is missing: which network? choices: {_networks(job.features)}"


def _routes_columns(job: Job) -> Iterator[Problem]:
    """Every route reads the bottleneck."""
    if job.routes:
        yield from _columns_of_one_network(job, "routes", ["bottleneck"], job.routes.backbone, key="backbone")


def _depth_columns(job: Job) -> Iterator[Problem]:
    if not job.depth:
        return
    named = job.depth.backbone
    compared = [features for features in job.features if named is None or _means(named, features)]
    if len(compared) == 1 and len(set(map(_column, compared[0].nodes))) == 1 and compared[0].nodes != EVERY:
        place = job.features.index(compared[0])
        message = "[depth] compares two columns or more of a network; name more nodes, or leave [depth] out"
        yield f"features[{place}].nodes", list(compared[0].nodes), message


def _known_network(job: Job, table: str, backbone: str) -> Iterator[Problem]:
    if not any(_means(backbone, features) for features in job.features):
        names = [features.backbone for features in job.features]
        yield f"{table}.backbone", backbone, str(unknown("network", backbone, names, where="[[features]]"))


def _columns_of_one_network(
    job: Job, table: str, nodes: Sequence[str], backbone: str | None, *, key: str = "nodes"
) -> Iterator[Problem]:
    for node in nodes:
        if not _with_columns(job, [node]):
            yield f"{table}.{key}", node, _not_computed(job, node)
            return
    holders = _with_columns(job, nodes)
    if not holders:
        yield f"{table}.{key}", list(nodes), "no one network of [[features]] has all of these columns"
    elif backbone is None and len(holders) > 1:
        yield f"{table}.backbone", None, f"is missing: which network? choices: {_networks(holders)}"
    elif backbone is not None:
        yield from _known_network(job, table, backbone)
        yield from _columns_of(job, f"{table}.{key}", nodes, backbone)


def _columns_of(job: Job, key: str, nodes: Sequence[str], backbone: str) -> Iterator[Problem]:
    """Whether the network that a table names has its columns, and is one."""
    own = [features for features in job.features if _means(backbone, features)]
    holders = [features for features in _with_columns(job, nodes) if features in own]
    if own and not holders:
        choices = ", ".join(dict.fromkeys(node for features in own for node in features.nodes))
        yield key, list(nodes), f"[[features]] has not all of these of {backbone}; choices: {choices}"
    if len(holders) > 1 and backbone == holders[0].backbone:
        message = (
            "several [[features]] are of this network; name the feature space, as `featurepipe info STORE` lists them"
        )
        yield f"{key.rpartition('.')[0]}.backbone", backbone, message


def _with_columns(job: Job, columns: Sequence[str]) -> list[FeaturesTable]:
    wanted = set(map(_column, columns))
    return [
        table for table in job.features if EVERY[0] in table.nodes or wanted <= set(map(_column, table.nodes))
    ]  # of all blocks the store will tell, in the night


def _column(text: str) -> str:
    """A node without a pooling is averaged: ``layer3`` and ``layer3:gap`` are one column."""
    return text if ":" in text else f"{text}:gap"


def _not_computed(job: Job, column: str) -> str:
    nodes = dict.fromkeys(node for table in job.features for node in table.nodes)
    return f"{unknown('column', column, nodes, where='[[features]]')}"


def _means(backbone: str, table: FeaturesTable) -> bool:
    """Whether a network's name, or a feature space's, which begins with it and may be cut short, is this table's."""
    return backbone == table.backbone or backbone.startswith(f"{table.backbone.replace('/', '-')}-")


def _networks(tables: Sequence[FeaturesTable]) -> str:
    return ", ".join(dict.fromkeys(table.backbone for table in tables))


_WRITING = QUESTIONS | {"train", "finetune", "predict", "export", "depth", "routes", "report", "metrics"}
CHECKS: tuple[tuple[Callable[[Job], Iterator[Problem]], frozenset[str]], ...] = (
    (_waits, frozenset({"source"})),
    (_same_network_twice, frozenset({"features"})),
    (_decoding, frozenset({"features", "machine"})),
    (_train_columns, frozenset({"features", "train"})),
    (_tuned_columns, frozenset({"features", "finetune"})),
    (_settings_together, frozenset({"train", "finetune", "depth", "routes"})),
    (_question_columns, frozenset({"features", *QUESTIONS})),
    (_drift_columns, frozenset({"features", "drift"})),
    (_compared_network, frozenset({"features", "depth", "routes"})),
    (_routes_columns, frozenset({"features", "routes"})),
    (_depth_columns, frozenset({"features", "depth"})),
    (_bundles, frozenset({"train", "finetune", "predict", "drift"})),
    (_thresholds, frozenset({"drift"})),
    (_predictions, frozenset({"predict"})),
    (_exports, frozenset({"export"})),
    (_suffixes, frozenset({"report", "depth", "routes", "metrics"})),
    (_bundle_places, frozenset({"store", "source", "train", "finetune"})),
    (_same_target_twice, _WRITING),
    (_listed_by_the_job, _WRITING | {"forget"}),
)
"""Each check, and the tables it looks at: it is left out where one of these is wrong in itself."""


_TABLES: Mapping[str, tuple[str, ...]] = {
    "list": ("source", "limits", ""),
    "labels": ("labels", "source"),
    "extract": ("features", "machine", "limits", "source", ""),
}
"""The tables that a step looks at; those of any other step bear its name."""


def keys_of(step: str) -> Spelling:
    """How a job file writes the options of a step; those that have no key there stay as on the command line.

    Args:
        step: Which step of a job a message is about.

    Example:
        >>> spelling = keys_of("extract")
        >>> spelling(Option("max_rejects", "1%")), spelling(Option("trust_code", value=True))
        ('[limits] max_rejects = "1%"', '--trust-code')
    """
    tables = [table for table in _TABLES.get(step, (step,)) if not table or table in Job.model_fields]

    def key(option: Option) -> str:
        table = next((table for table in tables if option.name in table_called(table).model_fields), None)
        if table is None:
            return on_command_line(option)
        value = "" if option.value is None else f" = {json.dumps(option.value, default=str)}"
        return f"{_heading(table)}{option.name}{value}"

    return key


def result_in_keys(result: Mapping[str, Any], step: str) -> dict[str, Any]:
    """A step's result, of which the messages name the keys of the job file."""
    spelling = keys_of(step)

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [told(one) for one in value]
        return value.spelled(spelling) if isinstance(value, Message) else value

    return {name: told(value) for name, value in result.items()}


def _heading(table: str) -> str:
    if not table:
        return ""
    several = get_origin(Job.model_fields[table].annotation) is tuple
    return f"[[{table}]] " if several else f"[{table}] "


_STAND_INS: Mapping[str, Any] = MappingProxyType(
    {"name": "job", "store": "store", "source": {"path": "images"}, "features": [{}]}
)


def read_job(path: str | PathLike[str]) -> Job:
    """Reads a job file; relative paths in it are seen from its folder.

    Names of networks and nodes are not looked up: that takes seconds, see `preflight.check_networks`.

    Raises:
        UsageError: It cannot be read, or something in it is wrong. The message has a line for each problem: file, key, what
            was given, and the choices or the nearest name.
    """
    file = Path(path).absolute()
    parsed = _parsed(file)
    given = {"name": file.stem, **parsed}
    context = {"folder": file.parent}
    problems: list[Problem] = []
    try:
        job = Job.model_validate(given, context=context)
    except ValidationError as error:
        found = list(_one_per_key(error))
        problems = [problem_of(details) for details in found]
        if "name" not in parsed and not is_name(file.stem):
            problems = [problem if problem[0] != "name" else _unnamed(file) for problem in problems]
        wrong = {str(details["loc"][0]) for details in found}
        # What the other tables say of each other can still be checked.
        sound = {name: value for name, value in given.items() if name not in wrong}
        job = Job.model_validate({**_STAND_INS, **sound}, context=context)
    else:
        wrong = set()
    problems += [problem for check, tables in CHECKS if wrong.isdisjoint(tables) for problem in check(job)]
    if problems:
        raise UsageError(*told(problems, path))
    return job.read_from(Path(path))


def _unnamed(file: Path) -> Problem:
    name = re.sub("[^A-Za-z0-9._-]+", "-", file.stem)[:LONGEST_NAME].strip("-.") or "nightly"
    message = (
        f'is missing, and the file\'s own, {file.stem!r}, cannot be one: write name = "{name}" at the top of the file'
    )
    return "name", None, message


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8, as TOML must be: {error}") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists nested as deeply
        raise UsageError(f"{file}: not TOML: {error}") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}; name a job file, such as nightly.toml") from error


def _one_per_key(error: ValidationError) -> Iterable[ErrorDetails]:
    found: dict[tuple[int | str, ...], ErrorDetails] = {}
    for details in error.errors(include_url=False):
        found.setdefault(details["loc"], details)
    return found.values()
