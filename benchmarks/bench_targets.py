"""Classes, several labels and a number on real pictures, with images of one idea kept together: what frozen features give.

``python -m benchmarks.bench_targets --emoji FOLDER`` with ``FOLDER/{google,apple}/CATEGORY/CODEPOINTS.png``, as the packages
``emoji-datasource-google`` and ``-apple`` have them (MIT licence; Apple's drawings are Apple's, and only measured).

Heads learn from Google's drawings, and are tested on those of other emoji, then on Apple's drawings of all emoji.

- *class*: the category, one of nine.
- *several labels*: what the Unicode names of an emoji's characters say: face, woman, man, hand, heart, arrow, clock, square; and
  whether the category is flags, animals or food.
- *number*: the mean luma (0 to 255, ITU-R BT.601) of the pixels that are more than half opaque.
- *groups*: an emoji drawn for a man, a woman and a person is one idea. ``without groups`` shows what a test says that deals
  those to both sides.

All choices are made on validation images. ``--tiny`` runs on thirty pictures that it draws itself.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import featurepipe as fp
from benchmarks import record

NAMED = {
    "face": {"FACE"},
    "woman": {"WOMAN", "FEMALE"},
    "man": {"MAN", "MALE"},
    "hand": {"HAND", "HANDS", "FIST", "FINGER", "FINGERS", "THUMBS"},
    "heart": {"HEART", "HEARTS"},
    "arrow": {"ARROW", "ARROWS"},
    "clock": {"CLOCK"},
    "square": {"SQUARE", "SQUARED"},
}
OF_CATEGORY = {"flag": "flags", "animal": "animals-and-nature", "food": "food-and-drink"}
LABELS = (*NAMED, *OF_CATEGORY)
PERSONS, GENDERS = {0x1F468, 0x1F469, 0x1F9D1}, {0x2640, 0x2642, 0x200D, 0xFE0F}
HEADS = {"class": "logistic", "several labels": "logistic", "number": "ridge"}


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """A row of the manifest for each picture."""
    for path in sorted(folder.glob("*/*.png")):
        codes = [int(code, 16) for code in path.stem.split("-")]
        words = {word for code in codes for word in unicodedata.name(chr(code), "").split()}
        idea = "-".join("person" if code in PERSONS else f"{code:x}" for code in codes if code not in GENDERS)
        pixels = np.asarray(Image.open(path).convert("RGBA"), np.float64)
        opaque = pixels[..., 3] > 127
        luma = (pixels[..., :3] @ [0.299, 0.587, 0.114])[opaque]
        yield {
            "path": str(path.resolve()),
            "id": f"{path.parent.name}/{path.name}",
            "label": path.parent.name,
            "idea": idea,
            "luma": round(float(luma.mean()), 3) if opaque.any() else "",
            **{label: int(bool(words & wanted)) for label, wanted in NAMED.items()},
            **{label: int(path.parent.name == category) for label, category in OF_CATEGORY.items()},
        }


def write_manifest(folder: Path, file: Path) -> Path:
    """The manifest of a folder of one style."""
    rows = list(rows_of(folder))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extracts both styles, and trains and tests each kind of target."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        emoji = drawn(folder / "emoji") if args.tiny else Path(args.emoji)
        store = folder / "store"
        for style in ("google", "apple"):
            manifest = write_manifest(emoji / style, folder / f"{style}.csv")
            fp.extract(
                manifest,
                store,
                dataset=style,
                backbone=args.backbone,
                weights=args.weights,
                nodes=[args.node],
                silent=True,
            )
        labels = [label for label in LABELS if args.tiny is False or label in ("flag", "animal")]
        targets: dict[str, dict[str, Any]] = {
            "class": {},
            "several labels": {"multilabel": labels},
            "number": {"target": "luma"},
        }
        found = {}
        for kind, roles in targets.items():
            for name, group in (("by group", "idea"), ("without groups", "none")):
                found[f"{kind}, {name}"] = tested(
                    store, folder / "bundle", args, HEADS[kind], {**roles, "group": group}
                )
                record.note(f"{kind}, {name}: {found[f'{kind}, {name}']}")
    return {"backbone": args.backbone, "weights": args.weights, "node": args.node, "labels": labels, "results": found}


def tested(store: Path, bundle: Path, args: argparse.Namespace, head: str, roles: dict[str, Any]) -> dict[str, Any]:
    """The measures on held-out drawings of one style, and on the other style's drawings of the same held-out emoji and others."""
    trained = fp.train(
        store, dataset="google", nodes=args.node, head=head, out=bundle, tune=not args.tiny, silent=True, **roles
    )
    other = fp.evaluate(bundle, store, dataset="apple", split="all", silent=True, **roles)
    return {"held out": measures(trained["test"]), "other style": measures(other["metrics"])}


def measures(found: dict[str, Any]) -> dict[str, Any]:
    """The measures that have a value, with their intervals."""
    return {name: one for name, one in found.items() if isinstance(one, dict) and one.get("value") is not None}


def drawn(folder: Path) -> Path:
    """Pictures that are no emoji, so that nothing has to be fetched for a look at whether this works."""
    rng = np.random.default_rng(0)
    for style in ("google", "apple"):
        for number in range(30):
            category = ("flags", "animals-and-nature", "objects")[number % 3]
            path = folder / style / category / f"{0x1F300 + number:x}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((32, 32, 4), 255, np.uint8)
            pixels[..., :3] = rng.integers(0, 255, (32, 32, 3)) // (1 + number % 3)
            Image.fromarray(pixels).save(path)
    return folder


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of this benchmark."""
    parser.add_argument("--emoji", help="the folder with google/ and apple/")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--node", default="blocks.10")


if __name__ == "__main__":
    record.main("bench_targets", __doc__ or "", add, run)
