"""Features in blocks of rows: what the heads read, whether it lies in memory or in a store larger than memory."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Protocol, Self, TypeGuard, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from featurepipe.annotations import is_missing
from featurepipe.display import bytes_of
from featurepipe.errors import UsageError

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")
BLOCK_BYTES = 16 << 20  # larger blocks gain nothing, smaller ones cost matrix products their speed
_CHUNK = 1 << 16  # values converted at once: they stay in the core's cache
_EXPONENT = np.int16(0x7C00)  # of a float16
_SIGN_AND_REST = np.int32(-0x70002000)  # the bits of a shifted float16, without the copies of its sign
_ALIVE = 3  # the block in use, the one read ahead, and the rows as stored that it is converted from


@runtime_checkable
class Blocks(Protocol):
    """Features (n, D) that can be read some rows at a time; ``FeatureSet`` is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values as they are kept."""

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Returns the values of some rows (positions, a mask, or a slice; by default all) as a (m, D) array."""


class SameShape:
    """Blocks of the shape and dtype of those that they read.

    Attributes:
        source: Those.
    """

    source: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        rows, width = self.source.shape
        return rows, width

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the values are stored."""
        dtype: np.dtype[Any] = np.dtype(self.source.dtype)
        return dtype


class ArrayBlocks:
    """An array (or memory map) of features as ``Blocks``; the values are not copied until they are read."""

    def __init__(self, array: Array) -> None:
        if array.ndim != 2:
            raise UsageError(f"features must have two dimensions (images, values), these have shape {array.shape}")
        self.array = array

    def __sizeof__(self) -> int:
        """Bytes, by which Dask places tasks and judges a worker's memory."""
        return object.__sizeof__(self) + self.array.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row."""
        return self.array.shape[0], self.array.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype."""
        return self.array.dtype

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Returns some rows; a view of the array where the dtype and the rows allow it."""
        chosen = self.array if rows is None else self.array[rows]
        return np.asarray(chosen, dtype)


class MappedBlocks:
    """Blocks passed through a function, row by row independent, as they are read; nothing is kept."""

    def __init__(
        self,
        source: Blocks | Array,
        function: Callable[[Array], Array],
        width: int,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        """Stores what to map.

        Args:
            source: (n, D) features.
            function: Maps an (m, D) array of the result's dtype to an (m, width) array; may overwrite what it gets
                only if it made a copy.
            width: Values a row of the result.
            dtype: Of the result; by default float64 for float64 sources, else float32.
        """
        self.source = as_blocks(source)
        self.function = function
        self.width = width
        self._dtype = working_dtype(self.source.dtype) if dtype is None else np.dtype(dtype)

    def __sizeof__(self) -> int:
        """Bytes, those of the source among them: see `ArrayBlocks`."""
        return object.__sizeof__(self) + sys.getsizeof(self.source)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values a row, after the function."""
        return self.source.shape[0], self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that ``read`` returns by default."""
        return self._dtype

    @property
    def labels(self) -> Any:
        """Those that the source carries, or None: a pipeline's later steps need them too."""
        return getattr(self.source, "labels", None)

    @property
    def targets(self) -> Any:
        """Numbers to predict, or several labels a row, that the source carries, or None."""
        return getattr(self.source, "targets", None)

    @property
    def target_names(self) -> Any:
        """Of several labels that the source carries, their names; or None."""
        return getattr(self.source, "target_names", None)

    @property
    def first(self) -> int:
        """The number of the first row, in a shard of more rows."""
        return getattr(self.source, "first", 0)

    def row_shards(self) -> Any:
        """The shards of a spread source, mapped where they are; None for a source that is read here (``heads.row_shards``)."""
        below = getattr(self.source, "row_shards", lambda: None)()
        if below is None:
            return None
        return below.through(partial(MappedBlocks, function=self.function, width=self.width, dtype=self._dtype))

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Reads rows of the source and maps them."""
        wanted = self._dtype if dtype is None else np.dtype(dtype)
        return np.asarray(self.function(read_as(self.source, wanted, rows)), wanted)


def as_blocks(features: Blocks | Array) -> Blocks:
    """Returns ``features`` as ``Blocks``: an array wrapped, anything that reads rows as it is."""
    return features if is_blocks(features) else ArrayBlocks(np.asarray(features))


def is_blocks(features: Any) -> TypeGuard[Blocks]:
    """Whether ``features`` reads rows itself (a ``FeatureSet``, say), unlike an array or a list."""
    return not isinstance(features, np.ndarray) and isinstance(features, Blocks)


def working_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype to compute in: float32 for float16 and float32, float64 for everything else."""
    return np.dtype(np.float32 if np.dtype(dtype) in (np.float16, np.float32) else np.float64)


