"""An index of a dataset's features, kept beside the store: made, brought up to date with a snapshot, and searched.

An inverted file (Sivic & Zisserman 2003, "Video Google") of features that are projected onto the axes along which they spread
most, as float16; what it finds is compared by all values of the features in the store. How much a search looks at is chosen
by the recall that is measured when the index is made; it is measured again when images come, which may be of other kinds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from featurepipe.curation.options import COSINE
from featurepipe.display import counted
from featurepipe.errors import StoreError, StoreLocked, StoreMoved, UsageError
from featurepipe.heads.blocks import iterate
from featurepipe.heads.moments import refuse_non_finite
from featurepipe.monitoring.near import (
    Directions,
    Nearest,
    approximate_index,
    faiss_threads,
    nearest,
    refined,
    require_faiss,
    sample_size,
    unit_vectors,
)
from featurepipe.progress import Progress, show
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.indexes import (
    INDEX_VERSION,
    IndexDocument,
    StoredIndex,
    digest_of_images,
    index_path,
    read_index,
    write_index,
)
from featurepipe.store.keys import Keys, SortedKeys, count_distinct, different, keys_from_arrow
from featurepipe.store.snapshots import OK

FEW = 200_000
"""Images up to which every one is compared, unless an index is asked for: that takes a second or less."""
ENOUGH = 0.99
"""The recall of the 10 nearest that a search is to have."""
_WIDTH = 128  # dimensions searched
_AXES_FROM = 2048  # vectors
_ASKED = 128  # queries of the measured recall; of an update, as many of the images that came
_AMONG = (
    50_000  # images among which an update looks for their nearest: new ones up to a half, and others drawn at random
)
_NOISE = 0.005  # of a recall that so many queries measure
_NEAREST = 10
_LEAST = 20_000  # vectors that a search scans at least: a millisecond, and few images are all looked at
_TIMES = (1, 2, 4, 8, 16)  # as many as that
_CANDIDATES = (64, 256, 1024)
_SCANNED, _COMPARED = 0.03, 15.0  # microseconds a vector that is scanned, and one that is read from the store
_CHANGED = 2  # times as many vectors, or as few, as the cells were made of: then they are made anew
_ROWS_AT_ONCE = 4096
_LARGEST = 65_504  # of float16

Single = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IndexProjection:
    """Makes of features what is searched: unit vectors, or the features on a scale on which they fit into float16."""

    distance: str
    scale: float
    directions: Directions
    offset: Single

    @classmethod
    def of(cls, stored: StoredIndex) -> IndexProjection:
        """What an index was made with."""
        axes = stored.axes if len(stored.axes) else None
        about = stored.document
        return cls(about.distance, about.scale, Directions(axes, stored.codes.shape[1]), stored.offset)

    @classmethod
    def fitted(cls, sample: Single, distance: str) -> IndexProjection:
        """Finds the axes along which a sample (n, D) of features spreads most."""
        refuse_non_finite(sample)
        scale = (
            1.0 if distance == COSINE else float(np.sqrt((sample.astype(np.float64) ** 2).sum(axis=1).mean())) or 1.0
        )
        scaled = cls(distance, scale, Directions(None, 0), np.zeros(0, np.float32)).scaled(sample)
        directions = Directions.fitted(scaled, _WIDTH)
        return cls(distance, scale, directions, directions.project(scaled).mean(axis=0))

    def scaled(self, rows: Single) -> Single:
        """Unit vectors, or rows divided by the scale."""
        if self.distance == COSINE:
            return unit_vectors(rows)
        refuse_non_finite(rows)
        divided: Single = rows / np.float32(self.scale)
        return divided

    def __call__(self, rows: Single) -> Single:
        """Projects features (n, D): (n, d)."""
        found: Single = np.clip(self.directions.project(self.scaled(rows)) - self.offset, -_LARGEST, _LARGEST)
        return np.ascontiguousarray(found)


class KeptIndex:
    """An index in memory, with the features that it is of.

    Memory: 2 bytes a value that is searched, 256 an image, once in a file that is mapped, and once more for the cells that were
    looked into; and 20 bytes an image for its row, of copies 36.

    Attributes:
        document: What the index says of itself.
        features: The images.
    """

    def __init__(self, stored: StoredIndex, features: FeatureSet) -> None:
        self.document, self.features = stored.document, features
        self._prepared = IndexProjection.of(stored)
        self._cells = Cells(stored)
        self._starts: Positions | None = None  # of each vector's copies in ``_order``; None where there are no copies
        if len(stored.rows) == stored.document.vectors:
            self._order = np.empty(len(stored.rows), np.int64)
            self._order[stored.rows] = np.arange(len(stored.rows))
        else:
            self._order = np.argsort(stored.rows, kind="stable").astype(np.int64)  # rows by their vector
            self._starts = np.searchsorted(stored.rows[self._order], np.arange(stored.document.vectors + 1))

    def search(self, queries: Single, top: int, *, without: Positions | None = None) -> Nearest:
        """Finds the nearest images of some queries; arguments and result as those of `featurepipe.monitoring.near.nearest`."""
        about = self.document
        count = min(max(about.candidates, 2 * top + 16), about.vectors)
        vectors = self._cells.search(self._prepared(queries), count)
        rows = self._rows_of(vectors)
        if without is not None:
            rows[(rows == without[:, None]) & (without >= 0)[:, None]] = -1
        return refined(self.features, queries, rows, top, distance=about.distance)

    def _rows_of(self, vectors: Positions) -> Positions:
        """(q, c) the rows of (q, k) vectors, all copies of an image; -1 for none, at the end."""
        starts = self._starts
        if starts is None:
            return np.where(vectors >= 0, self._order[np.maximum(vectors, 0)], -1)
        found = [
            np.concatenate([self._order[starts[one] : starts[one + 1]] for one in line[line >= 0]] or [_NONE])
            for line in vectors
        ]
        rows = np.full((len(found), max(1, *map(len, found))), -1, np.int64)
        for place, line in enumerate(found):
            rows[place, : len(line)] = line
        return rows


_NONE = np.empty(0, np.int64)


class Cells:
    """The inverted file of faiss, whose cells are filled when they are first looked into.

    Args:
        stored: What fills them.
    """

    def __init__(self, stored: StoredIndex) -> None:
        faiss = require_faiss()
        width = stored.codes.shape[1]
        centres = faiss.IndexFlatL2(width)
        centres.add(np.ascontiguousarray(stored.centres))
        kind, by_residual = faiss.ScalarQuantizer.QT_fp16, False
        index = faiss.IndexIVFScalarQuantizer(centres, width, len(stored.sizes), kind, faiss.METRIC_L2, by_residual)
        index.own_fields = False
        index.is_trained = True
        index.ntotal = stored.document.vectors
        self._index, self._centres, self._faiss = index, centres, faiss
        self._codes = np.ascontiguousarray(stored.codes).view(np.uint8)
        self._stops = np.cumsum(stored.sizes, dtype=np.int64)
        self._starts = self._stops - stored.sizes
        self._is_awaited = stored.sizes > 0  # of each cell: whether it has vectors that are not in it yet
        self._one_at_a_time = threading.Lock()
        self.probes = min(max(stored.document.probes, _least_probes(stored)), len(stored.sizes))

    def search(self, queries: Single, count: int) -> Positions:
        """(q, count) numbers of the vectors nearest to projected queries, of as many cells as ``probes`` says; -1 for none."""
        with self._one_at_a_time, faiss_threads(None):
            self._index.nprobe = self.probes
            apart, cells = self._centres.search(queries, self.probes)
            for cell in np.unique(cells[self._is_awaited[cells]]):
                self._fill(int(cell))
            found: Positions = self._index.search_preassigned(queries, count, cells, apart)[1]
        return found

    def _fill(self, cell: int) -> None:
        start, stop = int(self._starts[cell]), int(self._stops[cell])
        numbers = np.arange(start, stop, dtype=np.int64)
        pointers = (self._faiss.swig_ptr(array) for array in (numbers, self._codes[start:stop]))
        self._index.invlists.add_entries(cell, stop - start, *pointers)
        self._is_awaited[cell] = False


def _least_probes(stored: StoredIndex) -> int:
    return -(-_LEAST * len(stored.sizes) // max(1, stored.document.vectors))


def made_index(
    features: FeatureSet, distance: str, snapshot: str, *, seed: int = 0, silent: bool = False
) -> StoredIndex:
    """Makes an index of different images, and measures how much a search must look at.

    Features are read three times: to learn cells, to fill them, and to compare a sample of queries with all. Memory: 1 KB an
    image, and two blocks.

    Raises:
        UsageError: A value is NaN or infinite, or faiss is not installed.
    """
    first, row_of = _different(features)
    images = features if len(first) == len(features) else features.take(first)
    count, rng = len(images), np.random.default_rng(seed)
    prepared = IndexProjection.fitted(images.read(np.float32, rows=_drawn(count, _AXES_FROM, rng)), distance)
    drawn = _drawn(count, sample_size(count), rng)
    with show(len(drawn) + 2 * count, "index", silent=silent) as progress, faiss_threads(None):
        sample = np.concatenate(list(_projected(images.take(drawn), prepared, progress)))
        trained = approximate_index(sample, count, int(rng.integers(2**31)))  # which owns the quantizer
        quantizer = trained.quantizer
        centres = quantizer.reconstruct_n(0, quantizer.ntotal)
        cell, codes = _assigned(quantizer, _projected(images, prepared, progress), count, prepared.directions.width)
        axes = prepared.directions.axes
        about = IndexDocument(
            version=INDEX_VERSION, dataset=features.origin.dataset, snapshot=snapshot,
            images_digest=digest_of_images(features.keys), fingerprint=features.space_fingerprint,
            columns=list(features.columns), distance=distance, width=images.shape[1], vectors=count, trained_on=count,
            scale=prepared.scale, probes=1, candidates=_CANDIDATES[0], recall=0.0,
        )  # fmt: skip
        empty = np.zeros((0, prepared.directions.width), np.float32)
        stored = _by_cell(
            StoredIndex(
                about, images.keys, row_of.astype(np.uint32), empty if axes is None else axes, prepared.offset, centres,
                np.zeros(len(centres), np.uint32), codes,
            ),
            cell,
        )  # fmt: skip
        asked = _drawn(count, _ASKED, rng)
        queries = images.read(np.float32, rows=asked)
        true = nearest(images, queries, _NEAREST, distance=distance, without=asked, progress=progress)
    asked_for = _Measurement.of(images, asked, queries, true, np.zeros(len(asked), np.bool_))
    chosen = _chosen(stored, Cells(stored), asked_for)
    return _with(stored, **chosen, recall_made=chosen["recall"])


def refreshed(stored: StoredIndex, features: FeatureSet, snapshot: str) -> tuple[StoredIndex, int, int]:
    """Brings an index up to date with a snapshot: takes out what is gone, adds what is new, and measures what is found now.

    If that is too little, a search looks at more from now on. Of more than 50,000 images it is measured among so many of them.

    Returns:
        The index, how many vectors are new, and how many went.
    """
    first, _ = different(features.keys)
    place = SortedKeys(stored.keys).find(features.keys[first])
    kept = np.zeros(len(stored.keys), np.bool_)
    kept[place[place >= 0]] = True
    new = features.take(first[place < 0])
    centres = require_faiss().IndexFlatL2(stored.codes.shape[1])
    centres.add(np.ascontiguousarray(stored.centres))
    with faiss_threads(None):
        cell, codes = _assigned(
            centres, _projected(new, IndexProjection.of(stored), None), len(new), stored.codes.shape[1]
        )
    old = np.repeat(np.arange(len(stored.sizes)), stored.sizes)[kept]
    keys = np.concatenate([stored.keys[kept], new.keys])
    about = stored.document.model_copy(
        update={"snapshot": snapshot, "images_digest": digest_of_images(features.keys), "vectors": len(keys)}
    )
    both = StoredIndex(
        about, keys, SortedKeys(keys).find(features.keys).astype(np.uint32), stored.axes, stored.offset,
        stored.centres, stored.sizes, np.concatenate([stored.codes[kept], codes]),
    )  # fmt: skip
    fresh = _by_cell(both, np.concatenate([old, cell]))
    if len(keys):
        fresh = _with(fresh, **_measured_again(fresh, features.take(first), place < 0))
    return fresh, len(new), int((~kept).sum())


def _measured_again(stored: StoredIndex, images: FeatureSet, is_new: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """What a search is to look at, and its recall: as before if that is enough for the images that came and for the others."""
    rng = np.random.default_rng(0)
    kinds = np.flatnonzero(is_new), np.flatnonzero(~is_new)
    asked = np.concatenate([kind[_drawn(len(kind), _ASKED, rng)] for kind in kinds])
    came = kinds[0][_drawn(len(kinds[0]), max(_AMONG // 2, _AMONG - len(kinds[1])), rng)]
    others = kinds[1][_drawn(len(kinds[1]), _AMONG - len(came), rng)]
    among = np.unique(np.concatenate([asked, came, others]))
    some, own = images.take(among), np.searchsorted(among, asked)
    queries = some.read(np.float32, rows=own)
    true = nearest(some, queries, _NEAREST, distance=stored.document.distance, without=own)
    measured = _Measurement.of(some, own, queries, true, is_new[asked])
    thinned = _only(stored, some.keys)
    cells, candidates = Cells(thinned), stored.document.candidates
    probes = cells.probes
    now = _recalls(thinned, cells, measured, [probes], [candidates])[probes, candidates]
    return {"recall": now} if now >= ENOUGH else _chosen(thinned, cells, measured)


def _only(stored: StoredIndex, keys: Keys) -> StoredIndex:
    """The cells with some of their vectors alone; what the index says of itself stays."""
    kept = np.zeros(len(stored.keys), np.bool_)
    kept[SortedKeys(stored.keys).find(keys)] = True
    cell = np.repeat(np.arange(len(stored.sizes)), stored.sizes)[kept]
    sizes = np.bincount(cell, minlength=len(stored.sizes)).astype(np.uint32)
    return replace(stored, keys=stored.keys[kept], codes=stored.codes[kept], sizes=sizes)


def _different(features: FeatureSet) -> tuple[Positions, Positions]:
    """The first row of each different image, and for every row the number of its image among these."""
    rows, first = different(features.keys)
    return rows, np.searchsorted(rows, first)


def _drawn(count: int, most: int, rng: np.random.Generator) -> Positions:
    return np.sort(rng.choice(count, min(count, most), replace=False)).astype(np.int64)


def _projected(images: FeatureSet, prepared: IndexProjection, progress: Progress | None) -> Iterator[Single]:
    for _, block in iterate(images, rows=_ROWS_AT_ONCE, dtype=np.float32):
        yield prepared(block)
        if progress is not None:
            progress.advance(len(block))


def _assigned(
    quantizer: Any, blocks: Iterator[Single], count: int, width: int
) -> tuple[Positions, npt.NDArray[np.float16]]:
    """The cell of each of n projected vectors, and their codes."""
    cell, codes, start = np.empty(count, np.int64), np.empty((count, width), np.float16), 0
    for block in blocks:
        place = slice(start, start + len(block))
        codes[place] = block
        cell[place] = quantizer.search(block, 1)[1][:, 0]
        start = place.stop
    return cell, codes


def _by_cell(stored: StoredIndex, cell: Positions) -> StoredIndex:
    """Puts vectors into the order of their cells."""
    order = np.argsort(cell, kind="stable")
    number = np.empty(len(order), np.uint32)
    number[order] = np.arange(len(order), dtype=np.uint32)
    sizes = np.bincount(cell, minlength=len(stored.centres)).astype(np.uint32)
    return StoredIndex(
        stored.document, stored.keys[order], number[stored.rows], stored.axes, stored.offset, stored.centres, sizes,
        stored.codes[order],
    )  # fmt: skip


def _with(stored: StoredIndex, **changed: Any) -> StoredIndex:
    arrays = {name: getattr(stored, name) for name in stored.__dataclass_fields__ if name != "document"}
    return StoredIndex(stored.document.model_copy(update=changed), **arrays)


@dataclass(frozen=True)
class _Measurement:
    """Queries and what is the nearest to them, to measure what an index finds.

    Attributes:
        queries: (q, D) features.
        own: (q, 32) their keys.
        true: Of each the keys of its nearest images, (10, 32) or fewer.
        is_new: (q,) whether it came since the cells were made.
    """

    queries: Single
    own: Keys
    true: list[Keys]
    is_new: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls, images: FeatureSet, asked: Positions, queries: Single, true: Nearest, is_new: npt.NDArray[np.bool_]
    ) -> _Measurement:
        """Takes the keys of the images from which some were asked."""
        found = [images.keys[line[line >= 0]] for line in true.positions]
        return cls(queries, images.keys[asked], found, is_new)


def _recalls(
    stored: StoredIndex, index: Cells, measured: _Measurement, probes: Sequence[int], candidates: Sequence[int]
) -> dict[tuple[int, int], float]:
    """The share of the nearest that is found with each number of cells and of candidates: the lower one of old and new images."""
    number = SortedKeys(stored.keys)
    wanted = [number.find(keys) for keys in measured.true]
    itself = number.find(measured.own)
    prepared, found = IndexProjection.of(stored)(measured.queries), {}
    for cells in probes:
        index.probes = cells
        lines = index.search(prepared, min(max(candidates) + 1, stored.document.vectors))
        for count in candidates:
            pairs = zip(lines, itself, wanted, measured.is_new, strict=True)
            shares: tuple[list[float], list[float]] = [], []
            for line, me, true, is_new in pairs:
                if len(true):
                    shares[int(is_new)].append(float(np.isin(true, line[line != me][:count]).mean()))
            found[cells, count] = min([float(np.mean(kind)) for kind in shares if kind], default=1.0)
    return found


def _chosen(stored: StoredIndex, index: Cells, measured: _Measurement) -> dict[str, Any]:
    """The cheapest cells and candidates that find enough of the nearest; else those that find most."""
    vectors, tried = stored.document.vectors, []
    some = sorted({min(times * _least_probes(stored), len(stored.sizes)) for times in _TIMES})
    for (probes, candidates), recall in _recalls(stored, index, measured, some, _CANDIDATES).items():
        scanned = vectors * probes / len(stored.sizes)
        cost = scanned * _SCANNED + min(candidates, vectors) * _COMPARED
        tried.append((recall < ENOUGH, cost if recall >= ENOUGH else -recall, probes, candidates, recall))
    _, _, probes, candidates, recall = min(tried)
    return {"probes": probes, "candidates": candidates, "recall": recall}


@dataclass(frozen=True)
class ImageSearch:
    """How images are compared.

    Attributes:
        index: The index that is searched; None where every image is compared.
        why: Why it is so, in words.
        warnings: What people must be told.
    """

    index: KeptIndex | None
    why: str
    warnings: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """What a result says of it, as JSON values."""
        if self.index is None:
            return {"search": "exact", "why": self.why, "recall": 1.0}
        return {"search": "index", "why": self.why, "recall": self.index.document.recall}


def chosen_search(
    store: FeatureStore,
    features: FeatureSet,
    snapshot: str,
    *,
    is_current: bool,
    distance: str,
    wanted: str,
    say: Callable[[str], None],
    silent: bool = False,
) -> ImageSearch:
    """Chooses between comparing every image and an index, which is made, or brought up to date, where that is wanted.

    Args:
        store: The store.
        features: The images that are searched.
        snapshot: Run id of their snapshot.
        is_current: Whether that is the dataset's current snapshot: an index is kept of that alone.
        distance: ``cosine`` or ``euclidean``.
        wanted: ``auto``: an index if one is kept and there are many images; ``always``; or ``never``.
        say: Tells people what happens.
        silent: Show no progress.

    Raises:
        UsageError: An index is wanted of a snapshot that is not the current one, or faiss is not installed.
        StoreMoved: Images were forgotten while their index was made.
    """
    count = len(features)
    if wanted == "never" or (wanted == "auto" and count < FEW):
        return ImageSearch(None, "no index was wanted" if wanted == "never" else f"fewer than {FEW:,} images")
    require_faiss()
    path = index_path(store.path, features.origin.dataset, features.space_fingerprint, features.columns, distance)
    warnings: list[str] = []
    try:
        stored = read_index(path)
    except StoreError as error:
        stored, warnings = None, [str(error)]
    if stored is not None and _is_of(stored, features):
        return ImageSearch(KeptIndex(stored, features), "the index is of this snapshot")
    if not is_current:
        why = f"the index that is kept is not of snapshot {snapshot} but of the current one"
        if wanted == "always":
            raise UsageError(f"{why}; leave the snapshot out, or ask without an index")
        return ImageSearch(None, why, tuple(warnings))
    if stored is None and wanted == "auto":
        return ImageSearch(None, "no index is kept; --index always makes one", tuple(warnings))
    made, why = _up_to_date(stored, features, distance, snapshot, say, silent=silent)
    try:
        with store.lock(shared=True):  # nobody forgets an image meanwhile
            _refuse_rewritten(store, features, snapshot)
            write_index(store.path, made)
    except StoreMoved:
        raise
    except (StoreLocked, StoreError, OSError) as error:
        warnings.append(f"the index could not be kept: {error}")
    if made.document.recall < ENOUGH:
        warnings.append(
            f"the index finds {made.document.recall:.1%} of the {_NEAREST} nearest images; without it all are found"
        )
    return ImageSearch(KeptIndex(made, features), why, tuple(warnings))


def _refuse_rewritten(store: FeatureStore, features: FeatureSet, snapshot: str) -> None:
    """Refuses to keep an index of images of which some were forgotten while it was made: their vectors would come back.

    Raises:
        StoreMoved: The snapshot is not of these images any more.
    """
    now = store.snapshot(features.origin.dataset, snapshot, columns=["key", "status"])
    usable = None if now is None else now.filter(pc.equal(now["status"], OK))
    if usable is None or digest_of_images(keys_from_arrow(usable["key"])) != digest_of_images(features.keys):
        raise StoreMoved(f"images of dataset {features.origin.dataset} were forgotten while their index was made")


def _is_of(stored: StoredIndex, features: FeatureSet) -> bool:
    about = stored.document
    return _is_of_space(stored, features) and about.images_digest == digest_of_images(features.keys)


def _is_of_space(stored: StoredIndex, features: FeatureSet) -> bool:
    about = stored.document
    same = (about.fingerprint, about.columns, about.width)
    return same == (features.space_fingerprint, list(features.columns), features.shape[1])


def _up_to_date(
    stored: StoredIndex | None,
    features: FeatureSet,
    distance: str,
    snapshot: str,
    say: Callable[[str], None],
    *,
    silent: bool,
) -> tuple[StoredIndex, str]:
    images = counted(len(features), "image")
    if stored is not None and _is_of_space(stored, features) and stored.document.distance == distance:
        trained = stored.document.trained_on
        if trained / _CHANGED <= count_distinct(features.keys) <= trained * _CHANGED:
            fresh, new, gone = refreshed(stored, features, snapshot)
            recall, before = fresh.document.recall, stored.document.recall_made or stored.document.recall
            if recall >= min(ENOUGH, before) - _NOISE:
                why = f"the index was brought up to date: {counted(new, 'image')} came, {gone:,} went"
                say(why)
                return fresh, why
            say(f"with the {counted(new, 'image')} that came the index finds {recall:.1%} of the {_NEAREST} nearest")
    say(f"making an index of {images} by {features.named_column}")
    return made_index(features, distance, snapshot, silent=silent), f"an index of {images} was made"
