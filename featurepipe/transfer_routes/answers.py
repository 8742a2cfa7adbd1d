"""From cells to answers: what each route reaches at each size, the recommended one, and at which size another would be."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from featurepipe.display import counted, share, table
from featurepipe.display import size as size_of
from featurepipe.heads.statistics.comparison import AccuracyEstimate, cheapest_within_one_se, within_one_se
from featurepipe.layer_depth import answers as of_layers
from featurepipe.layer_depth.answers import SHIFTED, SOURCE
from featurepipe.layer_depth.text import extraction_lines
from featurepipe.progress import spoken, took
from featurepipe.reporting.blocks import measure_of, with_values
from featurepipe.transfer_routes.measure import OVER_BUDGET, MeasuredRoute, Untried
from featurepipe.transfer_routes.options import ALL, AS_IT_IS, ROUTES, SCRATCH, TAIL
from featurepipe.transfer_routes.study import DrawSize, RoutesStudy

FARTHEST = 10.0
"""How many times the largest measured size a change is looked for at."""
_LINE = 100
_BEST = {"accuracy": "most accurate", "map": "one with the best mAP", "r2": "one with the best R2"}


SAME_SECONDS, SAME_SHARE = 1.0, 0.1
"""Times that differ by less than a second, or by less than a tenth, are equal: a busy machine's clock tells no more."""


def no_dearer(seconds: float) -> float:
    """The longest time that is equal to one, as far as a clock tells.

    Example:
        >>> no_dearer(0.2), no_dearer(60.0)
        (1.2, 66.0)
    """
    return max(seconds + SAME_SECONDS, seconds * (1 + SAME_SHARE))


@dataclass(frozen=True)
class RouteCosts:
    """What a route takes, apart from the images that are only tested.

    Attributes:
        features: seconds of the forwards of the images that train, up to the node that the route reads.
        fit: seconds of choosing, fitting or tuning, and of scoring the test images; the mean over draws.
        memory: bytes by which the process grew at most; None where no draw tells.
    """

    features: float
    fit: float
    memory: float | None

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.features + self.fit


def compared(
    study: RoutesStudy, measured: Sequence[MeasuredRoute], milliseconds: Mapping[str, float], bottleneck: str
) -> dict[str, Any]:
    """What was found, as JSON values: ``results``, ``differences`` and ``recommended``; arguments as those of `costs_of`."""
    costs = {(one.route.name, one.size): costs_of(study, one, milliseconds, bottleneck) for one in measured}
    between = differences(study, measured)
    return {
        "results": results(study, measured, costs),
        "differences": between,
        "recommended": recommended(study, measured, costs, between),
    }


def costs_of(
    study: RoutesStudy, found: MeasuredRoute, milliseconds: Mapping[str, float], bottleneck: str
) -> RouteCosts:
    """What a route took at a size.

    Args:
        study: what is compared on what.
        found: the route's cells.
        milliseconds: of the forward for one image up to each node.
        bottleneck: the column of the bottleneck.
    """
    nodes = [column.partition(":")[0] for column in (*found.route.columns, bottleneck)]
    if found.route.kind not in (TAIL, AS_IT_IS):  # the last node that it reads
        nodes = nodes[:-1]
    ms = max(milliseconds.get(node, 0.0) for node in nodes)
    images = 0.0 if found.route.kind in (AS_IT_IS, SCRATCH) else _size(study, found.size).images
    memory = [cell.besides["memory"] for cell in found.series.cells if "memory" in cell.besides]
    fit = 0.0 if found.route.kind == AS_IT_IS else float(np.mean([cell.seconds for cell in found.series.cells]))
    return RouteCosts(images * ms / 1000, fit, max(memory, default=None))


