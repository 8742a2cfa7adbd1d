"""How often intervals hold the truth: ``python -m benchmarks.interval_coverage [--of KIND] [--draws N] [--to FILE]``.

Of classes (``score_table``), numbers (``number_table``), several labels (``label_table``), or the layers that ``depth`` compares.
Test sets are drawn from heads whose true scores are known from 200,000 images or more of the same kind. Classifiers guess
nearly always or are nearly always right, calibrated and overconfident, with one to 250 images a class, as many of each class or
as they come.
Prints a table of the share of test sets whose interval holds the truth; 95 % is nominal, 90 % the least that we accept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from featurepipe.heads.statistics.comparison import ACCURACY
from featurepipe.heads.statistics.metrics import score_table
from featurepipe.heads.statistics.multilabel import label_table
from featurepipe.heads.statistics.regression import number_table
from featurepipe.layer_depth.answers import difference, estimate

MEASURES = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "log_loss", "ece")
SETTINGS = [  # classes, images a class, balanced
    (2, 3, True), (2, 10, True), (5, 1, True), (20, 1, True), (20, 2, False), (20, 5, False), (10, 20, True), (100, 1, True),
    (100, 5, True), (4, 250, True),
]  # fmt: skip
KINDS = {"hard": (1.0, 1.0), "usual": (3.0, 1.0), "easy, overconfident": (6.0, 2.0)}  # strength, inverse temperature
_TRUTH = 200_000
_RESAMPLES = 400

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
        table = score_table(likely, codes, names, bootstrap=_RESAMPLES, seed=draw, mistakes=0)
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


NUMBER_MEASURES = ("mae", "rmse", "r2", "spearman", "quadratic_kappa")
NUMBER_SIZES = (10, 30, 100)
NOISES = {"R2 0.3": (1.53, 0), "R2 0.9": (0.33, 0), "R2 0.9, heavy tails": (0.19, 3)}  # deviation, degrees of freedom
_GRADES = 4  # either side of 0


def numbers(rng: np.random.Generator, count: int, noise: str) -> tuple[Array, Array]:
    """Predictions and true numbers of so many images."""
    deviation, freedom = NOISES[noise]
    true = rng.normal(size=count)
    off = rng.standard_t(freedom, count) if freedom else rng.normal(size=count)
    return np.asarray(true + deviation * off), true


def coverage_of_numbers(count: int, noise: str, *, draws: int, seed: int = 0) -> dict[str, float | None]:
    """As ``coverage``, for regression; the kappa is that of the numbers as grades, from -4 to 4 at intervals of a half."""

    def table(predicted: Array, true: Array, resamples: int, number: int) -> dict[str, dict[str, float]]:
        grades = np.clip(np.rint(2 * true), -_GRADES, _GRADES), np.clip(np.rint(2 * predicted), -_GRADES, _GRADES)
        options = {"bootstrap": resamples, "seed": number, "mistakes": 0, "plots": False}
        found = number_table(predicted, true, **options)
        return {**found, "quadratic_kappa": number_table(grades[1], grades[0], **options)["quadratic_kappa"]}

    rng = np.random.default_rng(seed)
    whole = table(*numbers(rng, _TRUTH, noise), 0, 0)
    return _held(whole, NUMBER_MEASURES, (table(*numbers(rng, count, noise), _RESAMPLES, k) for k in range(draws)))


LABEL_MEASURES = ("map", "map_11_point", "auc", "macro_f1", "micro_f1")
LABEL_SIZES = (60, 200)
STRENGTHS = {"hard": 1.0, "usual": 2.5, "easy": 5.0}
PREVALENCE = (0.1, 0.2, 0.3, 0.4, 0.5)


def several_labels(rng: np.random.Generator, count: int, strength: float) -> tuple[Array, Array]:
    """Scores, whose threshold is 0, and true labels (n, 5) of so many images; the labels go together."""
    common = rng.normal(size=(count, 1))
    true = (0.5 * common + rng.normal(size=(count, len(PREVALENCE))) * 0.75**0.5) < norm.ppf(PREVALENCE)
    odds = np.log(np.divide(PREVALENCE, np.subtract(1, PREVALENCE)))
    return strength * (true - 0.5) + rng.normal(size=true.shape) + odds / strength, true.astype(np.float64)


def coverage_of_labels(count: int, kind: str, *, draws: int, seed: int = 0) -> dict[str, float | None]:
    """As ``coverage``, for five labels that 10 to 50 % of the images have.

    The 11-point rule takes the precision at full recall, which falls without end as images are added: what its intervals should
    hold is the mean of test sets of the same size.
    """
    rng, names = np.random.default_rng(seed), [str(k) for k in range(len(PREVALENCE))]

    def table(count: int, resamples: int, number: int) -> dict[str, dict[str, float]]:
        scores, true = several_labels(rng, count, STRENGTHS[kind])
        return label_table(scores, true, names, bootstrap=resamples, seed=number, mistakes=0, plots=False)

    whole = table(_TRUTH, 0, 0)
    tables = [table(count, _RESAMPLES, k) for k in range(draws)]
    whole["map_11_point"] = {"value": float(np.mean([one["map_11_point"]["value"] for one in tables]))}
    return _held(whole, LABEL_MEASURES, tables)


def _held(
    whole: Mapping[str, Mapping[str, float]],
    measures: Sequence[str],
    tables: Iterable[Mapping[str, Mapping[str, float | None]]],
) -> dict[str, float | None]:
    """The share of tables whose interval holds the value of the whole, for each measure."""
    held: dict[str, list[bool]] = {name: [] for name in measures}
    for table in tables:
        for name in measures:
            low, high = table[name]["low"], table[name]["high"]
            if low is not None and high is not None:
                held[name].append(low - 1e-9 <= whole[name]["value"] <= high + 1e-9)
    return {name: float(np.mean(found)) if found else None for name, found in held.items()}


LAYER_MEASURES = ("accuracy", "difference", "no difference")
LAYER_SIZES = (40, 200, 1000)
LAYER_PROTOCOLS: dict[str, tuple[int | None, int]] = {
    "5 folds": (5, 1), "5 folds, 3 times": (5, 3), "one split": (None, 1),
}  # fmt: skip
_LAYER_CLASSES, _LAYER_WIDTH, _FIFTHS = 4, 16, 5
_LAYER_STRENGTHS = (0.5, 0.42, 0.5)  # of the first layer, one that is worse, and another that is as good
_TRUE_HEADS, _TRUE_TEST = 300, 4000


def layers(rng: np.random.Generator, count: int) -> tuple[list[Array], Codes]:
    """Three layers' features (n, 16) of so many images of four classes; half of their noise is common to all three."""
    codes = rng.integers(0, _LAYER_CLASSES, count)
    common = rng.normal(size=(count, _LAYER_WIDTH))
    centres = np.eye(_LAYER_CLASSES, _LAYER_WIDTH) * _LAYER_WIDTH**0.5
    noise = [(common + rng.normal(size=common.shape)) * 0.5**0.5 for _ in _LAYER_STRENGTHS]
    return [strength * centres[codes] + own for strength, own in zip(_LAYER_STRENGTHS, noise, strict=True)], codes


