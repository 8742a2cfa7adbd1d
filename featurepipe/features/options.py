"""The options of reading and computing images, in groups that each command combines as it needs; imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

from featurepipe.errors import UsageError
from featurepipe.option_groups import (
    LIMITS,
    MACHINE,
    NETWORK,
    READING,
    ROWS,
    OptionGroup,
    at_least,
    is_number,
    is_text,
    not_empty,
    option,
)

if TYPE_CHECKING:
    from featurepipe.images.regions import Boxes

AUTO = "auto"
REJECT, KEEP = DAMAGED = ("reject", "keep")
"""What becomes of a JPEG that libjpeg could only repair."""
_WIDEST_MARGIN = 10
LARGEST_BATCH = 65_536
"""Images that no device takes at once."""
Places = str | PathLike[str] | Sequence[str | PathLike[str]] | None
"""One folder or URL, or several; None for anywhere."""


def places(given: Places) -> tuple[str, ...] | None:
    """One place or several as texts."""
    if given is None:
        return None
    return tuple(os.fspath(place) for place in ([given] if isinstance(given, str | PathLike) else given))


def _batch_size(given: Any) -> str | None:
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if given == AUTO or (is_number(number) and 1 <= number <= LARGEST_BATCH):
        return None
    return f"must be 'auto' or a number from 1 to {LARGEST_BATCH}"


def _device(given: Any) -> str | None:
    if isinstance(given, str) and given != AUTO and given.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {given!r}; choices: auto, cpu, cuda, cuda:N", option="device")
    return is_text(given)


def _margin(given: Any) -> str | None:
    if isinstance(given, bool) or not isinstance(given, int | float):
        return "must be a number"
    return None if 0 <= given <= _WIDEST_MARGIN else f"must be from 0 to {_WIDEST_MARGIN:g}"


def _intensity(given: Any) -> str | None:
    if isinstance(given, str) and given != AUTO:
        from featurepipe.images.intensity import parse_intensity

        parse_intensity(given)
    return is_text(given)


def _decode(given: Any) -> str | None:
    if isinstance(given, str) and given != AUTO:
        from featurepipe.images.scaling import parse_route

        parse_route(given)
    return is_text(given)


def _is_weights_file(given: str) -> bool:
    if "." not in given and "/" not in given:
        return False
    from featurepipe.backbones.weights import is_file_name

    return is_file_name(given)


def _anywhere(_: str) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class SourceNameOption(OptionGroup):
    """What a source is called in a store."""

    purpose: ClassVar[str] = ROWS

    dataset: str | None = option(
        None, "name of the source in the store (default: the source's own name)", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OptionGroup):
    """Which network, and what is kept of it."""

    purpose: ClassVar[str] = NETWORK

    backbone: str = option(
        AUTO,
        "see featurepipe backbones (auto: resnet50, or efficientnet_lite0 where that alone is at hand)",
        metavar="NAME",
    )
    weights: str = option(
        "DEFAULT",
        "a weights enum of torchvision, DEFAULT, a file with the network's tensors (a state dict, checkpoint or "
        ".safetensors, with any head or none), or none: a random control network",
        metavar="NAME|none|FILE", is_path=_is_weights_file,
    )  # fmt: skip
    seed: int = option(0, "of the random control network (default: 0)")
    nodes: tuple[str, ...] = option(
        ("bottleneck",),
        "what to keep, may be repeated; poolings: gap, gmp, gem, avgKxK, maxKxK, flatten, map; all: every block's output, pooled "
        "to 4x4 or less (default: bottleneck:gap)",
        metavar="NODE[:POOLING]", check=not_empty,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SettingOptions(OptionGroup):
    """Settings of the feature space, which may be ``auto``."""

    purpose: ClassVar[str] = NETWORK

    precision: str = option(
        AUTO, "auto: as in the store, else the fastest that agrees with fp32", choices=(AUTO, "fp32", "bf16", "fp16")
    )
    dtype: str = option(
        AUTO, "stored dtype (auto: as in the store, else float16)", choices=(AUTO, "float16", "float32")
    )
    decode: str = option(
        AUTO, "where JPEGs are decoded (auto: as in the store, else cpu); scaled: on the CPU at 1/2, 1/4 or 1/8 of their size, "
        "as long as that is N (default: 2) times the size they are resized to",
        metavar="auto|cpu|gpu|scaled[=N]", check=_decode,
    )  # fmt: skip
    intensity: str = option(
        AUTO, "black and white of images of more than 8 bits (auto: as in the store, else as the files declare; "
        "DICOM: by their window, and other choices in the units of the file)",
        metavar="auto|declared|full|bits=N|window=LO:HI|minmax", check=_intensity,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MirrorOption(OptionGroup):
    """Whether images are mirrored."""

    purpose: ClassVar[str] = NETWORK

    mirrored: bool = option(
        False, "features of the images mirrored left to right, in a feature space of their own: what featurepipe finetune "
        "--augment flip learns from, beside the images as they are"
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MachineOptions(OptionGroup):
    """On what the network runs, and with how much."""

    purpose: ClassVar[str] = MACHINE

    device: str = option(AUTO, "default: cuda where there is one", metavar="auto|cpu|cuda[:N]", check=_device)
    batch_size: int | str = option(
        AUTO, "images per forward (auto: 16 on a CPU, 256 on CUDA, halved when memory runs out)",
        metavar="auto|N", check=_batch_size,
    )  # fmt: skip
    workers: int | None = option(
        None, "threads that read and decode (default: one per CPU, at most 16)", check=at_least(1, 1024)
    )
    engine: str = option(
        AUTO, "what runs fp32 networks on a CPU (auto: as in the store, else OpenVINO where it is installed and 1,000 images "
        "or more are to be computed)",
        choices=(AUTO, "pytorch", "openvino"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SourceOptions(OptionGroup):
    """How a source is opened."""

    purpose: ClassVar[str] = READING

    only_under: tuple[str, ...] | None = option(
        None,
        "read no image that a manifest names, or a link leads to, elsewhere than below this folder, or the URL of one; "
        "may be repeated (default: anywhere)",
        metavar="DIR|URL", is_path=_anywhere,
    )  # fmt: skip
    path_column: str | None = option(
        None, "column of a manifest's paths (default: path, file, filename or image)", metavar="NAME", check=not_empty
    )
    box: str | None = option(
        None,
        "column of a manifest's boxes, each an item of its own: x y w h, or a JSON list; or four columns as x,y,w,h; none: "
        "whole images (default: box or bbox, if there)",
        metavar="COLUMN|X,Y,W,H|none", check=not_empty,
    )  # fmt: skip
    box_unit: str = option(
        "pixels", "boxes are in pixels of the upright image, or shares (0 to 1) of its width and height (default: pixels)",
        choices=("pixels", "share"),
    )  # fmt: skip
    box_margin: float = option(
        0.0, "added to each side of a box, as a share of its longer side (default: 0)", metavar="SHARE", check=_margin
    )

    images: str | None = option(
        None, "folder, its URL, or archive with the images that a manifest or COCO file names (default: beside the file)",
        metavar="DIR|URL|ARCHIVE", check=not_empty, is_path=_anywhere,
    )  # fmt: skip

    frames: str = option(
        "first", "of DICOM files of several frames: the first, or all, each an item of its own (default: first)",
        choices=("first", "all"),
    )  # fmt: skip

    @property
    def boxes(self) -> Boxes:
        """How a source finds its boxes."""
        from featurepipe.images.regions import Boxes  # in here, for it imports NumPy and more

        return Boxes(self.box, "share" if self.box_unit == "share" else "pixels", float(self.box_margin))


@dataclass(frozen=True, kw_only=True)
class DamageOptions(OptionGroup):
    """What becomes of images that lost pixels."""

    purpose: ClassVar[str] = LIMITS

    damaged: str = option(
        REJECT, "JPEGs that lost pixels, as in a broken copy; those kept are listed (default: reject)", choices=DAMAGED
    )

    @property
    def keep_damaged(self) -> bool:
        """Whether JPEGs are kept that libjpeg could only repair."""
        return self.damaged == KEEP


@dataclass(frozen=True, kw_only=True)
class RejectOptions(DamageOptions):
    """What becomes of images that are no good."""

    purpose: ClassVar[str] = LIMITS

    retry_rejects: bool = option(False, "try images again whose bytes were rejected before")


@dataclass(frozen=True, kw_only=True)
class Options(RejectOptions, MachineOptions, SettingOptions, NetworkOptions):
    """How images become features."""
