"""Where do features stop being general? A LeNet-5 learns the digits 0 to 4; its layers then serve other tasks.

    python pipelines/lenet_transfer.py --out transfer [--mnist FOLDER] [--fashion FOLDER] [--tune] [--quick]

A copy of this file is yours to change. It has six steps, in the order in which they run (``main``, at the end):

1. *Images*: handwritten digits, and the tasks to transfer to.
2. *Train* a LeNet-5 on half of the digits 0 to 4 and save its weights: the only training of a network here.
3. *Extract*: the network is frozen; ``fp.extract`` keeps the features of every depth, for the images of every task.
4. *Measure* with a linear head how well each depth tells the classes of each task apart.
5. *Show*: a table, a picture, a JSON file.
6. *Tune*, if ``--tune`` asks for it: is freezing enough? ``fp.routes`` compares, for every task, a head on the frozen network
   with the layers above S4 tuned, all layers tuned, and a network that starts anew.

Everything is repeated with several networks (other initial weights, other order of the images), and with as many networks that
keep their random initial weights. The question is that of Yosinski, Clune, Bengio and Lipson, "How transferable are features
in deep neural networks?", NeurIPS 2014; this is its smallest form: heads on frozen layers, and fine-tuning beside them.

It needs no network and no download: the digits are scikit-learn's, the glyphs are drawn with the fonts that matplotlib ships.
"""
# ruff: noqa: INP001 - a script to copy, no part of the package

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split

import featurepipe as fp
from featurepipe.backbones.packaged import LENET_PREPROCESSING, LeNet5
from featurepipe.heads.statistics.comparison import difference_over_folds, over_folds, over_images
from featurepipe.images import open_source

# ----------------------------------------------------------------------------------------------------------- settings

DEPTHS = ("c1:avg14x14", "s2:flatten", "c3:flatten", "s4:flatten", "c5", "f6", "output")
"""What is kept, from the input's side to the output's: NODE:POOLING, see `featurepipe nodes lenet5`. Maps keep their
positions, or the shallow layers would lose more by pooling than the deep ones; C1's are averaged to S2's size."""

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10",
)  # fmt: skip


LETTERS = "ABCDEFGHJK"
"""As many classes as there are digits; without I, which some fonts draw like 1."""


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        seeds: one trained network and one random network each.
        epochs: times that the training images are seen.
        per_class: at most so many images of a class in each task.
        training: at most so many images of a class to train a network on.
        folds: of the cross-validation that measures a head.
        sizes: images per class that step 6 learns from; ``all`` is four fifths of a task, the rest is tested.
        tuning: epochs of step 6 at most; None for what `featurepipe.routes` takes.
        strengths: C of the logistic heads, on standardised features; each fold takes what suits the layer. One C for all would
            be unfair: with 0.01 the narrow layers learn next to nothing.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 40
    per_class: int = 60
    training: int = 2000
    folds: int = 5
    sizes: tuple[int | str, ...] = (5, "all")
    tuning: int | None = None
    strengths: tuple[float, ...] = (0.001, 0.1, 10.0)


QUICK = Settings(seeds=(0,), epochs=12, per_class=20, folds=3, sizes=("all",), tuning=5)


# ----------------------------------------------------------------------------------------------------------- 1. images


@dataclass(frozen=True)
class Camera:
    """What the digits were taken with; everything else is taken with it, too, so that only what is shown differs.

    Attributes:
        side: pixels of a side.
        fill: the share of a side that a glyph's longer side takes.
    """

    side: int
    fill: float

    def take(self, picture: Image.Image) -> np.ndarray:
        """Returns a grey picture as LeNet-5 sees it, uint8 (32, 32): 28 x 28 pixels, and a margin of 2 as in the paper."""
        coarse = picture.resize((self.side, self.side), Image.Resampling.BOX)
        return np.pad(np.asarray(coarse.resize((28, 28), Image.Resampling.BICUBIC)), 2)


