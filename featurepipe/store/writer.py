"""Collecting rows and committing them as parts, by size or by age, without stalling the one who adds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from featurepipe.errors import NonFiniteFeatures, StoreError, UsageError
from featurepipe.store.commit import ArraySpec, PartArray, write_part
from featurepipe.store.keys import Keys, as_keys
from featurepipe.store.parts import FEATURES, PartInfo, all_finite

DEFAULT_PART_BYTES = 64 * 1024 * 1024
DEFAULT_PART_SECONDS = 60.0
Features = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The rows of one ``add``."""

    keys: Keys
    ids: npt.NDArray[np.bytes_]
    sizes: npt.NDArray[np.int64]
    mtimes_ns: npt.NDArray[np.int64]
    features: Features


@dataclass
class _Buffer:
    """Rows that wait for the next part; all chunks have the same columns."""

    chunks: list[_Chunk] = field(default_factory=list)
    rows: int = 0
    feature_bytes: int = 0
    id_width: int = 1
    since: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.feature_bytes + self.rows * (48 + self.id_width)

    def append(self, chunk: _Chunk) -> None:
        if not self.chunks:
            self.since = time.monotonic()
        self.chunks.append(chunk)
        self.rows += len(chunk.keys)
        self.feature_bytes += sum(values.nbytes for values in chunk.features.values())
        self.id_width = max(self.id_width, chunk.ids.dtype.itemsize)

    def arrays(self) -> Iterator[PartArray]:
        """The arrays of the part; ids are padded, and columns promoted to their widest chunk, while writing."""
        yield self._array("key", np.dtype(np.uint8), (32,), [c.keys for c in self.chunks])
        yield self._array("id", np.dtype(f"S{self.id_width}"), (), [c.ids for c in self.chunks])
        yield self._array("size", np.dtype("<i8"), (), [c.sizes for c in self.chunks])
        yield self._array("mtime_ns", np.dtype("<i8"), (), [c.mtimes_ns for c in self.chunks])
        for column, values in self.chunks[0].features.items():
            chunks = [c.features[column] for c in self.chunks]
            dtype = np.result_type(*{c.dtype for c in chunks}).newbyteorder("<")
            yield self._array(FEATURES + column, dtype, values.shape[1:], chunks)

    def _array(
        self, name: str, dtype: np.dtype[Any], inner: tuple[int, ...], chunks: Iterable[npt.NDArray[Any]]
    ) -> PartArray:
        return PartArray(ArraySpec(name, dtype, (self.rows, *inner)), chunks)