def results(
    study: RoutesStudy, measured: Sequence[MeasuredRoute], costs: Mapping[tuple[str, int | str], RouteCosts]
) -> list[dict[str, Any]]:
    """One entry for each route, size and source of test images."""
    found = []
    for one in measured:
        size, cost = _size(study, one.size), costs[one.route.name, one.size]
        for tested_on in [SOURCE, SHIFTED] if one.study.elsewhere else [SOURCE]:
            of = estimate(one, tested_on)
            found.append({
                "route": one.route.name, "kind": one.route.kind, "cut": one.route.cut or None,
                "size": one.size, "per_class": size.per_class, "images": size.images, "tested_on": tested_on,
                study.every.measure: of.value, "low": of.low, "high": of.high, "se": of.se,
                "cells": _values(one, tested_on), "params": [dict(cell.params) for cell in one.series.cells],
                f"train_{study.every.measure}": float(np.mean([cell.train_value for cell in one.series.cells])),
                **(_besides(one) if tested_on == SOURCE else {}),
                "seconds": cost.seconds, "seconds_features": cost.features, "seconds_fit": cost.fit, "memory": cost.memory,
            })  # fmt: skip
    return found


def estimate(found: MeasuredRoute, tested_on: str = SOURCE) -> AccuracyEstimate:
    """The measure of a route at a size, with its interval over test images and draws."""
    return of_layers.estimate(found.study, found.series, tested_on)


def _values(found: MeasuredRoute, tested_on: str) -> list[float]:
    parts = [cell.contributions if tested_on == SOURCE else cell.shifted for cell in found.series.cells]
    return [float(part.mean()) for part in parts if part is not None]


def _besides(found: MeasuredRoute) -> dict[str, float]:
    names = dict.fromkeys(name for cell in found.series.cells for name in cell.besides if name != "memory")
    return {
        name: float(np.mean([cell.besides[name] for cell in found.series.cells if name in cell.besides]))
        for name in names
    }


def differences(study: RoutesStudy, measured: Sequence[MeasuredRoute]) -> list[dict[str, Any]]:
    """Every route against the best of its size, paired by image and draw; ``p_adjusted`` is for all of a size together."""
    found: list[dict[str, Any]] = []
    for size in study.sizes:
        own = [one for one in measured if one.size == size.name]
        if not own:
            continue
        best = max(own, key=lambda one: estimate(one).value)
        others = [(one, _paired(one, best)) for one in own if one is not best]
        found += of_layers.with_adjusted_p(
            [{"size": size.name, "a": one.route.name, "b": best.route.name, **between} for one, between in others]
        )
    return found


def _paired(one: MeasuredRoute, other: MeasuredRoute) -> dict[str, float | None]:
    """Over the draws that both have."""
    both = sorted(set(one.seeds) & set(other.seeds))
    if not both:
        return {"difference": None, "low": None, "high": None, "p": None, "draws": 0}
    first, second = (_of_draws(found, both) for found in (one, other))
    between = of_layers.difference(first.study, first.series, second.series)
    return {"difference": between.value, "low": between.low, "high": between.high, "p": between.p, "draws": len(both)}


def _of_draws(found: MeasuredRoute, seeds: Sequence[int]) -> MeasuredRoute:
    cells = [cell for cell in found.series.cells if cell.seed in seeds]
    folds = [fold for fold in found.study.folds if fold.seed in seeds]
    return replace(
        found, study=replace(found.study, folds=folds), series=replace(found.series, cells=cells), seeds=tuple(seeds)
    )


@dataclass(frozen=True)
class RouteChoice:
    """The cheapest route within one standard error of the best, at one size.

    Attributes:
        size: which.
        chosen: the route.
        best: the best one.
        estimate: of the chosen one.
        best_estimate: of the best one.
        same_cost: names of other routes within one standard error that take as long, as far as the clock tells.
    """

    size: DrawSize
    chosen: MeasuredRoute
    best: MeasuredRoute
    estimate: AccuracyEstimate
    best_estimate: AccuracyEstimate
    same_cost: tuple[str, ...] = ()