DIGITS_CAMERA = Camera(side=8, fill=1.0)  # scikit-learn's: 8 x 8 pixels, the digit from edge to edge
MNIST_CAMERA = Camera(side=28, fill=20 / 28)


@dataclass(frozen=True)
class Task:
    """Images of one task: uint8 (n, 32, 32), bright on black, and their labels (n,), text."""

    images: np.ndarray
    labels: np.ndarray

    def some(self, per_class: int, seed: int = 0) -> Task:
        """At most ``per_class`` images of each class, drawn at random, in the old order."""
        order = np.random.default_rng(seed).permutation(len(self.labels))
        rows = [order[self.labels[order] == label][:per_class] for label in np.unique(self.labels)]
        keep = np.sort(np.concatenate(rows))
        return Task(self.images[keep], self.labels[keep])

    def of(self, classes: str) -> Task:
        """The images of some classes."""
        keep = np.isin(self.labels, list(classes))
        return Task(self.images[keep], self.labels[keep])


def handwritten_digits() -> Task:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged smoothly."""
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([DIGITS_CAMERA.take(Image.fromarray(image)) for image in grey])
    return Task(images, digits.target.astype(str))


def idx_task(folder: Path, per_class: int, camera: Camera) -> Task:
    """Images from a folder of IDX files (MNIST, Fashion-MNIST), at most ``per_class`` of each class."""
    source = open_source(folder)
    listing = source.scan()
    labels = np.array(listing["label"].to_pylist())
    chosen = Task(np.arange(len(labels)), labels).some(per_class).images  # rows, so that only these are read
    pixels = [np.asarray(source.read(listing["locator"][int(row)].as_py())) for row in chosen]
    source.close()
    return Task(np.stack([camera.take(Image.fromarray(image)) for image in pixels]), labels[chosen])


def glyphs(characters: str, per_class: int, camera: Camera, seed: int) -> Task:
    """Characters drawn with many fonts; font, thickness, size, rotation and place are random, the same for the same seed."""
    rng = np.random.default_rng(seed)
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 64) for name in FONTS]
    labels = [character for character in characters for _ in range(per_class)]
    images = [camera.take(draw_glyph(c, fonts[rng.integers(len(fonts))], camera.fill, rng)) for c in labels]
    return Task(np.stack(images), np.array(labels))


def draw_glyph(
    character: str, font: ImageFont.FreeTypeFont, fill: float, rng: np.random.Generator, side: int = 112
) -> Image.Image:
    """One character, bright on black, in the middle of a square picture, a little moved."""
    canvas = Image.new("L", (192, 192))
    thickness = int(rng.integers(0, 4))
    ImageDraw.Draw(canvas).text((96, 96), character, fill=255, font=font, anchor="mm", stroke_width=thickness)
    glyph = canvas.crop(canvas.getbbox())
    glyph = glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    scale = fill * side / max(glyph.size) * rng.uniform(0.85, 1.0)
    glyph = glyph.resize([max(1, round(scale * length)) for length in glyph.size], Image.Resampling.BICUBIC)
    picture = Image.new("L", (side, side))
    free = np.array([side, side]) - glyph.size
    place = np.round(free / 2 + rng.uniform(-0.04, 0.04, 2) * side).astype(int)
    picture.paste(glyph, (int(place[0]), int(place[1])))
    return picture


def make_tasks(settings: Settings, mnist: Path | None, fashion: Path | None) -> tuple[Task, dict[str, Task]]:
    """Returns the images to train on, and the tasks: the source's own held-out images first, then what to transfer to."""
    n = settings.per_class
    camera = MNIST_CAMERA if mnist else DIGITS_CAMERA
    digits = idx_task(mnist, settings.training + n, camera) if mnist else handwritten_digits()
    low = digits.of("01234")
    train, held_out = train_test_split(np.arange(len(low.labels)), test_size=0.4, random_state=0, stratify=low.labels)
    tasks = {
        "digits 0-4 (source)": Task(low.images[held_out], low.labels[held_out]).some(n),
        "digits 5-9": digits.of("56789").some(n),
        "printed digits 0-4": glyphs("01234", n, camera, seed=1),
        "printed letters": glyphs(LETTERS, n, camera, seed=2),
    }
    if fashion:
        tasks["clothes"] = idx_task(fashion, n, camera)
    return Task(low.images[train], low.labels[train]).some(settings.training), tasks


