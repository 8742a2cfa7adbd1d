"""Resolving every ``auto``: once, before the first image, from what the store already holds or else by measuring."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from featurepipe.backbones.engine import OPENVINO, PYTORCH, openvino_is_installed
from featurepipe.errors import Message, Option, UsageError, pip_install
from featurepipe.features.options import AUTO, MachineOptions, SettingOptions
from featurepipe.images.decode import decoding_fields, is_scaled
from featurepipe.images.intensity import HIGH_BYTE, intensity_of, parse_intensity
from featurepipe.images.scaling import parse_route
from featurepipe.option_groups import declared
from featurepipe.store.choice import MIRRORED, is_mirrored

MeasurePrecision = Callable[[str | None, str], tuple[str, str]]
"""Takes the reduced precision to compare with fp32, None for what suits the device, and the intensity with which images are
decoded; returns the precision to take, and why."""

AS_IN_STORE = "as in the store"
"""Why a setting is what the store's features have."""
ASKED_FOR = "asked for"
_DEFAULTS = {
    "dtype": ("float16", "default: half the bytes, relative error below 0.001 or else float32"),
    "decode": ("cpu", "default: the same pixels on every machine"),
    "intensity": (
        "declared",
        "default: images of more than eight bits by what their files declare, others of few values are rejects",
    ),
}
_AS_VERSION_1 = (
    "as in the store, which is of version 1: images of more than eight bits that it would show wrongly are rejects from now "
    "on, features of such images that it holds stay as they are; --intensity declared starts a feature space without them"
)

SETTINGS = tuple(declared(SettingOptions))
_PLAIN = tuple(name for name in SETTINGS if name != "intensity")
"""Settings that are fields of the feature space themselves; the intensity is among those of decoding."""


