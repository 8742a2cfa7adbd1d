"""The demo's picture: held-out images, what they are and what the head takes them for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from featurepipe.demo import Outcome

ROWS = 5
RIGHT, WRONG, QUIET, FRAME = "#2f6b3a", "#b3261e", "#5f6368", "#dadce0"


def draw(outcome: Outcome, data: Path, classes: Sequence[str], path: Path) -> Path:
    """Draws the first held-out images of each class, a column per class, and writes them to ``path`` as PNG.

    They are the first in the data set's order, whatever the head says of them, so mistakes are as frequent as they are.

    Args:
        outcome: the held-out images' ids, labels (positions in ``classes``, as text) and predictions.
        data: where the images are.
        classes: names of the classes.
        path: the picture; replaced if it is there.
    """
    from matplotlib.figure import Figure

    columns = [np.flatnonzero(outcome.true == str(label))[:ROWS] for label in range(len(classes))]
    pixels = read_images(data, outcome.ids)
    figure = Figure(figsize=(1.25 * len(classes), 1.62 * ROWS + 1.1), dpi=110, facecolor="white")
    grid = figure.subplots(ROWS, len(classes), squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.845, bottom=0.045, wspace=0.12, hspace=0.34)
    for axes in grid.flat:
        axes.set_axis_off()
    for label, rows in enumerate(columns):
        grid[0, label].set_title(classes[label], fontsize=11, fontweight="bold", pad=8)
        for axes, row in zip(grid[:, label], rows, strict=False):  # small data sets have fewer than ROWS of a class
            predicted = int(outcome.predicted[row])
            _tile(axes, pixels[outcome.ids[row]], classes[predicted], right=predicted == label)
    _headline(figure, outcome)
    unfinished = path.with_name(f".{path.name}.tmp")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path


def read_images(data: Path, ids: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Reads images, (H, W) uint8, from a source of arrays by their ids."""
    from featurepipe.images import open_source

    with closing(open_source(data)) as source:
        listing = source.scan()
        places = dict(zip(listing["id"].to_pylist(), listing["locator"].to_pylist(), strict=True))
        return {id_: np.asarray(source.read(places[id_])) for id_ in ids}


def _tile(axes: Axes, image: npt.NDArray[Any], predicted: str, *, right: bool) -> None:
    from matplotlib.patches import Rectangle

    # Dark on white for people; the network sees them as they are, bright on black.
    axes.imshow(255 - image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    text, colour, weight = (predicted, RIGHT, "normal") if right else (f"\u2717 {predicted}", WRONG, "bold")
    axes.text(
        0.5, -0.05, text, transform=axes.transAxes, ha="center", va="top", fontsize=10, color=colour, weight=weight
    )
    edge, width = (FRAME, 1) if right else (WRONG, 3)
    frame = Rectangle(
        (0, 0), 1, 1, transform=axes.transAxes, fill=False, clip_on=False, edgecolor=edge, linewidth=width
    )
    axes.add_patch(frame)


def _headline(figure: Figure, outcome: Outcome) -> None:
    count = len(outcome.true)
    title = f"{100 * outcome.accuracy:.1f} % of {count:,} held-out images are named rightly"
    note = (
        f"efficientnet_lite0, node {outcome.node}, logistic head. Above each column: what the images are. "
        "Below each image: what the head says."
    )
    figure.text(0.02, 0.97, title, fontsize=17, fontweight="bold", va="top")
    figure.text(0.02, 0.925, note, fontsize=11, color=QUIET, va="top")
    figure.text(0.98, 0.97, "mistakes in red \u2717", fontsize=13, fontweight="bold", color=WRONG, va="top", ha="right")
