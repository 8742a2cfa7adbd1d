"""Resolving every ``auto``: once, before the first image, from what the store already holds or else by measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featurepipe.errors import UsageError
from featurepipe.extraction.options import AUTO

CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "dtype": ("float16", "float32"),
    "decode": ("cpu", "gpu"),
}


@dataclass(frozen=True)
class Settings:
    """The fields of a feature space that may be ``auto``, resolved, and why each has its value."""

    precision: str
    dtype: str
    decode: str
    why: Mapping[str, str]

    def fields(self) -> dict[str, str]:
        """The values alone, as they go into the feature space."""
        return {"precision": self.precision, "dtype": self.dtype, "decode": self.decode}


def check(asked: Mapping[str, str]) -> None:
    """Refuses values that are neither ``auto`` nor a known choice.

    Raises:
        UsageError: names the setting, the value and the choices.
    """
    for name, value in asked.items():
        if value != AUTO and value not in CHOICES[name]:
            raise UsageError(f"unknown {name} {value!r}; choices: auto, {', '.join(CHOICES[name])}")


@dataclass(frozen=True)
class Held:
    """A feature space that the store holds for the backbone, and whether it has every column asked for."""

    fields: Mapping[str, Any]
    complete: bool


def resolve(
    asked: Mapping[str, str], held: Sequence[Held], measure_precision: Callable[[str | None], tuple[str, str]]
) -> Settings:
    """Settles precision, stored dtype and decode route.

    Every ``auto`` follows the store. But a reduced precision there was measured on the columns there, so that before it is
    followed for a new column it is measured on that one too.

    Args:
        asked: what the user asked for, each a choice or ``auto``.
        held: the feature spaces that the store holds for this backbone, best first (those that this dataset used last, then
            others). The first that agrees with all that was asked for explicitly is followed, or else the first.
        measure_precision: takes the reduced precision to compare with fp32 (None for the device's own) and returns the one
            to take and the reason; called only when needed.
    """
    explicit = {name: value for name, value in asked.items() if value != AUTO}
    values, why = dict(explicit), dict.fromkeys(explicit, "asked for")
    agreeing = [space for space in held if all(space.fields.get(name) == value for name, value in explicit.items())]
    for space in (agreeing or held)[:1]:
        for name in CHOICES.keys() - explicit.keys():
            values[name], why[name] = str(space.fields[name]), "as in the store"
        if "precision" not in explicit and values["precision"] != "fp32" and not space.complete:
            values["precision"], reason = measure_precision(values["precision"])
            why["precision"] = f"as in the store, for new columns too: {reason}"
    if "precision" not in values:
        values["precision"], why["precision"] = measure_precision(None)
    values.setdefault("dtype", "float16")
    why.setdefault("dtype", "default: half the bytes, relative error below 0.001 or else float32")
    values.setdefault("decode", "cpu")
    why.setdefault("decode", "default: the same pixels on every machine")
    return Settings(**values, why={name: why[name] for name in CHOICES})