def _hits(features: Array, codes: Codes, train: Codes, test: Codes) -> Array:
    """Which test rows a ridge classifier is right about."""
    rows = np.column_stack([features, np.ones(len(features))])
    seen = rows[train]
    weights = np.linalg.solve(seen.T @ seen + np.eye(rows.shape[1]), seen.T @ np.eye(_LAYER_CLASSES)[codes[train]])
    return np.asarray((rows[test] @ weights).argmax(axis=1) == codes[test], np.float64)


def coverage_of_layers(count: int, protocol: str, *, draws: int, seed: int = 0) -> dict[str, float | None]:
    """As ``coverage``, for what ``depth`` says of so many images: an accuracy, a difference, and one that is none.

    What intervals should hold is the mean accuracy, on images without number, of heads that learn from as many images.
    """
    rng = np.random.default_rng(seed)
    folds, repeats = LAYER_PROTOCOLS[protocol]
    train = count - count // _FIFTHS

    def true_hits() -> list[float]:
        features, codes = layers(rng, train + _TRUE_TEST)
        places = np.split(np.arange(len(codes)), [train])
        return [float(_hits(one, codes, *places).mean()) for one in features]

    mean = np.mean([true_hits() for _ in range(_TRUE_HEADS)], axis=0)
    truth = {"accuracy": mean[0], "difference": mean[0] - mean[1], "no difference": 0.0}
    whole = {name: {"value": float(value)} for name, value in truth.items()}

    def table() -> dict[str, dict[str, float | None]]:
        features, codes = layers(rng, count)
        tests = [part for _ in range(repeats) for part in np.array_split(rng.permutation(count), _FIFTHS)]
        parts = [SimpleNamespace(test=test) for test in (tests if folds else tests[:1])]
        study: Any = SimpleNamespace(
            measure=ACCURACY, protocol=SimpleNamespace(folds=folds), folds=parts, images=codes, units=np.arange(count)
        )
        study.test_share = 1 / (_FIFTHS - 1)
        series: list[Any] = []
        for one in features:
            hits = [_hits(one, codes, np.setdiff1d(np.arange(count), part.test), part.test) for part in parts]
            series.append(SimpleNamespace(cells=[SimpleNamespace(contributions=h, value=h.mean()) for h in hits]))
        found = (estimate(study, series[0]), difference(study, *series[:2]), difference(study, series[0], series[2]))
        return {name: {"low": one.low, "high": one.high} for name, one in zip(LAYER_MEASURES, found, strict=True)}

    return _held(whole, LAYER_MEASURES, (table() for _ in range(draws)))


def rows_of(kind: str, draws: int) -> list[str]:
    """The table of numbers, several labels or layers in Markdown."""
    title, measures, sizes, kinds, covered = {
        "numbers": ("noise", NUMBER_MEASURES, NUMBER_SIZES, tuple(NOISES), coverage_of_numbers),
        "labels": ("scores", LABEL_MEASURES, LABEL_SIZES, tuple(STRENGTHS), coverage_of_labels),
        "layers": ("protocol", LAYER_MEASURES, LAYER_SIZES, tuple(LAYER_PROTOCOLS), coverage_of_layers),
    }[kind]
    lines = [f"| images | {title} | {' | '.join(name.replace('_', ' ') for name in measures)} |"]
    lines.append("|---" * (2 + len(measures)) + "|")
    for count in sizes:
        for one in kinds:
            found = covered(count, one, draws=draws)
            cells = ["none" if value is None else f"{100 * value:.0f}" for value in found.values()]
            lines.append(f"| {count} | {one} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Prints the table, or writes it to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--of", choices=["classes", "numbers", "labels", "layers"], default="classes", help="(default: %(default)s)"
    )
    parser.add_argument("--draws", type=int, default=300, help="test sets for each row (default: %(default)s)")
    parser.add_argument("--to", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    lines = rows(arguments.draws) if arguments.of == "classes" else rows_of(arguments.of, arguments.draws)
    text = "\n".join(lines) + "\n"
    if arguments.to:
        arguments.to.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
