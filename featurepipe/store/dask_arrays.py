"""Features as Dask arrays whose tasks carry paths and row numbers, never data and never an open file.

A task is about 2 KB where its rows lie in the order of the store, since they are sent as runs; rows in any other order take 8
bytes each and column on top. It reads its chunk by itself, wherever Dask puts it, and says so if the store has changed meanwhile.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.store.rows import WideRows

CHUNK_BYTES = 64 << 20


def features_array(rows: WideRows, step: int, dtype: npt.DTypeLike) -> Any:
    """Builds a (n, D) ``dask.array`` of chunks of ``step`` rows; each task opens what it reads."""
    import dask.array as da
    from dask.highlevelgraph import HighLevelGraph

    name = f"features-{_token(rows, step, np.dtype(dtype).str)}"
    starts = range(0, max(1, len(rows)), step)
    pieces = [rows.take(slice(start, start + step)) for start in starts]
    tasks: dict[Any, Any] = {
        (name, number, 0): (read_rows, piece, np.dtype(dtype)) for number, piece in enumerate(pieces)
    }
    graph = HighLevelGraph.from_collections(name, tasks)
    chunks = (tuple(map(len, pieces)), (rows.width,))
    return da.Array(graph, name, chunks, meta=np.empty((0, 0), dtype))  # type: ignore[no-untyped-call]


def labels_array(labels: npt.NDArray[Any], chunks: tuple[int, ...]) -> Any:
    """Builds a (n,) ``dask.array`` of labels, cut as the features are; each task carries its own labels only."""
    import dask.array as da

    name = f"labels-{hashlib.sha256(repr((labels.tolist(), chunks)).encode()).hexdigest()[:32]}"
    return da.from_array(labels, chunks=(chunks,), name=name)  # type: ignore[no-untyped-call]


def read_rows(rows: WideRows, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """One chunk's task."""
    return rows.read(dtype)


def _token(rows: WideRows, step: int, dtype: str) -> str:
    """Names the same rows of the same files alike, so that Dask shares what two arrays have in common."""
    digest = hashlib.sha256(f"{rows.columns} {step} {dtype}".encode())
    for part in rows.parts:
        digest.update(repr([(piece.path, piece.offset) for piece in part.parts]).encode())
        digest.update(np.ascontiguousarray(part.part))
        digest.update(np.ascontiguousarray(part.row))
    return digest.hexdigest()[:32]
