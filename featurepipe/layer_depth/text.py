"""What ``featurepipe depth`` prints, as plain text."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.display import counted, named_columns, share, size, table
from featurepipe.extraction.text import damaged_lines
from featurepipe.layer_depth.phases import DESCRIBE, HEAD_SECONDS, JOIN, MEASURE
from featurepipe.layer_depth.study import what_of
from featurepipe.option_groups import declared
from featurepipe.progress import spoken, took
from featurepipe.records import is_undisturbed
from featurepipe.reporting.blocks import BESIDES, measure_of, with_values
from featurepipe.store.options import RoleOptions

_LINE = 100


def text(found: Mapping[str, Any]) -> str:
    """The answer, the table of columns, and what it rests on; of several networks the same of each, their answer first."""
    if found.get("kind") == "networks":
        return "\n\n".join([_networks(found), *(f"{_name(one)}\n{text(one)}" for one in found["networks"])])
    found = with_values(found)
    return "\n\n".join([_answer(found), _columns(found), *_side_by_side(found), *_scores(found), _provenance(found)])


def _networks(found: Mapping[str, Any]) -> str:
    """The answer over several networks, and a row for each."""
    best, measure = found["recommended"], measure_of(found)
    between = {row["backbone"]: row for row in found["differences"]}
    of = {_name(one): one for one in found["networks"]}
    rows = []
    for one in map(with_values, found["networks"]):
        own, other = one["recommended"], between.get(_name(one), {})
        known = other.get("low_difference") is not None
        bounds = f" ({other['low_difference']:+.4f} to {other['high_difference']:+.4f})" if known else ""
        difference = f"{other['difference']:+.4f}{bounds}" if other else "the best"
        rows.append(
            [
                _name(one),
                _named(own["column"], one),
                _interval(own),
                _number(own["ms_per_image"], 2),
                own["width"],
                difference,
            ]
        )
    header = ["network", "its layer", measure.word, "ms/image", "width", "its best to the best"]
    value = best[measure.name]
    named, top = (
        _named(best[one], of[best[of_one]]) for one, of_one in (("column", "backbone"), ("best", "best_backbone"))
    )
    return (
        f"recommended of {len(rows)} networks: {named} of {best['backbone']} with {best['head']}, {measure.word} {value:.4f}; "
        f"the {measure.best} is {top} of {best['best_backbone']}, {best[f'best_{measure.name}']:.4f}\n"
        f"rule: {best['rule']}\n{table(header, rows)}"
    )


def _name(found: Mapping[str, Any]) -> str:
    return str(found["backbone"]["name"])


def plan_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe depth --dry-run`` prints."""
    if "networks" in found:
        return "\n\n".join(map(plan_text, found["networks"]))
    rows = [[column["column"], column["width"], share(column["cost"])] for column in found["columns"]]
    lines = [
        f"{found['dataset']}, {found['backbone']}: {len(rows)} columns",
        table(["column", "width", "of the forward"], rows),
    ]
    lines += [
        found["what"],
        *extraction_lines(found["extractions"]),
        f"phases after extracting: {MEASURE}, {counted(found['measurements'], 'fit')}{_lasts(found, MEASURE)}; {JOIN}, "
        f"{counted(found['side_by_side'], 'fit')} at most{_lasts(found, JOIN)}; {DESCRIBE}{_lasts(found, DESCRIBE)}",
    ]
    known = [value for value in found["seconds"].values() if value is not None]
    lines.append(
        f"in all about {spoken(sum(known))}{_besides(found)} on an idle machine, a rough figure; "
        "what the store has of it takes none"
        if known
        else f"how long they take is not estimated: only of {', '.join(HEAD_SECONDS)} it is known"
    )
    lines += [found["protocol"], "dry run: nothing was changed"]
    return "\n".join(lines)


def _besides(found: Mapping[str, Any]) -> str:
    """Which heads an estimate leaves out."""
    heads = found.get("not_estimated")
    return f", without {', '.join(heads)}, whose time is not known," if heads else ""


def _lasts(found: Mapping[str, Any], phase: str) -> str:
    seconds = found["seconds"][phase]
    return "" if seconds is None else f", about {spoken(seconds)}"


