"""Preprocessing: what the weights expect an image to look like. It belongs to the weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from featurepipe.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Colour = Literal["rgb", "grey"]
CHANNELS: dict[str, int] = {"rgb": 3, "grey": 1}
LONGEST_STRIP = 32  # sides beyond 32 to 1 are resized one by one, or an image one pixel high would need gigabytes
STRIP_BYTES = 64 * 1024 * 1024
"""What a strip may take once its long side is resized; the ends of a longer one, which no crop shows, are cut first."""
_WEIGHT_BYTES = 64  # of the resizing kernel's tables for each row or column that it makes, about
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalisation of one set of weights.

    Attributes:
        resize: Pixels of the shorter side after resizing, or (height, width) whatever the image's proportions.
        crop: (height, width) of the centre crop that the network sees; smaller images are padded with zeros.
        interpolation: ``bilinear``, ``bicubic``, ``nearest`` or ``nearest-exact``.
        antialias: Whether shrinking smooths first, as PIL always does.
        mean: What to subtract per channel, on the scale 0 to 1.
        std: What to divide by per channel, on the scale 0 to 1.
        colour: ``rgb`` (three channels) or ``grey`` (one).
        scale: What one step of a uint8 value is worth before the mean is subtracted.

    Raises:
        UsageError: A field has a value that makes no sense.

    Example:
        >>> Preprocessing(resize=256, crop=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3).input_shape
        (3, 224, 224)
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    antialias: bool = True
    colour: Colour = "rgb"
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        # Users write lists (JSON, TOML) as often as tuples; equal values must make equal feature spaces.
        if not isinstance(self.resize, int):
            object.__setattr__(self, "resize", _pair(self.resize, "resize"))
        elif self.resize < 1:
            raise UsageError(f"preprocessing resize {self.resize} must be positive")
        object.__setattr__(self, "crop", _pair(self.crop, "crop"))
        for field in ("mean", "std"):
            object.__setattr__(self, field, tuple(float(value) for value in getattr(self, field)))
        if self.colour not in CHANNELS:
            raise UsageError(f"preprocessing colour {self.colour!r} is unknown; choices: rgb, grey")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"preprocessing interpolation {self.interpolation!r} is unknown; choices: {', '.join(INTERPOLATIONS)}"
            )
        channels = CHANNELS[self.colour]
        if len(self.mean) != channels or len(self.std) != channels:
            raise UsageError(
                f"preprocessing for {self.colour} needs {channels} values each of mean and std, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if any(value <= 0 for value in self.std):
            raise UsageError(f"preprocessing std {self.std} must be positive")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the network sees."""
        return (CHANNELS[self.colour], *self.crop)

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON values, the same for equal preprocessings: part of the feature space."""
        fields = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def resize_crop(self, image: Tensor) -> Tensor:
        """Resizes and centre-crops one decoded image; the same pixels as ``weights.transforms()`` before scaling.

        Args:
            image: uint8 (C, H, W), C as ``colour`` says.

        Returns:
            uint8 (C, h, w) with (h, w) = ``crop``.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        resize = functools.partial(
            functional.resize, interpolation=InterpolationMode(self.interpolation), antialias=self.antialias
        )
        height, width = image.shape[-2:]
        if not isinstance(self.resize, int):
            resized = resize(image, list(self.resize))
        elif max(height, width) <= LONGEST_STRIP * min(height, width):
            resized = resize(image, [self.resize])
        else:
            # Columns, crop, rows: what the kernel does in one call, without the pixels that the crop leaves out.
            image = _without_far_ends(image, self.resize, self.crop[1])
            height, width = _resized(image, self.resize)
            columns = resize(image, [image.shape[-2], width])
            columns = functional.center_crop(columns, [image.shape[-2], min(width, self.crop[1])])
            resized = resize(columns, [height, columns.shape[-1]])
        cropped: Tensor = functional.center_crop(resized, list(self.crop))
        return cropped

    def normalise(self, batch: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Scales to 0..1, subtracts the mean and divides by the standard deviation, on the batch's own device.

        Args:
            batch: uint8 (N, C, h, w); its memory format is kept.
            dtype: Floating dtype of the result; float32 by default. The arithmetic is float32 in any case.

        Returns:
            A tensor (N, C, h, w) of ``dtype``.
        """
        import torch

        factor, offset = self.affine(str(batch.device))
        normalised = torch.addcmul(offset, batch.to(torch.float32), factor)
        return normalised if dtype is None else normalised.to(dtype)

    def affine(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """What `normalise` does to a pixel: ``offset + factor * pixel``; factor and offset, each float32 (C, 1, 1)."""
        return _affine(self.mean, self.std, self.scale, device)


def _resized(image: Tensor, size: int) -> tuple[int, int]:
    """(height, width) once the shorter side is resized to ``size``, as torchvision rounds them."""
    height, width = image.shape[-2:]
    return (size, int(size * width / height)) if height < width else (int(size * height / width), size)


def _without_far_ends(image: Tensor, size: int, crop_width: int) -> Tensor:
    """Cuts as much of both ends of a strip as makes it fit ``STRIP_BYTES``: nothing, but of extreme strips.

    What is left has the same centre, and the same scale within one part in its resized length. That length differs by a
    multiple of four, so that the crop's offset, which is rounded half to even, moves by exactly what was cut.
    """
    height, width = image.shape[-2:]
    lines = image.shape[0] * (height if height < width else crop_width) + _WEIGHT_BYTES
    whole = max(_resized(image, size))
    if lines * whole <= STRIP_BYTES:
        return image
    shorter, longer = sorted((height, width))
    longest = max(STRIP_BYTES // lines * shorter // size, LONGEST_STRIP * shorter)
    cuts = range(max(0, longer - longest + 1) // 2, longer // 2)
    cut = next((cut for cut in cuts if (whole - int(size * (longer - 2 * cut) / shorter)) % 4 == 0), cuts.start)
    return image[..., cut : height - cut, :] if height > width else image[..., cut : width - cut]


@functools.lru_cache(maxsize=32)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: str) -> tuple[Tensor, Tensor]:
    """(x * scale - mean) / std as one multiplication and one addition, the constants already on the device."""
    import torch

    factor = torch.tensor([scale / s for s in std], dtype=torch.float32)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    return factor.view(-1, 1, 1).to(device), offset.view(-1, 1, 1).to(device)


def from_weights(transforms: Any) -> Preprocessing:
    """Reads a torchvision classification preset, what ``weights.transforms()`` returns.

    Raises:
        UsageError: It has not the fields of torchvision's ``ImageClassification`` preset.
    """
    missing = [f for f in ("resize_size", "crop_size", "mean", "std", "interpolation") if not hasattr(transforms, f)]
    if missing:
        raise UsageError(
            f"cannot read preprocessing from {type(transforms).__name__}: it has no {', '.join(missing)}; "
            "give a featurepipe.backbones.Preprocessing instead"
        )
    resize = list(transforms.resize_size)
    crop = list(transforms.crop_size)
    return Preprocessing(
        resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        crop=(crop[0], crop[-1]),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        # None meant "yes" for PIL images in older torchvision, and PIL images are what presets are defined on.
        antialias=transforms.antialias is not False,
    )


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Reads timm's data configuration, what ``timm.data.resolve_data_config`` returns.

    timm resizes to the input size divided by ``crop_pct`` and crops the centre; crop mode ``squash`` resizes both
    sides.

    Raises:
        UsageError: The crop mode is ``border``, which pads with a colour and is not supported.
    """
    channels, height, width = config["input_size"]
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise UsageError(f"timm crop mode {mode!r} is not supported; choices: center, squash")
    crop_pct = config.get("crop_pct") or 0.875
    scaled = (int(height / crop_pct), int(width / crop_pct))
    interpolation = config.get("interpolation") or "bilinear"
    return Preprocessing(
        resize=scaled[0] if mode == "center" and scaled[0] == scaled[1] else scaled,
        crop=(height, width),
        mean=tuple(config["mean"])[:channels],
        std=tuple(config["std"])[:channels],
        interpolation="bilinear" if interpolation == "random" else interpolation,
        colour="grey" if channels == 1 else "rgb",
    )


def from_value(value: Any) -> Preprocessing:
    """Reads what a user's module offers: a ``Preprocessing``, its fields, a timm config or a torchvision preset.

    Raises:
        UsageError: It is none of these, or its fields are wrong.
    """
    if isinstance(value, Preprocessing):
        return value
    if isinstance(value, Mapping):
        if "input_size" in value:
            return from_timm(value)
        try:
            return Preprocessing(**value)
        except TypeError as error:
            raise UsageError(f"preprocessing {dict(value)!r} is not complete: {error}") from error
    return from_weights(value)


def _pair(value: Sequence[int], field: str) -> tuple[int, int]:
    sizes = tuple(int(size) for size in value)
    if len(sizes) != 2 or min(sizes) < 1:
        raise UsageError(f"preprocessing {field} {value!r} must be (height, width), both positive")
    return (sizes[0], sizes[1])
