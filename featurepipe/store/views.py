"""``FeatureSet``: the features of a dataset's images, one column or several, with labels joined by id; picklable.

A task of ``FeatureSet.dask`` is about 2 KB where its rows lie in the order of the store, since they are sent as runs; rows in
any other order take 8 bytes each and column on top. It reads its chunk by itself, wherever Dask puts it, and raises
``StoreMoved`` if the store has changed meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.annotations import names_in_doubt, split_asked
from featurepipe.display import bytes_of, counted, named_columns
from featurepipe.errors import UsageError
from featurepipe.lazy_names import lazy_names
from featurepipe.results import card, optional
from featurepipe.store.labelled_images import LabelledImages, role_column
from featurepipe.store.labels import LabelSource, join_labels, read_labels
from featurepipe.store.rows import ArrayRows, KeptRows, WideRows
from featurepipe.store.space import Origin, check_rows, check_spaces

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Labels = npt.NDArray[Any] | None
Positions = npt.NDArray[Any] | slice

DEFAULT_BLOCK_ROWS = 8192


@dataclass(frozen=True, eq=False, repr=False)
class FeatureSet(LabelledImages):
    """Features of n images, one row each, in snapshot order; get one from ``FeatureStore.features``.

    Holds labels, keys, paths and row numbers, but no open file: pickle it and send it to a worker. Two images with
    the same bytes share one stored vector. It never changes: ``+``, ``with_labels``, ``select`` and ``take`` return
    new views.

    Attributes:
        table: ``id``, ``label``, ``split`` of each image, and the roles that were joined; see `LabelledImages`.
        keys: (n, 32) uint8, the SHA-256 of each image.
        rows: Where the features lie.
        origin: Which store, dataset and feature space they are of.
        rejects: Images that could not be used and are not here, counted by split.
        unmatched: Ids of the labels given by ``with_labels`` that are no image here; where rejects are known, none of those.
        map_shape: What to reshape a row to, (C, H, W), if the pooling is ``map``; else None.
    """

    rows: WideRows | KeptRows | ArrayRows
    origin: Origin
    rejects: Mapping[str | None, int] = field(default_factory=dict)
    unmatched: int = 0
    map_shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<FeatureSet {self.origin.dataset}: {self.named_column} {self.shape}, {self.precision_text}>"

    def _repr_html_(self) -> str:
        """The card that a notebook shows; reads no features."""
        counts = self.counts()
        classes, splits = (
            [{"name": n, "images": v} for n, v in counts.pop(part).items()] for part in ("classes", "splits")
        )
        facts = {
            "dataset": f"{self.origin.dataset}, of {self.origin.store}",
            "columns": self.named_column,
            "values": f"{self.shape[1]:,}, {self.precision_text}",
            **{name: value for name, value in counts.items() if value or name == "images"},
        }
        return card("FeatureSet", facts, tables={n: t for n, t in (("classes", classes), ("splits", splits)) if t})

    def to_pandas(self, *, values: bool = True) -> pd.DataFrame:
        """The images as a DataFrame, a row for each: ``id``, ``label``, ``split``, roles, and the features in float32.

        Args:
            values: Whether features are read, as columns ``NODE:POOLING_0``, ``NODE:POOLING_1``, ...

        Raises:
            UsageError: pandas is not installed.
        """
        pandas = optional("pandas", "to_pandas()")
        found = pandas.DataFrame(self.table.to_pydict())
        if not values:
            return found
        ends = zip(self.columns, self.widths, strict=True) if len(self.columns) == len(self.widths) else ()
        names = [f"{column}_{number}" for column, width in ends for number in range(width)]
        features = pandas.DataFrame(self.read(), columns=names or range(self.shape[1]))
        return pandas.concat([found, features], axis=1)

    def plot(self, *, method: str = "PCA", ax: Axes | None = None) -> Axes:
        """Draws a map of the images by their features, at most 2,000 of them, drawn at random.

        Args:
            method: ``PCA``, or ``t-SNE``, which takes some seconds.
            ax: Where to draw; by default a new figure.

        Returns:
            The Axes that were drawn on.

        Raises:
            UsageError: matplotlib is not installed, there are no features, or the method is unknown.
        """
        draw, _ = lazy_names("featurepipe", {"plot_features": "reporting.plots"})
        drawn: Axes = draw("plot_features")(self, method=method, ax=ax)
        return drawn

    def describe(self) -> str:
        """Sums up the view in a few lines: images, labels, rejects, duplicates, classes, splits."""
        return describe(self)

    def counts(self) -> dict[str, Any]:
        """Counts, as JSON values.

        Returns:
            ``images``, ``labelled``, ``unlabelled``, ``rejected``, ``duplicates``, ``unmatched``, ``groups`` where there are
            any, and ``classes`` and ``splits`` with the images of each.
        """
        return counts_of(self)

    # What it is of

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, ``node:pooling``, in the order of the feature vector."""
        return self.rows.columns

    @property
    def column(self) -> str:
        """The column, ``node:pooling``; several are joined by ``+``."""
        return "+".join(self.columns)

    @property
    def named_column(self) -> str:
        """The same for people: ``bottleneck (flatten:gap)``."""
        return named_columns(self.columns, self.origin.bottleneck)

    @property
    def widths(self) -> tuple[int, ...]:
        """Values of each column of a store, in the order of the feature vector."""
        return tuple(part.width for part in self.rows.parts) if isinstance(self.rows, WideRows) else (self.rows.width,)

    @property
    def space_fingerprint(self) -> str:
        """Which feature space the values are of."""
        return self.origin.fingerprint

    @property
    def shape(self) -> tuple[int, int]:
        """Images and values per image."""
        return len(self), self.rows.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype (float32 if parts or columns differ); what is read is float32 unless another one is asked for."""
        return self.rows.dtype

    @property
    def precision_text(self) -> str:
        """For people: in what values are stored, and, where that is another dtype, in what they are read."""
        return f"stored as {self.dtype}" + ("" if self.dtype == np.float32 else ", read as float32")

    @property
    def rejected(self) -> int:
        """Images that could not be used and are not here."""
        return sum(self.rejects.values())

    # Other views of it

    def __add__(self, other: FeatureSet) -> FeatureSet:
        """Puts the columns of both side by side: several layers as one feature vector.

        Raises:
            UsageError: They are of two feature spaces, of other images, in another order or labelled otherwise, or a
                column is in both.
        """
        if not isinstance(other, FeatureSet):
            return NotImplemented
        check_spaces(self.origin, other.origin)
        twice = [column for column in other.columns if column in self.columns]
        if twice:
            raise UsageError(f"column {twice[0]} would be in the feature vector twice; name each column once")
        check_rows((self.table, self.keys), (other.table, other.keys))
        if not (isinstance(self.rows, WideRows) and isinstance(other.rows, WideRows)):
            raise UsageError("features that lie in memory, or are some values of columns, stand beside no others")
        return replace(self, rows=WideRows(self.rows.parts + other.rows.parts), map_shape=None)

    def keep(self, values: npt.NDArray[Any]) -> tuple[FeatureSet, npt.NDArray[np.int64]]:
        """Returns the view of the columns that have some values of the feature vector, and where these are in their vector.

        Args:
            values: (k,) ascending positions in the feature vector.

        Returns:
            The view, with all values of those columns, and (k,) positions in it; see ``values_alone``.
        """
        if not isinstance(self.rows, WideRows):
            raise UsageError(
                "columns are chosen from a store; these features are none of a store's columns as they are"
            )
        ends = np.cumsum([part.width for part in self.rows.parts])
        owner = np.searchsorted(ends, values, side="right")
        used = np.unique(owner)
        parts = tuple(self.rows.parts[place] for place in used)
        starts = np.cumsum([0, *(part.width for part in parts)])
        inside = np.asarray(values) - (ends - [part.width for part in self.rows.parts])[owner]
        places = starts[np.searchsorted(used, owner)] + inside
        map_shape = self.map_shape if len(used) == len(ends) else None
        return replace(self, rows=WideRows(parts), map_shape=map_shape), places.astype(np.int64)

    def values_alone(self, values: npt.NDArray[np.int64]) -> FeatureSet:
        """Returns the view of some values (k,) of the feature vector, (n, k), to fit on; its columns go by their names still."""
        if not isinstance(self.rows, WideRows):
            raise UsageError(
                "columns are chosen from a store; these features are none of a store's columns as they are"
            )
        return replace(self, rows=KeptRows(self.rows, values), map_shape=None)

    def with_labels(self, labels: LabelSource) -> FeatureSet:
        """Returns the view with other labels, joined by id; nothing is computed again.

        Images whose id is not given, or given with an empty label or None, are unlabelled. Labels become text: whole
        numbers (3, and 3.0, which a table program makes of a column with gaps) become "3". Ids that are no image
        here are counted in ``unmatched``.

        Args:
            labels: A mapping from id to label; a pyarrow table with the columns ``id`` (or ``path``, ``file``, ``filename``,
                ``image``) and ``label``; or the path of a .csv, .parquet or .jsonl file with these columns. Others are ignored.

        Raises:
            UsageError: A label is NaN, the text "nan", or neither text nor a whole number; an id has two labels; or no
                id is one of an image here.
        """
        found, strangers = join_labels(self.table["id"], read_labels(labels))
        place = self.table.column_names.index("label")
        return replace(self, table=self.table.set_column(place, "label", found), unmatched=strangers)

    def with_column(
        self,
        role: str,
        values: pa.Array | npt.NDArray[Any] | Sequence[Any],
        *,
        names: Sequence[str] = (),
        column: str = "",
    ) -> FeatureSet:
        """Returns the view with groups, weights, targets or splits of its rows; labels are joined by ``with_labels``.

        Args:
            role: ``group`` (text or whole numbers; None, NaN or an empty text for an image by itself), ``weight`` (numbers from
                0), ``target`` (numbers, NaN where it is not known; or several labels), or ``split``.
            values: (n,) values, an array, list or Series in the order of the rows; for several labels (n, K) with 1, 0, or NaN
                where it is not known.
            names: Of several labels, K.
            column: What the values of a ``group`` are called, such as ``patient``: a bundle keeps it with hashes of the groups
                that it was trained on, and compares only what is called the same.

        Raises:
            UsageError: There is no such role, there are more or fewer values than rows, or one of them cannot be.
        """
        values = values if isinstance(values, pa.Array | pa.ChunkedArray) else np.asarray(values)
        if len(values) != len(self):
            raise UsageError(
                f"{len(values):,} values of {role} for {len(self):,} images; give one for each, in their order"
            )
        made, metadata = role_column(role, values, names)
        if column:
            metadata["column"] = column
        field = pa.field(role, made.type, metadata=metadata or None)
        if role == "split":
            return replace(self, table=self.table.set_column(self.table.column_names.index(role), field, made))
        table = self.table.drop_columns([role]) if role in self.table.column_names else self.table
        return replace(self, table=table.append_column(field, made))

    def take(self, positions: Positions) -> FeatureSet:
        """Returns the view of some rows: positions in any order, a boolean mask, or a slice."""
        chosen = np.arange(len(self))[positions]
        return replace(self, table=self.table.take(chosen), keys=self.keys[chosen], rows=self.rows.take(chosen))

    def __getitem__(self, positions: Positions | tuple[Positions, EllipsisType]) -> FeatureSet:
        """Does what ``take`` does, also for ``features[positions, ...]``, as scikit-learn cuts folds."""
        rows = positions[0] if isinstance(positions, tuple) and positions[1:] == (...,) else positions
        if isinstance(rows, slice | np.ndarray | list):
            return self.take(rows)
        raise TypeError("a FeatureSet is cut by positions, a mask or a slice; to go through its rows use .blocks()")

    __iter__ = None  # else Python would count through __getitem__

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Refuses to be read into memory unasked."""
        raise UsageError(
            "a FeatureSet is not in memory; pass X, y = features.numpy(), or fit a head that reads block by block: "
            "make_head(..., out_of_core=True)"
        )

    def select(
        self, *, split: str | None = None, labelled: bool = False, classes: Sequence[str] | None = None
    ) -> FeatureSet:
        """Returns the view of the rows that are of one split, labelled, and of some classes.

        Raises:
            UsageError: No row is of that split, or of one of the classes.
        """
        rejects = self.rejects
        if split is not None:
            split = split_asked(split, {*rejects, *self.split_names()})
            rejects = {name: count for name, count in rejects.items() if name == split}
        return replace(self.take(self.mask(split=split, labelled=labelled, classes=classes)), rejects=rejects)

    # The values

    def read(self, dtype: npt.DTypeLike | None = np.float32, *, rows: Positions | None = None) -> npt.NDArray[Any]:
        """Reads features alone.

        Args:
            dtype: Of the result; None for the stored one.
            rows: Which rows, as in ``take``; by default all.

        Returns:
            (n, D) array, newly allocated.

        Raises:
            StoreMoved: A part is gone: the store was compacted meanwhile, or is damaged.
        """
        return (self.rows if rows is None else self.rows.take(rows)).read(dtype)

    def check(self) -> None:
        """Compares the columns' bytes with their checksums in every part that holds one of the rows.

        ``read``, ``numpy`` and ``blocks`` do not: they map and read at the disk's speed, and ``verify`` finds damage.

        Raises:
            CorruptPart: A part is damaged; the message names it and the next step.
        """
        self.rows.check()

    def numpy(self, dtype: npt.DTypeLike = np.float32, *, labelled: bool = False) -> tuple[npt.NDArray[Any], Labels]:
        """Reads everything into memory.

        Args:
            dtype: Of the features.
            labelled: Leave out rows without a label.

        Returns:
            Features (n, D), and labels (n,): text, with None where there is none; None if no row has one.
        """
        if labelled:
            return self.select(labelled=True).numpy(dtype)
        return self.read(dtype), self._labels_or_none()

    def blocks(
        self, rows: int | None = None, dtype: npt.DTypeLike = np.float32, *, memory: int | str | None = None
    ) -> Iterator[tuple[npt.NDArray[Any], Labels]]:
        """Yields (features, labels) of some rows at a time, in order; memory does not grow with n.

        Args:
            rows: At most so many rows; by default 8192, or what ``memory`` allows.
            dtype: Of the features.
            memory: What one block may take while it is read, in bytes or as text ("256MB"): its features, the same before
                they are converted and in order, and row numbers. Fixed buffers of about 3 MB come on top; a block that
                you keep while you ask for the next is yours.

        Raises:
            UsageError: ``rows`` is not positive, or not one row fits into ``memory``.
        """
        step = self._rows_per_block(rows, dtype, memory)
        any_label = self.unlabelled < len(self)
        places = (slice(start, start + step) for start in range(0, len(self), step))
        return ((self.read(dtype, rows=place), self.labels_of_rows(place) if any_label else None) for place in places)

    def _rows_per_block(self, rows: int | None, dtype: npt.DTypeLike, memory: int | str | None) -> int:
        if rows is not None and rows < 1:
            raise UsageError(f"rows={rows}: a block needs at least one row")
        if memory is None:
            return DEFAULT_BLOCK_ROWS if rows is None else rows
        row_bytes = self.rows.row_bytes(dtype)
        fitting = bytes_of(memory) // row_bytes
        if not fitting:
            raise UsageError(f"memory {memory!r} is too little for one row; give at least {row_bytes} bytes")
        return fitting if rows is None else min(rows, fitting)

    def dask(self, rows: int | None = None, dtype: npt.DTypeLike = np.float32) -> tuple[Any, Any]:
        """Returns the features, and the labels, as Dask arrays, for a cluster that sees the store under the same path.

        Tasks carry paths and row numbers, never data or open files. Rows without a label are kept: call
        ``select(labelled=True)`` first. ``xgboost.dask`` takes numbers as labels, made by ``codes``:
        ``dask.array.from_array(features.codes(), chunks=(X.chunks[0],))``.

        Args:
            rows: Rows of a chunk; by default as many as make about 64 MB.
            dtype: Of the features.

        Returns:
            Features (n, D), chunked by rows only, and labels (n,) of dtype object with the same chunks, text or None;
            None if no row has a label.
        """
        size = max(1, self.rows.width * np.dtype(dtype).itemsize)
        step = max(1, CHUNK_BYTES // size) if rows is None else self._rows_per_block(rows, dtype, None)
        features = features_array(self.rows, step, dtype)
        labels = self._labels_or_none()
        return features, None if labels is None else labels_array(labels, features.chunks[0])

    def _labels_or_none(self) -> Labels:
        return None if self.unlabelled == len(self) else self.labels


def with_told_labels(
    features: FeatureSet,
    labels: LabelSource,
    say: Callable[[str], None],
    rejects: Callable[[], pa.Array] = lambda: pa.array([], pa.string()),
) -> FeatureSet:
    """Does what ``FeatureSet.with_labels`` does, and says how many images they label and what of them is not used.

    Args:
        features: Of some images.
        labels: Their labels.
        say: Told one line.
        rejects: Gives the ids of the dataset's images that were rejected; asked only if labels are of no image here.
    """
    table = read_labels(labels)
    found = features.with_labels(table)
    labelled = len(found) - found.unlabelled
    parts = [f"{counted(len(found.classes), 'label')} on {labelled:,} of {counted(len(found), 'image')}"]
    parts += [*table.told(), *names_in_doubt(found.classes)]
    if found.unmatched:
        strangers = pc.unique(table.ids.filter(pc.invert(pc.is_in(table.ids, value_set=features.table["id"]))))
        rejected = pc.sum(pc.is_in(strangers, value_set=rejects())).as_py() or 0
        lost = "a rejected image" if rejected == 1 else "rejected images"
        parts += [f"{counted(rejected, 'id')} of {lost}"] if rejected else []
        nowhere = len(strangers) - rejected
        parts += [f"{counted(nowhere, 'id')} not among the images"] if nowhere else []
        found = replace(found, unmatched=found.unmatched - rejected)
    say(f"{table.name}: {'; '.join(parts)}")
    return found


_LISTED = 12


def counts_of(features: FeatureSet) -> dict[str, Any]:
    """Counts images, labels, duplicates, classes and splits; see ``FeatureSet.counts``."""
    return {
        "images": len(features),
        "labelled": len(features) - features.unlabelled,
        "unlabelled": features.unlabelled,
        "rejected": features.rejected,
        "duplicates": features.duplicates,
        "unmatched": features.unmatched,
        **({} if features.groups is None else {"groups": pc.count_distinct(features.table["group"]).as_py()}),
        "classes": _counts(features.table["label"]),
        "splits": _counts(features.table["split"]),
    }


def describe(features: FeatureSet) -> str:
    """Sums up a view in a few lines of text."""
    counts = features.counts()
    rest = [f"{counts[name]:,} {name}" for name in ("unlabelled", "rejected")]
    rest.append(counted(counts["duplicates"], "duplicate"))
    lines = [
        f"dataset  {features.origin.dataset}, of {features.origin.store}",
        f"space    {features.origin.space}",
        f"columns  {features.named_column}: {features.shape[1]:,} values, {features.precision_text}",
        f"images   {counts['images']:,} ({', '.join(rest)})",
        f"classes  {_listed(counts['classes'])}",
        f"splits   {_listed(counts['splits'])}",
    ]
    if "groups" in counts:
        lines.append(f"groups   {counts['groups']:,}")
    if counts["unmatched"]:
        unmatched = counted(counts["unmatched"], "id")
        lines.append(
            f"labels   {unmatched} of the labels {'matches' if counts['unmatched'] == 1 else 'match'} no image here"
        )
    return "\n".join(lines)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = pc.value_counts(column.drop_null())
    return dict(sorted((entry["values"], entry["counts"]) for entry in counted.to_pylist()))


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:_LISTED]]
    more = f", and {len(counts) - _LISTED:,} more" if len(counts) > _LISTED else ""
    return f"{len(counts)}: {', '.join(shown)}{more}" if counts else "none"


CHUNK_BYTES = 64 << 20


def features_array(rows: WideRows | KeptRows | ArrayRows, step: int, dtype: npt.DTypeLike) -> Any:
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


def read_rows(rows: WideRows | ArrayRows, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """One chunk's task."""
    return rows.read(dtype)


def _token(rows: WideRows | KeptRows | ArrayRows, step: int, dtype: str) -> str:
    """Names the same rows of the same files alike, so that Dask shares what two arrays have in common."""
    digest = hashlib.sha256(f"{rows.columns} {step} {dtype}".encode())
    if isinstance(rows, ArrayRows):
        digest.update(rows.read())
        return digest.hexdigest()[:32]
    if isinstance(rows, KeptRows):
        digest.update(np.ascontiguousarray(rows.kept))
        rows = rows.rows
    for part in rows.parts:
        digest.update(repr([(piece.path, piece.offset) for piece in part.parts]).encode())
        digest.update(np.ascontiguousarray(part.part))
        digest.update(np.ascontiguousarray(part.row))
    return digest.hexdigest()[:32]
