"""How often the intervals of ``score_table`` hold the truth: ``python -m benchmarks.interval_coverage [--draws N] [--to FILE]``.

Test sets are drawn from classifiers whose true scores are known from 200,000 images of the same kind: from nearly guessing to
nearly always right, calibrated and overconfident, with one to 250 images a class, as many of each class or as they come.
Prints a table of the share of test sets whose interval holds the truth; 95 % is nominal, 90 % the least that we accept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featurepipe.heads.statistics.metrics import score_table

MEASURES = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "log_loss", "ece")
SETTINGS = [  # classes, images a class, balanced
    (2, 3, True), (2, 10, True), (5, 1, True), (20, 1, True), (20, 2, False), (20, 5, False), (10, 20, True), (100, 1, True),
    (100, 5, True), (4, 250, True),
]  # fmt: skip
KINDS = {"hard": (1.0, 1.0), "usual": (3.0, 1.0), "easy, overconfident": (6.0, 2.0)}  # strength, inverse temperature
_TRUTH = 200_000

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


def probabilities(rng: np.random.Generator, codes: Codes, classes: int, strength: float, sharpness: float) -> Array:
    """What a classifier says, (n, classes); some classes are easier than others."""
    scores = rng.normal(size=(len(codes), classes))
    scores[np.arange(len(codes)), codes] += (strength * np.linspace(0.6, 1.4, classes))[codes]
    likely = np.exp(sharpness * (scores - scores.max(axis=1, keepdims=True)))
    return np.asarray(likely / likely.sum(axis=1, keepdims=True))


def truth(rng: np.random.Generator, classes: int, strength: float, sharpness: float) -> dict[str, float]:
    """The scores on images without number."""
    codes = np.repeat(np.arange(classes), _TRUTH // classes)
    likely = probabilities(rng, codes, classes, strength, sharpness)
    found = score_table(likely, codes, [str(k) for k in range(classes)], bootstrap=0, mistakes=0)
    return {name: found[name]["value"] for name in MEASURES}


def coverage(
    classes: int, per_class: int, kind: str, *, balanced: bool, draws: int, seed: int = 0
) -> dict[str, float | None]:
    """The share of test sets whose interval holds the truth, for each measure; None where none has an interval."""
    rng = np.random.default_rng(seed)
    strength, sharpness = KINDS[kind]
    true = truth(rng, classes, strength, sharpness)
    names = [str(k) for k in range(classes)]
    held: dict[str, list[bool]] = {name: [] for name in MEASURES}
    for draw in range(draws):
        n = classes * per_class
        codes = np.repeat(np.arange(classes), per_class) if balanced else rng.integers(0, classes, n)
        likely = probabilities(rng, codes, classes, strength, sharpness)
        table = score_table(likely, codes, names, bootstrap=400, seed=draw, mistakes=0)
        for name in MEASURES:
            low, high = table[name]["low"], table[name]["high"]
            if low is not None:
                held[name].append(low - 1e-9 <= true[name] <= high + 1e-9)
    return {name: float(np.mean(found)) if found else None for name, found in held.items()}


def rows(draws: int) -> list[str]:
    """The table in Markdown."""
    lines = [f"| classes x images | classifier | {' | '.join(name.replace('_', ' ') for name in MEASURES)} |"]
    lines.append("|---" * (2 + len(MEASURES)) + "|")
    for classes, per_class, balanced in SETTINGS:
        for kind in KINDS:
            found = coverage(classes, per_class, kind, balanced=balanced, draws=draws)
            cells = ["none" if value is None else f"{100 * value:.0f}" for value in found.values()]
            images = f"{classes} x {per_class}{'' if balanced else ', as they come'}"
            lines.append(f"| {images} | {kind} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Prints the table, or writes it to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=300, help="test sets for each row (default: %(default)s)")
    parser.add_argument("--to", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    text = "\n".join(rows(arguments.draws)) + "\n"
    if arguments.to:
        arguments.to.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
