"""Which stored value is black and which is white: from images of more than eight bits to eight.

Eight bits hold one black, 0, and one white, 255. Sixteen bits do not: radiographs keep 12 bits in them, microscopes 10 to 16, and
floating point has no range of its own. What a file declares is used, of DICOM its window, else its stored bits. Where it declares
nothing and its values fill less than a sixteenth of their range it is refused rather than guessed (pydicom #1426, Pillow #3159).
A user's own choice is an `Intensity`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from featurepipe.errors import Reject, UsageError

Array = np.ndarray[Any, Any]

SPARSE: Final = 16
"""An image whose values fill less than this fraction of their range, one in so many, does not tell what the range is."""

CHOICES: Final = "declared, full, bits=N, window=LO:HI, minmax, high-byte"
_ROWS_AT_ONCE: Final = 1 << 20  # values that are scaled at once in floating point
_MOST_BITS: Final = 32
_NUMBER: Final = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Intensity:
    """How images of more than eight bits become images of eight; those of up to eight bits keep theirs.

    Attributes:
        kind: ``declared``: by what the file declares (of DICOM the window, whatever its bits), else by the range of its
            numbers, and an image that neither tells is a reject. ``full``: by the range of the numbers, 0 to 1 for floating
            point. ``bits``: by 0 to 2**bits - 1, and an image with other values is a reject. ``window``: by ``low`` to
            ``high``, values beyond being cut off. ``minmax``: each image by its own least and greatest value.
            ``high-byte``: what version 1 did, where that is right.
        bits: of ``bits``.
        low: black, of ``window``.
        high: white, of ``window``.
    """

    kind: str = "declared"
    bits: int = 0
    low: float = 0.0
    high: float = 0.0

    def __str__(self) -> str:
        if self.kind == "bits":
            return f"bits={self.bits}"
        return f"window={_plain(self.low)}:{_plain(self.high)}" if self.kind == "window" else self.kind


DECLARED: Final = Intensity()
HIGH_BYTE: Final = Intensity("high-byte")
_SIMPLE: Final = {name: Intensity(name) for name in ("declared", "full", "minmax", "high-byte")}


@dataclass(frozen=True)
class Samples:
    """The numbers of one image as they are stored.

    Attributes:
        values: (H, W) or (H, W, C) without an alpha channel, of any integer or floating dtype.
        depth: bits that a number has in the file.
        declared: (black, white) that the file declares, or None.
        significant: of a PNG, how many bits it declares to be significant (sBIT), or None.
        min_is_white: the least value is white.
        alpha: uint8 (H, W), or None.
        keyed: ``alpha`` follows from a value that stands for transparency (a PNG's tRNS).
        span: the least and the greatest value that the file can hold, where its bits alone do not tell (DICOM), or None.
        windowed: ``declared`` is a window, beyond which values are black and white (DICOM).
        blank: bool (H, W), pixels that are none of the image's, which are shown black (DICOM's padding), or None.
    """

    values: Array
    depth: int
    declared: tuple[float, float] | None = None
    significant: int | None = None
    min_is_white: bool = False
    alpha: Array | None = None
    keyed: bool = False
    span: tuple[float, float] | None = None
    windowed: bool = False
    blank: Array | None = None

    @property
    def name(self) -> str:
        """What they are, for messages."""
        kind = self.values.dtype.kind
        return f"{self.depth}-bit {'floating-point' if kind == 'f' else 'signed' if kind == 'i' else 'unsigned'}"


def parse_intensity(text: str) -> Intensity:
    """Reads ``declared``, ``full``, ``bits=N``, ``window=LO:HI``, ``minmax`` or ``high-byte``.

    Raises:
        UsageError: it is none of them; names the value and the choices.

    Example:
        >>> str(parse_intensity("window=-1000:400.0"))
        'window=-1000:400'
    """
    if text in _SIMPLE:
        return _SIMPLE[text]
    if (found := re.fullmatch(r"bits=(\d{1,2})", text)) and 1 <= int(found[1]) <= _MOST_BITS:
        return Intensity("bits", bits=int(found[1]))
    if found := re.fullmatch(rf"window=({_NUMBER}):({_NUMBER})", text):
        low, high = float(found[1]), float(found[2])
        if low < high and np.isfinite([low, high]).all():
            return Intensity("window", low=low, high=high)
    raise UsageError(
        f"unknown intensity {text!r}; choices: {CHOICES}, with N from 1 to {_MOST_BITS} and LO (black) below HI (white)"
    )


def eight_bits(samples: Samples, intensity: Intensity) -> Array:
    """Scales an image's numbers to uint8, black 0 and white 255.

    Args:
        samples: the numbers.
        intensity: which of them are black and white.

    Returns:
        uint8, of the shape of ``samples.values``.

    Raises:
        Reject: ``intensity``: nothing tells which values are black and white, or they are not where they should be; names
            the option that decides.
    """
    if samples.values.dtype.kind == "f" and not np.isfinite(samples.values).all():
        raise Reject(f"unsupported: {samples.name} values that are no finite numbers (NaN or infinite)")
    scaled = _SCALES[intensity.kind](samples, intensity)
    return finished(scaled, samples)


def finished(scaled: Array, samples: Samples) -> Array:
    """What is scaled to eight bits, inverted where the least value is white, and black where there is no image."""
    if samples.min_is_white:
        scaled = np.invert(scaled)
    if samples.blank is not None:
        scaled[samples.blank] = 0
    return scaled


def samples_of_array(array: Array) -> Samples:
    """The numbers of an array of pixels, (H, W) or (H, W, C) with an alpha channel as the fourth.

    Raises:
        Reject: ``unsupported``: it does not hold integers or floating-point numbers.
    """
    if array.dtype.kind not in "uif":
        raise Reject(f"unsupported: an array of {array.dtype}; pixels are uint8, or other numbers or bool")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    samples = Samples(array, 8 * array.dtype.itemsize)
    if array.ndim == 3 and array.shape[2] == 4:
        return replace(samples, values=array[..., :3], alpha=alpha_of(replace(samples, values=array[..., 3])))
    return samples


def alpha_of(samples: Samples) -> Array:
    """Opacity as uint8: by the range of its numbers, whatever becomes of the colours.

    Raises:
        Reject: ``intensity``: it fills so little of that range that the image would all but vanish.
    """
    if samples.values.any():
        if samples.values.dtype.kind != "f" and samples.values.max() < _type_range(samples)[1] / SPARSE:
            raise Reject(
                f"intensity: the opacity of a {samples.name} image goes to {samples.values.max()} only; scale it to the range "
                "of its type, or leave the alpha channel out"
            )
        return _full(samples, DECLARED)
    return np.zeros(samples.values.shape, np.uint8)


def _declared(samples: Samples, _intensity: Intensity) -> Array:
    values = samples.values
    if samples.declared is not None:
        low, high = samples.declared
        if samples.windowed:
            return _linear(values, low, high)
        _check_within(samples, low, high, f"the file declares black to be {_plain(low)} and white {_plain(high)}")
        return _linear(values, low, high) if low or values.dtype.kind != "u" else _unsigned(values, high)
    if samples.span is not None:
        if float(values.max()) - float(values.min()) < (samples.span[1] - samples.span[0]) / SPARSE:
            raise Reject(_undeclared(samples, "fill less than a sixteenth of what the file can hold"))
        return _by_span(values, samples.span)
    if samples.significant is not None and values.any():
        return _of_significant_bits(samples, samples.significant)
    if values.dtype.kind != "u" or _is_sparse(samples):
        raise Reject(_undeclared(samples))
    return _shifted(values, samples.depth)


def _by_span(values: Array, span: tuple[float, float]) -> Array:
    low, high = span
    return _unsigned(values, high) if low == 0 and values.dtype.kind == "u" else _linear(values, low, high)


def _full(samples: Samples, _intensity: Intensity) -> Array:
    if samples.span is not None:
        return _by_span(samples.values, samples.span)
    low, high = _type_range(samples)
    if samples.values.dtype.kind == "f":
        _check_within(samples, low, high, "intensity full means 0 to 1 for floating-point numbers")
        return _linear(samples.values, low, high)
    if samples.values.dtype.kind == "i":  # two's complement with the sign turned is the value above the least one
        unsigned = np.ascontiguousarray(samples.values).view(samples.values.dtype.str.replace("i", "u"))
        return _shifted(unsigned ^ unsigned.dtype.type(1 << (samples.depth - 1)), samples.depth)
    return _shifted(samples.values, samples.depth)


def _bits(samples: Samples, intensity: Intensity) -> Array:
    high = float(2**intensity.bits - 1)
    _check_within(samples, 0, high, f"intensity {intensity} means 0 to {_plain(high)}")
    if samples.values.dtype.kind == "f":
        if (
            intensity.bits > 1 and 0 < samples.values.max() <= 1
        ):  # fractions, which would be black; `auto` may lead here
            raise Reject(_undeclared(samples, f"are no numbers of {intensity.bits} bits"))
        return _linear(samples.values, 0, high)
    return _unsigned(samples.values, high)


def _window(samples: Samples, intensity: Intensity) -> Array:
    return _linear(samples.values, intensity.low, intensity.high)


def _minmax(samples: Samples, _intensity: Intensity) -> Array:
    low, high = float(samples.values.min()), float(samples.values.max())
    return _linear(samples.values, low, high) if low < high else np.zeros(samples.values.shape, np.uint8)


def _high_byte(samples: Samples, _intensity: Intensity) -> Array:
    """The high byte of 16 bits, as version 1 took it of any image, if that is what the image shows."""
    advice = (
        "this feature space takes the high byte of 16 bits, as version 1 did, which is not what the image shows; another one, "
        "begun with featurepipe extract --intensity declared, would read it"
    )
    try:
        right = _declared(samples, DECLARED)
    except Reject as reject:
        raise Reject(f"{reject}; that starts another feature space") from reject
    differs = samples.values.dtype.kind != "u" or samples.min_is_white
    differs = differs or (samples.keyed and samples.alpha is not None and not samples.alpha.all())
    if differs or not np.array_equal(right, samples.values >> 8):
        raise Reject(f"intensity: {advice}")
    return right


_SCALES: Final[Mapping[str, Callable[[Samples, Intensity], Array]]] = {
    "declared": _declared,
    "full": _full,
    "bits": _bits,
    "window": _window,
    "minmax": _minmax,
    "high-byte": _high_byte,
}


def _type_range(samples: Samples) -> tuple[float, float]:
    kind = samples.values.dtype.kind
    if kind == "f":
        return 0.0, 1.0
    return (
        (0.0, 2.0**samples.depth - 1)
        if kind == "u"
        else (-(2.0 ** (samples.depth - 1)), 2.0 ** (samples.depth - 1) - 1)
    )


def _is_sparse(samples: Samples) -> bool:
    """Whether the values do not tell of what range they are.

    An image of one value is black whatever its range if that is 0, and bright enough not to be of a smaller one if it is in
    the upper fifteen sixteenths; any other is as doubtful as an image of the values up to it.
    """
    least, most, part = int(samples.values.min()), int(samples.values.max()), (1 << samples.depth) // SPARSE
    if least == most:
        return 0 < most < part
    return most - least < part


def _of_significant_bits(samples: Samples, bits: int) -> Array:
    """Scales a PNG's samples by sBIT.

    The PNG specification puts significant bits on top, shifted or repeated below, so that the samples are of the full range;
    many writers leave them at the bottom. Values tell the two apart, but for dark images of few values, which are refused.
    """
    values, low_bits = samples.values, samples.depth - bits
    on_top = values >> low_bits
    repeated = np.rint(on_top * (2.0**samples.depth - 1) / (2.0**bits - 1))
    as_specified = bool(((values == on_top << low_bits) | (np.abs(values - repeated) <= 1)).all())
    at_bottom = int(values.max()) < 2**bits
    if as_specified == at_bottom:
        if at_bottom or _is_sparse(samples):
            raise Reject(
                _undeclared(samples, f"and its {bits} significant bits (sBIT) may be the upper or the lower ones")
            )
        return _shifted(values, samples.depth)
    return _unsigned(values, 2.0**bits - 1) if at_bottom else _shifted(values, samples.depth)


def _check_within(samples: Samples, low: float, high: float, says: str) -> None:
    least, most = samples.values.min(), samples.values.max()
    if least < low or most > high:
        raise Reject(
            f"intensity: {says}, and the {samples.name} values go from {_plain(least)} to {_plain(most)}; featurepipe extract "
            f"--intensity window=LO:HI (intensity= in Python) says what is black and white, and cuts off what is beyond"
        )


def _undeclared(samples: Samples, but: str = "") -> str:
    """What nobody has said of an image, and how to say it."""
    kind, least, most = samples.values.dtype.kind, samples.values.min(), samples.values.max()
    why = but or {
        "f": "have no range of their own",
        "i": "have no black of their own",
        "u": "fill less than a sixteenth of their range",
    }.get(kind, "")
    if kind == "f":
        option = f"window={_plain(np.floor(least))}:{_plain(max(np.ceil(most), np.floor(least) + 1))}"
    elif least >= 0:
        option = f"bits={max(8, int(most).bit_length())}"
    else:
        option = f"window={_plain(least)}:{_plain(most)}"
    fractions = kind == "f" and least >= 0 and most <= 1
    return (
        f"intensity: {samples.name} values from {_plain(least)} to {_plain(most)} {why}, and nothing declares which are black "
        f"and white; say it with featurepipe extract --intensity {option}, or window=LO:HI, minmax, full (intensity= in Python)"
        + (", or make pixels of an array: (255 * image).astype('uint8')" if fractions else "")
    )


def _unsigned(values: Array, high: float) -> Array:
    """Integers of 0 to ``high``: their upper eight bits where it is so many ones in binary, and else in proportion."""
    bits = int(high).bit_length()
    return _shifted(values, bits) if bits >= 8 and high == 2**bits - 1 else _linear(values, 0, high)


def _shifted(values: Array, bits: int) -> Array:
    """The upper eight of so many bits."""
    return (values >> (bits - 8)).astype(np.uint8)


def _linear(values: Array, low: float, high: float) -> Array:
    """In proportion, ``low`` to 0 and ``high`` to 255, rounded to nearest, cut off beyond; some rows at a time."""
    scaled = np.empty(values.shape, np.uint8)
    step = max(1, _ROWS_AT_ONCE // max(1, values[0].size))
    for start in range(0, len(values), step):
        rows = values[start : start + step].astype(np.float64)
        np.clip((rows - low) * (255 / (high - low)), 0, 255, out=rows)
        scaled[start : start + step] = np.rint(rows, out=rows)
    return scaled


def _plain(value: Any) -> str:
    """A number as people write it: no needless decimals.

    Example:
        >>> _plain(4095.0), _plain(0.25)
        ('4095', '0.25')
    """
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def intensity_of(decoding: Mapping[str, Any]) -> str:
    """The intensity of a feature space's decoding, as `decode.decoding_fields` wrote it."""
    return str(decoding.get("intensity", decoding.get("sixteen_bit", DECLARED)))
