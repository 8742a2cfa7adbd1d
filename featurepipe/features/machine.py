"""Where and with how much an extraction runs; nothing here changes a feature beyond the batch tolerance."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from featurepipe.errors import UsageError
from featurepipe.features.options import AUTO


@dataclass(frozen=True)
class Machine:
    """A device, the most images in one forward, and the threads that read and decode."""

    device: str
    batch_size: int
    workers: int


def settle_machine(
    device: str,
    batch_size: int | str,
    workers: int | None,
    decode: str,
    *,
    has_cuda: bool | None = None,
    cpus: int | None = None,
) -> Machine:
    """Resolves what is ``auto`` or None, and refuses what cannot be.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: images in a forward, or ``auto``.
        workers: threads that read and decode, or None.
        decode: the decode route asked for.
        has_cuda: whether there is a CUDA device; None to look here.
        cpus: cores there; None to count those here.

    Raises:
        UsageError: names the value, the choices and the next step.
    """
    if has_cuda is None:
        has_cuda = torch.cuda.is_available()
    if device == AUTO:
        device = "cuda" if has_cuda else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; choices: auto, cpu, cuda, cuda:N")
    if device.startswith("cuda") and not has_cuda:
        raise UsageError(f"device {device!r}: this PyTorch sees no CUDA device. See: featurepipe doctor")
    if decode == "gpu" and device == "cpu":
        raise UsageError("decode 'gpu' needs --device cuda; here the device is cpu")
    if batch_size == AUTO:
        batch_size = 16 if device == "cpu" else 256
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UsageError(f"batch size {batch_size!r} must be 'auto' or a number from 1")
    if workers is None:
        workers = min(cpus or os.cpu_count() or 2, 16)
    if workers < 1:
        raise UsageError(f"workers {workers} must be a number from 1")
    return Machine(device, int(batch_size), workers)