def choices(
    study: RoutesStudy, measured: Sequence[MeasuredRoute], costs: Mapping[tuple[str, int | str], RouteCosts]
) -> list[RouteChoice]:
    """The choice at each size at which something was measured, ascending."""
    found = []
    for size in study.sizes:
        some = [one for one in measured if one.size == size.name]
        own = {one.route.name: one for one in sorted(some, key=lambda one: [*ROUTES].index(one.route.kind))}
        if own:
            estimates = {name: estimate(one) for name, one in own.items()}
            seconds = {name: costs[name, size.name].seconds for name in own}
            _, best = cheapest_within_one_se(estimates, seconds, same=no_dearer)
            beside = {name: _beside(one, own[best], estimates[best]) for name, one in own.items()}
            chosen, _ = cheapest_within_one_se(beside, seconds, same=no_dearer)
            near = within_one_se(beside, best)
            longest = no_dearer(min(seconds[name] for name in near))
            alike = tuple(name for name in near if name != chosen and seconds[name] <= longest)
            found.append(RouteChoice(size, own[chosen], own[best], estimates[chosen], estimates[best], alike))
    return found


def _beside(one: MeasuredRoute, best: MeasuredRoute, estimate_of_best: AccuracyEstimate) -> AccuracyEstimate:
    """What a route would reach where the best one was measured, with the error of the best.

    Where a budget left them different draws, that is the value of the best one and their difference on the draws that both
    have: one draw may be easier than another. It is at most that value.
    """
    value, both = estimate(one).value, sorted(set(one.seeds) & set(best.seeds))
    if both and set(one.seeds) != set(best.seeds):
        first, second = (estimate(_of_draws(found, both)).value for found in (one, best))
        value = estimate_of_best.value + first - second
    return replace(estimate_of_best, value=min(value, estimate_of_best.value))


def changes(found: Sequence[RouteChoice], measured: Sequence[MeasuredRoute]) -> list[dict[str, Any]]:
    """The sizes at which another route is recommended: between measured ones, then beyond the largest, extrapolated.

    Between two sizes the crossing is where the lines through the two routes' values meet, over the logarithm of the size; beyond
    the largest, lines through its last two values are followed up to ten times the size.
    """
    told = []
    for before, after in pairwise(found):
        if before.chosen.route != after.chosen.route:
            told.append({
                "from": before.chosen.route.name, "to": after.chosen.route.name, "extrapolated": False,
                "above": before.size.per_class, "below": after.size.per_class,
                "size": _crossing(before, after, measured),
            })  # fmt: skip
    beyond = _beyond(found, measured)
    return [*told, *([beyond] if beyond else [])]


def _crossing(before: RouteChoice, after: RouteChoice, measured: Sequence[MeasuredRoute]) -> float | None:
    """Where two routes' lines meet between two sizes; None if they do not."""
    one, other = before.chosen.route.name, after.chosen.route.name
    gaps = []
    for choice in (before, after):
        values = {m.route.name: estimate(m).value for m in measured if m.size == choice.size.name}
        if one not in values or other not in values:
            return None
        gaps.append(values[other] - values[one])
    if gaps[0] == gaps[1] or gaps[0] > 0 or gaps[1] < 0:
        return None
    start, end = (math.log(choice.size.per_class) for choice in (before, after))
    return math.exp(start + (end - start) * gaps[0] / (gaps[0] - gaps[1]))


def _beyond(found: Sequence[RouteChoice], measured: Sequence[MeasuredRoute]) -> dict[str, Any] | None:
    """The route that would be a standard error better than the recommended one first, if trends go on."""
    if len(found) < 2:
        return None
    (before, last), reached = found[-2:], []
    by_size = {
        choice.size.name: {m.route.name: estimate(m).value for m in measured if m.size == choice.size.name}
        for choice in (before, last)
    }
    one, error = last.chosen.route.name, last.best_estimate.se or 0.0
    start, end = math.log(before.size.per_class), math.log(last.size.per_class)
    for name, value in by_size[last.size.name].items():
        early = by_size[before.size.name]
        if name == one or name not in early or one not in early or end <= start:
            continue
        now, then = value - by_size[last.size.name][one], early[name] - early[one]
        slope = (now - then) / (end - start)
        if slope > 0 and now <= error:
            place = end + (error - now) / slope
            if place <= end + math.log(FARTHEST):
                reached.append((place, name))
    if not reached:
        return None
    place, name = min(reached)
    return {
        "from": one,
        "to": name,
        "extrapolated": True,
        "above": last.size.per_class,
        "below": None,
        "size": math.exp(place),
    }


