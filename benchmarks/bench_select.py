"""Which images to label: typical ones, a cover, or any. Accuracy of a head that learns from what was chosen.

``python -m benchmarks.bench_select --store STORE --dataset fashion-mnist``

Of each fifth of the training images (or ``--candidates`` of it), which are taken to have no label, ``featurepipe.select`` chooses
some by each of its methods, and chance chooses as many, ``--draws`` times. A logistic regression (C = 0.1, features standardised)
learns from the true labels of these alone, and is tested on all test images.

The five fifths are disjoint, so that what is measured on them is independent but for the test images. A difference is that of
accuracies on one fifth, with its 95 % interval over the fifths (paired t, 4 degrees of freedom). ``classes``: how many classes
have a labelled image, on average.

Without ``--store`` the bundled 2,000 images are extracted; ``--tiny`` does so with LeNet-5.

*commands* (``--only commands``): seconds, processor seconds and peak memory of ``featurepipe outliers`` and ``labels`` as whole
commands, each a process of its own, in rounds, on 100,000 images of 1,280 float16 values. The features are made up as those of
``bench_similar``; each of their groups is of one of 10 or 100 classes, and one label in a hundred is wrong: ``recall`` and
``precision`` are of these among the suspects.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

import featurepipe as fp
from benchmarks import record
from benchmarks.alone import MB, ROOT
from benchmarks.bench_similar import COMMAND, Features, children_cpu, write_store
from featurepipe.curation.next_to_label import choose
from featurepipe.curation.options import K_CENTRE, TYPICAL
from featurepipe.heads.families import make_head
from featurepipe.store import FeatureSet, FeatureStore

DATA = Path(fp.__file__).parent / "data"
RANDOM = "random"
PARTS = 5
STRENGTH = 0.1
CLASSES = (10, 100)
WRONG = 0.01  # of the labels


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the methods and the commands."""
    parts = {"methods": methods, "commands": commands}
    found: dict[str, Any] = {}
    for part in [args.only] if args.only else parts:
        found |= parts[part](args)
    return found


def methods(args: argparse.Namespace) -> dict[str, Any]:
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


def commands(args: argparse.Namespace) -> dict[str, Any]:
    """Measures whole commands on stores that are alike but for their number of classes."""
    rows, width, rounds = (3000, 32, 1) if args.tiny else (args.rows, args.width, args.rounds)
    ways = {"outliers": ["outliers"], "outliers by class": ["outliers", "--by", "class"]}
    ways["labels"] = ["labels", "--limit", str(rows)]
    told: dict[str, dict[str, list[dict[str, Any]]]] = {}
    made, rng = Features(rows, width), np.random.default_rng(3)
    for classes in CLASSES:
        is_wrong = rng.random(rows) < WRONG
        labels = (made.group + is_wrong * rng.integers(1, classes, rows)) % classes
        of_these = told.setdefault(str(classes), {})
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-select-") as folder:
            write_store(Path(folder), made, 0, rows, labels=[f"class {label:02d}" for label in labels])
            for _ in range(rounds):
                for way, words in ways.items():
                    one, answer = timed([words[0], folder, *words[1:], "--quiet", "--json"])
                    if way == "labels":
                        suspects = {int(suspect["id"][-12:-4]) for suspect in answer["suspects"]}
                        right = len(suspects & set(np.flatnonzero(is_wrong).tolist()))
                        one |= {
                            "recall": round(right / int(is_wrong.sum()), 4),
                            "precision": round(right / max(1, len(suspects)), 4),
                        }
                    of_these.setdefault(way, []).append(one)
                    record.note(f"{classes} classes, {way}: {one}")
    medians = {
        classes: {
            way: {name: record.median([one[name] for one in some]) for name in some[0]} for way, some in ways.items()
        }
        for classes, ways in told.items()
    }
    when = datetime.now(UTC).isoformat(timespec="seconds")
    found = {
        "when": when,
        "machine": record.machine(),
        "rows": rows,
        "width": width,
        "rounds": rounds,
        "classes": medians,
    }
    return {"commands": found}


def timed(words: list[str]) -> tuple[dict[str, Any], Any]:
    """Seconds and memory of a command in a process of its own, and what it printed."""
    start, cpu = time.perf_counter(), children_cpu()
    command = [sys.executable, "-c", COMMAND, *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds, cpu = time.perf_counter() - start, children_cpu() - cpu
    if ran.returncode:
        raise SystemExit(f"{words[0]} failed:\n{ran.stderr}")
    peak = next(line.split()[1] for line in ran.stderr.splitlines() if line.startswith("PEAK"))
    one = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mb": round(int(peak) * 1024 / MB)}
    return one, json.loads(ran.stdout)


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
    parser.add_argument("--only", choices=["methods", "commands"], help="one of the parts")
    parser.add_argument("--rows", type=int, default=100_000, help="that commands are measured on")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="a folder with 1 GB of space (default: the system's temporary folder)")
    parser.add_argument("--draws", type=int, default=4, help="choices by chance on each part")


if __name__ == "__main__":
    record.main("bench_select", __doc__ or "", add, run)
