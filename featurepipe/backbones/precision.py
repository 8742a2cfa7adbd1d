"""Which precision a network may run in, decided by measuring on the user's own images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featurepipe.backbones.engine import Engine
from featurepipe.backbones.loading import Backbone
from featurepipe.backbones.pooling import Column

WORST_COSINE = 0.999
"""Reduced precision is kept only when every sample image's features agree with fp32 at least this well."""


@dataclass(frozen=True)
class PrecisionChoice:
    """What `choose_precision` decided, and on which evidence.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        tried: the reduced precision that was compared with fp32, or None when the device has none worth trying.
        worst_cosine: the least cosine between its features and fp32's over all sample images and columns; None without one.
        images: how many images were compared.
    """

    precision: str
    tried: str | None = None
    worst_cosine: float | None = None
    images: int = 0

    @property
    def reason(self) -> str:
        """One sentence for the log."""
        if self.tried is None:
            return "this device has no faster precision worth trying"
        if self.worst_cosine is None:
            return f"there is no usable image to compare {self.tried} with fp32 on"
        verdict = "kept" if self.precision == self.tried else f"not kept, the bound is {WORST_COSINE}; fp32 instead"
        worst = _digits(self.worst_cosine)
        return f"{self.tried} agrees with fp32 to a worst cosine of {worst} over {self.images} images: {verdict}"


def _digits(cosine: float) -> str:
    """A cosine with as many digits as tell on which side of the bound it is, at least 5."""
    texts = (f"{cosine:.{digits}f}" for digits in range(5, 17))
    return next((text for text in texts if (float(text) >= WORST_COSINE) == (cosine >= WORST_COSINE)), repr(cosine))


def reduced_precision(device: str) -> str | None:
    """The reduced precision that ``device`` runs fast: fp16 on CUDA, bf16 on CPUs with bf16 instructions, else None."""
    if torch.device(device).type == "cuda":
        return "fp16"
    return "bf16" if cpu_has_bf16() else None


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX), not by emulation."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")):
        return True
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def choose_precision(
    backbone: Backbone,
    columns: Sequence[Column],
    sample: torch.Tensor,
    device: str,
    *,
    tried: str | None = None,
    batch_size: int = 16,
) -> tuple[PrecisionChoice, Engine | None]:
    """Compares the device's reduced precision with fp32 on sample images.

    Args:
        backbone: the network.
        columns: the columns whose features must agree.
        sample: uint8 images (N, C, H, W), resized and cropped; N may be 0, which chooses fp32.
        device: where the network will run.
        tried: the reduced precision to compare; by default the device's own (`reduced_precision`).
        batch_size: as in `Engine`.

    Returns:
        The reduced precision where its worst cosine with fp32 is at least `WORST_COSINE`, else fp32; and the engine that
        was built for the chosen precision, if one was, so that nobody builds it twice.
    """
    tried = tried or reduced_precision(device)
    if tried is None or len(sample) == 0:
        return PrecisionChoice("fp32", tried), None
    exact = Engine(backbone, columns, precision="fp32", device=device, batch_size=batch_size)
    quick = Engine(backbone, columns, precision=tried, device=device, batch_size=batch_size)
    expected, found = exact(sample), quick(sample)
    cosine = min(worst_cosine(expected[name], found[name]) for name in expected)
    choice = PrecisionChoice(tried if cosine >= WORST_COSINE else "fp32", tried, cosine, len(sample))
    return choice, quick if choice.precision == tried else exact


def worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine between rows of two (N, D) arrays; two zero rows agree, NaN agrees with nothing."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    cosines = np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0))
    return float(np.nan_to_num(cosines, nan=-1.0).min())