def _answer(found: Mapping[str, Any]) -> str:
    chosen, measure = found["recommended"], measure_of(found)
    best = f"the {measure.best} as well"
    if (chosen["column"], chosen["head"]) != (chosen["best"], chosen["best_head"]):
        best = f"the {measure.best} is {chosen['best']} with {chosen['best_head']}, {chosen['best_value']:.4f}"
    return (
        f"recommended: {_named(chosen['column'], found)} with {chosen['head']}, {measure.word} {_interval(chosen)}; {best}\n"
        f"{chosen['width']:,} values{_width_of_best(found)} and {size(chosen['bytes_per_image'])} an image; stopping there saves "
        f"{share(chosen['saved'])} of the forward's operations{_milliseconds(found)}\n"
        f"rule: {chosen['rule']}\n"
        + "".join(f"{line}\n" for line in (_ties(chosen), _elsewhere(chosen["elsewhere"])) if line)
        + f"use it: {_command(found)}"
    )


def _width_of_best(found: Mapping[str, Any]) -> str:
    """How many values the best column has, where the recommended one has more: fewer operations may cost storage."""
    chosen = found["recommended"]
    width = next((one["width"] for one in found["columns"] if one["column"] == chosen["best"]), chosen["width"])
    return f" ({chosen['best']}: {width:,})" if width < chosen["width"] else ""


def _named(column: str, found: Mapping[str, Any]) -> str:
    """A column, and whether it is what people ask for as the bottleneck, whose node has a name of its own."""
    return named_columns(column, (found["backbone"].get("description") or {}).get("bottleneck"))


def _ties(chosen: Mapping[str, Any]) -> str:
    """Which columns chance may have put behind the best."""
    same = chosen["not_told_apart"]
    return f"not told apart from {chosen['best']}: {', '.join(same)}" if same else ""


def _elsewhere(found: Mapping[str, Any] | None) -> str:
    """How the recommended column does on the other source, and which one is best there."""
    if found is None:
        return ""
    same = found["of_equal_id"]
    heads = "every head" + (
        f", {same:,} of them only by those that have not seen the image of equal id" if same else ""
    )
    return (
        f"on {found['dataset']}: {_interval(found)}; {found['images']:,} images, each tested by {heads}, the mean over those "
        f"heads; best there is {found['best']}, {found['best_value']:.4f}"
    )


def _command(found: Mapping[str, Any]) -> str:
    origin = found["provenance"]
    words = ["featurepipe", "train", origin["store"], "--dataset", found["dataset"]]
    named = found.get("space", {}).get("named")
    words += ["--backbone", named] if named else []
    words += ["--node", "recommended"]
    words += ["--head", found["recommended"]["head"], "--tune"]
    given = origin.get("files", {}).get("labels", {}).get("path", "FILE")
    words += ["--labels", given] if found.get("labels") else []
    asked = origin.get("options") or {}
    for name in declared(RoleOptions):
        value = asked.get(name)
        if value:
            words += [f"--{name}", value if isinstance(value, str) else ",".join(value)]
    return shlex.join([*words, "--out", "BUNDLE"])


def _columns(found: Mapping[str, Any]) -> str:
    """One line a column: what it costs, its accuracy with each head, of the control and on the other source."""
    series = list(dict.fromkeys((r["head"], r["network"], r["tested_on"]) for r in found["results"]))
    by_place = {(r["column"], r["head"], r["network"], r["tested_on"]): r for r in found["results"]}
    besides = [
        (name, head) for name in BESIDES for head in dict.fromkeys(r["head"] for r in found["results"] if name in r)
    ]
    header = [
        "column",
        "width",
        "forward",
        "ms",
        *(_series_title(*one, found["test_dataset"]) for one in series),
        *(f"{BESIDES[name]} {head}" for name, head in besides),
        "LogME",
    ]
    rows = []
    for column in found["columns"]:
        name = column["column"]
        called = _named(name, found)
        mark = " *" if name == found["recommended"]["column"] else ""
        rows.append([
            called + mark, column["width"], share(column["cost"]), _number(column["ms_per_image"], 2),
            *(_interval(by_place[name, *one]) if (name, *one) in by_place else "-" for one in series),
            *(_number(by_place[name, head, "pretrained", "source"].get(more), 3) for more, head in besides),
            _number(found["transferability"]["scores"].get(name), 3),
        ])  # fmt: skip
    how = found["settings"]
    tested = f"{how['folds']} folds" if how["folds"] else "the split test"
    title = (
        f"{found['backbone']['name']} on {found['dataset']}: "
        f"{what_of(found['images'], found['classes'], found.get('target_type', 'multiclass'))}{_groups(found)}, "
        f"{tested}, {_seeds(how['seeds'])}; {measure_of(found).word} with its 95 % interval"
    )
    return f"{title}\n{table(header, rows)}"


