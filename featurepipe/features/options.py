"""How to extract, as the user says it; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AUTO = "auto"
REJECT, KEEP = DAMAGED = ("reject", "keep")
"""What becomes of a JPEG that libjpeg could only repair."""


@dataclass(frozen=True)
class Options:
    """How to extract; each field is an argument of `featurepipe.extract`, where it is explained."""

    backbone: str = "resnet50"
    weights: str = "DEFAULT"
    seed: int = 0
    nodes: Sequence[str] = ("bottleneck",)
    precision: str = AUTO
    dtype: str = AUTO
    decode: str = AUTO
    intensity: str = AUTO
    device: str = AUTO
    batch_size: int | str = AUTO
    workers: int | None = None
    retry_rejects: bool = False
    damaged: str = REJECT

    @property
    def keep_damaged(self) -> bool:
        """Whether JPEGs are kept that libjpeg could only repair."""
        return self.damaged == KEEP