class PartWriter:
    """Takes rows, commits them as parts of one space. Use it as a context manager, from one thread.

    What was added is committed when the block ends, also when it ends by an exception or Ctrl-C. At most one part is
    being written (in one background thread) while the next is being filled, so memory stays below about two parts
    plus what is added at once.

    Attributes:
        parts: Headers of the committed parts.
        rows: Rows committed so far.
        bytes: Bytes of the committed files.
        seconds: Time spent committing, in the background.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        run_id: str,
        dataset: str,
        dtype: str,
        shard: str = "",
        part_bytes: int = DEFAULT_PART_BYTES,
        part_seconds: float = DEFAULT_PART_SECONDS,
        on_overflow: Callable[[str], None] | None = None,
    ) -> None:
        self.parts: list[PartInfo] = []
        self.rows = 0
        self.bytes = 0
        self.seconds = 0.0
        self._folder = folder
        self._attributes = {"fingerprint": fingerprint, "run_id": run_id, "dataset": dataset}
        self._name = f"{shard_prefix(run_id, shard)}{secrets.token_hex(4)}"  # several writers may share a run
        self._count = 0
        self._rounding = Rounding(dtype, on_overflow)
        self._part_bytes = part_bytes
        self._part_seconds = part_seconds
        self._buffer = _Buffer()
        self._pool = ThreadPoolExecutor(1, "featurepipe-commit")
        self._in_flight: Future[None] | None = None
        self._failed = False

    def add(
        self,
        keys: npt.NDArray[Any] | Sequence[bytes],
        ids: Sequence[str],
        sizes: npt.ArrayLike,
        mtimes_ns: npt.ArrayLike,
        features: Mapping[str, npt.NDArray[np.floating[Any]]],
    ) -> None:
        """Adds n rows; they are copied, so the arrays may be reused.

        Args:
            keys: (n, 32) uint8.
            ids: Of each image, any text without NUL.
            sizes: Of the encoded image, in bytes.
            mtimes_ns: When it was last changed, in nanoseconds.
            features: For each column (n, D) float32.

        Raises:
            NonFiniteFeatures: A value is NaN or infinite; nothing of this call is kept.
            DiskFull: The part before could not be written.
            StoreError: An earlier commit failed, so this writer takes no more.
            UsageError: The arguments do not fit each other.
        """
        self._raise_failure()
        chunk = self._chunk(keys, ids, sizes, mtimes_ns, features)
        if not len(chunk.keys):
            return
        if self._buffer.chunks and _shape_of(self._buffer.chunks[0]) != _shape_of(chunk):
            self._start_commit()
        self._buffer.append(chunk)
        if self._buffer.nbytes >= self._part_bytes:
            self._start_commit()
        else:
            self.tick()

    def tick(self) -> None:
        """Commits in the background if the oldest waiting row is older than ``part_seconds``."""
        self._raise_failure()
        if self._buffer.rows and time.monotonic() - self._buffer.since >= self._part_seconds:
            self._start_commit()

    def commit(self) -> None:
        """Commits everything added so far and waits until it is on the disk."""
        self._wait()
        self._start_commit()
        self._wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._failed:
                self.commit()
            elif kind is None and self._in_flight is not None:
                self._raise_failure()  # of the last part, which nobody has waited for
        finally:
            self._pool.shutdown(wait=True)

    def _chunk(
        self,
        keys: npt.NDArray[Any] | Sequence[bytes],
        ids: Sequence[str],
        sizes: npt.ArrayLike,
        mtimes_ns: npt.ArrayLike,
        features: Mapping[str, npt.NDArray[np.floating[Any]]],
    ) -> _Chunk:
        if not features:
            raise UsageError("no feature columns given")
        chunk = _Chunk(
            as_keys(keys).copy(),
            encode_ids(ids),
            np.array(sizes, dtype=np.int64),
            np.array(mtimes_ns, dtype=np.int64),
            {column: self._rounding(_column_name(column), values, ids) for column, values in sorted(features.items())},
        )
        lengths = {len(chunk.keys), len(chunk.ids), *(len(values) for values in chunk.features.values())}
        if lengths != {len(chunk.keys)} or not chunk.sizes.shape == chunk.mtimes_ns.shape == chunk.ids.shape:
            raise UsageError(f"keys, ids, sizes, mtimes and features differ in length: {sorted(lengths)}")
        return chunk

    def _start_commit(self) -> None:
        self._wait()
        if not self._buffer.rows:
            return
        buffer, self._buffer = self._buffer, _Buffer()
        self._in_flight = self._pool.submit(self._write, buffer)

    def _write(self, buffer: _Buffer) -> None:
        start = time.perf_counter()
        try:
            part_id = f"{self._name}-{self._count:05d}"
            part = write_part(self._folder, part_id, attributes=self._attributes, arrays=list(buffer.arrays()))
        except BaseException:
            self._failed = True
            raise
        finally:
            self.seconds += time.perf_counter() - start
        self._count += 1
        self.parts.append(part)
        self.rows += part.rows
        self.bytes += part.file_bytes

    def _wait(self) -> None:
        if self._in_flight is not None:
            self._in_flight.result()  # stays in place if Ctrl-C interrupts the waiting
            self._in_flight = None

    def _raise_failure(self) -> None:
        if not self._failed:
            return
        if self._in_flight is not None:
            failed, self._in_flight = self._in_flight, None
            failed.result()
        raise StoreError("an earlier part could not be committed, so this writer takes no more rows; start a new run")


def shard_prefix(run_id: str, shard: str = "") -> str:
    """What the names of a run's parts begin with, or of one shard of it."""
    return f"{run_id}-{shard}-" if shard else f"{run_id}-"


