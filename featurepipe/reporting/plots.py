"""Plots for notebooks, by matplotlib: measures over depth or images, confusions, a map of images, mistakes.

Each function draws on the Axes that it is given, or on a new figure, and returns the Axes. What is left out is written there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from featurepipe.display import counted, displayed, first_names, named_columns, shortened
from featurepipe.errors import FeaturepipeError, UsageError, unknown
from featurepipe.reporting.blocks import MEASURES, SERIES, finite, measure_of
from featurepipe.reporting.charts import most_wrong
from featurepipe.reporting.images import Projection, ReadImage, mapped, project, shown_names, upright
from featurepipe.results import metrics_of, optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from featurepipe.store import FeatureSet

Document = Mapping[str, Any]

_SIDE = 96  # pixels of a mistake's picture
_LEGEND = 12  # classes that a map names


def plot_result(result: Document, what: str | None = None, *, ax: Axes | None = None, **how: Any) -> Axes:
    """Draws a part of a result; see ``Result.plot``."""
    have = [name for name, (there, _) in _KINDS.items() if there(result)]
    if not have:
        raise UsageError(
            "there is nothing to draw here: plots are of depth, routes, evaluate and train (a bundle without test images has "
            "no confusion matrix; evaluate it on others)"
        )
    if what is not None and what not in _KINDS:
        raise unknown("plot", what, have)
    if what is not None and what not in have:
        raise UsageError(f"this result has nothing for plot {what!r}; it has: {', '.join(have)}")
    return _KINDS[what or have[0]][1](result, _axes(ax), **how)


def plot_features(features: FeatureSet, *, method: str = "PCA", ax: Axes | None = None) -> Axes:
    """Draws a map of at most 2,000 images by their features; see ``FeatureSet.plot``."""
    optional("matplotlib", "plot()")
    if not len(features):
        raise UsageError("there are no features to draw")
    some = mapped(features)
    found = project(list(some.ids), some.read(np.float32), shown_names(some), total=len(features))
    return plot_map(found, _axes(ax), method=method, title=features.named_column)


def plot_curve(result: Document, ax: Axes) -> Axes:
    """Measures with 95 % intervals: of layers over the nodes, the recommended one marked; of routes over images to learn from.

    Of several networks, the measures of their layers over the time of an image.
    """
    if result.get("kind") == "routes":
        return _plot_routes(result, ax)
    if result.get("kind") == "networks":
        return _plot_networks(result, ax)
    measure = measure_of(result)
    columns = [str(entry["column"]) for entry in result["columns"]]
    best = (result.get("recommended") or {}).get("column")
    bottleneck = ((result.get("backbone") or {}).get("description") or {}).get("bottleneck")
    names = [displayed(named_columns(column, bottleneck)) for column in columns]
    kinds = dict.fromkeys((r["head"], r["network"], r["tested_on"]) for r in result["results"])
    for number, kind in enumerate(kinds):
        entries = {r["column"]: r for r in result["results"] if (r["head"], r["network"], r["tested_on"]) == kind}
        places = [k for k, column in enumerate(columns) if column in entries]
        values = [entries[columns[k]][measure.name] for k in places]
        low, high = ([_bound(entries[columns[k]], side, measure.name) for k in places] for side in ("low", "high"))
        colour = SERIES[number % len(SERIES)].light
        label = ", ".join([kind[0], *(part for part in kind[1:] if part not in {"pretrained", "source"})])
        ax.plot(places, values, marker="o", color=colour, label=label)
        ax.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    if best in columns:
        ax.axvline(columns.index(best), color="0.5", linestyle=":", label=f"recommended: {names[columns.index(best)]}")
    ax.set_xticks(range(len(columns)), [shortened(name, 32) for name in names], rotation=35, ha="right")
    ax.set_ylabel(measure.word)
    ax.legend(frameon=False)
    return ax


def _plot_routes(result: Document, ax: Axes) -> Axes:
    measure = measure_of(result)
    own = [r for r in result["results"] if r["tested_on"] == "source" and finite(r.get(measure.name)) is not None]
    for number, route in enumerate(dict.fromkeys(r["route"] for r in own)):
        entries = sorted((r for r in own if r["route"] == route), key=lambda r: r["images"])
        values = [r[measure.name] for r in entries]
        reach = [[abs(_bound(r, side, measure.name) - r[measure.name]) for r in entries] for side in ("low", "high")]
        colour = SERIES[number % len(SERIES)].light
        ax.errorbar(
            [r["images"] for r in entries], values, yerr=reach, marker="o", color=colour, label=route, capsize=2
        )
    ax.set_xscale("log")
    ax.set_xlabel("images to learn from")
    ax.set_ylabel(measure.word)
    ax.legend(frameon=False)
    return ax


def _plot_networks(result: Document, ax: Axes) -> Axes:
    measure, best = measure_of(result), result["recommended"]
    for number, one in enumerate(result["networks"]):
        known = {column["column"]: finite(column.get("ms_per_image")) for column in one["columns"]}
        times = {column: time for column, time in known.items() if time is not None}
        own = [r for r in one["results"] if (r["network"], r["tested_on"]) == ("pretrained", "source")]
        for place, head in enumerate(dict.fromkeys(r["head"] for r in own)):
            some = [(times[r["column"]], r) for r in own if r["head"] == head and r["column"] in times]
            some.sort(key=lambda pair: pair[0])
            values = [r[measure.name] for _, r in some]
            reach = [
                [abs(_bound(r, side, measure.name) - r[measure.name]) for _, r in some] for side in ("low", "high")
            ]
            label = displayed(f"{one['backbone']['name']}, {head}")
            colour = SERIES[number % len(SERIES)].light
            style = ("-", "--", ":", "-.")[place % 4]
            ax.errorbar(
                [time for time, _ in some],
                values,
                yerr=reach,
                marker="o",
                color=colour,
                linestyle=style,
                label=label,
                capsize=2,
            )
    if finite(best.get("ms_per_image")) is not None:
        named = named_columns(best["column"], result["backbone"].get("description", {}).get("bottleneck"))
        name = displayed(f"{named} of {best['backbone']}")
        ax.axvline(best["ms_per_image"], color="0.5", linestyle=":", label=f"recommended: {shortened(name, 40)}")
    ax.set_xscale("log")
    ax.set_xlabel("milliseconds per image")
    ax.set_ylabel(measure.word)
    ax.legend(frameon=False)
    return ax


def plot_confusion(result: Document, ax: Axes, *, most: int = 30) -> Axes:
    """The confusion matrix in shares of each true class; says which classes it leaves out."""
    found = metrics_of(result)["confusion"]
    names, counts = [displayed(name) for name in found["classes"]], np.asarray(found["counts"], np.float64)
    kept = most_wrong(counts, most)
    shares = counts[np.ix_(kept, kept)] / np.maximum(counts[kept].sum(axis=1, keepdims=True), 1)
    picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.figure.colorbar(picture, ax=ax, label="share of the true class")
    shown = [shortened(names[k], 20) for k in kept]
    ax.set_xticks(range(len(kept)), shown, rotation=60, ha="right")
    ax.set_yticks(range(len(kept)), shown)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    left = [name for k, name in enumerate(names) if k not in set(kept.tolist())]
    if left:
        ax.set_title(f"left out, with the fewest mistakes: {first_names(left, 4)}", fontsize="small")
    if len(kept) <= 12:
        for row, column in np.ndindex(shares.shape):
            if shares[row, column] >= 0.005:
                ink = "white" if shares[row, column] > 0.5 else "black"
                ax.text(
                    column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=ink, fontsize=8
                )
    return ax


def plot_map(projection: Projection, ax: Axes, *, method: str = "PCA", title: str = "") -> Axes:
    """Images as points, coloured by label; says how many of how many they are."""
    if method not in projection.places:
        raise unknown("method", method, list(projection.places))
    places, labels = np.asarray(projection.places[method]), np.array(projection.labels, dtype=object)
    names, sizes = np.unique(labels.astype(str), return_counts=True)
    named = [str(name) for name in names[np.argsort(-sizes, kind="stable")][:_LEGEND]]
    for number, name in enumerate(sorted(named)):
        rows = labels == name
        ax.scatter(
            places[rows, 0],
            places[rows, 1],
            s=10,
            alpha=0.7,
            color=f"C{number}",
            label=shortened(displayed(name or "no label"), 24),
        )
    others = ~np.isin(labels.astype(str), named)
    if others.any():
        ax.scatter(
            places[others, 0],
            places[others, 1],
            s=8,
            alpha=0.4,
            color="0.6",
            label=counted(len(names) - len(named), "other label"),
        )
    drawn = f"{len(labels):,} of {projection.total:,} images, {method}"
    ax.set_title(f"{displayed(title)}: {drawn}" if title else drawn, fontsize="small")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    return ax


def plot_mistakes(result: Document, ax: Axes, *, images: Any = None, most: int = 12) -> Axes:
    """The most confident mistakes as pictures, each with its true and its predicted class.

    Args:
        result: Of ``evaluate`` or ``depth``.
        ax: Where to draw.
        images: The source that the features are of, anything ``extract`` takes, or a function that gives the image of an id.
        most: How many.
    """
    if images is None:
        raise UsageError("mistakes are pictures: say where the images are, such as plot('mistakes', images='photos')")
    found = metrics_of(result)["mistakes"]
    shown = (found if isinstance(found, list) else found["most_confident"])[:most]
    read = images if callable(images) else reader_of(images)
    across = min(4, max(1, len(shown)))
    down = -(-len(shown) // across)
    for number, mistake in enumerate(shown):
        row, column = divmod(number, across)
        inset = ax.inset_axes((column / across, 1 - (row + 1) / down, 0.92 / across, 0.72 / down))
        picture = upright(read(str(mistake["id"])), _SIDE)
        if picture is None:
            inset.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=7)
        else:
            inset.imshow(np.asarray(picture), cmap="gray")
        inset.set_title(_told(mistake), fontsize=7)
        inset.set_axis_off()
    total = len(found) if isinstance(found, list) else found["count"]
    ax.set_axis_off()
    ax.set_title(f"{len(shown)} of {counted(total, 'mistake')}", fontsize="small")
    return ax


def reader_of(source: Any) -> ReadImage:
    """A function that gives the image of an id, from a source; None for ids that it lacks, and for what cannot be read.

    Raises:
        SourceError: The source cannot be listed.
    """
    from featurepipe.images.open import open_source

    opened = open_source(os.fspath(source) if isinstance(source, os.PathLike) else source)
    listing = opened.scan()
    places = dict(zip(listing["id"].to_pylist(), listing["locator"].to_pylist(), strict=True))

    def read(image: str) -> Any:
        if image not in places:
            return None
        try:
            return opened.read(places[image])
        except FeaturepipeError:
            return None

    return read


def _told(mistake: Document) -> str:
    names = (mistake.get("true", mistake.get("label", "?")), mistake.get("predicted", "?"))
    true, predicted = (f"{name:.4g}" if isinstance(name, float) else shortened(displayed(name), 16) for name in names)
    return f"is {true}\nsaid {predicted}"


def _bound(entry: Document, side: str, name: str) -> float:
    value = finite(entry.get(side))
    return float(entry[name]) if value is None else value


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _has_curve(result: Document) -> bool:
    entries = result.get("networks" if result.get("kind") == "networks" else "results")
    return (
        result.get("kind") in {"depth", "networks", "routes"}
        and result.get("measure", "accuracy") in MEASURES
        and bool(entries)
    )


def _map_of(result: Document, ax: Axes, **how: Any) -> Axes:
    return plot_map(Projection.from_dict(result["map"]), ax, **how)


_KINDS: Mapping[str, tuple[Callable[[Document], bool], Callable[..., Axes]]] = {
    "curve": (_has_curve, plot_curve),
    "confusion": (lambda result: bool(metrics_of(result).get("confusion")), plot_confusion),
    "map": (lambda result: bool(result.get("map")), _map_of),
    "mistakes": (lambda result: bool(metrics_of(result).get("mistakes")), plot_mistakes),
}