def _values(fields: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a feature space, by name."""
    return {**{name: str(fields[name]) for name in _PLAIN}, "intensity": intensity_of(fields.get("decoding", {}))}


@dataclass(frozen=True)
class Settings:
    """The fields of a feature space that may be ``auto``, resolved, and why each has its value.

    Attributes:
        mirrored: Whether images are mirrored left to right before all else; a field of the feature space only where they are.
        costly: Which of them were not asked for and leave something out that the user may want: their reasons are said unasked.
    """

    precision: str
    dtype: str
    decode: str
    intensity: str
    why: Mapping[str, str]
    mirrored: bool = False
    costly: frozenset[str] = frozenset()

    @classmethod
    def of_space(cls, fields: Mapping[str, Any], why: str) -> Self:
        """The settings of a feature space."""
        found = _values(fields)
        named = found["precision"], found["dtype"], found["decode"], found["intensity"]
        return cls(*named, why=dict.fromkeys(SETTINGS, why), mirrored=is_mirrored(fields))

    def values(self) -> dict[str, str]:
        """The values alone, by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    def as_dict(self) -> dict[str, dict[str, str]]:
        """Plain JSON values, as run records have them: ``value`` and ``why`` of each, by name."""
        return {name: {"value": value, "why": self.why[name]} for name, value in self.values().items()}

    def fields(self) -> dict[str, Any]:
        """The values as they go into the feature space, with all that decoding does."""
        decoding = decoding_fields(self.intensity, self.decode)
        mirrored = {MIRRORED: True} if self.mirrored else {}
        return {**{name: getattr(self, name) for name in _PLAIN}, "decoding": decoding, **mirrored}


class Settled(str):
    """A setting that an extraction before has settled: it is followed like one that was asked for, and it says why.

    Attributes:
        why: it has its value.
    """

    __slots__ = ("why",)
    why: str

    def __new__(cls, value: str, why: str = "") -> Self:
        """A text with a reason."""
        made = super().__new__(cls, value)
        made.why = why
        return made


@dataclass(frozen=True)
class Held:
    """A feature space that the store holds for the backbone, and whether it has every column asked for."""

    fields: Mapping[str, Any]
    complete: bool


def resolve(asked: Mapping[str, str], held: Sequence[Held], measure_precision: MeasurePrecision) -> Settings:
    """Settles precision, stored dtype, decode route and intensity.

    Every ``auto`` follows the store. But a reduced precision there was measured on the columns there, so that before it is
    followed for a new column it is measured on that one too; and a space of scaled JPEGs is followed where scaling was asked for.

    Args:
        asked: what the user asked for, or what was `Settled` before, each a choice or ``auto``.
        held: the feature spaces that the store holds for this backbone, best first (those that this dataset used last, then
            others). The first that agrees with all that was asked for explicitly is followed, or else the first.
        measure_precision: compares precisions; called only when needed.

    Raises:
        UsageError: an intensity or decode route, asked for or that of a space there, is unknown.
    """
    explicit = {name: value for name, value in asked.items() if value != AUTO}
    if "intensity" in explicit:
        explicit["intensity"] = str(parse_intensity(explicit["intensity"]))
    if "decode" in explicit:
        explicit["decode"], _ = parse_route(explicit["decode"])
    scaled = {route for space in held if is_scaled(route := space.fields["decode"])} - {explicit.get("decode")}
    held = [space for space in held if space.fields["decode"] not in scaled]
    agreeing = [space for space in held if explicit.items() <= _values(space.fields).items()]
    followed = next(iter(agreeing or held), None)
    values, why = {name: value for name, (value, _) in _DEFAULTS.items()}, {n: why for n, (_, why) in _DEFAULTS.items()}
    costly: set[str] = set()
    if followed is not None:
        values, why = _values(followed.fields), dict.fromkeys(SETTINGS, AS_IN_STORE)
        if values["intensity"] == str(HIGH_BYTE):
            why["intensity"] = _AS_VERSION_1
            costly.add("intensity")
    if scaled:
        costly.add("decode")
        why["decode"] = (
            f"{why['decode']}; {', '.join(sorted(scaled))}, which the store has too, is only used where asked for"
        )
    values.update(explicit)
    why.update({name: getattr(asked[name], "why", ASKED_FOR) for name in explicit})
    values["intensity"] = str(parse_intensity(values["intensity"]))
    if "precision" not in values:
        values["precision"], why["precision"] = measure_precision(None, values["intensity"])
    elif followed and "precision" not in explicit and values["precision"] != "fp32" and not followed.complete:
        values["precision"], reason = measure_precision(values["precision"], values["intensity"])
        why["precision"] = f"as in the store, for new columns too: {reason}"
    return Settings(
        values["precision"],
        values["dtype"],
        values["decode"],
        values["intensity"],
        {name: why[name] for name in SETTINGS},
        costly=frozenset(costly - explicit.keys()),
    )


ENOUGH_TO_CONVERT = 1000
"""Images from which on a network is converted to OpenVINO unasked: that takes seconds, and saves milliseconds an image."""


@dataclass(frozen=True)
class Machine:
    """A device, the most images in one forward, the threads that read and decode, and what runs the network.

    The engine is ``auto`` where OpenVINO could run it and nobody has said how many images there are; PyTorch does, then.
    """

    device: str
    batch_size: int
    workers: int
    engine: str = PYTORCH

    def for_images(self, images: int, held: str | None = None) -> Self:
        """Settles the engine.

        Args:
            images: to be computed.
            held: the engine that computed what the store holds, which is followed.
        """
        if self.engine != AUTO:
            return self
        return replace(self, engine=held or (OPENVINO if images >= ENOUGH_TO_CONVERT else PYTORCH))


def settle_machine(
    options: MachineOptions,
    decode: str,
    *,
    has_cuda: bool | None = None,
    has_openvino: bool | None = None,
    cpus: int | None = None,
) -> Machine:
    """Resolves what is ``auto`` or None, and refuses what cannot be.

    Args:
        options: what was asked for.
        decode: the decode route asked for.
        has_cuda: whether there is a CUDA device; None to look here.
        has_openvino: whether OpenVINO is installed; None to look here.
        cpus: cores there; None to count those here.

    Raises:
        UsageError: names the value, the choices and the next step.
    """
    if has_cuda is None:
        has_cuda = torch.cuda.is_available()
    device, batch_size = options.device, options.batch_size
    if device == AUTO:
        device = "cuda" if has_cuda else "cpu"
    if device.startswith("cuda") and not has_cuda:
        raise UsageError(f"device {device!r}: this PyTorch sees no CUDA device. See: featurepipe doctor")
    if decode == "gpu" and device == "cpu":
        raise UsageError(Message("decode 'gpu' needs ", Option("device", "cuda"), "; here the device is cpu"))
    if batch_size == AUTO:
        batch_size = 16 if device == "cpu" else 256
    workers = options.workers or min(cpus or os.cpu_count() or 2, 16)
    has_openvino = openvino_is_installed() if has_openvino is None else has_openvino
    return Machine(device, int(batch_size), workers, _engine(options.engine, device, has_openvino=has_openvino))


def _engine(asked: str, device: str, *, has_openvino: bool) -> str:
    if asked == AUTO:
        return AUTO if has_openvino and device == "cpu" else PYTORCH
    if asked == OPENVINO and device != "cpu":
        raise UsageError(Message("engine 'openvino' needs ", Option("device", "cpu"), f"; here the device is {device}"))
    if asked == OPENVINO and not has_openvino:
        raise UsageError(f"engine 'openvino': it is not installed; run: {pip_install('cpu')}")
    return asked
