"""The options of comparing routes; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.extraction.limits import seconds_at_most
from featurepipe.layer_depth.options import OtherSourceOption, StoreOption
from featurepipe.option_groups import at_least, by_commas, file_or_kind, not_empty, option
from featurepipe.store.options import LabelsOption, RoleOptions
from featurepipe.tuning.options import IMAGES, TuneOptions

AS_IT_IS, BOTTLENECK, NODE, LAYERS = "as-it-is", "bottleneck", "node", "layers"
TAIL, FULL, SCRATCH = "tail", "full", "scratch"
ROUTES = {
    AS_IT_IS: "the network's own classes that mean a label, the others left out as by evaluate --among-labels",
    BOTTLENECK: "one layer frozen, an exact head on the bottleneck",
    NODE: "one layer frozen, an exact head on the best of a few nodes",
    LAYERS: "all layers frozen, an exact head on the values of all blocks that tell most",
    TAIL: "the layers above a cut tuned, from stored activations",
    FULL: "all layers tuned, from the images",
    SCRATCH: "all layers learned from random weights, from the images",
}
"""The kinds of routes and what each is, from the cheapest to the dearest."""
FROM_IMAGES = (FULL, SCRATCH)
TUNED = (TAIL, *FROM_IMAGES)
ALL = "all"
"""In place of a size: every training image."""
AUTO = "auto"
NO_CLASSES = "the network's own classes exclude one another, and are neither numbers nor several labels"
"""Why the network as it is does not serve them."""
MAX_WIDTH = 2500
"""Values per image of a frozen node: many heads are fitted to choose one."""


def sizes_of(text: str) -> tuple[int | str, ...]:
    """Numbers of images per class, separated by commas, and ``all``.

    Example:
        >>> sizes_of("5, 20,all")
        (5, 20, 'all')
    """
    return tuple(int(word) if word.isdecimal() else word for word in by_commas(text))


def _sizes(given: Any) -> str | None:
    numbers = [size for size in given if size != ALL]
    if not given or any(isinstance(size, bool) or not isinstance(size, int) or size < 2 for size in numbers):
        return (
            "must be numbers of images per class, each at least 2 (one of them is set aside to choose by), and all, "
            "such as 5,20,100,all"
        )
    return "names a size twice" if len(set(given)) < len(given) else None


def _routes(given: Any) -> str | None:
    for route in given:
        if route not in ROUTES:
            raise unknown("route", str(route), ROUTES, see="featurepipe routes --help")
    return "must name each route once, and at least one" if not given or len(set(given)) < len(given) else None


def cannot_be_taken(route: str, why: str) -> UsageError:
    """Builds the error for a route that was asked for by name."""
    return UsageError(Message(f"the route {route} cannot be taken: ", why, ". Leave it out of ", Option("routes")))


_TUNING = ("epochs", "rate", "batch_size")
_DEFAULTS = TuneOptions().schedule(1)


@dataclass(frozen=True, kw_only=True)
class RoutesOptions(RoleOptions):
    """Which routes are compared, at which sizes, and how long that may take."""

    routes: tuple[str, ...] | None = option(
        None, f"of {', '.join(ROUTES)}; separated by commas (default: all of them)",
        metavar="LIST", check=_routes, read=by_commas,
    )  # fmt: skip
    sizes: tuple[int | str, ...] = option(
        (5, 20, 100, ALL), "training images per class, and all of them (default: 5,20,100,all)",
        metavar="LIST", check=_sizes, read=sizes_of,
    )  # fmt: skip
    seeds: int = option(3, "how often training images are drawn for each size (default: 3)", check=at_least(1, 100))
    cuts: tuple[str, ...] = option(
        (AUTO,), "nodes above which layers are tuned, separated by commas; auto: one at about two thirds of the network's "
        "operations (default: auto)",
        metavar="auto|LIST", check=not_empty, read=by_commas,
    )  # fmt: skip
    max_width: int = option(MAX_WIDTH, f"values per image of a frozen node (default: {MAX_WIDTH})", check=at_least(1))
    test_images: int | None = option(
        None, "test on so many of the test images, drawn by class (default: all)", check=at_least(2)
    )
    epochs: int | None = option(
        None, f"of tuning at most (default: {_DEFAULTS.epochs}; from scratch 60, or up to 300 of few images)",
        check=at_least(1, 10_000),
    )  # fmt: skip
    rate: float | None = option(
        None, f"of tuning, the learning rate of the head and the highest block (default: {_DEFAULTS.rate:g}; of all layers of a "
        "pretrained network 0.0003)",
        metavar="RATE",
    )  # fmt: skip
    batch_size: int | None = option(
        None, f"of tuning, images a step (default: {_DEFAULTS.batch_size}; from images 32)", check=at_least(1, 65_536)
    )
    mapping: Any = option(
        None, "which label each of the network's own classes means: .csv with class and label (default: by name)",
        metavar="FILE", recorded=file_or_kind,
    )  # fmt: skip
    budget: float | None = option(
        None, "measure for so long at most, such as 30min, not counting extraction and the comparison of images before it; the "
        "cheapest and most telling first, and the rest is named (default: no limit)",
        metavar="TIME", read=seconds_at_most,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget <= 0:
            raise UsageError(f"a budget of {self.budget:g} s leaves no time to measure", option="budget")
        if self.routes is not None and AS_IT_IS in self.routes and self.target_type != "multiclass":
            raise cannot_be_taken(AS_IT_IS, NO_CLASSES)
        _ = self.tuning(TAIL)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of routes to compare, from the cheapest to the dearest."""
        return tuple(route for route in ROUTES if self.routes is None or route in self.routes)

    def tuning(self, kind: str, cut: str = "") -> TuneOptions:
        """How the layers above a cut, or all of them, are tuned; of a tail the defaults are settled.

        Raises:
            UsageError: A rate or another number makes no sense.
        """
        own = {name: getattr(self, name) for name in _TUNING}
        if kind in FROM_IMAGES:
            return TuneOptions(from_node=IMAGES, weights="none" if kind == SCRATCH else None, **own)
        defaults = {name: getattr(_DEFAULTS, name) for name in _TUNING}
        return TuneOptions(
            from_node=cut or None,
            **{name: default if own[name] is None else own[name] for name, default in defaults.items()},
        )


@dataclass(frozen=True, kw_only=True)
class RoutesSourceOptions(LabelsOption, OtherSourceOption, StoreOption):
    """What is true of the images, what routes are tested on besides, where features and the page go."""

    dataset: str | None = option(None, "its name in the store (default: the source's own)", metavar="NAME")
    backbone: str | None = option(
        None,
        "see featurepipe backbones (default: what is at hand, as extract chooses, or what STORE holds)",
        metavar="NAME",
    )
    weights: str = option("DEFAULT", "of the network, as for featurepipe extract", metavar="NAME|FILE")
    nodes: tuple[str, ...] = option(
        (AUTO,), "frozen nodes to compare, may be repeated; auto: some of the network's stages (default: auto)",
        metavar="auto|NODE[:POOLING]",
    )  # fmt: skip
    report: str | None = option(None, "write the page: curves, tables, the 2 x 2 picture", metavar="FILE.html")