def _groups(found: Mapping[str, Any]) -> str:
    """How many groups the images are of, which intervals count instead of images."""
    return f" in {counted(found['groups'], 'group')}" if found.get("groups") else ""


def _series_title(head: str, network: str, tested_on: str, other: str | None) -> str:
    more = [f"{network} weights"] if network != "pretrained" else []
    more += [f"on {other}"] if tested_on != "source" else []
    return f"{head} ({', '.join(more)})" if more else head


def _seeds(seeds: Sequence[int]) -> str:
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _side_by_side(found: Mapping[str, Any]) -> Sequence[str]:
    rows = [
        [" + ".join(one["columns"]), _interval(one), f"{one['difference']:+.4f}", _range(one)]
        for one in found["concatenations"]
    ]
    if not rows:
        return []
    against = found["concatenations"][0]
    title = f"side by side, {against['head']}, against {against['against']} alone"
    return [f"{title}\n{table(['columns', measure_of(found).word, 'difference', '95 % interval'], rows)}"]


def extraction_lines(estimates: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is to be computed of each dataset, and how long that takes, as dry runs of extractions estimate it."""
    lines = []
    for estimate in estimates:
        seconds = f"about {spoken(estimate['seconds'])}" if estimate["images_per_second"] else "nothing to compute"
        needed = size(sum(estimate["bytes_per_column"].values()))
        lines.append(f"{estimate['dataset']}: {estimate['to_read']:,} images to read, {seconds}, {needed}")
    return lines


def _scores(found: Mapping[str, Any]) -> Sequence[str]:
    known = {head: rank["spearman"] for head, rank in found["transferability"]["correlations"].items()}
    told = [f"{rho:+.2f} with {head}" for head, rho in known.items() if rho is not None]
    word = measure_of(found).word
    said = [f"rank correlation of LogME, which fits no head, with {word}: {', '.join(told)}"] if told else []
    left_out = found["transferability"].get("left_out")
    return [*said, *([f"left out: {left_out}"] if left_out else [])]


def _provenance(found: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{name} {took(value)}" for name, value in found["provenance"]["seconds"].items())
    left_out = [
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in found["counts"].items()
        if count and name not in ("shifted", "shifted_of_equal_id", "shifted_of_equal_group")
    ]
    more = f"; left out: {', '.join(left_out)}" if left_out else ""
    return "\n".join([textwrap.fill(found["protocol"], _LINE), f"{seconds}{more}", *damaged_lines(found)])


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['value']:.4f}"
    return f"{found['value']:.4f} ({found['low']:.3f} to {found['high']:.3f})"


def _range(found: Mapping[str, Any]) -> str:
    return (
        "" if found["low_difference"] is None else f"{found['low_difference']:+.4f} to {found['high_difference']:+.4f}"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _milliseconds(found: Mapping[str, Any]) -> str:
    """The measured time up to the recommended column and up to the deepest one."""
    known = [column for column in found["columns"] if column["ms_per_image"] is not None]
    here = found["recommended"]["ms_per_image"]
    if here is None:
        return ""
    timing = found["timing"]
    where = f"on {timing['device']}, {timing['precision']}"
    if not is_undisturbed(timing):
        where += f", on a busy machine: {share(timing['waited'])} of the time was waiting"
    deepest = f"{known[-1]['ms_per_image']:.2f} ms up to {known[-1]['column']}"
    return f" (measured {where}: {here:.2f} ms an image, {deepest})"
