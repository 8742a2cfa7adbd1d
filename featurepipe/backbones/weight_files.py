"""Reading weights files without running code from them, and saying in plain words what a file is that cannot be read."""

from __future__ import annotations

import argparse
import codecs
import pathlib
import pickle
import re
import struct
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurepipe.errors import UsageError

UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)
"""What torch's unpickler raises on bytes that are no weights file depends on where they lead it astray."""
SAVE = "save it with torch.save(model.state_dict(), path)"
_HARMLESS = (
    argparse.Namespace,
    types.SimpleNamespace,
    codecs.encode,
    dict,
    list,
    set,
    int,
    float,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]  # noqa: SLF001
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]  # noqa: SLF001
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]  # noqa: SLF001
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]  # noqa: SLF001
    *(type(np.dtype(kind)) for kind in np.typecodes["All"]),
)
"""What training scripts put beside the tensors (arguments, losses, paths). Making one of these runs no code of the file's."""
_HEAD_BYTES = 4096
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<!--")
_STARTS = (
    (
        b"version https://git-lfs",
        "it is a pointer of git LFS, not the file itself; run git lfs pull where it comes from",
    ),
    (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file (of Keras?), not one of PyTorch"),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it first"),
    (b"BZh", "it is compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "it is compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstandard; unpack it first"),
    (b"\x93NUMPY", "it is a NumPy array"),
    (b"GGUF", "it is a GGUF file, not one of PyTorch"),
)


def read_file(path: Path) -> Any:
    """Returns what a weights file holds; whether it is safetensors or torch's own format is seen from its content.

    Raises:
        UsageError: It cannot be read; says what the file is, where its content shows it.
    """
    if path.is_dir():
        raise UsageError(f"weights file {str(path)!r} is a folder; name the file in it (.pth, .bin, .safetensors)")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if path.suffix.lower() == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path, _what(path, head))
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*(pickle protocol|TorchScript archive)"
            )  # our own error says what it is
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = _what(path, head) or _objects(error) or _first_line(error)
        raise UsageError(
            f"weights file {str(path)!r} is not a state dict that torch.load(weights_only=True) can read: {reason}"
        ) from error


def _read_safetensors(path: Path, otherwise: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"reading {path.name} needs safetensors; run: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"weights file {str(path)!r} is not a safetensors file: {otherwise or error}") from error


def _what(path: Path, head: bytes) -> str:
    """What a file is, by its first bytes; empty where they do not tell."""
    text = head.lstrip().lower()
    meanings = [
        (not head, "it is empty"),
        *((head.startswith(start), meaning) for start, meaning in _STARTS),
        (text.startswith(_PAGES), "it is a web page, perhaps of a site that wants a login; download the file itself"),
        (head[257:262] == b"ustar", "it is a tar archive; unpack it and name the weights file in it"),
        (path.suffix.lower() == ".onnx", "it is an ONNX model, not a file of PyTorch"),
        (head[:1] == b"\x08" and b"onnx" in text, "it is an ONNX model, not a file of PyTorch"),
        (b"\x00" not in head and text[:1] in (b"{", b"["), "it is JSON text; name the file with the tensors"),
    ]
    known = next((meaning for applies, meaning in meanings if applies), "")
    return _what_zip(path) if not known and head.startswith(b"PK") else known


def _what_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return f"it is cut short or damaged ({path.stat().st_size:,} bytes); copy or download it again"
    inner = [name.partition("/")[2] for name in names]
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return f"it is a TorchScript archive; load it with torch.jit.load where it was made, and {SAVE}"
    if any(name.endswith("weights.h5") for name in names):
        return "it is a model of Keras, not of PyTorch"
    if names and all(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays (.npz)"
    if not any(name.endswith("data.pkl") for name in names):
        return f"it is a zip archive (of {', '.join(names[:3])}); unpack it and name the weights file in it"
    return ""


def _objects(error: BaseException) -> str:
    """Names the class that torch refuses to make, if that is the reason: making it could run code."""
    found = re.search(r"(?:GLOBAL|global|Unsupported class|class) `?([A-Za-z_][\w.]*\.\w+)", str(error))
    if found is None:
        reason = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error))
        return f"it holds more than tensors ({reason[1]}); {SAVE}" if reason else ""
    return (
        f"it holds an object of {found[1]}, and reading that runs code; if it is a whole network, or tensors beside other "
        "objects, load it where it was made, and there save the tensors alone: torch.save(model.state_dict(), path)"
    )


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
