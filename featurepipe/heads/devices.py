"""Blocks of features on a device, such as a GPU: kept in its memory if they fit, else copied there one at a time.

The heads import no library of such arrays. They call what NumPy and the array's own library name alike (``exp``, ``sum``,
``where``, ...: the array API), so that one code sums over blocks wherever these are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.heads.blocks import Array, Blocks, SameShape, iterate, working_dtype

BLOCK_BYTES = 128 << 20
"""Of a block and its scores on a device: smaller ones leave it waiting for the next."""


def namespace_of(array: Any) -> Any:
    """The functions for an array: NumPy, what it names itself by the array API, or the library of its type."""
    if isinstance(array, np.ndarray):
        return np
    own = getattr(array, "__array_namespace__", None)
    return sys.modules[type(array).__module__.partition(".")[0]] if own is None else own()


class Device:
    """Where blocks are multiplied: makes arrays there, and brings results back.

    Args:
        like: An array there, of any shape: (0,) will do. PyTorch's tensors are known to work, and NumPy's arrays.
        memory: Bytes that features may take there between passes; 0 to copy them in each pass.
    """

    def __init__(self, like: Any, memory: int = 0) -> None:
        self.namespace: Any = namespace_of(like)
        self.memory = memory
        self._where: Any = like.device

    @property
    def is_host(self) -> bool:
        """Whether arrays there are NumPy's."""
        return self.namespace is np

    def put(self, values: Any, dtype: Any = None) -> Any:
        """An array there of these values, which may be there already; dtype is NumPy's or the device's own, None for theirs."""
        if self.is_host:
            return np.asarray(values, dtype)
        if isinstance(values, np.ndarray) and not values.flags.writeable:
            values = values.copy()  # PyTorch warns of what it might write to
        if isinstance(dtype, np.dtype | type):
            dtype = getattr(self.namespace, np.dtype(dtype).name)
        return self.namespace.asarray(values, dtype=dtype, device=self._where)

    def get(self, array: Any) -> Array:
        """The values of an array there, as NumPy's."""
        return np.asarray(array.cpu() if hasattr(array, "cpu") else array)

    def take(self, block: Any, rows: Array) -> Array:
        """Some rows of a block there, as NumPy's."""
        return self.get(block[self.put(rows)])

    def zeros(self, *shape: int) -> Any:
        """Float64 zeros there."""
        return self.namespace.zeros(shape, dtype=self.namespace.float64, device=self._where)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An array there, of any values."""
        return self.namespace.empty(shape, dtype=getattr(self.namespace, np.dtype(dtype).name), device=self._where)


HOST = Device(np.empty(0))
"""This process's memory."""


class OnDevice(SameShape):
    """Features that fits multiply on a device. Who reads them gets NumPy's arrays, as from any ``Blocks``.

    Linear classifiers by L-BFGS (``BlockLogisticRegression``, ``BlockLinearSVC`` and those of several labels) do so; what else
    learns from blocks reads them. They stay on the device as they are stored, so float16 takes half of what is computed in.

    Args:
        source: (n, D) ``Blocks``, or an array that is on the device already.
        device: Where; by default where the array is.
    """

    def __init__(self, source: Any, device: Device | None = None) -> None:
        self.device = device or Device(source)
        self.source = source
        self._kept: Any = source if device is None else None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        rows, width = self.source.shape
        return rows, width

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the values are stored."""
        own = self.source.dtype
        return np.dtype(own if isinstance(own, np.dtype) else str(own).rpartition(".")[2])

    @property
    def labels(self) -> Any:
        """Those that the source carries, or None."""
        return getattr(self.source, "labels", None)

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Returns some rows as NumPy's array."""
        if self._kept is not self.source:
            return np.asarray(self.source.read(dtype, rows=rows))
        chosen = (
            self.source if rows is None else self.source[rows if isinstance(rows, slice) else self.device.put(rows)]
        )
        return np.asarray(self.device.get(chosen), dtype)

    def pieces(self, rows: int, dtype: np.dtype[Any]) -> Iterator[tuple[slice, Any]]:
        """Yields the features some rows at a time: their place, and an array (m, D) of a dtype on the device."""
        stored = self.dtype if self.dtype.kind == "f" else working_dtype(self.dtype)
        count, width = self.shape
        if self._kept is None and count * width * stored.itemsize <= self.device.memory:
            kept = self.device.empty((count, width), stored)
            for place, block in iterate(self.source, rows=rows, dtype=stored):
                kept[place] = self.device.put(block)
            self._kept = kept
        if self._kept is not None:
            for start in range(0, count, rows):
                place = slice(start, min(count, start + rows))
                yield place, self.device.put(self._kept[place], dtype)
            return
        for place, block in iterate(self.source, rows=rows, dtype=stored):
            yield place, self.device.put(self.device.put(block), dtype)


def device_of(features: Any) -> Device:
    """Where features are multiplied: as who wrapped them in ``OnDevice`` wants, below whatever maps or checks them."""
    while features is not None:
        if isinstance(features, OnDevice):
            return features.device
        features = getattr(features, "source", None)
    return HOST


def on_its_device(features: Any) -> Any:
    """An array of another library than NumPy, such as PyTorch's, as blocks where it is; anything else as it is."""
    foreign = hasattr(features, "__dlpack_device__") and hasattr(features, "device")
    return OnDevice(features) if foreign and not isinstance(features, np.ndarray) else features


def on_device(features: Blocks) -> OnDevice | None:
    """The features where they are multiplied, if that is not here."""
    device = device_of(features)
    if device.is_host:
        return None
    return features if isinstance(features, OnDevice) else OnDevice(features, device)