def encode_ids(ids: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """Encodes ids as fixed-length UTF-8, as wide as the longest.

    Raises:
        UsageError: An id contains NUL or is not valid text.
    """
    try:
        encoded = [text.encode("utf-8") for text in ids]
    except UnicodeEncodeError as error:
        raise UsageError(f"an id is not valid text: {error.object!r}") from error
    if any(b"\0" in item for item in encoded):
        raise UsageError("an id contains a NUL character")
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def _column_name(column: str) -> str:
    if not column or "/" in column or "\0" in column or column in {".", ".."}:
        raise UsageError(f"not a column name: {column!r} (write node:pooling, without slashes)")
    return column


def _shape_of(chunk: _Chunk) -> dict[str, int]:
    return {column: values.shape[1] for column, values in chunk.features.items()}


ROW_MAXIMUM_SAFE = 1.0
"""A row whose largest value is beyond this loses nothing that matters to float16's coarse steps near zero, unless it is
wider than a hundred million values."""


class Rounding:
    """Gives features their stored values, batch after batch of one run.

    A column that float16 cannot hold stays float32 from that batch on. The writer of parts rounds with it, and so does
    whatever uses features without storing them.

    Args:
        dtype: The space's stored dtype, ``float16`` or ``float32``.
        on_overflow: Called once for each column that float16 cannot hold.
    """

    def __init__(self, dtype: str, on_overflow: Callable[[str], None] | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._on_overflow = on_overflow
        self._wide: set[str] = set()

    def __call__(self, column: str, values: npt.NDArray[Any], ids: Sequence[str]) -> npt.NDArray[Any]:
        """Returns a copy of (n, D) features in the stored dtype, checked to be finite.

        Raises:
            NonFiniteFeatures: A value is NaN or infinite; names the images.
            UsageError: These are no (n, D) floats.
        """
        if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind != "f":
            raise UsageError(f"{column}: features must be (n, D) floats, not {values.shape} {values.dtype}")
        narrow = self._dtype == np.float16 and column not in self._wide
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16 if narrow else np.float32)
        if not all_finite(stored):
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any() or not narrow:
                where = np.flatnonzero(bad)
                names = ", ".join(ids[i] for i in where[:5]) + (", ..." if len(where) > 5 else "")
                raise NonFiniteFeatures(f"{column}: NaN or infinity for {len(where)} of {len(values)} images: {names}")
            return self._widened(
                column, values, f"a value of {np.abs(values).max():g} is above float16's largest, 65504"
            )
        if narrow and len(values) and _loses_small_values(values, stored):
            return self._widened(
                column, values, f"values of {np.abs(values).mean():.1g} on average are too small for float16's steps"
            )
        return stored

    def _widened(self, column: str, values: npt.NDArray[Any], why: str) -> npt.NDArray[Any]:
        """Keeps the column as float32 from here on, and says so."""
        self._wide.add(column)
        if self._on_overflow is not None:
            self._on_overflow(
                f"{column}: {why}; it is stored as float32 from here on: nothing is lost, and the column takes twice the bytes"
            )
        return values.astype(np.float32)


def _loses_small_values(values: npt.NDArray[Any], stored: npt.NDArray[Any]) -> bool:
    """Whether float16's fixed steps of 6e-8 below 6e-5 cost some row more than a thousandth of its length."""
    if np.maximum(values.max(axis=1), -values.min(axis=1)).min() > ROW_MAXIMUM_SAFE:
        return False
    lost = np.linalg.norm(values - stored, axis=1)
    return bool((lost > 1e-3 * np.linalg.norm(values, axis=1)).any())
