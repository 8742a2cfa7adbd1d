"""Colours in pairs, for light and dark pages, and the markers and dashes that say the same without colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from bokeh.model import Model


class ColourPair(NamedTuple):
    """A colour on a light page and on a dark one."""

    light: str
    dark: str


INK = ColourPair("#1d2329", "#e8eaed")
QUIET = ColourPair("#555e68", "#adb5bf")
RULE = ColourPair("#dfe3e8", "#363c45")
ACCENT = ColourPair("#0063a6", "#6cbcf5")

# Hues that remain apart under the common kinds of colour blindness (after Okabe and Ito, 2008), darker or lighter so that
# each stands out from its page at 3:1 or more.
SERIES = (
    ColourPair("#0072b2", "#56b4e9"),
    ColourPair("#c44e00", "#f5a742"),
    ColourPair("#00795c", "#3fc99b"),
    ColourPair("#b0307a", "#f08bc4"),
    ColourPair("#7a6200", "#e8dc5a"),
    ColourPair("#3a3f45", "#d5d9de"),
    ColourPair("#5b4bb5", "#b3a6ff"),
    ColourPair("#9c2f1f", "#ff9a8a"),
)
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star")
OTHERS = ColourPair("#8a929b", "#7d8590")

# From the page's own colour to the accent's darkest (on dark pages lightest) tone.
_SCALE_LIGHT = ((244, 247, 250), (118, 176, 222), (4, 62, 110))
_SCALE_DARK = ((30, 35, 42), (31, 99, 153), (176, 222, 255))


@dataclass(frozen=True)
class Style:
    """How a series is drawn: colour, marker (None for none), dash, and whether the marker is filled."""

    colour: ColourPair
    marker: str | None = None
    dash: str | None = "solid"
    filled: bool = True


def series(position: int) -> Style:
    """The style of one of many series: 56 differ in colour or marker, and neighbours in both."""
    return Style(SERIES[position % len(SERIES)], MARKERS[position % len(MARKERS)])


def shade(value: float) -> ColourPair:
    """The colour of a cell from 0 (the page) to 1."""
    return ColourPair(_between(_SCALE_LIGHT, value), _between(_SCALE_DARK, value))


def on_shade(value: float) -> ColourPair:
    """The colour of text on ``shade(value)``: black or white, whichever stands out more."""
    return ColourPair(*(_readable(colour) for colour in shade(value)))


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (Web Content Accessibility Guidelines 2.2).

    Example:
        >>> round(contrast("#ffffff", "#000000"))
        21
    """
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


class Paint:
    """Colours models for a light page, and keeps a note of what the page's script changes where the reader's is dark."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str, Any, Any]] = []

    def set(self, model: Model, **colours: ColourPair) -> None:
        """Sets properties of a Bokeh model to the light colours."""
        for name, pair in colours.items():
            setattr(model, name, pair.light)
            self.notes.append((model.id, name, {"value": pair.light}, {"value": pair.dark}))

    def set_plain(self, model: Model, **colours: ColourPair) -> None:
        """As ``set``, for properties that take a colour only, as those of axes and grids do."""
        for name, pair in colours.items():
            setattr(model, name, pair.light)
            self.notes.append((model.id, name, pair.light, pair.dark))

    def set_fields(self, model: Model, **stems: str) -> None:
        """As ``set``, for properties that follow columns ``STEM_light`` and ``STEM_dark`` of the data."""
        for name, stem in stems.items():
            setattr(model, name, f"{stem}_light")
            self.notes.append((model.id, name, {"field": f"{stem}_light"}, {"field": f"{stem}_dark"}))


def _between(stops: tuple[tuple[int, int, int], ...], value: float) -> str:
    place = min(max(value, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    share = place - left
    mixed = (round(a + share * (b - a)) for a, b in zip(stops[left], stops[left + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _readable(colour: str) -> str:
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


def _luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