def recommended(
    study: RoutesStudy,
    measured: Sequence[MeasuredRoute],
    costs: Mapping[tuple[str, int | str], RouteCosts],
    between: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What to take at the user's size, and at every other one."""
    found = choices(study, measured, costs)
    last, measure = found[-1], study.every.measure
    cost, dear = (costs[one.route.name, last.size.name] for one in (last.chosen, last.best))
    same = [
        one["a"] for one in between if one["size"] == last.size.name and (one.get("p_adjusted") or 0.0) > of_layers.SURE
    ]
    return {
        "route": last.chosen.route.name,
        "what": ROUTES[last.chosen.route.kind],
        "kind": last.chosen.route.kind,
        "cut": last.chosen.route.cut or None,
        "params": [dict(cell.params) for cell in last.chosen.series.cells],
        "size": last.size.as_dict(),
        "is_own_size": last.size == study.sizes[-1],
        measure: last.estimate.value,
        "low": last.estimate.low,
        "high": last.estimate.high,
        "se": last.estimate.se,
        "seconds": cost.seconds,
        "memory": cost.memory,
        "best": last.best.route.name,
        f"best_{measure}": last.best_estimate.value,
        "best_seconds": dear.seconds,
        "few_draws": few_draws_of(last, study),
        "not_told_apart": same,
        "same_cost": list(last.same_cost),
        "rule": f"the cheapest route within one standard error of the {_BEST[measure]} (Breiman et al. 1984), and of those that "
        "take as long the simplest; times that differ by less than a second or a tenth are equal",
        "by_size": [
            {
                "size": choice.size.as_dict(),
                "route": choice.chosen.route.name,
                "best": choice.best.route.name,
                "few_draws": few_draws_of(choice, study),
            }
            for choice in found
        ],
        "changes": changes(found, measured),
        "elsewhere": _elsewhere(last, measured),
    }


def _elsewhere(last: RouteChoice, measured: Sequence[MeasuredRoute]) -> dict[str, Any] | None:
    """How the recommended route does on the other source, and which one does best there at that size."""
    there, measure = last.chosen.study.elsewhere, last.chosen.study.measure
    if there is None:
        return None
    values = {one.route.name: estimate(one, SHIFTED) for one in measured if one.size == last.size.name}
    own, best = values[last.chosen.route.name], max(values, key=lambda name: values[name].value)
    return {
        "dataset": there.dataset, "images": len(there.rows), measure: own.value, "low": own.low, "high": own.high,
        "best": best, f"best_{measure}": values[best].value,
    }  # fmt: skip


def _draws(found: MeasuredRoute, study: RoutesStudy) -> int:
    """On how many draws it was measured; one that learns nothing tells of all with one."""
    return study.every.protocol.seeds if found.route.kind == AS_IT_IS else len(found.seeds)


def few_draws_of(choice: RouteChoice, study: RoutesStudy) -> str:
    """That a choice rests on fewer draws than were asked for; empty where it does not."""
    draws = {one.route.name: _draws(one, study) for one in (choice.chosen, choice.best)}
    return few_draws_text(draws, study.every.protocol.seeds)


def few_draws_text(draws: Mapping[str, int], asked: int) -> str:
    """That a recommendation rests on fewer draws of the routes than were asked for; empty where it does not."""
    told = [f"{route} on {counted(number, 'draw')}" for route, number in draws.items() if number < asked]
    return (
        f"measured {', '.join(told)} of {asked}: take it as rough; the same command measures the others" if told else ""
    )


def _size(study: RoutesStudy, name: int | str) -> DrawSize:
    return next(size for size in study.sizes if size.name == name)


def not_tried(untried: Sequence[Untried], unable: Mapping[str, str]) -> list[dict[str, Any]]:
    """What has no result, and why: routes that cannot be taken, trials that the budget left out, and those that diverged."""
    found: list[dict[str, Any]] = [{"route": name, "why": why} for name, why in unable.items()]
    groups: dict[tuple[str, int | str, bool], list[Untried]] = {}
    for one in untried:
        groups.setdefault((one.trial.route.name, one.trial.size, one.why == OVER_BUDGET), []).append(one)
    for (route, size, _), some in groups.items():
        found.append({
            "route": route, "size": size, "draws": len(some), "seconds": sum(one.seconds for one in some),
            "why": some[0].why,
        })  # fmt: skip
    return found


def text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe routes`` prints: the answer, a table for each size, and what it rests on."""
    found = with_values(found)
    return "\n\n".join(
        part for part in (_answer_text(found), _table_text(found), _not_tried_text(found), _rest_text(found)) if part
    )


def plan_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe routes --dry-run`` prints."""
    rows = [[column["column"], column["width"], share(column["cost"])] for column in found["columns"]]
    lines = [
        f"{found['dataset']}, {found['backbone']}: {counted(len(rows), 'frozen node')}",
        table(["column", "width", "of the forward"], rows),
    ]
    lines += [found["what"], *extraction_lines(found["extractions"])]
    lines.append(
        f"{size_of(found['bytes'])} would be written to {found['store']}, where {size_of(found['free'])} are free"
    )
    each, times, limit = found["seconds_of_a_draw_of_all"], found["measurements"], found["budget"]
    lines.append(
        f"phases: extract; compare some of the images with what the network was trained on, and time it, about "
        f"{spoken(found['seconds_to_compare'])}; measure {', '.join(each)}, each {times:,} times, as it is once"
    )
    lines += [
        f"{name}: a draw of all images takes about {took(seconds)}, smaller ones less" for name, seconds in each.items()
    ]
    most = sum(seconds * (1 if name == AS_IT_IS else times) for name, seconds in each.items())
    apart = f" with {found['classes']:,} classes or labels" if found["classes"] > 1 else ""
    lines.append(
        f"measuring takes at most about {spoken(most)}{apart}, a rough figure; what the store has of it takes none"
    )
    if limit is not None:
        lines.append(f"the budget lets measuring take {took(limit)}; extract and compare come besides")
    return "\n".join([*lines, *filter(None, [_not_tried_text(found)]), "dry run: nothing was changed"])


def _answer_text(found: Mapping[str, Any]) -> str:
    best, measure = found["recommended"], measure_of(found)
    lines = [
        f"recommended with {best['size']['text']}: {best['route']} ({best['what']}), {measure.word} {_interval(best)}, "
        f"{took(best['seconds'])} to train",
        f"the {measure.best} is {best['best']}, {best['best_value']:.4f}, {took(best['best_seconds'])}"
        if best["best"] != best["route"]
        else f"no route did better; {best['rule']}",
    ]
    if best.get("few_draws"):
        lines.append(best["few_draws"])
    if best.get("same_cost"):
        lines.append(same_cost_text(best))
    if best["not_told_apart"]:
        lines.append(f"not told apart from {best['best']}: {', '.join(best['not_told_apart'])}")
    lines += [change_text(change, found["per"]) for change in best["changes"]]
    smaller = [one for one in best["by_size"][:-1] if one.get("few_draws")]
    lines += [f"with {one['size']['text']}: {one['few_draws']}" for one in smaller]
    if not best["changes"]:
        lines.append("at every size that was measured the answer is the same, and its trend does not change it soon")
    there = best["elsewhere"]
    if there:
        lines.append(
            f"on {there['dataset']}: {_interval(there)}; the best there is {there['best']}, {there['best_value']:.4f}"
        )
    return "\n".join(lines)


def same_cost_text(best: Mapping[str, Any]) -> str:
    """Which routes take as long as the recommended one."""
    others = best["same_cost"]
    take = "takes" if len(others) == 1 else "take"
    return f"as far as a clock tells {' and '.join(others)} {take} as long; {best['route']} is the simplest of them"


def change_text(change: Mapping[str, Any], per: str) -> str:
    """A change of the recommendation in a sentence."""
    near = change["size"]
    if change["extrapolated"]:
        return (
            f"if trends go on, {change['to']} would be worth it from about {near:,.0f} images a {per} on (extrapolated)"
        )
    about = f", by the lines between at about {near:,.0f}" if near is not None else ""
    return f"up to {change['above']:,.0f} images a {per}: {change['from']}; from {change['below']:,.0f} on: {change['to']}{about}"


def _table_text(found: Mapping[str, Any]) -> str:
    measure, other, tables = measure_of(found), found["test_dataset"], []
    apart = {(row["size"], row["a"]): row for row in found["differences"]}
    rows_of = {(row["route"], row["size"], row["tested_on"]): row for row in found["results"]}
    header = ["route", measure.word, "draws", "to the best", *([f"on {other}"] if other else []), "time", "memory"]
    for size in found["sizes"]:
        rows, is_on_fewer = [], False
        for (route, own, tested_on), row in rows_of.items():
            if own != size["size"] or tested_on != SOURCE:
                continue
            gap, there = apart.get((own, route)), rows_of.get((route, own, SHIFTED))
            best = {} if gap is None else rows_of.get((gap["b"], own, SOURCE), {})
            shared = gap_text(gap, max(_own_draws(row), _own_draws(best)))
            is_on_fewer |= shared.endswith(")")
            rows.append([
                route, _interval(row), draws_text(row), shared, *([_interval(there)] if there else []),
                took(row["seconds"]), "-" if row["memory"] is None else size_of(row["memory"]),
            ])  # fmt: skip
        if rows:
            note = f"\n{FEWER_DRAWS}" if is_on_fewer else ""
            tables.append(f"{size['text']}: {size['images']:,.0f} images train\n{table(header, rows)}{note}")
    return "\n\n".join(tables)


FEWER_DRAWS = (
    "to the best: on the draws that both have, as many as are said, so that it is not the difference of the columns"
)


def _own_draws(row: Mapping[str, Any]) -> int:
    """0 for a route that learns nothing, which does the same on all."""
    return 0 if row.get("kind") == AS_IT_IS else len(row.get("cells") or [])


def draws_text(row: Mapping[str, Any]) -> str:
    """On how many draws a route was measured."""
    return "any" if row.get("kind") == AS_IT_IS else f"{_own_draws(row):,}"


def gap_text(gap: Mapping[str, Any] | None, most: int) -> str:
    """The difference to the best, with the draws that both have where these are fewer than the most that one of them has."""
    if gap is None:
        return ""
    if gap["difference"] is None:
        return "no draw that both have"
    draws = gap.get("draws", most)
    return f"{gap['difference']:+.4f}" + (f" (on {counted(draws, 'draw')})" if draws < most else "")


def _not_tried_text(found: Mapping[str, Any]) -> str:
    lines = []
    for one in found["not_tried"]:
        where = ""
        if "size" in one:
            images = "all images" if one["size"] == ALL else f"{one['size']} a {found['per']}"
            where = f", {images}, {counted(one['draws'], 'draw')}"
        lasts = f" (about {took(one['seconds'])})" if "seconds" in one else ""
        lines.append(f"no result: {one['route']}{where}{lasts}: {one['why']}")
    return "\n".join(lines)


def _rest_text(found: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{name} {took(value)}" for name, value in found["provenance"]["seconds"].items())
    return f"{textwrap.fill(found['protocol'], _LINE)}\n{seconds}"


def _interval(row: Mapping[str, Any]) -> str:
    return (
        f"{row['value']:.4f}" if row["low"] is None else f"{row['value']:.4f} ({row['low']:.3f} to {row['high']:.3f})"
    )