def rows_per_block(
    width: int, dtype: npt.DTypeLike, memory: int | str | None = None, *, most: int = BLOCK_BYTES
) -> int:
    """How many rows ``iterate`` reads at once.

    Args:
        width: Values a row.
        dtype: Of the blocks.
        memory: What all blocks that are alive at once may take, in bytes or as text ("512MB"); None for the usual size.
        most: Bytes of a block.

    Raises:
        UsageError: Not even 16 rows at a time fit.
    """
    row_bytes = max(1, width) * np.dtype(dtype).itemsize
    allowed = most if memory is None else min(most, bytes_of(memory) // _ALIVE)
    if allowed < 16 * row_bytes and memory is not None:
        least = 16 * row_bytes * _ALIVE
        raise UsageError(f"memory {memory!r} is too little for rows of {width} values; give at least {least} bytes")
    return max(16, allowed // row_bytes)


def iterate(
    features: Blocks | Array,
    *,
    rows: int | None = None,
    memory: int | str | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Iterator[tuple[slice, Array]]:
    """Yields the features block by block, in order, while one thread reads the next block ahead.

    Args:
        features: (n, D) ``Blocks`` or array.
        rows: Rows of a block; by default what ``memory`` allows.
        memory: What the blocks alive at one time may take (bytes or "512MB"): the one in use and the one read ahead.
        dtype: Of the blocks; by default ``working_dtype`` of the source.

    Yields:
        The rows' place (a slice), and the (m, D) array: do not write to it, it may be a view of the caller's.
    """
    source = as_blocks(features)
    wanted = working_dtype(source.dtype) if dtype is None else np.dtype(dtype)
    count, width = source.shape
    step = rows or rows_per_block(width, wanted, memory)
    places = [slice(start, min(count, start + step)) for start in range(0, count, step)]
    if len(places) == 1 or (isinstance(source, ArrayBlocks) and source.dtype == wanted):
        for place in places:  # nothing to do ahead
            yield place, source.read(wanted, rows=place)
        return

    def read(number: int) -> Any:
        return read_as(source, wanted, places[number]) if number < len(places) else None

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming = reader.submit(read, 0)
        for number, place in enumerate(places):
            block = coming.result()
            coming = reader.submit(read, number + 1)
            yield place, block
            del block


def pieces(
    features: Blocks, most: int, *, rows: int | None = None, dtype: npt.DTypeLike
) -> Iterator[tuple[slice, Array]]:
    """Cuts the blocks of ``iterate`` into pieces of at most ``most`` rows: what one thread works on at a time."""
    for place, block in iterate(features, rows=rows, dtype=dtype):
        for start in range(0, len(block), most):
            part = block[start : start + most]
            yield slice(place.start + start, place.start + start + len(part)), part


class RowThreads:
    """Works on pieces of rows in as many threads as matrix products may use, each of which then uses one.

    Threads that share one product wait for each other at its end; where other processes have a core for a while, that takes
    most of the time. Threads that take whole pieces wait for nobody, and whatever NumPy does beside the products is done in
    parallel, too. Use as a context manager.

    Args:
        wanted: Whether it pays; without, everything is done in the caller's thread.
        products: Whether products take threads of their own where pieces do not, since they are large.
    """

    def __init__(self, *, wanted: bool, products: bool = False) -> None:
        self.count = blas_threads() if wanted else 1
        self._pool: ThreadPoolExecutor | None = None
        self._outside = 0
        self._products: AbstractContextManager[None] = one_blas_thread.lifted() if products else nullcontext()

    def __enter__(self) -> Self:
        if self.count > 1:
            one_blas_thread.__enter__()
            self._outside, one_blas_thread.outside = one_blas_thread.outside, 1  # none is left for others within
            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="rows")
        else:
            self._products.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            one_blas_thread.outside = self._outside
            one_blas_thread.__exit__()
        else:
            self._products.__exit__(None, None, None)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yields items with their results in the order of the items, which are taken as threads become free."""
        if self._pool is None:
            for item in items:
                yield item, work(item)
            return
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, self._pool.submit(work, item)))
            if len(waiting) > self.count + 1:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()

    def each(self, work: Callable[[Item], object], items: Sequence[Item]) -> None:
        """Works on all items, and returns when that is done."""
        if self._pool is None or len(items) == 1:
            for item in items:
                work(item)
            return
        for done in [self._pool.submit(work, item) for item in items]:
            done.result()


def blas_threads() -> int:
    """How many threads a matrix product may use here and now, or might outside of `one_blas_thread`; 1 where nothing tells."""
    return one_blas_thread.outside or _blas_threads()


def _blas_threads() -> int:
    return max((int(library.num_threads) for library in _blas().lib_controllers), default=1)


def _blas() -> ThreadpoolController:
    return _libraries_of("scipy.linalg" in sys.modules)  # which brings one of its own


@cache
def _libraries_of(scipy: bool) -> ThreadpoolController:  # noqa: ARG001
    return ThreadpoolController().select(user_api="blas")  # looking for libraries takes milliseconds


class _OneBlasThread:
    """A context in which products take one thread each; it may be entered again, since the number is the whole process's.

    For products of some milliseconds, for which threads would wait for each other more than they work; and for what comes
    between pieces of rows, since OpenBLAS's threads keep their cores for some 30 ms after each product.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limit: Any = None
        self._here = threading.local()

    @property
    def outside(self) -> int:
        """How many threads products have outside of it, if the thread that asks has entered it; else 0."""
        return int(getattr(self._here, "outside", 0))

    @outside.setter
    def outside(self, count: int) -> None:
        self._here.outside = count

    def __enter__(self) -> None:
        with self._lock:
            depth = getattr(self._here, "depth", 0)
            if not depth:
                self.outside = _blas_threads()
            if not self._inside:
                self._limit = _blas().limit(limits=1, user_api="blas")
            self._inside += 1
            self._here.depth = depth + 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            self._here.depth -= 1
            if not self._here.depth:
                self.outside = 0
            if not self._inside:
                self._limit.restore_original_limits()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """As many threads as outside, for a large product or a factor within."""
        if self.outside <= 1:
            yield
            return
        with _blas().limit(limits=self.outside, user_api="blas"):
            yield


one_blas_thread = _OneBlasThread()


def read_as(source: Blocks, dtype: npt.DTypeLike, rows: Array | slice | None = None) -> Array:
    """Reads some rows as ``dtype``; float16 becomes float32 several times as fast as NumPy converts it."""
    if source.dtype == np.float16 and np.dtype(dtype) == np.float32:
        return widened(source.read(None, rows=rows))
    return source.read(dtype, rows=rows)


def widened(halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Returns float16 values as float32, exactly.

    Shifted to float32's place, exponent and mantissa lack only the difference of the exponents' offsets, a factor of
    2 ** 112, which is exact for subnormal numbers too. These are whole-vector operations, unlike NumPy's conversion.
    """
    bits = np.ascontiguousarray(halves).reshape(-1).view(np.int16)
    result = np.empty(halves.shape, np.float32)
    flat = result.reshape(-1)
    for start in range(0, len(bits), _CHUNK):
        source, values = bits[start : start + _CHUNK], flat[start : start + _CHUNK]
        if (source & _EXPONENT).max() == _EXPONENT:
            values[:] = source.view(np.float16)  # infinity and NaN have an exponent of their own
            continue
        shifted = values.view(np.int32)
        shifted[:] = source
        shifted <<= 13
        shifted &= _SIGN_AND_REST
        values *= np.float32(2.0**112)
    return result


def in_memory(blocks: Blocks, dtype: npt.DTypeLike) -> ArrayBlocks:
    """Reads all rows, block by block, into one array of a dtype."""
    kept = np.empty(blocks.shape, dtype)
    for place, block in iterate(blocks, dtype=dtype):
        kept[place] = block
    return ArrayBlocks(kept)


def labels_of(features: Any, labels: Any) -> Array:
    """Returns the labels (n,) given, or those that ``features`` carries where none are given.

    Raises:
        UsageError: There are none, or some rows have no label.
    """
    if labels is None:
        labels = getattr(features, "labels", None)
        if labels is None:
            raise UsageError("requires y to be passed, but the target y is None: these features carry no labels")
    found = np.asarray(labels)
    missing = _missing(labels, found)
    if len(missing):
        first = found.ravel()[missing[0]]
        kind = "" if np.ma.is_masked(labels) or first is None else f"it is {first}; "
        raise UsageError(
            f"{len(missing)} of {found.size} rows have no label (the first is row {missing[0]}); {kind}"
            "leave them out: features.select(labelled=True), or X[known], y[known]"
        )
    return found


def targets_of(features: Any, targets: Any) -> npt.NDArray[np.float64]:
    """Returns the numbers (n,) given as float64, or those that ``features`` carries where none are given.

    Raises:
        UsageError: There are none, some rows have none, or they are not numbers; infinite ones are named, too.
    """
    if targets is None:
        targets = getattr(features, "targets", None)
        if targets is None:
            raise UsageError("requires y to be passed, but the target y is None: these features carry no targets")
    found = np.asarray(targets)
    if found.dtype.kind == "c":
        raise UsageError("Complex data not supported: a target is a real number a row")
    missing = _missing(targets, found)
    if len(missing):
        raise UsageError(
            f"{len(missing)} of {found.size} rows have no target (Input y contains NaN; the first is row {missing[0]}): "
            "leave them out: X[known], y[known]"
        )
    if found.dtype.kind not in "fiub" and found.dtype != object:
        raise UsageError(f"the target is {_kind(found)}, such as {_first(found)!r}, not a number: learn it as a class")
    try:
        numbers = found.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the target has a value that is not a number: {error}; leave such rows out") from error
    infinite = np.flatnonzero(~np.isfinite(numbers.ravel()))
    if len(infinite):
        raise UsageError(
            f"Input y contains infinity: {len(infinite)} of {found.size} rows (the first is row {infinite[0]}); "
            "leave these rows out"
        )
    return numbers


def _kind(found: Array) -> str:
    return {"U": "text", "S": "bytes", "M": "a date", "m": "a duration"}.get(found.dtype.kind, str(found.dtype))


def _first(found: Array) -> object:
    return found.ravel()[0].item() if found.size else None


def _missing(labels: Any, found: Array) -> npt.NDArray[np.intp]:
    """Rows whose label is None, NaN, NaT, pandas' NA, masked, or the text that NumPy makes of a NaN among texts."""
    if np.ma.is_masked(labels):
        return np.flatnonzero(np.ma.getmaskarray(labels))
    values = found.ravel()
    if found.dtype.kind == "O":
        return np.flatnonzero([is_missing(label) for label in values])
    if found.dtype.kind in "mM":
        return np.flatnonzero(np.isnat(values))
    if found.dtype.kind == "f":
        return np.flatnonzero(np.isnan(values))
    return np.flatnonzero(values == "nan") if found.dtype.kind == "U" else np.empty(0, np.intp)
