"""Where and with how much an extraction runs; nothing here changes a feature beyond the batch tolerance."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from featurepipe.errors import UsageError
from featurepipe.extraction.options import AUTO


@dataclass(frozen=True)
class Machine:
    """A device, the most images in one forward, and the threads that read and decode."""

    device: str
    batch_size: int
    workers: int


def settle_machine(device: str, batch_size: int | str, workers: int | None, decode: str) -> Machine:
    """Resolves what is ``auto`` or None, and refuses what cannot be.

    Raises:
        UsageError: names the value, the choices and the next step.
    """
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; choices: auto, cpu, cuda, cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: this PyTorch sees no CUDA device. See: featurepipe doctor")
    if decode == "gpu" and device == "cpu":
        raise UsageError("decode 'gpu' needs --device cuda; here the device is cpu")
    if batch_size == AUTO:
        batch_size = 16 if device == "cpu" else 256
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UsageError(f"batch size {batch_size!r} must be 'auto' or a number from 1")
    if workers is None:
        workers = min(os.cpu_count() or 2, 16)
    if workers < 1:
        raise UsageError(f"workers {workers} must be a number from 1")
    return Machine(device, int(batch_size), workers)
