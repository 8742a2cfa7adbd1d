"""Images as layers are tuned on them: read in any order, and changed at random (data augmentation)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.features.loader import Loaded, Loader, StageSeconds
from featurepipe.features.session import Decoding, decoder_for
from featurepipe.images import Source
from featurepipe.tuning.loop import Draw
from featurepipe.tuning.objective import Rows

SCALE = (0.35, 1.0)
"""Share of an image's area that a random crop shows."""
RATIO = (3 / 4, 4 / 3)
"""Width to height of a random crop."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images in training, by torchvision's v2 transforms.

    What is drawn follows from the seed, the epoch and the row alone, so that neither threads nor a kill change anything. A crop
    is drawn as ``RandomResizedCrop`` does (Szegedy et al., "Going deeper with convolutions", CVPR 2015).

    Attributes:
        crops: Show a part of the image, of 35 to 100 % of its area, at the network's size.
        flips: Mirror every other image left to right.
        preprocessing: The network's own; without crops, its own resize and crop are taken.
    """

    crops: bool
    flips: bool
    preprocessing: Preprocessing

    @classmethod
    def of(cls, asked: str | None, preprocessing: Preprocessing) -> Augmentation:
        """What an option ``augment`` asks for."""
        names = (asked or "crop").split(",")
        return cls("crop" in names, "flip" in names, preprocessing)

    def about(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        crop = {"scale": list(SCALE), "ratio": [round(value, 4) for value in RATIO]} if self.crops else None
        return {"random_resized_crop": crop, "horizontal_flip": 0.5 if self.flips else 0, "text": self.text}

    @property
    def text(self) -> str:
        """The recipe in words."""
        names = [f"crops of {SCALE[0]:.0%} to {SCALE[1]:.0%}"] * self.crops + ["flips"] * self.flips
        return " and ".join(names) or "no augmentation"

    def __call__(self, image: Tensor, row: int, draw: Draw) -> Tensor:
        """The network's input, uint8 (C, h, w), of a decoded image, uint8 (C, H, W)."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        wanted, random = self.preprocessing, np.random.default_rng([*draw, row])
        if self.crops:
            top, left, height, width = random_crop(image.shape[-2], image.shape[-1], random)
            image = functional.resized_crop(
                image, top, left, height, width, list(wanted.crop),
                interpolation=InterpolationMode(wanted.interpolation), antialias=wanted.antialias,
            )  # fmt: skip
        else:
            image = wanted.resize_crop(image)
        return functional.horizontal_flip(image) if self.flips and random.random() < 0.5 else image


def random_crop(height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of an image; the whole, as far as its shape allows, if ten draws do not fit."""
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        ratio = np.exp(random.uniform(np.log(RATIO[0]), np.log(RATIO[1])))
        tall, wide = max(1, round(np.sqrt(area / ratio))), max(1, round(np.sqrt(area * ratio)))
        if tall <= height and wide <= width:
            return int(random.integers(height - tall + 1)), int(random.integers(width - wide + 1)), tall, wide
    tall, wide = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - tall) // 2, (width - wide) // 2, max(1, tall), max(1, wide)


@dataclass
class ImageExamples:
    """Images by row of the task, read and decoded as ``extract`` does, with the same budgets.

    Attributes:
        source: Where they are.
        listing: ``id``, ``locator`` and ``size`` of each row.
        keys: (n, 32) what each row's key was when it was extracted.
        preprocessing: The network's.
        augmentation: What changes images in training.
        decoding: How bytes become pixels.
        workers: Threads.
        lost: Why rows could not be read, by row.
    """

    source: Source
    listing: pa.Table
    keys: npt.NDArray[np.uint8]
    preprocessing: Preprocessing
    augmentation: Augmentation
    decoding: Decoding
    workers: int
    lost: dict[int, str] = field(default_factory=dict)
    scored: ClassVar[int] = 32

    def release(self) -> None:
        """Holds nothing."""

    def batches(self, parts: Sequence[Rows], draw: Draw | None = None) -> Iterator[tuple[Tensor, Rows]]:
        """Images of each part of the rows, uint8 (m, C, h, w), loaded ahead by threads; those that cannot be read are left out.

        Raises:
            SourceError: Nothing can be read any more.
        """
        if not parts:
            return

        def prepare(pixels: Tensor, row: int) -> Tensor:
            return self.preprocessing.resize_crop(pixels) if draw is None else self.augmentation(pixels, row, draw)

        loader = Loader(
            self.source, lambda _: ("image",), decoder_for(self.decoding, self.preprocessing, "cpu"), prepare,
            clock=StageSeconds(), workers=self.workers, window=4 * max(map(len, parts)),
        )  # fmt: skip
        with closing(loader.load(self.listing, np.concatenate(parts))) as loaded:
            images = chain.from_iterable(loaded)
            for part in parts:
                usable = [image for _, image in zip(part, images, strict=False) if self._is_usable(image)]
                yield self._stacked(usable), np.array([image.row for image in usable], np.int64)

    def _stacked(self, images: Sequence[Loaded]) -> Tensor:
        pixels = [image.pixels for image in images if image.pixels is not None]
        return torch.stack(pixels) if pixels else torch.zeros((0, *self.preprocessing.input_shape), dtype=torch.uint8)

    def _is_usable(self, image: Loaded) -> bool:
        if image.reason is None and image.key != self.keys[image.row].tobytes():
            image.reason = "its bytes are others than when it was extracted"
        if image.reason is not None:
            self.lost[image.row] = image.reason
        return image.reason is None