# ------------------------------------------------------------------------------------------------------------ 2. train


def train_lenet(task: Task, seed: int, epochs: int, batch_size: int = 64) -> LeNet5:
    """A plain PyTorch loop. Only the first five of the ten outputs are ever right."""
    torch.manual_seed(seed)
    network = LeNet5()
    images = LENET_PREPROCESSING.normalise(torch.from_numpy(task.images)[:, None])  # the same as in extraction
    labels = torch.from_numpy(task.labels.astype(np.int64))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(batch_size):
            loss = torch.nn.functional.cross_entropy(network(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval()


def own_accuracy(network: LeNet5, task: Task) -> float:
    """How often the network itself names the images rightly, without any head of ours."""
    with torch.inference_mode():
        logits = network(LENET_PREPROCESSING.normalise(torch.from_numpy(task.images)[:, None]))
    return float(np.mean(logits.argmax(1).numpy().astype(str) == task.labels))


# ---------------------------------------------------------------------------------------------------------- 3. extract


def extract_tasks(tasks: dict[str, Task], out: Path, weights: str, seed: int) -> str:
    """Keeps the features of every depth for every task in ``out/store``; returns the fingerprint of their feature space.

    Weights are those of a file, or ``none`` for a network that keeps the initial weights of ``seed``. The network is frozen
    either way, and features that the store holds from an earlier call are not computed again.
    """
    for name, task in tasks.items():
        file = out / "images" / f"{dataset_name(name)}.npz"
        file.parent.mkdir(exist_ok=True)
        np.savez_compressed(file, images=task.images, labels=task.labels)  # an image source like any other
        run = fp.extract(
            file,
            out / "store",
            dataset=dataset_name(name),
            backbone="lenet5",
            weights=weights,
            seed=seed,
            nodes=DEPTHS,
            precision="fp32",
            silent=True,
        )
    return str(run["fingerprint"])


def dataset_name(task: str) -> str:
    """``digits 0-4 (source)`` -> ``digits-0-4-source``."""
    return "-".join("".join(c if c.isalnum() else " " for c in task).split())


# ---------------------------------------------------------------------------------------------------------- 4. measure


def head_accuracies(x: np.ndarray, y: np.ndarray, settings: Settings, seed: int) -> tuple[list[float], np.ndarray]:
    """Accuracy of a linear head on each fold of a cross-validation that is the same for all depths, and which images are right.

    In every fold a fifth of the training images chooses C, and the head is fitted again on all of them: test images choose
    nothing.
    """
    accuracies, right = [], np.zeros(len(y), bool)
    folds = StratifiedKFold(settings.folds, shuffle=True, random_state=seed)
    for train, test in folds.split(x, y):
        fit, choose = train_test_split(train, test_size=0.2, random_state=seed, stratify=y[train])
        heads = {strength: fp.make_head("logistic", C=strength) for strength in settings.strengths}
        chosen = max(heads, key=lambda strength: heads[strength].fit(x[fit], y[fit]).score(x[choose], y[choose]))
        right[test] = heads[chosen].fit(x[train], y[train]).predict(x[test]) == y[test]
        accuracies.append(float(right[test].mean()))
    return accuracies, right


def measure(
    store: fp.FeatureStore, spaces: dict[str, list[str]], tasks: dict[str, Task], settings: Settings
) -> list[dict[str, Any]]:
    """One row per task, kind of network and depth: accuracy over all folds and seeds, with its 95 % interval."""
    curves = []  # what is measured: (task, network, depth), and for each seed something that gives features and labels
    for name, task in tasks.items():
        pixels = (task.images.reshape(len(task.images), -1), task.labels)
        curves.append((name, "none", "pixels", [pixels for _ in settings.seeds]))
        for kind, fingerprints in spaces.items():
            for depth in DEPTHS:
                views = [store.features(dataset_name(name), node=depth, backbone=space) for space in fingerprints]
                curves.append((name, kind, depth, [view.numpy() for view in views]))
    with parallel_config("loky", n_jobs=-1, inner_max_num_threads=1):  # in fits this small threads wait for each other
        found = Parallel()(
            delayed(head_accuracies)(x, y, settings, seed)
            for *_, features in curves
            for (x, y), seed in zip(features, settings.seeds, strict=True)
        )
    rows = []
    for number, (name, kind, depth, _) in enumerate(curves):
        cells, right = zip(*found[number * len(settings.seeds) : (number + 1) * len(settings.seeds)], strict=True)
        # Folds share training images, so that their spread alone would make the interval too narrow: see `over_folds`. And
        # a few folds may agree by chance, where so many images cannot be as sure: the wider of both intervals counts.
        accuracy = over_folds(np.concatenate(cells), test_to_train=1 / (settings.folds - 1))
        wider = max(accuracy, over_images(np.stack(right)), key=lambda one: one.high - one.low)
        interval = {"accuracy": accuracy.value, "low": wider.low, "high": wider.high}
        rows.append({"task": name, "network": kind, "depth": depth, **interval, "cells": cells})
    return rows


# ------------------------------------------------------------------------------------------------------------- 5. show


def find(rows: list[dict[str, Any]], task: str, network: str) -> list[dict[str, Any]]:
    """The rows of one curve, in order of depth."""
    return [row for row in rows if row["task"] == task and row["network"] == network]


def table(rows: list[dict[str, Any]], tasks: Sequence[str]) -> str:
    """Accuracy in per cent, trained network (random network), a line per depth and a column per task."""
    width = max(map(len, tasks)) + 2
    lines = ["accuracy of a linear head in %, +- half its 95 % interval; in brackets on the random network's features"]
    lines.append("depth       " + "".join(task.rjust(width) for task in tasks))
    for depth in ("pixels", *DEPTHS):
        cells = []
        for task in tasks:
            here = {row["network"]: row for row in rows if row["task"] == task and row["depth"] == depth}
            row = here.get("trained") or here["none"]
            text = f"{100 * row['accuracy']:.1f} +-{50 * (row['high'] - row['low']):.1f}"
            cells.append(f"{text} ({100 * here['random']['accuracy']:.1f})" if "random" in here else f"{text}       ")
        lines.append(layer(depth).ljust(12) + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)


def first_worse(curve: list[dict[str, Any]], folds: int) -> int:
    """Position of the depth from which on all are worse than the best one; as many as there are depths if there is none.

    Worse means that the 95 % interval of the difference, paired over the same folds and networks, lies below 0.
    """
    best = np.concatenate(max(curve, key=lambda row: row["accuracy"])["cells"])
    for position in reversed(range(len(curve))):
        difference = difference_over_folds(np.concatenate(curve[position]["cells"]), best, 1 / (folds - 1))
        if difference.high is None or difference.high >= 0:
            return position + 1
    return 0


def findings(rows: list[dict[str, Any]], tasks: Sequence[str], folds: int) -> list[str]:
    """One sentence per task: the best depth, where the features stop being general, and what the random network does there."""
    sentences = []
    for task in tasks:
        trained, random = find(rows, task, "trained"), find(rows, task, "random")
        best = max(trained, key=lambda row: row["accuracy"])
        end = first_worse(trained, folds)
        where = f"from {layer(trained[end]['depth'])} on worse" if end < len(trained) else "no depth is clearly worse"
        sentences.append(
            f"{task}: best at {layer(best['depth'])} ({100 * best['accuracy']:.1f} %), {where}; output "
            f"{100 * trained[-1]['accuracy']:.1f} % (random network {100 * random[-1]['accuracy']:.1f} %)"
        )
    return sentences


def layer(depth: str) -> str:
    """``c1:avg14x14`` -> ``c1``."""
    return depth.partition(":")[0]


def draw(rows: list[dict[str, Any]], tasks: Sequence[str], folds: int, path: Path) -> None:
    """Accuracy over depth, a panel per task, all on one scale."""
    names = [layer(depth) for depth in DEPTHS]
    figure = Figure(figsize=(3.1 * len(tasks) + 0.6, 4.3), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for network, colour, style in (("trained", "#0b57d0", "o-"), ("random", "#80868b", "s--")):
            curve = find(rows, task, network)
            low, middle, high = (np.array([100 * row[key] for row in curve]) for key in ("low", "accuracy", "high"))
            panel.plot(names, middle, style, color=colour, markersize=4, label=f"{network} network")
            panel.fill_between(names, low, high, color=colour, alpha=0.15, linewidth=0)
            if network == "trained":
                best = int(middle.argmax())
                panel.plot(
                    best, middle[best], "o", markersize=11, markerfacecolor="none", color=colour, label="its best depth"
                )
        end = first_worse(find(rows, task, "trained"), folds)
        if end < len(names):
            panel.axvspan(
                end - 0.5, len(names) - 0.5, color="#b3261e", alpha=0.07, linewidth=0, label="worse than the best depth"
            )
        pixels = 100 * find(rows, task, "none")[0]["accuracy"]
        panel.axhline(pixels, color="#b06000", linewidth=1, linestyle=":", label="pixels, no network")
        panel.set_title(task, fontsize=11, fontweight="bold")
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy of a linear head, %")
    figure.suptitle(
        "LeNet-5 trained on handwritten digits 0-4, then frozen: what each of its layers is worth for other tasks"
    )
    figure.supxlabel("layer, from the input's side to the output's; bands: 95 % intervals", fontsize=10)
    panels[-1].legend(loc="lower left", fontsize=8, frameon=False)
    figure.savefig(path)


def contact_sheet(tasks: dict[str, Task], path: Path, columns: int = 24) -> None:
    """Some images of every task, a row each, so that one sees what is compared."""
    lines = []
    for task in tasks.values():
        rows = np.random.default_rng(0).permutation(len(task.images))[:columns]
        lines.append(np.hstack(list(task.images[np.sort(rows)])))
    Image.fromarray(np.vstack(lines)).resize((columns * 64, len(lines) * 64), Image.Resampling.NEAREST).save(path)


# ------------------------------------------------------------------------------------------------------------- 6. tune

ROUTES = ("bottleneck", "tail", "full", "scratch")
"""A head on the frozen F6; layers above S4 tuned from stored activations; all layers tuned; all learned from random weights."""


def tuned_routes(tasks: dict[str, Task], out: Path, weights: Path, settings: Settings) -> list[dict[str, Any]]:
    """What each route reaches for each task, one row per task, size and route; all of a task are tested on the same images.

    Everything that is measured is kept in ``out/routes``, so that a run that was stopped goes on.
    """
    rows = []
    for name in tasks:
        found = fp.routes(
            out / "images" / f"{dataset_name(name)}.npz",
            out / "routes",
            dataset=dataset_name(name),
            backbone="lenet5",
            weights=str(weights),
            routes=ROUTES,
            cuts=("s4",),
            sizes=settings.sizes,
            seeds=len(settings.seeds),
            epochs=settings.tuning,
            extraction={"precision": "fp32"},
            silent=True,
        )
        chosen = {one["size"]["size"]: one["route"] for one in found["recommended"]["by_size"]}
        for entry in found["results"]:
            value = {key: entry[key] for key in ("size", "images", "accuracy", "low", "high", "seconds")}
            recommended = entry["route"] == chosen[entry["size"]]
            rows.append({"task": name, "route": entry["kind"], **value, "recommended": recommended})
    return rows


def routes_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in per cent, a line per task and number of images, a column per route; the recommended one has a star."""
    lines = ["what to do with the network: accuracy in %, * is the cheapest within one standard error of the best"]
    width = max(len(row["task"]) for row in rows) + 2
    lines.append("task".ljust(width) + "images".rjust(8) + "".join(route.rjust(13) for route in ROUTES))
    for task, images in dict.fromkeys((row["task"], row["images"]) for row in rows):
        here = {row["route"]: row for row in rows if (row["task"], row["images"]) == (task, images)}
        cells = [
            f"{100 * here[route]['accuracy']:.1f}{'*' if here[route]['recommended'] else ' '}"
            if route in here
            else "- "
            for route in ROUTES
        ]
        lines.append(task.ljust(width) + f"{images:,.0f}".rjust(8) + "".join(cell.rjust(13) for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the steps and returns what ``result.json`` holds."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, features and results")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's IDX files, instead of scikit-learn's digits")
    parser.add_argument("--fashion", type=Path, help="folder with Fashion-MNIST's IDX files, as a further task")
    parser.add_argument(
        "--tune", action="store_true", help="compare with tuned networks, too: minutes (needs featurepipe[tune])"
    )
    parser.add_argument("--quick", action="store_true", help="few images, one network: seconds, to see that it works")
    args = parser.parse_args(arguments)
    settings = QUICK if args.quick else Settings()
    args.out.mkdir(parents=True, exist_ok=True)

    train, tasks = make_tasks(settings, args.mnist, args.fashion)
    contact_sheet(tasks, args.out / "images.png")
    for name, task in tasks.items():
        print(f"{name}: {len(task.labels)} images, {len(np.unique(task.labels))} classes")

    networks, spaces = [], {"trained": [], "random": []}
    for seed in settings.seeds:
        network = train_lenet(train, seed, settings.epochs)
        file = args.out / f"lenet5-seed{seed}.pth"
        torch.save(network.state_dict(), file)
        before = fp.load_backbone("lenet5", str(file)).weights_sha256
        spaces["trained"].append(extract_tasks(tasks, args.out, str(file), seed))
        spaces["random"].append(extract_tasks(tasks, args.out, "none", seed))
        after = fp.FeatureStore(args.out / "store").space(spaces["trained"][-1]).fields["weights_sha256"]
        accuracy = own_accuracy(network, next(iter(tasks.values())))
        networks.append(
            {"seed": seed, "weights": file.name, "accuracy": accuracy, "sha256": before, "sha256_of_features": after}
        )
        print(
            f"network {seed}: trained on {len(train.labels)} digits 0-4, names {100 * accuracy:.1f} % of held-out ones rightly"
        )

    rows = measure(fp.FeatureStore(args.out / "store"), spaces, tasks, settings)
    print("\n" + table(rows, list(tasks)) + "\n\n" + "\n".join(findings(rows, list(tasks), settings.folds)))
    draw(rows, list(tasks), settings.folds, args.out / "transfer.png")
    result = {"settings": asdict(settings), "networks": networks, "depths": list(DEPTHS), "results": rows}
    if args.tune:
        result["routes"] = tuned_routes(tasks, args.out, args.out / networks[0]["weights"], settings)
        print("\n" + routes_table(result["routes"]))
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"\npicture: {args.out / 'transfer.png'}  images: {args.out / 'images.png'}  numbers: {args.out / 'result.json'}"
    )
    return result


if __name__ == "__main__":
    main()
