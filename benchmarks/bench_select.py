"""Which images to label: typical ones, a cover, or any. Accuracy of a head that learns from what was chosen.

``python -m benchmarks.bench_select --store STORE --dataset fashion-mnist``

Of each fifth of the training images (or ``--candidates`` of it), which are taken to have no label, ``featurepipe.select`` chooses
some by each of its methods, and chance chooses as many, ``--draws`` times. A logistic regression (C = 0.1, features standardised)
learns from the true labels of these alone, and is tested on all test images.

The five fifths are disjoint, so that what is measured on them is independent but for the test images. A difference is that of
accuracies on one fifth, with its 95 % interval over the fifths (paired t, 4 degrees of freedom). ``classes``: how many classes
have a labelled image, on average.

Without ``--store`` the bundled 2,000 images are extracted; ``--tiny`` does so with LeNet-5.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

import featurepipe as fp
from benchmarks import record
from featurepipe.curation.next_to_label import choose
from featurepipe.curation.options import K_CENTRE, TYPICAL
from featurepipe.heads.families import make_head
from featurepipe.store import FeatureSet, FeatureStore

DATA = Path(fp.__file__).parent / "data"
RANDOM = "random"
PARTS = 5
STRENGTH = 0.1


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures every method on every part."""
    with opened(args) as store:
        rows = {"dataset": args.dataset, "node": args.node}
        train, test = (store.features(**rows, split=split) for split in ("train", "test"))
        budgets = [budget for budget in args.budgets if 2 * PARTS * budget <= len(train)]
        parts = np.array_split(np.random.default_rng(0).permutation(len(train)), PARTS)
        parts = [part[: args.candidates] for part in parts]
        tested = (test.read(), np.asarray(test.labels))
        rounds = []
        for number, part in enumerate(parts):
            rounds.append(one_part(train.take(np.sort(part)), tested, budgets, args.draws, number))
            record.note(f"part {number + 1} of {PARTS} is done")
    return {
        "dataset": args.dataset, "column": train.column, "space": train.origin.space, "candidates": len(parts[0]),
        "test_images": len(test), "classes": len(train.classes), "draws": args.draws,
        "results": [summed_up(budget, [one[str(budget)] for one in rounds]) for budget in budgets], "rounds": rounds,
    }  # fmt: skip


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[FeatureStore]:
    """The store that was given, or one of the bundled images."""
    if args.store and not args.tiny:
        yield FeatureStore(args.store, create=False)
        return
    args.dataset, args.budgets = "bundled", [20, 50, 100]
    network = {"backbone": "lenet5", "weights": "none"} if args.tiny else {"backbone": "efficientnet_lite0"}
    with tempfile.TemporaryDirectory() as folder:
        fp.extract(DATA, Path(folder) / "store", dataset=args.dataset, **network, silent=True)
        yield FeatureStore(Path(folder) / "store", create=False)


def one_part(
    candidates: FeatureSet, test: tuple[np.ndarray, np.ndarray], budgets: list[int], draws: int, seed: int
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Accuracies by budget and method, of chance several."""
    values, labels, every = candidates.read(), np.asarray(candidates.labels), np.arange(len(candidates))
    none, rng = np.empty(0, np.int64), np.random.default_rng([7, seed])
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for budget in budgets:
        ways = {RANDOM: [rng.choice(every, budget, replace=False) for _ in range(draws)]}
        for method in (TYPICAL, K_CENTRE):
            ways[method] = [choose(candidates, none, every, budget, method=method, seed=seed).rows]
        found[str(budget)] = {
            method: [learned(values[rows], labels[rows], *test) for rows in chosen] for method, chosen in ways.items()
        }
    return found


def learned(values: np.ndarray, labels: np.ndarray, test: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """What a head that learns from these gives."""
    head = make_head("logistic", C=STRENGTH).fit(values, labels)
    return {"accuracy": round(float((head.predict(test) == true).mean()), 4), "classes": len(np.unique(labels))}


def summed_up(budget: int, parts: list[dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Means over the parts, and paired differences."""

    def means(method: str, what: str) -> np.ndarray:
        return np.array([np.mean([one[what] for one in part[method]]) for part in parts])

    accuracy = {method: means(method, "accuracy") for method in parts[0]}
    pairs = [(TYPICAL, RANDOM), (K_CENTRE, RANDOM), (TYPICAL, K_CENTRE)]
    return {
        "budget": budget,
        "accuracy": {method: round(float(values.mean()), 4) for method, values in accuracy.items()},
        "classes": {method: round(float(means(method, "classes").mean()), 1) for method in accuracy},
        "difference": {f"{a} - {b}": paired(accuracy[a] - accuracy[b]) for a, b in pairs},
    }


def paired(differences: np.ndarray) -> dict[str, float]:
    """A mean difference and its 95 % interval."""
    mean, count = differences.mean(), len(differences)
    half = t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5
    return {
        name: round(float(value), 4) for name, value in (("mean", mean), ("low", mean - half), ("high", mean + half))
    }


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument(
        "--store", help="with a dataset that has classes and the splits train and test (default: bundled images)"
    )
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--node", default="bottleneck")
    parser.add_argument("--candidates", type=int, help="of each fifth at most (default: all)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[20, 50, 100, 500])
    parser.add_argument("--draws", type=int, default=4, help="choices by chance on each part")


if __name__ == "__main__":
    record.main("bench_select", __doc__ or "", add, run)
